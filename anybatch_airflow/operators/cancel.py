"""Cancelling batches, whoever created them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, BaseOperator

from anybatch_airflow.account import OnAccount, checked, final_errors, task_instance, waits_deferred
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.policies import CANCEL_TIME, batches_in_words, described, utc

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client
    from anybatch_airflow.inputs import BatchIds


class AnyBatchCancelOperator(OnAccount, BaseOperator):
    """Cancels batches; rows that are finished stay available, and are paid for.

    One that has ended already is left as it is, so the task can be repeated. Returns
    `{id: {"status", "total", "completed", "failed"}}`.

    :param batch_id: One id or several; the XCom of another task, or a template.
    :param conn_id: Airflow connection; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param wait_for_end: Also wait until the batches have ended: some providers take minutes for it.
    :param timeout: How long to wait for that, in seconds or as a timedelta.
    :param deferrable: False to hold the worker slot while waiting. None: deferred, unless the environment
        variable AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE is False.
    :param min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
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
        """Cancel all, then wait if asked to."""
        with final_errors(), self.hook().get_client() as client:
            ids = batch_ids(self.batch_id)
            push_links(task_instance(context), batches=self.hook().console_url(client, ids))
            batches = self._cancel(client, ids)
            self.log.info("%s", batches_in_words(batches))
            running = [batch for batch in batches if not batch.status.is_terminal]
            if self.wait_for_end and running:
                batches = self._wait(client, batches, running)
        return described(batches)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the wait."""
        from anybatch_airflow.triggers import TIMEOUT

        told = checked(event)
        if told["status"] == TIMEOUT:
            raise AirflowException(f"cancelled, but {told['message']}")
        return dict(told["batches"])

    def _cancel(self, client: Client, ids: Sequence[str]) -> list[Batch]:
        """One that cannot be cancelled keeps none of the others."""
        from anybatch import AnyBatchError

        batches, problems = [], []
        for batch_id in ids:
            try:
                batches.append(client.cancel(batch_id))
            except AnyBatchError as error:
                problems.append(f"{type(error).__name__}: {error}")
        if problems:
            raise AirflowException(f"{len(problems)} of {len(ids)} not cancelled: {'; '.join(problems)}")
        return batches

    def _wait(self, client: Client, batches: Sequence[Batch], running: Sequence[Batch]) -> list[Batch]:
        deadline = time.time() + self.timeout.total_seconds()
        self.log.info("waiting for the end of %d until %s at the latest", len(running), utc(deadline))
        if self.deferrable:
            created = {batch.id: batch.created_at for batch in batches}
            deadlines = dict.fromkeys(created, deadline)
            self.defer(
                trigger=self.trigger(created, deadlines, cancel_on_kill=False),
                method_name="execute_complete",
            )
        return [client.wait(batch.id, deadline=deadline) for batch in batches]
