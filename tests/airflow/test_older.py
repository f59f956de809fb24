"""A real deployment of an Airflow before 3.3: waiting deferred, and what people do to a task that waits.

Run by `make airflow-versions`. For 3.3 the same is in `cluster`.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .conftest import HERE
from .versions import AIRFLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from tests.fakes.provider import FakeBatch

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.skipif(
        AIRFLOW >= (3, 3), reason="from Airflow 3.3 on a kill cancels; see tests/airflow/cluster"
    ),
]
KEY = "sk-older"


class World:
    """A running Airflow, the provider it talks to, and the runs of one job."""

    def __init__(self, root: Path, airflow: Any, server: FakeServer, fake: OpenAIFake) -> None:
        self.root, self.airflow, self.server, self.fake = root, airflow, server, fake

    def start(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.airflow.trigger("patient", run_id)

    def task(self, run_id: str) -> dict[str, Any]:
        [task] = self.airflow.task_instances("patient", run_id)
        return dict(task)

    def batches(self, run_id: str) -> list[FakeBatch]:
        job = f"airflow:patient/job/{run_id}"
        return [one for one in self.fake.batches.values() if (one.metadata or {})["anybatch_job"] == job]

    def until_watched(self, run_id: str, attempt: int = 1) -> FakeBatch:
        """The batch that this attempt waits for, once a trigger has looked at it."""
        self.until(
            f"attempt {attempt} of {run_id} is deferred",
            lambda: (self.task(run_id)["state"], self.task(run_id)["try_number"]) == ("deferred", attempt),
        )
        [batch] = self.batches(run_id)
        seen = batch.looks
        self.until(f"the batch of {run_id} is looked at", lambda: batch.looks > seen)
        return batch

    def clear(self, run_id: str) -> None:
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": ["job"], "only_failed": False}
        self.airflow.api("POST", "/api/v2/dags/patient/clearTaskInstances", body)

    def mark(self, run_id: str, state: str) -> None:
        path = f"/api/v2/dags/patient/dagRuns/{run_id}/taskInstances/job"
        self.airflow.api("PATCH", path, {"new_state": state})

    def check_landed(self, run_id: str) -> None:
        """The run has succeeded with one batch, and all its rows are there."""
        assert self.airflow.wait_for_run("patient", run_id, timeout=120) == "success"
        [batch] = self.batches(run_id)
        manifest = self.airflow.xcom("patient", run_id, "job")
        assert manifest["batch_ids"] == [batch.id]
        assert manifest["counts"]["succeeded"] == manifest["rows"] == 3
        report = json.loads((self.root / "out" / "patient" / run_id / "report.json").read_text())
        assert report["rows"] == 3

    def until(self, what: str, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not in {timeout} s: {what}\n{self.airflow.log_tail(40)}"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def world(stack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("older")
    fake = OpenAIFake(key=KEY)
    with FakeServer(fake) as server:
        connection = {"conn_type": "openai", "password": KEY, "host": server.api_base}
        env = {
            "AIRFLOW_CONN_CANARY": json.dumps(connection),
            "ANYBATCH_OUTPUT": str(root / "out"),
            "XDG_STATE_HOME": str(root / "state"),
        }
        with stack.AirflowStack(root / "airflow", HERE / "dags", parallelism=3, env=env) as airflow:
            yield World(root, airflow, server, fake)


def test_waiting_and_what_is_done_to_a_task_that_waits(world: World) -> None:
    """Three runs at once, as each has to wait for the same things."""
    world.airflow.trigger("one", "local")
    world.start("plain", "cleared", "marked")
    plain, cleared, marked = map(world.until_watched, ("plain", "cleared", "marked"))
    world.until("no slot is held", lambda: world.airflow.busy_slots() == 0)
    world.fake.finish(plain.id)

    world.clear("cleared")
    world.mark("marked", "failed")
    assert world.until_watched("cleared", attempt=2) is cleared
    world.fake.finish(cleared.id)

    # No trigger hears of the mark, so the batch runs on, until somebody clears the task.
    assert world.airflow.wait_for_run("patient", "marked", timeout=60) == "failed"
    assert marked.is_live
    world.clear("marked")
    assert world.until_watched("marked", attempt=2) is marked
    world.fake.finish(marked.id)

    for run_id in ("plain", "cleared", "marked"):
        world.check_landed(run_id)
    assert [world.task(run_id)["try_number"] for run_id in ("plain", "cleared", "marked")] == [1, 2, 2]
    assert world.server.count("POST", "/v1/batches/.*/cancel") == 0
    # Create by a function, by an XCom, and a sensor, on the local provider.
    assert world.airflow.wait_for_run("one", "local", timeout=120) == "success"
