"""Cancels the batches of a task that a person has ended, and of no other."""

from __future__ import annotations

import functools
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred

if TYPE_CHECKING:
    from types import TracebackType

    from anybatch import Job
    from anybatch.jobs.ledger import Ledger
    from anybatch_airflow.hooks import AnyBatchHook

# The states of a task instance that is over: Airflow will not run it again unless somebody clears it.
TERMINAL_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})

# Airflow kills a process 5 s after it has asked it to end.
_MAX_HOLD = 3.5  # seconds in all that the interrupted code is held …
_MAX_WAIT_FOR_STATE = 2.0  # … and seconds of these for Airflow's answer
_THREADS = 8  # cancels at the same time


def state_of(ti: Any) -> str | None:
    """The state of a task instance, as Airflow's API says; None right after a clear. Blocks."""
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    states = RuntimeTaskInstance.get_task_states(
        dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
    )
    key = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
    # Absent from the answer: the task instance was deleted, with its run or its DAG.
    state = states.get(ti.run_id, {}).get(key, "removed")
    return None if state is None else str(getattr(state, "value", state))


class KillGuard:
    """Within its `with` block, `kill` cancels the job's batches if the task instance is over.

    Airflow calls an operator's `on_kill` on the worker when someone marks the task or its run failed or
    succeeded, but also when someone clears the task, when `execution_timeout` passes, and when the worker
    shuts down. Only the first means that nobody wants the batches; in the other cases this or the next
    attempt goes on with them. So `kill` asks Airflow for the state of the task instance, as
    `AnyBatchTrigger.on_kill` does. If Airflow does not answer in time, the batches run on: clearing the task
    finds them.

    `on_kill` runs in a signal handler, in the middle of whatever the task is doing. The interrupted code may
    hold the lock of the connection to Airflow or of a log handler. So a thread does the work, and the handler
    waits for it only for a limited time.
    """

    def __init__(self, ti: Any, job: Job, hook: AnyBatchHook, log: Any) -> None:
        self._new_thread = functools.partial(_KillThread, ti, job, hook, log)
        self._thread: _KillThread | None = None
        self._is_armed = False

    def __enter__(self) -> None:
        self._is_armed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Disarm when the task has failed by itself: it may have left its batches running on purpose. Stay
        # armed when it is about to defer: there is no trigger yet that would cancel them.
        self._is_armed = kind is not None and issubclass(kind, TaskDeferred)

    def kill(self) -> None:
        """Cancel the batches if the task instance is over, and end the interrupted code.

        Raises:
            AirflowTaskTerminated: The task instance is over. No error handler catches this one, so the
                interrupted code cannot submit again what was just cancelled.
        """
        last = self._thread
        if not self._is_armed or (last is not None and (last.is_alive() or last.is_over)):
            return  # Airflow may send the signal twice
        self._thread = thread = self._new_thread()
        thread.start()
        thread.is_asked.wait(_MAX_WAIT_FOR_STATE)
        if thread.is_over:
            thread.is_done.wait(_MAX_HOLD - _MAX_WAIT_FOR_STATE)
            raise _terminated()("the task instance is over")


class _KillThread(threading.Thread):
    """Asks Airflow whether the task instance is over, and cancels the batches if it is.

    It logs nothing before Airflow has answered: a log handler may be waiting for the interrupted code.
    """

    def __init__(self, ti: Any, job: Job, hook: AnyBatchHook, log: Any) -> None:
        super().__init__(name="anybatch-kill", daemon=True)
        self._ti, self._job, self._hook, self._log = ti, job, hook, log
        self._context = copy_context()
        self.is_over = False
        self.is_asked, self.is_done = threading.Event(), threading.Event()

    def run(self) -> None:
        """Work in the context of the interrupted code, so that log lines go to the task's log."""
        self._context.run(self._cancel_if_over)

    def _cancel_if_over(self) -> None:
        try:
            state = state_of(self._ti)
            self.is_over = state in TERMINAL_STATES
        except Exception as error:
            self._log.error(
                "killed; Airflow does not say whether the task instance is over, so its batches run on: %s",
                error,
            )
            return
        finally:
            self.is_asked.set()
        if not self.is_over:
            self._log.info("killed, but the task instance is %s, so its batches run on", state or "not over")
            return
        try:
            lines = self._cancel()
        except Exception as error:
            lines = [f"its batches were not cancelled: {type(error).__name__}: {error}"]
        finally:
            self.is_done.set()
        for line in (f"the task instance is {state}", *lines):
            self._log.warning("killed: %s", line)

    def _cancel(self) -> list[str]:
        """Cancel the batches of the current round; returns what became of each, in lines for the log."""
        from anybatch import RetryPolicy

        ids, lines = batches_to_cancel(self._job.ledger())
        if not ids:
            return lines
        # A client of its own: the interrupted code may be using the task's client.
        with (
            self._hook.get_client(retry=RetryPolicy(attempts=2)) as client,
            ThreadPoolExecutor(_THREADS) as threads,
        ):
            done = {batch_id: threads.submit(client.cancel, batch_id) for batch_id in ids}
        for batch_id, result in done.items():
            if error := result.exception():
                lines.append(f"batch {batch_id} was not cancelled: {error}")
            else:
                lines.append(f"batch {batch_id} is {result.result().status.value}")
        return lines


def batches_to_cancel(ledger: Ledger | None) -> tuple[list[str], list[str]]:
    """Which batches of a job to cancel.

    Returns:
        The ids of the current round's batches, and a line for the log if a batch was just being created.
    """
    if ledger is None or ledger.landed_at is not None:
        return [], []
    ids = [record.batch_id for record in ledger.current if record.batch_id]
    unknown = sum(1 for record in ledger.current if record.tries and not record.batch_id)
    line = f"{unknown} being created may be running, with no id on record yet: clearing the task finds them"
    return ids, [line] if unknown else []


def _terminated() -> type[BaseException]:
    from airflow.sdk import exceptions

    name = "AirflowTaskTerminated"
    # Airflow 3.1 has it in its core, not in the SDK.
    home = exceptions if hasattr(exceptions, name) else importlib.import_module("airflow.exceptions")
    terminated: type[BaseException] = getattr(home, name)
    return terminated
