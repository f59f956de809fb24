"""One poller for all waiting batches of an account.

All waits of a process share one `Watcher` per event loop and account: one client, one connection pool, one
schedule. A few batches are retrieved one by one; many are read off the provider's listing, a hundred per
call. `pace.py` decides what to do next.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from itertools import chain
from operator import attrgetter
from typing import TypeVar

from ..errors import DeadlineExceededError, Wait, classify
from ..models import Batch, BatchStatus
from .listing import Reading
from .pace import FEW, LONGEST_PAUSE, Trouble, before_deadline, keep_listing, next_interval, plan_sweep, utc
from .schedule import Schedule, Waiter, Watched, copy_of
from .source import MakeClient, Polling, Source

__all__ = ["LANES", "Watcher"]

T = TypeVar("T")
log = logging.getLogger(__name__)

LANES = 8  # concurrent retrieves
ONE_BY_ONE = 256  # the most retrieves in one sweep; the other batches keep their place
REFUSALS = 5  # how often one page of a listing is requested again after a 429
CALL_SECONDS = 120.0  # a call that takes longer counts as failed
NO_LISTING = (120.0, 1800.0)  # seconds without listings after one that did not pay: at first, and at most
LATE_LOOK = 60.0  # seconds for a wait that begins after its deadline
WALL_CLOCK = 60.0  # seconds between checks of the wall clock, which may jump
CANCEL_AGAIN = 0.1  # seconds until a poll task that was cancelled is checked again
SLICE = 250  # records handled before the event loop gets a turn
# The same for waits that end or report progress: a line in a task's log takes a millisecond or two.
NOTICES = 10


class Watcher:
    """Waits for any number of batches of one account in one event loop; made by `registry.get_watcher`.

    It opens a client when the first wait begins and closes it before the last wait returns.
    """

    def __init__(self, key: str, make_client: MakeClient, *, clock: Callable[[], float] = time.time) -> None:
        self.key = key
        self._make_client = make_client
        self._clock = clock
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._batches: dict[str, Watched] = {}
        self._schedule = Schedule(1)
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_for = math.inf
        self._provider: str | None = None
        self._odd_statuses: set[str] = set()
        self._trouble = Trouble()
        self._first, self._most, self._page_size = 15.0, 300.0, 0
        self._not_before = self._next_sweep = self._list_again = -math.inf
        self._failures = self._slowed = self._unpaid = 0
        self._unpaid_for = 0  # how many batches were waited for when a listing last did not pay
        # All batches of one sweep share its time and its jitter, so that they stay together.
        self._began, self._roll = -math.inf, 0.5

    async def wait(
        self,
        batch_id: str,
        *,
        deadline: float | None = None,
        created_at: float | None = None,
        on_progress: Callable[[Batch], None] | None = None,
    ) -> Batch:
        """Wait until a batch has ended. Temporary failures do not end the wait.

        Args:
            batch_id: The batch's id.
            deadline: When to stop waiting, unix seconds. Even after a passed deadline the batch is polled
                once.
            created_at: When the batch was created, unix seconds; knowing its age saves calls.
            on_progress: Called with the batch whenever its status or counts change.

        Returns:
            The batch, with a terminal status.

        Raises:
            DeadlineExceededError: The batch had not ended in time.
            APIError: The provider would refuse every poll: AuthenticationError, NotFoundError,
                BadRequestError.
        """
        watched, waiter = self._join(batch_id, deadline, created_at, on_progress)
        try:
            return await waiter
        finally:
            if self._leave(watched, waiter):
                await self._close()

    # --- who waits -----------------------------------------------------------------------------------

    def _join(
        self,
        batch_id: str,
        deadline: float | None,
        created_at: float | None,
        on_progress: Callable[[Batch], None] | None,
    ) -> tuple[Watched, Waiter]:
        now = self._clock()
        watched = self._batches.get(batch_id)
        if watched is None:
            watched = self._batches[batch_id] = Watched(batch_id, created_at, now)
        deadline = math.inf if deadline is None else deadline
        waiter = Waiter(deadline, deadline if deadline > now else now + LATE_LOOK, on_progress)
        watched.waiters.append(waiter)
        self._waiting += 1
        self._set_alarm(waiter.ends)
        if self._task is None or self._task.done():
            self._wake = asyncio.Event()
            self._ready = False
            # In a context of its own, its log lines do not go to the log of the task that waited first.
            self._task = asyncio.create_task(
                self._run(), name=f"anybatch watcher {self.key}", context=contextvars.Context()
            )
        elif self._ready:
            self._look_soon(watched)
        return watched, waiter

    def _leave(self, watched: Watched, waiter: Waiter) -> bool:
        """Remove a waiter; return whether it was the last one."""
        self._detach(watched, waiter)
        self._waiting -= 1
        return self._waiting == 0

    def _detach(self, watched: Watched, waiter: Waiter) -> None:
        if waiter in watched.waiters:
            watched.waiters.remove(waiter)
        if not watched.waiters and self._batches.get(watched.batch_id) is watched:
            del self._batches[watched.batch_id]

    def _set_alarm(self, ends: float) -> None:
        """Check deadlines at that time, with one timer for all; it also checks the wall clock in between."""
        if ends < self._alarm_for:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_for = ends
            delay = min(ends - self._clock(), WALL_CLOCK)
            self._alarm = asyncio.get_running_loop().call_later(delay, self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._alarm, self._alarm_for = None, math.inf
        now, nearest, ended = self._clock(), math.inf, 0
        for watched in list(self._batches.values()):
            for waiter in list(watched.waiters):
                if waiter.ends <= now + 0.001 and ended < NOTICES:
                    self._expire(watched, waiter)
                    ended += 1
                else:
                    nearest = min(nearest, waiter.ends)
        if nearest < math.inf:
            self._set_alarm(max(nearest, now + 0.25) if ended < NOTICES else now)

    def _expire(self, watched: Watched, waiter: Waiter) -> None:
        self._detach(watched, waiter)
        waiter.fail(
            DeadlineExceededError(
                f"batch {watched.batch_id} was {watched.status or 'not seen yet'} at the deadline, "
                f"{utc(waiter.deadline)}; it is left running",
                provider=self._provider,
                batch_id=watched.batch_id,
            )
        )

    def _drop(self, watched: Watched) -> list[Waiter]:
        """Stop watching a batch; return its waiters, which the caller must end."""
        if self._batches.get(watched.batch_id) is watched:
            del self._batches[watched.batch_id]
        waiters, watched.waiters = watched.waiters, []
        return waiters

    async def _fail_all(self, error: Exception) -> None:
        batches, self._batches = self._batches, {}
        for number, watched in enumerate(batches.values()):
            for waiter in self._drop(watched):
                waiter.fail(copy_of(error))
            if number % NOTICES == 0:
                await asyncio.sleep(0)

    # --- the poll task -------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with self._make_client() as client:
                await self._begin(client.provider)
                while True:
                    await self._sleep()
                    await self._sweep(client)
        except asyncio.CancelledError:
            if self._task is asyncio.current_task():  # the event loop is ending, while waits remain
                for watched in list(self._batches.values()):
                    for waiter in self._drop(watched):
                        waiter.cancel()
            raise
        except Exception as error:
            if self._task is not asyncio.current_task():
                log.warning("%s: closing the client failed: %s", self.key, error)
                return
            self._task = None  # a wait that begins from now on starts a new task
            await self._fail_all(error)

    async def _close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm, self._alarm_for = None, math.inf
        task, self._task = self._task, None
        while task is not None and not task.done():
            # If it is being cancelled since the event loop is ending, it may be closing its client, which a
            # second cancel would interrupt. If its own timeout has swallowed the cancel, cancel it again.
            if not task.cancelling():
                task.cancel()
            await asyncio.wait([task], timeout=CANCEL_AGAIN)

    async def _begin(self, provider: Polling) -> None:
        self._first, self._most = provider.poll_seconds
        self._page_size = provider.list_limit or 0
        self._schedule = Schedule(self._grain)
        self._failures = self._slowed = 0
        self._ready = True
        for number, watched in enumerate(list(self._batches.values())):
            self._look_soon(watched)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)

    @property
    def _grain(self) -> float:
        """The least seconds between two sweeps; polls due within that time are made together."""
        return max(self._first / 5, 0.01)

    def _look_soon(self, watched: Watched) -> None:
        """Poll a new waiter's batch within one grain, together with others that arrive within it."""
        left = min((waiter.deadline for waiter in watched.waiters), default=math.inf) - self._clock()
        delay = self._grain * random.uniform(0.5, 1)
        self._look_in(min(delay, left / 2) if left > 0 else 0, watched)

    def _look_in(self, delay: float, watched: Watched) -> None:
        if watched.waiters:
            self._schedule.put(watched, asyncio.get_running_loop().time() + delay)
            if watched.queued == self._schedule.next:
                self._wake.set()

    async def _sleep(self) -> None:
        """Return when a batch may be due, the account may be polled, and it is time for another sweep."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            earliest = max(self._not_before, self._next_sweep)
            at = max(earliest, self._schedule.next)
            if at <= loop.time():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(at if at < math.inf else None):
                    await self._wake.wait()

    # --- polling -------------------------------------------------------------------------------------

    async def _sweep(self, client: Source) -> None:
        """Poll every batch that is due."""
        now = asyncio.get_running_loop().time()
        self._began, self._roll = now, random.random()
        grown = len(self._batches) >= 2 * self._unpaid_for  # such as when hundreds of waits begin one by one
        listable = self._page_size > 1 and (now >= self._list_again or grown)
        due = self._schedule.take(now, None if listable else ONE_BY_ONE)
        await asyncio.sleep(0)
        if due and listable and (wanted := self._wanted_off_listing(now)):
            await asyncio.sleep(0)
            await self._read_listing(client, wanted)
            due = [watched for watched in due if watched.waiters and watched.queued == math.inf]  # not seen
        if due:
            await self._retrieve_each(client, due)
        ended = asyncio.get_running_loop().time()
        self._next_sweep = ended + max(self._grain, min((ended - now) / 2, self._most))

    def _wanted_off_listing(self, now: float) -> dict[str, Watched]:
        """Return the batches to read off the listing: due now, or within a quarter of their interval."""
        if len(self._batches) <= FEW:
            return {}
        newest_first = sorted(self._batches.values(), key=attrgetter("created_at"), reverse=True)
        soon, places, grain = [], [], self._grain
        for place, watched in enumerate(newest_first, 1):
            if watched.due <= now + max(grain, watched.interval / 4):
                soon.append(watched)
                places.append(place)
        return {watched.batch_id: watched for watched in soon[: plan_sweep(places, self._page_size)]}

    async def _read_listing(self, client: Source, wanted: dict[str, Watched]) -> None:
        """Page through the listing, update all batches seen there, and remove them from `wanted`."""
        expected, refused = len(wanted), 0
        oldest = min(watched.created_at for watched in wanted.values())
        reading, ours = Reading(), set[str]()
        while True:
            try:
                page = await self._call(client.list(after=reading.after, limit=self._page_size))
            except Exception as error:
                self._report(error, "listing batches")
                if classify(error).wait is not Wait.SLOWS or refused == REFUSALS:
                    return self._listing_paid(False)
                # Request the same page again: starting over later would never get past it.
                refused += 1
                self._slow_down(error)
                await asyncio.sleep(self._not_before - asyncio.get_running_loop().time())
                continue
            refused = 0
            for number, batch in enumerate(reading.take(page)):
                if number % NOTICES == 0:
                    await asyncio.sleep(0)
                wanted.pop(batch.id, None)
                if watched := self._batches.get(batch.id):
                    ours.add(batch.id)
                    self._saw(watched, batch)
            await asyncio.sleep(0)
            missing = len(wanted)
            page_oldest = min((batch.created_at for batch in page if batch.created_at), default=math.inf)
            if reading.is_over or not keep_listing(
                reading.pages, len(ours), missing, page_oldest, oldest, budget=expected
            ):
                return self._listing_paid(expected - missing >= reading.pages)

    def _listing_paid(self, paid: bool) -> None:
        """After a listing that cost more calls than it saved, use none for a while, longer each time."""
        self._unpaid = 0 if paid else self._unpaid + 1
        if not paid:
            self._unpaid_for = len(self._batches)
            pause, most = NO_LISTING
            pause = min(most, pause * 2.0 ** min(self._unpaid - 1, 10))
            self._list_again = asyncio.get_running_loop().time() + pause

    async def _retrieve_each(self, client: Source, due: list[Watched]) -> None:
        turn = iter(due[:ONE_BY_ONE])
        loop = asyncio.get_running_loop()

        async def lane() -> None:
            while loop.time() >= self._not_before and (watched := next(turn, None)):
                if self._batches.get(watched.batch_id) is watched:
                    await self._look(client, watched)

        async with asyncio.TaskGroup() as lanes:
            for _ in due[:LANES]:
                lanes.create_task(lane())
        for watched in chain(turn, due[ONE_BY_ONE:]):
            self._look_in(watched.due - loop.time(), watched)  # it keeps its place

    async def _look(self, client: Source, watched: Watched) -> None:
        try:
            batch = await self._call(client.retrieve(watched.batch_id))
        except Exception as error:
            match classify(error).wait:
                case Wait.ENDS_ALL:
                    await self._fail_all(error)
                case Wait.ENDS_ONE | Wait.UNEXPECTED:
                    for waiter in self._drop(watched):
                        waiter.fail(copy_of(error))
                case Wait.SLOWS:
                    self._report(error, watched.batch_id)
                    self._slow_down(error)
                    self._look_in(0, watched)
                case Wait.BLIP:
                    self._report(error, watched.batch_id)
                    self._failures += 1
                    if self._failures % LANES == 0:  # no call gets through, so it is not only this batch
                        self._slow_down()
                    again = self._first * 2.0 ** min(self._failures - 1, 10)
                    self._look_in(min(again, self._interval(watched)), watched)
        else:
            self._saw(watched, batch)

    async def _call(self, call: Awaitable[T]) -> T:
        async with asyncio.timeout(CALL_SECONDS):
            answer = await call
        self._failures = self._slowed = 0
        return answer

    def _saw(self, watched: Watched, batch: Batch) -> None:
        """Update a batch from the provider's answer, and tell its waiters."""
        self._provider = batch.provider
        if batch.created_at is not None:
            watched.created_at = batch.created_at
        self._note_status(watched, batch)
        for waiter in list(watched.waiters):
            waiter.report(batch)
        if batch.status.is_terminal:
            for waiter in self._drop(watched):
                if not waiter.done():
                    waiter.set_result(batch)
            return
        now = self._clock()
        for waiter in [waiter for waiter in watched.waiters if waiter.deadline <= now]:
            self._expire(watched, waiter)
        if watched.waiters:
            watched.interval = self._interval(watched)
            took = asyncio.get_running_loop().time() - self._began
            self._look_in(watched.interval - took, watched)

    def _interval(self, watched: Watched) -> float:
        now = self._clock()
        age = now - (watched.created_at if watched.created_at > -math.inf else watched.since)
        interval = next_interval(age, self._first, self._most, self._roll)
        left = min((waiter.deadline for waiter in watched.waiters), default=math.inf) - now
        return before_deadline(interval, left, self._first)

    def _note_status(self, watched: Watched, batch: Batch) -> None:
        status = batch.raw_status if batch.status is BatchStatus.UNKNOWN else batch.status.value
        if watched.status not in (None, status):
            log.info("batch %s: %s, was %s", batch.id, status, watched.status)
        if batch.status is BatchStatus.UNKNOWN and status not in self._odd_statuses:
            self._odd_statuses.add(status)
            log.warning("batch %s: status %r is unknown; it counts as still running", batch.id, status)
        watched.status = status

    # --- trouble -------------------------------------------------------------------------------------

    def _slow_down(self, error: Exception | None = None) -> None:
        """Do not poll the account for a while: as long as the provider asks for, or else ever longer."""
        now = asyncio.get_running_loop().time()
        if now >= self._not_before:  # otherwise concurrent calls have failed together, which counts once
            self._slowed += 1
        asked = getattr(error, "retry_after", None)
        pause = min(self._most, self._first * 2.0 ** min(self._slowed - 1, 10)) if asked is None else asked
        pause = min(pause, LONGEST_PAUSE) * random.uniform(1, 1.1)
        self._not_before = max(self._not_before, now + pause)

    def _report(self, error: Exception, what: str) -> None:
        now = asyncio.get_running_loop().time()
        lasts = self._trouble.lasts(now, calm=2 * self._most)
        if lasts is not None:
            since = f"for {lasts / 60:.0f} min, last " if lasts else ""
            reason = str(error) or type(error).__name__
            bug = error if classify(error).wait is Wait.UNEXPECTED else None
            log.warning(
                "%s: polling fails, still waiting: %s%s: %s", self.key, since, what, reason, exc_info=bug
            )
