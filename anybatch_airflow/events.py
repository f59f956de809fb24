"""Schedules DAGs by batches that something else created.

    ended = BatchCompletedTrigger(conn_id="openai", metadata={"team": "reviews"})
    batches = Asset("reviews_batches", watchers=[AssetWatcher(name="batches", trigger=ended)])
    with DAG("collect_reviews", schedule=[batches]): …

Each batch that ends becomes an event of the asset, at least once. When several end within a few seconds,
Airflow gives the first to a run of the DAG and keeps the others for the run after the next event; so the last
of them is reported a second time.

On Airflow 3.3 the asset's state store keeps which batches were reported, and watchers of a connection with
the same `max_age` and `poll_interval` share one listing. On 3.1 and 3.2 each watcher lists for itself, and
after a restart of the triggerer it reports again what ended within `lookback`.
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
OVERLAP = 900.0  # seconds after its end at which a provider may first show that a batch has ended
# Seconds after which Airflow has stored an event that was handed to the triggerer, and has made its run.
SETTLING = 10.0
RETRY_SECONDS = 300.0  # between tries while the connection is wrong

Facts = dict[str, Any]
Snapshot = tuple[Facts, ...]


class BatchCompletedTrigger(BaseEventTrigger):
    """Fires for each batch of an account that ends in a wanted way; for an `AssetWatcher`.

    The event is `{"batch_id", "status", "provider", "conn_id", "endpoint", "model", "metadata", "total",
    "completed", "failed", "created_at", "ended_at"}`; a DAG reads it from the asset event's
    `extra["payload"]`. Trouble with the connection or the provider is logged, and never ends the watch.

    Args:
        conn_id: Airflow connection, see `AnyBatchHook`; may be left out if `provider` is given.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        batch_ids: Watch these batches only, each until it has ended. Default: all of the account.
        metadata: Only batches with these pairs; None as a value asks only that the key is there.
        endpoint: Only batches on this endpoint.
        model: Only batches of this model, at providers whose batches have one model.
        statuses: The ends that count: "completed", "failed", "expired", "cancelled".
        lookback: Seconds. A watcher without a record of what it has reported (a new one, and on Airflow 3.1
            and 3.2 any after a restart) begins with what ended within this time.
        max_age: Seconds that a batch may take from its creation to its end; the first listing goes back so
            far.
        poll_interval: Seconds between listings. Default: four times the provider's own interval, which is a
            minute for most.

    Raises:
        ValueError: One of `statuses` is not a way to end.
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
            raise ValueError(f"statuses: {', '.join(unknown)} is not a way to end; use {', '.join(ENDS)}")

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make this trigger again."""
        names = ("conn_id", "provider", "api_base", "batch_ids", "metadata", "endpoint", "model", "statuses",
                 "lookback", "max_age", "poll_interval")  # fmt: skip
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        kwargs = {name: getattr(self, name) for name in names}
        # As pairs: Airflow 3.1 hands a watcher's dict back changed, and no batch would match it.
        kwargs["metadata"] = [list(pair) for pair in sorted(self.metadata.items())]
        return path, kwargs

    # --- one listing for all watchers of a connection --------------------------------------------------

    def shared_stream_key(self) -> Hashable | None:
        """Watchers with equal keys share one listing.

        None for a watcher of named batches, which shares the poller of the waiting tasks instead.
        """
        if self.batch_ids is not None:
            return None
        return ("anybatch", self.conn_id, self.provider, self.api_base, self.max_age, self.poll_interval)

    @classmethod
    async def open_shared_stream(cls, kwargs: dict[str, Any]) -> AsyncIterator[Snapshot]:
        """After every listing, yield all batches that ended within `max_age`, the latest first."""
        hook = AnyBatchHook(kwargs["conn_id"], provider=kwargs["provider"], api_base=kwargs["api_base"])
        listing = Listing(kwargs["max_age"])
        while True:
            try:
                async with await hook.get_async_client(attempts=2) as client:
                    interval = kwargs["poll_interval"] or 4 * client.provider.poll_seconds[0]
                    async with aclosing(_listings(client, listing, interval)) as listings:
                        async for snapshot in listings:
                            yield snapshot
            except Exception as error:
                # The next try reads the connection again: somebody may have mended it or replaced its key.
                again = "%s: the batches cannot be listed, next try in %.0f s: %s"
                log.error(again, hook, RETRY_SECONDS, error, exc_info=_if_unexpected(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def filter_shared_stream(self, shared_stream: AsyncIterator[Any]) -> AsyncIterator[TriggerEvent]:
        """Fire for each batch that this watcher wants and has not reported yet."""
        record, recent = await Record.load(self), RecentEvents()
        async for snapshot in shared_stream:
            # Record what the previous listing reported only now, when Airflow has stored its events: else a
            # crash in between would lose them.
            await record.save()
            if (again := recent.to_repeat()) is not None:
                yield self._event(again)
            for facts in record.unreported(snapshot):
                if self._wants(facts):
                    yield self._event(facts)
                    recent.add(facts)
                record.add(facts)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Watch alone: for named batches, and on Airflow versions without shared streams."""
        if self.batch_ids is not None:
            events = self._named(self.batch_ids)
        else:
            events = self.filter_shared_stream(type(self).open_shared_stream(self.serialize()[1]))
        async for event in events:
            yield event

    # --- named batches ---------------------------------------------------------------------------------

    async def _named(self, batch_ids: Sequence[str]) -> AsyncIterator[TriggerEvent]:
        record, recent = await Record.load(self), RecentEvents()
        waits = {asyncio.create_task(self._ended(one)) for one in batch_ids if one not in record.reported}
        try:
            while waits:
                ended, waits = await asyncio.wait(
                    waits, timeout=SETTLING, return_when=asyncio.FIRST_COMPLETED
                )
                if not ended:
                    await record.save()
                if (again := recent.to_repeat()) is not None:
                    yield self._event(again)
                for facts in [task.result() for task in ended]:
                    if self._wants(facts):
                        yield self._event(facts)
                        recent.add(facts)
                    record.add(facts)
            await asyncio.sleep(SETTLING)
            await record.save()
            if (again := recent.to_repeat()) is not None:
                yield self._event(again)
            # Wait for ever: Airflow would start a watcher that returns again and again.
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
                log.error(again, batch_id, RETRY_SECONDS, error, exc_info=_if_unexpected(error))
                await asyncio.sleep(RETRY_SECONDS)

    # --- events ----------------------------------------------------------------------------------------

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


