"""The batch sensor, a tick at a time; `test_deployment.py` has it run by Dagster's own daemon."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.test_utils import create_run_for_test

from anybatch import AsyncClient, Batch, BatchStatus, RequestCounts, RetryPolicy
from anybatch_dagster import BatchAssets, BatchResource, batch_asset, build_batch_sensor, pending, sensor
from anybatch_dagster.gate import Gate
from anybatch_dagster.polling import Poller, progress_of
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .conftest import FailingResource, Provider, request

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


@dg.asset
def unasked(reviews: str) -> str:
    return reviews


class Dagster:
    """An instance, the definitions, and the sensor with its cursor.

    Its runs were started by hand and park nothing: all that is left to the sensor.
    """

    def __init__(self, instance: dg.DagsterInstance, resources: Mapping[str, Any], **options: Any) -> None:
        self.instance = instance
        self.options = options
        self.definitions = dg.Definitions(assets=[*reviews, *daily, summary, unasked], resources=resources)
        self.cursor: str | None = None
        self.sensor = build_batch_sensor(**options)

    def materialize(self, *names: str, **arguments: Any) -> str:
        """Run these assets; returns the run's id."""
        result = dg.materialize(
            [*reviews, *daily, summary, unasked],
            selection=dg.AssetSelection.assets(*names),
            instance=self.instance,
            resources=self.definitions.resources,
            **arguments,
        )
        return result.run_id

    def tick(self, *, park: bool = True) -> Any:
        """One evaluation by a new process, which remembers nothing but the cursor."""
        self.sensor = build_batch_sensor(**self.options)
        return self.tick_again(park=park)

    def tick_again(self, *, park: bool = True) -> Any:
        """One evaluation; parked runs that it asks for are put into the queue, as the daemon would."""
        context = dg.build_sensor_context(
            self.instance,
            cursor=self.cursor,
            definitions=self.definitions,
            resources=self.definitions.resources,
            sensor_name="anybatch_sensor",
        )
        with context:
            data = self.sensor.evaluate_tick(context)
        self.cursor = data.cursor
        for requested in data.run_requests if park else ():
            self.queue(requested)
        return data

    def queue(self, requested: dg.RunRequest) -> None:
        queue(self.instance, requested.tags, frozenset(requested.asset_selection or ()))

    @property
    def queued(self) -> list[dg.DagsterRun]:
        filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED])
        return list(self.instance.get_runs(filters, ascending=True))


def queue(instance: dg.DagsterInstance, tags: Mapping[str, str], assets: frozenset[dg.AssetKey]) -> None:
    """Put a run into the queue, as the daemon does."""
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__")
    create_run_for_test(
        instance,
        job_name="__ASSET_JOB",
        status=dg.DagsterRunStatus.QUEUED,
        tags=dict(tags),
        asset_selection=assets,
        remote_job_origin=RemoteJobOrigin(repository, "__ASSET_JOB"),
    )


@pytest.fixture
def dagster(gated: dg.DagsterInstance, provider: Provider) -> Dagster:
    return Dagster(gated, provider.resources)


