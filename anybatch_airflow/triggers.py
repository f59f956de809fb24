"""Waiting without a worker: one trigger for all batches of a task, one poller for all triggers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.providers.common.compat.sdk import conf
from airflow.triggers.base import BaseTrigger, TriggerEvent

from anybatch_airflow.hooks import AnyBatchHook
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.policies import describe
from anybatch_airflow.taskinstance import TERMINAL_STATES, state_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from anybatch import Batch
    from anybatch.errors import Kind
    from anybatch.polling.watcher import Watcher

T = TypeVar("T")

ENDED = "ended"
TIMEOUT = "timeout"
ERROR = "error"

# Where triggers write their log lines, in order. A line goes through a pipe, and whoever should read it is at
# times busy for half a second.
_lines = ThreadPoolExecutor(1, "anybatch-log")

LOST = "batch %s is not known at the provider, and no longer waited for; the others of the job are: %s"

ASK_AGAIN = 1.0  # seconds until Airflow, which gave no answer, is asked once more for the state of a task
NAMED = 5  # batches whose errors a message names


class AnyBatchTrigger(BaseTrigger):
    """Fires once: when every batch has ended or is late, or as soon as one cannot be waited for any longer.

    The event is `{"status": "ended" | "timeout" | "error", "batches": {id: …}, "message": str, "then": …}`,
    and of an error "final": whether no retry of the task would help.
    Each batch is `{"status": <the batch's>, "total", "completed", "failed"}`, or `{"timeout": True}`, or
    `{"lost": <why>}` where the provider does not know it and that is outlasted, or `{"error": <why>}` where
    waiting for it was given up, or `{"waiting": True}` where that of another ended the wait for it too. Only
    ids, times and names are held, never a key: the connection is read anew wherever the trigger starts.

    :param batches: id -> creation time in unix seconds, or None where it is unknown.
    :param batch_id: one id or several, in place of `batches`, for a task that starts in the triggerer.
    :param conn_id: Airflow connection; None to use the environment variables of `provider`.
    :param provider: overrides the connection's.
    :param api_base: overrides the connection's.
    :param deadlines: id -> unix seconds; absolute, so that neither a restart of the triggerer nor a retry
        moves them. A batch without one is waited for until it ends.
    :param deferred_at: unix seconds at which the task deferred.
    :param min_defer_seconds: no event sooner than this after `deferred_at`.
    :param then: told back in the event: an operator that resumes knows nothing but the event.
    :param cancel_on_kill: whether the batches are the task's own, to be cancelled if it is ended for good.
    :param outlasts_lost: whether a batch that the provider does not know (404) counts as ended, instead of
        ending the wait for all.
    """

    def __init__(
        self,
        *,
        batches: Mapping[str, int | None] | None = None,
        batch_id: str | Sequence[str] = (),
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        deadlines: Mapping[str, float] | None = None,
        deferred_at: float | None = None,
        min_defer_seconds: float | None = None,
        then: str | None = None,
        cancel_on_kill: bool = True,
        outlasts_lost: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batches = dict(batches or {})
        self.batch_id = batch_id
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.deadlines = dict(deadlines or {})
        self.deferred_at = time.time() if deferred_at is None else deferred_at
        self.min_defer_seconds = _configured_pause() if min_defer_seconds is None else min_defer_seconds
        self.then = then
        self.cancel_on_kill = cancel_on_kill
        self.outlasts_lost = outlasts_lost
        self._is_decided = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make this trigger again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "batches": self.batches,
                "batch_id": self.batch_id,
                "conn_id": self.conn_id,
                "provider": self.provider,
                "api_base": self.api_base,
                "deadlines": self.deadlines,
                "deferred_at": self.deferred_at,
                "min_defer_seconds": self.min_defer_seconds,
                "then": self.then,
                "cancel_on_kill": self.cancel_on_kill,
                "outlasts_lost": self.outlasts_lost,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait for all batches at once; what goes wrong is told in the event."""
        from anybatch.errors import AnyBatchError, classify

        try:
            batches = self._all()
            watcher = await self._hook().get_watcher()
        except AnyBatchError as error:
            event: dict[str, Any] = {"status": ERROR, "batches": {}, "message": _told(error)}
            event["final"] = classify(error).is_final
        else:
            event = await self._outcome(watcher, batches)
        self._is_decided = True
        # Airflow can fail a task that is resumed while its executor still reports the deferral.
        await asyncio.sleep(self.deferred_at + self.min_defer_seconds - time.time())
        await asyncio.wrap_future(self._logger()("%s", event["message"]))
        yield TriggerEvent(event | {"then": self.then})  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Cancel the batches if the task instance is over; leave them to the next attempt if it is not.

        Airflow 3.3 calls this when a deferred task is marked failed or succeeded, but also when it is
        cleared, and by mistake when a stalled triggerer wakes up after its triggers moved to another one.
        By then the other one may have told that a batch is late, and a task that leaves it running may have
        failed: so nothing is cancelled for which this trigger knows, or could know, how the wait has ended.
        Airflow 3.1 and 3.2 never call it: there a task that is ended by hand leaves its batches running.
        """
        if self.cancel_on_kill and not self._is_decided:
            # Airflow repeats the cancellation that has led here about once a second, until the trigger is
            # gone: whatever is awaited here would be given up before the first batch is cancelled.
            await _uninterrupted(self._cancel_if_over())

    async def _cancel_if_over(self) -> None:
        ids = in_time(self._all(), self.deadlines, time.time())
        if not ids:
            self.log.info("every batch is past its deadline: what becomes of them is for the task to say")
            return
        try:
            state = await _answer(self._task_state)
        except Exception as error:
            unknown = "Airflow does not tell whether the task instance is over: left running: %s (%s)"
            self.log.error(unknown, _listed(ids), _told(error))
            return
        if state not in TERMINAL_STATES:
            self.log.info("the task instance is %s: its batches are left running", state or "not over")
            return
        self.log.info("the task instance is %s: cancelling %s", state, _listed(ids))
        async with await _answer(self._hook().get_async_client) as client:
            done = await asyncio.gather(*map(client.cancel, ids), return_exceptions=True)
        for batch_id, result in zip(ids, done, strict=True):
            if isinstance(result, BaseException):
                self.log.warning("batch %s was not cancelled: %s", batch_id, _told(result))

    def _all(self) -> dict[str, int | None]:
        return self.batches or dict.fromkeys(batch_ids(self.batch_id))

    def _hook(self) -> AnyBatchHook:
        return AnyBatchHook(self.conn_id, provider=self.provider, api_base=self.api_base)

    async def _outcome(self, watcher: Watcher, batches: Mapping[str, int | None]) -> dict[str, Any]:
        from anybatch.errors import Wait, classify

        waits: dict[str, asyncio.Task[dict[str, Any]]] = {}
        kinds: list[tuple[Exception, Kind]] = []
        try:
            async with asyncio.TaskGroup() as group:  # the first error ends all
                for batch_id, created in batches.items():
                    waits[batch_id] = group.create_task(self._wait(watcher, batch_id, created))
        except* Exception as errors:
            kinds = [(error, classify(error)) for error in errors.exceptions]
        told = {batch_id: told_of(wait) for batch_id, wait in waits.items()}
        status, message = conclusion(told)
        event = {"status": status, "batches": told, "message": message}
        if status != ERROR:
            return event
        for error, kind in kinds:
            if kind.wait is Wait.UNEXPECTED:
                self.log.error("the wait ended by a bug", exc_info=error)
        return event | {"final": any(kind.is_final for _, kind in kinds)}

    async def _wait(self, watcher: Watcher, batch_id: str, created_at: int | None) -> dict[str, Any]:
        from anybatch import DeadlineExceededError, NotFoundError

        try:
            batch = await watcher.wait(
                batch_id,
                deadline=self.deadlines.get(batch_id),
                created_at=created_at,
                on_progress=progress(self._logger()),
            )
        except DeadlineExceededError:
            return {"timeout": True}
        except NotFoundError as error:
            if not self.outlasts_lost:
                raise
            self._logger()(LOST, batch_id, error)
            return {"lost": _told(error)}
        return describe(batch)

    def _logger(self) -> Callable[..., Future[object]]:
        """`self.log.info`, without holding up the event loop."""
        # The poller serves all triggers; which of them a line belongs to is kept in the context.
        context, info = copy_context(), self.log.info

        def log(text: str, *args: object) -> Future[object]:
            return _lines.submit(context.run, info, text, *args)

        return log

    async def _task_state(self) -> str | None:
        """The state of this trigger's task instance, None where there is none."""
        if self.task_instance is None:
            return None
        from asgiref.sync import sync_to_async

        # In a thread, from the import on: it is slow, and the answer comes through the event loop.
        return await sync_to_async(state_of)(self.task_instance)


