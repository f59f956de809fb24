"""What becomes of the batches when a task is killed on a worker, in the midst of its work."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException

from anybatch import Job
from anybatch.jobs.ledger import Ledger, ShardRecord, Step
from anybatch_airflow import kill
from anybatch_airflow.kill import batches_to_cancel
from tests.fakes.faults import Hold
from tests.fakes.provider import Auto

from .world import ENDED, HOUR, LATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anybatch_airflow import AnyBatchOperator

    from .world import World

Terminated = kill._terminated()
PATIENCE = 30.0  # seconds that a machine which is busy may take for anything


class Airflow:
    """What Airflow does: it tells the state of the task instance, and signals the process."""

    def __init__(self) -> None:
        self._killers: list[threading.Thread] = []
        self.operator: AnyBatchOperator | None = None
        self.state: Any = "failed"
        self.answers = threading.Event()
        self.answers.set()

    def state_of(self, ti: Any) -> Any:
        self.answers.wait(PATIENCE)
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def on_signal(self, *_: Any) -> None:
        assert self.operator is not None
        self.operator.on_kill()  # and back to the interrupted code, if that raises nothing

    def kill_once(self, is_time: Callable[[], object], then: Callable[[], object] = lambda: None) -> None:
        def wait_and_kill() -> None:
            until = time.monotonic() + PATIENCE
            while not is_time():
                assert time.monotonic() < until
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            then()

        self._killers.append(threading.Thread(target=wait_and_kill, daemon=True))
        self._killers[-1].start()

    def settle(self) -> None:
        """Return when every signal has been sent, and what it has set going is done and logged."""
        for thread in (*self._killers, *threading.enumerate()):
            if thread in self._killers or thread.name == "anybatch-kill":
                thread.join(PATIENCE)
                assert not thread.is_alive(), thread.name


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Airflow]:
    airflow = Airflow()
    monkeypatch.setattr(kill, "state_of", airflow.state_of)
    monkeypatch.setattr(kill, "_MAX_WAIT_FOR_STATE", PATIENCE)
    monkeypatch.setattr(kill, "_MAX_HOLD", 2 * PATIENCE)
    before = signal.signal(signal.SIGTERM, airflow.on_signal)
    yield airflow
    airflow.answers.set()
    airflow.settle()  # before a late signal would end the tests
    signal.signal(signal.SIGTERM, before)


def run(world: World, airflow: Airflow, **kwargs: Any) -> Any:
    airflow.operator = world.operator(**{"deferrable": False, **kwargs})
    return airflow.operator.execute(world.context)


def is_watched(world: World) -> Callable[[], bool]:
    """Whether the task has looked at its batch, and now sleeps until the next look."""
    return lambda: world.server.count("GET", "/v1/batches/.*") > 0


@pytest.mark.parametrize("state", ["failed", "success", "removed"])
def test_a_task_that_is_over_cancels_its_batch_and_stops(world: World, airflow: Airflow, state: str) -> None:
    airflow.state = state
    airflow.kill_once(is_watched(world))
    began = time.monotonic()
    with pytest.raises(Terminated):
        run(world, airflow)
    assert time.monotonic() - began < PATIENCE, "it was held until the patience with Airflow was over"
    [batch_id] = world.created
    assert world.fake.batches[batch_id].state == "cancelling"
    # As after a deferred task was ended: clearing it keeps the finished rows, and submits the rest again.
    world.fake.cancel_now(batch_id, done=3)
    world.attempt()
    [_, second] = world.created
    world.fake.finish(second)
    assert world.rows_of(second) == ["row-3"]
    assert world.woken(ENDED)["counts"]["succeeded"] == 4


@pytest.mark.parametrize(
    "state", [None, "running", "restarting", "queued", "up_for_retry", RuntimeError("no")]
)
def test_a_task_that_is_not_over_goes_on(world: World, airflow: Airflow, state: Any) -> None:
    airflow.state = state
    airflow.kill_once(is_watched(world), then=lambda: world.fake.finish(world.fake.last.id))
    assert run(world, airflow)["counts"]["succeeded"] == 4
    assert world.server.count("POST", ".*/cancel") == 0


def test_a_batch_that_was_being_created_is_found_by_the_next_attempt(
    world: World, airflow: Airflow, capfd: pytest.CaptureFixture[str]
) -> None:
    hold = Hold(handled=True)
    world.server.fail("POST", "/v1/batches", hold)
    airflow.kill_once(lambda: hold.wait(PATIENCE) is None)
    with pytest.raises(Terminated):
        run(world, airflow)
    hold.release()
    airflow.settle()
    assert "1 being created may be running, with no id on record yet" in capfd.readouterr().out
    [batch_id] = world.created
    assert list(world.attempt().batches) == [batch_id]
    assert world.created == [batch_id]


def test_airflow_is_not_waited_for_without_end(
    world: World, airflow: Airflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when the interrupted code is itself in the midst of asking, and holds the lock of the connection.
    monkeypatch.setattr(kill, "_MAX_WAIT_FOR_STATE", 0.2)
    airflow.answers.clear()
    airflow.kill_once(is_watched(world), then=lambda: world.fake.finish(world.fake.last.id))
    assert run(world, airflow)["counts"]["succeeded"] == 4


def test_a_second_signal_changes_nothing(world: World, airflow: Airflow) -> None:
    cancels = world.server.hold("POST", ".*/cancel", handled=True)
    airflow.kill_once(is_watched(world))
    airflow.kill_once(lambda: cancels.wait(PATIENCE) is None, then=cancels.release)
    with pytest.raises(Terminated):
        run(world, airflow)
    airflow.settle()
    assert world.server.count("POST", ".*/cancel") == 1


def test_a_task_that_is_about_to_defer_is_guarded_still(world: World, airflow: Airflow) -> None:
    airflow.operator = operator = world.operator()
    world.attempt_of(operator)
    with pytest.raises(Terminated):
        operator.on_kill()
    assert world.fake.last.state == "cancelling"


def test_batches_that_a_failed_task_has_left_running_are_not_cancelled(world: World) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR)
    operator = world.operator(input=[])
    with pytest.raises(AirflowException, match="left the batches running"):
        operator.execute_complete(world.context, LATE)
    operator.on_kill()  # what runs after a task, such as listeners, took too long
    assert world.server.count("POST", ".*/cancel") == 0


def test_a_task_that_has_not_begun_has_nothing_to_cancel(world: World) -> None:
    world.operator().on_kill()


def test_what_has_landed_is_not_cancelled(world: World, airflow: Airflow) -> None:
    world.fake.auto = Auto(looks=1)
    run(world, airflow)
    assert batches_to_cancel(Job(input=(), output=world.out).ledger()) == ([], [])


@pytest.mark.parametrize(
    ("shards", "ids", "is_told"),
    [
        ([], [], False),
        ([{"batch_id": "a", "step": Step.CREATED, "tries": 1}], ["a"], False),
        ([{"step": Step.UPLOADED}], [], False),
        ([{"step": Step.CREATING, "tries": 1}], [], True),  # it may have left a batch that nobody knows of
        ([{"batch_id": "a", "tries": 1}, {"step": Step.CREATING, "tries": 1}], ["a"], True),
        ([{"batch_id": "old", "tries": 1}, {"batch_id": "new", "tries": 1, "round": 2}], ["new"], False),
    ],
)
def test_what_may_run(shards: list[dict[str, Any]], ids: list[str], is_told: bool) -> None:
    records = tuple(ShardRecord(shard=shard, first_row=0, rows=1, **one) for shard, one in enumerate(shards))
    ledger = Ledger(
        job="j", fingerprint="f", provider="p", api_base="a", endpoint="e", rows=1, created_at=0,
        shards=records,
    )  # fmt: skip
    found, told = batches_to_cancel(ledger)
    assert (found, bool(told)) == (ids, is_told)
    assert batches_to_cancel(ledger.model_copy(update={"landed_at": 1.0})) == ([], [])


def test_a_job_without_a_record_has_no_batches() -> None:
    assert batches_to_cancel(None) == ([], [])
