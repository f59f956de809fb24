"""Waiting for batches that something else created."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch


class AnyBatchSensor(BaseSensorOperator):
    """Succeeds when all the batches have ended; pushes `{id: {"status", "total", "completed", "failed"}}`.

    The batches are looked at once on the worker; if any still runs, the task defers and holds no slot.

    :param batch_id: One id or several.
    :param conn_id: Airflow connection; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param accept: The statuses that count as success; any other end fails the task without a retry.
    :param deferrable: False to hold the worker slot and poke every `poke_interval`.
    :param min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
    """

    template_fields: Collection[str] = ("batch_id", "conn_id", "provider", "api_base")

    def __init__(
        self,
        *,
        batch_id: str | Sequence[str],
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        accept: Iterable[str] = ("completed",),
        deferrable: bool = True,
        min_defer_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.accept = tuple(accept)
        self.deferrable = deferrable
        self.min_defer_seconds = min_defer_seconds

    def execute(self, context: Context) -> Any:
        """Look once; return if all have ended, else defer, or poke where `deferrable` is off."""
        if not self.deferrable:
            return super().execute(context)
        batches = self._retrieve()
        if not all(batch.status.is_terminal for batch in batches):
            return self._defer(batches)
        try:
            return self._accepted(_described(batches))
        except AirflowFailException as error:
            if self.soft_fail:  # as the base class does for a poke and for a resumed task
                raise AirflowSkipException("skipped, as soft_fail asks") from error
            raise

    def poke(self, context: Context) -> PokeReturnValue:
        """One look at all batches."""
        batches = self._retrieve()
        if not all(batch.status.is_terminal for batch in batches):
            return PokeReturnValue(is_done=False)
        return PokeReturnValue(is_done=True, xcom_value=self._accepted(_described(batches)))

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """Resume after the trigger's event."""
        from anybatch_airflow.triggers import ENDED, TIMEOUT

        if not event or "status" not in event:
            raise AirflowException(f"the trigger sent no event that this version understands: {event!r}")
        if event["status"] == TIMEOUT:
            raise AirflowSensorTimeout(event["message"])
        if event["status"] != ENDED:
            raise AirflowException(event["message"])
        return self._accepted(event["batches"])

    def _defer(self, batches: Sequence[Batch]) -> None:
        from anybatch_airflow.triggers import AnyBatchTrigger

        now = time.time()
        self.defer(
            trigger=AnyBatchTrigger(
                batches={batch.id: batch.created_at for batch in batches},
                conn_id=self._conn_id(),
                provider=self.provider,
                api_base=self.api_base,
                deadline=now + self.timeout,
                deferred_at=now,
                min_defer_seconds=self.min_defer_seconds,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout + 600),  # a backstop; the trigger's own deadline is first
        )

    def _retrieve(self) -> list[Batch]:
        from anybatch_airflow.hooks import AnyBatchHook

        ids = [self.batch_id] if isinstance(self.batch_id, str) else list(self.batch_id)
        if not ids:
            raise AirflowFailException("batch_id is empty: there is nothing to wait for")
        hook = AnyBatchHook(self._conn_id(), provider=self.provider, api_base=self.api_base)
        with hook.get_client() as client:
            return [client.retrieve(batch_id) for batch_id in ids]

    def _conn_id(self) -> str | None:
        from anybatch_airflow.hooks import AnyBatchHook

        return self.conn_id or (None if self.provider else AnyBatchHook.default_conn_name)

    def _accepted(self, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        ends = {batch_id: told["status"] for batch_id, told in batches.items()}
        refused = [f"{batch_id} is {end}" for batch_id, end in ends.items() if end not in self.accept]
        if refused:
            raise AirflowFailException(f"{', '.join(refused)}; accepted: {', '.join(self.accept)}")
        return {batch_id: dict(told) for batch_id, told in batches.items()}


def _described(batches: Iterable[Batch]) -> dict[str, dict[str, Any]]:
    from anybatch_airflow.triggers import describe

    return {batch.id: describe(batch) for batch in batches}
