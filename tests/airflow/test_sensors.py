"""Waiting for batches that something else created."""

from __future__ import annotations

import json
import time
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

from anybatch import Batch, Client, RetryPolicy
from anybatch_airflow import AnyBatchHook, AnyBatchOperator, AnyBatchSensor
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State

from .versions import AIRFLOW, DagSerialization, needs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fakes.server import FakeServer


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
        other = AnyBatchOperator(task_id="other", input=[], output="o")
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


# --- trouble at the provider -------------------------------------------------------------------------


@pytest.fixture
def gated(keyed_server: FakeServer, add_connection: Callable[..., str]) -> Callable[..., AnyBatchSensor]:
    """`gated(…)`: a sensor for `batch_1`, which runs, at a server where things go wrong."""
    facts = {"host": keyed_server.api_base, "password": "sk-right", "extra": {"provider": "openai"}}
    conn_id = add_connection("gated", conn_type="anybatch", **facts)
    batch = FakeBatch("batch_1", "/v1/embeddings", time.time(), input_file_id="file_1")
    batch.state, batch.options = State.IN_PROGRESS, {"completion_window": "24h"}
    assert isinstance(keyed_server.app, OpenAIFake)
    keyed_server.app.batches[batch.id] = batch

    def make(**kwargs: Any) -> AnyBatchSensor:
        return AnyBatchSensor(**{"task_id": "s", "batch_id": batch.id, "conn_id": conn_id, **kwargs})

    return make


REFUSED = Respond(403, {"error": {"message": "no"}})
A_BATCH = "/v1/batches/.*"


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize(
    ("fate", "expected"),
    [({}, AirflowFailException), ({"soft_fail": True}, AirflowSkipException),
     ({"never_fail": True}, AirflowSkipException)],
)  # fmt: skip
def test_a_refusal_fails_or_is_skipped(
    gated: Callable[..., AnyBatchSensor], keyed_server: FakeServer, context: dict[str, Any], deferrable: bool,
    fate: dict[str, Any], expected: type[Exception],
) -> None:  # fmt: skip
    keyed_server.fail("GET", A_BATCH, REFUSED, times=100)
    with pytest.raises(expected):
        gated(deferrable=deferrable, **fate).execute(context)


def test_a_connection_that_is_not_there_can_be_skipped(context: dict[str, Any], database: None) -> None:
    sensor = AnyBatchSensor(task_id="s", batch_id="b", conn_id="nowhere", never_fail=True)
    with pytest.raises(AirflowSkipException):
        sensor.execute(context)


def test_silent_fail_looks_again_after_the_poke_interval(
    gated: Callable[..., AnyBatchSensor], keyed_server: FakeServer, context: dict[str, Any]
) -> None:
    keyed_server.fail("GET", A_BATCH, REFUSED, times=100)
    sensor = gated(silent_fail=True, poke_interval=77, timeout=3600)
    with pytest.raises(TaskDeferred) as caught:
        sensor.execute(context)
    first = caught.value.trigger
    assert (first.batches, first.min_defer_seconds) == ({"batch_1": None}, 77)
    # It is the trigger that meets the error: the task looks itself, and waits on until the same deadline.
    event = {"status": "error", "batches": {}, "message": "refused", "then": first.then}
    with pytest.raises(TaskDeferred) as caught:
        sensor.execute_complete(context, event)
    assert caught.value.trigger.deadlines == first.deadlines
    with pytest.raises(AirflowSensorTimeout, match="refused"):
        sensor.execute_complete(context, event | {"then": str(time.time() - 1)})


@pytest.mark.parametrize("status", [429, 500])
def test_an_outage_fails_no_poke(
    gated: Callable[..., AnyBatchSensor], keyed_server: FakeServer, context: dict[str, Any], status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sensor = gated(deferrable=False)
    monkeypatch.setattr(sensor, "hook", lambda: impatient_hook(sensor))
    keyed_server.fail("GET", A_BATCH, Respond(status), times=1)
    assert not sensor.poke(context)
    assert not sensor.poke(context)  # it is seen again, and runs
    assert [call.status for call in keyed_server.find("GET", A_BATCH)] == [status, 200]


def test_an_outage_at_the_first_look_is_waited_out_deferred(
    gated: Callable[..., AnyBatchSensor], keyed_server: FakeServer, context: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sensor = gated(min_defer_seconds=3)
    monkeypatch.setattr(sensor, "hook", lambda: impatient_hook(sensor))
    keyed_server.fail("GET", A_BATCH, Respond(503), times=1)
    with pytest.raises(TaskDeferred) as caught:
        sensor.execute(context)
    trigger = caught.value.trigger
    assert (trigger.batches, trigger.min_defer_seconds) == ({"batch_1": None}, 3)


def impatient_hook(sensor: AnyBatchSensor) -> AnyBatchHook:
    """The sensor's hook, whose clients send each request once."""

    class Impatient(AnyBatchHook):
        def get_client(self, **kwargs: Any) -> Client:
            return super().get_client(retry=RetryPolicy(attempts=1))

    return Impatient(sensor.effective_conn_id)


def test_a_sensor_that_began_in_the_triggerer_links_to_its_batch_at_the_end(
    add_connection: Callable[..., str], context: dict[str, Any]
) -> None:
    conn_id = add_connection("linked", conn_type="anybatch", password="k", extra={"provider": "openai"})
    event = {"status": "ended", "batches": {"batch_1": {"status": "completed"}}, "message": "", "then": None}
    sensor = AnyBatchSensor(task_id="s", batch_id="batch_1", conn_id=conn_id, start_from_trigger=True)
    assert sensor.execute_complete(context, event) == {"batch_1": {"status": "completed"}}
    assert context["ti"].pushed["batch_url"] == "https://platform.openai.com/batches/batch_1"


def test_without_a_key_on_the_worker_there_is_only_no_link(
    add_connection: Callable[..., str], context: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    conn_id = add_connection("keyless", conn_type="anybatch", extra={"provider": "openai"})
    event = {"status": "ended", "batches": {"batch_1": {"status": "completed"}}, "message": "", "then": None}
    sensor = AnyBatchSensor(task_id="s", batch_id="batch_1", conn_id=conn_id, start_from_trigger=True)
    assert sensor.execute_complete(context, event) == {"batch_1": {"status": "completed"}}
    assert context["ti"].pushed == {}
