"""One DAG for each way to run a job; the provider's address comes with the run."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from anybatch_airflow import AnyBatchOperator

REQUESTS = [
    {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-5-mini", "messages": [{"role": "user", "content": f"say {number}"}]},
    }
    for number in range(5)
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deleted": {},
    "doomed": {"queue": "doomed"},
    "doomed_slot": {"queue": "doomed", "deferrable": False},
    "brief": {"execution_timeout": timedelta(seconds=15)},
    "brief_slot": {"execution_timeout": timedelta(seconds=15), "deferrable": False},
    "twice": {"max_rounds": 2},
    "late_leave": {"timeout": 30, "on_timeout": "leave", "retry_delay": timedelta(seconds=10)},
    "late_cancel": {"timeout": 40, "on_timeout": "cancel"},
    "late_land": {"timeout": 30, "on_timeout": "land_partial"},
}

for name, options in VARIANTS.items():
    with DAG(
        name,
        is_paused_upon_creation=False,
        max_active_runs=64,
        default_args={"retries": 5, "retry_delay": timedelta(0)},
    ):
        AnyBatchOperator(
            task_id="job",
            conn_id="provider",
            api_base="{{ dag_run.conf['api_base'] }}",
            input=REQUESTS,
            output_folder=os.environ["ANYBATCH_OUTPUT"] + "/{{ run_id }}",
            **options,
        )

with DAG("hurried", is_paused_upon_creation=False, dagrun_timeout=timedelta(minutes=30)):
    AnyBatchOperator(
        task_id="job",
        conn_id="provider",
        api_base="{{ dag_run.conf['api_base'] }}",
        input=REQUESTS,
        output_folder=os.environ["ANYBATCH_OUTPUT"] + "/{{ run_id }}",
    )
