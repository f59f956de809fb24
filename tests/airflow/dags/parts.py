"""DAGs of the operators that do one step each, run by `dag.test()`."""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import DAG, TaskGroup, task

from anybatch_airflow import (
    AnyBatchCancelOperator,
    AnyBatchCreateOperator,
    AnyBatchOperator,
    AnyBatchResultsOperator,
    AnyBatchSensor,
)

OUTPUT = os.environ.get("ANYBATCH_OUTPUT", "/tmp/anybatch-tests")
PROMPT = "a prompt that nobody else should see {{ ti }}"


def requests(wish: str, rows: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": f"local:echo?{wish}",
                "messages": [{"role": "user", "content": f"{PROMPT} {number}"}],
            },
        }
        for number in range(rows)
    ]


with DAG("parts", default_args={"provider": "local"}):
    create = AnyBatchCreateOperator(task_id="create", input=lambda: requests("delay=0.4&expire=0.5", rows=20))
    ended = AnyBatchSensor(task_id="ended", batch_id=create.output, accept=("completed", "expired"))
    results = AnyBatchResultsOperator(
        task_id="results", batch_id=create.output, output=OUTPUT + "/parts/{{ run_id }}"
    )

    @task
    def look(manifest: dict[str, Any]) -> str:
        return f"{manifest['rows']} rows, {len(manifest['batch_ids'])} batch"

    ended >> results
    look(results.output)

with DAG("cancelled", default_args={"provider": "local"}):
    create = AnyBatchCreateOperator(task_id="create", input=lambda: requests("delay=20"))
    cancel = AnyBatchCancelOperator(task_id="cancel", batch_id=create.output, wait_for_end=True)
    # Skipped and not failed, as cancelled is no end that is accepted.
    AnyBatchSensor(
        task_id="skipped",
        batch_id="{{ ti.xcom_pull(task_ids='create') }}",
        soft_fail=True,
        start_from_trigger=True,
    ).set_upstream(cancel)

with DAG("policies", default_args={"provider": "local"}):
    with TaskGroup("group"):
        AnyBatchOperator(
            task_id="partial",
            input=requests("delay=20", rows=60),
            output=OUTPUT + "/policies/{{ run_id }}/partial",
            timeout=3,
            on_timeout="land_partial",
            max_failed_ratio=1.0,
        )
    AnyBatchOperator(
        task_id="table",
        input=[{"key": "a", "text": "Hello {{ ti }}"}, {"key": "b", "text": "World"}],
        prompt="Say {text}",
        id_column="key",
        model="local:echo?delay=0.5",
        output=OUTPUT + "/policies/{{ run_id }}/table",
        deferrable=False,
        pool="default_pool",
        retries=1,
    )

with DAG("failed", default_args={"provider": "local"}):
    strict = AnyBatchOperator(
        task_id="strict",
        input=requests("delay=0.5&fail=0.5", rows=20),
        output=OUTPUT + "/failed/{{ run_id }}",
        on_partial="fail",
        retries=3,
    )

    @task(trigger_rule="all_done")
    def count(manifest: dict[str, Any]) -> int:
        return int(manifest["counts"]["failed"])

    count(strict.output)
