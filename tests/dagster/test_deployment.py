"""Under a real Dagster: `dagster dev` with its daemon, queue and sensor loop, and runs in processes.

Two of them run at the same time, since one mostly waits for its only slot. What happens to a larger one is in
`cluster`.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus

from anybatch import Client
from tests.fakes.faults import Stall
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.deployment]

DEFINITIONS = Path(__file__).resolve().parent / "deployed.py"
PARTS = [f"p{number}" for number in range(10)]
DEADLINE = 6  # seconds after which the unparked Dagster's daemon cuts a sensor tick off


def parked(stack: Any) -> list[dg.DagsterRun]:
    """Runs that wait behind the gate."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED], tags={"anybatch/gate": "waiting"})
    return list(stack.instance.get_runs(filters))


class Backfill(threading.Thread):
    """A backfill of ten partitions in a Dagster that runs one run at a time, watched from beside it."""

    def __init__(self, stack: Any, database: Path) -> None:
        super().__init__(name="backfill")
        self.stack, self.database = stack, database
        self.looks: list[tuple[int, int]] = []  # batches that are waited for, processes that execute runs
        self.took = 0.0
        self.gone = threading.Event()
        self._id = stack.launch_backfill(["texts_batch", "texts", "lengths"], PARTS)
        self._began = time.monotonic()

    @property
    def status(self) -> BulkActionStatus:
        return self.stack.instance.get_backfill(self._id).status  # type: ignore[no-any-return]

    def run(self) -> None:
        while self.status is BulkActionStatus.REQUESTED and not self.gone.wait(1):
            self.looks.append((len(parked(self.stack)), self.stack.run_processes()))
        self.took = time.monotonic() - self._began


@pytest.fixture(scope="module")
def backfill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backfill]:
    """The backfill, under way, with the gate rule."""
    home = tmp_path_factory.mktemp("parking")
    database = home / "state" / "local.db"
    stack = Stack(
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
        running = Backfill(stack, database)
        running.start()
        try:
            yield running
        finally:
            running.gone.set()
            running.join()


KEY = "canary-0f3c9a7e51"
RESULT = dg.AssetKey("secret")


@pytest.mark.usefixtures("backfill")
def test_unparked_no_tick_that_is_cut_off_is_missed_and_no_key_is_left_anywhere(tmp_path: Path) -> None:
    """Without the gate rule, the run that takes the results is asked for by a tick, whose answer gets lost.

    Also with a wrong key in the code, whose refusal the logs tell of.
    """
    fake = OpenAIFake(key=KEY)
    with FakeServer(fake) as server:
        stack = Stack(
            tmp_path / "dagster",
            DEFINITIONS,
            config={"concurrency": {"runs": {"tag_concurrency_limits": []}}},
            env={
                "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS": str(DEADLINE),
                "TEST_PROVIDER": "openai-compatible",
                "TEST_API_BASE": server.api_base,
                "TEST_KEY": KEY,
            },
        )
        with stack:
            take_a_whole_job_through(stack, server, fake)
    found = {needle: [] for needle in (KEY, "canary-in-the-code", "row-3")}  # type: dict[str, list[str]]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for needle, places in found.items():
            if needle.encode() in content:
                places.append(str(path.relative_to(tmp_path)))
    assert found[KEY] == []
    assert found["canary-in-the-code"] == []
    assert any(place.endswith("results.jsonl") for place in found["row-3"])  # the search does find things
    assert any(path.name.endswith(".db") for path in files)


def take_a_whole_job_through(stack: Any, server: FakeServer, fake: OpenAIFake) -> None:
    refused = stack.launch_job("job_refused")
    secret = stack.launch_job("job_secret")
    stack.until(lambda: stack.run(secret).is_finished and stack.run(refused).is_finished, "both runs", 90)
    stack.until(lambda: stack.run_processes() == 0, "no process while it waits", 30)
    stack.until(lambda: fake.last.looks > 1, "the sensor looks at the batch", 60)
    assert stack.run_processes() == 0
    assert len(stack.instance.get_runs()) == 2

    server.fail("GET", "/v1/batches.*", Stall(30))  # the look is given up, and comes to nothing
    server.fail("GET", "/v1/batches.*", Stall(DEADLINE + 2))  # this one sees the end, and nobody hears of it
    fake.finish(fake.last.id)

    def event() -> Any:
        return stack.instance.get_latest_materialization_event(RESULT)

    stack.until(event, "results", 120)
    stack.until(lambda: all(run.is_finished for run in stack.instance.get_runs()), "all runs are over", 60)
    assert server.unused_faults == 0
    assert stack.cut_off_ticks() >= 2
    statuses = sorted(run.status.value for run in stack.instance.get_runs())
    assert statuses == ["FAILURE", "SUCCESS", "SUCCESS"]
    assert len(fake.batches) == 1
    assert len(stack.instance.fetch_materializations(RESULT, limit=10).records) == 1

    assert stack.run(refused).status is dg.DagsterRunStatus.FAILURE
    told = "\n".join(str(entry) for entry in stack.instance.all_logs(refused))
    assert "AuthenticationError" in told
    assert KEY not in told
    assert "canary-in-the-code" not in told


def test_a_backfill_over_slow_batches_needs_one_slot_and_holds_none(backfill: Backfill) -> None:
    stack = backfill.stack
    stack.until(lambda: not backfill.is_alive(), "backfill", 300)
    most = max(waiting for waiting, _ in backfill.looks)
    print(f"\nbackfill of 10 partitions, 60 s batches: {backfill.took:.0f} s; up to {most} waited at once")
    assert backfill.status is BulkActionStatus.COMPLETED_SUCCESS
    with Client("local", api_base=f"sqlite:///{backfill.database}") as client:
        batches = list(client.list(limit=100))
    assert [batch.status.value for batch in batches] == ["completed"] * 10
    assert most >= 3
    # The one that is allowed to run, and one that has ended and is about to exit.
    assert max(processes for _, processes in backfill.looks) <= 2
    for asset in ("texts", "lengths"):
        assert stack.instance.get_materialized_partitions(dg.AssetKey(asset)) == set(PARTS)