def _if_unexpected(error: Exception) -> Exception | None:
    """The error if it is a bug, whose traceback the log should have; else None."""
    from anybatch.errors import Wait, classify

    return error if classify(error).wait is Wait.UNEXPECTED else None


def facts_of(batch: Batch, ended_at: float | None = None) -> Facts:
    """What an event says of an ended batch; `ended_at` where the provider does not say when it ended."""
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
    """What a watcher has reported: recently ended batches by id, and all that ended before `floor`."""

    def __init__(self, store: Any, key: str, floor: float) -> None:
        self._store, self._key = store, key
        self._is_saved = True
        self.floor = floor
        self.reported: dict[str, float] = {}

    @classmethod
    async def load(cls, trigger: BatchCompletedTrigger) -> Record:
        """The record from the asset's state store, or a new one."""
        arguments = json.dumps(trigger.serialize()[1], sort_keys=True)
        key = "anybatch:" + hashlib.sha256(arguments.encode()).hexdigest()[:16]
        record = cls(getattr(trigger, "asset_state_store", None), key, time.time() - trigger.lookback)
        try:
            kept = await record._store.aget(key) if record._store is not None else None
        except ValueError as error:  # Airflow has no store for a trigger that several assets share
            log.warning(
                "after a restart of the triggerer this watcher reports again from `lookback` on: %s",
                error,
            )
            record._store, kept = None, None
        if kept:
            record.floor, record.reported = kept["floor"], kept["told"]
        return record

    def unreported(self, snapshot: Snapshot) -> Iterable[Facts]:
        """The batches of a listing that are new, the first to end first."""
        new = []
        for facts in snapshot:
            if facts["ended_at"] <= self.floor:
                break  # the snapshot begins with the latest
            if facts["batch_id"] not in self.reported:
                new.append(facts)
        return reversed(new)

    def add(self, facts: Facts) -> None:
        """Note that a batch was reported."""
        self.reported[facts["batch_id"]] = facts["ended_at"]
        self._is_saved = False

    async def save(self) -> None:
        """Store what was reported; an id is dropped once its batch can no longer turn up as new."""
        if self._is_saved:
            return
        latest = min(max(self.reported.values()), time.time())
        self.floor = max(self.floor, latest - OVERLAP)
        self.reported = {one: ended for one, ended in self.reported.items() if ended > self.floor}
        self._is_saved = True
        if self._store is not None:
            await self._store.aset(self._key, {"floor": self.floor, "told": self.reported})


