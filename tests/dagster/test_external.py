"""Batches that other systems created, reported as events of an external asset."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest

from anybatch import Batch, BatchStatus, write_jsonl
from anybatch_dagster import build_external_batch_sensor
from anybatch_dagster.external import Seen

from .conftest import FailingResource, Provider, request

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


def ended(number: int, at: int) -> Batch:
    return Batch(
        id=f"b{number}", status=BatchStatus.COMPLETED, raw_status="completed", provider="x", completed_at=at
    )


def test_the_cursor_stays_small_however_many_end_at_once() -> None:
    seen = Seen.read(None, 0)
    for start in range(0, 5000, 50):
        news = [ended(number, 1000 + number // 100) for number in range(start, start + 50)]
        assert all(map(seen.is_new, news))
        seen = Seen.read(seen.with_told(news).write(), 0)
        assert not any(map(seen.is_new, news))
        assert len(seen.write()) <= 4096
    assert json.loads(seen.write())["ended"] > 1000
