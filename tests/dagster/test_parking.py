"""Runs that wait without a process, from a first submission through later rounds, in a deployment."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from anybatch_dagster import batch_asset, collect_step, pending
from anybatch_dagster.gate import Gate

from .conftest import ClockedResource, Deployment, Provider, request

DAYS = dg.StaticPartitionsDefinition(["mon", "tue", "wed"])


@batch_asset()
def reviews() -> Iterator[dict[str, Any]]:
    yield request("a")


@batch_asset(partitions_def=DAYS)
def daily() -> Iterator[dict[str, Any]]:
    yield request("a")


@dg.asset
def summary(reviews: str) -> str:
    return reviews


def batch_of(run: dg.DagsterRun) -> str:
    return run.tags["anybatch/batches"]


@pytest.fixture
def deployment(gated: dg.DagsterInstance, provider: Provider) -> Deployment:
    assets = [*reviews, *daily, summary]
    jobs = [dg.define_asset_job("whole", ["reviews_batch", "reviews", "summary"])]
    return Deployment(gated, assets, provider.resources, jobs=jobs)


def test_the_run_that_submits_queues_the_run_that_waits(deployment: Deployment, provider: Provider) -> None:
    run = deployment.run("reviews_batch", "reviews", "summary", tags={"team": "x"})
    assert run.status is dg.DagsterRunStatus.SUCCESS
    (parked,) = deployment.parked
    assert parked.asset_selection == {dg.AssetKey("reviews"), dg.AssetKey("summary")}
    assert parked.tags["team"] == "x"
    assert batch_of(parked) == provider.ids()[0]
    assert deployment.tick().run_requests == []
    provider.pass_time(100)
    deployment.tick()
    (done,) = deployment.dequeue()
    assert done.status is dg.DagsterRunStatus.SUCCESS
    assert len(deployment.materializations("summary")) == 1
    assert deployment.tick().run_requests == []
    assert deployment.queue == []


def test_a_run_that_only_submits_queues_the_result(deployment: Deployment) -> None:
    deployment.run("reviews_batch")
    (parked,) = deployment.parked
    assert parked.asset_selection == {dg.AssetKey("reviews")}
    assert parked.job_name == "__ASSET_JOB"


def test_the_run_of_a_job_is_waited_for_by_a_run_of_that_job(deployment: Deployment) -> None:
    deployment.run(job_name="whole")
    (parked,) = deployment.parked
    assert parked.job_name == "whole"
    assert parked.asset_selection == {dg.AssetKey("reviews"), dg.AssetKey("summary")}


def test_the_parked_run_is_part_of_partition_and_backfill(deployment: Deployment, provider: Provider) -> None:
    deployment.run("daily_batch", "daily", partition_key="tue", tags={"dagster/backfill": "b1"})
    (parked,) = deployment.parked
    assert parked.tags["dagster/partition"] == "tue"
    # What keeps a backfill from being failed: a run of it that is not finished, at any time.
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED], tags={"dagster/backfill": "b1"})
    assert deployment.instance.get_run_ids(unfinished) == [parked.run_id]
    provider.pass_time(100)
    deployment.tick()
    deployment.dequeue()
    assert [event.partition for event in deployment.materializations("daily")] == ["tue"]


def test_a_retry_of_the_step_parks_no_second_run(deployment: Deployment) -> None:
    run = deployment.run("reviews_batch", "reviews")
    deployment.run("reviews", tags=deployment.parked[0].tags | {"anybatch/gate": "open"})
    assert len(deployment.parked) == 1
    assert deployment.parked[0].tags["anybatch/submission"] == run.run_id


def test_a_second_run_that_finds_the_same_batch_waits_for_itself(
    deployment: Deployment, provider: Provider
) -> None:
    deployment.run("reviews_batch")
    deployment.run("reviews_batch", "reviews", "summary")
    assert [batch_of(run) for run in deployment.parked] == 2 * provider.ids()
    provider.pass_time(100)
    deployment.tick()
    assert all(run.status is dg.DagsterRunStatus.SUCCESS for run in deployment.dequeue())
    assert len(deployment.materializations("summary")) == 1


def test_what_a_parked_run_is_told_and_tells(deployment: Deployment, provider: Provider) -> None:
    deployment.run("reviews_batch", "reviews")
    provider.pass_time(100)
    (event,) = deployment.tick().asset_events
    assert event.metadata["anybatch/status"].value == "completed"
    (run,) = deployment.queue
    assert run.tags["anybatch/gate"] == "open"
    assert run.tags["anybatch/status"] == "completed"
    deployment.dequeue()
    (result,) = deployment.materializations("reviews")
    assert result.metadata["anybatch/submission"].value == run.tags["anybatch/submission"]
    assert result.metadata["anybatch/rounds"].value == 1


# --- the gate rule is removed ---------------------------------------------------------------------------


def test_what_a_run_leaves_behind_that_waits_no_more_is_waited_for_again(
    deployment: Deployment, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row H1: the waiting run starts too early, and for the sensor it had seen to the result."""
    deployment.run("reviews_batch", "reviews", "summary", tags={"team": "x"})
    deployment.tick()
    deployment.remove_gate_rule(monkeypatch)
    (early,) = deployment.dequeue()
    assert early.status is dg.DagsterRunStatus.SUCCESS
    assert deployment.materializations("reviews") == []
    assert deployment.tick().skip_message == "1 waiting"
    assert deployment.queue == []
    provider.pass_time(100)
    (asked,) = deployment.tick().run_requests
    assert asked.tags["team"] == "x"
    (done,) = deployment.dequeue()
    assert done.status is dg.DagsterRunStatus.SUCCESS
    assert len(deployment.materializations("summary")) == 1
    assert deployment.tick().skip_message == "nothing waiting"
    assert len(provider.ids()) == 1


