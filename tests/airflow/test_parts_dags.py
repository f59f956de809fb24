"""DAGs of create, wait, land and cancel as tasks of their own, through `dag.test()`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from anybatch import Client

from .conftest import HERE
from .versions import DagBag

if TYPE_CHECKING:
    from pathlib import Path

PARTS = HERE / "dags" / "parts.py"


def run(dag_id: str) -> dict[str, Any]:
    """Run a DAG to its end; its task instances by task id."""
    bag = DagBag(dag_folder=str(PARTS))
    assert not bag.import_errors
    return {ti.task_id: ti for ti in bag.dags[dag_id].test().get_task_instances()}


def states(instances: dict[str, Any]) -> dict[str, str]:
    return {task_id: str(ti.state) for task_id, ti in instances.items()}


def xcom(ti: Any, key: str = "return_value") -> Any:
    from airflow.models.xcom import XComModel

    found = XComModel.get_many(
        run_id=ti.run_id, key=key, task_ids=ti.task_id, dag_ids=ti.dag_id, map_indexes=-1
    )
    from airflow.utils.session import create_session

    with create_session() as session:
        [row] = session.scalars(found)
        return XComModel.deserialize_value(row)


def test_create_wait_and_land(settings: Path) -> None:
    instances = run("parts")
    assert set(states(instances).values()) == {"success"}
    [batch_id] = xcom(instances["create"])
    assert xcom(instances["ended"])[batch_id]["status"] == "expired"
    manifest = xcom(instances["results"])
    assert manifest["counts"]["succeeded"] + manifest["counts"]["expired"] == manifest["rows"] == 20
    assert xcom(instances["look"]) == "20 rows, 1 batch"
    [results] = settings.glob("parts/*/results.jsonl")
    assert len(results.read_text().splitlines()) == 20


def test_cancel_and_a_sensor_that_skips(settings: Path) -> None:
    instances = run("cancelled")
    assert states(instances) == {"create": "success", "cancel": "success", "skipped": "skipped"}
    [batch_id] = xcom(instances["create"])
    assert xcom(instances["cancel"])[batch_id]["status"] == "cancelled"


def test_a_deadline_that_lands_and_a_table(settings: Path) -> None:
    instances = run("policies")
    assert states(instances) == {"group.partial": "success", "table": "success"}
    partial = xcom(instances["group.partial"])
    assert partial["counts"]["succeeded"] + partial["counts"]["cancelled"] == 60
    assert 0 < partial["counts"]["succeeded"] < 60
    [landed] = settings.glob("policies/*/table/results.jsonl")
    assert [json.loads(line)["custom_id"] for line in landed.read_text().splitlines()] == ["a", "b"]
    assert "Hello {{ ti }}" in landed.read_text()  # the stand-in model says it again: it was never rendered
    with Client("local") as client:
        assert sorted(batch.status for batch in client.list()) == ["cancelled", "completed"]


def test_a_task_that_runs_after_a_failure_knows_the_counts(settings: Path) -> None:
    instances = run("failed")
    assert states(instances) == {"strict": "failed", "count": "success"}
    assert instances["strict"].try_number == 1  # a retry would read the same results
    assert xcom(instances["count"]) == xcom(instances["strict"])["counts"]["failed"] > 0
