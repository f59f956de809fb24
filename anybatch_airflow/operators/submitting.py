"""The base class of the operators that submit requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import BaseOperator

from anybatch_airflow.base import HasAccount, job_id, task_instance
from anybatch_airflow.inputs import Hidden, InputField, is_path, is_shown, read_input, requests_from

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Job
    from anybatch.jobs.options import OnChanged, OnOrphan, OnUntranslatable
    from anybatch_airflow.inputs import IdColumn, Prompt, Requests


class SubmittingOperator(HasAccount, BaseOperator):
    """The options that say what to submit, to whom and how; `AnyBatchOperator` documents them."""

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
    ui_color = "#e8eefc"
    input = InputField()
    source: Any = None  # the path that the requests came from, for lineage; None if they came from memory

    def __init__(
        self,
        *,
        input: Requests,
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
        self.on_orphan: OnOrphan = on_orphan
        self.on_changed: OnChanged = on_changed
        self.on_untranslatable: OnUntranslatable = on_untranslatable

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """As on any operator, but keeps requests given here out of the serialized DAG."""
        if "input" in kwargs and not is_shown(kwargs["input"]):
            kwargs["input"] = Hidden(kwargs["input"])
        return super().partial(**kwargs)

    def _requests(self, context: Context) -> Any:
        """What `Job` takes as input: a path, or requests."""
        value = read_input(self.input, context)
        self.source = value if is_path(value) else None
        return requests_from(
            value,
            prompt=self.prompt,
            id_column=self.id_column,
            model=self.model,
            endpoint=self.endpoint,
            system=self.system,
            body=self.body,
        )

    def _job(self, context: Context, requests: Any, output: Any, **more: Any) -> Job:
        from anybatch import Job

        return Job(
            input=requests,
            output=output,
            id=job_id(task_instance(context)),
            endpoint=self.endpoint,
            model=self.model,
            completion_window=self.completion_window,
            metadata=dict(self.metadata or {}),
            options=dict(self.options or {}),
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
            **more,
        )
