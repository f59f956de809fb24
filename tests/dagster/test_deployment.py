"""Under a real Dagster: `dagster dev` with its daemon, queue and sensor loop, and runs in processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus

from anybatch import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.deployment]

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
DEFINITIONS = HERE / "deployed.py"


def load_stack() -> Any:
    """The class that `make demo-dagster` starts Dagster with."""
    spec = importlib.util.spec_from_file_location("dagster_stack", EXAMPLES / "dagster_stack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DagsterStack


def parked(stack: Any) -> list[dg.DagsterRun]:
    """Runs that wait behind the gate."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED], tags={"anybatch/gate": "waiting"})
    return list(stack.instance.get_runs(filters))


def batches(path: Path) -> list[Any]:
    """All that the provider has, newest first."""
    with Client("local", api_base=f"sqlite:///{path}") as client:
        return list(client.list(limit=100))


@pytest.fixture(scope="module")
def parking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A Dagster that runs one run at a time, with the gate rule; and the provider's database."""
    home = tmp_path_factory.mktemp("parking")
    database = home / "state" / "local.db"
    stack = load_stack()(
        home / "dagster",
        DEFINITIONS,
        config={
            "concurrency": {"runs": {"max_concurrent_runs": 1}},
            # Looks at its queue every second and not every five: twenty runs go through it one by one.
            "run_coordinator": {
                "module": "dagster",
                "class": "QueuedRunCoordinator",
                "config": {"dequeue_interval_seconds": 1},
            },
        },
        env={"TEST_PROVIDER": "local", "TEST_API_BASE": f"sqlite:///{database}", "TEST_DELAY": "60"},
    )
    with stack:
        yield stack, database


def test_a_backfill_over_slow_batches_needs_one_slot_and_holds_none(parking: tuple[Any, Path]) -> None:
    stack, database = parking
    parts = [f"p{number}" for number in range(10)]
    began = time.monotonic()
    backfill = stack.launch_backfill(["texts_batch", "texts", "lengths"], parts)
    looks: list[tuple[int, int]] = []  # batches that are waited for, processes that execute runs

    def over() -> Any:
        status = stack.instance.get_backfill(backfill).status
        return status if status is not BulkActionStatus.REQUESTED else None

    def look() -> None:
        looks.append((len(parked(stack)), stack.run_processes()))

    status = stack.until(over, "backfill", 300, each=look, pause=2)
    took, most = time.monotonic() - began, max(waiting for waiting, _ in looks)
    print(f"\nbackfill of 10 partitions, 60 s batches: {took:.0f} s; up to {most} waited at once")
    assert status is BulkActionStatus.COMPLETED_SUCCESS
    assert len(batches(database)) == 10
    assert {batch.status.value for batch in batches(database)} == {"completed"}
    assert most >= 3
    # The one that is allowed to run, and one that has ended and is about to exit.
    assert max(processes for _, processes in looks) <= 2
    for asset in ("texts", "lengths"):
        assert stack.instance.get_materialized_partitions(dg.AssetKey(asset)) == set(parts)


def test_terminating_a_parked_run_cancels_the_batch(parking: tuple[Any, Path]) -> None:
    stack, database = parking
    stack.launch_job("job_endless")
    (run,) = stack.until(lambda: parked(stack), "parking", 90)
    stack.until(lambda: stack.run_processes() == 0, "no process while it waits", 20)
    stack.terminate(run.run_id)

    def cancelled() -> bool:
        return batches(database)[0].status.value in ("cancelling", "cancelled")

    stack.until(cancelled, "cancel at the provider", 60)
    assert stack.run(run.run_id).status is dg.DagsterRunStatus.CANCELED


KEY = "canary-0f3c9a7e51"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An OpenAI-compatible batch server that wants the key; its base URL."""
    command = [
        sys.executable,
        "-m",
        "anybatch.cli",
        "serve",
        "--port",
        "0",
        "--db",
        str(tmp_path / "served.db"),
    ]
    process = subprocess.Popen(
        [*command, "--api-key-env", "SERVER_KEY"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SERVER_KEY": KEY},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[2]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_unparked_a_whole_job_ends_and_no_key_is_left_anywhere(server: str, tmp_path: Path) -> None:
    """Also with a wrong key in the code, whose refusal the logs tell of."""
    stack = load_stack()(
        tmp_path / "dagster",
        DEFINITIONS,
        config={"concurrency": {"runs": {"tag_concurrency_limits": []}}},
        env={
            "TEST_PROVIDER": "openai-compatible",
            "TEST_API_BASE": server,
            "TEST_KEY": KEY,
            "TEST_DELAY": "12",
        },
    )
    with stack:
        refused = stack.launch_job("job_refused")
        secret = stack.launch_job("job_secret")

        def event() -> Any:
            return stack.instance.get_latest_materialization_event(dg.AssetKey("secret"))

        most: list[int] = []

        def look() -> None:
            assert parked(stack) == []
            if stack.run(secret).is_finished and len(stack.instance.get_runs()) == 2:
                most.append(stack.run_processes())

        stack.until(event, "unparked job", 120, each=look)
        stack.until(lambda: stack.run(refused).is_finished, "refused job", 30)
        assert stack.run(refused).status is dg.DagsterRunStatus.FAILURE
        assert most.count(0) >= 1
        entries = stack.instance.all_logs(refused)
        told = "\n".join(str(entry) for entry in entries)
        assert "AuthenticationError" in told
        assert KEY not in told
        assert "canary-in-the-code" not in told
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "served.db"]
    found = {needle: [] for needle in (KEY, "canary-in-the-code", "row-3")}  # type: dict[str, list[str]]
    for path in files:
        content = path.read_bytes()
        for needle, places in found.items():
            if needle.encode() in content:
                places.append(str(path.relative_to(tmp_path)))
    assert found[KEY] == []
    assert found["canary-in-the-code"] == []
    assert any(place.endswith("results.jsonl") for place in found["row-3"])  # the search does find things
    assert any(path.name.endswith(".db") for path in files)