@pytest.fixture
def ungated(instance: dg.DagsterInstance, provider: Provider) -> Dagster:
    return Dagster(instance, provider.resources)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events count as settled as soon as they are there."""
    monkeypatch.setattr(pending, "_SETTLED", 0.0)


def keys(requested: dg.RunRequest) -> list[str]:
    return [key.to_user_string() for key in requested.asset_selection or ()]


# --- parked --------------------------------------------------------------------------------------------


def test_a_submission_is_parked_with_what_its_run_skipped(dagster: Dagster) -> None:
    run_id = dagster.materialize("reviews_batch", "reviews", "summary", tags={"team": "x"})
    (requested,) = dagster.tick().run_requests
    assert keys(requested) == ["reviews", "summary"]
    assert requested.tags["anybatch/gate"] == "waiting"
    assert requested.tags["anybatch/submission"] == run_id
    assert requested.tags["anybatch/submit_asset"] == "reviews_batch"
    assert requested.tags["team"] == "x"
    assert requested.run_key.endswith(run_id)


def test_a_submission_alone_is_followed_by_its_result_alone(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    (requested,) = dagster.tick().run_requests
    assert keys(requested) == ["reviews"]


def test_the_parked_run_is_part_of_partition_and_backfill(dagster: Dagster) -> None:
    dagster.materialize(
        "daily_batch", partition_key="tue", tags={"dagster/backfill": "b1", ".dagster/x": "y"}
    )
    (requested,) = dagster.tick().run_requests
    assert requested.tags["dagster/partition"] == "tue"
    assert requested.tags["dagster/backfill"] == "b1"
    assert ".dagster/x" not in requested.tags


def test_a_parked_submission_is_not_asked_for_again(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    assert len(dagster.tick().run_requests) == 1
    assert dagster.tick().run_requests == []


def test_a_tick_whose_answer_was_lost_asks_for_the_same_run_again(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    before = dagster.cursor
    (first,) = dagster.tick(park=False).run_requests
    dagster.cursor = before
    (second,) = dagster.tick(park=False).run_requests
    assert first.run_key == second.run_key  # which is how the daemon knows


def test_the_gate_opens_when_the_batch_has_ended(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    dagster.tick()
    (run,) = dagster.queued
    assert run.tags["anybatch/gate"] == "waiting"
    provider.pass_time(100)
    dagster.tick()
    (run,) = dagster.queued
    assert run.tags["anybatch/gate"] == "open"
    assert run.tags["anybatch/status"] == "completed"
    assert float(run.tags["anybatch/ended_at"]) > 0


def test_what_a_parked_run_needs_is_in_its_tags(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    provider.pass_time(100)
    dagster.tick()
    (run,) = dagster.queued
    dagster.materialize("reviews", tags=run.tags)
    event = dagster.instance.get_latest_materialization_event(dg.AssetKey("reviews"))
    assert event is not None
    assert event.asset_materialization is not None
    told = event.asset_materialization.metadata
    assert told["anybatch/submission"].value == run.tags["anybatch/submission"]
    assert told["anybatch/collect_lag_s"].value >= 0


def test_a_batch_that_has_ended_before_it_was_found_is_collected_at_once(
    dagster: Dagster, provider: Provider
) -> None:
    dagster.materialize("reviews_batch")
    provider.pass_time(100)
    (requested,) = dagster.tick().run_requests
    assert requested.tags["anybatch/gate"] == "open"


def test_what_is_collected_is_left_alone(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("reviews_batch")
    provider.pass_time(100)
    dagster.materialize("reviews")
    assert dagster.tick().run_requests == []


def test_the_submitting_run_comes_first(dagster: Dagster, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = dagster.materialize("reviews_batch", "reviews")
    going_on = dagster.instance.get_run_by_id(run_id).with_status(dg.DagsterRunStatus.STARTED)
    with monkeypatch.context() as patch:
        patch.setattr(type(dagster.instance), "get_run_by_id", lambda *_: going_on)
        assert dagster.tick().run_requests == []
        patch.setattr(sensor, "_OWN_RUN", 0.0)  # it takes too long: other assets of the run, perhaps
        assert len(dagster.tick(park=False).run_requests) == 1
    assert len(dagster.tick().run_requests) == 1


def test_an_observation_tells_each_change_once(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("daily_batch", partition_key="mon")
    told = []
    for seconds in (0, 0, 0, 20, 1, 20, 100):
        provider.pass_time(seconds)
        told.append([event.metadata["anybatch/status"].value for event in dagster.tick().asset_events])
    changes = [status for statuses in told for status in statuses]
    assert len(changes) < len(told)
    assert changes[-1] == "completed"
    assert "in_progress" in changes
    tick_events = dagster.tick().asset_events
    assert tick_events == []


def test_a_person_who_terminates_the_parked_run_cancels_the_batch(
    dagster: Dagster, provider: Provider
) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    (run,) = dagster.queued
    dagster.instance.report_run_canceled(run)
    dagster.tick()
    assert provider.statuses() in (["cancelling"], ["cancelled"])
    assert dagster.instance.get_run_by_id(run.run_id).tags["anybatch/gate"] == "cancelled"


def test_a_batch_that_another_run_waits_for_is_not_cancelled(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    dagster.materialize("reviews_batch")  # finds the same batch
    dagster.tick()
    first, _ = dagster.queued
    dagster.instance.report_run_canceled(first)
    dagster.tick()
    assert provider.statuses() in (["validating"], ["in_progress"])
    assert Gate(dagster.instance).abandoned() == []


def test_a_parked_run_that_was_executed_again_is_adopted(dagster: Dagster, provider: Provider) -> None:
    dagster.materialize("reviews_batch")
    (requested,) = dagster.tick().run_requests
    dagster.instance.report_run_canceled(dagster.queued[0])
    dagster.tick()
    dagster.queue(requested)  # re-executed: the same tags
    provider.pass_time(100)
    dagster.tick()
    assert dagster.queued[0].tags["anybatch/gate"] == "open"


def test_a_deadline_opens_the_gate(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    (requested,) = dagster.tick(park=False).run_requests
    dagster.queue(requested.with_replaced_attrs(tags={**requested.tags, "anybatch/deadline": "1.0"}))
    dagster.tick(park=False)
    assert dagster.queued[0].tags["anybatch/gate"] == "open"


def test_runs_of_other_code_locations_are_left_to_their_sensor(dagster: Dagster) -> None:
    tags = {
        "anybatch/gate": "waiting",
        "anybatch/submit_asset": "elsewhere_batch",
        "anybatch/deadline": "1.0",
    }
    queue(dagster.instance, tags, frozenset())
    dagster.tick()
    assert dagster.queued[0].tags["anybatch/gate"] == "waiting"


# --- unparked ------------------------------------------------------------------------------------------


def test_without_the_rule_nothing_is_started_until_the_batch_has_ended(
    ungated: Dagster, provider: Provider, at_once: None
) -> None:
    ungated.materialize("reviews_batch")
    assert ungated.tick(park=False).run_requests == []
    assert ungated.tick(park=False).run_requests == []
    provider.pass_time(100)
    (requested,) = ungated.tick().run_requests
    assert requested.tags["anybatch/gate"] == "open"
    assert ungated.tick().run_requests == []


def test_the_cursor_waits_for_the_oldest_and_loses_none(
    ungated: Dagster, provider: Provider, at_once: None
) -> None:
    ungated.materialize("daily_batch", partition_key="mon")
    provider.pass_time(50)
    ungated.materialize("daily_batch", partition_key="tue")
    assert ungated.tick(park=False).run_requests == []
    provider.pass_time(30)
    (first,) = ungated.tick().run_requests
    assert first.tags["dagster/partition"] == "mon"
    provider.pass_time(60)
    (second,) = ungated.tick().run_requests
    assert second.tags["dagster/partition"] == "tue"
    assert ungated.tick().run_requests == []


def test_a_lost_answer_is_given_again_by_the_process_that_remembers(
    ungated: Dagster, provider: Provider, at_once: None
) -> None:
    ungated.materialize("daily_batch", partition_key="mon")
    provider.pass_time(50)
    ungated.materialize("daily_batch", partition_key="tue")
    provider.pass_time(30)
    (first,) = ungated.tick(park=False).run_requests  # behind it, the cursor stays where it was
    (again,) = ungated.tick_again(park=False).run_requests
    assert first.run_key == again.run_key
    ungated.queue(first)
    assert ungated.tick_again().run_requests == []


def test_what_a_person_collected_meanwhile_is_let_go(
    ungated: Dagster, provider: Provider, at_once: None
) -> None:
    ungated.materialize("reviews_batch")
    assert ungated.tick(park=False).run_requests == []
    provider.pass_time(100)
    ungated.materialize("reviews")
    assert ungated.tick_again(park=False).skip_message == "nothing waiting"


def test_unparked_too_each_change_is_told_once(ungated: Dagster, provider: Provider) -> None:
    ungated.materialize("reviews_batch")
    (event,) = ungated.tick(park=False).asset_events
    assert event.asset_key == dg.AssetKey("reviews_batch")
    assert ungated.tick_again(park=False).asset_events == []


def test_the_gate_rule_decides_how_to_wait(
    gated_instance: dg.DagsterInstance, gated: dg.DagsterInstance, instance: dg.DagsterInstance
) -> None:
    assert Gate(gated_instance).exists
    assert Gate(gated).exists
    assert not Gate(instance).exists


# --- the cursor, the budget, trouble -------------------------------------------------------------------


def test_the_cursor_moves_on_and_stays_small(dagster: Dagster, at_once: None) -> None:
    for day in ("mon", "tue", "wed"):
        dagster.materialize("daily_batch", partition_key=day)
        dagster.tick()
    after = json.loads(dagster.cursor or "{}")["after"]
    dagster.materialize("reviews_batch")
    dagster.tick()
    assert json.loads(dagster.cursor or "{}")["after"] > after > 0
    assert len(dagster.cursor or "") < 100


def test_a_young_event_is_read_again_since_an_older_one_may_still_come(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    submitted = dagster.instance.fetch_materializations(dg.AssetKey("reviews_batch"), limit=1).records[0]
    assert json.loads(dagster.cursor or "{}")["after"] < submitted.storage_id


def test_more_submissions_than_a_tick_takes_up_are_all_found(
    dagster: Dagster, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "MAX_NEW", 2)
    for day in ("mon", "tue", "wed"):
        dagster.materialize("daily_batch", partition_key=day)
    found = [len(dagster.tick().run_requests) for _ in range(4)]
    assert found == [2, 0, 1, 0]  # a new process first sees to it that what was asked for is there


@pytest.mark.parametrize(
    ("trouble", "gate"),
    [("500", "waiting"), ("429", "waiting"), ("401", "waiting"), ("404", "open"), ("hang", "waiting"),
     ("bug", "open")],
)  # fmt: skip
def test_trouble_at_the_provider_opens_no_gate_unless_the_wait_is_over(
    trouble: str, gate: str, dagster: Dagster, provider: Provider, capfd: pytest.CaptureFixture[str]
) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    resource = FailingResource(provider="x", api_base=trouble)
    broken = Dagster(dagster.instance, {"anybatch": resource}, tick_seconds=1.5)
    broken.cursor = dagster.cursor
    began = time.monotonic()
    broken.tick()
    assert time.monotonic() - began < 5  # the budget, and what a busy machine adds
    assert broken.queued[0].tags["anybatch/gate"] == gate
    assert ("Traceback" in capfd.readouterr().err) is (trouble == "bug")


class StuckResource(BatchResource):
    """A provider whose name is being looked up, in a thread that nothing can stop."""

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        async def answer(_: httpx.Request) -> httpx.Response:
            await asyncio.to_thread(LOOKED_UP.wait, 60)
            return httpx.Response(500)

        args = {"transport": httpx.MockTransport(answer)}
        return AsyncClient("openai-compatible", api_key="k", api_base="http://x/v1", client_args=args)


LOOKED_UP = threading.Event()


def test_a_tick_ends_in_time_though_a_thread_of_its_own_is_stuck(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    stuck = Dagster(dagster.instance, {"anybatch": StuckResource(provider="x")}, tick_seconds=1.0)
    stuck.cursor = dagster.cursor
    try:
        for told in (
            "1 waiting",
            "a provider did not answer within",
        ):  # the second does not pile up on the first
            began = time.monotonic()
            data = stuck.tick_again()
            assert time.monotonic() - began < 4  # the budget, and what a busy machine adds
            assert told in data.skip_message
        assert sum(thread.name == "anybatch-poll" for thread in threading.enumerate()) == 1
        assert stuck.queued[0].tags["anybatch/gate"] == "waiting"
    finally:
        LOOKED_UP.set()


class MistakenResource(BatchResource):
    """One whose settings nobody can use."""

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        raise RuntimeError("TEST_CANARY is not set")


def test_what_goes_wrong_in_the_thread_fails_the_tick(dagster: Dagster) -> None:
    dagster.materialize("reviews_batch")
    dagster.tick()
    mistaken = Dagster(dagster.instance, {"anybatch": MistakenResource(provider="x")})
    with pytest.raises(RuntimeError, match="TEST_CANARY is not set"):
        mistaken.tick()


class CountingResource(BatchResource):
    """The embedded provider, its requests counted."""

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        client = AsyncClient("local", api_base=self.api_base, retry=retry)

        async def count(_: httpx.Request) -> None:
            CALLS.append(1)

        client._http.event_hooks = {"request": [count]}
        return client


CALLS: list[int] = []


def test_many_batches_are_read_off_the_list_and_not_before_they_are_due(
    dagster: Dagster, provider: Provider
) -> None:
    with provider.resource.client() as client:
        path = provider.resource.output
        batches = [client.submit(_job(f"{path}/{number}", number))[0] for number in range(30)]
    for batch in batches:
        tags = {
            "anybatch/gate": "waiting",
            "anybatch/submit_asset": "reviews_batch",
            "anybatch/batches": batch.id,
            "anybatch/resource": "anybatch",
        }
        queue(dagster.instance, tags, frozenset())
    base = f"sqlite:///{provider.resource.api_base}"
    resource = CountingResource(provider="local", api_base=base)
    counted = Dagster(dagster.instance, {"anybatch": resource})
    CALLS.clear()
    counted.tick()
    assert 0 < len(CALLS) <= 2
    assert all(run.tags["anybatch/status"] for run in counted.queued)
    counted.tick_again()  # less than the provider's interval later
    assert len(CALLS) <= 2


def test_an_empty_page_is_not_the_end_of_the_list(tmp_path: Path) -> None:
    """Row G1: what stood behind it was retrieved one by one."""
    fake = OpenAIFake()
    with FakeServer(fake) as server:
        resource = BatchResource(provider="openai", api_base=server.api_base, api_key=fake.key)
        with resource.client() as client:
            ids = [client.submit(_job(str(tmp_path / f"{number}"), number))[0].id for number in range(12)]
        empty = {"object": "list", "data": [], "has_more": True, "last_id": ids[-1]}
        server.fail("GET", "/v1/batches", Respond(200, empty))
        calls = len(server.calls)
        poller = Poller()

        async def look() -> None:
            async with resource.async_client() as client:
                await poller.look(client, ids, 30.0, logging.getLogger("test"))

        asyncio.run(look())
        assert len(poller.states(ids)) == 12
        assert len(server.calls) - calls <= 3  # two pages, and the batch that the cursor leaves out


def _job(output: str, number: int) -> Any:
    from anybatch import Job

    return Job(input=[request(str(number), model="local:echo?delay=60")], output=output)


def batch(status: BatchStatus, done: int, total: int, ended: int | None = None) -> Batch:
    counts = RequestCounts(total=total, completed=done, failed=0)
    return Batch(
        id="b",
        status=status,
        raw_status=status.value,
        provider="x",
        request_counts=counts,
        completed_at=ended,
    )


@pytest.mark.parametrize(
    ("batches", "mark", "ended", "ended_at"),
    [
        ([batch(BatchStatus.IN_PROGRESS, 0, 8)], "in_progress", False, None),
        ([batch(BatchStatus.IN_PROGRESS, 3, 8)], "in_progress, 25%", False, None),
        ([batch(BatchStatus.IN_PROGRESS, 4, 8)], "in_progress, 50%", False, None),
        ([batch(BatchStatus.COMPLETED, 8, 8, 5)], "completed", True, 5),
        (
            [batch(BatchStatus.COMPLETED, 8, 8, 5), batch(BatchStatus.IN_PROGRESS, 0, 8)],
            "in_progress, 50%",
            False,
            None,
        ),
        ([batch(BatchStatus.COMPLETED, 8, 8, 5), batch(BatchStatus.EXPIRED, 0, 8)], "expired", True, 5),
        ([batch(BatchStatus.UNKNOWN, 0, 8)], "unknown", False, None),
    ],
)
def test_several_batches_are_told_as_one(
    batches: list[Batch], mark: str, ended: bool, ended_at: int | None
) -> None:
    progress = progress_of(batches)
    assert (progress.stage, progress.ended, progress.ended_at) == (mark, ended, ended_at)


def test_a_submission_of_an_unknown_resource_is_named(dagster: Dagster, capsys: Any) -> None:
    dagster.materialize("reviews_batch")
    (requested,) = dagster.tick(park=False).run_requests
    dagster.queue(requested.with_replaced_attrs(tags={**requested.tags, "anybatch/resource": "other"}))
    dagster.tick(park=False)
    assert "build_batch_sensor was not given the resource 'other'" in capsys.readouterr().err


def test_assets_of_this_module_are_pairs(dagster: Dagster) -> None:
    assert isinstance(reviews, BatchAssets)
    loaded = dagster.definitions.resolve_asset_graph()
    from anybatch_dagster.submissions import batch_asset_pairs

    names = {key.to_user_string(): of.to_user_string() for key, of in batch_asset_pairs(loaded).items()}
    assert names == {"reviews_batch": "reviews", "daily_batch": "daily"}
