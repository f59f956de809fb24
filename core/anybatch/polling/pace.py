"""How often to poll waiting batches, and how: pure decisions."""

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

FEW = 8  # so many batches are retrieved one by one, not read off a listing
PATIENCE = 3  # a listing is given up once it has cost so many pages more than it has found batches
LONGEST_PAUSE = 3600.0  # seconds; a longer Retry-After is cut to this
LASTING = 300.0  # seconds after which continuing trouble gets a second line in the log


def next_interval(age: float, first: float, most: float, roll: float) -> float:
    """Return the seconds until the next poll of a batch: a tenth of its age, between `first` and `most`.

    `roll`, a random number in [0, 1), adds jitter of up to a tenth either way.
    """
    return min(most, max(first, age / 10)) * (0.9 + 0.2 * roll)


def before_deadline(interval: float, left: float, first: float) -> float:
    """Shorten an interval so that the last poll comes `first` s before the deadline, which is in `left` s."""
    return min(interval, left - first) if left > 2 * first else interval


def listing_pays(soon: int, newer: int, page_size: int) -> bool:
    """Whether paging through the listing costs fewer calls than retrieving each batch.

    `newer` waiting batches are at least as new as the oldest that is due, so at least so many entries must be
    read. `soon` of them are due now or soon, so so many calls are saved.
    """
    return soon > FEW and page_size > 1 and 2 * math.ceil(newer / page_size) <= soon


def plan_sweep(places: Sequence[int], page_size: int) -> int:
    """Return how many of the batches that are due soon to read off the listing; the others are retrieved.

    `places` are their positions among all waiting batches, newest first, from 1 and ascending. A batch far
    down the listing does not prevent reading those at the top together.
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

    At most `budget` pages are read, which is what retrieving each batch would cost. Of pages that show no
    waiting batch, only a few are read, or a tenth of the calls that could still be saved: this bounds the
    waste on an account full of other batches, or on a listing without end.
    """
    if not missing or pages >= budget or page_oldest < wanted_oldest - CLOCK_SKEW:
        return False
    return pages - found < max(PATIENCE, missing / 10)


def pause_after(failure: Exception | None, interval: float) -> float:
    """Return the seconds until the next poll: the interval, or the longer pause that a failure asks for."""
    return max(interval, min(getattr(failure, "retry_after", None) or 0.0, LONGEST_PAUSE))


def utc(moment: float) -> str:
    """Format a time (unix seconds) for a person; a provider's time may be any number."""
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{moment:g} in unix seconds"


class Trouble:
    """Decides which failures are logged: the first of a series, then at ever longer intervals."""

    __slots__ = ("_last", "_next", "_since")

    def __init__(self) -> None:
        self._since = self._last = self._next = -math.inf

    def lasts(self, now: float, calm: float) -> float | None:
        """Record a failure; return how long the series has lasted (seconds) if it is to be logged, else None.

        `calm` seconds without a failure end a series.
        """
        if now - self._last > calm:
            self._since, self._next = now, now + LASTING
        elif now >= self._next:
            self._next = now + 2 * (now - self._since)
        else:
            self._last = now
            return None
        self._last = now
        return now - self._since
