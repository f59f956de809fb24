"""A DAG that a real scheduler runs because a real triggerer saw batches end; minutes, not seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import Client

from .conftest import EXAMPLES
from .versions import AIRFLOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

pytestmark = pytest.mark.deployment
DAG_ID = "scheduled_by_batches"


class World:
    """A running Airflow with the example, and the local provider that it watches."""

    def __init__(self, root: Path, airflow: Any) -> None:
        self.root = root
        self.airflow = airflow

    def create(self, rows: int, team: str = "reviews") -> str:
        """A batch of some other system; it ends at once."""
        return create(self.root, rows, team)

    def events(self) -> Counter[str]:
        """How often each batch was told, by Airflow's own record."""
        found = self.airflow.api("GET", "/api/v2/assets/events?limit=100")["asset_events"]
        return Counter(event["extra"]["payload"]["batch_id"] for event in found)

    def landed(self, batch_id: str) -> bool:
        return (self.root / "out" / "nightly" / batch_id / "report.json").exists()

    def until(self, what: str, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not in {timeout} s: {what}\n{self.airflow.log_tail(40)}"
            time.sleep(0.5)


def create(root: Path, rows: int, team: str) -> str:
    path = root / "requests.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            body = {"model": "local:echo?delay=0", "messages": [{"role": "user", "content": f"Hi {number}"}]}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    with Client("local", api_base=f"sqlite:///{root}/state/anybatch/local.db") as client:
        batch = client.create(path, "/v1/chat/completions", metadata={"team": team})
        return client.wait(batch.id, timeout=30).id


@pytest.fixture(scope="module")
def world(stack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("watching")
    dags = root / "dags"
    dags.mkdir()
    shutil.copy(EXAMPLES / "airflow" / "scheduled_by_batches.py", dags)
    (root / "state" / "anybatch").mkdir(parents=True)
    env = {"ANYBATCH_OUTPUT": str(root / "out"), "XDG_STATE_HOME": str(root / "state")}
    with stack.AirflowStack(root / "airflow", dags, parallelism=2, env=env) as airflow:
        yield World(root, airflow)


def test_a_batch_of_another_system_runs_a_dag_once(world: World) -> None:
    """Also over a restart of the triggerer, in which another batch ends."""
    first, other = world.create(3), world.create(1, team="somebody else")
    world.until("the first batch has landed", lambda: world.landed(first))
    time_for_the_record = time.monotonic() + 10
    world.until("what was told is on record", lambda: time.monotonic() > time_for_the_record)

    second = world.create(2)
    world.airflow.restart("triggerer")
    world.until("the second batch has landed", lambda: world.landed(second), timeout=180)
    time_for_more = time.monotonic() + 10
    world.until("nothing more happens", lambda: time.monotonic() > time_for_more)

    told = world.events()
    assert set(told) == {first, second}
    if AIRFLOW >= (3, 3):  # before, no record survives a restart
        assert set(told.values()) == {1}
    assert not world.landed(other)
    reports = [json.loads(path.read_text()) for path in world.root.glob("out/nightly/*/report.json")]
    assert sorted(report["rows"] for report in reports) == [2, 3]
    runs = world.airflow.api("GET", f"/api/v2/dags/{DAG_ID}/dagRuns")["dag_runs"]
    assert {run["run_type"] for run in runs} == {"asset_triggered"}
    assert {run["state"] for run in runs} <= {"success", "running"}


def test_batches_that_end_together_all_land(world: World) -> None:
    """Airflow gives a run the first event of several that come together; the others wait for one more."""
    together = [world.create(1), world.create(1), world.create(1)]
    world.until("all have landed", lambda: all(map(world.landed, together)))
