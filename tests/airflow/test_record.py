"""What is on record of a job, and what an attempt does where it should be and is not."""

from __future__ import annotations

import json
import shutil
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from airflow.providers.common.compat.sdk import AirflowFailException
from airflow.sdk import DAG
from airflow.sdk.io import fs

from anybatch import CreateOutcomeUnknownError
from anybatch_airflow import AnyBatchCreateOperator, AnyBatchOperator
from anybatch_airflow.inputs import location
from tests.fakes.faults import Respond

from .test_parts import Store
from .versions import DagSerialization
from .world import ENDED, requests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .world import World

SECRET = "the text of a prompt {{ ti }}"


# --- a folder that not all workers see ---------------------------------------------------------------


def lose_folder(world: World) -> None:
    """The next attempt, or the resumed one, is on another machine."""
    shutil.rmtree(world.out)
    world.ti.try_number += 1


def test_a_task_that_is_resumed_without_its_folder_is_not_retried(world: World) -> None:
    world.attempt()
    [batch_id] = world.created
    shutil.rmtree(world.out)
    event = {**ENDED, "batches": {batch_id: {"status": "completed"}}}
    with pytest.raises(
        AirflowFailException, match=f"no record of .*{batch_id}.* a disk that only one worker"
    ):
        world.woken(event)


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_retry_without_the_folder_does_not_pay_again(world: World, is_noted: bool) -> None:
    if is_noted:
        world.store = Store()
    world.attempt()
    [batch_id] = world.created
    for _ in range(2):
        lose_folder(world)
        with pytest.raises(AirflowFailException, match=rf"no record of .*{batch_id} \(.*\)"):
            world.attempt()
        world.out.mkdir()
    assert world.created == [batch_id]
    world.attempt(on_orphan="resubmit")
    assert len(world.created) == 2


def test_what_the_store_has_noted_is_not_asked_of_the_provider(world: World) -> None:
    world.store = Store()
    world.attempt()
    lose_folder(world)
    with pytest.raises(AirflowFailException):
        world.attempt()
    assert world.server.count("GET", "/v1/batches") == 0


@pytest.mark.parametrize("end", ["cancel_now", "fail", "delete"])
@pytest.mark.parametrize("is_noted", [True, False])
def test_batches_that_are_worth_nothing_keep_no_attempt_from_creating(
    world: World, end: str, is_noted: bool
) -> None:
    if is_noted:
        world.store = Store()
    world.attempt()
    [batch_id] = world.created
    match end:
        case "cancel_now":
            world.fake.cancel_now(batch_id)
        case "fail":
            world.fake.fail(batch_id, "token_limit_exceeded", "Too many tokens")
        case _:
            del world.fake.batches[batch_id]
    lose_folder(world)
    assert list(world.attempt().batches) == [world.fake.last.id] != [batch_id]


def test_a_retry_of_an_attempt_that_created_nothing_goes_on(world: World) -> None:
    for store in (None, Store()):
        world.store = store
        world.ti.try_number = 2
        shutil.rmtree(world.out, ignore_errors=True)
        world.fake.batches.clear()
        assert list(world.attempt().batches) == world.created


def test_a_first_attempt_asks_nobody(world: World) -> None:
    world.attempt()
    assert world.server.count("GET", "/v1/batches") == 0


def foreign(last_id: str) -> Respond:
    """A page of a listing that goes on for ever, and shows none of ours."""
    batch = {"id": "batch_foreign", "object": "batch", "status": "completed", "created_at": int(time.time())}
    return Respond(200, {"object": "list", "data": [batch], "has_more": True, "last_id": last_id})


def cut_short(world: World) -> None:
    """From now on the listing shows the same entries under another cursor each time."""
    for number in range(20):
        world.server.fail("GET", "/v1/batches", foreign(f"x{number}"))


