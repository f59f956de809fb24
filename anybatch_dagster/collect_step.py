"""What the result asset does when it runs: it lands the results, or has another run wait for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg

from anybatch import AnyBatchError, BatchStatus, NotFoundError
from anybatch.jobs.policies import Move, batches_in_words, next_move, rows_problem

from . import submissions
from .inputs import run_partitions
from .metadata import error_rate, part_metadata, result_metadata
from .steps import (
    deadline_of,
    failure_without_retry,
    final_errors_skip_retries,
    identity,
    park_result_run,
    record_round,
    submission_facts,
)
from .values import AssetValue, make_value, split_report, store_partition_values

if TYPE_CHECKING:
    from anybatch import Batch, Client, Job, Report, Standing

    from .options import JobOptions
    from .resource import BatchResource
    from .submissions import Submission

CHECK = "error_rate"


def collect_results(
    context: dg.AssetExecutionContext, options: JobOptions, io_manager_key: str
) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
    """Land the results and materialize them; yields nothing while there is something to wait for.

    Rows that go again are submitted here, and waited for like those of the first round.

    Args:
        context: Dagster's context of the step.
        options: The batch asset's options.
        io_manager_key: Key of the result asset's IO manager.
    """
    result_key = _result_key(context)
    (submit_key,) = context.assets_def.asset_deps[result_key]
    partitions = run_partitions(context)
    submission = _submission(context, submit_key, result_key, partitions)
    resource: BatchResource = getattr(context.resources, options.resource_key)
    job = options.job((), str(submission.facts.folder), identity(submit_key, partitions))
    with final_errors_skip_retries(), resource.client() as client:
        standing = client.resume(job)
        if not standing.is_over:
            _go_on_waiting(context, options, client, job, submission, standing)
            return
        report = client.collect(job)
        made = _make_values(context, options, report, partitions)
    context.log.info(f"{report.rows} rows in {report.results}")
    invalid = sum(one.invalid for one in made.values())
    if context.selected_asset_check_keys:
        yield _check_result(report, result_key, options.max_failed_ratio, made)
    problem = rows_problem(report, options.on_partial, 1.0, invalid=invalid)
    if problem is not None:
        raise failure_without_retry(
            f"{problem}; the other rows are in {report.results}",
            metadata={"anybatch/results": report.results},
        )
    if result_key in context.selected_asset_keys:
        if _has_partition_values(options, partitions):
            values = {partition: one.value for partition, one in made.items()}
            store_partition_values(context, result_key, io_manager_key, values)
        yield _materialization(context, result_key, options, report, submission, made)


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
        raise failure_without_retry(f"Nothing was submitted yet{of}: materialize {submit_name} first.")
    if set(found.partitions) != set(partitions):
        raise failure_without_retry(
            f"{submit_name} was last submitted as one batch for {len(found.partitions)} partitions, "
            f"{found.partitions[0]} to {found.partitions[-1]}: materialize {name} for the same ones."
        )
    return found


# --- not yet -----------------------------------------------------------------------------------------------


def _go_on_waiting(
    context: dg.AssetExecutionContext,
    options: JobOptions,
    client: Client,
    job: Job,
    submission: Submission,
    standing: Standing,
) -> None:
    """Record what is waited for now, and see that a run or the sensor waits for it; act if it is late.

    Raises:
        Failure: The batches are late, and `on_timeout` is "leave" or "cancel".
    """
    now, before = time.time(), submission.facts
    facts = submission_facts(client, job, options, standing, now)
    running, state = standing.running, batches_in_words(standing.running)
    deadlines = {batch.id: facts.deadline or now for batch in running}
    move = next_move(standing, deadlines, options.on_timeout, now)
    if move is Move.CANCEL:
        _cancel(context, client, running)
        raise dg.Failure(
            f"{state}. The deadline has passed, and it was cancelled. Materialize this asset again to keep "
            "the finished rows and to submit the others once more."
        )
    if move in (Move.LEAVE, Move.GIVE_UP):
        raise dg.Failure(
            f"{state}. The deadline has passed; it is left running. Materialize this asset again to take the "
            "results once it has ended, or raise `timeout`."
        )
    if move is Move.STOP:
        stopped = replace(standing, stopped_at=now)
        facts = facts.model_copy(update={"deadline": deadline_of(stopped, options, now)})
    if facts != before:
        submission = record_round(context, submission.asset_key, submission.partitions, job, facts)
    parked = park_result_run(context, submission)
    run_id = context.run.run_id
    if parked is None and not submissions.is_waited_for(context.instance, submission, besides=run_id):
        # The sensor makes one run for each submission, and this is that run: record another submission.
        record_round(context, submission.asset_key, submission.partitions, job, facts)
    if move is Move.STOP:  # after the lines above: if this process is killed, something still waits
        client.stop(job)  # stop(), not cancel(): another attempt would submit cancelled rows again
        context.log.warning(
            f"{state}. The deadline has passed: it is cancelled, and what it finished will land"
        )
    waits = f"Run {parked} waits for it" if parked else "The batch sensor starts this asset again"
    context.log.warning(f"{state} (round {facts.round}). Nothing is materialized now. {waits}.")


def _cancel(context: dg.AssetExecutionContext, client: Client, batches: Sequence[Batch]) -> None:
    """Cancel the batches; the first refusal is raised at the end, so that it does not keep others running."""
    problems: list[AnyBatchError] = []
    for batch in batches:
        if batch.status is BatchStatus.CANCELLING:
            continue
        try:
            client.cancel(batch.id)
        except NotFoundError as error:
            context.log.warning(f"{error}: nothing to cancel, the provider does not know the batch")
        except AnyBatchError as error:
            problems.append(error)
    if problems:
        raise problems[0]


# --- landed ------------------------------------------------------------------------------------------------


def _make_values(
    context: dg.AssetExecutionContext, options: JobOptions, report: Report, partitions: Sequence[str]
) -> Mapping[str, AssetValue]:
    """The value of each partition, or the only value under the key "". Adds each partition's figures to its
    event.

    A run for the check alone needs a value only if it is a pydantic model, to count the answers that fit.
    """
    keys = context.selected_asset_keys
    if not keys and not isinstance(options.value, type):
        return {}
    if not _has_partition_values(options, partitions):
        return {"": make_value(options.value, report)}
    made = {}
    for partition, part in split_report(report, partitions, options.price).items():
        made[partition] = make_value(options.value, part)
        for key in keys:
            facts = part_metadata(part, made[partition].invalid)
            context.add_asset_metadata(facts, asset_key=key, partition_key=partition)
    return made


def _has_partition_values(options: JobOptions, partitions: Sequence[str]) -> bool:
    """Whether each partition has a value and figures of its own."""
    return len(partitions) > 1 and options.value != "none"


def _materialization(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    options: JobOptions,
    report: Report,
    submission: Submission,
    made: Mapping[str, AssetValue],
) -> dg.MaterializeResult[Any]:
    ended = max((batch.ended_at for batch in report.batches if batch.ended_at), default=None)
    by_partition = _has_partition_values(options, submission.partitions)
    facts = result_metadata(
        report,
        submission=submission.run_id,
        console=submission.facts.console,
        invalid=sum(one.invalid for one in made.values()),
        collect_lag=round(max(0.0, time.time() - ended), 1) if ended else None,
        by_partition=by_partition,
    )
    if by_partition or options.value == "none":
        return dg.MaterializeResult(asset_key=key, metadata=facts)
    return dg.MaterializeResult(asset_key=key, metadata=facts, value=made[""].value)


def _check_result(
    report: Report, key: dg.AssetKey, max_failed_ratio: float | None, made: Mapping[str, AssetValue]
) -> dg.AssetCheckResult:
    invalid = sum(one.invalid for one in made.values())
    examples = [example for one in made.values() for example in one.examples][:5]
    rate = error_rate(report, invalid)
    passed = rows_problem(report, "keep", max_failed_ratio, invalid=invalid) is None
    counts = {f"anybatch/{outcome.value}": count for outcome, count in report.counts.items() if count}
    facts: dict[str, Any] = {**counts, "anybatch/error_rate": rate}
    if invalid:
        facts |= {"anybatch/invalid": invalid, "anybatch/invalid_examples": dg.MetadataValue.json(examples)}
    return dg.AssetCheckResult(asset_key=key, check_name=CHECK, passed=passed, metadata=facts)


def _result_key(context: dg.AssetExecutionContext) -> dg.AssetKey:
    """The key of the result asset; from the selection, since keys may change after definition."""
    checks = context.selected_asset_check_keys
    key: dg.AssetKey = next(iter(context.selected_asset_keys or {check.asset_key for check in checks}))
    return key
