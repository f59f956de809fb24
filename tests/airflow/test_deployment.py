"""A real scheduler, triggerer, API server and executor; minutes, not seconds. See also `cluster`."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import Client

from .conftest import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

pytestmark = pytest.mark.deployment

CANARY = "sk-canary-0d5e7b1c9f3a48e2"
PARALLELISM = 2


class World:
    """A running Airflow, the embedded provider's database, and a server that wants a key."""

    def __init__(self, root: Path, airflow: Any, serve_log: Path) -> None:
        self.root = root
        self.airflow = airflow
        self.serve_log = serve_log

    @property
    def output(self) -> Path:
        return self.root / "out"

    def client(self) -> Client:
        """The provider's own record of what was created and cancelled."""
        return Client("local", api_base=f"sqlite:///{self.root}/state/anybatch/local.db")

    def batches(self, job: str) -> list[Any]:
        """The batches made for a job whose id begins so."""
        with self.client() as client:
            page = client.list(limit=100)
            assert not page.has_more
            return [batch for batch in page if (batch.metadata or {})["anybatch_job"].startswith(job)]

    def states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        found = self.airflow.task_instances(dag_id, run_id)
        return {instance["task_id"]: instance["state"] for instance in found}


@pytest.fixture(scope="module")
def world(stack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("deployment")
    port = stack.free_port()
    connection = f"openai-compatible://:{CANARY}@/?" + urllib.parse.urlencode(
        {"provider": "openai-compatible", "api_base": f"http://127.0.0.1:{port}/v1"}
    )
    env = {
        "AIRFLOW_CONN_CANARY": connection,
        "ANYBATCH_OUTPUT": str(root / "out"),
        "XDG_STATE_HOME": str(root / "state"),
    }
    with contextlib.ExitStack() as ending:
        serve_log = root / "serve.log"
        ending.enter_context(serving(port, root / "served.db", serve_log))
        airflow = stack.AirflowStack(root / "airflow", HERE / "dags", parallelism=PARALLELISM, env=env)
        yield World(root, ending.enter_context(airflow), serve_log)


@contextlib.contextmanager
def serving(port: int, database: Path, log: Path) -> Iterator[None]:
    """`anybatch serve`, which answers nobody without the canary key."""
    command = [sys.executable, "-m", "anybatch.cli", "serve", "--port", str(port), "--db", str(database),
               "--api-key-env", "SERVED_KEY"]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"SERVED_KEY": CANARY},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- slots are free -----------------------------------------------------------------------------------


def test_twenty_waiting_tasks_share_two_slots(world: World) -> None:
    airflow = world.airflow
    airflow.trigger("twenty", "slots")
    deferred, processes = Counter[int](), Counter[int]()

    def look() -> None:
        states = Counter(world.states("twenty", "slots").values())
        deferred[states["deferred"]] += 1
        processes[airflow.task_processes()] += 1

    assert airflow.wait_for_run("twenty", "slots", timeout=420, each=look) == "success"
    instances = airflow.task_instances("twenty", "slots")
    took = max(map(_ended, instances)) - min(map(_started, instances))
    print(f"20 tasks on {PARALLELISM} slots: {took:.0f} s; waiting at once: {max(deferred)}")
    assert took < 240
    # Two slots, and far more than two batches waited for at the same time.
    assert max(processes) <= PARALLELISM
    assert max(deferred) >= 10
    batches = world.batches("airflow:twenty/")
    assert len(batches) == 20
    assert {batch.status for batch in batches} == {"completed"}
    assert len({batch.metadata["anybatch_job"] for batch in batches}) == 20
    assert len(list(world.output.glob("twenty/slots/*/report.json"))) == 20
    assert all(instance["try_number"] == 1 for instance in instances)


def _started(instance: dict[str, Any]) -> float:
    return datetime.fromisoformat(instance["start_date"]).timestamp()


def _ended(instance: dict[str, Any]) -> float:
    return datetime.fromisoformat(instance["end_date"]).timestamp()


# --- mapped tasks have names --------------------------------------------------------------------------


def test_a_mapped_task_has_its_name_after_the_wait(world: World) -> None:
    """FAULTS I1: what the template names was in the context on submission alone, and Airflow, which renders
    it once more at the end, failed a task whose batch was paid and landed."""
    airflow = world.airflow
    airflow.trigger("named", "names")
    deferred: set[tuple[str, int]] = set()

    def look() -> None:
        for one in airflow.task_instances("named", "names"):
            if one["state"] == "deferred":
                deferred.add((one["task_id"], one["map_index"]))

    assert airflow.wait_for_run("named", "names", timeout=300, each=look) == "success"
    found = {
        (one["task_id"], one["map_index"]): one["rendered_map_index"]
        for one in airflow.task_instances("named", "names")
        if one["task_id"] != "countries"
    }
    assert found == {
        ("by_argument", 0): "de",
        ("by_argument", 1): "fr",
        ("by_context", 0): "market 0",
        ("by_context", 1): "market 1",
    }
    assert deferred == set(found)
    for task_id, index in found:
        assert airflow.xcom("named", "names", task_id, map_index=index)["counts"]["succeeded"] == 2
    assert len(world.batches("airflow:named/")) == 4


# --- killed on a worker ------------------------------------------------------------------------------