def in_time(batch_ids: Iterable[str], deadlines: Mapping[str, float], now: float) -> list[str]:
    """The batches whose deadline has not passed."""
    return [batch_id for batch_id in batch_ids if deadlines.get(batch_id, math.inf) > now]


def told_of(wait: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    """What the event says of a batch, from the wait for it, which is over."""
    if wait.cancelled():
        return {"waiting": True}
    error = wait.exception()
    return {"error": _told(error)} if error else wait.result()


def conclusion(batches: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Status and message of the event, from what became of each batch."""
    if errors := [f"{batch_id}: {told['error']}" for batch_id, told in batches.items() if "error" in told]:
        more = [f"and {len(errors) - NAMED} more"] if len(errors) > NAMED else []
        left = [batch_id for batch_id, told in batches.items() if "waiting" in told]
        also = [f"left running and no longer waited for: {_listed(left)}"] if left else []
        return ERROR, "; ".join(errors[:NAMED] + more + also)
    if late := [batch_id for batch_id, told in batches.items() if told.get("timeout")]:
        return TIMEOUT, f"not ended at the deadline: {', '.join(late)}"
    return ENDED, ", ".join(
        f"{batch_id} is {told.get('status', 'not known at the provider')}"
        for batch_id, told in batches.items()
    )


def progress(log: Callable[..., object]) -> Callable[[Batch], None]:
    """A callback that logs each new status and each tenth of the rows of one batch."""
    told: tuple[str, int] | None = None

    def tell(batch: Batch) -> None:
        nonlocal told
        counts = batch.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
        stage = (batch.raw_status, 10 * done // total if total else 0)
        if stage != told:
            told = stage
            rows = f", {done:,} of {total:,} rows" if total else ""
            log("batch %s: %s%s", batch.id, batch.raw_status, rows)

    return tell


async def _answer(ask: Callable[[], Awaitable[T]]) -> T:
    """What Airflow answers; it is asked again where it does not, as what answers may just be being replaced.

    Raises the last error after the time that Airflow gives to `on_kill`.
    """
    until = time.monotonic() + conf.getint("triggerer", "on_kill_timeout", fallback=30)
    told: Exception | None = None
    while True:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                return await ask()
        except Exception as error:
            if told is None or not isinstance(error, TimeoutError):  # the time being over tells less than why
                told = error
            if time.monotonic() + ASK_AGAIN >= until:
                raise told from None
            await asyncio.sleep(ASK_AGAIN)


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await it to its end, unless the event loop itself ends."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _configured_pause() -> float:
    return conf.getfloat("anybatch", "min_defer_seconds", fallback=10.0) or 0.0


def _listed(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{len(ids)} batches: {', '.join(ids)}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
