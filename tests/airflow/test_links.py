"""Extra links: which pages they lead to, and that the API server needs nothing but their XComs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import DAG

from anybatch import get_provider
from anybatch_airflow import AnyBatchOperator
from anybatch_airflow.links import (
    BATCH_URL,
    RESULTS_URL,
    BatchLink,
    ResultsLink,
    push_links,
    results_url,
)

from .versions import DagSerialization

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import TaskInstance

OPENAI = "https://platform.openai.com/batches"


@pytest.mark.parametrize(
    ("name", "api_base", "ids", "pattern", "expected"),
    [
        ("openai", "https://api.openai.com/v1", ["batch_1"], None, f"{OPENAI}/batch_1"),
        ("openai", "https://api.openai.com/v1", ["batch_1", "batch_2"], None, OPENAI),
        ("openai", "https://eu.api.openai.com/v1", ["batch_1"], None, f"{OPENAI}/batch_1"),
        ("openai", "https://api.openai.com/v1", ["a/../b?c"], None, f"{OPENAI}/a%2F..%2Fb%3Fc"),
        ("openai", "https://api.openai.com/v1", [], None, None),
        (
            "anthropic",
            "https://api.anthropic.com",
            ["msgbatch_1"],
            None,
            "https://platform.claude.com/workspaces/default/batches",
        ),
        ("mistral", "https://api.mistral.ai", ["uuid"], None, "https://console.mistral.ai/build/batches"),
        (
            "groq",
            "https://api.groq.com/openai/v1",
            ["batch_1"],
            None,
            "https://console.groq.com/dashboard/batch",
        ),
        ("doubleword", "https://api.doubleword.ai/v1", ["b"], None, "https://app.doubleword.ai/batches/b"),
        # No link: local, unknown, a gateway, and a host that only looks like one of them.
        ("local", "sqlite:////tmp/local.db", ["batch_1"], None, None),
        ("deepinfra", "https://api.deepinfra.com/v1/openai", ["batch_1"], None, None),
        ("openai", "https://gateway.example.com/v1", ["batch_1"], None, None),
        ("openai", "https://notapi.openai.com.example.com/v1", ["batch_1"], None, None),
        ("openai", "https://evilapi.openai.com/v1", ["batch_1"], None, None),
        # A connection's own pattern wins.
        (
            "openai",
            "https://gateway.example.com/v1",
            ["b 1"],
            "https://gw/b/{batch_id}",
            "https://gw/b/b%201",
        ),
        ("openai", "https://api.openai.com/v1", ["b1", "b2"], "https://gw/all", "https://gw/all"),
    ],
)
def test_the_page_of_batches(
    name: str, api_base: str | None, ids: list[str], pattern: str | None, expected: str | None
) -> None:
    provider = get_provider(name, api_key="k", api_base=api_base)
    assert provider.console_url(ids, pattern) == expected


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/a b/run", "https://s3.console.aws.amazon.com/s3/buckets/bucket?prefix=a%20b/run/"),
        ("s3://aws_conn@bucket/x/", "https://s3.console.aws.amazon.com/s3/buckets/bucket?prefix=x/"),
        ("gs://gcp@bucket/x/y", "https://console.cloud.google.com/storage/browser/bucket/x/y"),
        ("https://files.example.com/x", "https://files.example.com/x"),
        ("/data/out/run", None),
        ("file:///data/out", None),
        ("abfs://container/x", None),
    ],
)
def test_the_page_of_results(location: str, expected: str | None) -> None:
    assert results_url(location) == expected


def test_both_links_are_pushed_and_empty_where_there_is_no_page(ti: TaskInstance) -> None:
    push_links(ti, batches=f"{OPENAI}/b", results="s3://bucket/x")
    assert ti.pushed == {BATCH_URL: f"{OPENAI}/b", RESULTS_URL: results_url("s3://bucket/x")}
    push_links(ti, batches=None, results="/data/out")
    assert ti.pushed == {BATCH_URL: "", RESULTS_URL: ""}


@dataclass
class Ending:
    """A task instance at the end of a run, as Airflow hands it to a link; `next_method` if it was resumed."""

    next_method: str | None = None
    dag_id: str = "dag"
    task_id: str = "never pushed"
    run_id: str = "run"
    map_index: int = 3

    @property
    def _ti_context_from_server(self) -> Ending:
        return self


def test_at_the_end_of_a_run_a_link_is_what_was_pushed(ti: TaskInstance) -> None:
    push_links(ti, batches=f"{OPENAI}/b", results=None)
    found: Any = ti
    assert BatchLink().get_link(None, ti_key=found) == f"{OPENAI}/b"  # type: ignore[arg-type]
    assert ResultsLink().get_link(None, ti_key=found) == ""  # type: ignore[arg-type]


def test_a_resumed_run_that_fails_at_once_keeps_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.execution_time.xcom import XCom

    asked = []

    def get_value(*, ti_key: Any, key: str) -> str:
        asked.append((ti_key.task_id, key))
        return f"{OPENAI}/b"

    monkeypatch.setattr(XCom, "get_value", get_value)
    first: Any = Ending()
    assert BatchLink().get_link(None, ti_key=first) == ""  # type: ignore[arg-type]
    assert asked == []  # nothing can have been pushed
    resumed: Any = Ending(next_method="execute_complete")
    assert BatchLink().get_link(None, ti_key=resumed) == f"{OPENAI}/b"  # type: ignore[arg-type]
    assert asked == [("never pushed", BATCH_URL)]


def test_a_serialized_dag_has_the_links_without_our_code(make_requests: Callable[..., Any]) -> None:
    """What the API server has: names and XCom keys."""
    with DAG("linked", schedule=None) as dag:
        AnyBatchOperator(task_id="job", provider="local", input=make_requests(1), output="out")
        AnyBatchOperator.partial(task_id="mapped", provider="local", output="o").expand(input=["a", "b"])
    stored = DagSerialization.to_dict(dag)
    json.dumps(stored)
    expected = {"Batch at the provider": BATCH_URL, "Results": RESULTS_URL}
    for task in stored["dag"]["tasks"]:
        assert task["__var"]["_operator_extra_links"] == expected
    again = DagSerialization.from_dict(stored)
    for task_id in ("job", "mapped"):
        found = {link.name: link.xcom_key for link in again.get_task(task_id).operator_extra_links}
        assert found == expected


def test_names_and_keys_are_pinned() -> None:
    """They are stored in the database of every deployment."""
    assert (BatchLink().name, BatchLink().xcom_key) == ("Batch at the provider", "batch_url")
    assert (ResultsLink().name, ResultsLink().xcom_key) == ("Results", "results_url")
