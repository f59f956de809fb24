"""Scheduling DAGs by batches that something else created.

    ended = BatchCompletedTrigger(conn_id="openai", metadata={"team": "reviews"})
    batches = Asset("reviews_batches", watchers=[AssetWatcher(name="batches", trigger=ended)])
    with DAG("collect_reviews", schedule=[batches]): …

Every batch that ends becomes one event of the asset, at least once; of several that end within a few seconds
the last is told twice, since Airflow would keep all but the first for the run after the next event.

On Airflow 3.3 what was told is kept in the asset's state store, and watchers of a connection with the same
`max_age` and `poll_interval` share one listing; on 3.1 and 3.2 each lists for itself, and after a restart of
the triggerer tells again what ended within `lookback`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from anybatch_airflow.hooks import AnyBatchHook

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Iterable, Mapping, Sequence

    from anybatch import AsyncClient, Batch

log = logging.getLogger(__name__)

ENDS = ("completed", "failed", "expired", "cancelled")
OVERLAP = 900.0  # seconds that a provider may be late to show that a batch has ended
SETTLING = (
    10.0  # seconds after which an event that was handed to the triggerer is in the database, and its run made
)
MENDING = 300.0  # seconds between looks while the connection is wrong

Facts = dict[str, Any]
Snapshot = tuple[Facts, ...]


class BatchCompletedTrigger(BaseEventTrigger):
    """Fires for each batch of an account that ends in a wanted way; for an `AssetWatcher`.

    The event is `{"batch_id", "status", "provider", "conn_id", "endpoint", "model", "metadata", "total",
    "completed", "failed", "created_at", "ended_at"}`; a DAG reads it from the asset event's
    `extra["payload"]`. Trouble with the connection or the provider is logged, and never ends the watch.

    :param conn_id: Airflow connection, see `AnyBatchHook`; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param batch_ids: Watch these batches only, and each until it has ended. Default: all of the account.
    :param metadata: Only batches with these pairs; None as a value asks only that the key is there.
    :param endpoint: Only batches on this endpoint.
    :param model: Only batches of this model, at providers whose batches have one.
    :param statuses: The ends that count: "completed", "failed", "expired", "cancelled".
    :param lookback: Seconds. A watcher without a record of what it told before (a new one, and on Airflow 3.1
        and 3.2 any after a restart) begins with what ended within this time.
    :param max_age: Seconds. How long before its end a batch may have been created, and so how far back the
        first listing goes.
    :param poll_interval: Seconds between listings. Default: four of the provider's own, a minute for most.
    """

    def __init__(
        self,
        *,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        batch_ids: Sequence[str] | None = None,
        metadata: Mapping[str, str | None] | Iterable[tuple[str, str | None]] | None = None,
        endpoint: str | None = None,
        model: str | None = None,
        statuses: Iterable[str] = ("completed",),
        lookback: float = 900.0,
        max_age: float = 172_800.0,
        poll_interval: float | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id or (None if provider else AnyBatchHook.default_conn_name)
        self.provider = provider
        self.api_base = api_base
        self.batch_ids = None if batch_ids is None else list(batch_ids)
        self.metadata = dict(metadata or {})
        self.endpoint = endpoint
        self.model = model
        self.statuses = list(statuses)
        self.lookback = lookback
        self.max_age = max_age
        self.poll_interval = poll_interval
        if unknown := sorted({*self.statuses} - {*ENDS}):
            raise ValueError(f"statuses: no {', '.join(unknown)}; a batch ends {', '.join(ENDS)}")

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make this trigger again."""
        names = ("conn_id", "provider", "api_base", "batch_ids", "metadata", "endpoint", "model", "statuses",
                 "lookback", "max_age", "poll_interval")  # fmt: skip
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        kwargs = {name: getattr(self, name) for name in names}
        # In pairs: Airflow 3.1 gives a watcher's dict back as another one, which no batch would match.
        kwargs["metadata"] = [list(pair) for pair in sorted(self.metadata.items())]
        return path, kwargs

    # --- one listing for all watchers of a connection --------------------------------------------------

    def shared_stream_key(self) -> Hashable | None:
        """What makes two watchers share a listing; those of named batches share the triggers' poller."""
        if self.batch_ids is not None:
            return None
        return ("anybatch", self.conn_id, self.provider, self.api_base, self.max_age, self.poll_interval)

    @classmethod
    async def open_shared_stream(cls, kwargs: dict[str, Any]) -> AsyncIterator[Snapshot]:
        """Yield, after every listing, all batches that ended within `max_age`, the latest first."""
        hook = AnyBatchHook(kwargs["conn_id"], provider=kwargs["provider"], api_base=kwargs["api_base"])
        listing = Listing(kwargs["max_age"])
        while True:
            try:
                async with await hook.get_async_client(attempts=2) as client:
                    interval = kwargs["poll_interval"] or 4 * client.provider.poll_seconds[0]
                    async with aclosing(_looks(client, listing, interval)) as looks:
                        async for snapshot in looks:
                            yield snapshot
            except Exception as error:
                # The connection is read anew: it may have been mended, or its key replaced.
                again = "%s: no batches can be listed, next try in %.0f s: %s"
                log.error(again, hook, MENDING, error, exc_info=_bug(error))
                await asyncio.sleep(MENDING)

    async def filter_shared_stream(self, shared_stream: AsyncIterator[Any]) -> AsyncIterator[TriggerEvent]:
        """Fire for what this watcher wants and has not told before."""
        record, recent = await Record.load(self), Recent()
        async for snapshot in shared_stream:
            # What was told at the look before is in the database by now: only then is it put on record.
            await record.save()
            if (left := recent.left_behind()) is not None:
                yield self._event(left)
            for facts in record.untold(snapshot):
                if self._wants(facts):
                    yield self._event(facts)
                    recent.add(facts)
                record.tell(facts)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """The whole of it for one watcher: for named batches, and on Airflow without shared streams."""
        if self.batch_ids is not None:
            events = self._named(self.batch_ids)
        else:
            events = self.filter_shared_stream(type(self).open_shared_stream(self.serialize()[1]))
        async for event in events:
            yield event

    # --- named batches ---------------------------------------------------------------------------------

    async def _named(self, batch_ids: Sequence[str]) -> AsyncIterator[TriggerEvent]:
        record, recent = await Record.load(self), Recent()
        waits = {asyncio.create_task(self._ended(one)) for one in batch_ids if one not in record.told}
        try:
            while waits:
                ended, waits = await asyncio.wait(
                    waits, timeout=SETTLING, return_when=asyncio.FIRST_COMPLETED
                )
                if not ended:
                    await record.save()
                if (left := recent.left_behind()) is not None:
                    yield self._event(left)
                for facts in [task.result() for task in ended]:
                    if self._wants(facts):
                        yield self._event(facts)
                        recent.add(facts)
                    record.tell(facts)
            await asyncio.sleep(SETTLING)
            await record.save()
            if (left := recent.left_behind()) is not None:
                yield self._event(left)
            # A watcher that returns is started again, and again.
            await asyncio.Event().wait()
        finally:
            for task in waits:
                task.cancel()

    async def _ended(self, batch_id: str) -> Facts:
        from anybatch import NotFoundError

        hook = AnyBatchHook(self.conn_id, provider=self.provider, api_base=self.api_base)
        while True:
            try:
                watcher = await hook.get_watcher()
                return facts_of(await watcher.wait(batch_id))
            except NotFoundError as error:
                log.error("%s", error)
                return {"batch_id": batch_id, "status": "not found", "ended_at": time.time()}
            except Exception as error:
                again = "batch %s cannot be watched, next try in %.0f s: %s"
                log.error(again, batch_id, MENDING, error, exc_info=_bug(error))
                await asyncio.sleep(MENDING)

    # --- what is told ----------------------------------------------------------------------------------

    def _wants(self, facts: Facts) -> bool:
        if facts["status"] not in self.statuses:
            return False
        if self.endpoint is not None and facts["endpoint"] != self.endpoint:
            return False
        if self.model is not None and facts["model"] != self.model:
            return False
        return all(
            key in facts["metadata"] and value in (None, facts["metadata"][key])
            for key, value in self.metadata.items()
        )

    def _event(self, facts: Facts) -> TriggerEvent:
        self.log.info("batch %s is %s", facts["batch_id"], facts["status"])
        return TriggerEvent({**facts, "conn_id": self.conn_id})  # type: ignore[no-untyped-call]


