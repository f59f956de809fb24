"""What an operator tells: log lines, events and manifests; what it decides is `anybatch.jobs.policies`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anybatch.jobs.options import wrong_choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anybatch import Batch, Report

# The core's, which is not loaded while a DAG is parsed.
CANCEL_TIME = 3600.0


def chosen(name: str, value: Any) -> Any:
    """The value of an option, while the DAG is parsed; raises ValueError if it is none of its choices."""
    if (wrong := wrong_choice(name, value)) is not None:
        raise ValueError(wrong)
    return value


def told(report: Report) -> str:
    """The account of a job in one line of the log."""
    from anybatch.jobs.policies import counts_in_words

    usage = report.usage
    parts = [f"{report.rows:,} rows: {counts_in_words(report)}"]
    if usage.input_tokens or usage.output_tokens:
        parts.append(f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out")
    if report.cost is not None:
        parts.append(f"${report.cost:,.4f}")
    return "; ".join(parts)


def batches_in_words(batches: Iterable[Batch]) -> str:
    """Which batch is how far."""
    from anybatch.jobs import policies

    return policies.batches_in_words(batches)


def told_late(running: Iterable[Batch], deadlines: Mapping[str, float], now: float) -> str:
    """Which of the batches that run are late, and since when."""
    late = [batch for batch in running if deadlines[batch.id] <= now]
    return f"not ended at the deadline ({utc(min(deadlines.values()))}): {batches_in_words(late)}"


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
    from anybatch.polling import pace

    return pace.utc(moment)


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
