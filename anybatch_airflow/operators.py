"""A job end to end as one Airflow task."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, BaseOperator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from typing import Literal, TypeAlias

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client, Job, Report
    from anybatch_airflow.hooks import AnyBatchHook

    Requests: TypeAlias = "str | os.PathLike[str] | Iterable[dict[str, Any]] | Callable[..., Any]"

# What a provider may need, beyond its completion window, to write the files of a batch that ended.
_GRACE = timedelta(hours=2)
_DEFAULT_TIMEOUT = timedelta(hours=24) + _GRACE


class AnyBatchOperator(BaseOperator):
    """Submits requests as batches, waits without a worker slot, lands the results, returns a manifest.

    The job's identity is dag, task, run and map index: a retry, a clear and a second copy of the task find
    the batches of the first attempt and pay for nothing twice. The manifest (XCom `return_value`) holds
    `results` (URI of results.jsonl), `rows`, `counts` per outcome, tokens, `cost` in USD where known,
    `batch_ids` and `duration_s`. The ids are also pushed on their own, as `batch_ids`, before the wait.

    :param input: Where the requests are: a path or object-store URL of a JSONL file (templated), an
        iterable of request dicts, the XCom of another task, or a function that returns any of these; the
        function may take context variables by name, as with PythonOperator. Requests themselves are never
        rendered, as text in a prompt must not be run as a template, nor stored in the metadata database;
        `.expand(input=…)` does store its literals there, so map over paths.
    :param output_folder: A folder of the job's own, local or `s3://conn_id@bucket/…`, for results.jsonl and
        report.json: one per task instance, `…/{{ run_id }}`, with `{{ ti.map_index }}` if it is mapped.
    :param endpoint: OpenAI's path (`/v1/chat/completions`, …) or the provider's own.
    :param conn_id: Airflow connection, see `AnyBatchHook`. Default: `anybatch_default`, or none at all if
        `provider` is given, and then the provider's environment variables must be set.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param model: For providers whose batches have one model as a whole.
    :param completion_window: What to ask of the provider.
    :param metadata: Strings to put on every batch beside anybatch's own.
    :param options: The provider's own create options.
    :param on_orphan: "fail" or "resubmit", where a batch may have been created but cannot be looked up.
    :param on_changed: "cancel_and_resubmit" or "fail", where the input is not what it was.
    :param on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
    :param max_failed_ratio: Share of rows without a result above which the task fails, after the results
        have landed and without a retry. 0: every row must succeed. Default: fails if no row succeeded.
    :param timeout: How long the batches may take from their creation on, in seconds or as a timedelta. A
        retry does not start it anew: it looks once more and takes the results if they are there.
    :param deferrable: False to hold the worker slot while waiting.
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
    template_fields_renderers = {"metadata": "json", "options": "json"}  # noqa: RUF012  as in BaseOperator
    ui_color = "#e8eefc"

    def __init__(
        self,
        *,
        input: Requests,
        output_folder: str | os.PathLike[str],
        endpoint: str = "/v1/chat/completions",
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        model: str | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        on_orphan: Literal["fail", "resubmit"] = "fail",
        on_changed: Literal["cancel_and_resubmit", "fail"] = "cancel_and_resubmit",
        on_untranslatable: Literal["fail", "drop"] = "fail",
        max_failed_ratio: float | None = None,
        timeout: float | timedelta = _DEFAULT_TIMEOUT,
        deferrable: bool = True,
        min_defer_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input = input
        self.output_folder = output_folder
        self.endpoint = endpoint
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.model = model
        self.completion_window = completion_window
        self.metadata = metadata
        self.options = options
        self.on_orphan: Literal["fail", "resubmit"] = on_orphan
        self.on_changed: Literal["cancel_and_resubmit", "fail"] = on_changed
        self.on_untranslatable: Literal["fail", "drop"] = on_untranslatable
        self.max_failed_ratio = max_failed_ratio
        self.timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.deferrable = deferrable
        self.min_defer_seconds = min_defer_seconds

    @property
    def input(self) -> Any:
        """The path as given; requests in a wrapper that neither Jinja nor the metadata database sees into."""
        return self._input

    @input.setter
    def input(self, value: Any) -> None:
        # Every way in passes here: the constructor, the rendering of a template, the resolving of an XCom.
        is_shown = isinstance(value, Hidden) or _is_path(value) or hasattr(value, "resolve")  # an XComArg
        self._input = value if is_shown else Hidden(value)

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit, or find what an earlier attempt submitted; wait; land."""
        with _final_errors(), self._hook().get_client() as client:
            job = self._job(context, _requests(self.input, context))
            batches = client.submit(job)
            if batches:  # none where the results have landed already
                # Now, so that whatever happens later, a person can find the batches at the provider.
                _task_instance(context).xcom_push(key="batch_ids", value=[batch.id for batch in batches])
            self._wait(client, batches)
            return self._land(client.collect(job))

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the trigger's event, on a worker again."""
        from anybatch_airflow.triggers import ENDED, TIMEOUT

        if not event or "status" not in event:
            raise AirflowException(f"the trigger sent no event that this version understands: {event!r}")
        if event["status"] == TIMEOUT:
            raise AirflowException(f"{event['message']}. {self._advice()}")
        if event["status"] != ENDED:
            raise AirflowException(event["message"])
        with _final_errors(), self._hook().get_client() as client:
            # What was submitted is on record: the input is not read, or made, a second time.
            return self._land(client.collect(self._job(context, ())))

    # There is no on_kill: a worker that is stopped cannot tell a clear from an end, and a batch left
    # running is found again by the next attempt, while a cancelled one is money lost.

    def _wait(self, client: Client, batches: Sequence[Batch]) -> None:
        """Return once all have ended; defers if it may."""
        running = [batch for batch in batches if not batch.status.is_terminal]
        if not running:
            return
        now = time.time()
        deadline = min(batch.created_at or now for batch in batches) + self.timeout.total_seconds()
        if deadline <= now:
            late = ", ".join(f"{batch.id} is {batch.status.value}" for batch in running)
            raise AirflowException(f"not ended at the deadline ({_utc(deadline)}): {late}. {self._advice()}")
        told = ", ".join(batch.id for batch in running)
        self.log.info("waiting for %s until %s at the latest", told, _utc(deadline))
        if self.deferrable:
            self._defer(running, deadline, now)
        for batch in running:
            client.wait(batch.id, deadline=deadline)

    def _defer(self, running: Sequence[Batch], deadline: float, now: float) -> None:
        from anybatch_airflow.triggers import AnyBatchTrigger

        self.defer(
            trigger=AnyBatchTrigger(
                batches={batch.id: batch.created_at for batch in running},
                conn_id=self._conn_id(),
                provider=self.provider,
                api_base=self.api_base,
                deadline=deadline,
                deferred_at=now,
                min_defer_seconds=self.min_defer_seconds,
            ),
            method_name="execute_complete",
        )

    def _land(self, report: Report) -> dict[str, Any]:
        manifest = manifest_of(report)
        told = ", ".join(f"{count} {outcome}" for outcome, count in manifest["counts"].items() if count)
        self.log.info("%d rows: %s; results in %s", report.rows, told or "none", report.results)
        if problem := too_many_failed(report, self.max_failed_ratio):
            # The results are final: a retry would read the same report.
            raise AirflowFailException(f"{problem}; results in {report.results}")
        return manifest

    def _job(self, context: Context, requests: Any) -> Job:
        from anybatch import Job

        return Job(
            input=requests,
            output=_location(self.output_folder),
            id=job_id(_task_instance(context)),
            endpoint=self.endpoint,
            model=self.model,
            completion_window=self.completion_window,
            metadata=dict(self.metadata or {}),
            options=dict(self.options or {}),
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
        )

    def _hook(self) -> AnyBatchHook:
        from anybatch_airflow.hooks import AnyBatchHook

        return AnyBatchHook(self._conn_id(), provider=self.provider, api_base=self.api_base)

    def _conn_id(self) -> str | None:
        return self.conn_id or (None if self.provider else "anybatch_default")

    def _advice(self) -> str:
        return (
            f"After {self.timeout} the task gave up, the batches were left running. A retry or a clear takes "
            "their results if they have ended by then; raise `timeout` to wait longer."
        )


class Hidden:
    """Requests, or a function that makes them, in a form that Airflow can neither render nor store."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        # Goes into the serialized DAG and the rendered fields: no content, no memory address.
        if callable(self.value):
            return f"<{getattr(self.value, '__qualname__', type(self.value).__qualname__)}()>"
        try:
            return f"<{len(self.value)} requests>"
        except TypeError:
            return "<requests>"


def job_id(ti: Any) -> str:
    """The identity of a task instance's job, the same for each of its attempts."""
    parts = [ti.dag_id, ti.task_id, ti.run_id] + ([str(ti.map_index)] if ti.map_index >= 0 else [])
    return "airflow:" + "/".join(parts)


def manifest_of(report: Report) -> dict[str, Any]:
    """The small account of a job that goes into XCom."""
    return {
        "job": report.job,
        "provider": report.provider,
        "endpoint": report.endpoint,
        "models": list(report.models),
        "results": report.results,
        "rows": report.rows,
        "counts": {outcome.value: count for outcome, count in report.counts.items()},
        "input_tokens": report.usage.input_tokens,
        "output_tokens": report.usage.output_tokens,
        "cost": report.cost,
        "batch_ids": [batch.id for batch in report.batches],
        "duration_s": round(report.duration_s, 3),
    }


def too_many_failed(report: Report, max_failed_ratio: float | None) -> str | None:
    """Why the task should fail, None if it should not; an input without rows never fails."""
    succeeded = sum(count for outcome, count in report.counts.items() if outcome.value == "succeeded")
    failed = report.rows - succeeded
    if not failed:
        return None
    if max_failed_ratio is None:
        return None if succeeded else f"none of {report.rows} rows succeeded"
    if failed / report.rows <= max_failed_ratio:
        return None
    return f"{failed} of {report.rows} rows have no result; max_failed_ratio={max_failed_ratio} was exceeded"


@contextmanager
def _final_errors() -> Iterator[None]:
    """Errors that a retry cannot cure fail the task at once; a person has to change something first."""
    from anybatch import ConfigurationError, InputChangedError, InputError, OrphanError

    try:
        yield
    except (ConfigurationError, InputError, InputChangedError, OrphanError) as error:
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error


def _task_instance(context: Context) -> Any:
    return context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]  there is one in every task


def _requests(value: Any, context: Context) -> Any:
    """What `anybatch.Job` takes as input."""
    if isinstance(value, Hidden):
        value = value.value
    if callable(value):
        from airflow.providers.common.compat.sdk import determine_kwargs

        value = value(**determine_kwargs(value, [], context))
    return _location(value) if _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) or hasattr(value, "__fspath__") or hasattr(value, "fs")


def _location(value: Any) -> Any:
    """A local path, or one on an object store with the Airflow connection that its URL names."""
    if not isinstance(value, str):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    from airflow.sdk.io import has_fs

    if "@" not in rest.partition("/")[0] and not has_fs(scheme):
        return value  # a store that fsspec knows and no Airflow provider does
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    return ObjectStoragePath(value)


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
