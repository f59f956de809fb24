"""Waiting for batches that something else created."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.module_loading import import_string
from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferred,
)
from airflow.sdk import DAG

from anybatch import Batch, Client
from anybatch_airflow import AnyBatchOperator, AnyBatchSensor

from .versions import AIRFLOW, DagSerialization, needs

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
    batch = create("delay=0", ended=True)
    told = {"status": "completed", "total": 3, "completed": 3, "failed": 0}
    assert make_sensor(batch_id=batch.id).execute(context) == {batch.id: told}


def test_it_defers_for_all_at_once(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any]
) -> None:
    done, running = create("delay=0", ended=True), create("delay=600")
    with pytest.raises(TaskDeferred) as caught:
        make_sensor(done, running, timeout=3600).execute(context)
    trigger = caught.value.trigger
    assert set(trigger.batches) == {done.id, running.id}
    [deadline] = set(trigger.deadlines.values())
    assert 3500 < deadline - trigger.deferred_at <= 3600
    assert trigger.cancel_on_kill is False  # whoever created the batches may still want them
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
    batch = create("delay=0&expire=1", ended=True)
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


# --- from the triggerer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", ["b2", pytest.param("{{ params.id }}", marks=needs(3, "templates in the triggerer"))]
)
def test_it_starts_in_the_triggerer_if_asked_to(
    make_sensor: Callable[..., AnyBatchSensor], other: str
) -> None:
    sensor = make_sensor(batch_id=["b1", other], start_from_trigger=True, timeout=90)
    assert sensor.start_from_trigger is True
    arguments = sensor.start_trigger_args
    assert (arguments.next_method, arguments.timeout) == ("execute_complete", timedelta(seconds=90))
    trigger = import_string(arguments.trigger_cls)(**arguments.trigger_kwargs)
    assert (trigger.batch_id, trigger.provider) == (["b1", other], "local")
    assert trigger.min_defer_seconds == 0
    assert trigger.cancel_on_kill is False
    # What the triggerer renders is what both know by the same name.
    assert set(arguments.trigger_kwargs) & set(sensor.template_fields) == set(sensor.template_fields)
    assert all(hasattr(trigger, name) for name in sensor.template_fields)


def test_the_start_in_the_triggerer_is_stored_with_the_dag(
    make_sensor: Callable[..., AnyBatchSensor],
) -> None:
    with DAG("stored", schedule=None) as dag:
        make_sensor(batch_id="b1", start_from_trigger=True)
    again = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    task = again.get_task("s")
    assert task.start_from_trigger is True
    assert task.start_trigger_args.trigger_cls == "anybatch_airflow.triggers.AnyBatchTrigger"


@pytest.mark.parametrize("kwargs", [{}, {"start_from_trigger": True, "deferrable": False}])
def test_else_it_starts_on_a_worker(
    make_sensor: Callable[..., AnyBatchSensor], kwargs: dict[str, Any]
) -> None:
    sensor = make_sensor(batch_id="b", **kwargs)
    assert sensor.start_from_trigger is False
    assert sensor.start_trigger_args is None


def test_a_template_waits_for_a_worker_where_no_triggerer_renders_it(
    make_sensor: Callable[..., AnyBatchSensor],
) -> None:
    sensor = make_sensor(batch_id="{{ params.id }}", start_from_trigger=True)
    assert sensor.start_from_trigger is (AIRFLOW >= (3, 3))


def test_an_xcom_is_known_to_a_worker_only(make_sensor: Callable[..., AnyBatchSensor]) -> None:
    with DAG("xcom", schedule=None):
        other = AnyBatchOperator(task_id="other", input=[], output_folder="o")
        sensor = make_sensor(batch_id=other.output, start_from_trigger=True)
    assert sensor.start_from_trigger is False
    assert other in sensor.get_direct_relatives(upstream=True)


def test_a_mapped_sensor_starts_on_a_worker() -> None:
    with DAG("mapped", schedule=None) as dag:
        AnyBatchSensor.partial(task_id="s", provider="local", start_from_trigger=True).expand(batch_id=["a"])
    task = DagSerialization.from_dict(DagSerialization.to_dict(dag)).get_task("s")
    assert task.start_trigger_args is None


@pytest.mark.parametrize("fate", ["soft_fail", "never_fail"])
def test_no_batch_can_be_skipped(
    make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any], fate: str
) -> None:
    with pytest.raises(AirflowSkipException):
        make_sensor(batch_id=[], **{fate: True}).execute(context)


def test_it_links_to_the_batch_once(
    create: Callable[..., Batch], make_sensor: Callable[..., AnyBatchSensor], context: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pushes: list[str] = []
    monkeypatch.setattr(type(context["ti"]), "xcom_push", lambda self, key, value: pushes.append(key))
    sensor = make_sensor(create("delay=0.8"), deferrable=False, poke_interval=0.2, timeout=20)
    sensor.execute(context)
    assert pushes.count("batch_url") == 1
