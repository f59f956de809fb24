"""Operators and sensors, as a DAG's author writes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

from airflow.sdk import DAG, task

from anybatch import Client
from anybatch_airflow import (
    AnyBatchCancelOperator,
    AnyBatchCreateOperator,
    AnyBatchHook,
    AnyBatchOperator,
    AnyBatchResultsOperator,
    AnyBatchSensor,
    BatchCompletedTrigger,
)

with DAG("typed"):
    whole = AnyBatchOperator(
        task_id="whole",
        provider="openai",
        model="gpt-4o-mini",
        input="s3://bucket/{{ ds }}.csv",
        prompt="What is {text}?",
        id_column="id",
        output="s3://bucket/out/{{ ds }}/",
        max_rounds=2,
        timeout=timedelta(hours=26),
        on_timeout="cancel",
        on_lost="land",
    )
    create = AnyBatchCreateOperator(task_id="create", conn_id="openai_default", input="in.jsonl")
    wait = AnyBatchSensor(task_id="wait", conn_id="openai_default", batch_id=create.output)
    land = AnyBatchResultsOperator(
        task_id="land", conn_id="openai_default", batch_id=create.output, output="/out"
    )
    cancel = AnyBatchCancelOperator(task_id="cancel", conn_id="openai_default", batch_id=create.output)
    _ = create >> wait >> land >> cancel


def hook_and_trigger() -> None:
    with AnyBatchHook("openai_default").get_client() as client:
        assert_type(client, Client)
    BatchCompletedTrigger(conn_id="openai_default")


def made_by_a_function() -> list[dict[str, Any]]:
    return [{"custom_id": "1"}]


# What `@task.anybatch` takes is not seen by a checker: Airflow finds decorators at run time.
decorated = task.anybatch(provider="openai", output="/out")(made_by_a_function)
