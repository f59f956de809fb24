"""The operator's life from submission to manifest, without a database: the embedded provider is the world."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk import DAG, BaseOperator, XComArg
from upath import UPath

from anybatch import Client, Job
from anybatch_airflow import AnyBatchOperator, AnyBatchResultsOperator
from anybatch_airflow.base import job_id
from anybatch_airflow.inputs import Hidden

from .conftest import TaskInstance
from .versions import DagSerialization

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeRequests = Callable[..., list[dict[str, Any]]]

SECRET = "the text of a prompt {{ ti }}"


@pytest.fixture
def make_operator(tmp_path: Path, api_base: str) -> Callable[..., AnyBatchOperator]:
    def make(**kwargs: Any) -> AnyBatchOperator:
        defaults = {"provider": "local", "api_base": api_base, "output": tmp_path / "out"}
        return AnyBatchOperator(**{"task_id": "task", **defaults, "min_defer_seconds": 0, **kwargs})

    return make


def deferral(operator: BaseOperator, context: dict[str, Any]) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context)
    return caught.value


def event_of(deferred: TaskDeferred) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        async for event in deferred.trigger.run():
            return dict(event.payload)
        raise AssertionError("the trigger ended without an event")

    return asyncio.run(first())


# --- a job end to end --------------------------------------------------------------------------------


def test_it_submits_defers_and_lands(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, ti: TaskInstance,
    context: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    operator = make_operator(input=make_requests(40, "delay=1&fail=0.2"), metadata={"team": "t"})
    deferred = deferral(operator, context)
    assert deferred.method_name == "execute_complete"
    # An execution in a new process has nothing but the event: dag.test() drops the arguments of a deferral.
    assert not deferred.kwargs
    assert deferred.timeout is None
    [batch_id] = ti.pushed["batch_ids"]
    event = event_of(deferred)
    assert event["status"] == "ended"
    assert event["batches"][batch_id]["status"] == "completed"
    manifest = make_operator(input=[]).execute_complete(context, event)
    assert manifest["counts"]["succeeded"] + manifest["counts"]["failed"] == manifest["rows"] == 40
    assert manifest["counts"]["failed"] > 0
    assert manifest["batch_ids"] == [batch_id]
    assert manifest["job"] == "airflow:dag/task/manual__2026-01-01"
    lines = Path(manifest["results"]).read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"row-{n}" for n in range(1, 41)]
    json.dumps(manifest)  # goes into XCom
    assert len(json.dumps(manifest)) < 2000


def test_a_second_attempt_finds_the_batch_of_the_first(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, ti: TaskInstance,
    context: dict[str, Any], api_base: str,
) -> None:  # fmt: skip
    requests = make_requests(5, "delay=1")
    deferral(make_operator(input=requests), context)
    first = ti.pushed["batch_ids"]
    second = deferral(make_operator(input=requests), context)
    assert ti.pushed["batch_ids"] == first
    manifest = make_operator(input=[]).execute_complete(context, event_of(second))
    assert manifest["batch_ids"] == first
    # And a third, once all is done, reads the report.
    assert make_operator(input=requests).execute(context) == manifest
    with Client("local", api_base=api_base) as client:
        assert [batch.id for batch in client.list()] == first


def test_a_batch_that_has_ended_is_not_deferred_for(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    ti: TaskInstance, api_base: str,
) -> None:  # fmt: skip
    requests = make_requests(3, "delay=0.2")
    deferral(make_operator(input=requests), context)
    with Client("local", api_base=api_base) as client:
        client.wait(ti.pushed["batch_ids"][0], timeout=20)
    assert make_operator(input=requests).execute(context)["rows"] == 3


def test_it_waits_on_the_worker_if_told_to(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    manifest = make_operator(input=make_requests(3, "delay=0.5"), deferrable=False).execute(context)
    assert manifest["counts"]["succeeded"] == 3


# --- the deadline ------------------------------------------------------------------------------------


def test_the_deadline_counts_from_the_creation_of_the_batch(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    requests, timeout = make_requests(3, "delay=60"), timedelta(hours=3)
    first = deferral(make_operator(input=requests, timeout=timeout), context).trigger
    again = deferral(make_operator(input=requests, timeout=timeout), context).trigger
    [(batch_id, created)] = first.batches.items()
    assert first.deadlines == again.deadlines == {batch_id: created + timeout.total_seconds()}


def test_a_deadline_that_has_passed_fails_without_another_wait(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    ti: TaskInstance, api_base: str,
) -> None:  # fmt: skip
    requests = make_requests(3, "delay=600")
    event = event_of(deferral(make_operator(input=requests, timeout=2), context))
    assert event["status"] == "timeout"
    for attempt in (
        lambda: make_operator(input=requests, timeout=2).execute_complete(context, event),
        lambda: make_operator(input=requests, timeout=2).execute(context),
    ):
        begun = time.monotonic()
        with pytest.raises(AirflowException, match="raise `timeout` to wait longer") as caught:
            attempt()
        assert not isinstance(caught.value, AirflowFailException)  # a retry may find the results
        assert time.monotonic() - begun < 5
    with Client("local", api_base=api_base) as client:
        assert client.retrieve(ti.pushed["batch_ids"][0]).status.is_terminal is False


# --- what fails, and how -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input": [{"custom_id": "a"}]}, "line 1"),
        ({"input": "/nowhere/in.jsonl"}, "/nowhere/in.jsonl"),
        ({"provider": "opnai"}, "unknown provider"),
        ({"provider": None, "conn_id": "incomplete"}, "does not say which provider"),
        ({"options": {"no_such": 1}}, "no_such"),
        ({"on_orphan": "perhaps"}, "on_orphan"),
        ({"on_lost": "perhaps"}, "on_lost"),
        ({"shard_requests": 0}, "shard_requests"),
    ],
)
def test_what_a_retry_cannot_cure_fails_at_once(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    add_connection: Callable[..., str], change: dict[str, Any], named: str,
) -> None:  # fmt: skip
    add_connection("incomplete", conn_type="anybatch", password="k")
    with pytest.raises(AirflowFailException, match=named):
        make_operator(**{"input": make_requests(), **change}).execute(context)


def test_the_folder_of_another_job_is_refused(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    deferral(make_operator(input=make_requests(3, "delay=60")), context)
    other = {"ti": TaskInstance(run_id="another run")}
    event = {"status": "ended", "batches": {}, "message": ""}
    for attempt in (
        lambda: make_operator(input=make_requests(3, "delay=60")).execute(other),
        lambda: make_operator(input=[]).execute_complete(other, event),
    ):
        with pytest.raises(AirflowFailException, match=r"holds job '.*manual__2026-01-01'.*another run"):
            attempt()


@pytest.mark.parametrize("event", [None, {}, {"batches": {}}])
def test_an_event_that_is_none_fails(
    make_operator: Callable[..., AnyBatchOperator], context: dict[str, Any], event: dict[str, Any] | None
) -> None:
    with pytest.raises(AirflowException, match="does not understand"):
        make_operator(input=[]).execute_complete(context, event)


def test_an_error_of_the_wait_fails_with_its_text(
    make_operator: Callable[..., AnyBatchOperator], context: dict[str, Any]
) -> None:
    event = {"status": "error", "batches": {"b": {"error": "gone"}}, "message": "b: NotFoundError: gone"}
    with pytest.raises(AirflowException, match="NotFoundError: gone"):
        make_operator(input=[]).execute_complete(context, event)


def test_too_many_failed_rows_fail_the_task_after_landing(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    operator = make_operator(input=make_requests(9, "delay=0&fail=1"), deferrable=False)
    with pytest.raises(AirflowFailException, match="none of 9 rows succeeded"):
        operator.execute(context)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 9


# --- where requests come from ------------------------------------------------------------------------


def test_a_function_makes_the_requests(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    calls = []

    def requests(run_id: str) -> list[dict[str, Any]]:
        calls.append(run_id)
        return make_requests(2, "delay=0.5")

    deferred = deferral(make_operator(input=requests), context)
    manifest = make_operator(input=requests).execute_complete(context, event_of(deferred))
    assert manifest["rows"] == 2
    assert calls == ["manual__2026-01-01"]  # not again for collecting


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_paths_and_object_stores(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("anybatch.jobs.shard._WRITE_TIME", 0.0)  # nobody else writes there
    root = f"{scheme}{tmp_path}"
    place = UPath(f"{root}/in.jsonl") if scheme else Path(f"{root}/in.jsonl")
    place.write_text("".join(json.dumps(request) + "\n" for request in make_requests(4, "delay=0")))
    operator = make_operator(input=f"{root}/in.jsonl", output=f"{root}/job", deferrable=False)
    assert operator.execute(context)["results"].endswith("/job/results.jsonl")
    landed = UPath(f"{root}/job/results.jsonl") if scheme else Path(f"{root}/job/results.jsonl")
    assert len(landed.read_text().splitlines()) == 4


def test_a_path_is_rendered_and_a_prompt_never_is(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests
) -> None:
    operator = make_operator(input="/in/{{ run_id }}.jsonl", output="/out/{{ run_id }}")
    operator.render_template_fields({"run_id": "r1"})
    assert (operator.input, operator.output_folder) == ("/in/r1.jsonl", "/out/r1")
    requests = make_requests(2, prompt=SECRET)
    for given in (requests, iter(requests), lambda **_: pytest.fail("called while rendering")):
        operator = make_operator(input=given)
        operator.render_template_fields({"run_id": "r1"})
        operator.render_template_fields({"run_id": "r1"})
        assert isinstance(operator.input, Hidden)
        assert operator.input.value is given


def test_the_folder_is_an_argument_and_the_xcom_stays_an_attribute() -> None:
    """Airflow's operators call `output` what the task will push, so the folder is kept by another name."""
    with DAG("named", schedule=None, default_args={"output": "/out/{{ ds }}"}) as dag:
        make = BaseOperator(task_id="make")
        AnyBatchOperator(task_id="by_default", input=[])
        by_xcom = AnyBatchOperator(task_id="by_xcom", input=[], output=make.output)
        later = AnyBatchOperator(task_id="later", input=[])
        later.output_folder = make.output
        AnyBatchResultsOperator(task_id="land", batch_id=by_xcom.output)
        AnyBatchOperator.partial(task_id="mapped", input=[]).expand(output=make.output)
        AnyBatchResultsOperator.partial(task_id="each").expand_kwargs(make.output)
    assert by_xcom.downstream_task_ids == {"land"}
    assert make.downstream_task_ids == {"by_xcom", "later", "mapped", "each"}
    by_xcom.output_folder = "/x"
    assert isinstance(by_xcom.output, XComArg)
    stored = {one["__var"]["task_id"]: one["__var"] for one in DagSerialization.to_dict(dag)["dag"]["tasks"]}
    assert stored["by_default"]["output_folder"] == stored["land"]["output_folder"] == "/out/{{ ds }}"
    assert dag.task_dict["each"].unmap({"output": "/a", "batch_id": "b"}).output_folder == "/a"


