"""`@task.anybatch`: what a function may return, when it is called, and where its requests never go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, TaskDeferred
from airflow.sdk import DAG, task

from anybatch import Client
from anybatch_airflow import AnyBatchOperator

from .versions import DagSerialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeRequests = Callable[..., list[dict[str, Any]]]

SECRET = "the text of a prompt {{ ti }}"


@pytest.fixture
def decorate(tmp_path: Path, api_base: str) -> Callable[..., Any]:
    """`decorate(max_rounds=2)(function)`: the decorated function, to be called inside a DAG."""

    def make(**kwargs: Any) -> Any:
        defaults = {"provider": "local", "api_base": api_base, "output_folder": tmp_path / "out"}
        return task.anybatch(**{**defaults, "deferrable": False, **kwargs})

    return make


def operator_of(decorated: Any, *args: Any, **kwargs: Any) -> Any:
    with DAG("dag", schedule=None):
        return decorated(*args, **kwargs).operator


def test_it_is_an_operator_of_ours(decorate: Callable[..., Any]) -> None:
    operator = operator_of(decorate(max_rounds=2, task_id="one")(list))
    assert isinstance(operator, AnyBatchOperator)
    assert operator.max_rounds == 2
    assert "input" not in operator.template_fields
    assert {"op_args", "op_kwargs", "output_folder"} <= set(operator.template_fields)
    assert [link.name for link in operator.operator_extra_links] == ["Batch at the provider", "Results"]


@pytest.mark.parametrize("kind", ["list", "iterator", "path", "str"])
def test_requests_may_come_in_any_form(
    decorate: Callable[..., Any],
    make_requests: MakeRequests,
    context: dict[str, Any],
    tmp_path: Path,
    kind: str,
) -> None:
    requests = make_requests(4)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))

    def made() -> Any:
        return {"list": requests, "iterator": iter(requests), "path": path, "str": str(path)}[kind]

    manifest = operator_of(decorate()(made)).execute(context)
    assert manifest["counts"]["succeeded"] == manifest["rows"] == 4


def test_a_table_goes_through_the_template(
    decorate: Callable[..., Any], context: dict[str, Any], tmp_path: Path
) -> None:
    @decorate(prompt="Say {word}", id_column="word", model="local:echo?delay=0")
    def words() -> list[dict[str, str]]:
        return [{"word": "yes"}, {"word": "no"}]

    manifest = operator_of(words).execute(context)
    lines = [json.loads(line) for line in Path(manifest["results"]).read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["yes", "no"]
    assert "Say yes" in json.dumps(lines[0])


def test_arguments_and_the_context_reach_the_function(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    seen = []

    @decorate()
    def requests(rows: int, prompt: str, *, run_id: Any = None) -> list[dict[str, Any]]:
        seen.append((rows, prompt, run_id))
        return make_requests(rows, prompt=prompt)

    operator = operator_of(requests, 2, prompt="Hello on {{ ds }}")
    operator.render_template_fields({"ds": "2026-01-01"})
    assert operator.execute(context)["rows"] == 2
    # The caller's arguments are rendered, which is why a prompt with data in it does not belong there.
    assert seen == [(2, "Hello on 2026-01-01", "manual__2026-01-01")]


def test_the_function_is_called_in_every_attempt_and_not_after_the_wait(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any], api_base: str
) -> None:
    calls = []

    @decorate(deferrable=True, min_defer_seconds=0)
    def requests() -> Iterator[dict[str, Any]]:
        calls.append(1)
        yield from make_requests(2, "delay=0.3")

    for _attempt in range(2):
        with pytest.raises(TaskDeferred) as caught:
            operator_of(requests).execute(context)
    with Client("local", api_base=api_base) as client:
        [batch] = client.list()
        client.wait(batch.id, timeout=20)
    told = {batch.id: {"status": "completed"}}
    event = {"status": "ended", "batches": told, "message": ""}
    manifest = getattr(operator_of(requests), caught.value.method_name)(context, event)
    assert manifest["batch_ids"] == [batch.id]
    assert len(calls) == 2


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({"multiple_outputs": True}, True)])
def test_the_manifest_becomes_several_xcoms_only_if_asked_for(
    decorate: Callable[..., Any], given: dict[str, Any], expected: bool
) -> None:
    def requests() -> dict[str, Any]:  # an annotation that Airflow would take for the task's output
        return {}

    assert operator_of(decorate(**given)(requests)).multiple_outputs is expected


def test_a_function_that_returns_nothing_is_told_so(
    decorate: Callable[..., Any], context: dict[str, Any]
) -> None:
    @decorate()
    def forgotten() -> None:
        pass

    with pytest.raises(AirflowFailException, match=r"forgotten\(\) returned None"):
        operator_of(forgotten).execute(context)


def test_no_request_is_stored(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    with DAG("shown", schedule=None) as dag:

        @decorate(output_folder="out/{{ ti.map_index }}")
        def requests(rows: int) -> list[dict[str, Any]]:
            return make_requests(rows, prompt=SECRET)

        requests(1)
        requests.override(task_id="mapped").partial().expand(rows=[1, 2])
    stored = json.dumps(DagSerialization.to_dict(dag))
    assert "requests" in stored
    assert "the text of a prompt" not in stored
    operator = operator_of(decorate(task_id="one")(lambda: make_requests(2, prompt=SECRET)))
    assert "the text of a prompt" not in json.dumps(operator.execute(context))


def test_mapping_makes_an_operator_of_each_value(
    decorate: Callable[..., Any], make_requests: MakeRequests
) -> None:
    @decorate(max_failed_ratio=0.5)
    def requests(prompt: str, rows: int) -> list[dict[str, Any]]:
        return make_requests(rows, prompt=prompt)

    with DAG("dag", schedule=None):
        mapped = requests.partial(prompt="Hello").expand(rows=[1, 2]).operator
    one = mapped.unmap({"op_kwargs": {"rows": 2}})
    assert isinstance(one, AnyBatchOperator)
    assert one.max_failed_ratio == 0.5
    assert one.op_kwargs == {"prompt": "Hello", "rows": 2}
    assert one.task_id == "requests"
