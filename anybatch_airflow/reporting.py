"""How batches and jobs are described: in log lines and messages, in events and in the manifest.

It decides nothing; decisions are in `anybatch.jobs.policies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anybatch import Batch, Report

# Seconds; equal to the core's, which is not imported while a DAG is parsed (a test compares them).
CANCEL_TIME = 3600.0


def report_text(report: Report) -> str:
    """What a job came to: "1,203 rows: 1,200 succeeded, 3 failed; 54,321 tokens in, 0 out; $1.2500"."""
    from anybatch.jobs.policies import counts_in_words

    usage = report.usage
    parts = [f"{report.rows:,} rows: {counts_in_words(report)}"]
    if usage.input_tokens or usage.output_tokens:
        parts.append(f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out")
    if report.cost is not None:
        parts.append(f"${report.cost:,.4f}")
    return "; ".join(parts)


def batches_in_words(batches: Iterable[Batch]) -> str:
    """The status of each batch: "b1 is in_progress, b2 is completed"."""
    from anybatch.jobs import policies

    return policies.batches_in_words(batches)


def late_text(running: Iterable[Batch], deadlines: Mapping[str, float], now: float) -> str:
    """Which of the running batches are late, and since when."""
    late = [batch for batch in running if deadlines[batch.id] <= now]
    return f"not ended at the deadline ({utc(min(deadlines.values()))}): {batches_in_words(late)}"


def facts_of_batch(batch: Batch) -> dict[str, Any]:
    """What an event or an XCom says of a batch: status, total, completed, failed."""
    facts: dict[str, Any] = {"status": batch.status.value}
    if batch.request_counts:
        facts |= batch.request_counts.model_dump()
    return facts


def facts_by_batch(batches: Iterable[Batch]) -> dict[str, dict[str, Any]]:
    """The same for several batches, by their ids."""
    return {batch.id: facts_of_batch(batch) for batch in batches}


def utc(moment: float) -> str:
    """A moment in unix seconds as text."""
    from anybatch.polling import pace

    return pace.utc(moment)


def manifest_of(report: Report) -> dict[str, Any]:
    """What goes into XCom of a job: small, without content, with the place of its results."""
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
