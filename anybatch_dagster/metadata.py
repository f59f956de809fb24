"""What is written beside each materialization, so that people can read it and the sensor can act on it."""

import json
from itertools import islice
from typing import Any

import dagster as dg
from dagster._core.definitions.metadata.metadata_set import NamespacedMetadataSet, TableMetadataSet
from upath import UPath

from anybatch import Outcome, Report
from anybatch.results import read_landed
from anybatch.tables import join_results

from .polling import Progress

PREVIEW_ROWS = 5
_PREVIEW_WIDTH = 120


class SubmissionMetadata(NamespacedMetadataSet):
    """Metadata of a submit asset: the record of a submission, from which the sensor finds its batches.

    `batches` are ids separated by a comma and a space, `deadline` is in unix seconds.
    """

    batches: str | None = None
    folder: str | None = None
    provider: str | None = None
    model: str | None = None
    endpoint: str | None = None
    requests: int | None = None
    resource: str | None = None
    deadline: float | None = None

    @classmethod
    def namespace(cls) -> str:
        return "anybatch"

    @property
    def batch_ids(self) -> tuple[str, ...]:
        return tuple(self.batches.split(", ")) if self.batches else ()


class ResultMetadata(NamespacedMetadataSet):
    """Metadata of a result asset; numbers plot over time. Durations in seconds, cost in USD.

    `submission` is the id of the run that submitted the job.
    """

    submission: str | None = None
    results: str | None = None
    provider: str | None = None
    model: str | None = None
    batches: str | None = None
    requests: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    expired: int | None = None
    cancelled: int | None = None
    missing: int | None = None
    error_rate: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    turnaround_s: float | None = None
    collect_lag_s: float | None = None

    @classmethod
    def namespace(cls) -> str:
        return "anybatch"


def error_rate(report: Report) -> float:
    """The share of rows without a result, from 0 to 1."""
    return (report.rows - report.counts.get(Outcome.SUCCEEDED, 0)) / report.rows if report.rows else 0.0


def result_metadata(report: Report, *, submission: str, collect_lag: float | None) -> dict[str, Any]:
    """Metadata of a collected job, with its first few rows as a table."""
    counts = {outcome.value: report.counts.get(outcome, 0) for outcome in Outcome}
    counts.pop(Outcome.INVALID)
    facts = ResultMetadata(
        submission=submission,
        results=report.results,
        provider=report.provider,
        model=", ".join(report.models) or None,
        batches=", ".join(batch.id for batch in report.batches),
        requests=report.rows,
        **counts,
        error_rate=error_rate(report),
        input_tokens=report.usage.input_tokens,
        output_tokens=report.usage.output_tokens,
        cached_tokens=report.usage.cached_tokens,
        cost_usd=report.cost,
        turnaround_s=report.duration_s,
        collect_lag_s=collect_lag,
    )
    preview = dg.MetadataValue.md(preview_table(report.results))
    return {**facts, **TableMetadataSet(row_count=report.rows), "preview": preview}


def preview_table(results: str) -> str:
    """The first rows of a results.jsonl as a Markdown table, cells cut short."""
    rows = list(islice(read_landed(UPath(results)), PREVIEW_ROWS))
    ids = [{"custom_id": row.custom_id} for row in rows]
    lines = ["| custom_id | outcome | answer |", "|---|---|---|"]
    for line in join_results(ids, rows, id="custom_id"):
        answer = line["content"] if line["error"] is None else line["error"]
        lines.append(f"| {' | '.join(map(_cell, (line['custom_id'], line['outcome'], answer)))} |")
    return "\n".join(lines)


def progress_metadata(progress: Progress) -> dict[str, Any]:
    """Metadata of one look at running batches."""
    told = {"status": progress.status, "total": progress.total, "completed": progress.completed,
            "failed": progress.failed}  # fmt: skip
    return {f"anybatch/{name}": value for name, value in told.items()}


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _PREVIEW_WIDTH else f"{text[:_PREVIEW_WIDTH]}…"
