"""What a job's batches mean for those who wait: the record of a submission, its deadline, what comes next."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from anybatch import (
    APIError,
    Batch,
    BatchFailedError,
    BatchStatus,
    Client,
    ConfigurationError,
    InputError,
    JobError,
    RateLimitError,
    ServerError,
    TransportError,
)
from anybatch.providers.consoles import console_url

from .gate import IN_FLIGHT, Gate
from .inputs import span
from .metadata import SubmissionMetadata
from .submissions import Submission, batch_asset_pairs, inherited_tags, planned_assets, waiting_assets

if TYPE_CHECKING:
    from anybatch import Job
    from anybatch.jobs.options import OnLost, OnTimeout

    from .options import JobOptions
    from .resource import BatchResource

# How long a provider may take to end a batch that it was asked to cancel.
CANCEL_TIME = 3600.0


# --- deciding ----------------------------------------------------------------------------------------------


def deadline_of(
    batches: Sequence[Batch], timeout: timedelta, now: float, stopped_at: float | None = None
) -> float:
    """Until when to wait for these batches, unix seconds: `timeout` after their creation, whoever asks.

    A batch that is being cancelled has an hour for that, so that a new attempt, which needs its finished
    rows, is not stopped by a deadline that is over. So have those of a job that was stopped.
    """
    if stopped_at is not None:
        return stopped_at + CANCEL_TIME
    deadline = min((batch.created_at or now for batch in batches), default=now) + timeout.total_seconds()
    ends = [
        (batch.cancelling_at or now) + CANCEL_TIME
        for batch in batches
        if batch.status is BatchStatus.CANCELLING
    ]
    return max([deadline, *ends])


class Next(Enum):
    """What a result asset does about batches that still run."""

    WAIT = auto()
    WAIT_ON = auto()  # as long again as a batch may take to be cancelled
    GIVE_UP = auto()  # fail, and leave them running
    CANCEL = auto()  # cancel them, and fail
    LAND_PARTIAL = auto()  # stop the job, wait until they have ended, and take what there is


def next_step(
    now: float, deadline: float, on_timeout: OnTimeout, *, is_stopped: bool, is_given_time: bool = False
) -> Next:
    """`is_stopped`: they were cancelled for their results already, and had their time to end.

    `is_given_time`: they have more of it (see `may_be_lost`).
    """
    if now < deadline:
        return Next.WAIT
    if is_given_time:
        return Next.WAIT_ON
    if is_stopped:
        return Next.GIVE_UP
    return {"leave": Next.GIVE_UP, "cancel": Next.CANCEL, "land_partial": Next.LAND_PARTIAL}[on_timeout]


def may_be_lost(running: Sequence[Batch], on_lost: OnLost) -> bool:
    """Whether all that still run are being cancelled, and the job can do without one that never ends so.

    `Client.resume` has just seen them, and decides when it has seen them for an hour: at its next call it no
    longer returns them. So this does not put off a deadline for ever.
    """
    return on_lost != "fail" and all(batch.status is BatchStatus.CANCELLING for batch in running)


# --- the record of a submission ----------------------------------------------------------------------------


def submission_facts(
    client: Client,
    job: Job,
    options: JobOptions,
    batches: Sequence[Batch],
    now: float,
) -> SubmissionMetadata:
    """What is written down of the batches of the current round; none where the results have landed."""
    ledger = job.ledger()
    assert ledger is not None  # there is one since submit()
    current = [record.batch_id for record in ledger.current if record.batch_id]
    # A job that was stopped may have landed with a round that never had a batch: then those of all rounds.
    ids = [batch.id for batch in batches] or current or ledger.batch_ids
    console = console_url(client.account.api_base, ids)
    return SubmissionMetadata(
        batches=", ".join(ids),
        folder=str(job.output),
        provider=ledger.provider,
        model=options.model,
        endpoint=ledger.endpoint,
        requests=ledger.rows,
        resource=options.resource_key,
        deadline=deadline_of(batches, options.timeout, now, ledger.stopped_at) if batches else None,
        on_timeout=options.on_timeout,
        round=ledger.round + 1,
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
    except (RateLimitError, ServerError, TransportError):
        raise
    except (ConfigurationError, InputError, JobError, BatchFailedError, APIError) as error:
        raise failure(f"{type(error).__name__}: {error}") from error


def failure(message: str, metadata: dict[str, Any] | None = None) -> dg.Failure:
    """Fails the step; its retry policy would change nothing."""
    return dg.Failure(message, metadata=metadata, allow_retries=False)