def test_a_listing_that_cannot_be_read_to_its_end_says_of_nothing_that_it_is_not_there(world: World) -> None:
    """FAULTS G1: the batch was not on the pages that were read, and was bought again."""
    world.attempt()
    [batch_id] = world.created
    cut_short(world)
    lose_folder(world)
    with pytest.raises(CreateOutcomeUnknownError, match="could not be read to its end"):  # may be retried
        world.attempt()
    assert world.created == [batch_id]
    world.attempt(on_orphan="resubmit")
    assert len(world.created) == 2


def test_an_empty_page_that_leads_on_is_no_end(world: World) -> None:
    """FAULTS G1: what came after it was taken for absent, and bought again."""
    world.attempt()
    world.ti.task_id = "other"
    shutil.rmtree(world.out)
    world.attempt()  # another task's, which is newer
    [ours, others] = world.created
    world.ti.task_id = "task"
    empty = Respond(200, {"object": "list", "data": [], "has_more": True, "last_id": others})
    world.server.fail("GET", "/v1/batches", empty)
    lose_folder(world)
    with pytest.raises(AirflowFailException, match=rf"no record of .*{ours} \("):
        world.attempt()
    assert world.created == [ours, others]


# --- where the input lies ----------------------------------------------------------------------------


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`memory://my_store@…`, which opens with that connection and no other."""

    def open_store(conn_id: str | None, _: Any) -> Any:
        if conn_id != "my_store":
            raise PermissionError(f"connection {conn_id!r}")
        return fsspec.filesystem("memory")

    monkeypatch.setitem(fs._BUILTIN_SCHEME_TO_FS, "memory", open_store)
    fs._register_filesystems.cache_clear()
    yield
    fs._register_filesystems.cache_clear()


def written(world: World, rows: int = 4) -> str:
    url = f"memory://my_store@bucket{world.out}/in.jsonl"
    place = location(url)
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(request) + "\n" for request in requests(rows)))
    return url


@pytest.mark.parametrize("is_made", [False, True])
def test_a_later_round_reads_its_input_by_the_connection_of_its_url(
    world: World, object_store: None, is_made: bool
) -> None:
    url = written(world)
    world.attempt(input=(lambda: url) if is_made else url)
    world.fake.cancel_now(world.fake.last.id, done=3)
    trigger = world.woken(ENDED, input=(lambda: pytest.fail("called again")) if is_made else url)
    [_, second] = world.created
    world.fake.finish(second)
    assert (list(trigger.batches), world.rows_of(second)) == ([second], ["row-3"])
    assert world.woken(ENDED, input=url)["counts"]["succeeded"] == 4


@pytest.mark.parametrize("is_made", [False, True])
def test_lineage_knows_the_input_after_the_wait(world: World, tmp_path: Path, is_made: bool) -> None:
    place = tmp_path / "in.jsonl"
    place.write_text("".join(json.dumps(request) + "\n" for request in requests(1)))
    given: Any = (lambda: str(place)) if is_made else str(place)
    world.attempt(input=given)
    world.fake.finish(world.fake.last.id)
    operator = world.operator(input=given)
    operator.execute_complete(world.context, ENDED)
    facets = operator.get_openlineage_facets_on_complete(SimpleNamespace())
    assert [(one.namespace, one.name) for one in facets.inputs] == [("file", str(place))]


def test_requests_of_a_mapped_task_are_not_in_the_serialized_dag() -> None:
    given = [{"custom_id": "a", "body": {"content": SECRET}}]
    with DAG("mapped", schedule=None) as dag:
        for number, value in enumerate((given, lambda: given, "/in/{{ ds }}.jsonl")):
            AnyBatchOperator.partial(task_id=f"task_{number}", input=value).expand(output=["a", "b"])
        AnyBatchCreateOperator.partial(task_id="create", input=given).expand(model=["a", "b"])
    stored = json.dumps(DagSerialization.to_dict(dag))
    assert "the text of a prompt" not in stored
    assert "<1 requests>" in stored
    assert "/in/{{ ds }}.jsonl" in stored
    one: Any = dag.task_dict["task_0"].unmap({"output": "a"})
    assert (one.input.value, one.output_folder) == (given, "a")
