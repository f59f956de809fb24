"""The trigger alone, in an event loop of the test's."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat import connection

from anybatch import AsyncClient, Batch, Client
from anybatch_airflow import AnyBatchTrigger, hooks, triggers
from anybatch_airflow.triggers import status_and_message
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.server import FakeServer

from .conftest import TaskInstance
from .versions import deserialize, serialize

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeRequests = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def create(tmp_path: Path, api_base: str, make_requests: MakeRequests) -> Callable[[str], Batch]:
    """`create("delay=1")`: a batch of three rows at the local provider."""

    def make(wish: str) -> Batch:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in make_requests(3, wish)))
        with Client("local", api_base=api_base) as client:
            return client.create(path, "/v1/chat/completions")

    return make


async def event_of(trigger: AnyBatchTrigger) -> dict[str, Any]:
    async for event in trigger.run():
        return dict(event.payload)
    raise AssertionError("the trigger ended without an event")


def trigger_for(api_base: str, *batches: Batch, **kwargs: Any) -> AnyBatchTrigger:
    made = {batch.id: batch.created_at for batch in batches}
    return AnyBatchTrigger(
        **{"batches": made, "provider": "local", "api_base": api_base, "min_defer_seconds": 0, **kwargs}
    )


def test_it_survives_serialization() -> None:
    trigger = AnyBatchTrigger(
        batches={"batch_1": 1_790_000_000, "batch_2": None}, conn_id="c", provider="openai",
        api_base="https://x/v1", deadlines={"batch_1": 1.79e9}, deferred_at=1.78e9, min_defer_seconds=12.5,
        then="land", cancel_on_kill=False, outlasts_lost=True,
    )  # fmt: skip
    path, kwargs = trigger.serialize()
    assert path == "anybatch_airflow.triggers.AnyBatchTrigger"
    again = AnyBatchTrigger(**deserialize(json.loads(json.dumps(serialize(kwargs)))))
    assert again.serialize() == trigger.serialize()


def test_it_holds_no_key(add_connection: Callable[..., str]) -> None:
    conn_id = add_connection(
        "keyed", conn_type="anybatch", password="sk-canary", extra={"provider": "openai"}
    )
    trigger = AnyBatchTrigger(batches={"b": None}, conn_id=conn_id)
    asyncio.run(trigger._hook().get_watcher())
    assert "sk-canary" not in f"{trigger.serialize()} {trigger!r} {trigger.__dict__}"


def test_one_event_for_all_batches(create: Callable[[str], Batch], api_base: str) -> None:
    quick, slow, half = create("delay=0.2"), create("delay=0.8"), create("delay=0.5&expire=1")
    event = asyncio.run(event_of(trigger_for(api_base, quick, slow, half)))
    assert event["status"] == "ended"
    assert {id_: told["status"] for id_, told in event["batches"].items()} == {
        quick.id: "completed", slow.id: "completed", half.id: "expired",
    }  # fmt: skip
    assert event["batches"][slow.id] == {"status": "completed", "total": 3, "completed": 3, "failed": 0}
    json.dumps(event)


def test_the_log_tells_progress_and_not_every_look(
    create: Callable[[str], Batch], api_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = create("delay=1")
    asyncio.run(event_of(trigger_for(api_base, batch)))
    told = re.findall(
        rf"batch {batch.id}: (\w+)(?:, (\d) of 3 rows)? +\[anybatch_air", capsys.readouterr().out
    )
    assert told[-1] == ("completed", "3")
    assert len(told) == len(set(told))


def test_log_lines_are_written_in_order_and_off_the_event_loop(
    create: Callable[[str], Batch], api_base: str
) -> None:
    """A line waits for whoever reads it; the other triggers do not."""
    trigger = trigger_for(api_base, create("delay=0.6"))
    written: list[tuple[str, str]] = []

    class Reader:
        """One that is busy for a while with each line."""

        def info(self, text: str, *args: object) -> None:
            time.sleep(0.1)
            written.append((threading.current_thread().name, text % args))

    trigger._log = Reader()  # type: ignore[assignment]

    asyncio.run(event_of(trigger))
    [batch_id] = trigger.batches
    stages = [text.removeprefix(f"batch {batch_id}: ").split(",")[0] for _, text in written[:-1]]
    known = ["validating", "in_progress", "finalizing", "completed"]
    assert stages == sorted(stages, key=known.index)
    assert stages[-1] == "completed"
    assert written[-1][1] == f"{batch_id} is completed"  # before the event, which ends the trigger's log
    assert {name for name, _ in written} == {"anybatch-log_0"}


def test_each_batch_has_its_deadline_of_wall_clock(create: Callable[[str], Batch], api_base: str) -> None:
    quick, late, other = create("delay=0.2"), create("delay=600"), create("delay=1.5")
    now = time.time()
    deadlines = {late.id: now + 1, other.id: now + 600}
    event = asyncio.run(event_of(trigger_for(api_base, quick, late, other, deadlines=deadlines)))
    assert event["status"] == "timeout"
    assert event["message"] == f"not ended at the deadline: {late.id}"
    assert event["batches"][late.id] == {"timeout": True}
    assert {event["batches"][batch.id]["status"] for batch in (quick, other)} == {"completed"}


def test_what_comes_after_is_told_back(create: Callable[[str], Batch], api_base: str) -> None:
    batch = create("delay=0")
    assert asyncio.run(event_of(trigger_for(api_base, batch, then="land")))["then"] == "land"


def test_a_task_that_starts_in_the_triggerer_gives_ids_alone(
    create: Callable[[str], Batch], api_base: str
) -> None:
    one, two = create("delay=0"), create("delay=0.2")
    for batch_id in (one.id, [one.id, two.id], f"['{one.id}', '{two.id}']"):  # as a template renders a list
        event = asyncio.run(event_of(trigger_for(api_base, batches=None, batch_id=batch_id)))
        assert event["status"] == "ended"
        assert set(event["batches"]) == ({one.id} if batch_id == one.id else {one.id, two.id})
    assert asyncio.run(event_of(trigger_for(api_base, batches=None, batch_id="")))["status"] == "error"


def test_a_batch_that_does_not_exist_is_an_error_at_once(
    create: Callable[[str], Batch], api_base: str
) -> None:
    """Whatever the others do: one of many shards may run for another day."""
    there = create("delay=600")
    trigger = trigger_for(api_base, batches={there.id: None, "batch_gone": None})
    event = asyncio.run(asyncio.wait_for(event_of(trigger), 20))
    assert event["status"] == "error"
    assert "NotFoundError" in event["batches"]["batch_gone"]["error"]
    assert event["batches"][there.id] == {"waiting": True}
    assert event["message"].endswith(f"; still running, and the task no longer waits for: {there.id}")
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(there.id).status in ("validating", "in_progress")


def test_a_batch_that_is_lost_keeps_no_other_from_being_waited_for(
    create: Callable[[str], Batch], api_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAULTS A4b: one dead batch of a job, and the others are still waited for."""
    there, late = create("delay=1"), create("delay=600")
    batches, now = {"batch_gone": None, there.id: None}, time.time()
    trigger = trigger_for(api_base, batches=batches, outlasts_lost=True)
    event = asyncio.run(asyncio.wait_for(event_of(trigger), 20))
    assert event["status"] == "ended"
    assert event["batches"][there.id]["status"] == "completed"
    assert "NotFoundError" in event["batches"]["batch_gone"]["lost"]
    assert event["message"] == f"batch_gone is not known to the provider, {there.id} is completed"
    told = capsys.readouterr().out  # when it is found out, and not when all have ended
    assert told.index("does not know batch batch_gone") < told.index(f"{there.id}: completed")
    deadlines = {late.id: now + 1}
    trigger = trigger_for(
        api_base, batches={**batches, late.id: None}, deadlines=deadlines, outlasts_lost=True
    )
    event = asyncio.run(asyncio.wait_for(event_of(trigger), 20))
    assert (event["status"], event["message"]) == ("timeout", f"not ended at the deadline: {late.id}")


