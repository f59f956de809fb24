"""Waiting without a worker: one trigger for all batches of a task, one poller for all triggers."""

from __future__ import annotations

import asyncio
import time
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf
from airflow.triggers.base import BaseTrigger, TriggerEvent

from anybatch_airflow.hooks import AnyBatchHook

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from anybatch import Batch
    from anybatch.watch import Watcher

ENDED = "ended"
TIMEOUT = "timeout"
ERROR = "error"

_TERMINAL_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


class AnyBatchTrigger(BaseTrigger):
    """Fires once, when every batch has ended or will not be waited for any longer.

    The event is `{"status": "ended" | "timeout" | "error", "batches": {id: …}, "message": str}`. Each batch
    is `{"status": <the batch's>, "total", "completed", "failed"}`, or `{"error": <why>}` where waiting for
    it was given up. Only ids, times and names are held, never a key: the connection is read anew wherever
    the trigger starts.

    :param batches: id -> creation time in unix seconds, or None where it is unknown.
    :param conn_id: Airflow connection; None to use the environment variables of `provider`.
    :param provider: overrides the connection's.
    :param api_base: overrides the connection's.
    :param deadline: unix seconds; absolute, so that neither a restart of the triggerer nor a retry moves it.
    :param deferred_at: unix seconds at which the task deferred.
    :param min_defer_seconds: no event sooner than this after `deferred_at`.
    """

    def __init__(
        self,
        *,
        batches: Mapping[str, int | None],
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        deadline: float | None = None,
        deferred_at: float | None = None,
        min_defer_seconds: float | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batches = dict(batches)
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.deadline = deadline
        self.deferred_at = time.time() if deferred_at is None else deferred_at
        self.min_defer_seconds = _configured_pause() if min_defer_seconds is None else min_defer_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make this trigger again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "batches": self.batches,
                "conn_id": self.conn_id,
                "provider": self.provider,
                "api_base": self.api_base,
                "deadline": self.deadline,
                "deferred_at": self.deferred_at,
                "min_defer_seconds": self.min_defer_seconds,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait for all batches at once; what goes wrong is told in the event."""
        from anybatch import AnyBatchError

        self.log.info("waiting for %d batch(es): %s", len(self.batches), ", ".join(self.batches))
        try:
            watcher = await self._hook().get_watcher()
        except AnyBatchError as error:
            event: dict[str, Any] = {"status": ERROR, "batches": {}, "message": _told(error)}
        else:
            event = await self._outcome(watcher)
        # Airflow can fail a task that is resumed while its executor still reports the deferral.
        await asyncio.sleep(self.deferred_at + self.min_defer_seconds - time.time())
        self.log.info("%s", event["message"])
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Cancel the batches if the task instance is over; leave them to the next attempt if it is not.

        Airflow calls this when a deferred task is marked failed or succeeded, but also when it is cleared,
        and by mistake when a stalled triggerer wakes up after its triggers moved to another one.
        """
        state = await self._task_state()
        if state not in _TERMINAL_STATES:
            self.log.info("the task instance is %s: its batches are left running", state or "not over")
            return
        self.log.info("the task instance is %s: cancelling %s", state, ", ".join(self.batches))
        async with await self._hook().get_async_client() as client:
            done = await asyncio.gather(*map(client.cancel, self.batches), return_exceptions=True)
        for batch_id, result in zip(self.batches, done, strict=True):
            if isinstance(result, BaseException):
                self.log.warning("batch %s was not cancelled: %s", batch_id, _told(result))

    def _hook(self) -> AnyBatchHook:
        return AnyBatchHook(self.conn_id, provider=self.provider, api_base=self.api_base)

    async def _outcome(self, watcher: Watcher) -> dict[str, Any]:
        waits = (self._wait(watcher, batch_id, created) for batch_id, created in self.batches.items())
        batches = dict(zip(self.batches, await asyncio.gather(*waits), strict=True))
        late = [batch_id for batch_id, told in batches.items() if told.get("timeout")]
        lost = [f"{batch_id}: {told['error']}" for batch_id, told in batches.items() if "error" in told]
        if lost:
            status, message = ERROR, "; ".join(lost)
        elif late:
            status, message = TIMEOUT, f"not ended at the deadline: {', '.join(late)}"
        else:
            status = ENDED
            message = ", ".join(f"{batch_id} is {told['status']}" for batch_id, told in batches.items())
        return {"status": status, "batches": batches, "message": message}

    async def _wait(self, watcher: Watcher, batch_id: str, created_at: int | None) -> dict[str, Any]:
        from anybatch import AnyBatchError, DeadlineExceededError

        try:
            batch = await watcher.wait(
                batch_id, deadline=self.deadline, created_at=created_at, on_progress=self._progress()
            )
        except DeadlineExceededError:
            return {"timeout": True}
        except AnyBatchError as error:
            return {"error": _told(error)}
        return describe(batch)

    def _progress(self) -> Callable[[Batch], None]:
        """A callback that logs each new status and each tenth of the rows, in this trigger's own log."""
        told: tuple[str, int] | None = None
        # The poller serves all triggers; which of them a line belongs to is kept in the context.
        context = copy_context()

        def tell(batch: Batch) -> None:
            nonlocal told
            counts = batch.request_counts
            done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
            stage = (batch.raw_status, 10 * done // total if total else 0)
            if stage != told:
                told = stage
                rows = f", {done:,} of {total:,} rows" if total else ""
                context.run(self.log.info, "batch %s: %s%s", batch.id, batch.raw_status, rows)

        return tell

    async def _task_state(self) -> str | None:
        """The state of this trigger's task instance, None where it cannot be told."""
        ti = self.task_instance
        if ti is None:
            return None
        try:
            from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
            from asgiref.sync import sync_to_async
        except ImportError:
            return None
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        key = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = states.get(ti.run_id, {}).get(key)
        return None if state is None else str(getattr(state, "value", state))


def _configured_pause() -> float:
    return conf.getfloat("anybatch", "min_defer_seconds", fallback=10.0) or 0.0


def describe(batch: Batch) -> dict[str, Any]:
    """The part of a batch that an event or an XCom carries."""
    told: dict[str, Any] = {"status": batch.status.value}
    if batch.request_counts:
        told |= batch.request_counts.model_dump()
    return told


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
