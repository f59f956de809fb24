"""`@task.anybatch`: what a function may return, when it is called, and where its requests never go."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk import DAG, Asset, task

from anybatch import Client
from anybatch_airflow import AnyBatchOperator
from anybatch_airflow.decorators import anybatch_task

from .versions import DagSerialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeRequests = Callable[..., list[dict[str, Any]]]

SECRET = "the text of a prompt {{ ti }}"


@pytest.fixture
def decorate(tmp_path: Path, api_base: str) -> Callable[..., Any]:
    """`decorate(max_rounds=2)(function)`: the decorated function, to be called inside a DAG."""

    def make(**kwargs: Any) -> Any:
        defaults = {"provider": "local", "api_base": api_base, "output": tmp_path / "out"}
        return task.anybatch(**{**defaults, "deferrable": False, **kwargs})

    return make


def operator_of(decorated: Any, *args: Any, **kwargs: Any) -> Any:
    with DAG("dag", schedule=None):
        return decorated(*args, **kwargs).operator


def test_it_is_an_operator_of_ours(decorate: Callable[..., Any]) -> None:
    options = {"max_rounds": 2, "on_lost": "land", "shard_requests": 5}
    operator = operator_of(decorate(**options, task_id="one")(list))
    assert isinstance(operator, AnyBatchOperator)
    assert {name: getattr(operator, name) for name in options} == options
    assert "input" not in operator.template_fields
    assert {"op_args", "op_kwargs", "output_folder"} <= set(operator.template_fields)
    assert [link.name for link in operator.operator_extra_links] == ["Batch at the provider", "Results"]


def test_it_tells_its_options() -> None:
    parameters = inspect.signature(anybatch_task).parameters
    options = inspect.signature(AnyBatchOperator.__init__).parameters
    assert list(parameters)[:2] == ["python_callable", "multiple_outputs"]
    assert list(parameters)[2:] == [name for name in options if name not in ("self", "input")]
    with pytest.raises(TypeError, match=r"^@task\.anybatch: name the folder `output`"):
        operator_of(anybatch_task(output_folder="o")(list))


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


# --- what a later stretch on a worker finds ----------------------------------------------------------


def map_index(operator: Any, context: dict[str, Any]) -> str:
    """As Airflow renders it at the end of each stretch on a worker: a name that is not there is an error."""
    template = context["map_index_template"]
    return str(operator.dag.get_template_env().from_string(template).render(context))


def resumed(operator: Any, context: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a task that is resumed in a new process, and its rendered map index."""
    again = {name: context[name] for name in ("ti", "run_id", "map_index_template")}
    manifest = operator.execute_complete(again, event)
    return {**manifest, "map_index": map_index(operator, again)}


def wait_out(deferred: TaskDeferred) -> dict[str, Any]:
    """The event of a deferral's trigger."""

    async def first() -> dict[str, Any]:
        async for event in deferred.trigger.run():
            return dict(event.payload)
        raise AssertionError("the trigger ended without an event")

    return asyncio.run(first())


def test_arguments_are_in_the_context_in_every_phase(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any], tmp_path: Path
) -> None:
    """FAULTS I1: after the wait they were not, and Airflow failed the task that had landed."""
    context["map_index_template"] = "{{ country }}/{{ rows }}"

    @decorate(deferrable=True, min_defer_seconds=0)
    def requests(country: str, rows: int, ds: Any = None) -> list[dict[str, Any]]:
        return make_requests(rows, "delay=0.2", prompt=country)

    first = operator_of(requests, "de", rows=2)
    with pytest.raises(TaskDeferred) as caught:
        first.execute(context)
    assert map_index(first, context) == "de/2"
    after = resumed(operator_of(requests, "de", rows=2), context, wait_out(caught.value))
    assert (after["rows"], after["map_index"]) == (2, "de/2")
    # A clear of the landed task, and one that waits on its slot.
    for kwargs in ({}, {"deferrable": False, "output": tmp_path / "other"}):
        landed = operator_of(requests.override(**kwargs), "de", rows=2)
        again = {name: context[name] for name in ("ti", "run_id", "map_index_template")}
        assert landed.execute(again)["rows"] == 2
        assert map_index(landed, again) == "de/2"


def test_arguments_are_in_the_context_of_a_wait_that_failed(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any]
) -> None:
    """FAULTS I1: so that the failed task instance has its name, too."""
    context["map_index_template"] = "{{ country }}"

    @decorate()
    def requests(country: str) -> list[dict[str, Any]]:
        return make_requests()

    operator = operator_of(requests, country="de")
    with pytest.raises(AirflowException, match="gone"):
        operator.execute_complete(context, {"status": "error", "batches": {}, "message": "gone"})
    assert map_index(operator, context) == "de"


@pytest.mark.parametrize("is_lazy", [False, True])
def test_what_the_function_puts_into_the_context_names_the_task_after_the_wait(
    decorate: Callable[..., Any], make_requests: MakeRequests, context: dict[str, Any], is_lazy: bool
) -> None:
    """FAULTS I1, its kind: the function is called in the first stretch alone."""
    context["map_index_template"] = "{{ market }} {{ '{{' }}"

    @decorate(deferrable=True, min_defer_seconds=0)
    def requests(country: str) -> Iterator[dict[str, Any]] | list[dict[str, Any]]:
        def lazily() -> Iterator[dict[str, Any]]:
            context["market"] = f"market of {country}"
            yield from make_requests(2, "delay=0.2")

        return lazily() if is_lazy else list(lazily())

    with pytest.raises(TaskDeferred) as caught:
        operator_of(requests, country="de").execute(context)
    event = wait_out(caught.value)
    after = resumed(operator_of(requests, country="de"), context, event)
    assert after["map_index"] == "market of de {{"


def test_assets_among_the_arguments_are_inlets_after_the_wait(
    decorate: Callable[..., Any], context: dict[str, Any]
) -> None:
    """FAULTS I1, its kind: whoever reports lineage reads them at the end."""
    asset = Asset("reviews")
    operator = operator_of(decorate(task_id="task")(lambda given: []), asset)
    with pytest.raises(AirflowException, match="gone"):
        operator.execute_complete(context, {"status": "error", "batches": {}, "message": "gone"})
    assert operator.inlets == [asset]


def test_a_reserved_name_by_its_place_is_refused_as_by_airflow(
    decorate: Callable[..., Any], context: dict[str, Any]
) -> None:
    operator = operator_of(decorate(task_id="task")(lambda run_id: []), "mine")
    with pytest.raises(ValueError, match="reserved"):
        operator.execute(context)


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

        @decorate(output="out/{{ ti.map_index }}")
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