def test_what_else_is_refused_ends_the_wait_also_where_a_lost_batch_is_outlasted(
    add_connection: Callable[..., str], keyed_server: FakeServer
) -> None:
    """FAULTS A4b: a wrong key is no lost batch."""
    facts = {"password": "sk-wrong", "host": keyed_server.api_base, "extra": {"provider": "openai"}}
    conn_id = add_connection("wrong", conn_type="anybatch", **facts)
    trigger = AnyBatchTrigger(
        batches={"batch_1": None}, conn_id=conn_id, min_defer_seconds=0, outlasts_lost=True
    )
    assert asyncio.run(event_of(trigger))["status"] == "error"


def test_a_message_names_a_few_errors_of_many() -> None:
    told: dict[str, dict[str, Any]] = {f"batch_{number}": {"error": "gone"} for number in range(7)}
    named = "; ".join(f"batch_{number}: gone" for number in range(5))
    assert status_and_message(told) == ("error", f"{named}; and 2 more")


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"provider": "opnai"}, "unknown provider"),
        ({"provider": None, "conn_id": "unfinished"}, "does not say which provider"),
    ],
)
def test_a_wrong_configuration_is_an_event(
    add_connection: Callable[..., str], api_base: str, facts: dict[str, Any], named: str
) -> None:
    add_connection("unfinished", conn_type="anybatch")
    event = asyncio.run(event_of(trigger_for(api_base, batches={"b": None}, **facts)))
    assert event["status"] == "error"
    assert named in event["message"]


