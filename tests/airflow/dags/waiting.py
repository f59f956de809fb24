"""DAGs that the tests run, by `dag.test()` and on a real deployment."""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import DAG, get_current_context, task

from anybatch_airflow import AnyBatchOperator, AnyBatchSensor

OUTPUT = os.environ.get("ANYBATCH_OUTPUT", "/tmp/anybatch-tests")
PROMPT = "a prompt that nobody else should see {{ ti }}"
KEYED = "canary"  # a connection with a key that nobody else should see


def requests(wish: str = "delay=0.4", rows: int = 3, prompt: str = PROMPT) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": f"local:echo?{wish}",
                "messages": [{"role": "user", "content": f"{prompt} {number}"}],
            },
        }
        for number in range(rows)
    ]


def make_requests() -> list[dict[str, Any]]:
    return requests()


with DAG("one", is_paused_upon_creation=False):
    job = AnyBatchOperator(
        task_id="job", provider="local", input=make_requests, output=OUTPUT + "/one/{{ run_id }}"
    )
    AnyBatchSensor(
        task_id="seen",
        provider="local",
        batch_id="{{ ti.xcom_pull(task_ids='job', key='batch_ids')[0] }}",
    ).set_upstream(job)

    @task
    def given() -> list[dict[str, Any]]:
        return requests(rows=2)

    AnyBatchOperator(
        task_id="from_xcom", provider="local", input=given(), output=OUTPUT + "/xcom/{{ run_id }}"
    )

with DAG("mapped", is_paused_upon_creation=False):
    AnyBatchOperator.partial(
        task_id="each", provider="local", output=OUTPUT + "/mapped/{{ run_id }}/{{ ti.map_index }}"
    ).expand(input=[requests(rows=1, prompt="Hello"), requests(rows=2, prompt="Hello")])

with DAG("named", is_paused_upon_creation=False):

    @task.anybatch(
        provider="local",
        map_index_template="{{ country }}",
        output=OUTPUT + "/named/{{ run_id }}/{{ ti.task_id }}/{{ ti.map_index }}",
    )
    def by_argument(country: str, rows: int) -> list[dict[str, Any]]:
        return requests("delay=12", rows=rows, prompt=country)

    @task
    def countries() -> list[str]:
        return ["de", "fr"]

    by_argument.partial(rows=2).expand(country=countries())

    def market_requests() -> list[dict[str, Any]]:
        context: Any = get_current_context()
        context["market"] = f"market {context['ti'].map_index}"  # as Airflow's guide to named mapping does
        return requests("delay=12", rows=2)

    AnyBatchOperator.partial(
        task_id="by_context", provider="local", map_index_template="{{ market }}", input=market_requests
    ).expand(output=[OUTPUT + "/named/{{ run_id }}/by_context/" + name for name in ("a", "b")])

with DAG("refused", is_paused_upon_creation=False):
    AnyBatchOperator(
        task_id="bad_input",
        provider="local",
        input=[{"custom_id": "a"}],
        output=OUTPUT + "/refused/{{ run_id }}",
    )

with DAG("twenty", is_paused_upon_creation=False, max_active_tasks=100):
    for index in range(20):
        AnyBatchOperator(
            task_id=f"wait_{index:02}",
            provider="local",
            input=requests("delay=60"),
            output=OUTPUT + f"/twenty/{{{{ run_id }}}}/{index:02}",
        )

with DAG("held", is_paused_upon_creation=False):
    AnyBatchOperator(
        task_id="job",
        provider="local",
        input=requests("delay=30", rows=40),
        output=OUTPUT + "/held/{{ run_id }}",
        deferrable=False,
        retries=2,
    )

with DAG("patient", is_paused_upon_creation=False):
    AnyBatchOperator(task_id="job", conn_id=KEYED, input=requests(), output=OUTPUT + "/patient/{{ run_id }}")

with DAG("keyed", is_paused_upon_creation=False):
    AnyBatchOperator(
        task_id="good",
        conn_id=KEYED,
        input=requests("delay=15"),
        output=OUTPUT + "/keyed/{{ run_id }}/good",
    )
    AnyBatchOperator(
        task_id="refused",
        conn_id=KEYED,
        input=requests("delay=1&invalid=token_limit_exceeded"),
        output=OUTPUT + "/keyed/{{ run_id }}/refused",
    )
    AnyBatchSensor(task_id="absent", conn_id=KEYED, batch_id="batch_that_is_not_there")
