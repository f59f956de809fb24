"""A job end to end as one Airflow task."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from anybatch.jobs.options import DEFAULT_TIMEOUT
from anybatch_airflow.account import checked, final_errors, task_instance, waits_deferred
from anybatch_airflow.carried import Carried
from anybatch_airflow.inputs import HasOutput, is_path, location, plain
from anybatch_airflow.kill import KillGuard
from anybatch_airflow.landing import land
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, ResultsLink, push_links
from anybatch_airflow.operators.submitting import SubmittingOperator
from anybatch_airflow.policies import batches_in_words, chosen, told_late, utc

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client, Job, Standing
    from anybatch.jobs.ledger import Ledger
    from anybatch.jobs.options import (
        KeepRequests,
        OnChanged,
        OnLost,
        OnOrphan,
        OnPartial,
        OnTimeout,
        OnUntranslatable,
    )
    from anybatch_airflow.inputs import IdColumn, Prompt, Requests


class AnyBatchOperator(HasOutput, SubmittingOperator):
    """Submits requests as batches, waits without a worker slot, lands the results, returns a manifest.

    The job's identity is dag, task, run and map index, after the option `[anybatch] deployment` where that is
    set: a retry, a clear and a second copy of the task find the batches of the first attempt and pay for
    nothing twice. The manifest (XCom `return_value`) holds
    `results` (URI of results.jsonl), `rows`, `counts` per outcome, tokens, `cost` in USD where known,
    `rounds`, `batch_ids`, `batches` (id, shard, round, rows, status) and `duration_s`. The ids are also
    pushed on their own, as `batch_ids`, before each wait.

    To mark the task failed or succeeded, or to fail its run, cancels the batches: on a worker always, while
    it waits deferred from Airflow 3.3 on (before, they run on). To clear it does not: the new attempt waits
    for the same ones.

    Use `timeout` here and not `execution_timeout`. Airflow applies that to each stretch on a worker and not
    to a deferred wait. Where it strikes, the batches run on, and a retry or a clear finds them again, but
    none of what `on_timeout` says is done.

    :param input: Where the requests are: a path or object-store URL of a JSONL file (templated), an
        iterable of request dicts, the XCom of another task, or a function that returns any of these; the
        function may take context variables by name, as with PythonOperator. With `prompt` it is a table
        instead. Requests themselves are never rendered, as text in a prompt must not be run as a template,
        nor stored in the metadata database, nor is what `.partial(input=…)` is given; `.expand(input=…)`
        does store its literals there, so map over paths.
    :param output: A folder of the job's own that all workers see, local or `s3://conn_id@bucket/…`, for its
        record, results.jsonl and report.json: one per task instance, `…/{{ run_id }}`, with
        `{{ ti.map_index }}` if it is mapped. The templated field, and the attribute, is `output_folder`, as
        `output` is what every operator calls its XCom.
    :param endpoint: OpenAI's path (`/v1/chat/completions`, …) or the provider's own.
    :param prompt: Makes requests of a table, `input`: a CSV, TSV, JSONL or Parquet file, a DataFrame or
        dicts. A template like "Sum up: {text}", whose fields are columns and which is never Jinja, or a
        function of the row; see `anybatch.build_requests`.
    :param id_column: With `prompt`, the column that holds custom_ids, or a function of the row.
    :param system: With `prompt`, the system prompt of every request.
    :param body: With `prompt`, the other parameters of every request, e.g. `{"max_tokens": 200}`.
    :param model: With `prompt`, the model of every request; also for providers whose batches have one model
        as a whole.
    :param conn_id: Airflow connection, see `AnyBatchHook`. Default: `anybatch_default`, or none at all if
        `provider` is given, and then the provider's environment variables must be set.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param completion_window: What to ask of the provider.
    :param metadata: Strings to put on every batch beside anybatch's own.
    :param options: The provider's own create options.
    :param on_orphan: "fail" or "resubmit", where a batch may have been created but cannot be looked up, and
        where an earlier attempt has created batches of which the output folder has no record.
    :param on_changed: "cancel_and_resubmit" or "fail", where the input is not what it was.
    :param on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
    :param on_lost: What becomes of a batch, or of its result file, that is gone at the provider. "fail": the
        task fails, and names it. "land": what there is lands, its other rows have the outcome `missing`.
        "resubmit": those rows are submitted, and paid for, once more. With either of these the other batches
        of the job are waited for all the same, and whether it is gone is looked at for 15 minutes.
    :param shard_requests: How many requests one batch may hold at most, below the provider's own limit; in
        force from the first submission on.
    :param keep_requests: How long the request lines of a `prompt` or a function stay in the output folder,
        prompts and all: "until_submitted", "until_landed" or "always". With the first, no later round can be
        submitted while the task waits.
    :param max_rounds: How often a row may be submitted: 2 and more submit rows again that expired, went
        missing or failed in a way that may pass. Rows of a batch that someone cancelled always are.
    :param on_partial: "keep": rows without a result land as they are, and `max_failed_ratio` decides.
        "fail": the task fails, without a retry, if any row has no result after the last round; all that
        there is has landed.
    :param max_failed_ratio: Share of rows without a result above which the task fails, after the results
        have landed and without a retry. 0: every row must succeed. Default: fails if no row succeeded.
    :param price: USD for a million input and output tokens, where the provider does not tell the cost.
    :param timeout: How long the batches of a round may take from their creation on, in seconds or as a
        timedelta. A retry does not start it anew: it looks once more and takes the results if they are there.
    :param on_timeout: "leave": the task fails, the batches run on; a retry or a clear takes their results if
        they have ended by then. "cancel": the batches are cancelled, the task fails; the next attempt keeps
        the rows that are finished and submits the rest again. "land_partial": the batches are cancelled,
        and what they finished lands; the other rows have the outcome `cancelled`, and `on_partial` and
        `max_failed_ratio` decide.
    :param deferrable: False to hold the worker slot while waiting. None: deferred, unless the environment
        variable AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE is False.
    :param min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
    """

    template_fields: Collection[str] = ("output_folder", *SubmittingOperator.template_fields)
    operator_extra_links = (BatchLink(), ResultsLink())
    _guard: KillGuard | None = None
    _carried = Carried()

    def __init__(
        self,
        *,
        input: Requests,
        output: str | os.PathLike[str],
        endpoint: str = "/v1/chat/completions",
        prompt: Prompt | None = None,
        id_column: IdColumn | None = None,
        system: str | None = None,
        body: Mapping[str, Any] | None = None,
        model: str | None = None,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        on_orphan: OnOrphan = "fail",
        on_changed: OnChanged = "cancel_and_resubmit",
        on_untranslatable: OnUntranslatable = "fail",
        on_lost: OnLost = "fail",
        shard_requests: int | None = None,
        keep_requests: KeepRequests = "until_landed",
        max_rounds: int = 1,
        on_partial: OnPartial = "keep",
        max_failed_ratio: float | None = None,
        price: tuple[float, float] | None = None,
        timeout: float | timedelta = DEFAULT_TIMEOUT,
        on_timeout: OnTimeout = "leave",
        deferrable: bool | None = None,
        min_defer_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input=input,
            endpoint=endpoint,
            prompt=prompt,
            id_column=id_column,
            system=system,
            body=body,
            model=model,
            conn_id=conn_id,
            provider=provider,
            api_base=api_base,
            completion_window=completion_window,
            metadata=metadata,
            options=options,
            on_orphan=on_orphan,
            on_changed=on_changed,
            on_untranslatable=on_untranslatable,
            **kwargs,
        )
        self.output_folder = plain(output)
        self.on_lost: OnLost = on_lost
        self.shard_requests = shard_requests
        self.keep_requests = keep_requests
        self.max_rounds = max_rounds
        self.on_partial = chosen("on_partial", on_partial)
        self.max_failed_ratio = max_failed_ratio
        self.price = price
        self.timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.on_timeout = chosen("on_timeout", on_timeout)
        self.deferrable = waits_deferred(deferrable)
        self.min_defer_seconds = min_defer_seconds
        self.manifest: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit, or find what an earlier attempt submitted; wait; land."""
        with self._at_work(context) as (client, job):
            before = dict(context)
            job = replace(job, input=self._requests(context))
            self._check_record(context, client, job)
            standing = client.submit(job)  # which is when a generator of requests has come to its end
            self._carried = Carried.of(self, self.source, context, before)
            return self._go_on(context, client, job, standing, time.time())

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the trigger's event, on a worker again."""
        from anybatch.jobs.policies import began_before

        self._carried = Carried.from_text((event or {}).get("then"))
        self._carried.restore(context)
        told = checked(event)
        with self._at_work(context) as (client, job):
            # What was submitted is on record: the input is not made a second time.
            job = self._recorded(job, told["batches"])
            began = began_before(told["status"] == "timeout", time.time())
            # A batch that was late for the trigger is looked at again: it may have ended by now.
            return self._go_on(context, client, job, client.resume(job), began)

    def on_kill(self) -> None:
        """Cancel the batches if the task instance is over; leave them to the next attempt if it is not."""
        if self._guard is not None:
            self._guard.kill()

    @contextmanager
    def _at_work(self, context: Context) -> Iterator[tuple[Client, Job]]:
        """The client, and the job without its input."""
        with final_errors():
            folder = location(self.output_folder)
            job = self._job(
                context,
                (),
                folder,
                on_lost=self.on_lost,
                shard_requests=self.shard_requests,
                keep_requests=self.keep_requests,
                max_rounds=self.max_rounds,
                price=self.price,
            )
            self._guard = KillGuard(task_instance(context), job, self.hook(), self.log)
            with self._guard, self.hook().get_client() as client:
                yield client, job

    def _go_on(
        self, context: Context, client: Client, job: Job, standing: Standing, began: float
    ) -> dict[str, Any]:
        """Round by round, until there is nothing left to wait for; the waiting `began` then."""
        from anybatch.jobs.policies import Move, deadlines_of, next_move

        timeout = self.timeout.total_seconds()
        while True:
            self._publish(context, client, job)
            now, running = time.time(), standing.running
            deadlines = deadlines_of(standing, timeout, began, outlasts_lost=self._outlasts_lost)
            match next_move(standing, deadlines, self.on_timeout, now):
                case Move.LAND:
                    return self._collect(context, client, job)
                case Move.WAIT:
                    self._wait(client, running, deadlines)
                case Move.LEAVE:
                    raise AirflowException(
                        f"{told_late(running, deadlines, now)}. After {self.timeout} the task gave up, the "
                        "batches were left running. A retry or a clear takes their results if they have "
                        "ended by then; raise `timeout` to wait longer."
                    )
                case Move.CANCEL:
                    self._cancel(client, running, told_late(running, deadlines, now))
                case Move.STOP:
                    late = told_late(running, deadlines, now)
                    self.log.warning("%s; cancelling, as on_timeout='land_partial' says", late)
                    client.stop(job)
                case Move.GIVE_UP:
                    raise AirflowException(
                        f"cancelled and not ended within an hour: {batches_in_words(running)}. A retry lands "
                        "what they have finished if they have ended by then."
                    )
            standing = client.resume(job)

    def _wait(self, client: Client, running: Sequence[Batch], deadlines: Mapping[str, float]) -> None:
        """Until all have ended or their deadlines have passed. Deferred there is no return."""
        from anybatch import DeadlineExceededError
        from anybatch_airflow.triggers import progress

        latest = utc(max(deadlines.values()))
        self.log.info("waiting until %s at the latest: %s", latest, batches_in_words(running))
        if self.deferrable:
            created = {batch.id: batch.created_at for batch in running}
            trigger = self.trigger(
                created, deadlines, then=self._carried.to_text(), outlasts_lost=self._outlasts_lost
            )
            self.defer(trigger=trigger, method_name="execute_complete")
        for batch in running:
            with suppress(DeadlineExceededError), self._lost_noted():
                client.wait(batch.id, deadline=deadlines[batch.id], on_progress=progress(self.log.info))

    @property
    def _outlasts_lost(self) -> bool:
        """Whether a batch that the provider does not know ends the waiting for itself alone.

        Whether it is gone for good, and what becomes of its rows, is then for the job to say.
        """
        return self.on_lost != "fail"

    @contextmanager
    def _lost_noted(self) -> Iterator[None]:
        from anybatch import NotFoundError
        from anybatch_airflow.triggers import LOST

        try:
            yield
        except NotFoundError as error:
            if not self._outlasts_lost:
                raise
            self.log.warning(LOST, error.batch_id, error)

    def _cancel(self, client: Client, running: Sequence[Batch], late: str) -> None:
        """Cancel what is late, and fail; return if all has been completed at the last moment."""
        from anybatch import AnyBatchError

        self.log.warning("%s; cancelling, as on_timeout='cancel' says", late)
        cancelled, problems = [], []
        for batch in running:
            try:
                cancelled.append(client.cancel(batch.id))
            except AnyBatchError as error:  # one that is gone keeps none of the others running
                problems.append(f"{batch.id} was not cancelled: {type(error).__name__}: {error}")
        if not problems and all(batch.status == "completed" for batch in cancelled):
            return
        told = [f"They were cancelled: {batches_in_words(cancelled)}"] if cancelled else []
        raise AirflowException(
            f"{'. '.join([late, *told, *problems])}. A retry or a clear keeps the rows that are finished and "
            "submits the rest again; raise `timeout` to wait longer."
        )

    def _collect(self, context: Context, client: Client, job: Job) -> dict[str, Any]:
        return land(self, context, client.collect(job), source=self.source)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """What OpenLineage is told; Airflow's listener calls this on the worker."""
        return openlineage_facets(self.source, self.manifest)

    # --- what is on record ---------------------------------------------------------------------------

    def _publish(self, context: Context, client: Client, job: Job) -> Ledger:
        """Now, so that whatever happens later, a person and a later attempt can find the batches."""
        from anybatch_airflow.taskstate import note_batches

        ledger, ti = job.ledger(), task_instance(context)
        if ledger is None:
            raise _no_record(job, ())
        ids = ledger.batch_ids
        ti.xcom_push(key="batch_ids", value=ids)
        push_links(ti, batches=self.hook().console_url(client, ids), results=job.output)
        note_batches(context, ids)
        return ledger

    def _check_record(self, context: Context, client: Client, job: Job) -> None:
        """Fail where the folder is another job's, or lacks the record of batches that are this task's."""
        from anybatch_airflow.taskstate import earlier_batches, unread

        is_first = getattr(task_instance(context), "try_number", 1) == 1
        if _ledger_of(job) is not None or is_first or self.on_orphan == "resubmit":
            return
        found, is_whole = earlier_batches(client, context, job.identity)
        if found:
            known = (f"{batch.id} ({batch.status.value})" for batch in found)
            raise _no_record(
                job, known, " If they are another Airflow deployment's, name each by `[anybatch] deployment`."
            )
        if not is_whole:
            raise unread(client.provider.name)

    def _recorded(self, job: Job, waited_for: Iterable[str]) -> Job:
        """The job with the path its requests came from, opened by the connection its URL names."""
        if (ledger := _ledger_of(job)) is None:
            raise _no_record(job, waited_for)
        self.source = self.input if is_path(self.input) else ledger.input or self._carried.source
        return job if ledger.input is None else replace(job, input=location(ledger.input))


def _ledger_of(job: Job) -> Ledger | None:
    """The job's ledger; a folder that is another job's is nothing that a retry cures."""
    from anybatch import ConfigurationError

    ledger = job.ledger()
    if ledger is not None and ledger.job != job.identity:
        raise ConfigurationError(
            f"{job.folder.path} holds job {ledger.job!r}; job {job.identity!r} needs a folder of its own"
        )
    return ledger


def _no_record(job: Job, batches: Iterable[str], more: str = "") -> AirflowFailException:
    """What to say where a job with batches has no ledger: a retry would create them again, and pay again."""
    known = ", ".join(batches)
    return AirflowFailException(
        f"{job.folder.path} has no record of this task's batches{known and f', {known}'}. Either it was "
        "removed, or it is not a folder that all workers see, but a disk of each worker's or pod's own: let "
        "output be in an object store or on a shared disk. The batches were left as they are: "
        "AnyBatchResultsOperator lands what they have finished. To submit all rows again, and pay again, "
        f"cancel them, or set on_orphan='resubmit'.{more}"
    )
