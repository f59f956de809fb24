"""What a deferred task waits with.

A task has one trigger for all of its batches, and all triggers of an account share one poller.
"""

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
from anybatch_airflow.kill import TERMINAL_STATES, state_of
from anybatch_airflow.reporting import facts_of_batch

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

# Writes the triggers' log lines, in order. The reader of their pipe is at times busy for half a second;
# in a thread of its own this does not delay the event loop.
_log_thread = ThreadPoolExecutor(1, "anybatch-log")

LOST = "the provider does not know batch %s; the task waits only for the other batches of the job: %s"

ASK_AGAIN = 1.0  # seconds until Airflow, if it did not answer, is asked again for the state of a task
MAX_NAMED = 5  # batches whose errors a message names


class AnyBatchTrigger(BaseTrigger):
    """Fires once: when every batch has ended or is late, or as soon as an error ends the wait for one of
    them.

    The event is `{"status": "ended" | "timeout" | "error", "batches": {id: entry}, "message": str, "then":
    …}`. An error event also has "final": whether a retry of the task would be in vain. Each entry is one of

    - `{"status": …, "total": …, "completed": …, "failed": …}`: the batch has ended;
    - `{"timeout": True}`: it is late;
    - `{"lost": <why>}`: the provider does not know it, and `outlasts_lost` is set;
    - `{"error": <why>}`: the error that ended the wait;
    - `{"waiting": True}`: the error of another batch ended the wait for this one.

    The trigger holds ids, times and names, never a key: it reads the connection anew wherever it starts.

    Args:
        batches: id -> creation time in unix seconds, None where it is unknown.
        batch_id: One id or several, in place of `batches`, for a task that starts in the triggerer.
        conn_id: Airflow connection; None to use the environment variables of `provider`.
        provider: Overrides the connection's provider.
        api_base: Overrides the connection's base URL.
        deadlines: id -> unix seconds. They are absolute, so that neither a restart of the triggerer nor a
            retry moves them. A batch without one is waited for until it ends.
        deferred_at: Unix seconds at which the task deferred.
        min_defer_seconds: Fire no sooner than this many seconds after `deferred_at`.
        then: A text that comes back in the event, for the operator that resumes.
        cancel_on_kill: Whether to cancel the batches if a person ends the task. False where something else
            created them.
        outlasts_lost: Whether a batch that the provider does not know (404) counts as ended; otherwise it
            ends the wait for all.
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
        """Wait for all batches at once; the event reports what goes wrong."""
        from anybatch.errors import AnyBatchError, classify

        try:
            batches = self._batches()
            watcher = await self._hook().get_watcher()
        except AnyBatchError as error:
            event: dict[str, Any] = {"status": ERROR, "batches": {}, "message": _error_text(error)}
            event["final"] = classify(error).is_final
        else:
            event = await self._wait_for_all(watcher, batches)
        self._is_decided = True
        # Not too soon: Airflow can fail a task that resumes while its executor still reports the deferral.
        await asyncio.sleep(self.deferred_at + self.min_defer_seconds - time.time())
        await asyncio.wrap_future(self._log_in_thread()("%s", event["message"]))
        yield TriggerEvent(event | {"then": self.then})  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Cancel the batches if the task instance is over; if it is not, leave them to the next attempt.

        Airflow 3.3 calls this when someone marks a deferred task failed or succeeded, but also when someone
        clears it, and by mistake when a stalled triggerer wakes up after its triggers moved to another one
        (issue 73454). In that last case the other triggerer may already have reported a late batch, and the
        task may have failed and left it running on purpose. So a batch is cancelled only if this trigger has
        not fired and the batch's deadline has not passed. Airflow 3.1 and 3.2 never call this: there a task
        that someone ends leaves its batches running.
        """
        if self.cancel_on_kill and not self._is_decided:
            # Airflow cancels this coroutine about once a second until the trigger is gone. Without the
            # shield, it would be cancelled before it has cancelled the first batch.
            await _uninterrupted(self._cancel_if_over())

    async def _cancel_if_over(self) -> None:
        ids = in_time(self._batches(), self.deadlines, time.time())
        if not ids:
            self.log.info(
                "nothing is cancelled: every batch is past its deadline, and the task decides about it"
            )
            return
        try:
            state = await _ask_airflow(self._task_state)
        except Exception as error:
            unknown = "Airflow does not say whether the task instance is over, so these run on: %s (%s)"
            self.log.error(unknown, _listed(ids), _error_text(error))
            return
        if state not in TERMINAL_STATES:
            self.log.info("the task instance is %s: leaving its batches running", state or "not over")
            return
        self.log.info("the task instance is %s: cancelling %s", state, _listed(ids))
        async with await _ask_airflow(self._hook().get_async_client) as client:
            done = await asyncio.gather(*map(client.cancel, ids), return_exceptions=True)
        for batch_id, result in zip(ids, done, strict=True):
            if isinstance(result, BaseException):
                self.log.warning("batch %s was not cancelled: %s", batch_id, _error_text(result))

    def _batches(self) -> dict[str, int | None]:
        return self.batches or dict.fromkeys(batch_ids(self.batch_id))

    def _hook(self) -> AnyBatchHook:
        return AnyBatchHook(self.conn_id, provider=self.provider, api_base=self.api_base)

    async def _wait_for_all(self, watcher: Watcher, batches: Mapping[str, int | None]) -> dict[str, Any]:
        from anybatch.errors import Wait, classify

        waits: dict[str, asyncio.Task[dict[str, Any]]] = {}
        kinds: list[tuple[Exception, Kind]] = []
        try:
            async with asyncio.TaskGroup() as group:  # the first error ends the wait for all
                for batch_id, created in batches.items():
                    waits[batch_id] = group.create_task(self._wait(watcher, batch_id, created))
        except* Exception as errors:
            kinds = [(error, classify(error)) for error in errors.exceptions]
        entries = {batch_id: entry_of(wait) for batch_id, wait in waits.items()}
        status, message = status_and_message(entries)
        event = {"status": status, "batches": entries, "message": message}
        if status != ERROR:
            return event
        for error, kind in kinds:
            if kind.wait is Wait.UNEXPECTED:
                self.log.error("an unexpected error ended the wait; please report it", exc_info=error)
        return event | {"final": any(kind.is_final for _, kind in kinds)}

    async def _wait(self, watcher: Watcher, batch_id: str, created_at: int | None) -> dict[str, Any]:
        from anybatch import DeadlineExceededError, NotFoundError

        try:
            batch = await watcher.wait(
                batch_id,
                deadline=self.deadlines.get(batch_id),
                created_at=created_at,
                on_progress=progress(self._log_in_thread()),
            )
        except DeadlineExceededError:
            return {"timeout": True}
        except NotFoundError as error:
            if not self.outlasts_lost:
                raise
            self._log_in_thread()(LOST, batch_id, error)
            return {"lost": _error_text(error)}
        return facts_of_batch(batch)

    def _log_in_thread(self) -> Callable[..., Future[object]]:
        """`self.log.info`, but the event loop does not wait for it."""
        # The poller calls back for all triggers; this trigger's context makes the line part of its own log.
        context, info = copy_context(), self.log.info

        def log(text: str, *args: object) -> Future[object]:
            return _log_thread.submit(context.run, info, text, *args)

        return log

    async def _task_state(self) -> str | None:
        """The state of this trigger's task instance; None if there is none, or right after a clear."""
        if self.task_instance is None:
            return None
        from asgiref.sync import sync_to_async

        # In a thread: the import inside is slow, and Airflow's answer comes through this event loop.
        return await sync_to_async(state_of)(self.task_instance)


