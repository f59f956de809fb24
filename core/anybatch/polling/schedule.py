"""Who waits for which batch, and when each batch is looked at next."""

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
    """One call of `wait`; it ends without a result at `ends`, which is after a deadline that had passed."""

    __slots__ = ("deadline", "ends", "on_progress", "seen")

    def __init__(self, deadline: float, ends: float, on_progress: Callable[[Batch], None] | None) -> None:
        super().__init__()
        self.deadline = deadline
        self.ends = ends
        self.on_progress = on_progress
        self.seen: tuple[str, int, int] | None = None

    def report(self, batch: Batch) -> None:
        """Report progress, if there is any since last time; what the callback raises ends its own wait."""
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
    """One batch that is waited for; `due` is on the loop's clock, the other times are unix seconds."""

    __slots__ = ("batch_id", "created_at", "due", "interval", "queued", "since", "status", "waiters")

    def __init__(self, batch_id: str, created_at: float | None, since: float) -> None:
        self.batch_id = batch_id
        self.created_at = -math.inf if created_at is None else created_at  # unknown is taken as oldest
        self.since = since
        self.due = math.inf
        self.interval = 0.0
        self.queued = math.inf  # when its entry in the schedule comes up
        self.status: str | None = None
        self.waiters: list[Waiter] = []


class Schedule:
    """When each batch is looked at next, in buckets of a tenth of a grain.

    A batch has one live entry. It is moved only to come up earlier; one that comes up too early is put back.
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
        """Take out what is due within a grain, so many at most; their entries have then come up."""
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
                    continue  # nobody waits any more, or it came up earlier
                if watched.due > until:
                    self._queue(watched)
                else:
                    watched.queued = math.inf
                    due.append(watched)
        return due


def copy_of(error: E) -> E:
    """A copy for each who gets it: one instance raised in thousands of tasks grows a traceback from all."""
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except TypeError:  # its constructor wants more than its message
        return error
