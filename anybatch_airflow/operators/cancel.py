"""AnyBatchCancelOperator: cancels batches that any task or system created."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, BaseOperator

from anybatch_airflow.base import (
    HasAccount,
    check_event,
    final_errors_skip_retries,
    task_instance,
    waits_deferred,
)
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.reporting import CANCEL_TIME, batches_in_words, facts_by_batch, utc

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client
    from anybatch_airflow.inputs import BatchIds


class AnyBatchCancelOperator(HasAccount, BaseOperator):
    """Cancels batches; returns `{id: {"status", "total", "completed", "failed"}}`.

    Finished rows stay available, and are paid for. A batch that has already ended is left as it is, so the
    task can be repeated.

    Args:
        batch_id: One id or several; the XCom of another task, or a template.
        conn_id: Airflow connection; may be left out if `provider` is given.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        wait_for_end: True to wait until the batches have ended, which takes some providers minutes.
        timeout: How long to wait for that, in seconds or as a timedelta.
        deferrable: False to hold the worker slot while waiting. None: deferred, unless the environment
            variable AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE is False.
        min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
    """

    template_fields: Collection[str] = ("batch_id", "conn_id", "provider", "api_base")
    operator_extra_links = (BatchLink(),)
    ui_color = "#e8eefc"

    def __init__(
        self,
        *,
        batch_id: BatchIds,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        wait_for_end: bool = False,
        timeout: float | timedelta = CANCEL_TIME,
        deferrable: bool | None = None,
        min_defer_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.wait_for_end = wait_for_end
        self.timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        self.deferrable = waits_deferred(deferrable)
        self.min_defer_seconds = min_defer_seconds

    def execute(self, context: Context) -> dict[str, Any]:
        """Cancel all batches, then wait if `wait_for_end` is set."""
        with final_errors_skip_retries(), self.hook().get_client() as client:
            ids = batch_ids(self.batch_id)
            push_links(task_instance(context), batches=self.hook().console_url(client, ids))
            batches = self._cancel(client, ids)
            self.log.info("%s", batches_in_words(batches))
            running = [batch for batch in batches if not batch.status.is_terminal]
            if self.wait_for_end and running:
                batches = self._wait(client, batches, running)
        return facts_by_batch(batches)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the wait."""
        from anybatch_airflow.triggers import TIMEOUT

        event = dict(check_event(event))
        if event["status"] == TIMEOUT:
            raise AirflowException(
                f"the provider was asked to cancel, but {event['message']}; raise `timeout` to wait longer"
            )
        return dict(event["batches"])

    def _cancel(self, client: Client, ids: Sequence[str]) -> list[Batch]:
        """Cancel all; one that cannot be cancelled does not keep the others from it."""
        from anybatch import AnyBatchError

        batches, problems = [], []
        for batch_id in ids:
            try:
                batches.append(client.cancel(batch_id))
            except AnyBatchError as error:
                problems.append(f"{type(error).__name__}: {error}")
        if problems:
            raise AirflowException(
                f"{len(problems)} of {len(ids)} batches were not cancelled: {'; '.join(problems)}"
            )
        return batches

    def _wait(self, client: Client, batches: Sequence[Batch], running: Sequence[Batch]) -> list[Batch]:
        deadline = time.time() + self.timeout.total_seconds()
        self.log.info(
            "waiting until %d batches have ended, until %s at the latest", len(running), utc(deadline)
        )
        if self.deferrable:
            created = {batch.id: batch.created_at for batch in batches}
            deadlines = dict.fromkeys(created, deadline)
            self.defer(
                trigger=self.trigger(created, deadlines, cancel_on_kill=False),
                method_name="execute_complete",
            )
        return [client.wait(batch.id, deadline=deadline) for batch in batches]
