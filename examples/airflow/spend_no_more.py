"""Wait for an hour, then take what is finished and cancel the rest.

Rows that a batch finished before it was cancelled are paid for, and can still be read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG

from anybatch_airflow import (
    AnyBatchCancelOperator,
    AnyBatchCreateOperator,
    AnyBatchResultsOperator,
    AnyBatchSensor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
PATIENCE = float(os.environ.get("ANYBATCH_PATIENCE", "3600"))
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{Path(__file__).resolve().parents[2]}/out/airflow"


def make_requests() -> Iterator[dict[str, Any]]:
    for number in range(1, 21):
        model = "local:echo?delay=7200"  # two hours, which is too long
        body = {"model": model, "messages": [{"role": "user", "content": f"Take your time, {number}"}]}
        yield {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


with DAG("spend_no_more", is_paused_upon_creation=False, tags=["anybatch", "example"]):
    submit = AnyBatchCreateOperator(task_id="submit", provider=PROVIDER, input=make_requests)
    wait = AnyBatchSensor(
        task_id="wait", provider=PROVIDER, batch_id=submit.output, timeout=PATIENCE, soft_fail=True
    )
    cancel = AnyBatchCancelOperator(
        task_id="cancel",
        provider=PROVIDER,
        batch_id=submit.output,
        wait_for_end=True,
        trigger_rule="all_done",  # a batch that has ended is left as it is
    )
    land = AnyBatchResultsOperator(
        task_id="land",
        provider=PROVIDER,
        batch_id=submit.output,
        output=OUTPUT + "/no_more/{{ run_id }}",
        max_failed_ratio=1,  # succeed however few rows there are
    )
    submit >> wait >> cancel >> land
