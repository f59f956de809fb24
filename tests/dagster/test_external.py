"""Batches that other systems created, reported as events of an external asset."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from anybatch import Batch, BatchStatus, write_jsonl
from anybatch_dagster import BatchResource, build_external_batch_sensor, external
from anybatch_dagster.external import Seen
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .conftest import FailingResource, Provider, request

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = dg.AssetKey("labels")


class Outside:
    """Another system that creates batches, and the sensor that looks at them."""

    def __init__(self, instance: dg.DagsterInstance, provider: Provider, **options: Any) -> None:
        self.instance, self.provider = instance, provider
        self.options = {"asset": KEY, **options}
        self.resources: dict[str, Any] = provider.resources
        self.cursor: str | None = None

    def create(self, model: str = "local:echo?delay=60", **metadata: str) -> str:
        path = f"{self.provider.resource.output}-outside.jsonl"
        write_jsonl(path, [request("a", model=model)])
        return self.provider.resource.create(path, metadata=metadata).id

    def tick(self) -> list[Any]:
        sensor = build_external_batch_sensor(**self.options)
        definitions = dg.Definitions(assets=[dg.AssetSpec(KEY)], resources=self.resources)
        context = dg.build_sensor_context(
            self.instance, cursor=self.cursor, definitions=definitions, resources=self.resources
        )
        with context:
            data = sensor.evaluate_tick(context)
        self.cursor = data.cursor
        return list(data.asset_events)


def batches(events: list[Any]) -> list[str]:
    return [event.metadata["anybatch/batch"].value for event in events]


def test_a_batch_is_reported_once_when_it_has_ended(instance: dg.DagsterInstance, provider: Provider) -> None:
    outside = Outside(instance, provider)
    first = outside.create()
    assert outside.tick() == []
    provider.pass_time(100)
    (event,) = outside.tick()
    assert isinstance(event, dg.AssetObservation)
    assert event.asset_key == KEY
    assert event.metadata["anybatch/status"].value == "completed"
    assert event.metadata["anybatch/requests"].value == 1
    assert event.metadata["anybatch/batch"].value == first
    assert outside.tick() == []
    second = outside.create()
    provider.pass_time(100)
    assert batches(outside.tick()) == [second]


def test_a_tick_whose_answer_was_lost_reports_again(instance: dg.DagsterInstance, provider: Provider) -> None:
    outside = Outside(instance, provider)
    outside.tick()
    before = outside.cursor
    batch = outside.create()
    provider.pass_time(100)
    assert batches(outside.tick()) == [batch]
    outside.cursor = before
    assert batches(outside.tick()) == [batch]


def test_only_what_was_asked_for_and_nothing_of_dagsters_own(
    instance: dg.DagsterInstance, provider: Provider
) -> None:
    outside = Outside(instance, provider, metadata={"team": "x"}, where=lambda batch: batch.id != skipped)
    outside.create(team="y")
    outside.create(team="x", anybatch_job="dagster:reviews_batch")
    skipped = outside.create(team="x")
    wanted = outside.create(team="x")
    provider.pass_time(100)
    assert batches(outside.tick()) == [wanted]
    other = Outside(instance, provider, endpoint="/v1/embeddings")
    assert other.tick() == []


def test_materializations_of_a_partition_and_an_observation_of_what_failed(
    instance: dg.DagsterInstance, provider: Provider
) -> None:
    outside = Outside(
        instance,
        provider,
        event="materialization",
        partition=lambda batch: (batch.metadata or {}).get("day"),
    )
    outside.create(day="monday")
    outside.create("local:echo?invalid=token_limit_exceeded", day="tuesday")
    provider.pass_time(100)
    events = sorted(outside.tick(), key=lambda event: event.partition)
    assert [(type(event), event.partition) for event in events] == [
        (dg.AssetMaterialization, "monday"),
        (dg.AssetObservation, "tuesday"),
    ]


def test_what_ended_before_the_first_tick_looks_back_is_no_news(
    instance: dg.DagsterInstance, provider: Provider
) -> None:
    outside = Outside(instance, provider, lookback=timedelta(seconds=-200))
    outside.create()
    provider.pass_time(100)
    assert outside.tick() == []


@pytest.mark.parametrize("trouble", ["500", "401", "hang"])
def test_a_provider_that_does_not_answer_moves_nothing(
    trouble: str, instance: dg.DagsterInstance, provider: Provider
) -> None:
    outside = Outside(instance, provider, tick_seconds=0.5)
    outside.tick()
    batch = outside.create()
    provider.pass_time(100)
    outside.resources = {"anybatch": FailingResource(provider="x", api_base=trouble)}
    assert outside.tick() == []
    outside.resources = provider.resources
    assert batches(outside.tick()) == [batch]


# --- listings that are not read to their end --------------------------------------------------------------


def listed(batch_id: str, ended: float, status: str = "completed", completed: int = 1) -> dict[str, Any]:
    """A batch as OpenAI lists it, that took a minute."""
    end = {"completed": "completed_at", "failed": "failed_at"}[status]
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "status": status,
        "created_at": int(ended) - 60,
        end: int(ended),
        "request_counts": {"total": 2, "completed": completed, "failed": 0},
    }


class Listed:
    """A server that lists what a test says, and the sensor that reads it."""

    def __init__(self, instance: dg.DagsterInstance, provider: Provider, server: FakeServer) -> None:
        resource = BatchResource(provider="openai", api_base=server.api_base, api_key="k")
        self.server = server
        self.outside = Outside(instance, provider)
        self.outside.resources = {"anybatch": resource}

    def tick(self, *pages: dict[str, Any] | int) -> list[Any]:
        """A tick that is given these pages, or these errors."""
        for page in pages:
            answer = Respond(page, {}) if isinstance(page, int) else Respond(200, page)
            self.server.fail("GET", "/v1/batches", answer)
        events = self.outside.tick()
        assert self.server.unused_faults == 0
        return events


@pytest.fixture
def listing(instance: dg.DagsterInstance, provider: Provider) -> Iterator[Listed]:
    with FakeServer(OpenAIFake()) as server:
        yield Listed(instance, provider, server)


def test_what_stands_behind_an_empty_page_is_reported(listing: Listed) -> None:
    """Row G1: an empty page with a cursor was taken for the end, and what was behind it for reported."""
    now = time.time()
    newest = {"data": [listed("b2", now)], "has_more": True, "last_id": "b2"}
    empty = {"data": [], "has_more": True, "last_id": "cursor"}
    oldest = {"data": [listed("b1", now - 5000)], "has_more": False}
    assert batches(listing.tick(newest, empty, oldest)) == ["b1", "b2"]


def test_a_listing_that_breaks_off_does_not_make_the_rest_old_news(listing: Listed) -> None:
    """Row G1: what was read moved the cursor past batches that stood on a page that was not."""
    now = time.time()
    newest = {"data": [listed("b2", now)], "has_more": True, "last_id": "b2"}
    oldest = {"data": [listed("b1", now - 5000)], "has_more": False}
    assert batches(listing.tick(newest, 500)) == ["b2"]
    assert batches(listing.tick(newest, oldest)) == ["b1"]
    assert listing.tick(newest, oldest) == []


def test_more_pages_than_a_tick_reads_do_not_make_the_rest_old_news(
    listing: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row G1: the same, where it was the sensor that stopped."""
    monkeypatch.setattr(external, "_PAGES", 1)
    now = time.time()
    newest = {"data": [listed("b2", now)], "has_more": True, "last_id": "b2"}
    assert batches(listing.tick(newest)) == ["b2"]
    monkeypatch.undo()
    oldest = {"data": [listed("b1", now - 5000)], "has_more": False}
    assert batches(listing.tick(newest, oldest)) == ["b1"]