def test_a_wrong_key_ends_the_wait_and_is_not_told(
    add_connection: Callable[..., str], keyed_server: FakeServer
) -> None:
    conn_id = add_connection(
        "wrong",
        conn_type="anybatch",
        password="sk-wrong",
        host=keyed_server.api_base,
        extra={"provider": "openai"},
    )
    trigger = AnyBatchTrigger(batches={"batch_1": None}, conn_id=conn_id, min_defer_seconds=0)
    event = asyncio.run(event_of(trigger))
    assert event["status"] == "error"
    assert event["final"]
    assert "AuthenticationError" in event["message"]
    assert "sk-wrong" not in json.dumps(event)


def test_a_bug_ends_the_wait_with_its_traceback_in_the_log(
    create: Callable[[str], Batch], api_base: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async def parser_that_fails(*_: object) -> Batch:
        raise TypeError("a bug of ours")

    monkeypatch.setattr(AsyncClient, "retrieve", parser_that_fails)
    trigger = trigger_for(api_base, create("delay=0"), deadlines={})
    event = asyncio.run(asyncio.wait_for(event_of(trigger), 30))
    assert event["status"] == "error"
    assert not event["final"]
    assert "TypeError: a bug of ours" in event["message"]
    assert "parser_that_fails" in capsys.readouterr().out


def test_no_event_right_after_the_deferral(create: Callable[[str], Batch], api_base: str) -> None:
    batch = create("delay=0")
    begun = time.time()
    asyncio.run(event_of(trigger_for(api_base, batch, deferred_at=begun, min_defer_seconds=1)))
    assert time.time() - begun >= 1


def test_the_pause_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AnyBatchTrigger(batches={}).min_defer_seconds == 10
    monkeypatch.setenv("AIRFLOW__ANYBATCH__MIN_DEFER_SECONDS", "2.5")
    assert AnyBatchTrigger(batches={}).min_defer_seconds == 2.5


def test_many_triggers_share_one_connection_pool(
    keyed_server: FakeServer, add_connection: Callable[..., str]
) -> None:
    conn_id = add_connection(
        "many",
        conn_type="anybatch",
        password="sk-right",
        host=keyed_server.api_base,
        extra={"provider": "openai"},
    )
    names = [f"batch_{number}" for number in range(30)]

    async def all_events() -> list[dict[str, Any]]:
        triggers = [
            AnyBatchTrigger(batches={name: None}, conn_id=conn_id, min_defer_seconds=0) for name in names
        ]
        return await asyncio.gather(*map(event_of, triggers))

    events = asyncio.run(all_events())
    assert [event["status"] for event in events] == ["error"] * 30  # no such batch
    assert keyed_server.connections <= 8  # one pool for all


def count_calls(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[None]]:
    """A list that grows with every look-up of a connection, and one with every freeze."""
    look_ups: list[str] = []
    freezes: list[None] = []
    get_async_connection = connection.get_async_connection

    async def look_up(conn_id: str) -> Any:
        look_ups.append(conn_id)
        return await get_async_connection(conn_id)

    monkeypatch.setattr(connection, "get_async_connection", look_up)
    monkeypatch.setattr(gc, "freeze", lambda: freezes.append(None))
    hooks._freeze_loaded_objects.cache_clear()
    return look_ups, freezes


def test_five_hundred_triggers_start_with_a_few_calls(
    add_connection: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart of the triggerer, which starts all its triggers at once."""
    fake = OpenAIFake(key="sk-right")
    with FakeServer(fake) as server:
        facts = {"host": server.api_base, "password": "sk-right", "extra": {"provider": "openai"}}
        conn_id = add_connection("restarted", conn_type="anybatch", **facts)
        look_ups, freezes = count_calls(monkeypatch)
        for number in range(500):
            batch = FakeBatch(f"batch_{number}", "/v1/embeddings", time.time(), input_file_id="file_1")
            batch.state, batch.options = State.IN_PROGRESS, {"completion_window": "24h"}
            fake.batches[batch.id] = batch
        created = {batch_id: int(batch.created_at) for batch_id, batch in fake.batches.items()}

        async def first_seconds() -> None:
            triggers = [AnyBatchTrigger(batches={name: at}, conn_id=conn_id) for name, at in created.items()]
            waits = [asyncio.create_task(event_of(trigger)) for trigger in triggers]
            deadline = time.monotonic() + 20
            while any(batch.looks == 0 for batch in fake.batches.values()):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert not [wait for wait in waits if wait.done()]
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

        asyncio.run(first_seconds())
        calls = [call.path for call in server.calls]
        looked_at = sum(batch.looks > 0 for batch in fake.batches.values())
    assert looked_at == 500
    assert look_ups == [conn_id]
    assert len(freezes) == 1
    # One look at all of them is five pages of a hundred; one by one it would have been 500 calls.
    assert 5 <= len(calls) <= 20
    assert set(calls) == {"/v1/batches"}


class Judged(AnyBatchTrigger):
    """A trigger whose task instance is in a given state."""

    state: str | None = None

    async def _task_state(self) -> str | None:
        return self.state


@pytest.mark.parametrize(
    ("state", "cancelled"),
    [
        ("deferred", False),  # cleared, or a stalled triggerer that woke up
        (None, False),
        ("scheduled", False),
        ("running", False),
        ("up_for_retry", False),
        ("failed", True),
        ("success", True),
        ("skipped", True),
    ],
)
def test_it_cancels_only_for_a_task_instance_that_is_over(
    create: Callable[[str], Batch], api_base: str, state: str | None, cancelled: bool
) -> None:
    batches = create("delay=600"), create("delay=600")
    trigger = Judged(batches={b.id: b.created_at for b in batches}, provider="local", api_base=api_base)
    trigger.state = state
    asyncio.run(trigger.on_kill())
    with Client("local", api_base=api_base) as client:
        now = {client.retrieve(batch.id).status.value for batch in batches}
    assert now <= ({"cancelling", "cancelled"} if cancelled else {"validating", "in_progress"})


def test_a_batch_that_cannot_be_cancelled_keeps_none_of_the_others(
    create: Callable[[str], Batch], api_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = create("delay=600")
    trigger = Judged(batches={"batch_gone": None, batch.id: None}, provider="local", api_base=api_base)
    trigger.state = "failed"
    asyncio.run(trigger.on_kill())
    assert "batch_gone was not cancelled" in capsys.readouterr().out
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("cancelling", "cancelled")


def test_batches_that_are_not_the_tasks_own_are_never_cancelled(
    create: Callable[[str], Batch], api_base: str
) -> None:
    batch = create("delay=600")
    trigger = Judged(batches={batch.id: None}, provider="local", api_base=api_base, cancel_on_kill=False)
    trigger.state = "failed"
    asyncio.run(trigger.on_kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("validating", "in_progress")


def test_a_batch_past_its_deadline_is_the_tasks_to_cancel(
    create: Callable[[str], Batch], api_base: str
) -> None:
    """This triggerer stalled; another one told of the deadline, and `on_timeout="leave"` failed the task."""
    late, other = create("delay=600"), create("delay=600")
    deadlines = {late.id: time.time() - 1, other.id: time.time() + 600}
    trigger = Judged(
        batches={late.id: None, other.id: None}, provider="local", api_base=api_base, deadlines=deadlines
    )
    trigger.state = "failed"
    asyncio.run(trigger.on_kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(late.id).status in ("validating", "in_progress")
        assert client.retrieve(other.id).status in ("cancelling", "cancelled")


def test_nothing_is_cancelled_once_the_outcome_is_known(
    create: Callable[[str], Batch], api_base: str
) -> None:
    """The task has failed by that outcome, which another triggerer told: its next attempt wants the batch."""
    batch = create("delay=600")
    trigger = Judged(
        batches={batch.id: None, "batch_gone": None}, provider="local", api_base=api_base,
        min_defer_seconds=600,
    )  # fmt: skip
    trigger.state = "failed"

    async def stalled_before_it_tells() -> None:
        running = asyncio.create_task(event_of(trigger))
        deadline = time.monotonic() + 20
        while not trigger._is_decided:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        running.cancel()
        await trigger.on_kill()

    asyncio.run(stalled_before_it_tells())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("validating", "in_progress")


@pytest.fixture
def orphan(create: Callable[[str], Batch], api_base: str) -> AnyBatchTrigger:
    """The trigger of a task instance, with a batch that runs."""
    trigger = trigger_for(api_base, create("delay=600"))
    trigger.task_instance = TaskInstance()  # type: ignore[assignment]
    return trigger


def test_the_state_is_asked_for_again_where_there_is_no_answer(
    orphan: AnyBatchTrigger, api_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow's API, or its database, may just be being replaced."""
    answers = iter([OSError("connection refused"), RuntimeError("500"), "failed"])

    def state_of(ti: Any) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(triggers, "state_of", state_of)
    monkeypatch.setattr(triggers, "ASK_AGAIN", 0.01)
    asyncio.run(orphan.on_kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(*orphan.batches).status in ("cancelling", "cancelled")


def test_the_connection_is_asked_for_again_too(
    create: Callable[[str], Batch], api_base: str, add_connection: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batch = create("delay=600")
    conn_id = add_connection("ours", conn_type="anybatch", host=api_base, extra={"provider": "local"})
    trigger = Judged(batches={batch.id: None}, conn_id=conn_id)
    trigger.state = "failed"
    failures = [OSError("connection refused")]
    get_async_connection = connection.get_async_connection

    async def look_up(conn_id: str) -> Any:
        if failures:
            raise failures.pop()
        return await get_async_connection(conn_id)

    monkeypatch.setattr(connection, "get_async_connection", look_up)
    monkeypatch.setattr(triggers, "ASK_AGAIN", 0.01)
    asyncio.run(trigger.on_kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("cancelling", "cancelled")


@pytest.mark.parametrize("hangs", [False, True])
def test_without_an_answer_the_batch_is_left_and_named(
    orphan: AnyBatchTrigger, api_base: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], hangs: bool,
) -> None:  # fmt: skip
    released = threading.Event()

    def state_of(ti: Any) -> str:
        if hangs:
            released.wait(30)
        raise OSError("connection refused")

    monkeypatch.setattr(triggers, "state_of", state_of)
    monkeypatch.setattr(triggers, "ASK_AGAIN", 0.01)
    monkeypatch.setenv("AIRFLOW__TRIGGERER__ON_KILL_TIMEOUT", "1")
    begun = time.monotonic()
    asyncio.run(orphan.on_kill())
    assert time.monotonic() - begun < 10
    released.set()
    [batch_id] = orphan.batches
    why = "TimeoutError: " if hangs else "OSError: connection refused"
    assert f"so these run on: {batch_id} ({why})" in capsys.readouterr().out
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch_id).status in ("validating", "in_progress")


def test_without_a_task_instance_nothing_is_cancelled(create: Callable[[str], Batch], api_base: str) -> None:
    batch = create("delay=600")
    asyncio.run(trigger_for(api_base, batch).on_kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("validating", "in_progress")


def test_what_repeats_its_cancellation_does_not_keep_the_batch_alive(
    create: Callable[[str], Batch], api_base: str
) -> None:
    """Airflow 3.3 cancels a trigger anew about once a second until it is gone, `on_kill` or not."""
    batch = create("delay=600")
    trigger = Judged(batches={batch.id: None}, provider="local", api_base=api_base)
    trigger.state = "failed"

    async def kill() -> None:
        killing = asyncio.create_task(trigger.on_kill())
        while not killing.done():
            await asyncio.sleep(0)
            killing.cancel()

    asyncio.run(kill())
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(batch.id).status in ("cancelling", "cancelled")
