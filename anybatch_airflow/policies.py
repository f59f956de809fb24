"""What an operator decides, as functions: when to give up, and whether what has landed is good enough."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from anybatch.jobs.options import wrong_choice

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from anybatch import Batch, Report
    from anybatch.jobs.ledger import Ledger
    from anybatch.jobs.options import OnPartial, OnTimeout

# How long a provider may take to end a batch that it was asked to cancel.
CANCEL_TIME = 3600.0
# How much longer where `on_lost` may do without a batch that never ends it: the job counts that hour from its
# own first look at the cancelling, which is a little later.
FIRST_LOOK = 300.0


class Move(Enum):
    """What a task does next about the batches of a round."""

    LAND = auto()  # all have ended
    WAIT = auto()
    LEAVE = auto()  # the deadline has passed: fail, the batches run on …
    CANCEL = auto()  # … or are cancelled, and the next attempt submits the rest again
    STOP = auto()  # … or are cancelled for good, and what they have finished lands
    GIVE_UP = auto()  # they were stopped, and have not ended in time


def next_move(deadlines: Collection[float], on_timeout: OnTimeout, *, is_stopped: bool, now: float) -> Move:
    """The next step, from the deadlines of the batches that still run."""
    if not deadlines:
        return Move.LAND
    if min(deadlines) > now:
        return Move.WAIT
    if is_stopped:
        return Move.GIVE_UP
    return {"leave": Move.LEAVE, "cancel": Move.CANCEL, "land_partial": Move.STOP}[on_timeout]


def chosen(name: str, value: Any) -> Any:
    """The value of an option, while the DAG is parsed; raises ValueError if it is none of its choices."""
    if (wrong := wrong_choice(name, value)) is not None:
        raise ValueError(wrong)
    return value


def began_by(event: Mapping[str, Any], now: float) -> float:
    """When the waiting began that a trigger's event has ended: if it was too long, an hour ago or more."""
    return now - CANCEL_TIME if event["status"] == "timeout" else now


def deadlines_of(
    batches: Iterable[Batch],
    ledger: Ledger,
    timeout: timedelta,
    began: float,
    *,
    outlasts_lost: bool = False,
) -> dict[str, float]:
    """Until when to wait for each batch that still runs, unix seconds; `began` is when the waiting did."""
    running = [batch for batch in batches if not batch.status.is_terminal]
    ending = CANCEL_TIME + (FIRST_LOOK if outlasts_lost else 0.0)
    if ledger.stopped_at is not None:
        return {batch.id: ledger.stopped_at + ending for batch in running}
    noted = {record.batch_id: record.creating_at or ledger.created_at for record in ledger.shards}
    return {
        batch.id: deadline_of(batch, timeout, noted.get(batch.id, ledger.created_at), began, ending)
        for batch in running
    }


def deadline_of(
    batch: Batch, timeout: timedelta, noted: float, began: float, ending: float = CANCEL_TIME
) -> float:
    """Until when to wait for a batch, unix seconds: `timeout` after its creation, whoever asks and when.

    A batch that is being cancelled has an hour for that (`ending`), so that a new attempt, which needs its
    finished rows, is not stopped by a deadline that is over. Where the provider tells no times, its creation
    is when we `noted` that, and its cancelling when the waiting `began`: else nothing would ever be late.
    """
    deadline = (batch.created_at or noted) + timeout.total_seconds()
    if batch.status == "cancelling":
        return max(deadline, (batch.cancelling_at or began) + ending)
    return deadline


def too_many_failed(
    report: Report, max_failed_ratio: float | None = None, on_partial: OnPartial = "keep"
) -> str | None:
    """Why the task should fail, None if it should not; an input without rows never fails."""
    succeeded = sum(count for outcome, count in report.counts.items() if outcome == "succeeded")
    failed = report.rows - succeeded
    if not failed:
        return None
    lacking = f"{failed:,} of {report.rows:,} rows have no result ({told_counts(report)})"
    if on_partial == "fail":
        return f"{lacking}, which on_partial='fail' does not accept"
    if max_failed_ratio is None:
        return None if succeeded else f"none of {report.rows:,} rows succeeded ({told_counts(report)})"
    if failed / report.rows <= max_failed_ratio:
        return None
    return f"{lacking}; max_failed_ratio={max_failed_ratio} was exceeded"


def told_counts(report: Report) -> str:
    return (
        ", ".join(f"{count:,} {outcome.value}" for outcome, count in report.counts.items() if count) or "none"
    )


def told(report: Report) -> str:
    """The account of a job in one line of the log."""
    usage = report.usage
    parts = [f"{report.rows:,} rows: {told_counts(report)}"]
    if usage.input_tokens or usage.output_tokens:
        parts.append(f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out")
    if report.cost is not None:
        parts.append(f"${report.cost:,.4f}")
    return "; ".join(parts)


def told_batches(batches: Iterable[Batch]) -> str:
    return ", ".join(f"{batch.id} is {batch.status.value}" for batch in batches)


def told_late(running: Iterable[Batch], deadlines: Mapping[str, float], now: float) -> str:
    """Which of the batches that run are late, and since when."""
    late = [batch for batch in running if deadlines[batch.id] <= now]
    return f"not ended at the deadline ({utc(min(deadlines.values()))}): {told_batches(late)}"


def describe(batch: Batch) -> dict[str, Any]:
    """The part of a batch that an event or an XCom carries."""
    told: dict[str, Any] = {"status": batch.status.value}
    if batch.request_counts:
        told |= batch.request_counts.model_dump()
    return told


def described(batches: Iterable[Batch]) -> dict[str, dict[str, Any]]:
    """Each batch by its id."""
    return {batch.id: describe(batch) for batch in batches}


def utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def manifest_of(report: Report) -> dict[str, Any]:
    """The small account of a job that goes into XCom."""
    return {
        "job": report.job,
        "provider": report.provider,
        "endpoint": report.endpoint,
        "models": list(report.models),
        "results": report.results,
        "rows": report.rows,
        "counts": {outcome.value: count for outcome, count in report.counts.items()},
        "input_tokens": report.usage.input_tokens,
        "output_tokens": report.usage.output_tokens,
        "cost": report.cost,
        "rounds": report.rounds,
        "batch_ids": [batch.id for batch in report.batches],
        "batches": [
            {
                "id": batch.id,
                "shard": batch.shard,
                "round": batch.round,
                "rows": batch.rows,
                "status": batch.status.value,
            }
            for batch in report.batches
        ],
        "duration_s": round(report.duration_s, 3),
    }
