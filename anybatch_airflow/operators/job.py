"""A job end to end as one Airflow task."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.providers.common.compat.sdk import AirflowException, BaseOperator

from anybatch_airflow.account import (
    OnAccount,
    checked,
    final_errors,
    job_id,
    task_instance,
    waits_deferred,
)
from anybatch_airflow.inputs import InputField, is_path, location, plain, read_input, requests_from
from anybatch_airflow.landing import land
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, ResultsLink, push_links
from anybatch_airflow.policies import (
    CANCEL_TIME,
    DEFAULT_TIMEOUT,
    deadline_of,
    is_left_to_land,
    one_of,
    told_batches,
    utc,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client, Job
    from anybatch_airflow.inputs import Prompt, Requests
    from anybatch_airflow.policies import OnPartial, OnTimeout

# What a task does after a wait; the trigger's event brings it back.
_RESUME = "resume"
_LAND = "land"


class AnyBatchOperator(OnAccount, BaseOperator):
    """Submits requests as batches, waits without a worker slot, lands the results, returns a manifest.

    The job's identity is dag, task, run and map index: a retry, a clear and a second copy of the task find
    the batches of the first attempt and pay for nothing twice. The manifest (XCom `return_value`) holds
    `results` (URI of results.jsonl), `rows`, `counts` per outcome, tokens, `cost` in USD where known,
    `rounds`, `batch_ids`, `batches` (id, shard, round, rows, status) and `duration_s`. The ids are also
    pushed on their own, as `batch_ids`, before each wait.

    While the task waits, to mark it failed or succeeded cancels the batches (Airflow 3.3; before, they run
    on), and to clear it does not: the new attempt waits for the same ones.

    Use `timeout` here and not `execution_timeout`. Airflow applies that to each stretch on a worker and not
    to a deferred wait. Where it strikes, the batches run on, and a retry or a clear finds them again, but
    none of what `on_timeout` says is done.

    :param input: Where the requests are: a path or object-store URL of a JSONL file (templated), an
        iterable of request dicts, the XCom of another task, or a function that returns any of these; the
        function may take context variables by name, as with PythonOperator. With `prompt` it is a table
        instead. Requests themselves are never rendered, as text in a prompt must not be run as a template,
        nor stored in the metadata database; `.expand(input=…)` does store its literals there, so map over
        paths.
    :param output_folder: A folder of the job's own, local or `s3://conn_id@bucket/…`, for results.jsonl and
        report.json: one per task instance, `…/{{ run_id }}`, with `{{ ti.map_index }}` if it is mapped.
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
    :param on_orphan: "fail" or "resubmit", where a batch may have been created but cannot be looked up.
    :param on_changed: "cancel_and_resubmit" or "fail", where the input is not what it was.
    :param on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
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

    template_fields: Collection[str] = (
        "input",
        "output_folder",
        "endpoint",
        "conn_id",
        "provider",
        "api_base",
        "model",
        "completion_window",
        "metadata",
        "options",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"metadata": "json", "options": "json"}
    operator_extra_links = (BatchLink(), ResultsLink())
    ui_color = "#e8eefc"
    input = InputField()

    def __init__(
        self,
        *,
        input: Requests,
        output_folder: str | os.PathLike[str],
        endpoint: str = "/v1/chat/completions",
        prompt: Prompt | None = None,
        id_column: str | Callable[[dict[str, Any]], object] | None = None,
        system: str | None = None,
        body: Mapping[str, Any] | None = None,
        model: str | None = None,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        on_orphan: Literal["fail", "resubmit"] = "fail",
        on_changed: Literal["cancel_and_resubmit", "fail"] = "cancel_and_resubmit",
        on_untranslatable: Literal["fail", "drop"] = "fail",
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
        super().__init__(**kwargs)
        self.input = input
        self.output_folder = plain(output_folder)
        self.endpoint = endpoint
        self.prompt = prompt
        self.id_column = id_column
        self.system = system
        self.body = body
        self.model = model
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.completion_window = completion_window
        self.metadata = metadata
        self.options = options
        self.on_orphan: Literal["fail", "resubmit"] = on_orphan
        self.on_changed: Literal["cancel_and_resubmit", "fail"] = on_changed
        self.on_untranslatable: Literal["fail", "drop"] = on_untranslatable
        self.max_rounds = max_rounds
        self.on_partial = one_of("on_partial", on_partial, "keep", "fail")
        self.max_failed_ratio = max_failed_ratio
        self.price = price
        self.timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.on_timeout = one_of("on_timeout", on_timeout, "leave", "cancel", "land_partial")
        self.deferrable = waits_deferred(deferrable)
        self.min_defer_seconds = min_defer_seconds
        self.manifest: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit, or find what an earlier attempt submitted; wait; land."""
        with final_errors(), self.hook().get_client() as client:
            job = self._job(context, self._requests(context))
            if batches := self._left_to_land(client, job):
                self._end(client, batches)
                return self._collect(context, client, job)
            return self._go_on(context, client, job, client.submit(job))

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the trigger's event, on a worker again."""
        then = checked(event).get("then")
        with final_errors(), self.hook().get_client() as client:
            # What was submitted is on record: the input is not made a second time.
            job = self._recorded(self._job(context, ()))
            if then == _LAND:
                return self._collect(context, client, job)
            # A batch that was late for the trigger is looked at again: it may have ended by now.
            return self._go_on(context, client, job, client.resume(job))

    # There is no on_kill: a worker that is stopped cannot tell a clear from an end, and a batch left
    # running is found again by the next attempt, while a cancelled one is money lost.

    def _go_on(self, context: Context, client: Client, job: Job, batches: Sequence[Batch]) -> dict[str, Any]:
        """Round by round, until there is nothing left to wait for."""
        while True:
            self._publish(context, client, job)
            running = [batch for batch in batches if not batch.status.is_terminal]
            if not running or self._wait(client, running) == _LAND:
                return self._collect(context, client, job)
            batches = client.resume(job)

    def _publish(self, context: Context, client: Client, job: Job) -> None:
        """Now, so that whatever happens later, a person can find the batches at the provider."""
        ledger, ti = job.ledger(), task_instance(context)
        ids = ledger.batch_ids if ledger else []
        ti.xcom_push(key="batch_ids", value=ids)
        push_links(ti, batches=self.hook().console_url(client, ids), results=job.output)

    # --- waiting -------------------------------------------------------------------------------------

    def _wait(self, client: Client, running: Sequence[Batch]) -> str:
        """Return what comes next once all have ended; defers if it may."""
        now = time.time()
        deadlines = {batch.id: deadline_of(batch, self.timeout, now) for batch in running}
        late = [batch for batch in running if deadlines[batch.id] <= now]
        if not late:
            latest = utc(max(deadlines.values()))
            self.log.info("waiting until %s at the latest: %s", latest, told_batches(running))
            late = self._wait_for(client, running, deadlines, then=_RESUME)
        if not late:
            return _RESUME
        problem = f"not ended at the deadline ({utc(min(deadlines.values()))}): {told_batches(late)}"
        if self.on_timeout == "leave":
            raise AirflowException(
                f"{problem}. After {self.timeout} the task gave up, the batches were left running. A retry "
                "or a clear takes their results if they have ended by then; raise `timeout` to wait longer."
            )
        self.log.warning("%s; cancelling, as on_timeout=%r says", problem, self.on_timeout)
        cancelled = [client.cancel(batch.id) for batch in running]
        if all(batch.status == "completed" for batch in cancelled):  # at the last moment
            return _RESUME
        if self.on_timeout == "cancel":
            raise AirflowException(
                f"{problem}. They were cancelled: {told_batches(cancelled)}. A retry or a clear keeps the "
                "rows that are finished and submits the rest again; raise `timeout` to wait longer."
            )
        self._end(client, cancelled)
        return _LAND

    def _end(self, client: Client, cancelled: Sequence[Batch]) -> None:
        """Wait for batches that are being cancelled, to land what they finished; defers if it may."""
        running = [batch for batch in cancelled if not batch.status.is_terminal]
        deadlines = dict.fromkeys([batch.id for batch in running], time.time() + CANCEL_TIME)
        if late := self._wait_for(client, running, deadlines, then=_LAND):
            raise AirflowException(
                f"cancelled and not ended within an hour: {told_batches(late)}. A retry lands what they have "
                "finished if they have ended by then."
            )

    def _wait_for(
        self, client: Client, running: Sequence[Batch], deadlines: Mapping[str, float], then: str
    ) -> list[Batch]:
        """The batches that did not end in time. Deferred there is no return: the event tells `then`."""
        from anybatch import DeadlineExceededError
        from anybatch_airflow.triggers import progress

        if running and self.deferrable:
            created = {batch.id: batch.created_at for batch in running}
            self.defer(trigger=self.trigger(created, deadlines, then=then), method_name="execute_complete")
        late = []
        for batch in running:
            try:
                client.wait(batch.id, deadline=deadlines[batch.id], on_progress=progress(self.log.info))
            except DeadlineExceededError:
                late.append(batch)
        return late

    def _left_to_land(self, client: Client, job: Job) -> Sequence[Batch]:
        """The batches that an earlier attempt cancelled at their deadline, and did not live to land."""
        if self.on_timeout != "land_partial" or (ledger := job.ledger()) is None or ledger.landed_at:
            return ()
        batches = [client.retrieve(batch_id) for record in ledger.current if (batch_id := record.batch_id)]
        return batches if is_left_to_land(batches, self.timeout, time.time()) else ()

    # --- landing -------------------------------------------------------------------------------------

    def _collect(self, context: Context, client: Client, job: Job) -> dict[str, Any]:
        return land(self, context, client.collect(job), source=self.input if is_path(self.input) else None)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """What OpenLineage is told; Airflow's listener calls this on the worker."""
        return openlineage_facets(self.input, self.manifest)

    def _recorded(self, job: Job) -> Job:
        """The job with the path its requests came from, opened by the connection its URL names."""
        ledger = job.ledger()
        return job if ledger is None or ledger.input is None else replace(job, input=location(ledger.input))

    def _requests(self, context: Context) -> Any:
        return requests_from(
            read_input(self.input, context),
            prompt=self.prompt,
            id_column=self.id_column,
            model=self.model,
            endpoint=self.endpoint,
            system=self.system,
            body=self.body,
        )

    def _job(self, context: Context, requests: Any) -> Job:
        from anybatch import Job

        return Job(
            input=requests,
            output=location(self.output_folder),
            id=job_id(task_instance(context)),
            endpoint=self.endpoint,
            model=self.model,
            completion_window=self.completion_window,
            metadata=dict(self.metadata or {}),
            options=dict(self.options or {}),
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
            max_rounds=self.max_rounds,
            price=self.price,
        )
