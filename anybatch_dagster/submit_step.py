"""What the submit asset does when it runs: it submits, or finds an earlier run's batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from .gate import IN_FLIGHT, TURN, WAITING, Gate
from .inputs import request_lines, run_partitions
from .steps import (
    data_version,
    failure_without_retry,
    final_errors_skip_retries,
    identity,
    job_folder,
    park_result_run,
    submission_facts,
)
from .submissions import (
    TAG_RESOURCE,
    TAG_SUBMISSION,
    TAG_SUBMIT_ASSET,
    Submission,
    batch_asset_pairs,
    inherited_tags,
    planned_assets,
    waiting_assets,
)

if TYPE_CHECKING:
    from .metadata import SubmissionMetadata
    from .options import JobOptions
    from .resource import BatchResource


def submit_requests(
    context: dg.AssetExecutionContext,
    options: JobOptions,
    resource: BatchResource,
    make: Callable[[], Any],
    *,
    force: bool,
) -> Iterator[dg.MaterializeResult[Any]]:
    """Submit, or find what an earlier run submitted; the materialization is the record that the sensor reads.

    Yields nothing if `max_in_flight` batches are in flight: this run ends, and another one waits for its
    turn.

    Args:
        context: Dagster's context of the step.
        options: The batch asset's options.
        resource: The account.
        make: Calls the user's function.
        force: Submit again although the same requests were submitted before.
    """
    if not _may_submit(context, options, resource):
        return
    partitions = run_partitions(context)
    folder = job_folder(context.instance, options, resource, context.asset_key, partitions)
    began = time.time()
    with final_errors_skip_retries(), resource.client() as client:
        job = options.job(
            request_lines(make(), options, partitions),
            folder,
            identity(context.asset_key, partitions),
            restart=_restart_key(context) if force else None,
        )
        facts = submission_facts(client, job, options, client.submit(job), began)
        version = data_version(job)
        ledger = job.ledger()
    found = ", which an earlier run created" if ledger and ledger.created_at < began else ""
    context.log.info(f"{facts.requests} requests in {facts.batches}{found}; job folder {folder}")
    _park_missing_result_run(context, facts, partitions)
    yield dg.MaterializeResult(metadata=dict(facts), data_version=dg.DataVersion(version))


def _restart_key(context: dg.AssetExecutionContext) -> str:
    """`Job.restart` for `force`; a retry of the step or the run has the same, so it costs nothing."""
    return context.run.root_run_id or context.run.run_id


def _park_missing_result_run(
    context: dg.AssetExecutionContext, facts: SubmissionMetadata, partitions: Sequence[str]
) -> None:
    """If this run does not include the result asset, queue a run that does."""
    if not Gate(context.instance).can_park(context.run):
        return
    result_key = batch_asset_pairs(context.repository_def.asset_graph).get(context.asset_key)
    if result_key and result_key not in planned_assets(context.instance, context.run):
        submission = Submission(context.run.run_id, context.asset_key, 0.0, tuple(partitions), facts)
        context.log.info(f"run {park_result_run(context, submission)} waits for the results")


def _may_submit(context: dg.AssetExecutionContext, options: JobOptions, resource: BatchResource) -> bool:
    """Whether this run may submit; if not, a run like it is queued until there is room."""
    most = resource.max_in_flight
    if most is None:
        return True
    gate, key = Gate(context.instance), options.resource_key
    if not gate.exists:
        raise failure_without_retry(
            "max_in_flight holds runs back in the queue, and needs this rule in dagster.yaml: "
            "concurrency.runs.tag_concurrency_limits: [{key: anybatch/gate, value: waiting, limit: 0}]"
        )
    if gate.take_turn(context.run, key, most):
        return True
    reason = f"{most} batches are in flight on {key!r}, which is max_in_flight"
    if not gate.can_park(context.run):
        raise failure_without_retry(
            f"{reason}; a run that was started by hand cannot wait for its turn: run it again later"
        )
    planned = planned_assets(context.instance, context.run)
    assets = waiting_assets(context.repository_def.asset_graph, planned, context.asset_key)
    tags = {
        **inherited_tags(context.run.tags),
        TAG_SUBMISSION: context.run.run_id,
        TAG_SUBMIT_ASSET: context.asset_key.to_user_string(),
        TAG_RESOURCE: key,
        TURN: WAITING,
        IN_FLIGHT: "",
    }
    context.log.warning(
        f"{reason}: run {gate.park(context, assets, tags)} waits for its turn, and then submits"
    )
    return False