class RecentEvents:
    """The last event, and whether others came shortly before it.

    When events come close together, Airflow makes one run of the DAG and gives it the first event. The others
    wait for the run after the next event, which may be days away. So the last of them is reported again, to
    start that run.
    """

    def __init__(self) -> None:
        self._last: Facts | None = None
        self._last_at = -math.inf
        self._is_crowd = False

    def add(self, facts: Facts) -> None:
        now = time.monotonic()
        self._is_crowd = self._is_crowd or now - self._last_at < SETTLING
        self._last, self._last_at = facts, now

    def to_repeat(self) -> Facts | None:
        """The event to report again, once no event has come for a while; else None."""
        now = time.monotonic()
        if not self._is_crowd or now - self._last_at < SETTLING:
            return None
        self._is_crowd, self._last_at = False, now
        return self._last


class Listing:
    """The batches of an account that a watch needs: those that run, and those that ended of late."""

    def __init__(self, max_age: float) -> None:
        self._max_age = max_age
        self._running: dict[str, float] = {}
        self._ended: dict[str, Facts] = {}
        self._seen_until = -math.inf

    def begin(self, now: float) -> float:
        """How far back to read the listing: to the oldest batch that runs, and to all new ones."""
        oldest = min(self._running.values(), default=math.inf)
        self._now, self._found = now, set[str]()
        return now - self._max_age if self._seen_until == -math.inf else min(oldest, self._seen_until)

    def take(self, batch: Batch) -> None:
        """Take in a batch from the listing."""
        self._found.add(batch.id)
        if not batch.status.is_terminal:
            self._running[batch.id] = float(batch.created_at or self._now)
        elif batch.id not in self._ended:
            was_running = self._running.pop(batch.id, None) is not None
            self._ended[batch.id] = facts_of(batch, self._now if was_running else None)

    def finish(self, *, is_whole: bool = True) -> Snapshot:
        """All batches that ended of late, the latest first.

        Args:
            is_whole: Whether the listing was read to its end. If not, a batch that was not in it may still
                run or have ended, so the next listing goes back as far as this one should have.
        """
        if is_whole:
            self._seen_until = self._now
            # A running batch that is not in the whole listing is gone from the account.
            self._running = {one: created for one, created in self._running.items() if one in self._found}
        since = self._now - self._max_age
        old = {one for one, facts in self._ended.items() if facts["ended_at"] <= since}
        for one in old - self._found:
            del self._ended[one]
        return tuple(sorted(self._ended.values(), key=lambda facts: facts["ended_at"], reverse=True))


async def _listings(client: AsyncClient, listing: Listing, interval: float) -> AsyncGenerator[Snapshot]:
    """Yield a snapshot after each listing, for ever.

    Raises:
        Exception: An error that a person has to mend. All others are logged, and the next listing is the
            retry.
    """
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
                log.warning("listing the batches failed; the watch goes on: %s", error)
        else:
            failures = 0
            if not batches.reading.is_complete and cuts.lasts(time.monotonic(), calm=2 * pause) is not None:
                log.warning(
                    "the provider's list of batches cannot be read to its end; what is beyond is not reported"
                )
            yield snapshot
        await asyncio.sleep(pause * random.uniform(0.9, 1.1))
