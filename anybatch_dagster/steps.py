"""What both steps share: a job's identity, folder, deadline and record, and how a step fails."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from anybatch import AnyBatchError, Client
from anybatch.errors import classify
from anybatch.jobs.policies import deadlines_of

from .gate import IN_FLIGHT, Gate
from .inputs import span
from .metadata import SubmissionMetadata
from .submissions import Submission, batch_asset_pairs, inherited_tags, planned_assets, waiting_assets

if TYPE_CHECKING:
    from anybatch import Job, Standing

    from .options import JobOptions
    from .resource import BatchResource


def deadline_of(standing: Standing, options: JobOptions, now: float) -> float | None:
    """Until when to wait for the running batches, in unix seconds; None if none runs."""
    seconds, outlasts_lost = options.timeout.total_seconds(), options.on_lost != "fail"
    return min(deadlines_of(standing, seconds, now, outlasts_lost=outlasts_lost).values(), default=None)


# --- the record of a submission ----------------------------------------------------------------------------


def submission_facts(
    client: Client,
    job: Job,
    options: JobOptions,
    standing: Standing,
    now: float,
) -> SubmissionMetadata:
    """The record of the current round's batches, for the metadata of a materialization."""
    ledger = job.ledger()
    assert ledger is not None  # submit() has written it
    current = [record.batch_id for record in ledger.current if record.batch_id]
    # A stopped job may have landed while its last round had no batch: then name those of all rounds.
    ids = [batch.id for batch in standing] or current or ledger.batch_ids
    console = client.provider.console_url(ids)
    return SubmissionMetadata(
        batches=", ".join(ids),
        folder=str(job.output),
        provider=ledger.provider,
        model=options.model,
        endpoint=ledger.endpoint,
        requests=ledger.rows,
        resource=options.resource_key,
        deadline=deadline_of(standing, options, now),
        on_timeout=options.on_timeout,
        round=ledger.round,
        console=dg.MetadataValue.url(console) if console else None,
    )


def data_version(job: Job) -> str:
    """Data version of the submit asset: it changes if any shard has another batch, and only then."""
    ledger = job.ledger()
    assert ledger is not None
    ids = hashlib.sha256("\n".join(ledger.batch_ids).encode()).hexdigest()
    return f"{ledger.fingerprint[:12]}-{ids[:12]}"


def record_round(
    context: dg.AssetExecutionContext, submit_key: dg.AssetKey, partitions: Sequence[str], job: Job,
    facts: SubmissionMetadata,
) -> Submission:  # fmt: skip
    """Record which batches the result asset's run waits for now, as an event of the submit asset.

    The sensor reads these events.
    """
    for partition in partitions or (None,):
        event = dg.AssetMaterialization(
            submit_key, partition=partition, metadata=dict(facts), tags={DATA_VERSION_TAG: data_version(job)}
        )
        context.log_event(event)
    return Submission(context.run.run_id, submit_key, 0.0, tuple(partitions), facts)


# --- waiting without a process -----------------------------------------------------------------------------


def park_result_run(context: dg.AssetExecutionContext, submission: Submission) -> str | None:
    """Queue a run that will take the results, and will materialize what this run skips for want of them.

    Returns:
        The run's id; None if only the sensor can start such a run.
    """
    gate = Gate(context.instance)
    if not gate.can_park(context.run):
        return None
    graph = context.repository_def.asset_graph
    result_key = batch_asset_pairs(graph)[submission.asset_key]
    assets = waiting_assets(graph, planned_assets(context.instance, context.run), result_key)
    return gate.park(context, assets, waiting_tags(submission, context.run))


def waiting_tags(submission: Submission, run: dg.DagsterRun | None) -> dict[str, str]:
    """The tags of a run that waits for a submission, without the gate's own tag."""
    resource = submission.facts.resource
    return {
        **(inherited_tags(run.tags) if run else {}),
        **submission.tags,
        **({IN_FLIGHT: resource} if resource else {}),
    }


# --- identity, folder, errors ------------------------------------------------------------------------------


def identity(submit_key: dg.AssetKey, partitions: Sequence[str]) -> str:
    """The job's identity: asset and partitions, never the run."""
    return "/".join(["dagster:" + submit_key.to_user_string(), *span(partitions)])


def job_folder(
    instance: dg.DagsterInstance,
    options: JobOptions,
    resource: BatchResource,
    key: dg.AssetKey,
    partitions: Sequence[str],
) -> str:
    """The path or URL of a job's folder: by asset and partitions, below `output`."""
    base = options.output or resource.output or f"{instance.storage_directory()}/anybatch"
    # A partition key may hold any character, and may be `..`.
    parts = (quote(part, safe="|=").replace("..", "%2E%2E") for part in (*key.path, *span(partitions)))
    return "/".join([base.rstrip("/"), *parts])


@contextmanager
def final_errors_skip_retries() -> Iterator[None]:
    """Fail the step without a retry on an error that only a person can mend, such as a refused key."""
    try:
        yield
    except AnyBatchError as error:
        if not classify(error).is_final:
            raise
        raise failure_without_retry(f"{type(error).__name__}: {error}") from error


def failure_without_retry(message: str, metadata: dict[str, Any] | None = None) -> dg.Failure:
    """An error that fails the step; Dagster does not apply the retry policy to it."""
    return dg.Failure(message, metadata=metadata, allow_retries=False)
