"""A job in three tasks: submit, wait, land.

This is for DAGs whose steps belong to different teams or systems. One `AnyBatchOperator` does all three, can
submit failed rows again, and has a line for every row.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG

from anybatch_airflow import AnyBatchCreateOperator, AnyBatchResultsOperator, AnyBatchSensor

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
MODEL = os.environ.get("ANYBATCH_MODEL", "local:echo?delay=5")
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{Path(__file__).resolve().parents[2]}/out/airflow"


def make_requests() -> Iterator[dict[str, Any]]:
    for number in range(1, 21):
        question = f"What is {number} times {number}?"
        body = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
        yield {"custom_id": f"square-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


with DAG("submit_wait_land", is_paused_upon_creation=False, tags=["anybatch", "example"]):
    submit = AnyBatchCreateOperator(task_id="submit", provider=PROVIDER, input=make_requests)
    wait = AnyBatchSensor(task_id="wait", provider=PROVIDER, batch_id=submit.output)
    land = AnyBatchResultsOperator(
        task_id="land",
        provider=PROVIDER,
        batch_id=submit.output,
        output=OUTPUT + "/squares/{{ run_id }}",
    )
    submit >> wait >> land
