"""Looks at many batches within the time and the number of calls that one sensor tick may take."""

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anybatch import AsyncClient, Batch, BatchStatus, RetryPolicy
from anybatch.errors import Wait, classify
from anybatch.polling.pace import keep_listing, listing_pays, next_interval
from anybatch.polling.watcher import LANES

MAX_CALLS = 20  # most calls for one account in one tick, if the provider can list batches
ONCE = RetryPolicy(attempts=1)  # the next tick is the retry
_CLOSING = 0.5  # seconds that an event loop may take to close


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the batches of one submission are, taken together; counts are of requests."""

    status: str
    ended: bool
    ended_at: int | None
    completed: int
    failed: int
    total: int

    @property
    def stage(self) -> str:
        """The status and how many quarters are done; a change of it is worth an observation."""
        quarter = 4 * (self.completed + self.failed) // self.total if self.total else 0
        return f"{self.status}, {25 * quarter}%" if not self.ended and quarter else self.status


def progress_of(batches: Collection[Batch]) -> Progress:
    """Several batches as one: ended once all have; before that, with the status of one that runs."""
    running = [batch for batch in batches if not batch.status.is_terminal]
    counts = [batch.request_counts for batch in batches if batch.request_counts]
    ends = [batch.ended_at for batch in batches]
    worst = [batch.status for batch in batches if batch.status is not BatchStatus.COMPLETED]
    return Progress(
        status=running[0].raw_status if running else (worst[0] if worst else BatchStatus.COMPLETED).value,
        ended=not running,
        ended_at=max((end for end in ends if end), default=None) if not running else None,
        completed=sum(count.completed for count in counts),
        failed=sum(count.failed for count in counts),
        total=sum(count.total for count in counts),
    )


class Poller:
    """What was last seen of the batches of one account, and when to look at each again.

    It lives in the process that evaluates the sensor; a new process looks at everything once more.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Batch] = {}
        self._due: dict[str, float] = {}
        self._gone: dict[str, Exception] = {}
        self._not_before = 0.0
        self._fatal: Exception | None = None
        self._calls = MAX_CALLS

    def states(self, batch_ids: Collection[str]) -> Mapping[str, Batch | Exception]:
        """What is known of these batches: as last seen, or the error that ended the wait for one."""
        known = ((batch_id, self._gone.get(batch_id) or self._seen.get(batch_id)) for batch_id in batch_ids)
        return {batch_id: state for batch_id, state in known if state is not None}

    def keep_only(self, batch_ids: Collection[str]) -> None:
        """Forget all other batches: nothing waits for them any more."""
        for table in (self._seen, self._due, self._gone):
            for batch_id in table.keys() - set(batch_ids):
                del table[batch_id]

    async def look(
        self, client: AsyncClient, batch_ids: Collection[str], seconds: float, log: logging.Logger
    ) -> None:
        """Look at the batches that are due.

        Where the provider can list batches, this takes at most `MAX_CALLS` calls; the rest is due again in
        the next tick.

        Args:
            client: The client of the account.
            batch_ids: All batches of the account that something waits for.
            seconds: How long this may take.
            log: Gets a warning for each failed call.

        Raises:
            AuthenticationError: The account refuses the key, which concerns every batch.
            ConfigurationError: A setting is wrong, which concerns every batch.
        """
        self._log, self._fatal, now = log, None, time.time()
        due = [batch_id for batch_id in batch_ids if self._due.get(batch_id, 0.0) <= now]
        if not due or now < self._not_before:
            return
        random.shuffle(due)  # so that the budget does not cut off the same batches every time
        page_size = client.provider.list_limit
        self._calls = MAX_CALLS if page_size > 1 else len(due)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if listing_pays(len(due), len(batch_ids), page_size):
                    await self._read_listing(client, set(due))
                turn = iter([batch_id for batch_id in due if self._due.get(batch_id, 0.0) <= now])
                await asyncio.gather(*(self._lane(client, turn) for _ in due[:LANES]))
        if self._fatal is not None:
            raise self._fatal

    async def _read_listing(self, client: AsyncClient, wanted: set[str]) -> None:
        """Page through the provider's batches, newest first, as long as that saves calls."""
        seen = [self._seen.get(batch_id) for batch_id in wanted]
        oldest = min((batch.created_at or -math.inf) if batch else -math.inf for batch in seen)
        expected, listing = len(wanted), client.iter_batches()
        try:
            async for page in listing.pages():
                self._calls -= 1
                for batch in page:
                    if batch.id in wanted:
                        self._keep(client, batch)
                        wanted.discard(batch.id)
                page_oldest = min((batch.created_at for batch in page if batch.created_at), default=math.inf)
                pages, ours, missing = listing.reading.pages, expected - len(wanted), len(wanted)
                budget = min(expected, pages + self._calls)
                if not keep_listing(pages, ours, missing, page_oldest, oldest, budget=budget):
                    return
        except Exception as error:  # go on: retrieving each may still work, and logs its own errors
            self._calls -= 1
            self._log_error(error, "listing batches")

    async def _lane(self, client: AsyncClient, turn: Iterator[str]) -> None:
        for batch_id in turn:
            if self._fatal is not None or self._calls <= 0 or time.time() < self._not_before:
                return
            self._calls -= 1
            try:
                self._keep(client, await client.retrieve(batch_id))
            except Exception as error:
                self._handle_error(error, batch_id)

    def _keep(self, client: AsyncClient, batch: Batch) -> None:
        now = time.time()
        first, most = client.provider.poll_seconds
        wait = next_interval(now - (batch.created_at or now), first, most, random.random())
        self._seen[batch.id] = batch
        self._due[batch.id] = math.inf if batch.status.is_terminal else now + wait

    def _handle_error(self, error: Exception, batch_id: str) -> None:
        match classify(error).wait:
            case Wait.ENDS_ALL:
                self._fatal = error
                return
            case Wait.ENDS_ONE | Wait.UNEXPECTED:
                self._gone[batch_id] = error
            case Wait.SLOWS:
                self._not_before = time.time() + min(getattr(error, "retry_after", None) or 60.0, 3600.0)
            case Wait.BLIP:
                pass
        self._log_error(error, batch_id)

    def _log_error(self, error: Exception, what: str) -> None:
        bug = error if classify(error).wait is Wait.UNEXPECTED else None
        self._log.warning(f"{what}: {error or type(error).__name__}", exc_info=bug)


class BackgroundRunner:
    """Runs a coroutine in a thread of its own, so that a tick ends in time whatever a provider does.

    A timeout alone is not enough: a name that does not resolve blocks a worker thread, and an event loop
    waits for such threads before it closes.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def run(self, make: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> bool:
        """Run a coroutine for at most `seconds`.

        Returns:
            Whether it ended in time; False as well if an earlier one is still running.

        Raises:
            Exception: What the coroutine raised.
        """
        if self.is_busy:
            return False
        done = threading.Event()
        errors: list[Exception] = []

        async def bounded() -> None:
            try:
                async with asyncio.timeout(seconds):
                    await make()
                    done.set()
            except TimeoutError:
                pass
            except Exception as error:
                errors.append(error)

        self._thread = threading.Thread(
            target=lambda: asyncio.run(bounded()), name="anybatch-poll", daemon=True
        )
        self._thread.start()
        self._thread.join(seconds + _CLOSING)
        if errors:
            raise errors[0]
        return done.is_set()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()
