"""The metadata of materializations: people read it, and the sensor acts on it."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster._core.definitions.metadata.metadata_set import NamespacedMetadataSet, TableMetadataSet
from upath import UPath

from anybatch import Outcome, Report, read_results
from anybatch.rows.tables import join_results

if TYPE_CHECKING:
    from .polling import Progress

PREVIEW_ROWS = 5
_PREVIEW_WIDTH = 120


class SubmissionMetadata(NamespacedMetadataSet):
    """Metadata of a submit asset: the record of a submission, in which the sensor finds its batches.

    Attributes:
        batches: Ids of the current round, separated by a comma and a space.
        folder: The job folder.
        resource: Key of the `BatchResource`.
        deadline: Unix seconds.
        on_timeout: The asset's option, for the case that the asset is no longer defined at the deadline.
        round: The current round, from 1.
        console: The provider's page of the first batch.
    """

    batches: str | None = None
    folder: str | None = None
    provider: str | None = None
    model: str | None = None
    endpoint: str | None = None
    requests: int | None = None
    resource: str | None = None
    deadline: float | None = None
    on_timeout: str | None = None
    round: int | None = None
    console: dg.UrlMetadataValue | None = None

    @classmethod
    def namespace(cls) -> str:
        return "anybatch"

    @property
    def batch_ids(self) -> tuple[str, ...]:
        return tuple(self.batches.split(", ")) if self.batches else ()


class ResultMetadata(NamespacedMetadataSet):
    """Metadata of a result asset; Dagster plots its numbers over time. Durations in seconds, cost in USD.

    Attributes:
        submission: Id of the run that submitted the last round.
        invalid: Rows that succeeded, but whose answer does not fit the asset's value; they count as rows
            without a result.
        turnaround_s: From the first submission to landing.
        collect_lag_s: From the end of the last batch to landing.
    """

    submission: str | None = None
    results: str | None = None
    provider: str | None = None
    model: str | None = None
    batches: str | None = None
    rounds: int | None = None
    requests: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    expired: int | None = None
    cancelled: int | None = None
    missing: int | None = None
    invalid: int | None = None
    error_rate: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    turnaround_s: float | None = None
    collect_lag_s: float | None = None
    console: dg.UrlMetadataValue | None = None

    @classmethod
    def namespace(cls) -> str:
        return "anybatch"


class ExternalBatchMetadata(NamespacedMetadataSet):
    """Metadata of a batch that another system created; the provider counts its requests."""

    batch: str | None = None
    status: str | None = None
    provider: str | None = None
    endpoint: str | None = None
    model: str | None = None
    requests: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    turnaround_s: float | None = None

    @classmethod
    def namespace(cls) -> str:
        return "anybatch"


def error_rate(report: Report, invalid: int = 0) -> float:
    """The share of rows without a result, from 0 to 1."""
    good = report.counts.get(Outcome.SUCCEEDED, 0) - invalid
    return (report.rows - good) / report.rows if report.rows else 0.0


def counts_of(report: Report, invalid: int = 0) -> str:
    """How the rows ended, in words."""
    counts = {outcome.value: count for outcome, count in report.counts.items() if count}
    if invalid:
        counts |= {Outcome.SUCCEEDED.value: counts[Outcome.SUCCEEDED.value] - invalid, "invalid": invalid}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def result_metadata(
    report: Report,
    *,
    submission: str,
    console: dg.UrlMetadataValue | None,
    invalid: int,
    collect_lag: float | None,
    by_partition: bool,
) -> dict[str, Any]:
    """Metadata of a landed job.

    Args:
        report: What the job came to.
        submission: Id of the run that submitted it.
        console: The provider's page of its batch.
        invalid: Rows whose answer does not fit the asset's value.
        collect_lag: Seconds from the end of the last batch to now.
        by_partition: Whether each partition's event gets its own figures; then they and the preview are left
            out here.
    """
    preview = {"preview": dg.MetadataValue.md(preview_table(report.results))}
    figures = {} if by_partition else {**preview, **part_metadata(report, invalid)}
    facts = ResultMetadata(
        submission=submission,
        provider=report.provider,
        batches=", ".join(batch.id for batch in report.batches),
        rounds=report.rounds,
        turnaround_s=report.duration_s,
        collect_lag_s=collect_lag,
        console=console,
    )
    return {**facts, **figures}


def part_metadata(report: Report, invalid: int) -> dict[str, Any]:
    """The figures of a job, or of one partition's part in it."""
    facts = ResultMetadata(
        results=report.results,
        model=", ".join(report.models) or None,
        requests=report.rows,
        succeeded=report.counts.get(Outcome.SUCCEEDED, 0),
        failed=report.counts.get(Outcome.FAILED, 0),
        expired=report.counts.get(Outcome.EXPIRED, 0),
        cancelled=report.counts.get(Outcome.CANCELLED, 0),
        missing=report.counts.get(Outcome.MISSING, 0),
        invalid=invalid,
        error_rate=error_rate(report, invalid),
        input_tokens=report.usage.input_tokens,
        output_tokens=report.usage.output_tokens,
        cached_tokens=report.usage.cached_tokens,
        cost_usd=report.cost,
    )
    return {**facts, **TableMetadataSet(row_count=report.rows)}


def preview_table(results: str) -> str:
    """The first rows of a results.jsonl as a Markdown table, cells cut short."""
    rows = list(islice(read_results(UPath(results)), PREVIEW_ROWS))
    ids = [{"custom_id": row.custom_id} for row in rows]
    lines = ["| custom_id | outcome | answer |", "|---|---|---|"]
    for line in join_results(ids, rows, id_column="custom_id"):
        answer = line["content"] if line["error"] is None else line["error"]
        lines.append(f"| {' | '.join(map(_cell, (line['custom_id'], line['outcome'], answer)))} |")
    return "\n".join(lines)


def progress_metadata(progress: Progress) -> dict[str, Any]:
    """Metadata of one look at running batches."""
    facts = {"status": progress.status, "total": progress.total, "completed": progress.completed,
            "failed": progress.failed}  # fmt: skip
    return {f"anybatch/{name}": value for name, value in facts.items()}


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _PREVIEW_WIDTH else f"{text[:_PREVIEW_WIDTH]}…"