def in_time(batch_ids: Iterable[str], deadlines: Mapping[str, float], now: float) -> list[str]:
    """The batches whose deadline has not passed."""
    return [batch_id for batch_id in batch_ids if deadlines.get(batch_id, math.inf) > now]


def entry_of(wait: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    """The event's entry for a batch, made from the finished wait for it."""
    if wait.cancelled():
        return {"waiting": True}
    error = wait.exception()
    return {"error": _error_text(error)} if error else wait.result()


def status_and_message(batches: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Status and message of the event, made from the entries of all batches."""
    if errors := [f"{batch_id}: {entry['error']}" for batch_id, entry in batches.items() if "error" in entry]:
        more = [f"and {len(errors) - MAX_NAMED} more"] if len(errors) > MAX_NAMED else []
        left = [batch_id for batch_id, entry in batches.items() if "waiting" in entry]
        also = [f"still running, and the task no longer waits for: {_listed(left)}"] if left else []
        return ERROR, "; ".join(errors[:MAX_NAMED] + more + also)
    if late := [batch_id for batch_id, entry in batches.items() if entry.get("timeout")]:
        return TIMEOUT, f"not ended at the deadline: {', '.join(late)}"
    return ENDED, ", ".join(
        f"{batch_id} is {entry.get('status', 'not known to the provider')}"
        for batch_id, entry in batches.items()
    )


def progress(log: Callable[..., object]) -> Callable[[Batch], None]:
    """A callback that logs each new status of one batch, and each tenth of its rows."""
    reported: tuple[str, int] | None = None

    def report(batch: Batch) -> None:
        nonlocal reported
        counts = batch.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
        stage = (batch.raw_status, 10 * done // total if total else 0)
        if stage != reported:
            reported = stage
            rows = f", {done:,} of {total:,} rows" if total else ""
            log("batch %s: %s%s", batch.id, batch.raw_status, rows)

    return report


async def _ask_airflow(ask: Callable[[], Awaitable[T]]) -> T:
    """Call `ask` until it answers: the process that answers for Airflow may just be restarting.

    Raises:
        Exception: The last error that `ask` raised, after the seconds that Airflow gives to `on_kill`.
    """
    until = time.monotonic() + conf.getint("triggerer", "on_kill_timeout", fallback=30)
    failure: Exception | None = None
    while True:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                return await ask()
        except Exception as error:
            # An earlier error says more than that the time is over.
            if failure is None or not isinstance(error, TimeoutError):
                failure = error
            if time.monotonic() + ASK_AGAIN >= until:
                raise failure from None
            await asyncio.sleep(ASK_AGAIN)


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end although this coroutine is cancelled meanwhile."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _configured_pause() -> float:
    return conf.getfloat("anybatch", "min_defer_seconds", fallback=10.0) or 0.0


def _listed(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{len(ids)} batches: {', '.join(ids)}"


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
