"""What the two assets do when they run: translation of a Dagster context into a job, and back."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import dagster as dg
from upath import UPath

from anybatch import (
    APIError,
    Batch,
    BatchFailedError,
    BatchNotCompleteError,
    BatchStatus,
    Client,
    ConfigurationError,
    InputError,
    Job,
    JobError,
    RateLimitError,
    Report,
    ServerError,
    TransportError,
)
from anybatch.results import read_landed

from . import submissions
from .metadata import SubmissionMetadata, error_rate, result_metadata
from .resource import BatchResource
from .submissions import Submission

CHECK = "error_rate"
_DEAD = (BatchStatus.CANCELLING, BatchStatus.CANCELLED, BatchStatus.EXPIRED)

Value: TypeAlias = Literal["path", "rows", "none"] | Callable[[Report], Any]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a batch asset asks of its jobs; the names are those of `anybatch.Job`."""

    resource_key: str
    model: str | None
    endpoint: str
    completion_window: str
    metadata: Mapping[str, str]
    options: Mapping[str, Any]
    output: str | None
    on_orphan: Literal["fail", "resubmit"]
    on_changed: Literal["cancel_and_resubmit", "fail"]
    on_untranslatable: Literal["fail", "drop"]
    max_rounds: int
    max_failed_ratio: float | None
    timeout: timedelta
    price: tuple[float, float] | None
    value: Value = field(repr=False)

    def job(self, requests: Any, folder: str, identity: str) -> Job:
        return Job(
            input=requests,
            output=folder,
            id=identity,
            model=self.model,
            endpoint=self.endpoint,
            completion_window=self.completion_window,
            metadata=self.metadata,
            options=self.options,
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
            max_rounds=self.max_rounds,
            price=self.price,
        )


# --- submit --------------------------------------------------------------------------------------------


def submit_requests(
    context: dg.AssetExecutionContext,
    job_options: JobOptions,
    resource: BatchResource,
    requests: Any,
    *,
    force: bool,
) -> dg.MaterializeResult[Any]:
    """Submit, or find what an earlier run submitted; the materialization is the record for the sensor."""
    partitions = _partitions(context)
    folder = _folder(context, job_options, resource, context.asset_key, partitions)
    job = job_options.job(requests, folder, _identity(context.asset_key, partitions))
    with _final_errors(), resource.client() as client:
        began = time.time()
        batches = client.submit(job)
        if _is_stale(context, job, batches, force=force):
            _start_over(context, client, job, batches)
            is_file = isinstance(requests, (str, os.PathLike))
            again = requests if is_file else f"{folder}/requests.jsonl"  # a generator does not run twice
            batches = client.submit(job_options.job(again, folder, job.identity))
    ledger = job.ledger()
    assert ledger is not None  # submit() wrote it
    created = min((batch.created_at or began for batch in batches), default=ledger.created_at)
    facts = SubmissionMetadata(
        batches=", ".join(ledger.batch_ids),
        folder=folder,
        provider=resource.provider,
        model=job_options.model,
        endpoint=job_options.endpoint,
        requests=ledger.rows,
        resource=job_options.resource_key,
        deadline=created + job_options.timeout.total_seconds(),
    )
    found = ", found and not created again" if ledger.created_at < began else ""
    context.log.info(f"{ledger.rows} requests in {facts.batches}{found}; job folder {folder}")
    return dg.MaterializeResult(
        metadata={**facts, "anybatch/created": dg.MetadataValue.timestamp(float(created))},
        # The same batch again leaves the result asset up to date.
        data_version=dg.DataVersion(f"{ledger.fingerprint[:12]}-{ledger.batch_ids[0]}"),
    )


def _is_stale(context: dg.AssetExecutionContext, job: Job, batches: Sequence[Batch], *, force: bool) -> bool:
    """Whether an earlier run's submission is to be replaced: because asked to, or because it is dead.

    What this very run submitted is never stale, else a retry of its step would pay twice.
    """
    ledger, report = job.ledger(), job.report()
    states = [batch.status for batch in (report.batches if report else batches)]
    if ledger is None or not (force or any(status in _DEAD for status in states)):
        return False
    run = context.run
    first_try = run.root_run_id if "dagster/retry_number" in run.tags else None
    record = context.instance.get_run_record_by_id(first_try or run.run_id)
    return record is None or ledger.created_at < record.create_timestamp.timestamp()


def _start_over(
    context: dg.AssetExecutionContext, client: Client, job: Job, batches: Sequence[Batch]
) -> None:
    """Stop what still runs and forget the submission; its requests stay in the folder."""
    for batch in batches:
        if not batch.status.is_terminal and batch.status is not BatchStatus.CANCELLING:
            context.log.warning(f"cancelling {batch.id}, to submit again")
            client.cancel(batch.id)
    job.folder.discard("job.json", "report.json", "results.jsonl", "stray.jsonl")


# --- collect -------------------------------------------------------------------------------------------


