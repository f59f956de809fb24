"""Defer the tasks of a run as their own code would, but all in one process: `python airflow_defer.py KIND`.

A worker needs seconds for each task, and 500 would take longer than the rest of the measurement. The tasks
still defer one after another, as from workers. Without KIND, close the pool, so that no task starts before
that.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.models.pool import Pool
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState

PAUSE = 0.04  # seconds


def trigger_of(kind: str, number: int) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of a trigger that waits for one batch for ten hours."""
    batch_id, end = f"batch_{kind}_{number:04}", time.time() + 36_000
    if kind == "anybatch":
        return "anybatch_airflow.triggers.AnyBatchTrigger", {
            "batches": {batch_id: int(time.time())}, "conn_id": "bench", "deadlines": {batch_id: end},
        }  # fmt: skip
    if kind == "commonai":
        return "airflow.providers.common.ai.triggers.llm_batch.LLMBatchTrigger", {
            "llm_conn_id": "bench", "adapter": "openai", "batch_id": batch_id, "poll_interval": 30,
            "end_time": end, "timeout": 36_000, "cancel_on_kill": False, "cancel_on_timeout": False,
        }  # fmt: skip
    return "airflow.providers.standard.triggers.temporal.TimeDeltaTrigger", {"delta": timedelta(hours=10)}


def main(kind: str | None = None) -> None:
    with create_session() as session:
        pool = session.query(Pool).filter_by(pool="bench")
        if kind is None:
            pool.update({"slots": 0})
        for ti in session.query(TaskInstance).filter_by(dag_id=kind, run_id="bench").all():
            classpath, arguments = trigger_of(ti.dag_id, ti.map_index)
            trigger = Trigger(classpath=classpath, kwargs=arguments, created_date=datetime.now(UTC))
            session.add(trigger)
            session.flush()
            ti.trigger_id, ti.next_method, ti.next_kwargs = trigger.id, "resumed", {}
            ti.state, ti.start_date = TaskInstanceState.DEFERRED, datetime.now(UTC)
            session.commit()
            time.sleep(PAUSE)
        if kind is not None:
            pool.update({"slots": 8})


if __name__ == "__main__":
    main(*sys.argv[1:])