def _bug(error: Exception) -> Exception | None:
    """An error that nobody expects, and whose traceback a log should have."""
    from anybatch.errors import Wait, classify

    return error if classify(error).wait is Wait.UNEXPECTED else None


def facts_of(batch: Batch, ended_at: float | None = None) -> Facts:
    """The part of an ended batch that an event carries."""
    counts = batch.request_counts.model_dump() if batch.request_counts else {}
    return {
        "batch_id": batch.id,
        "status": batch.status.value,
        "provider": batch.provider,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "metadata": batch.metadata or {},
        "created_at": batch.created_at,
        "ended_at": batch.ended_at or ended_at or batch.created_at or 0,
        **{name: counts.get(name) for name in ("total", "completed", "failed")},
    }


class Record:
    """What a watcher has told: the batches that ended of late by id, all before `floor` without."""

    def __init__(self, store: Any, key: str, floor: float) -> None:
        self._store, self._key = store, key
        self._is_saved = True
        self.floor = floor
        self.told: dict[str, float] = {}

    @classmethod
    async def load(cls, trigger: BatchCompletedTrigger) -> Record:
        """The record from the asset's state store; a new one where there is none."""
        arguments = json.dumps(trigger.serialize()[1], sort_keys=True)
        key = "anybatch:" + hashlib.sha256(arguments.encode()).hexdigest()[:16]
        record = cls(getattr(trigger, "asset_state_store", None), key, time.time() - trigger.lookback)
        try:
            kept = await record._store.aget(key) if record._store is not None else None
        except ValueError as error:  # a trigger that several assets share has no store of its own
            log.warning("what was told is not kept over a restart of the triggerer: %s", error)
            record._store, kept = None, None
        if kept:
            record.floor, record.told = kept["floor"], kept["told"]
        return record

    def untold(self, snapshot: Snapshot) -> Iterable[Facts]:
        """The batches of a listing that are new, the first to end first."""
        new = []
        for facts in snapshot:
            if facts["ended_at"] <= self.floor:
                break  # the latest are first
            if facts["batch_id"] not in self.told:
                new.append(facts)
        return reversed(new)

    def tell(self, facts: Facts) -> None:
        self.told[facts["batch_id"]] = facts["ended_at"]
        self._is_saved = False

    async def save(self) -> None:
        """Keep what was told; ids only as long as their batch might come up again."""
        if self._is_saved:
            return
        latest = min(max(self.told.values()), time.time())
        self.floor = max(self.floor, latest - OVERLAP)
        self.told = {one: ended for one, ended in self.told.items() if ended > self.floor}
        self._is_saved = True
        if self._store is not None:
            await self._store.aset(self._key, {"floor": self.floor, "told": self.told})


