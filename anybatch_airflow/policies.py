"""What an operator decides, as functions: when to give up, and whether what has landed is good enough."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anybatch import Batch, Report

OnTimeout: TypeAlias = Literal["leave", "cancel", "land_partial"]
OnPartial: TypeAlias = Literal["keep", "fail"]

# What a provider may need, beyond its completion window, to write the files of a batch that ended.
DEFAULT_TIMEOUT = timedelta(hours=26)
# How long a provider may take to end a batch that it was asked to cancel.
CANCEL_TIME = 3600.0

_GIVEN_UP = ("cancelling", "cancelled")


def one_of(name: str, value: Any, *known: str) -> Any:
    """The value of an option, while the DAG is parsed; raises ValueError if it is none of those known."""
    if value not in known:
        raise ValueError(f"{name}: {' or '.join(map(repr, known))}, not {value!r}")
    return value


def deadline_of(batch: Batch, timeout: timedelta, now: float) -> float:
    """Until when to wait for a batch, unix seconds: `timeout` after its creation, whoever asks and when.

    A batch that is being cancelled has an hour for that, so that a new attempt, which needs its finished
    rows, is not stopped by a deadline that is over.
    """
    deadline = (batch.created_at or now) + timeout.total_seconds()
    if batch.status == "cancelling":
        return max(deadline, (batch.cancelling_at or now) + CANCEL_TIME)
    return deadline


def is_left_to_land(batches: Sequence[Batch], timeout: timedelta, now: float) -> bool:
    """Whether an earlier attempt has cancelled these batches at their deadline, and only landing is left."""
    return (
        any(batch.status in _GIVEN_UP for batch in batches)
        and all(batch.status.is_terminal or batch.status in _GIVEN_UP for batch in batches)
        and all((batch.created_at or now) + timeout.total_seconds() <= now for batch in batches)
    )


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
