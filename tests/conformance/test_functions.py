"""The module-level functions, sync and async: any-llm's, so that its users change the import alone."""

from __future__ import annotations

import asyncio
import inspect
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import anybatch
from anybatch import Batch, BatchNotCompleteError, BatchStatus, Job, LLMProvider, Outcome
from anybatch.providers.anthropic import Anthropic
from anybatch.providers.compatible import DIALECTS
from anybatch.providers.mistral import Mistral

from .world import FORMATS, PROVIDERS, SHAPES, LocalWorld, RemoteWorld, World, landed, row_ids, said, tls

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Functions:
    """The functions of one mode under one name each, for one account."""

    def __init__(self, world: World, mode: str) -> None:
        self._mode = mode
        self._name = LLMProvider(world.name) if mode == "async" else world.name
        self._account = {"api_key": world.key, "api_base": world.api_base, "client_args": {"verify": tls()}}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(anybatch, f"a{name}" if self._mode == "async" else name)
        assert inspect.iscoroutinefunction(function) == (self._mode == "async")
        return partial(self._call, function)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = function(self._name, *args, **self._account, **options)
        return asyncio.run(result) if self._mode == "async" else result


@pytest.fixture
def functions(world: World, mode: str) -> Functions:
    return Functions(world, mode)


@pytest.mark.parametrize("shared_world", SHAPES, indirect=True, scope="module")
def test_from_file_to_results(world: RemoteWorld, functions: Functions, tmp_path: Path) -> None:
    source = world.write(tmp_path / "in.jsonl", row_ids(3))
    batch = functions.create_batch(source, world.endpoint, completion_window=world.window)
    assert isinstance(batch, Batch)
    assert functions.retrieve_batch(batch.id).id == batch.id
    with pytest.raises(BatchNotCompleteError, match=batch.id) as caught:
        functions.retrieve_batch_results(batch.id)
    assert caught.value.status == functions.retrieve_batch(batch.id).status
    page = functions.list_batches(limit=1)
    assert [one.id for one in page] == [batch.id]
    assert not page.has_more
    other = functions.create_batch(str(source), world.endpoint, completion_window=world.window)
    page = functions.list_batches(limit=1)
    assert [one.id for one in page] == [other.id]
    assert page.has_more
    assert [one.id for one in functions.list_batches(after=page.next_cursor, limit=1)] == [batch.id]
    assert functions.cancel_batch(other.id).status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
    world.fake.finish(batch.id, failed=1)
    result = functions.retrieve_batch_results(batch.id)
    assert [row.custom_id for row in sorted(result.results, key=lambda row: row.custom_id)] == row_ids(3)
    by_id = {row.custom_id: row for row in result.results}
    assert by_id["row-0"].outcome is Outcome.FAILED
    assert by_id["row-0"].error.message
    assert by_id["row-0"].result is None or "error" in by_id["row-0"].result
    assert said(by_id["row-1"].result) == "echo: say row-1"
    if world.endpoint.endswith("chat/completions"):
        assert by_id["row-1"].result.choices[0].message.content == "echo: say row-1"


@pytest.mark.parametrize("shared_world", ["local"], indirect=True, scope="module")
def test_the_embedded_provider(world: LocalWorld, functions: Functions, tmp_path: Path) -> None:
    world.model = "local:echo?delay=0"
    source = world.write(tmp_path / "in.jsonl", row_ids(3))
    batch = functions.create_batch(source, world.endpoint, metadata={"team": "a"})
    deadline = time.time() + 10
    while not functions.retrieve_batch(batch.id).status.is_terminal:
        assert time.time() < deadline
    result = functions.retrieve_batch_results(batch.id)
    assert sorted(row.custom_id for row in result.results) == row_ids(3)
    assert functions.list_batches(limit=1)[0].metadata == {"team": "a"}
    world.model = "local:echo?delay=3600"
    batch = functions.create_batch(world.write(source, row_ids(3)), world.endpoint)
    with pytest.raises(BatchNotCompleteError):
        functions.retrieve_batch_results(batch.id)
    assert functions.cancel_batch(batch.id).status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions open the provider themselves: it is to poll without pause."""
    openai = DIALECTS["openai"]
    monkeypatch.setitem(
        DIALECTS, "openai", replace(openai, traits=replace(openai.traits, poll_seconds=(0.0, 0.0)))
    )
    for wire_format in (Mistral, Anthropic):
        monkeypatch.setattr(wire_format, "traits", replace(wire_format.traits, poll_seconds=(0.0, 0.0)))


@pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
@pytest.mark.usefixtures("no_pauses")
def test_run_job(world: RemoteWorld, functions: Functions, tmp_path: Path) -> None:
    world.let_batches_end()
    lines = [world.line(one) for one in row_ids(4)]
    seen: list[Batch] = []
    report = functions.run_job(lines, tmp_path / "out", timeout=10, on_progress=seen.append, price=(1.0, 2.0))
    job = Job(input=lines, output=tmp_path / "out")
    landed(job, report, row_ids(4))
    assert report.ok
    assert report.cost == pytest.approx((report.usage.input_tokens + 2 * report.usage.output_tokens) / 1e6)
    assert seen[-1].status is BatchStatus.COMPLETED
    world.calls.clear()
    assert functions.run_job(lines, tmp_path / "out", price=(1.0, 2.0)) == report
    assert world.calls == []


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_native_results(world: RemoteWorld, functions: Functions, tmp_path: Path) -> None:
    body = {"model": "claude-x", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    source = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/messages", "body": body}
    source.write_text(str(line).replace("'", '"'))
    batch = functions.create_batch(source, "/v1/messages")
    world.finish(batch.id)
    (row,) = functions.retrieve_batch_results(batch.id, endpoint="/v1/messages").results
    assert row.result.content[0].text == "echo: hi"


def test_every_provider_is_a_member() -> None:
    assert {str(member) for member in LLMProvider} == set(PROVIDERS)
