"""FAULTS A4b: one batch of a job is gone at the provider, and what becomes of the task."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from tests.fakes.faults import Respond
from tests.fakes.provider import Auto

from .world import HOUR, LATE, requests

if TYPE_CHECKING:
    from anybatch_airflow import AnyBatchTrigger

    from .world import World

OPTIONS: dict[str, Any] = {"shard_requests": 2, "min_defer_seconds": 0}


@pytest.fixture(autouse=True)
def _gone_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of an hour has passed."""
    monkeypatch.setattr("anybatch.jobs.lost.GONE_AFTER", 0.0)
    monkeypatch.setattr("anybatch.jobs.lost.LOOK_EVERY", 0.0)
    monkeypatch.setattr("anybatch.rows.downloads.GONE_AFTER", 0.0)


def event_of(trigger: AnyBatchTrigger) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        async for event in trigger.run():
            return dict(event.payload)
        raise AssertionError("the trigger ended without an event")

    return asyncio.run(first())


def waited(world: World, policy: str) -> dict[str, Any]:
    """The event of a wait for two batches, of which the first is gone and the second ends meanwhile."""
    trigger = world.attempt(on_lost=policy, **OPTIONS)
    first, second = world.created
    del world.fake.batches[first]
    world.fake.auto = Auto(looks=world.fake.batches[second].looks + 2)
    event = event_of(trigger)
    world.fake.auto = None
    return event


def test_what_there_is_lands(world: World) -> None:
    manifest = world.woken(waited(world, "land"), on_lost="land", **OPTIONS)
    assert (manifest["counts"]["succeeded"], manifest["counts"]["missing"]) == (2, 2)
    assert world.landed() == {
        "row-0": "missing", "row-1": "missing", "row-2": "succeeded", "row-3": "succeeded",
    }  # fmt: skip
    codes = [json.loads(line)["error"] for line in (world.out / "results.jsonl").read_text().splitlines()]
    assert [error and error["code"] for error in codes] == ["results_lost", "results_lost", None, None]
    assert len(world.created) == 1  # nothing was bought again
    assert world.attempt(on_lost="land", **OPTIONS) == manifest


def test_its_rows_alone_are_bought_again(world: World) -> None:
    trigger = world.woken(waited(world, "resubmit"), on_lost="resubmit", **OPTIONS)
    [_, third] = world.created
    assert list(trigger.batches) == [third]
    assert world.fake.start(third).ids == ["row-0", "row-1"]
    world.fake.finish(third)
    manifest = world.woken(event_of(trigger), on_lost="resubmit", **OPTIONS)
    assert (manifest["counts"]["succeeded"], manifest["rows"]) == (4, 4)


def test_by_default_the_task_fails_and_names_it(world: World) -> None:
    event = waited(world, "fail")
    assert event["status"] == "error"
    [gone] = [batch_id for batch_id, told in event["batches"].items() if "error" in told]
    with pytest.raises(AirflowException, match=gone):
        world.woken(event, **OPTIONS)


@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_retry_goes_on_without_it(world: World, is_deferred: bool) -> None:
    world.attempt(on_lost="land", **OPTIONS)
    first, second = world.created
    del world.fake.batches[first]
    options = {**OPTIONS, "on_lost": "land", "deferrable": is_deferred}
    if is_deferred:
        assert list(world.attempt(**options).batches) == [second]
        world.fake.finish(second)
    world.fake.auto = Auto(looks=world.fake.batches[second].looks + 2)
    assert world.attempt(**options)["counts"]["missing"] == 2


def test_one_that_is_lost_while_a_worker_waits(world: World) -> None:
    world.attempt(on_lost="land", **OPTIONS)
    first, second = world.created
    world.fake.auto = Auto(looks=world.fake.batches[second].looks + 3)
    world.server.fail("GET", f"/v1/batches/{first}", Respond(404), skip=1, times=99)  # seen once more
    manifest = world.attempt(on_lost="land", deferrable=False, **OPTIONS)
    assert (manifest["counts"]["succeeded"], manifest["counts"]["missing"]) == (2, 2)


def test_one_that_never_ends_being_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job counts its hour from its own first look at that, and is asked only when it is over."""
    for name in ("anybatch.jobs.lost.STUCK_AFTER", "anybatch.jobs.policies.CANCEL_TIME"):
        monkeypatch.setattr(name, 1.0)
    monkeypatch.setattr("anybatch.jobs.policies.FIRST_LOOK", 1.0)
    world.ago = 2 * HOUR
    options = {**OPTIONS, "on_lost": "land", "on_timeout": "land_partial"}
    world.attempt(**options, timeout=3 * HOUR)
    first, second = world.created
    world.fake.finish(second)
    world.ago = 0
    trigger = world.woken(LATE, **options)
    assert list(trigger.batches) == [first]
    event = event_of(trigger)
    assert event["status"] == "timeout"
    manifest = world.woken(event, **options)
    assert (manifest["counts"]["succeeded"], manifest["counts"]["missing"]) == (2, 2)


def test_where_nothing_of_the_account_answers_nothing_is_done_without(world: World) -> None:
    world.attempt(on_lost="land", input=requests(2), **OPTIONS)
    [only] = world.created
    world.fake.batches.clear()
    world.fake.files.clear()
    event = {"status": "ended", "batches": {only: {"lost": "NotFoundError"}}, "message": ""}
    with pytest.raises(AirflowFailException, match="nothing else of the job was found"):
        world.woken(event, on_lost="land", **OPTIONS)
    assert not (world.out / "results.jsonl").exists()