@pytest.mark.parametrize("operator", [AnyBatchOperator, AnyBatchResultsOperator])
def test_the_folder_s_old_name_is_refused(operator: Any) -> None:
    given = {"task_id": "t", "output_folder": "o"}
    for make in (operator, operator.partial):
        with pytest.raises(TypeError, match="name the folder `output`; `output_folder` is no argument"):
            make(**given)


def test_one_folder_for_all_mapped_tasks_is_refused_where_airflow_would_not_wait_for_it() -> None:
    with DAG("mapped", schedule=None):
        make = BaseOperator(task_id="make")
        with pytest.raises(TypeError, match=r"Pass it to \.expand\(output="):
            AnyBatchOperator.partial(task_id="job", output=make.output)
        AnyBatchOperator.partial(task_id="path", output=Path("/o")).expand(input=["a"])


def test_requests_from_an_xcom_are_hidden_once_they_are_there(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests
) -> None:
    requests = make_requests(2, prompt=SECRET)

    class Reference:  # as an XComArg
        def resolve(self, context: dict[str, Any]) -> list[dict[str, Any]]:
            return requests

    operator = make_operator(input=Reference())
    operator.render_template_fields({})
    assert repr(operator.input) == "<2 requests>"
    assert operator.input.value is requests


def test_a_table_with_a_column_called_resolve_is_hidden(
    make_operator: Callable[..., AnyBatchOperator],
) -> None:
    """G2: a frame's columns are its attributes, and this one was taken for an XCom: rendered, and stored."""
    pandas = pytest.importorskip("pandas")
    operator = make_operator(input=pandas.DataFrame({"resolve": [SECRET]}), prompt="{resolve}", model="m")
    assert repr(operator.input) == "<1 requests>"


