"""AnyBatchOperator: a whole job as one Airflow task."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from anybatch.jobs.options import DEFAULT_TIMEOUT
from anybatch_airflow.base import check_event, final_errors_skip_retries, task_instance, waits_deferred
from anybatch_airflow.carried import Carried
from anybatch_airflow.inputs import HasOutput, checked_choice, is_path, location, plain
from anybatch_airflow.kill import KillGuard
from anybatch_airflow.landing import land
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, ResultsLink, push_links
from anybatch_airflow.operators.submitting import SubmittingOperator
from anybatch_airflow.reporting import batches_in_words, late_text, utc

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

    The job's identity is DAG, task, run and map index, after the option `[anybatch] deployment` if that is
    set. So a retry, a clear and a second copy of the task find the batches of the first attempt, and pay for
    nothing twice.

    The manifest (XCom `return_value`) holds `results` (URI of results.jsonl), `rows`, `counts` per outcome,
    tokens, `cost` in USD where known, `rounds`, `batch_ids`, `batches` (id, shard, round, rows, status) and
    `duration_s`. The XCom `batch_ids` is pushed before each wait.

    Marking the task failed or succeeded, or its run failed, cancels the batches: on a worker always, in a
    deferred wait from Airflow 3.3 on (before, they run on). Clearing the task does not: the new attempt waits
    for the same batches.

    Use `timeout`, not `execution_timeout`. Airflow applies the latter to the time on a worker, and not to a
    deferred wait. When it strikes, the batches run on, and a retry or a clear finds them, but nothing of
    `on_timeout` happens.

    Args:
        input: Where the requests are: a path or object-store URL of a JSONL file (templated), an iterable of
            request dicts, the XCom of another task, or a function that returns any of these; the function may
            take context variables by name, as with PythonOperator. With `prompt` it is a table instead.
            Requests are never rendered, since text in a prompt must not run as a template, and never stored
            in the metadata database; this also holds for `.partial(input=…)`. Airflow does store the literals
            of `.expand(input=…)` there, so map over paths.
        output: A folder of the job's own that all workers see, local or `s3://conn_id@bucket/…`, for its
            ledger, results.jsonl and report.json. Each task instance needs one: `…/{{ run_id }}`, with
            `{{ ti.map_index }}` if it is mapped. The template field and the attribute are called
            `output_folder`, since `output` is what every operator calls its XCom.
        endpoint: OpenAI's path (`/v1/chat/completions`, …) or the provider's own.
        prompt: Makes requests from a table, which is then the `input`: a CSV, TSV, JSONL or Parquet file, a
            DataFrame or dicts. A template like "Sum up: {text}", whose fields are columns and which is never
            Jinja, or a function of the row; see `anybatch.build_requests`.
        id_column: With `prompt`, the column that holds custom_ids, or a function of the row.
        system: With `prompt`, the system prompt of every request.
        body: With `prompt`, the other parameters of every request, e.g. `{"max_tokens": 200}`.
        model: With `prompt`, the model of every request; also for providers whose batches have one model as a
            whole.
        conn_id: Airflow connection, see `AnyBatchHook`. Default: `anybatch_default`; or none if `provider` is
            given, and then the provider's environment variables must be set.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        completion_window: How long the provider may take, in the provider's own words.
        metadata: Strings to put on every batch besides anybatch's own.
        options: The provider's own options for creating a batch.
        on_orphan: What to do if a batch may exist that cannot be looked up, or that the output folder does
            not record: "fail" stops and says what to look for; "resubmit" submits, and perhaps pays for both.
        on_changed: What to do if the input is not what was submitted before: "cancel_and_resubmit" replaces
            it, "fail" stops.
        on_untranslatable: What to do with a parameter that the provider does not have: "fail" names its line,
            "drop" leaves it out.
        on_lost: What to do if a batch, or its result file, is gone at the provider. "fail": the task fails,
            and names it. "land": what there is lands; the lost rows have the outcome `missing`. "resubmit":
            the lost rows are submitted, and paid for, once more. With "land" and "resubmit" the task still
            waits for the job's other batches, and then checks for 15 minutes that the batch is really gone.
        shard_requests: How many requests one batch may hold at most, below the provider's own limit; in force
            from the first submission on.
        keep_requests: How long the request lines of a `prompt` or a function stay in the output folder,
            prompts and all: "until_submitted", "until_landed" or "always". With the first, no later round can
            be submitted while the task waits.
        max_rounds: How often a row may be submitted. With 2 and more, rows that expired, went missing or
            failed in a way that may pass are submitted again. Rows of a batch that someone cancelled always
            are.
        on_partial: What to do if rows have no result after the last round. "keep": they land as they are, and
            `max_failed_ratio` decides. "fail": the task fails without a retry, once the results have landed.
        max_failed_ratio: Share of rows without a result above which the task fails, after the results have
            landed and without a retry. 0: every row must succeed. Default: the task fails if no row
            succeeded.
        price: USD for a million input tokens and for a million output tokens, for providers that do not
            report the cost.
        timeout: How long the batches of a round may take, counted from their creation, in seconds or as a
            timedelta. A retry does not start it anew: it looks once more, and takes the results if they are
            there.
        on_timeout: What to do with batches that are late. "leave": the task fails, the batches run on; a
            retry or a clear takes their results if they have ended by then. "cancel": the batches are
            cancelled, the task fails; the next attempt keeps the finished rows and submits the rest again.
            "land_partial": the batches are cancelled, and what they finished lands; the other rows have the
            outcome `cancelled`, and `on_partial` and `max_failed_ratio` decide.
        deferrable: False to hold the worker slot while waiting. None: deferred, unless the environment
            variable AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE is False.
        min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
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
        self.on_partial = checked_choice("on_partial", on_partial)
        self.max_failed_ratio = max_failed_ratio
        self.price = price
        self.timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.on_timeout = checked_choice("on_timeout", on_timeout)
        self.deferrable = waits_deferred(deferrable)
        self.min_defer_seconds = min_defer_seconds
        self.manifest: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit, or find what an earlier attempt submitted; wait; land."""
        with self._client_and_job(context) as (client, job):
            before = dict(context)
            job = replace(job, input=self._requests(context))
            self._check_earlier_attempts(context, client, job)
            standing = client.submit(job)  # this also runs a generator of requests to its end
            self._carried = Carried.of(self, self.source, context, before)
            return self._run_rounds(context, client, job, standing, time.time())

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume on a worker after the trigger's event."""
        from anybatch.jobs.policies import waiting_since

        self._carried = Carried.from_text((event or {}).get("then"))
        self._carried.restore(context)
        event = dict(check_event(event))
        with self._client_and_job(context) as (client, job):
            # The ledger records what was submitted, so the function that makes the input is not called again.
            job = self._with_recorded_input(job, event["batches"])
            began = waiting_since(event["status"] == "timeout", time.time())
            # A late batch may have ended since the trigger fired: resume() looks again.
            return self._run_rounds(context, client, job, client.resume(job), began)

    def on_kill(self) -> None:
        """Cancel the batches if the task instance is over; if it is not, leave them to the next attempt."""
        if self._guard is not None:
            self._guard.kill()

    @contextmanager
    def _client_and_job(self, context: Context) -> Iterator[tuple[Client, Job]]:
        """The client, and the job without its input."""
        with final_errors_skip_retries():
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

    def _run_rounds(
        self, context: Context, client: Client, job: Job, standing: Standing, began: float
    ) -> dict[str, Any]:
        """Wait, and submit further rounds, until the results have landed; return their manifest.

        Args:
            context: Airflow's context of the running task.
            client: The client of the task's account.
            job: The job.
            standing: How it stands.
            began: Unix seconds at which the waiting began, for batches without a time of their own.
        """
        from anybatch.jobs.policies import Move, deadlines_of, next_move

        timeout = self.timeout.total_seconds()
        while True:
            self._push_batches(context, client, job)
            now, running = time.time(), standing.running
            deadlines = deadlines_of(standing, timeout, began, outlasts_lost=self._outlasts_lost)
            match next_move(standing, deadlines, self.on_timeout, now):
                case Move.LAND:
                    return self._collect(context, client, job)
                case Move.WAIT:
                    self._wait(client, running, deadlines)
                case Move.LEAVE:
                    raise AirflowException(
                        f"{late_text(running, deadlines, now)}. The task gave up after {self.timeout} and "
                        "left the batches running. A retry or a clear takes their results if they have "
                        "ended by then; raise `timeout` to wait longer."
                    )
                case Move.CANCEL:
                    self._cancel(client, running, late_text(running, deadlines, now))
                case Move.STOP:
                    late = late_text(running, deadlines, now)
                    self.log.warning("%s; cancelling, as on_timeout='land_partial' says", late)
                    client.stop(job)
                case Move.GIVE_UP:
                    raise AirflowException(
                        f"cancelled, but not ended within an hour: {batches_in_words(running)}. A retry "
                        "lands what they have finished if they have ended by then."
                    )
            standing = client.resume(job)

    def _wait(self, client: Client, running: Sequence[Batch], deadlines: Mapping[str, float]) -> None:
        """Wait until all have ended or their deadlines have passed; to defer, this raises."""
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
            with suppress(DeadlineExceededError), self._log_lost_batch():
                client.wait(batch.id, deadline=deadlines[batch.id], on_progress=progress(self.log.info))

    @property
    def _outlasts_lost(self) -> bool:
        """Whether to wait on for the other batches when the provider does not know one of them.

        `Client.resume` then finds out whether it is really gone, and what becomes of its rows.
        """
        return self.on_lost != "fail"

    @contextmanager
    def _log_lost_batch(self) -> Iterator[None]:
        """Log a batch that the provider does not know, instead of failing, if `_outlasts_lost`."""
        from anybatch import NotFoundError
        from anybatch_airflow.triggers import LOST

        try:
            yield
        except NotFoundError as error:
            if not self._outlasts_lost:
                raise
            self.log.warning(LOST, error.batch_id, error)

    def _cancel(self, client: Client, running: Sequence[Batch], late: str) -> None:
        """Cancel the late batches and fail; return if all of them completed at the last moment."""
        from anybatch import AnyBatchError

        self.log.warning("%s; cancelling, as on_timeout='cancel' says", late)
        cancelled, problems = [], []
        for batch in running:
            try:
                cancelled.append(client.cancel(batch.id))
            except AnyBatchError as error:  # go on: one that is gone must not keep the others running
                problems.append(f"{batch.id} was not cancelled: {type(error).__name__}: {error}")
        if not problems and all(batch.status == "completed" for batch in cancelled):
            return
        cancels = [f"They were cancelled: {batches_in_words(cancelled)}"] if cancelled else []
        raise AirflowException(
            f"{'. '.join([late, *cancels, *problems])}. A retry or a clear keeps the finished rows and "
            "submits the rest again; raise `timeout` to wait longer."
        )

    def _collect(self, context: Context, client: Client, job: Job) -> dict[str, Any]:
        return land(self, context, client.collect(job), source=self.source)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For OpenLineage's listener, which calls this on the worker."""
        return openlineage_facets(self.source, self.manifest)

    # --- what is on record ---------------------------------------------------------------------------

    def _push_batches(self, context: Context, client: Client, job: Job) -> Ledger:
        """Push the ids and the links of the batches.

        Before each wait, so that a person and a later attempt find the batches whatever happens in it.
        """
        from anybatch_airflow.state_store import record_batch_ids

        ledger, ti = job.ledger(), task_instance(context)
        if ledger is None:
            raise _missing_ledger_error(job, ())
        ids = ledger.batch_ids
        ti.xcom_push(key="batch_ids", value=ids)
        push_links(ti, batches=self.hook().console_url(client, ids), results=job.output)
        record_batch_ids(context, ids)
        return ledger

    def _check_earlier_attempts(self, context: Context, client: Client, job: Job) -> None:
        """Before a retry submits: fail if an earlier attempt created batches that the output folder does not
        record.

        Raises:
            AirflowFailException: There are such batches.
            CreateOutcomeUnknownError: The provider's list of batches cannot be read to its end, so there may
                be.
            ConfigurationError: The folder is another job's.
        """
        from anybatch_airflow.state_store import batches_of_earlier_attempts, incomplete_list_error

        is_first = getattr(task_instance(context), "try_number", 1) == 1
        if _ledger_of(job) is not None or is_first or self.on_orphan == "resubmit":
            return
        found, is_whole = batches_of_earlier_attempts(client, context, job.identity)
        if found:
            known = (f"{batch.id} ({batch.status.value})" for batch in found)
            raise _missing_ledger_error(
                job,
                known,
                " If they are another Airflow deployment's, give each deployment a name by the "
                "option `[anybatch] deployment`.",
            )
        if not is_whole:
            raise incomplete_list_error(client.provider.name)

    def _with_recorded_input(self, job: Job, waited_for: Iterable[str]) -> Job:
        """The job with the path that its requests came from, opened by the connection that its URL names."""
        if (ledger := _ledger_of(job)) is None:
            raise _missing_ledger_error(job, waited_for)
        self.source = self.input if is_path(self.input) else ledger.input or self._carried.source
        return job if ledger.input is None else replace(job, input=location(ledger.input))


def _ledger_of(job: Job) -> Ledger | None:
    """The job's ledger; None if there is none.

    Raises:
        ConfigurationError: The folder is another job's.
    """
    from anybatch import ConfigurationError

    ledger = job.ledger()
    if ledger is not None and ledger.job != job.identity:
        raise ConfigurationError(
            f"{job.folder.path} holds job {ledger.job!r}; job {job.identity!r} needs a folder of its own: "
            "give this task another `output`"
        )
    return ledger


def _missing_ledger_error(job: Job, batches: Iterable[str], more: str = "") -> AirflowFailException:
    """For a job whose batches are known, but whose ledger is gone.

    The task fails without a retry, which would create the batches again, and pay again.
    """
    known = ", ".join(batches)
    return AirflowFailException(
        f"{job.folder.path} has no record of this task's batches{known and f', {known}'}. Either it was "
        "removed, or the folder is on a disk that only one worker or pod sees: put `output` into an object "
        "store or on a shared disk. The batches were left as they are: AnyBatchResultsOperator lands what "
        "they have finished. To submit all rows again, and pay again, cancel them, or set "
        f"on_orphan='resubmit'.{more}"
    )
