"""One AnyBatchOperator, mapped over the inputs that `benchmarks.airflow_expand` has made."""

from __future__ import annotations

import os

from airflow.sdk import DAG

from anybatch_airflow import AnyBatchOperator

HOME, NUMBER = os.environ["BENCH_HOME"], int(os.environ["BENCH_NUMBER"])

with DAG("expanded", is_paused_upon_creation=False, max_active_tasks=NUMBER, default_args={"retries": 0}):
    AnyBatchOperator.partial(task_id="ask", conn_id="bench", output=HOME + "/out/{{ ti.map_index }}").expand(
        input=[f"{HOME}/in/{number:03}.jsonl" for number in range(NUMBER)]
    )