def test_each_row_of_a_table_in_chunks_becomes_a_request(
    make_operator: Callable[..., AnyBatchOperator], context: dict[str, Any], tmp_path: Path
) -> None:
    """G2: it was one request for each chunk."""
    pandas = pytest.importorskip("pandas")
    table = tmp_path / "table.csv"
    table.write_text("id,text\n" + "".join(f"{number},t{number}\n" for number in range(5)))
    operator = make_operator(
        input=lambda: pandas.read_csv(table, chunksize=2),
        prompt="[delay=0] {text}", id_column="id", model="m", deferrable=False,
    )  # fmt: skip
    assert operator.execute(context)["rows"] == 5


@pytest.mark.parametrize("shape", ["frame", "frames", "csv"])
def test_a_table_without_a_prompt_is_refused_by_name(
    shape: str, make_operator: Callable[..., AnyBatchOperator], context: dict[str, Any], tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["x"]})
    given = {"frame": frame, "frames": [frame], "csv": str(tmp_path / "table.csv")}[shape]
    with pytest.raises(AirflowFailException, match=r"table.*give `prompt`"):
        make_operator(input=given, deferrable=False).execute(context)


def test_the_metadata_database_sees_no_prompt(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests
) -> None:
    with DAG("shown", schedule=None) as dag:
        make_operator(input=make_requests(2, prompt=SECRET))
        make_operator(input=list, task_id="other")
    stored = json.dumps(DagSerialization.to_dict(dag))
    assert "the text of a prompt" not in stored
    assert "<2 requests>" in stored
    assert " at 0x" not in stored


# --- identity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("map_index", "expected"),
    [(-1, "airflow:dag/task/r"), (0, "airflow:dag/task/r/0"), (7, "airflow:dag/task/r/7")],
)
def test_identity_has_no_try_number(map_index: int, expected: str) -> None:
    assert job_id(TaskInstance(run_id="r", map_index=map_index)) == expected


def test_an_operator_keeps_the_output_that_airflow_gives_it(
    make_operator: Callable[..., AnyBatchOperator],
) -> None:
    # `operator.output` is the XCom of its manifest, which is why the folder is not called so.
    assert type(make_operator(input=[]).output).__name__ == "PlainXComArg"


def test_the_job_is_readable_from_outside(
    make_operator: Callable[..., AnyBatchOperator], make_requests: MakeRequests, context: dict[str, Any],
    ti: TaskInstance, tmp_path: Path,
) -> None:  # fmt: skip
    deferral(make_operator(input=make_requests(3, "delay=60")), context)
    ledger = Job(input=(), output=tmp_path / "out").ledger()
    assert ledger is not None
    assert ledger.batch_ids == ti.pushed["batch_ids"]
