"""How often to look at waiting batches, and how: decisions that touch nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from .listing import CLOCK_SKEW

__all__ = [
    "FEW",
    "LASTING",
    "LONGEST_PAUSE",
    "PATIENCE",
    "Trouble",
    "before_deadline",
    "keep_listing",
    "listing_pays",
    "next_interval",
    "pause_after",
    "plan_sweep",
    "utc",
]

FEW = 8  # this many are not worth a listing
PATIENCE = 3  # pages that may bring less than they cost before a listing is given up
LONGEST_PAUSE = 3600.0  # seconds; a Retry-After beyond that is not believed
LASTING = 300.0  # seconds after which trouble that lasts is worth a second line in the log


def next_interval(age: float, first: float, most: float, roll: float) -> float:
    """Seconds until the next look at a batch of this age, so that its end is noticed within a tenth of it.

    `roll` in [0, 1) is the jitter, of a tenth either way.
    """
    return min(most, max(first, age / 10)) * (0.9 + 0.2 * roll)


def before_deadline(interval: float, left: float, first: float) -> float:
    """Shorten the interval so that the last look comes one `first` before the deadline, `left` s from now."""
    return min(interval, left - first) if left > 2 * first else interval


def listing_pays(soon: int, newer: int, page_size: int) -> bool:
    """Whether to page through the listing instead of retrieving each.

    `newer` waiting batches are at least as new as the oldest that is due, so that many entries have to be
    read, at the very least; `soon` of them are due now or soon, so that many calls are saved.
    """
    return soon > FEW and page_size > 1 and 2 * math.ceil(newer / page_size) <= soon


def plan_sweep(places: Sequence[int], page_size: int) -> int:
    """How many of the batches that are due soon to read off the listing; the others are retrieved.

    `places` are theirs, from 1 and ascending, among all waiting batches with the newest first. One that is
    far down does not keep those at the top from being read together.
    """
    return next(
        (many for many in range(len(places), FEW, -1) if listing_pays(many, places[many - 1], page_size)), 0
    )


def keep_listing(
    pages: int,
    found: int,
    missing: int,
    page_oldest: float,
    wanted_oldest: float,
    *,
    budget: float = math.inf,
) -> bool:
    """Whether the next page is worth its call; `found` waiting batches were seen so far.

    Never more pages than `budget`, what retrieving each would cost, and of those that bring nothing no more
    than a few, or a tenth of what could still be saved: so little is lost on an account full of other
    people's batches, or on a listing without end.
    """
    if not missing or pages >= budget or page_oldest < wanted_oldest - CLOCK_SKEW:
        return False
    return pages - found < max(PATIENCE, missing / 10)


def pause_after(failure: Exception | None, interval: float) -> float:
    """Seconds until the next look: an interval, or longer where what failed was told to."""
    return max(interval, min(getattr(failure, "retry_after", None) or 0.0, LONGEST_PAUSE))


def utc(moment: float) -> str:
    """A time in unix seconds for a person to read; a provider's may be any number."""
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{moment:g} in unix seconds"


class Trouble:
    """Decides which failures get a line in the log: the first of a series, then ever fewer while it lasts."""

    __slots__ = ("_last", "_next", "_since")

    def __init__(self) -> None:
        self._since = self._last = self._next = -math.inf

    def lasts(self, now: float, calm: float) -> float | None:
        """Seconds the series has lasted if it is worth a line now; `calm` seconds without failure end it."""
        if now - self._last > calm:
            self._since, self._next = now, now + LASTING
        elif now >= self._next:
            self._next = now + 2 * (now - self._since)
        else:
            self._last = now
            return None
        self._last = now
        return now - self._since
