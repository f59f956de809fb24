"""What Airflow says of a task instance."""

from __future__ import annotations

from typing import Any

# The states of a task instance that is over: nothing of it will run again unless somebody clears it.
TERMINAL_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


def state_of(ti: Any) -> str | None:
    """The state of a task instance as Airflow's API tells it; blocks."""
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    states = RuntimeTaskInstance.get_task_states(
        dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
    )
    key = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
    # One that was cleared just now has no state; one that is not there was deleted with its run or its DAG.
    state = states.get(ti.run_id, {}).get(key, "removed")
    return None if state is None else str(getattr(state, "value", state))