def test_a_run_that_is_let_go_does_not_rely_on_another_that_is(
    deployment: Deployment, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row H1: two that wait for one batch start together, and neither is going to see to the result."""
    deployment.run("reviews_batch", "reviews")
    deployment.execute_again(deployment.parked[0])
    deployment.remove_gate_rule(monkeypatch)
    other = deployment.parked[1]
    started = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, other.job_name)
    deployment.instance.report_dagster_event(started, run_id=other.run_id)
    (early,) = deployment.dequeue()
    assert early.status is dg.DagsterRunStatus.SUCCESS
    assert deployment.tick().skip_message == "1 waiting"
    provider.pass_time(100)
    deployment.tick()
    (done,) = deployment.dequeue()
    assert done.status is dg.DagsterRunStatus.SUCCESS
    assert len(deployment.materializations("reviews")) == 1


@pytest.mark.parametrize("end", ["failed", "started by a person"])
def test_whoever_says_that_the_sensor_sees_to_the_result_leaves_something_for_it_to_find(
    end: str, deployment: Deployment, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row H1: the run that waited is over, and a person materializes the result too early."""
    deployment.run("reviews_batch", "reviews")
    deployment.remove_gate_rule(monkeypatch)
    if end == "failed":
        deployment.instance.report_run_failed(deployment.parked[0])
    else:
        deployment.dequeue()
    early = deployment.run("reviews")
    assert early.status is dg.DagsterRunStatus.SUCCESS
    provider.pass_time(100)
    deployment.tick()
    deployment.dequeue()
    assert len(deployment.materializations("reviews")) == 1
    assert deployment.tick().skip_message == "nothing waiting"


# --- the asset is renamed or removed -------------------------------------------------------------------


def renamed(deployment: Deployment) -> Deployment:
    """The same code location after a change of its code: `opinions` in place of `reviews` and `many`."""

    @batch_asset()
    def opinions() -> Iterator[dict[str, Any]]:
        yield request("a")

    changed = Deployment(deployment.instance, [*opinions, *daily], deployment.resources)
    changed.cursor = deployment.cursor
    return changed


def test_a_run_whose_asset_is_gone_is_named_and_goes_on_when_it_is_back(
    deployment: Deployment, provider: Provider
) -> None:
    """Row H2: it stayed queued for ever, and no tick said a word."""
    deployment.run("reviews_batch", "reviews")
    (waiting,) = deployment.parked
    changed = renamed(deployment)
    for seconds in (0, 100):
        provider.pass_time(seconds)
        message = changed.tick().skip_message
        gone = "asset reviews_batch is not defined here any more"
        assert f"{gone}, and run {waiting.run_id} waits for {provider.ids()[0]}" in message
        assert changed.dequeue() == []  # it could not start
    deployment.tick()
    (done,) = deployment.dequeue()
    assert done.run_id == waiting.run_id
    assert len(deployment.materializations("reviews")) == 1


def test_terminating_a_run_whose_asset_is_gone_cancels_its_batch(
    deployment: Deployment, provider: Provider
) -> None:
    """Row H2: it was taken for a run of another code location, which would see to it."""
    deployment.run("reviews_batch", "reviews")
    (waiting,) = deployment.parked
    changed = renamed(deployment)
    terminate(changed, waiting)
    assert provider.statuses()[0] in ("cancelling", "cancelled")
    assert changed.tick().skip_message == "nothing waiting"


@pytest.mark.parametrize("on_timeout", ["leave", "cancel", "land_partial"])
def test_the_deadline_holds_for_an_asset_that_is_gone(
    on_timeout: str, gated: dg.DagsterInstance, provider: Provider
) -> None:
    """Row H2: the gate could open at the deadline, but no run of the asset could start."""
    deployment = deploy(gated, provider, SLOW, timeout=0, on_timeout=on_timeout)
    deployment.run("many_batch")
    (waiting,) = deployment.parked
    changed = renamed(deployment)
    message = changed.tick().skip_message
    assert f"the deadline of run {waiting.run_id} has passed for {provider.ids()[0]}" in message
    assert ("they are left running" in message) == (on_timeout == "leave")
    assert changed.again(waiting).status is dg.DagsterRunStatus.FAILURE
    assert provider.statuses() == ["validating" if on_timeout == "leave" else "cancelling"]
    assert changed.tick().skip_message == "nothing waiting"


@pytest.mark.parametrize("on_timeout", ["leave", "cancel"])
def test_without_the_gate_too_a_submission_whose_asset_is_gone_is_named(
    on_timeout: str, instance: dg.DagsterInstance, provider: Provider
) -> None:
    """Row H2: here nothing but the sensor waits, and it looked only at the assets that there are."""
    deployment = deploy(instance, provider, SLOW, timeout=1000, on_timeout=on_timeout)
    run = deployment.run("many_batch")
    deployment.tick()
    changed = renamed(deployment)
    for _ in range(2):
        message = changed.tick().skip_message
        gone = "asset many_batch is not defined here any more"
        assert f"{gone}, and the submission of run {run.run_id} waits for {provider.ids()[0]}" in message
        assert "or cancel the batch at the provider" in message
    deployment.cursor = changed.cursor
    assert deployment.tick().skip_message == "1 waiting"
    provider.pass_time(2000)
    deployment.tick()
    deployment.dequeue()
    assert len(deployment.materializations("many")) == 1
    changed.cursor = deployment.cursor
    assert changed.tick().skip_message == "nothing waiting"


@pytest.mark.parametrize("on_timeout", ["leave", "cancel"])
def test_without_the_gate_too_the_deadline_holds_for_an_asset_that_is_gone(
    on_timeout: str, instance: dg.DagsterInstance, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row H2: the submission would keep the sensor's cursor, and a place in its memory, for good."""
    monkeypatch.setattr(pending, "_SETTLED", 0.0)  # no older event can come, and the cursor may move on
    deployment = deploy(instance, provider, SLOW, timeout=0, on_timeout=on_timeout)
    deployment.run("many_batch")
    changed = renamed(deployment)
    changed.cursor = '{"after": 0, "assets": ["many_batch"]}'  # as it was before the deadline
    message = changed.tick().skip_message
    assert ("left running" if on_timeout == "leave" else "are cancelled") in message
    assert provider.statuses() == ["validating" if on_timeout == "leave" else "cancelling"]
    assert changed.cursor is not None
    assert "many_batch" not in changed.cursor
    assert changed.tick().skip_message == "nothing waiting"


def test_a_run_that_waits_for_its_turn_is_given_none_if_its_asset_is_gone(
    capped: Deployment, provider: Provider
) -> None:
    """Row H2: it would start and fail, and nobody was told why."""
    for day in ("mon", "tue"):
        capped.run("daily_batch", "daily", partition_key=day)
    capped.run("reviews_batch", "reviews")
    held = capped.parked[-1]
    provider.pass_time(100)
    capped.cursor = None
    changed = renamed(capped)
    changed.tick()
    changed.dequeue()  # there is room
    message = changed.tick().skip_message
    assert f"reviews_batch is not defined here any more, and run {held.run_id} waits for its turn" in message
    assert changed.dequeue() == []


@pytest.mark.parametrize("timeout", [1000, 0])
def test_a_terminated_run_whose_account_the_sensor_does_not_know_is_named(
    timeout: int, gated: dg.DagsterInstance, provider: Provider
) -> None:
    """Row H2: no line said that its batch goes on, and is paid for."""
    deployment = deploy(gated, provider, SLOW, timeout=timeout)
    deployment.run("many_batch")
    (waiting,) = deployment.parked
    resources = {**deployment.resources, "other": provider.resource}
    unaware = Deployment(gated, deployment.assets, resources, resource_keys=["other"])
    gated.report_run_canceled(waiting)
    told = f"{provider.ids()[0]} of run {waiting.run_id} cannot be cancelled from here"
    assert told in unaware.tick().skip_message
    again = unaware.tick().skip_message
    assert told in again if timeout else again == "nothing waiting"


def test_a_run_of_another_code_location_is_none_of_ours(deployment: Deployment) -> None:
    deployment.run("reviews_batch", "reviews")
    elsewhere = renamed(deployment)
    elsewhere.location = "elsewhere"
    assert elsewhere.tick().skip_message == "nothing waiting"


# --- cancelling, and executing again -----------------------------------------------------------------


def terminate(deployment: Deployment, run: dg.DagsterRun) -> None:
    deployment.instance.report_run_canceled(run)
    deployment.tick()


def test_terminating_the_waiting_run_cancels_and_executing_it_again_submits_the_rest(
    deployment: Deployment, provider: Provider
) -> None:
    deployment.run("reviews_batch", "reviews", "summary")
    (parked,) = deployment.parked
    terminate(deployment, parked)
    assert provider.statuses()[0] in ("cancelling", "cancelled")
    provider.pass_time(100)
    deployment.execute_again(deployment.again(parked))
    (done,) = deployment.dequeue()
    assert done.status is dg.DagsterRunStatus.SUCCESS
    (second,) = deployment.parked
    assert batch_of(second) == provider.ids()[1] != batch_of(parked)
    assert second.asset_selection == {dg.AssetKey("reviews"), dg.AssetKey("summary")}
    provider.pass_time(100)
    deployment.tick()
    deployment.dequeue()
    (result,) = deployment.materializations("reviews")
    assert result.metadata["anybatch/succeeded"].value == 1
    assert result.metadata["anybatch/rounds"].value == 2
    assert len(deployment.materializations("summary")) == 1
    assert len(provider.ids()) == 2


def test_the_submit_asset_after_a_cancelled_wait_submits_the_rest(
    deployment: Deployment, provider: Provider
) -> None:
    deployment.run("reviews_batch", "reviews")
    terminate(deployment, deployment.parked[0])
    provider.pass_time(100)
    deployment.run("reviews_batch", "reviews")
    assert len(provider.ids()) == 2
    assert batch_of(deployment.parked[0]) == provider.ids()[1]


def test_executing_submit_or_collect_again_costs_nothing(deployment: Deployment, provider: Provider) -> None:
    first = deployment.run("reviews_batch", "reviews")
    provider.pass_time(100)
    deployment.tick()
    (collected,) = deployment.dequeue()
    for run in (first, collected):
        deployment.execute_again(run)
        (done,) = deployment.dequeue()
        assert done.status is dg.DagsterRunStatus.SUCCESS
    assert deployment.queue == []
    assert len(provider.ids()) == 1
    assert len(deployment.materializations("reviews")) == 3


# --- rounds ------------------------------------------------------------------------------------------


def rows(model: str, number: int = 20) -> Iterator[dict[str, Any]]:
    for row in range(number):
        yield request(str(row), model=model)


def deploy(instance: dg.DagsterInstance, provider: Provider, model: str, **options: Any) -> Deployment:
    @batch_asset(name="many", **options)
    def many() -> Iterator[dict[str, Any]]:
        yield from rows(model)

    return Deployment(instance, many, provider.resources)


FLAKY = "local:echo?delay=60&expire=0.5"


def until_done(deployment: Deployment, provider: Provider) -> int:
    """Let time pass until nothing waits; how often something had to be started."""
    starts = 0
    while deployment.queue:
        assert starts < 10
        provider.pass_time(100)
        deployment.tick()
        starts += len(deployment.dequeue())
    return starts


@pytest.mark.parametrize("gate", [True, False])
def test_rounds_follow_each_other_with_no_process_in_between(
    gate: bool, gated: dg.DagsterInstance, instance: dg.DagsterInstance, provider: Provider
) -> None:
    deployment = deploy(gated if gate else instance, provider, FLAKY, max_rounds=3)
    deployment.run("many_batch", "many")
    for expected in (2, 3):
        provider.pass_time(100)
        deployment.tick()
        (done,) = deployment.dequeue()
        assert done.status is dg.DagsterRunStatus.SUCCESS
        assert deployment.materializations("many") == []
        assert len(provider.ids()) == expected
        assert len(deployment.parked) == gate
        newest = deployment.materializations("many_batch")[-1].metadata
        assert newest["anybatch/round"].value == expected
        assert newest["anybatch/batches"].value == provider.ids()[-1]
    provider.pass_time(100)
    deployment.tick()
    deployment.dequeue()
    (result,) = deployment.materializations("many")
    assert result.metadata["anybatch/rounds"].value == 3
    assert result.metadata["anybatch/requests"].value == 20
    assert deployment.tick().run_requests == []
    assert deployment.queue == []


def test_a_round_that_was_opened_by_a_run_that_died_is_not_opened_twice(
    gated: dg.DagsterInstance, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(gated, provider, FLAKY, max_rounds=2)
    deployment.run("many_batch", "many")
    provider.pass_time(100)
    deployment.tick()
    with monkeypatch.context() as patch:
        patch.setattr(collect_step, "record_round", dies)  # after the round's batch was created
        (dead,) = deployment.dequeue()
    assert dead.status is dg.DagsterRunStatus.FAILURE
    assert len(provider.ids()) == 2
    deployment.execute_again(dead)
    deployment.dequeue()
    assert batch_of(deployment.parked[0]) == provider.ids()[1]
    assert until_done(deployment, provider) == 1
    assert len(provider.ids()) == 2
    assert len(deployment.materializations("many")) == 1


def test_a_run_that_dies_while_it_parks_another_leaves_one(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            type(deployment.instance), "report_dagster_event", dies_on(dg.DagsterEventType.RUN_ENQUEUED)
        )
        run = deployment.run("reviews_batch", "reviews")
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert deployment.queue == []
    deployment.run(
        "reviews", tags={"anybatch/submission": run.run_id, "anybatch/submit_asset": "reviews_batch"}
    )
    assert len(deployment.parked) == 1
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.NOT_STARTED])
    assert deployment.instance.get_runs(unfinished) == []


def test_a_tick_between_submitting_and_parking_brings_no_second_run(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    park = Gate.park

    def slowly(self: Gate, *arguments: Any, **others: Any) -> str:
        deployment.tick(remember=True)  # the submission is there, and nothing waits for it yet
        return park(self, *arguments, **others)

    monkeypatch.setattr(Gate, "park", slowly)
    deployment.run("reviews_batch", "reviews")
    assert len(deployment.parked) == 1
    assert deployment.tick(remember=True).run_requests == []
    assert deployment.tick(remember=True).run_requests == []


def dies(*_: Any) -> None:
    raise ConnectionError("the worker is gone")


def dies_on(kind: dg.DagsterEventType) -> Any:
    report = dg.DagsterInstance.report_dagster_event

    def dying(self: dg.DagsterInstance, event: dg.DagsterEvent, *arguments: Any, **others: Any) -> None:
        if event.event_type is kind:
            dies()
        report(self, event, *arguments, **others)

    return dying


# --- the deadline ------------------------------------------------------------------------------------

SLOW = "local:echo?delay=1000"


def test_leave_fails_and_lets_the_batch_run(gated: dg.DagsterInstance, provider: Provider) -> None:
    deployment = deploy(gated, provider, SLOW, timeout=0)
    run = deployment.run("many_batch", "many")
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert provider.statuses() == ["validating"]
    provider.pass_time(2000)
    assert deployment.run("many").status is dg.DagsterRunStatus.SUCCESS
    assert len(deployment.materializations("many")) == 1


def test_cancel_fails_and_the_next_attempt_submits_the_rest(
    gated: dg.DagsterInstance, provider: Provider
) -> None:
    deployment = deploy(gated, provider, SLOW, timeout=0, on_timeout="cancel")
    run = deployment.run("many_batch", "many")
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert provider.statuses() == ["cancelling"]
    deployment.run("many")  # while it is being cancelled its deadline is an hour away
    assert batch_of(deployment.parked[0]) == provider.ids()[0]
    later = deploy(gated, provider, SLOW, timeout=3600, on_timeout="cancel")
    provider.pass_time(100)
    later.tick()
    assert later.dequeue()[0].status is dg.DagsterRunStatus.SUCCESS
    assert len(provider.ids()) == 2
    assert batch_of(later.parked[0]) == provider.ids()[1]


@pytest.mark.parametrize("gate", [True, False])
def test_land_partial_takes_what_there_is_and_submits_nothing_again(
    gate: bool, gated: dg.DagsterInstance, instance: dg.DagsterInstance, provider: Provider
) -> None:
    options = {"timeout": 0, "on_timeout": "land_partial", "max_rounds": 3}
    deployment = deploy(gated if gate else instance, provider, SLOW, **options)
    run = deployment.run("many_batch", "many")
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert provider.statuses() == ["cancelling"]
    provider.pass_time(100)
    deployment.tick()
    (done,) = deployment.dequeue()
    assert done.status is dg.DagsterRunStatus.SUCCESS
    (result,) = deployment.materializations("many")
    assert result.metadata["anybatch/cancelled"].value == 20
    assert provider.statuses() == ["cancelled"]
    assert deployment.queue == []


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_submitting_while_results_are_landed_partially_buys_nothing(
    max_rounds: int, gated: dg.DagsterInstance, provider: Provider
) -> None:
    """Row B1: to the submit asset, a batch that was cancelled at its deadline was one to be bought again."""
    options = {"timeout": 0, "on_timeout": "land_partial", "max_rounds": max_rounds}
    deployment = deploy(gated, provider, SLOW, **options)
    deployment.run("many_batch", "many")
    assert provider.statuses() == ["cancelling"]
    deployment.run("many_batch")  # while it is being cancelled …
    provider.pass_time(100)
    deployment.run("many_batch")  # … and when it is cancelled, and nothing of it has landed
    assert provider.statuses() == ["cancelled"]
    deployment.tick()
    assert {run.status for run in deployment.dequeue()} == {dg.DagsterRunStatus.SUCCESS}
    assert provider.statuses() == ["cancelled"]
    result = deployment.materializations("many")[-1]
    assert result.metadata["anybatch/cancelled"].value == 20
    assert result.metadata["anybatch/rounds"].value == 1
    assert deployment.run("many_batch", "many").status is dg.DagsterRunStatus.SUCCESS
    assert provider.statuses() == ["cancelled"]


# --- rows without a result ---------------------------------------------------------------------------


def test_keep_lands_them_and_fail_names_them(gated: dg.DagsterInstance, provider: Provider) -> None:
    deployment = deploy(gated, provider, "local:echo?delay=0&fail=0.5", on_partial="fail")
    run = deployment.run("many_batch", "many")
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert deployment.materializations("many") == []
    kept = deploy(gated, provider, "local:echo?delay=0&fail=0.5")
    assert kept.run("many").status is dg.DagsterRunStatus.SUCCESS
    assert len(kept.materializations("many")) == 1
    assert len(provider.ids()) == 1


# --- a cap on what is in flight ----------------------------------------------------------------------


@pytest.fixture
def capped(gated: dg.DagsterInstance, provider: Provider) -> Deployment:
    resource = ClockedResource(**provider.resource.model_dump() | {"max_in_flight": 2})
    return Deployment(gated, [*reviews, *daily, summary], {**provider.resources, "anybatch": resource})


def test_a_submission_beyond_the_cap_waits_for_its_turn(capped: Deployment, provider: Provider) -> None:
    for day in ("mon", "tue", "wed"):
        run = capped.run("daily_batch", "daily", partition_key=day, tags={"dagster/backfill": "b1"})
        assert run.status is dg.DagsterRunStatus.SUCCESS
    assert len(provider.ids()) == 2
    held = capped.parked[-1]
    assert held.asset_selection == {dg.AssetKey("daily_batch"), dg.AssetKey("daily")}
    assert held.tags["dagster/partition"] == "wed"
    assert held.tags["dagster/backfill"] == "b1"
    capped.tick()
    assert capped.dequeue() == []
    provider.pass_time(100)
    capped.tick()
    assert [run.status for run in capped.dequeue()] == [dg.DagsterRunStatus.SUCCESS] * 2
    capped.tick()
    capped.dequeue()  # the one whose turn it is now submits
    assert len(provider.ids()) == 3
    provider.pass_time(100)
    capped.tick()
    capped.dequeue()
    assert sorted(event.partition or "" for event in capped.materializations("daily")) == [
        "mon",
        "tue",
        "wed",
    ]
    assert capped.queue == []


def test_nothing_but_room_gives_a_turn(capped: Deployment, provider: Provider) -> None:
    for day in ("mon", "tue", "wed"):
        capped.run("daily_batch", "daily", partition_key=day)
    for _ in range(2):
        capped.tick()
    assert len(capped.parked) == 3
    terminate(capped, capped.parked[0])
    capped.tick()
    (given,) = [run for run in capped.queue if run.tags["anybatch/gate"] == "open"]
    assert given.tags["dagster/partition"] == "wed"


def test_a_cap_needs_the_gate(instance: dg.DagsterInstance, provider: Provider) -> None:
    resource = ClockedResource(**provider.resource.model_dump() | {"max_in_flight": 2})
    deployment = Deployment(instance, reviews, {"anybatch": resource})
    assert deployment.run("reviews_batch").status is dg.DagsterRunStatus.FAILURE
    assert provider.ids() == []