class Recent:
    """The last event, and whether others were close before it.

    Of events that come close together Airflow makes one run of the DAG, which is given the first. The others
    are given to the run after the next event, and that may be days away: so the last of them is told again.
    """

    def __init__(self) -> None:
        self._last: Facts | None = None
        self._told_at = -math.inf
        self._is_crowd = False

    def add(self, facts: Facts) -> None:
        now = time.monotonic()
        self._is_crowd = self._is_crowd or now - self._told_at < SETTLING
        self._last, self._told_at = facts, now

    def left_behind(self) -> Facts | None:
        """What is to be told again, once nothing has been told for a while; else None."""
        now = time.monotonic()
        if not self._is_crowd or now - self._told_at < SETTLING:
            return None
        self._is_crowd, self._told_at = False, now
        return self._last


class Listing:
    """The account's batches as far as a watch needs them: those that run, and those that ended of late."""

    def __init__(self, max_age: float) -> None:
        self._max_age = max_age
        self._running: dict[str, float] = {}
        self._ended: dict[str, Facts] = {}
        self._seen_until = -math.inf

    def begin(self, now: float) -> float:
        """How far back the listing has to be read: to the oldest that runs, and to all new ones."""
        oldest = min(self._running.values(), default=math.inf)
        self._now, self._found = now, set[str]()
        return now - self._max_age if self._seen_until == -math.inf else min(oldest, self._seen_until)

    def take(self, batch: Batch) -> None:
        """Take in a batch as it is listed."""
        self._found.add(batch.id)
        if not batch.status.is_terminal:
            self._running[batch.id] = float(batch.created_at or self._now)
        elif batch.id not in self._ended:
            was_running = self._running.pop(batch.id, None) is not None
            self._ended[batch.id] = facts_of(batch, self._now if was_running else None)

    def finish(self, *, is_whole: bool = True) -> Snapshot:
        """All that ended, the latest first.

        Where the pages were not all there are, what was not on them may run, or have ended, all the same: the
        next listing has to go back as far as this one should have.
        """
        if is_whole:
            self._seen_until = self._now
            # What runs and was not on the pages is gone from the account.
            self._running = {one: created for one, created in self._running.items() if one in self._found}
        since = self._now - self._max_age
        old = {one for one, facts in self._ended.items() if facts["ended_at"] <= since}
        for one in old - self._found:
            del self._ended[one]
        return tuple(sorted(self._ended.values(), key=lambda facts: facts["ended_at"], reverse=True))


async def _looks(client: AsyncClient, listing: Listing, interval: float) -> AsyncGenerator[Snapshot]:
    """One listing after another; ends with the error that a person has to mend, and with no other."""
    from anybatch.errors import classify
    from anybatch.polling.pace import Trouble

    trouble, cuts, failures = Trouble(), Trouble(), 0
    while True:
        pause = interval
        try:
            batches = client.iter_batches(since=listing.begin(time.time()))
            async for batch in batches:
                listing.take(batch)
            snapshot = listing.finish(is_whole=batches.reading.is_complete)
        except Exception as error:
            if classify(error).wait.ends:
                raise
            failures += 1
            asked = getattr(error, "retry_after", None)
            pause = min(interval * 2.0 ** min(failures, 6) if asked is None else max(asked, interval), 3600.0)
            if trouble.lasts(time.monotonic(), calm=2 * pause) is not None:
                log.warning("listing batches fails, still watching: %s", error)
        else:
            failures = 0
            if not batches.reading.is_complete and cuts.lasts(time.monotonic(), calm=2 * pause) is not None:
                log.warning(
                    "the list of batches cannot be read to its end; what is beyond it, nobody is told of"
                )
            yield snapshot
        await asyncio.sleep(pause * random.uniform(0.9, 1.1))