def test_a_listing_that_cannot_be_read_on_is_named_and_makes_nothing_old_news(
    listing: Listed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row G1: `has_more` without a cursor was taken for the end."""
    now = time.time()
    newest = {"data": [listed("b2", now)], "has_more": True, "last_id": "b2"}
    endless = {"data": [], "has_more": True}
    oldest = {"data": [listed("b1", now - 5000)], "has_more": False}
    assert batches(listing.tick(newest, endless)) == ["b2"]
    assert "not how to read on" in capsys.readouterr().err
    assert batches(listing.tick(newest, oldest)) == ["b1"]


@pytest.mark.parametrize(("completed", "kind"), [(1, dg.AssetMaterialization), (0, dg.AssetObservation)])
def test_a_batch_that_failed_with_rows_that_were_paid_for_is_materialized(
    completed: int, kind: type, listing: Listed
) -> None:
    """Row I4: ends that carry paid rows count; downstream nothing would have been started for them."""
    listing.outside.options["event"] = "materialization"
    page = {"data": [listed("b1", time.time(), "failed", completed)], "has_more": False}
    assert [type(event) for event in listing.tick(page)] == [kind]


def ended(number: int, at: int) -> Batch:
    return Batch(
        id=f"b{number}", status=BatchStatus.COMPLETED, raw_status="completed", provider="x", completed_at=at
    )


def test_the_cursor_stays_small_however_many_end_at_once() -> None:
    seen = Seen.read(None, 0)
    for start in range(0, 5000, 50):
        news = [ended(number, 1000 + number // 100) for number in range(start, start + 50)]
        assert all(map(seen.is_new, news))
        seen = Seen.read(seen.with_reported(news).write(), 0)
        assert not any(map(seen.is_new, news))
        assert len(seen.write()) <= 4096
    assert json.loads(seen.write())["ended"] > 1000
