"""Waiting for batches that something else created."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferred,
)

from anybatch import Batch, Client
from anybatch_airflow import AnyBatchSensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def create(tmp_path: Path, api_base: str, make_requests: Callable[..., Any]) -> Callable[[str], Batch]:
    def make(wish: str, *, ended: bool = False) -> Batch:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in make_requests(3, wish)))
        with Client("local", api_base=api_base) as client:
            batch = client.create(path, "/v1/chat/completions")
            return client.wait(batch.id, timeout=20) if ended else batch

    return make


@pytest.fixture
def make_sensor(api_base: str) -> Callable[..., AnyBatchSensor]:
    def make(*batches: Batch, **kwargs: Any) -> AnyBatchSensor:
        ids = [batch.id for batch in batches]
        defaults = {"task_id": "s", "batch_id": ids, "provider": "local", "api_base": api_base}
        return AnyBatchSensor(**{**defaults, **kwargs})

    return make


def test_it_looks_before_it_defers(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any]
) -> None:
    batch = create("delay=0.2", ended=True)
    told = {"status": "completed", "total": 3, "completed": 3, "failed": 0}
    assert make_sensor(batch_id=batch.id).execute(context) == {batch.id: told}


def test_it_defers_for_all_at_once(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any]
) -> None:
    done, running = create("delay=0.2", ended=True), create("delay=600")
    with pytest.raises(TaskDeferred) as caught:
        make_sensor(done, running, timeout=3600).execute(context)
    trigger = caught.value.trigger
    assert set(trigger.batches) == {done.id, running.id}
    assert 3500 < trigger.deadline - trigger.deferred_at <= 3600
    assert not caught.value.kwargs


def test_it_pokes_if_told_to(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any]
) -> None:
    batch = create("delay=1")
    sensor = make_sensor(batch, deferrable=False, poke_interval=0.2, timeout=20)
    assert sensor.execute(context)[batch.id]["status"] == "completed"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, AirflowFailException),
        ({"soft_fail": True}, AirflowSkipException),
        ({"accept": ("completed", "expired")}, None),
        ({"deferrable": False}, AirflowFailException),
        ({"deferrable": False, "soft_fail": True}, AirflowSkipException),
    ],
)
def test_an_end_that_is_not_accepted_fails(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any],
    kwargs: dict[str, Any], expected: type[Exception] | None,
) -> None:  # fmt: skip
    batch = create("delay=0.2&expire=1", ended=True)
    sensor = make_sensor(batch, **kwargs)
    if expected is None:
        assert sensor.execute(context)[batch.id]["status"] == "expired"
        return
    with pytest.raises(expected):
        sensor.execute(context)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"status": "timeout", "batches": {}, "message": "late"}, AirflowSensorTimeout),
        ({"status": "error", "batches": {}, "message": "gone"}, AirflowException),
        ({"status": "ended", "batches": {"b": {"status": "failed"}}, "message": ""}, AirflowFailException),
        (None, AirflowException),
        ({}, AirflowException),
    ],
)
def test_events_of_failure(
    make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any], event: Any, expected: type[Exception]
) -> None:
    with pytest.raises(expected) as caught:
        make_sensor(batch_id="b").execute_complete(context, event)
    assert type(caught.value) is expected
    # As Airflow resumes it: soft_fail holds for a deferred sensor too.
    with pytest.raises(AirflowSkipException):
        make_sensor(batch_id="b", soft_fail=True).resume_execution(
            "execute_complete", {"event": event}, context
        )


def test_no_batch_is_an_error(make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match="empty"):
        make_sensor(batch_id=[]).execute(context)
