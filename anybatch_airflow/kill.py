"""What becomes of a job's batches when its task is killed on a worker."""

from __future__ import annotations

import functools
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred

from anybatch_airflow.taskinstance import TERMINAL_STATES, state_of

if TYPE_CHECKING:
    from types import TracebackType

    from anybatch import Job
    from anybatch.jobs.ledger import Ledger
    from anybatch_airflow.hooks import AnyBatchHook

# Airflow kills a process 5 s after it has asked it to end.
_PATIENCE = 3.5  # seconds in all that the interrupted code is held …
_ASKING = 2.0  # … and for Airflow's answer alone
_AT_ONCE = 8


class KillGuard:
    """While it is entered, `kill` cancels the batches of a job if its task instance is over.

    Airflow calls an operator's `on_kill` on the worker when the task was marked failed or succeeded, or its
    run was, but also when it was cleared, when `execution_timeout` has passed, and when the worker shuts
    down. Only the first kind is an end; after the others the next attempt, or this one, goes on with the same
    batches. So Airflow is asked, by the rule of `AnyBatchTrigger.on_kill`, and where it does not answer in
    time the batches are left running: clearing the task finds them.

    The call comes out of a signal handler, in the middle of whatever the task is doing. That may hold the
    lock of the connection to Airflow, or of a log: the work is done by a thread, and waited for only so long.
    """

    def __init__(self, ti: Any, job: Job, hook: AnyBatchHook, log: Any) -> None:
        self._new_ending = functools.partial(_Ending, ti, job, hook, log)
        self._ending: _Ending | None = None
        self._is_armed = False

    def __enter__(self) -> None:
        self._is_armed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A task that has failed by itself may have left its batches running on purpose. One that is about to
        # defer has no trigger yet that would cancel them.
        self._is_armed = kind is not None and issubclass(kind, TaskDeferred)

    def kill(self) -> None:
        """Cancel the batches if the task instance is over, and end what it is doing.

        Raises AirflowTaskTerminated then, which no handler of errors takes for one: the interrupted code must
        not submit again what was just cancelled.
        """
        last = self._ending
        if not self._is_armed or (last is not None and (last.is_alive() or last.is_over)):
            return  # the signal may come twice
        self._ending = ending = self._new_ending()
        ending.start()
        ending.is_asked.wait(_ASKING)
        if ending.is_over:
            ending.is_done.wait(_PATIENCE - _ASKING)
            raise _terminated()("the task instance is over")


class _Ending(threading.Thread):
    """Asks Airflow whether the task instance is over, and cancels the batches if it is.

    Logs nothing before that: a log may wait for the code that was interrupted.
    """

    def __init__(self, ti: Any, job: Job, hook: AnyBatchHook, log: Any) -> None:
        super().__init__(name="anybatch-kill", daemon=True)
        self._ti, self._job, self._hook, self._log = ti, job, hook, log
        self._context = copy_context()
        self.is_over = False
        self.is_asked, self.is_done = threading.Event(), threading.Event()

    def run(self) -> None:
        """Do it in the context of the interrupted code: by it the log knows whose lines these are."""
        self._context.run(self._cancel_if_over)

    def _cancel_if_over(self) -> None:
        try:
            state = state_of(self._ti)
            self.is_over = state in TERMINAL_STATES
        except Exception as error:
            self._log.error("killed; Airflow does not tell whether the task is over: batches left: %s", error)
            return
        finally:
            self.is_asked.set()
        if not self.is_over:
            self._log.info("killed; the task instance is %s: its batches are left", state or "not over")
            return
        try:
            told = self._cancel()
        except Exception as error:
            told = [f"its batches were not cancelled: {type(error).__name__}: {error}"]
        finally:
            self.is_done.set()
        for line in (f"the task instance is {state}", *told):
            self._log.warning("killed: %s", line)

    def _cancel(self) -> list[str]:
        """Cancel what is on record of the current round; what became of it, in lines for the log."""
        from anybatch import RetryPolicy

        ids, told = left_by(self._job.ledger())
        if not ids:
            return told
        # A client of its own: the interrupted code may be in the midst of using the task's.
        with (
            self._hook.get_client(retry=RetryPolicy(attempts=2)) as client,
            ThreadPoolExecutor(_AT_ONCE) as threads,
        ):
            done = {batch_id: threads.submit(client.cancel, batch_id) for batch_id in ids}
        for batch_id, result in done.items():
            if error := result.exception():
                told.append(f"batch {batch_id} was not cancelled: {error}")
            else:
                told.append(f"batch {batch_id} is {result.result().status.value}")
        return told


def left_by(ledger: Ledger | None) -> tuple[list[str], list[str]]:
    """The batches that a job may have running, and what to say of one that may be about to be."""
    if ledger is None or ledger.landed_at is not None:
        return [], []
    ids = [record.batch_id for record in ledger.current if record.batch_id]
    unknown = sum(1 for record in ledger.current if record.tries and not record.batch_id)
    told = f"{unknown} being created may be running, unknown as yet: clearing the task finds and keeps them"
    return ids, [told] if unknown else []


def _terminated() -> type[BaseException]:
    from airflow.sdk import exceptions

    name = "AirflowTaskTerminated"
    # Airflow 3.1 has it among the exceptions of its core.
    home = exceptions if hasattr(exceptions, name) else importlib.import_module("airflow.exceptions")
    terminated: type[BaseException] = getattr(home, name)
    return terminated
