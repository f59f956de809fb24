"""What a job's batches mean for those who wait: the record of a submission, its deadline, what comes next."""

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
    """Until when to wait for what runs, unix seconds; None where nothing does."""
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
    """What is written down of the batches of the current round; none where the results have landed."""
    ledger = job.ledger()
    assert ledger is not None  # there is one since submit()
    current = [record.batch_id for record in ledger.current if record.batch_id]
    # A job that was stopped may have landed with a round that never had a batch: then those of all rounds.
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
    """The same batches again leave the result asset up to date; another batch for any shard does not."""
    ledger = job.ledger()
    assert ledger is not None
    ids = hashlib.sha256("\n".join(ledger.batch_ids).encode()).hexdigest()
    return f"{ledger.fingerprint[:12]}-{ids[:12]}"


def record_round(
    context: dg.AssetExecutionContext, submit_key: dg.AssetKey, partitions: Sequence[str], job: Job,
    facts: SubmissionMetadata,
) -> Submission:  # fmt: skip
    """Write down that this run, of the result asset, waits for something else now, for the sensor to find."""
    for partition in partitions or (None,):
        event = dg.AssetMaterialization(
            submit_key, partition=partition, metadata=dict(facts), tags={DATA_VERSION_TAG: data_version(job)}
        )
        context.log_event(event)
    return Submission(context.run.run_id, submit_key, 0.0, tuple(partitions), facts)


# --- waiting without a process -----------------------------------------------------------------------------


def park_result(context: dg.AssetExecutionContext, submission: Submission) -> str | None:
    """Queue the run that is to take the results, with what this run skips for want of them.

    None where only the sensor can do that.
    """
    gate = Gate(context.instance)
    if not gate.can_park(context.run):
        return None
    graph = context.repository_def.asset_graph
    result_key = batch_asset_pairs(graph)[submission.asset_key]
    assets = waiting_assets(graph, planned_assets(context.instance, context.run), result_key)
    return gate.park(context, assets, waiting_tags(submission, context.run))


def waiting_tags(submission: Submission, run: dg.DagsterRun | None) -> dict[str, str]:
    """The tags of a run that waits for a submission, without that of the gate."""
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
    base = options.output or resource.output or f"{instance.storage_directory()}/anybatch"
    # A partition key may hold any character, and be nothing but dots.
    parts = (quote(part, safe="|=").replace("..", "%2E%2E") for part in (*key.path, *span(partitions)))
    return "/".join([base.rstrip("/"), *parts])


@contextmanager
def final_errors() -> Iterator[None]:
    """Errors that a retry cannot cure fail the step at once; a person has to change something first."""
    try:
        yield
    except AnyBatchError as error:
        if not classify(error).is_final:
            raise
        raise failure(f"{type(error).__name__}: {error}") from error


def failure(message: str, metadata: dict[str, Any] | None = None) -> dg.Failure:
    """Fails the step; its retry policy would change nothing."""
    return dg.Failure(message, metadata=metadata, allow_retries=False)
