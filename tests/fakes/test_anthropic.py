"""The Anthropic fake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.anthropic import AnthropicFake
from tests.fakes.anthropic_input import NEW, OLD
from tests.fakes.driving import (
    BATCHES,
    THREE,
    Json,
    message,
    rows,
    serving_anthropic,
)
from tests.fakes.rows import SEPARATORS, Quirks
from tests.fakes.specs import load_spec

if TYPE_CHECKING:
    from collections.abc import Callable


def test_anthropic_batch_from_create_to_results() -> None:
    fake = AnthropicFake()
    with serving_anthropic(fake) as (_, client):
        created = client.post(BATCHES, json={"requests": [*THREE, message("m-3")]}).json()
        url = f"{BATCHES}/{created['id']}"
        assert created["processing_status"] == "in_progress"
        fake.set_progress(created["id"], completed=2)
        counts = client.get(url).json()["request_counts"]
        assert counts == {"processing": 4, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
        assert (client.get(f"{url}/results").status_code, client.delete(url).status_code) == (404, 400)
        assert client.post(f"{url}/cancel").json()["processing_status"] == "canceling"
        fake.cancel_now(created["id"], done=2, failed=1)
        ended = client.get(url).json()
        assert ended["request_counts"] == {
            "processing": 0,
            "succeeded": 1,
            "errored": 1,
            "canceled": 2,
            "expired": 0,
        }
        assert (ended["processing_status"], ended["cancel_initiated_at"] is None) == ("ended", False)
        reply = client.get(ended["results_url"])
        errored, succeeded, *rest = rows(reply.content)
        assert reply.headers["content-type"] == "application/x-jsonl"
        assert errored["result"]["error"]["error"]["type"] == "invalid_request_error"
        assert succeeded["result"]["message"]["content"][0]["text"] == "echo: say m-1"
        assert [row["result"] for row in rest] == [{"type": "canceled"}] * 2
        assert client.post(f"{url}/cancel").status_code == 400
        assert client.delete(url).json() == {"id": created["id"], "type": "message_batch_deleted"}
        assert client.get(url).json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("quirks", "check"),
    [
        (Quirks(shuffled=True), lambda out: [row["custom_id"] for row in rows(out)] != ["m-0", "m-1", "m-2"]),
        (
            Quirks(missing=["m-1"], extra=["m-9"]),
            lambda out: [row["custom_id"] for row in rows(out)][1:] == ["m-2", "m-9"],
        ),
        (Quirks(separators=["m-0"]), lambda out: SEPARATORS.encode() in out),
        (Quirks(bad_utf8=["m-0"]), lambda out: b"say m-0\xff" in out),
        (Quirks(duplicated=["m-0"]), lambda out: len(rows(out)) == 4),
    ],
)
def test_anthropic_quirks(quirks: Quirks, check: Callable[[bytes], bool]) -> None:
    fake = AnthropicFake(quirks=quirks)
    with serving_anthropic(fake) as (_, client):
        batch_id = client.post(BATCHES, json={"requests": THREE}).json()["id"]
        fake.finish(batch_id)
        assert check(client.get(f"{BATCHES}/{batch_id}/results").content)


TOOL_USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]}
TOOL_RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "1"}]}
ASKED = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    ("version", "row", "place"),
    [
        (OLD, message("a b"), "requests.1.custom_id"),
        (OLD, message("x" * 65), "requests.1.custom_id"),
        (OLD, message("m-0"), "requests.1.custom_id: 'm-0' is not unique"),
        (OLD, {**message("a"), "method": "POST"}, "requests.1: Additional properties"),
        (
            OLD,
            {"custom_id": "a", "params": {"model": "m", "messages": [ASKED]}},
            "requests.1.params: 'max_tokens' is a",
        ),
        (OLD, message("a", n=2), "requests.1.params: Additional properties"),
        (OLD, message("a", speed="fast"), "requests.1.params: Additional"),
        (OLD, message("a", max_tokens=0), "requests.1.params.max_tokens"),
        (OLD, message("a", stream=True), "requests.1.params.stream"),
        (OLD, message("a", temperature=1.5), "requests.1.params.temperature"),
        (NEW, message("a", temperature=0.5), "requests.1.params.temperature: is not supported"),
        (NEW, message("a", top_k=5), "requests.1.params.top_k"),
        (OLD, message("a", messages=[]), "requests.1.params.messages"),
        (
            OLD,
            message("a", messages=[{"role": "system", "content": "x"}]),
            "requests.1.params.messages.0.role",
        ),
        (OLD, message("a", messages=[{"role": "user", "content": ""}]), "requests.1.params.messages"),
        (OLD, message("a", messages=[{**ASKED, "name": "bob"}]), "requests.1.params.messages.0"),
        (OLD, message("a", messages=[ASKED, TOOL_USE, ASKED]), "requests.1.params.messages: `tool_use` and"),
        (OLD, message("a", messages=[TOOL_RESULT]), "requests.1.params.messages: `tool_use` and"),
        (OLD, message("a", tools=[{"name": "f", "parameters": {}}]), "requests.1.params.tools.0"),
        (OLD, message("a", tool_choice="auto"), "requests.1.params.tool_choice"),
    ],
)
def test_anthropic_refuses_the_whole_batch_for_one_bad_request(version: str, row: Json, place: str) -> None:
    fake = AnthropicFake()
    with serving_anthropic(fake, version) as (_, client):
        reply = client.post(BATCHES, json={"requests": [THREE[0], row]})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert reply.json()["error"]["message"].startswith(place)
        assert fake.batches == {}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["x"], "system": "be brief"},
        {"messages": [ASKED, TOOL_USE, TOOL_RESULT], "tools": [TOOL], "tool_choice": {"type": "any"}},
        {"messages": [ASKED, TOOL_USE, TOOL_RESULT, ASKED]},  # consecutive user messages are one turn
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}]},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "adaptive"}},
    ],
)
def test_anthropic_takes_what_is_documented(params: Json) -> None:
    with serving_anthropic(AnthropicFake()) as (server, client):
        assert client.post(BATCHES, json={"requests": [message("a", **params)]}).status_code == 200
        assert load_spec("anthropic").problems(server.calls) == []


def test_anthropic_refusals_before_the_rows() -> None:
    fake = AnthropicFake(max_bytes=100)
    with serving_anthropic(fake) as (_, client):
        statuses = {
            "no version": client.get(BATCHES, headers={"anthropic-version": ""}).status_code,
            "too large": client.post(BATCHES, json={"requests": THREE}).status_code,
            "empty": client.post(BATCHES, json={"requests": []}).status_code,
            "extra": client.post(BATCHES, json={"metadata": {}}).status_code,
            "wrong key": client.get(BATCHES, headers={"x-api-key": "wrong"}).status_code,
            "bearer": client.get(
                BATCHES, headers={"x-api-key": "", "authorization": f"Bearer {fake.key}"}
            ).status_code,
        }
        assert statuses == {
            "no version": 400,
            "too large": 413,
            "empty": 400,
            "extra": 400,
            "wrong key": 401,
            "bearer": 200,
        }


def test_anthropic_pages_both_ways() -> None:
    fake = AnthropicFake()
    with serving_anthropic(fake) as (_, client):
        ids = [client.post(BATCHES, json={"requests": THREE}).json()["id"] for _ in range(5)][::-1]

        def page(**query: Any) -> tuple[list[str], bool]:
            reply = client.get(BATCHES, params={"limit": 2, **query}).json()
            assert (reply["first_id"], reply["last_id"]) == (reply["data"][0]["id"], reply["data"][-1]["id"])
            return [batch["id"] for batch in reply["data"]], reply["has_more"]

        assert page() == (ids[:2], True)
        assert page(after_id=ids[1]) == (ids[2:4], True)
        assert page(after_id=ids[3]) == (ids[4:], False)
        assert page(before_id=ids[4]) == (ids[2:4], True)
        assert page(before_id=ids[2]) == (ids[:2], False)
        fake.endless_list = True
        assert page(after_id=ids[4]) == (ids[3:], True)
        assert client.get(BATCHES, params={"limit": 1001}).status_code == 400


def test_anthropic_results_elsewhere_and_late() -> None:
    fake = AnthropicFake(results_base="http://results.invalid")
    with serving_anthropic(fake) as (_, client):
        batch_id = client.post(BATCHES, json={"requests": THREE}).json()["id"]
        fake.expire(batch_id, done=2, quirks=Quirks(files_after_looks=1))
        first, second = (client.get(f"{BATCHES}/{batch_id}").json() for _ in range(2))
        assert (first["processing_status"], first["results_url"]) == ("ended", None)
        assert second["results_url"] == f"http://results.invalid{BATCHES}/{batch_id}/results"
        assert second["request_counts"]["expired"] == 1
