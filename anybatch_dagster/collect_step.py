"""The result asset's step: take the results, or go on waiting for them without a process."""

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
from .rounds import (
    deadline_of,
    failure,
    final_errors,
    identity,
    park_result,
    record_round,
    submission_facts,
)
from .values import Made, hand_over, make_value, split_report

if TYPE_CHECKING:
    from anybatch import Batch, Client, Job, Report, Standing

    from .options import JobOptions
    from .resource import BatchResource
    from .submissions import Submission

CHECK = "error_rate"


def collect_results(
    context: dg.AssetExecutionContext, options: JobOptions, io_manager_key: str
) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
    """Land the results and materialize them; yields nothing as long as there is something to wait for.

    Rows that are worth another round are submitted here, and waited for like the first.
    """
    result_key = _result_key(context)
    (submit_key,) = context.assets_def.asset_deps[result_key]
    partitions = run_partitions(context)
    submission = _submission(context, submit_key, result_key, partitions)
    resource: BatchResource = getattr(context.resources, options.resource_key)
    job = options.job((), str(submission.facts.folder), identity(submit_key, partitions))
    with final_errors(), resource.client() as client:
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
        raise failure(
            f"{problem}; the others are in {report.results}", metadata={"anybatch/results": report.results}
        )
    if result_key in context.selected_asset_keys:
        if _is_parted(options, partitions):
            values = {partition: one.value for partition, one in made.items()}
            hand_over(context, result_key, io_manager_key, values)
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
        raise failure(f"Nothing was submitted yet{of}: materialize {submit_name} first.")
    if set(found.partitions) != set(partitions):
        raise failure(
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
    """Write down what is waited for now, and see that something waits for it; or fail at the deadline."""
    now, before = time.time(), submission.facts
    facts = submission_facts(client, job, options, standing, now)
    running, told = standing.running, batches_in_words(standing.running)
    deadlines = {batch.id: facts.deadline or now for batch in running}
    move = next_move(standing, deadlines, options.on_timeout, now)
    if move is Move.CANCEL:
        _cancel(context, client, running)
        raise dg.Failure(
            f"{told}. The deadline has passed, and it was cancelled. Materialize this asset again to keep "
            "the rows that were finished and to submit the others once more."
        )
    if move in (Move.LEAVE, Move.GIVE_UP):
        raise dg.Failure(
            f"{told}. The deadline has passed; it is left running. Materialize this asset again to take the "
            "results once it has ended, or raise `timeout`."
        )
    if move is Move.STOP:
        stopped = replace(standing, stopped_at=now)
        facts = facts.model_copy(update={"deadline": deadline_of(stopped, options, now)})
    if facts != before:
        submission = record_round(context, submission.asset_key, submission.partitions, job, facts)
    parked = park_result(context, submission)
    run_id = context.run.run_id
    if parked is None and not submissions.is_waited_for(context.instance, submission, besides=run_id):
        # The sensor makes one run of a submission, and this is it: only what is submitted anew is waited for.
        record_round(context, submission.asset_key, submission.partitions, job, facts)
    if move is Move.STOP:  # only now: a process that is killed before leaves something that waits
        client.stop(job)  # and not just a cancel: another attempt would submit the cancelled rows again
        context.log.warning(
            f"{told}. The deadline has passed: it is cancelled, and what it finished is taken"
        )
    waits = f"Run {parked} waits for it" if parked else "The batch sensor starts this asset again"
    context.log.warning(f"{told} (round {facts.round}). Nothing is materialized now. {waits}.")


def _cancel(context: dg.AssetExecutionContext, client: Client, batches: Sequence[Batch]) -> None:
    """Cancel them. A refusal is raised at the end, so that it keeps none of the others running."""
    problems: list[AnyBatchError] = []
    for batch in batches:
        if batch.status is BatchStatus.CANCELLING:
            continue
        try:
            client.cancel(batch.id)
        except NotFoundError as error:
            context.log.warning(f"{error}: there is nothing left to cancel")
        except AnyBatchError as error:
            problems.append(error)
    if problems:
        raise problems[0]


# --- landed ------------------------------------------------------------------------------------------------


def _make_values(
    context: dg.AssetExecutionContext, options: JobOptions, report: Report, partitions: Sequence[str]
) -> Mapping[str, Made]:
    """The value of each partition, or the only one under "". Metadata of each partition goes to its event.

    Of a run for the check alone there is none, unless it takes a value to know how many answers are good.
    """
    keys = context.selected_asset_keys
    if not keys and not isinstance(options.value, type):
        return {}
    if not _is_parted(options, partitions):
        return {"": make_value(options.value, report)}
    made = {}
    for partition, part in split_report(report, partitions, options.price).items():
        made[partition] = make_value(options.value, part)
        for key in keys:
            told = part_metadata(part, made[partition].invalid)
            context.add_asset_metadata(told, asset_key=key, partition_key=partition)
    return made


def _is_parted(options: JobOptions, partitions: Sequence[str]) -> bool:
    """Whether each partition has a value and figures of its own."""
    return len(partitions) > 1 and options.value != "none"


def _materialization(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    options: JobOptions,
    report: Report,
    submission: Submission,
    made: Mapping[str, Made],
) -> dg.MaterializeResult[Any]:
    ended = max((batch.ended_at for batch in report.batches if batch.ended_at), default=None)
    is_parted = _is_parted(options, submission.partitions)
    facts = result_metadata(
        report,
        submission=submission.run_id,
        console=submission.facts.console,
        invalid=sum(one.invalid for one in made.values()),
        collect_lag=round(max(0.0, time.time() - ended), 1) if ended else None,
        is_parted=is_parted,
    )
    if is_parted or options.value == "none":
        return dg.MaterializeResult(asset_key=key, metadata=facts)
    return dg.MaterializeResult(asset_key=key, metadata=facts, value=made[""].value)


def _check_result(
    report: Report, key: dg.AssetKey, max_failed_ratio: float | None, made: Mapping[str, Made]
) -> dg.AssetCheckResult:
    invalid = sum(one.invalid for one in made.values())
    examples = [example for one in made.values() for example in one.examples][:5]
    rate = error_rate(report, invalid)
    passed = rows_problem(report, "keep", max_failed_ratio, invalid=invalid) is None
    counts = {f"anybatch/{outcome.value}": count for outcome, count in report.counts.items() if count}
    told: dict[str, Any] = {**counts, "anybatch/error_rate": rate}
    if invalid:
        told |= {"anybatch/invalid": invalid, "anybatch/invalid_examples": dg.MetadataValue.json(examples)}
    return dg.AssetCheckResult(asset_key=key, check_name=CHECK, passed=passed, metadata=told)


def _result_key(context: dg.AssetExecutionContext) -> dg.AssetKey:
    """The key of the result asset as it is now, also where only its check was selected."""
    checks = context.selected_asset_check_keys
    key: dg.AssetKey = next(iter(context.selected_asset_keys or {check.asset_key for check in checks}))
    return key
