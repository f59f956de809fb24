"""Creating, landing and cancelling as tasks of their own, without a database."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, TaskDeferred
from upath import UPath

from anybatch import Client, CreateOutcomeUnknownError, Job
from anybatch.providers.base import Limits
from anybatch_airflow import (
    AnyBatchCancelOperator,
    AnyBatchCreateOperator,
    AnyBatchHook,
    AnyBatchResultsOperator,
)
from tests.fakes.anthropic import AnthropicFake
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.rows import Quirks
from tests.fakes.server import FakeServer

from .conftest import TaskInstance
from .versions import needs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ON = {"conn_id": "fake"}


class Store:
    """Airflow's task state store: JSON by key, kept over attempts."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.retention: Any = None

    def get(self, key: str, default: Any = None) -> Any:
        return json.loads(self.kept[key]) if key in self.kept else default

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self.kept[key] = json.dumps(value)
        self.retention = retention


class Killed(BaseException):
    """The end of an attempt that runs no handler of ours."""


class MortalStore(Store):
    """The attempt that does this write dies, right before or right after it."""

    def __init__(self, write: int, is_written: bool) -> None:
        super().__init__()
        self.left, self.is_written = write, is_written

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self.left -= 1
        if self.left or self.is_written:
            super().set(key, value, retention=retention)
        if not self.left:
            raise Killed

    def age(self, seconds: float) -> None:
        for key, text in self.kept.items():
            ledger = json.loads(text)
            for shard in ledger["shards"]:
                shard["creating_at"] = shard["creating_at"] and shard["creating_at"] - seconds
            self.kept[key] = json.dumps(ledger)