def held(world: World, run_id: str) -> Any:
    """A run whose task waits on a worker for a batch of which some rows are done; its batch."""
    world.airflow.trigger("held", run_id)
    until("rows are done", lambda: [one for one in made(world, run_id) if one.request_counts.completed > 2])
    assert world.states("held", run_id) == {"job": "running"}
    [batch] = made(world, run_id)
    return batch


def made(world: World, run_id: str) -> list[Any]:
    """The batches of a run, oldest first."""
    return sorted(world.batches(f"airflow:held/job/{run_id}"), key=lambda batch: batch.created_at)


def clear(world: World, run_id: str) -> None:
    body = {"dry_run": False, "dag_run_id": run_id, "task_ids": ["job"], "only_failed": False}
    world.airflow.api("POST", "/api/v2/dags/held/clearTaskInstances", body)


def until(what: str, is_true: Callable[[], object], timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < end, f"not after {timeout:.0f} s: {what}"
        time.sleep(0.5)


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_task_that_is_ended_on_a_worker_cancels_its_batch(world: World, state: str) -> None:
    run_id = f"ended-{state}"
    held(world, run_id)
    path = f"/api/v2/dags/held/dagRuns/{run_id}/taskInstances/job"
    world.airflow.api("PATCH", path, {"new_state": state})
    until("the batch is cancelled", lambda: made(world, run_id)[0].status == "cancelled")
    until("the process has ended", lambda: world.airflow.task_processes() == 0)
    assert world.states("held", run_id) == {"job": state}
    clear(world, run_id)
    assert world.airflow.wait_for_run("held", run_id, timeout=240) == "success"
    first, second = made(world, run_id)
    assert (first.status, second.status) == ("cancelled", "completed")
    manifest = world.airflow.xcom("held", run_id, "job")
    assert manifest["counts"]["succeeded"] == manifest["rows"] == 40
    assert second.request_counts.total == 40 - first.request_counts.completed < 40


def test_a_task_that_is_cleared_on_a_worker_keeps_its_batch(world: World) -> None:
    batch = held(world, "cleared")
    clear(world, "cleared")
    assert world.airflow.wait_for_run("held", "cleared", timeout=240) == "success"
    assert world.airflow.task_instances("held", "cleared")[0]["try_number"] > 1
    assert world.airflow.xcom("held", "cleared", "job")["batch_ids"] == [batch.id]
    assert [one.status for one in made(world, "cleared")] == ["completed"]


def test_a_task_whose_folder_is_gone_does_not_pay_again(world: World) -> None:
    batch = held(world, "lost")
    shutil.rmtree(world.output / "held" / "lost")  # as if the next attempt were on another machine
    clear(world, "lost")
    assert world.airflow.wait_for_run("held", "lost", timeout=240) == "failed"
    assert world.airflow.task_instances("held", "lost")[0]["try_number"] == 2  # of four
    assert [one.id for one in made(world, "lost")] == [batch.id]
    [log] = (world.root / "airflow").rglob("run_id=lost/**/attempt=2.log")
    assert f"has no record of this task's batches, {batch.id}" in log.read_text()


# --- the key ------------------------------------------------------------------------------------------


def test_a_key_shows_nowhere(world: World) -> None:
    airflow = world.airflow
    airflow.trigger("keyed", "search")
    triggers: set[str] = set()

    def look() -> None:
        triggers.update(_stored_triggers(world))

    assert airflow.wait_for_run("keyed", "search", timeout=240, each=look) == "failed"
    assert world.states("keyed", "search") == {"good": "success", "refused": "failed", "absent": "failed"}
    manifest = airflow.xcom("keyed", "search", "good")
    assert manifest["provider"] == "openai-compatible"  # with the key, or the server would have refused
    [batch_id] = manifest["batch_ids"]

    texts = dict(_texts(world)) | {"triggers": "\n".join(triggers).encode()}
    # The search looks in the right places: what must be there is found there.
    for place, known in {
        "airflow.db": batch_id,
        "task_id=good/attempt=1.log": batch_id,
        "task_id=refused/attempt=1.log": "token_limit_exceeded",
        "task_id=absent/attempt=1.log": "batch_that_is_not_there",
        "good/job.json": batch_id,
        "good/report.json": batch_id,
        "good/results.jsonl": "row-0",
        "triggers": batch_id,
        "scheduler.log": "keyed",
        "triggerer.log": "trigger",
    }.items():
        assert any(known.encode() in text for name, text in texts.items() if place in name), place
    forms = {CANARY.encode(), base64.b64encode(CANARY.encode()), CANARY[::-1].encode(), CANARY[3:].encode()}
    found = [(name, form) for name, text in texts.items() for form in forms if form in text]
    assert not found


def _texts(world: World) -> Iterator[tuple[str, bytes]]:
    """Everything that Airflow and anybatch have written: database, logs, job folders, server log."""
    for folder in (world.root / "airflow", world.output):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()
    yield str(world.serve_log), world.serve_log.read_bytes()


def _stored_triggers(world: World) -> Iterator[str]:
    """The triggers as the metadata database has them."""
    with contextlib.closing(sqlite3.connect(world.airflow.home / "airflow.db", timeout=30)) as database:
        for path, kwargs in database.execute("SELECT classpath, kwargs FROM trigger"):
            yield f"{path} {kwargs}"
