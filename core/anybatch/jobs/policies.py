"""Policies, decided once for plain Python, Airflow and Dagster.

How long to wait for a batch, what to do with one that is late, whether landed results are good enough: pure
functions, without any effect.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import TYPE_CHECKING

from ..states import BatchStatus, Outcome

# Declared with the other options; exported here for callers of these policies.
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
    "counts_in_words",
    "deadline_of",
    "deadlines_of",
    "next_move",
    "plausible",
    "rows_problem",
    "waiting_since",
]

CANCEL_TIME = 3600.0
"""Seconds that a provider may take to end a batch after it was asked to cancel it."""
FIRST_LOOK = 300.0
"""Additional seconds if `on_lost` may continue without a batch that never finishes cancelling: the job counts
`CANCEL_TIME` from its own first look at that batch, which is a little later."""
# Seconds by which a provider's time may differ from the ledger's time of the submission and still be used.
_PLAUSIBLE = 7 * 86_400.0


class Move(Enum):
    """What to do next about the batches of a round."""

    LAND = auto()  # nothing is left to wait for
    WAIT = auto()
    LEAVE = auto()  # late: give up, and leave the batches running
    CANCEL = auto()  # late: give up and cancel; the next attempt submits unfinished rows again
    STOP = auto()  # late: stop the job, then land what its batches have finished
    GIVE_UP = auto()  # the job was stopped, and its batches did not end in time


def next_move(standing: Standing, deadlines: Mapping[str, float], on_timeout: OnTimeout, now: float) -> Move:
    """Decide the next step of a job.

    Args:
        standing: The state of the job.
        deadlines: The deadline of each running batch by its id, unix seconds (`deadlines_of`).
        on_timeout: What to do once the earliest deadline has passed.
        now: The time, unix seconds.

    Returns:
        The next step.
    """
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
    """Return the deadline of each running batch.

    A batch's deadline is `timeout` seconds after its creation, the same for every attempt that asks. The
    batches of a stopped job have `CANCEL_TIME` from the stop.

    Args:
        standing: The state of the job.
        timeout: Seconds to wait after a batch's creation.
        began: When the waiting began, unix seconds.
        outlasts_lost: Whether to wait `FIRST_LOOK` longer for batches that are being cancelled, since
            `on_lost` may continue without them.

    Returns:
        For each batch id, the deadline in unix seconds.
    """
    ending = CANCEL_TIME + (FIRST_LOOK if outlasts_lost else 0.0)
    if standing.stopped_at is not None:
        return {batch.id: standing.stopped_at + ending for batch in standing.running}
    return {batch.id: deadline_of(batch, standing, timeout, began, ending) for batch in standing.running}


def deadline_of(batch: Batch, standing: Standing, timeout: float, began: float, ending: float) -> float:
    """Return the deadline of one batch, in unix seconds.

    A batch that is being cancelled gets `ending` seconds for that, so that a past deadline does not stop a
    new attempt, which needs the rows that the batch has finished. If the provider reports no plausible times,
    the ledger's times count, or the beginning of the wait: otherwise no batch would ever be late.
    """
    recorded = standing.submitted.get(batch.id, standing.created_at)
    deadline = plausible(batch.created_at, recorded, began) + timeout
    if batch.status is BatchStatus.CANCELLING:
        since = standing.cancelling.get(batch.id)
        return max(deadline, plausible(batch.cancelling_at, since, began) + ending)
    return deadline


def plausible(reported: float | None, recorded: float | None, began: float) -> float:
    """Return the provider's time if it is plausible, else the ledger's, else the beginning of the wait."""
    if reported is not None and (recorded is None or abs(reported - recorded) < _PLAUSIBLE):
        return float(reported)
    return began if recorded is None else recorded


def waiting_since(was_late: bool, now: float) -> float:
    """Return when a wait that has ended just now began at the latest, in unix seconds.

    Args:
        was_late: Whether the wait ended at its deadline: then it has lasted for `CANCEL_TIME` or longer.
        now: The time, unix seconds.

    Returns:
        A value for the `began` of `deadlines_of`.
    """
    return now - CANCEL_TIME if was_late else now


def rows_problem(
    report: Report,
    on_partial: OnPartial = "keep",
    max_failed_ratio: float | None = None,
    *,
    invalid: int = 0,
) -> str | None:
    """Decide whether landed results are good enough. Results without any row always are.

    Args:
        report: The report of the job.
        on_partial: Whether to accept rows without a result at all.
        max_failed_ratio: The accepted share of rows without a result; None accepts any share, as long as one
            row succeeded.
        invalid: How many of the succeeded rows have an answer of the wrong form; they count as failed.

    Returns:
        Why the results are not good enough, or None if they are.
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
    """Describe how the rows ended: "98 succeeded, 2 failed"."""
    counts = {outcome.value: count for outcome, count in report.counts.items()}
    if invalid:
        counts[Outcome.SUCCEEDED.value] -= invalid
        counts[Outcome.INVALID.value] = counts.get(Outcome.INVALID.value, 0) + invalid
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def batches_in_words(batches: Iterable[Batch]) -> str:
    """Describe the status of each batch: "b1 is in_progress, b2 is completed"."""
    return ", ".join(f"{batch.id} is {batch.status.value}" for batch in batches)