def requests(rows: int = 3, model: str = "gpt-x") -> list[dict[str, Any]]:
    body = {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "a secret"}]}
    return [
        {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number in range(rows)
    ]


@pytest.fixture(autouse=True)
def _no_pause_after_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of these tests shows a write at once, where a real one may take a moment."""
    monkeypatch.setattr("anybatch.jobs.shard._WRITE_TIME", 0.0)


@pytest.fixture
def server(add_connection: Callable[..., str]) -> Iterator[FakeServer]:
    with FakeServer(OpenAIFake(key="k")) as server:
        connect(add_connection, server, "openai")
        yield server


@pytest.fixture
def fake(server: FakeServer) -> OpenAIFake:
    assert isinstance(server.app, OpenAIFake)
    return server.app


def connect(add_connection: Callable[..., str], server: FakeServer, provider: str) -> None:
    facts = {"password": "k", "host": server.api_base, "extra": {"provider": provider}}
    add_connection("fake", conn_type="anybatch", **facts)


# --- create ------------------------------------------------------------------------------------------


class Attempts:
    """The attempts of one task instance."""

    def __init__(self, ti: TaskInstance, store: Store | None) -> None:
        self.ti, self.store = ti, store
        run_after = datetime.fromtimestamp(time.time() - 60, UTC)
        self.context: dict[str, Any] = {"ti": ti, "dag_run": SimpleNamespace(run_after=run_after)}
        if store is not None:
            self.context["task_state_store"] = store

    def create(self, given: Any = None, **kwargs: Any) -> list[str]:
        operator = AnyBatchCreateOperator(
            task_id="task", input=requests() if given is None else given, **{**ON, **kwargs}
        )
        try:
            return operator.execute(self.context)
        finally:
            self.ti.try_number += 1


@pytest.fixture(params=["with a store", "without a store"])
def attempts(request: pytest.FixtureRequest, ti: TaskInstance) -> Attempts:
    return Attempts(ti, Store() if request.param == "with a store" else None)


def test_create_returns_ids_and_a_retry_creates_nothing(
    attempts: Attempts, server: FakeServer, fake: OpenAIFake
) -> None:
    ids = attempts.create(metadata={"team": "t"})
    assert ids == list(fake.batches)
    assert fake.last.metadata is not None
    assert fake.last.metadata["team"] == "t"
    for _ in range(2):
        assert attempts.create(metadata={"team": "t"}) == ids
    assert server.count("POST", "/v1/batches") == 1
    assert attempts.ti.pushed["batch_url"] == ""


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_an_attempt_that_was_killed_at_any_write_leaves_one_batch(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake, write: int, is_written: bool
) -> None:
    store = MortalStore(write, is_written)
    attempts = Attempts(ti, store)
    with pytest.raises(Killed):
        attempts.create()
    store.age(120)  # what an attempt has claimed is its own for a while only
    assert attempts.create() == attempts.create() == [batch.id for batch in fake.live_batches()]
    assert len(fake.batches) == 1


def test_two_attempts_at_once_leave_one_batch(
    server: FakeServer, fake: OpenAIFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anybatch.jobs.shard._WRITE_TIME", 0.5)
    store = Store()
    attempts = [Attempts(TaskInstance(), store) for _ in range(2)]
    with ThreadPoolExecutor(2) as both:
        ids = list(both.map(lambda one: one.create(), attempts))
    [live] = fake.live_batches()
    assert [live.id] in ids
    assert attempts[0].create() == [live.id]


def test_each_task_instance_has_batches_of_its_own(server: FakeServer, fake: OpenAIFake) -> None:
    mapped = [Attempts(TaskInstance(map_index=index), None) for index in range(2)]
    ids = [one.create() for one in mapped]
    assert [one.create() for one in mapped] == ids
    assert len(fake.batches) == 2


def test_a_cancelled_batch_is_created_anew(attempts: Attempts, fake: OpenAIFake) -> None:
    [first] = attempts.create()
    fake.cancel_now(first)
    [second] = attempts.create()
    assert second != first
    assert attempts.create() == [second]


@pytest.mark.parametrize("end", ["finish", "expire"])
def test_a_batch_that_has_ended_stays(attempts: Attempts, fake: OpenAIFake, end: str) -> None:
    ids = attempts.create()
    getattr(fake, end)(ids[0])
    assert attempts.create() == ids
    assert len(fake.batches) == 1


def test_a_batch_that_was_refused_as_a_whole_is_created_anew(attempts: Attempts, fake: OpenAIFake) -> None:
    [first] = attempts.create()
    fake.fail(first, "token_limit_exceeded", "Too many tokens")
    [second] = attempts.create()
    assert second != first


def test_a_large_input_has_several_batches(
    attempts: Attempts, fake: OpenAIFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_client = AnyBatchHook.get_client

    def get_limited_client(hook: AnyBatchHook) -> Client:
        client = get_client(hook)
        client.provider.limits = Limits(requests=2)
        return client

    monkeypatch.setattr(AnyBatchHook, "get_client", get_limited_client)
    ids = attempts.create(requests(5))
    assert [len(fake.start(batch_id).ids) for batch_id in ids] == [2, 2, 1]
    assert attempts.create(requests(5)) == ids


def test_without_a_store_batches_with_the_same_marks_are_named_and_not_cancelled(
    ti: TaskInstance, fake: OpenAIFake, server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts(ti, None)
    [first] = attempts.create(requests(2))
    ti.try_number = 1  # nobody looked: an attempt that ran at the same time, or another deployment's task
    [double] = attempts.create(requests(2))
    assert attempts.create(requests(2)) == [first]
    assert fake.batches[double].is_live
    assert (
        f"more running batches carry this task's metadata than it needs: {double} is in_progress."
        in capfd.readouterr().out
    )


def test_deployments_with_names_keep_apart(
    ti: TaskInstance, fake: OpenAIFake, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = {}
    for name in ("staging", "production"):
        monkeypatch.setenv("AIRFLOW__ANYBATCH__DEPLOYMENT", name)
        ti.try_number = 1
        created[name] = Attempts(ti, None).create()
    for name, ids in created.items():
        monkeypatch.setenv("AIRFLOW__ANYBATCH__DEPLOYMENT", name)
        assert Attempts(ti, None).create() == ids
    assert len(fake.live_batches()) == 2
    assert fake.last.metadata is not None
    assert fake.last.metadata["anybatch_job"] == "airflow:production/dag/task/manual__2026-01-01"


def test_other_input_replaces_what_was_created(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake
) -> None:
    attempts = Attempts(ti, Store())
    [first] = attempts.create()
    [second] = attempts.create(requests(5))
    assert fake.batches[first].state in ("cancelling", "cancelled")
    assert attempts.create(requests(5)) == [second]
    with pytest.raises(AirflowFailException, match="on_changed"):
        attempts.create(requests(6), on_changed="fail")


@needs(3, "NEVER_EXPIRE and the store")
def test_the_store_holds_no_prompt_and_for_ever(ti: TaskInstance, server: FakeServer) -> None:
    from airflow.sdk.execution_time.context import NEVER_EXPIRE

    store = Store()
    ids = Attempts(ti, store).create()
    [kept] = store.kept.values()
    assert ids[0] in kept
    assert "secret" not in kept
    assert len(kept) < 2000
    assert store.retention is NEVER_EXPIRE


def test_a_first_attempt_asks_the_provider_for_nothing(attempts: Attempts, server: FakeServer) -> None:
    attempts.create()
    assert server.count("GET", "/v1/batches") == 0


def test_where_nobody_can_be_asked_a_second_attempt_needs_a_decision(
    ti: TaskInstance, add_connection: Callable[..., str]
) -> None:
    with FakeServer(AnthropicFake(key="k")) as server:
        connect(add_connection, server, "anthropic")
        given = requests(model="claude")
        without = Attempts(ti, None)
        without.create(given)
        with pytest.raises(AirflowFailException, match="may have created batches"):
            without.create(given)
        assert server.count("POST", "/v1/messages/batches") == 1
        without.create(given, on_orphan="resubmit")
        assert server.count("POST", "/v1/messages/batches") == 2
        ti.try_number = 1
        stored = Attempts(ti, Store())
        ids = stored.create(given)
        assert stored.create(given) == ids
        assert server.count("POST", "/v1/messages/batches") == 3


def cut_short(server: FakeServer, *shown: dict[str, Any]) -> None:
    """A listing that shows these entries under another cursor each time."""
    for number in range(20):
        body = {"object": "list", "data": list(shown), "has_more": True, "last_id": f"x{number}"}
        server.fail("GET", "/v1/batches", Respond(200, body))


@pytest.mark.parametrize("has_store", [False, True])
def test_a_listing_that_cannot_be_read_to_its_end_says_of_nothing_that_it_is_not_there(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake, has_store: bool
) -> None:
    """FAULTS G1: the batch was not on the pages that were read, and was bought again."""
    Attempts(ti, None).create()  # of which nothing is on record
    attempts = Attempts(ti, Store() if has_store else None)
    foreign = {"id": "batch_foreign", "object": "batch", "status": "completed"}
    cut_short(server, foreign)
    with pytest.raises(CreateOutcomeUnknownError, match="could not be read to its end"):  # may be retried
        attempts.create()
    assert len(fake.batches) == 1
    attempts.create(on_orphan="resubmit")
    assert len(fake.batches) == 2


def test_what_was_found_before_a_listing_broke_off_is_taken(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake
) -> None:
    """FAULTS G1: nothing would be created, so nothing can be bought twice."""
    attempts = Attempts(ti, None)
    [batch_id] = attempts.create()
    [shown] = (call.reply for call in server.find("POST", "/v1/batches") if call.reply)
    cut_short(server, json.loads(shown.body))
    assert attempts.create() == [batch_id]
    assert len(fake.batches) == 1


def test_a_batch_of_a_later_round_is_not_taken_for_the_whole_input(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake
) -> None:
    """FAULTS A1, its kind: the task was an AnyBatchOperator, whose second round held a few rows."""
    attempts = Attempts(ti, None)
    [part] = attempts.create(requests(1))
    marks = fake.batches[part].metadata
    assert marks is not None
    marks["anybatch_round"] = "7"
    [whole] = attempts.create(requests(3))
    assert whole != part
    assert len(fake.start(whole).ids) == 3


def test_bad_input_creates_nothing(attempts: Attempts, server: FakeServer) -> None:
    with pytest.raises(AirflowFailException, match="line 1"):
        attempts.create([{"custom_id": "a"}])
    assert not server.calls


# --- results -----------------------------------------------------------------------------------------


@pytest.fixture
def created(ti: TaskInstance, fake: OpenAIFake) -> Callable[[int], str]:
    """`created(3)`: the id of a new batch of three rows."""

    def make(rows: int) -> str:
        other = Attempts(TaskInstance(task_id=f"create_{len(fake.batches)}"), Store())
        [batch_id] = other.create(requests(rows))
        return batch_id

    return make


def land(ti: TaskInstance, place: Any, batch_id: Any, **kwargs: Any) -> dict[str, Any]:
    operator = AnyBatchResultsOperator(task_id="task", batch_id=batch_id, output=place, **{**ON, **kwargs})
    return operator.execute({"ti": ti})


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_results_of_several_batches_land_in_one_file(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path, scheme: str
) -> None:
    one, two = created(3), created(2)
    fake.finish(one, failed=["row-1"])
    fake.expire(two, done=1)
    place = f"{scheme}{tmp_path}/landed"
    for _ in range(2):  # as a retry would
        manifest = land(ti, place, f"['{one}', '{two}']", price=(1.0, 1.0))
    assert {name: count for name, count in manifest["counts"].items() if count} == {
        "succeeded": 3, "failed": 1, "expired": 1,
    }  # fmt: skip
    assert (manifest["rows"], manifest["batch_ids"]) == (5, [one, two])
    assert manifest["cost"] > 0
    folder = UPath(place) if scheme else Path(place)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert {line["custom_id"] for line in lines[:3]} == {"row-0", "row-1", "row-2"}
    assert json.loads((folder / "report.json").read_text())["rows"] == 5


def test_rows_that_no_file_mentions_are_counted(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    batch_id = created(4)
    fake.finish(batch_id, failed=["row-2"], quirks=Quirks(missing={"row-2"}))
    manifest = land(ti, tmp_path / "landed", batch_id)
    assert (manifest["rows"], manifest["counts"]["succeeded"], manifest["counts"]["missing"]) == (4, 3, 1)


@pytest.mark.parametrize("status", [400, 403])
def test_a_download_that_fails_replaces_nothing(
    ti: TaskInstance, server: FakeServer, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path,
    status: int,
) -> None:  # fmt: skip
    """FAULTS A2: what was landed before stays, and is whole."""
    one, two = created(2), created(2)
    fake.finish(one)
    fake.finish(two)
    land(ti, tmp_path / "landed", one)
    before = {path.name: path.read_bytes() for path in (tmp_path / "landed").iterdir()}
    file_id = fake.batches[two].output_file_id
    server.fail("GET", f"/v1/files/{file_id}/content", Respond(status), times=9)
    with pytest.raises(AirflowFailException):
        land(ti, tmp_path / "landed", [one, two])
    assert {path.name: path.read_bytes() for path in (tmp_path / "landed").iterdir()} == before


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


def test_a_row_that_is_nested_deep_lands_as_it_came(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    """FAULTS A3: one row nested 300 levels deep, and the whole task raised on every attempt."""
    answer, answered = fake.answer, iter(range(9))

    def answer_oddly(endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        deep = {"deep": nested(300)} if next(answered) == 1 else {}
        return {**answer(endpoint, body), **deep}

    fake.answer = answer_oddly
    batch_id = created(3)
    fake.finish(batch_id)
    manifest = land(ti, tmp_path / "landed", batch_id)
    assert (manifest["rows"], manifest["counts"]["succeeded"]) == (3, 3)
    lines = [json.loads(line) for line in (tmp_path / "landed" / "results.jsonl").read_text().splitlines()]
    (deep,) = [line for line in lines if "deep" in line["response"]["body"]]
    assert deep["response"]["body"]["deep"] == nested(300)  # paid for, and kept


def test_lines_that_cannot_be_read_are_rows_and_those_that_repeat_one_are_kept(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    """FAULTS A3, its kind: a second line without an id, or for one row, went without a trace."""
    batch_id = created(4)
    fake.finish(batch_id, failed=2, quirks=Quirks(duplicated={"row-3"}, files="output"))
    file = fake.files[fake.batches[batch_id].output_file_id or ""]
    lines = file.data.splitlines()
    file.data = b"\n".join([b'{"broken', b"[]", *lines[2:]]) + b"\n"
    manifest = land(ti, tmp_path / "landed", batch_id)
    assert (manifest["rows"], manifest["counts"]["succeeded"], manifest["counts"]["failed"]) == (4, 2, 2)
    strays = (tmp_path / "landed" / "stray.jsonl").read_bytes().splitlines()
    assert strays[:2] == [b'{"broken', b"[]"]
    assert json.loads(strays[2])["custom_id"] == "row-3"
    assert len(strays) == 3


def test_a_batch_that_still_runs_asks_for_a_sensor(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    one, two = created(1), created(1)
    fake.finish(one)
    with pytest.raises(AirflowException, match=f"{two} is in_progress.*AnyBatchSensor") as caught:
        land(ti, tmp_path / "landed", [one, two])
    assert not isinstance(caught.value, AirflowFailException)  # a retry may find it ended
    assert not (tmp_path / "landed").exists()


def test_a_batch_that_was_refused_has_no_results(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    batch_id = created(1)
    fake.fail(batch_id, "token_limit_exceeded", "Too many tokens")
    with pytest.raises(AirflowFailException, match="token_limit_exceeded"):
        land(ti, tmp_path / "landed", batch_id)


@pytest.mark.parametrize(
    ("options", "fails"),
    [
        ({}, None),
        ({"on_partial": "fail"}, "on_partial='fail'"),
        ({"max_failed_ratio": 0.1}, "max_failed_ratio=0.1"),
        ({"max_failed_ratio": 0.25}, None),
    ],
)
def test_the_same_policies_as_for_a_job(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path,
    options: dict[str, Any], fails: str | None,
) -> None:  # fmt: skip
    batch_id = created(4)
    fake.finish(batch_id, failed=["row-3"])
    if fails is None:
        assert land(ti, tmp_path / "landed", batch_id, **options)["counts"]["failed"] == 1
        return
    with pytest.raises(AirflowFailException, match=fails) as caught:
        land(ti, tmp_path / "landed", batch_id, **options)
    assert "'row-3' failed" in str(caught.value)


def test_the_folder_of_a_job_is_not_touched(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str], tmp_path: Path
) -> None:
    with Client("local", api_base=f"sqlite:///{tmp_path}/local.db") as client:
        client.submit(Job(input=requests(model="local:echo"), output=tmp_path / "job", id="another"))
    batch_id = created(1)
    fake.finish(batch_id)
    with pytest.raises(AirflowFailException, match="holds job 'another'"):
        land(ti, tmp_path / "job", batch_id)


# --- cancel ------------------------------------------------------------------------------------------


def cancel(ti: TaskInstance, batch_id: Any, **kwargs: Any) -> dict[str, Any]:
    return AnyBatchCancelOperator(task_id="task", batch_id=batch_id, **{**ON, **kwargs}).execute({"ti": ti})


def test_cancel_is_repeatable(ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str]) -> None:
    running, done = created(2), created(1)
    fake.finish(done)
    told = cancel(ti, [running, done])
    assert told[done] == {"status": "completed", "total": 1, "completed": 1, "failed": 0}
    assert told[running]["status"] in ("cancelling", "cancelled")
    assert cancel(ti, [running, done])[running]["status"] in ("cancelling", "cancelled")


def test_cancel_waits_for_the_end_if_asked_to(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str]
) -> None:
    fake.cancel_looks = None
    batch_id = created(2)
    with pytest.raises(TaskDeferred) as caught:
        cancel(ti, batch_id, wait_for_end=True, timeout=600)
    trigger = caught.value.trigger
    assert set(trigger.batches) == set(trigger.deadlines) == {batch_id}
    assert trigger.deadlines[batch_id] == pytest.approx(time.time() + 600, abs=30)
    assert not trigger.cancel_on_kill
    fake.cancel_now(batch_id)
    assert cancel(ti, batch_id, wait_for_end=True)[batch_id]["status"] == "cancelled"


def test_cancel_waits_on_the_worker_if_told_to(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str]
) -> None:
    fake.cancel_looks = 0
    told = cancel(ti, created(1), wait_for_end=True, deferrable=False)
    assert [batch["status"] for batch in told.values()] == ["cancelled"]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"status": "ended", "batches": {"b": {"status": "cancelled"}}, "message": ""}, None),
        (
            {"status": "timeout", "batches": {"b": {"timeout": True}}, "message": "late"},
            "asked to cancel, but late",
        ),
        ({"status": "error", "batches": {}, "message": "gone"}, "gone"),
        (None, "does not understand"),
    ],
)
def test_how_a_cancel_is_resumed(event: Any, expected: str | None) -> None:
    operator = AnyBatchCancelOperator(task_id="task", batch_id="b", **ON)
    if expected is None:
        assert operator.execute_complete({}, event) == {"b": {"status": "cancelled"}}
        return
    with pytest.raises(AirflowException, match=expected):
        operator.execute_complete({}, event)


def test_one_that_cannot_be_cancelled_keeps_none_of_the_others(
    ti: TaskInstance, fake: OpenAIFake, created: Callable[[int], str]
) -> None:
    batch_id = created(1)
    with pytest.raises(AirflowException, match=r"1 of 2 batches were not cancelled: NotFoundError"):
        cancel(ti, ["batch_gone", batch_id])
    assert fake.batches[batch_id].state in ("cancelling", "cancelled")