def collect_results(
    context: dg.AssetExecutionContext, job_options: JobOptions
) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
    """Land the results and materialize them; yields nothing where the batch has not ended."""
    result_key = _result_key(context)
    (submit_key,) = context.assets_def.asset_deps[result_key]
    partitions = _partitions(context)
    submission = _submission(context, submit_key, result_key, partitions)
    resource: BatchResource = getattr(context.resources, job_options.resource_key)
    job = job_options.job((), str(submission.facts.folder), _identity(submit_key, partitions))
    try:
        with _final_errors(), resource.client() as client:
            report = client.collect(job)
    except BatchNotCompleteError as error:
        _not_yet(context, submission, error)
        return
    context.log.info(f"{report.rows} rows in {report.results}")
    if result_key in context.selected_asset_keys:
        yield _materialization(context, result_key, job_options, report, submission)
    if context.selected_asset_check_keys:
        yield _check_result(report, result_key, job_options.max_failed_ratio)


def _submission(
    context: dg.AssetExecutionContext,
    submit_key: dg.AssetKey,
    result_key: dg.AssetKey,
    partitions: Sequence[str],
) -> Submission:
    """The submission that this run was started for, else the newest."""
    tags, found = context.run.tags, None
    if tags.get(submissions.TAG_SUBMIT_ASSET) == submit_key.to_user_string():
        found = submissions.submission_of_run(context.instance, submit_key, tags[submissions.TAG_SUBMISSION])
    found = found or submissions.latest_submission(context.instance, submit_key, partitions)
    name, submit_name = result_key.to_user_string(), submit_key.to_user_string()
    if found is None:
        of = f" for {', '.join(partitions)}" if partitions else ""
        told = f"Nothing was submitted yet{of}: materialize {submit_name} first."
        raise dg.Failure(told, allow_retries=False)
    if set(found.partitions) != set(partitions):
        raise dg.Failure(
            f"{submit_name} was last submitted as one batch for {len(found.partitions)} partitions, "
            f"{found.partitions[0]} to {found.partitions[-1]}: materialize {name} for the same ones.",
            allow_retries=False,
        )
    return found


def _not_yet(context: dg.AssetExecutionContext, submission: Submission, error: BatchNotCompleteError) -> None:
    """Say that there is nothing to collect so far, or fail if there should be."""
    deadline = submission.facts.deadline
    if deadline is not None and deadline <= time.time():
        raise dg.Failure(
            f"{error}. The deadline has passed; the batch is left running. Materialize this asset again to "
            "take its results once it has ended, or raise `timeout`.",
            allow_retries=False,
        ) from error
    context.log.warning(f"{error}. Nothing is materialized now; the batch sensor starts this asset again.")


def _materialization(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    job_options: JobOptions,
    report: Report,
    submission: Submission,
) -> dg.MaterializeResult[Any]:
    ended = context.run.tags.get(submissions.TAG_ENDED)
    facts = result_metadata(
        report,
        submission=submission.run_id,
        collect_lag=round(max(0.0, time.time() - float(ended)), 1) if ended else None,
    )
    # IO managers store a value for one partition; Dagster's own file one refuses several.
    if job_options.value == "none" or len(submission.partitions) > 1:
        return dg.MaterializeResult(asset_key=key, metadata=facts)
    return dg.MaterializeResult(asset_key=key, metadata=facts, value=_value(job_options.value, report))


def _value(value: Value, report: Report) -> Any:
    if callable(value):
        return value(report)
    return list(read_landed(UPath(report.results))) if value == "rows" else report.results


def _check_result(report: Report, key: dg.AssetKey, max_failed_ratio: float | None) -> dg.AssetCheckResult:
    rate = error_rate(report)
    passed = rate <= max_failed_ratio if max_failed_ratio is not None else rate < 1 or not report.rows
    counts = {f"anybatch/{outcome.value}": count for outcome, count in report.counts.items() if count}
    return dg.AssetCheckResult(
        asset_key=key, check_name=CHECK, passed=passed, metadata={"anybatch/error_rate": rate, **counts}
    )


def _result_key(context: dg.AssetExecutionContext) -> dg.AssetKey:
    """The key of the result asset as it is now, also where only its check was selected."""
    checks = context.selected_asset_check_keys
    key: dg.AssetKey = next(iter(context.selected_asset_keys or {check.asset_key for check in checks}))
    return key


# --- both ----------------------------------------------------------------------------------------------


@contextmanager
def _final_errors() -> Iterator[None]:
    """Errors that a retry cannot cure fail the step at once; a person has to change something first."""
    try:
        yield
    except (RateLimitError, ServerError, TransportError):
        raise
    except (ConfigurationError, InputError, JobError, BatchFailedError, APIError) as error:
        raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from error


def _partitions(context: dg.AssetExecutionContext) -> tuple[str, ...]:
    if context.has_partition_key or context.has_partition_key_range:
        return tuple(context.partition_keys)
    return ()


def _identity(submit_key: dg.AssetKey, partitions: Sequence[str]) -> str:
    """The job's identity: asset and partitions, never the run."""
    return "/".join(["dagster:" + submit_key.to_user_string(), *_span(partitions)])


def _folder(
    context: dg.AssetExecutionContext,
    job_options: JobOptions,
    resource: BatchResource,
    key: dg.AssetKey,
    partitions: Sequence[str],
) -> str:
    base = job_options.output or resource.output or f"{context.instance.storage_directory()}/anybatch"
    # A partition key may hold any character, and be nothing but dots.
    parts = (quote(part, safe="|=").replace("..", "%2E%2E") for part in (*key.path, *_span(partitions)))
    return "/".join([base.rstrip("/"), *parts])


def _span(partitions: Sequence[str]) -> list[str]:
    if len(partitions) > 1:
        return [f"{partitions[0]}~{partitions[-1]}"]
    return list(partitions)
