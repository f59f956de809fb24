"""Whole DAGs through `dag.test()`: Airflow's own task runner and API, triggers run inline."""

from __future__ import annotations

import contextlib
import csv
import json
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import Client

from .conftest import EXAMPLES, HERE, HOME
from .versions import DagBag

if TYPE_CHECKING:
    from pathlib import Path

DAGS = HERE / "dags"


def run(path: Path, dag_id: str, state: str = "success") -> None:
    """Run a DAG of that file to its end."""
    bag = DagBag(dag_folder=str(path))
    assert not bag.import_errors
    assert bag.dags[dag_id].test().state == state


def stored(*tables: str) -> str:
    """All that the metadata database holds in these tables, as text."""
    with contextlib.closing(sqlite3.connect(HOME / "airflow.db")) as database:
        return "\n".join(str(row) for table in tables for row in database.execute(f"SELECT * FROM {table}"))


def test_the_example_classifies_its_table(settings: Path) -> None:
    run(EXAMPLES / "airflow" / "classify_operations.py", "classify_operations")
    [joined] = settings.glob("*/joined.csv")
    with joined.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2400
    assert {row["outcome"] for row in rows} == {"succeeded", "failed"}
    categories = {row["category"] for row in rows if row["outcome"] == "succeeded"}
    assert categories == {"read", "write", "delete", "admin"}
    with Client("local") as client:
        assert len(client.list()) == 1


def manifests(settings: Path, pattern: str) -> list[dict[str, Any]]:
    """The reports that lie there, in the order of their paths."""
    return [json.loads(path.read_text()) for path in sorted(settings.glob(f"{pattern}/report.json"))]


def test_the_example_in_three_tasks(settings: Path) -> None:
    run(EXAMPLES / "airflow" / "submit_wait_land.py", "submit_wait_land")
    [report] = manifests(settings, "squares/*")
    assert report["rows"] == 20
    with Client("local") as client:
        [batch] = client.list()
    assert [one["id"] for one in report["batches"]] == [batch.id]


def test_the_example_that_cancels(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYBATCH_PATIENCE", "1")
    run(EXAMPLES / "airflow" / "spend_no_more.py", "spend_no_more")
    with Client("local") as client:
        [batch] = client.list()
    assert batch.status == "cancelled"
    [report] = manifests(settings, "no_more/*")
    assert report["counts"]["cancelled"] == report["rows"] == 20


def test_the_example_with_the_decorator(settings: Path) -> None:
    run(EXAMPLES / "airflow" / "decorated.py", "decorated")
    reports = manifests(settings, "summaries/*/*")
    assert [report["rows"] for report in reports] == [12, 12]
    # The rows, and the prompts made of them, are in the batch and nowhere else.
    told = stored("xcom", "rendered_task_instance_fields", "serialized_dag", "trigger", "log")
    assert "Amazon Kinesis Analytics" in told
    assert "load balancer" not in told


def test_the_example_with_one_job_a_file(settings: Path) -> None:
    run(EXAMPLES / "airflow" / "one_job_a_file.py", "one_job_a_file")
    assert [report["rows"] for report in manifests(settings, "facts/*/*")] == [1, 1, 1]


def test_the_example_of_an_asset_is_skipped_without_an_event(settings: Path) -> None:
    """Its run by an event needs a triggerer and a scheduler: test_watching.py."""
    run(EXAMPLES / "airflow" / "scheduled_by_batches.py", "scheduled_by_batches")
    assert not list(settings.glob("nightly/*"))


def test_a_function_an_xcom_and_a_sensor(settings: Path) -> None:
    run(DAGS / "waiting.py", "one")
    assert sorted(path.name for path in settings.glob("*/*/results.jsonl")) == ["results.jsonl"] * 2
    # What one task gives another through XCom is there to be seen; nowhere else is a prompt.
    told = stored("rendered_task_instance_fields", "serialized_dag", "trigger", "log")
    assert "<make_requests()>" in told
    assert "<2 requests>" in told
    assert "a prompt that nobody else should see" not in told


def test_a_mapped_operator_has_one_job_for_each_input(settings: Path) -> None:
    run(DAGS / "waiting.py", "mapped")
    reports = [json.loads(path.read_text()) for path in sorted(settings.glob("mapped/*/*/report.json"))]
    assert [report["rows"] for report in reports] == [1, 2]
    assert len({report["job"] for report in reports}) == 2
    with Client("local") as client:
        assert len(client.list()) == 2


def test_bad_input_fails_the_run_without_a_batch(settings: Path) -> None:
    run(DAGS / "waiting.py", "refused", state="failed")
    with Client("local") as client:
        assert len(client.list()) == 0
