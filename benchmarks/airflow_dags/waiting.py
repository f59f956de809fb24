"""500 tasks that wait for one batch each; `benchmarks.airflow_waiting` defers them without a worker."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseOperator

NUMBER, MARKS = int(os.environ["BENCH_NUMBER"]), Path(os.environ["BENCH_MARKS"])


class Waiting(BaseOperator):
    """Leaves a file with the time at which it runs again."""

    def __init__(self, *, batch_id: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id

    def resumed(self, context: Any, event: Any = None) -> None:
        (MARKS / self.batch_id).write_text(str(time.time()))


for kind in ("floor", "anybatch", "commonai"):
    with DAG(kind, is_paused_upon_creation=False, max_active_tasks=NUMBER + 8, default_args={"retries": 0}):
        Waiting.partial(task_id="wait", pool="bench").expand(
            batch_id=[f"batch_{kind}_{number:04}" for number in range(NUMBER)]
        )
