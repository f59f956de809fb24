"""Who waits for which batch, and when each batch is polled next."""

from __future__ import annotations

import asyncio
import copy
import heapq
import math
from collections.abc import Callable
from typing import TypeVar

from ..models import Batch

__all__ = ["Schedule", "Waiter", "Watched", "copy_of"]

E = TypeVar("E", bound=BaseException)


class Waiter(asyncio.Future[Batch]):
    """One call of `wait`.

    Attributes:
        deadline: Its deadline, unix seconds.
        ends: When it ends without a result, unix seconds; later than a deadline that had passed already.
        on_progress: Called with the batch whenever its status or counts change.
        seen: The status and counts that were reported last.
    """

    __slots__ = ("deadline", "ends", "on_progress", "seen")

    def __init__(self, deadline: float, ends: float, on_progress: Callable[[Batch], None] | None) -> None:
        super().__init__()
        self.deadline = deadline
        self.ends = ends
        self.on_progress = on_progress
        self.seen: tuple[str, int, int] | None = None

    def report(self, batch: Batch) -> None:
        """Report progress if there is any since the last time; an error of the callback ends this wait."""
        if self.on_progress is None or self.done():
            return
        counts = batch.request_counts
        seen = (batch.raw_status, counts.completed if counts else 0, counts.failed if counts else 0)
        if seen != self.seen:
            self.seen = seen
            try:
                self.on_progress(batch)
            except Exception as error:
                self.set_exception(error)

    def fail(self, error: Exception) -> None:
        if not self.done():
            self.set_exception(error)


class Watched:
    """One batch that is waited for.

    Attributes:
        batch_id: The batch's id.
        created_at: When it was created, unix seconds; minus infinity if that is not known.
        since: When the first wait for it began, unix seconds.
        due: When it is to be polled next, by the loop's clock.
        interval: The seconds between its polls.
        queued: When its entry in the schedule comes up, by the loop's clock.
        status: Its status when it was last seen.
        waiters: The calls that wait for it.
    """

    __slots__ = ("batch_id", "created_at", "due", "interval", "queued", "since", "status", "waiters")

    def __init__(self, batch_id: str, created_at: float | None, since: float) -> None:
        self.batch_id = batch_id
        self.created_at = -math.inf if created_at is None else created_at  # an unknown time counts as oldest
        self.since = since
        self.due = math.inf
        self.interval = 0.0
        self.queued = math.inf
        self.status: str | None = None
        self.waiters: list[Waiter] = []


class Schedule:
    """When each batch is polled next, in buckets of a tenth of a grain (seconds).

    A batch has one live entry. It is moved only to an earlier time; an entry that comes up too early is put
    back.
    """

    def __init__(self, grain: float) -> None:
        self._grain = grain
        self._width = grain / 10
        self._slots: list[int] = []
        self._buckets: dict[int, list[Watched]] = {}

    @property
    def next(self) -> float:
        return self._slots[0] * self._width if self._slots else math.inf

    def put(self, watched: Watched, due: float) -> None:
        watched.due = due
        if due < watched.queued:
            self._queue(watched)

    def _queue(self, watched: Watched) -> None:
        slot = math.ceil(watched.due / self._width)
        watched.queued = slot * self._width
        self._bucket(slot).append(watched)

    def _bucket(self, slot: int) -> list[Watched]:
        if slot not in self._buckets:
            self._buckets[slot] = []
            heapq.heappush(self._slots, slot)
        return self._buckets[slot]

    def take(self, now: float, limit: int | None) -> list[Watched]:
        """Remove and return the batches that are due within a grain, at most `limit` of them."""
        due: list[Watched] = []
        until = now + self._grain
        while self.next <= until and (limit is None or len(due) < limit):
            slot = heapq.heappop(self._slots)
            entries = self._buckets.pop(slot)
            for number, watched in enumerate(entries):
                if len(due) == limit:
                    self._bucket(slot).extend(entries[number:])
                    break
                if not watched.waiters or watched.queued != slot * self._width:
                    continue  # nobody waits for it any more, or its entry was moved
                if watched.due > until:
                    self._queue(watched)
                else:
                    watched.queued = math.inf
                    due.append(watched)
        return due


def copy_of(error: E) -> E:
    """Copy an error for each waiter: one instance raised in many tasks would collect all their frames."""
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except TypeError:  # its constructor needs other arguments
        return error
