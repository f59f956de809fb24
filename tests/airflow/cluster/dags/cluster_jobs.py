"""One DAG for each way to run a job; the provider's address comes with the run."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from anybatch.providers.base import Limits
from anybatch.providers.compatible import DIALECTS
from anybatch_airflow import (
    AnyBatchCancelOperator,
    AnyBatchCreateOperator,
    AnyBatchOperator,
    AnyBatchResultsOperator,
    AnyBatchSensor,
)

REQUESTS = [
    {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-5-mini", "messages": [{"role": "user", "content": f"say {number}"}]},
    }
    for number in range(5)
]
ACCOUNT: dict[str, Any] = {"conn_id": "provider", "api_base": "{{ dag_run.conf['api_base'] }}"}
OUTPUT = os.environ["ANYBATCH_OUTPUT"] + "/{{ run_id }}"

# A provider whose batches hold two rows: the requests make three of them.
_ROW = DIALECTS["openai-compatible"]
DIALECTS["openai-compatible"] = replace(_ROW, traits=replace(_ROW.traits, limits=Limits(requests=2)))

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_slot": {"deferrable": False},
    "deleted": {},
    "doomed": {"queue": "doomed"},
    "doomed_slot": {"queue": "doomed", "deferrable": False},
    "doomed_twice": {"queue": "doomed", "max_rounds": 2},
    "doomed_cancel": {"queue": "doomed", "timeout": 30, "on_timeout": "cancel"},
    "doomed_land": {"queue": "doomed", "timeout": 30, "on_timeout": "land_partial"},
    # A worker's own disk.
    "doomed_alone": {"queue": "doomed", "output": OUTPUT + "/" + os.environ["CLUSTER_HOST"]},
    "brief": {"execution_timeout": timedelta(seconds=15)},
    "brief_slot": {"execution_timeout": timedelta(seconds=15), "deferrable": False},
    "twice": {"max_rounds": 2},
    "sharded": {"provider": "openai-compatible"},
    "late_leave": {"timeout": 30, "on_timeout": "leave", "retry_delay": timedelta(seconds=10)},
    "late_cancel": {"timeout": 40, "on_timeout": "cancel"},
    "late_land": {"timeout": 30, "on_timeout": "land_partial"},
}
COMMON: dict[str, Any] = {
    "is_paused_upon_creation": False,
    "max_active_runs": 64,
    "default_args": {"retries": 5, "retry_delay": timedelta(0)},
}

for name, options in VARIANTS.items():
    with DAG(name, **COMMON):
        AnyBatchOperator(task_id="job", input=REQUESTS, **{"output": OUTPUT, **ACCOUNT, **options})

with DAG("hurried", is_paused_upon_creation=False, dagrun_timeout=timedelta(minutes=30)):
    AnyBatchOperator(task_id="job", input=REQUESTS, output=OUTPUT, **ACCOUNT)

with DAG("mapped", **COMMON):
    AnyBatchOperator.partial(
        task_id="job",
        conn_id="provider",
        api_base="{{ dag_run.conf['api_bases'][ti.map_index] }}",
        output=OUTPUT + "/{{ ti.map_index }}",
    ).expand(input=[REQUESTS, REQUESTS, REQUESTS])

with DAG("steps", **COMMON):
    create = AnyBatchCreateOperator(task_id="create", input=REQUESTS, **ACCOUNT)
    ids = create.output
    wait = AnyBatchSensor(task_id="wait", batch_id=ids, **ACCOUNT)
    land = AnyBatchResultsOperator(task_id="land", batch_id=ids, output=OUTPUT, **ACCOUNT)
    cancel = AnyBatchCancelOperator(
        task_id="cancel", batch_id=ids, wait_for_end=True, trigger_rule="one_failed", **ACCOUNT
    )
    land_rest = AnyBatchResultsOperator(task_id="land_rest", batch_id=ids, output=OUTPUT + "/rest", **ACCOUNT)
    wait.set_downstream([land, cancel])
    cancel.set_downstream(land_rest)
