"""Submitting requests as batches, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.providers.common.compat.sdk import BaseOperator

from anybatch_airflow.account import OnAccount, final_errors, job_id, task_instance
from anybatch_airflow.inputs import InputField, is_path, read_input, requests_from
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.policies import told_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client, Job
    from anybatch_airflow.inputs import Prompt, Requests
    from anybatch_airflow.taskstate import TaskStateFolder


class AnyBatchCreateOperator(OnAccount, BaseOperator):
    """Submits requests as batches and returns their ids, a list even of one; does not wait.

    For DAGs whose waiting or whose results are someone else's; `AnyBatchSensor` waits for the ids and
    `AnyBatchResultsOperator` lands them. A retry or a clear creates nothing twice: on Airflow 3.3 what was
    submitted is on record in the task state store; before, the provider is asked for batches that carry the
    marks of this task instance, and other input of the same size is not noticed. Only a batch that was
    cancelled is created anew, as a whole; `AnyBatchOperator` keeps its finished rows.

    :param input: As on `AnyBatchOperator`.
    :param endpoint: As on `AnyBatchOperator`.
    :param prompt: As on `AnyBatchOperator`, and so are `id_column`, `system`, `body` and `model`.
    :param conn_id: Airflow connection; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param completion_window: What to ask of the provider.
    :param metadata: Strings to put on every batch beside anybatch's own.
    :param options: The provider's own create options.
    :param on_orphan: "fail" or "resubmit", where a batch may have been created but cannot be looked up.
    :param on_changed: "cancel_and_resubmit" or "fail", where the input is not what it was.
    :param on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
    """

    template_fields: Collection[str] = (
        "input",
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
    operator_extra_links = (BatchLink(),)
    ui_color = "#e8eefc"
    input = InputField()

    def __init__(
        self,
        *,
        input: Requests,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input = input
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

    def execute(self, context: Context) -> list[str]:
        """Submit, or find what an earlier attempt submitted."""
        from anybatch_airflow.taskstate import forget_dead

        ti = task_instance(context)
        with (
            final_errors(),
            self.hook().get_client() as client,
            tempfile.TemporaryDirectory(prefix="anybatch-") as scratch,
        ):
            found: list[Batch] = []
            folder = self._folder(context, client, Path(scratch), found)
            forget_dead(client, folder)
            batches = client.submit(self._job(context, folder))
            ids = [batch.id for batch in batches]
            for batch in found:  # doubles, and those of an input that was split otherwise
                if batch.id not in ids and not batch.status.is_terminal:
                    self.log.warning("cancelling batch %s, which an earlier attempt has left", batch.id)
                    client.cancel(batch.id)
            push_links(ti, batches=self.hook().console_url(client, ids))
        self.log.info("%s", told_batches(batches))
        return ids

    def _folder(self, context: Context, client: Client, scratch: Path, found: list[Batch]) -> TaskStateFolder:
        """The record of what was submitted; where it knows nothing, `found` gets what the provider knows."""
        from anybatch_airflow.taskstate import NoStore, TaskStateFolder, blind, find_batches

        ti, store = task_instance(context), context.get("task_state_store")
        provider = client.provider

        def look() -> list[Batch]:
            if ti.try_number == 1:  # there was no attempt before
                return []
            if provider.can_find and provider.metadata_limits is not None:
                run = context.get("dag_run")
                since = run.run_after.timestamp() if run else 0.0
                found.extend(find_batches(client, job_id(ti), since))
            elif store is None and self.on_orphan == "fail":
                raise blind(provider, ti.try_number)
            return found

        return TaskStateFolder(scratch, NoStore() if store is None else store, look)

    def _job(self, context: Context, folder: TaskStateFolder) -> Job:
        from anybatch import Job

        requests = requests_from(
            read_input(self.input, context),
            prompt=self.prompt,
            id_column=self.id_column,
            model=self.model,
            endpoint=self.endpoint,
            system=self.system,
            body=self.body,
        )
        return Job(
            input=requests,
            output=folder,
            id=job_id(task_instance(context)),
            endpoint=self.endpoint,
            model=self.model,
            completion_window=self.completion_window,
            metadata=dict(self.metadata or {}),
            options=dict(self.options or {}),
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
        )

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """What OpenLineage is told; Airflow's listener calls this on the worker."""
        return openlineage_facets(self.input if is_path(self.input) else None, None)
