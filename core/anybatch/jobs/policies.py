"""What follows from how a job stands, decided once for plain Python, Airflow and Dagster.

How long to wait for a batch, what becomes of one that is late, whether what has landed is good enough.
Nothing here asks or changes anything.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import TYPE_CHECKING

from ..states import BatchStatus, Outcome

# What these policies decide by, declared with the other options, is theirs to give as well.
from .options import DEFAULT_TIMEOUT as DEFAULT_TIMEOUT
from .options import OnPartial as OnPartial
from .options import OnTimeout as OnTimeout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..models import Batch, Report
    from .standing import Standing

__all__ = [
    "CANCEL_TIME",
    "DEFAULT_TIMEOUT",
    "FIRST_LOOK",
    "Move",
    "OnPartial",
    "OnTimeout",
    "batches_in_words",
    "began_before",
    "believed",
    "counts_in_words",
    "deadline_of",
    "deadlines_of",
    "next_move",
    "rows_problem",
]

CANCEL_TIME = 3600.0
"""Seconds that a provider may take to end a batch that it was asked to cancel."""
FIRST_LOOK = 300.0
"""Seconds more where `on_lost` may do without a batch that never ends its cancelling: the job counts that
hour from its own first look at it, which is a little later."""
# A provider's time that is further than this from our own note of the submission is not believed, seconds.
_BELIEVED = 7 * 86_400.0


class Move(Enum):
    """What to do next about the batches of a round."""

    LAND = auto()  # nothing is left to wait for
    WAIT = auto()
    LEAVE = auto()  # the deadline has passed: give up, the batches run on …
    CANCEL = auto()  # … or are cancelled, and the next attempt submits the rest again
    STOP = auto()  # … or are cancelled for good, and what they have finished lands
    GIVE_UP = auto()  # they were stopped, and have not ended in time


def next_move(standing: Standing, deadlines: Mapping[str, float], on_timeout: OnTimeout, now: float) -> Move:
    """The next step. `deadlines` are those of the batches that run (`deadlines_of`), by their ids."""
    if standing.is_over:
        return Move.LAND
    if min(deadlines.values(), default=math.inf) > now:
        return Move.WAIT
    if standing.stopped_at is not None:
        return Move.GIVE_UP
    return {"leave": Move.LEAVE, "cancel": Move.CANCEL, "land_partial": Move.STOP}[on_timeout]


def deadlines_of(
    standing: Standing, timeout: float, began: float, *, outlasts_lost: bool = False
) -> dict[str, float]:
    """Until when to wait for each batch that runs, unix seconds; `began` is when the waiting did.

    `timeout` seconds after its creation, whoever asks and when. Those of a job that was stopped have an hour
    from then on; `outlasts_lost`: and a little more, since `on_lost` may do without them.
    """
    ending = CANCEL_TIME + (FIRST_LOOK if outlasts_lost else 0.0)
    if standing.stopped_at is not None:
        return {batch.id: standing.stopped_at + ending for batch in standing.running}
    return {batch.id: deadline_of(batch, standing, timeout, began, ending) for batch in standing.running}


def deadline_of(batch: Batch, standing: Standing, timeout: float, began: float, ending: float) -> float:
    """Until when to wait for one batch.

    One that is being cancelled has time for that, so that a new attempt, which needs its finished rows, is
    not stopped by a deadline that is over. Where the provider tells no times, or none that can be, its
    creation is when it was noted here, and its cancelling when that was first seen, or the waiting began:
    else nothing would ever be late.
    """
    noted = standing.submitted.get(batch.id, standing.created_at)
    deadline = believed(batch.created_at, noted, began) + timeout
    if batch.status is BatchStatus.CANCELLING:
        since = standing.cancelling.get(batch.id)
        return max(deadline, believed(batch.cancelling_at, since, began) + ending)
    return deadline


def believed(told: float | None, noted: float | None, began: float) -> float:
    """A provider's time, or what was noted here in its place."""
    if told is not None and (noted is None or abs(told - noted) < _BELIEVED):
        return float(told)
    return began if noted is None else noted


def began_before(was_late: bool, now: float) -> float:
    """When a waiting began that has ended just now: if it was too long, an hour ago or more."""
    return now - CANCEL_TIME if was_late else now


def rows_problem(
    report: Report,
    on_partial: OnPartial = "keep",
    max_failed_ratio: float | None = None,
    *,
    invalid: int = 0,
) -> str | None:
    """Why results that have landed are not good enough, None if they are; without rows they always are.

    `invalid` counts rows that succeeded with an answer that is not what was asked for. Without
    `max_failed_ratio` it takes one row that succeeded.
    """
    succeeded = report.counts.get(Outcome.SUCCEEDED, 0) - invalid
    failed = report.rows - succeeded
    if not failed:
        return None
    lacking = f"{failed:,} of {report.rows:,} rows have no result ({counts_in_words(report, invalid)})"
    if on_partial == "fail":
        return f"{lacking}, which on_partial='fail' does not accept"
    if max_failed_ratio is None:
        return (
            None
            if succeeded
            else f"none of {report.rows:,} rows succeeded ({counts_in_words(report, invalid)})"
        )
    if failed / report.rows <= max_failed_ratio:
        return None
    return f"{lacking}; max_failed_ratio={max_failed_ratio} was exceeded"


def counts_in_words(report: Report, invalid: int = 0) -> str:
    """How the rows ended: "98 succeeded, 2 failed"."""
    counts = {outcome.value: count for outcome, count in report.counts.items()}
    if invalid:
        counts[Outcome.SUCCEEDED.value] -= invalid
        counts[Outcome.INVALID.value] = counts.get(Outcome.INVALID.value, 0) + invalid
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def batches_in_words(batches: Iterable[Batch]) -> str:
    """Which batch is how far: "b1 is in_progress, b2 is completed"."""
    return ", ".join(f"{batch.id} is {batch.status.value}" for batch in batches)
