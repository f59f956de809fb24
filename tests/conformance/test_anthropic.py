"""Anthropic's own: chat lines translated both ways, native ones untouched, ids mapped and mapped back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import Job, Outcome, Row
from tests.fakes.anthropic import OVERLOADED, echo_message
from tests.fakes.rows import Failure

from .world import Driver, RemoteWorld, landed, row_ids

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")

NATIVE = "/v1/messages"
SAFE = re.compile(r"[a-zA-Z0-9_-]{1,64}")
PIXEL = "iVBORw0KGgo="
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
RICH = {
    "model": "claude-x",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "And polite."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is on these?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
                {"type": "image_url", "image_url": {"url": "https://example.test/a.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Łódź"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 °C"},
        {"role": "user", "content": "thanks"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Now.", "parameters": WEATHER},
        }
    ],
    "tool_choice": "required",
    "max_completion_tokens": 77,
    "temperature": 0.25,
    "stop": ["END"],
    "user": "u-1",
    "n": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}},
}
RICH_PARAMS = {
    "model": "claude-x",
    "max_tokens": 77,
    "system": "Be brief.\nAnd polite.",
    "temperature": 0.25,
    "stop_sequences": ["END"],
    "metadata": {"user_id": "u-1"},
    "tools": [{"name": "weather", "description": "Now.", "input_schema": WEATHER}],
    "tool_choice": {"type": "any"},
    "output_config": {"format": {"type": "json_schema", "schema": WEATHER}},
}


def sent_params(world: RemoteWorld) -> list[dict[str, Any]]:
    (call,) = world.server.find("POST", "/v1/messages/batches")
    return [one["params"] for one in call.json()["requests"]]


def test_a_rich_chat_line_is_translated(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    line = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": RICH}
    job = Job(input=[line], output=tmp_path / "out")
    landed(job, driver.run(job, timeout=10), ["r"])
    ((params,),) = [sent_params(world)]
    messages = params.pop("messages")
    assert params == RICH_PARAMS
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "user"]
    text, *images = messages[0]["content"]
    assert text == {"type": "text", "text": "What is on these?"}
    assert [image["source"] for image in images] == [
        {"type": "base64", "media_type": "image/png", "data": PIXEL},
        {"type": "url", "url": "https://example.test/a.png"},
    ]
    (call,) = messages[1]["content"]
    assert call == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Łódź"}}
    (result,) = messages[2]["content"]
    assert (result["type"], result["tool_use_id"]) == ("tool_result", "call_1")
    assert "12 °C" in json.dumps(result, ensure_ascii=False)
    assert messages[3]["content"] == "thanks"


def answer_richly(endpoint: str, params: dict[str, Any]) -> dict[str, Any]:
    """A message with thinking, text in two blocks, a tool use and cached tokens."""
    message = echo_message(endpoint, params)
    message["content"] = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "It is ", "citations": None},
        {"type": "text", "text": "cold.", "citations": None},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Łódź"}},
    ]
    message["stop_reason"] = "tool_use"
    message["usage"] |= {"input_tokens": 10, "output_tokens": 4, "cache_read_input_tokens": 30}
    return message


@pytest.fixture
def rich_answers(world: RemoteWorld) -> Any:
    had, world.fake.answer = world.fake.answer, answer_richly
    yield
    world.fake.answer = had


@pytest.mark.usefixtures("rich_answers")
def test_results_for_chat_come_back_as_chat_completions(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    world.let_batches_end()
    job = world.job(tmp_path, count=2)
    report = driver.run(job, timeout=10)
    found = landed(job, report, row_ids(2))
    body = found.lines[0]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "It is cold."
    (call,) = choice["message"]["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("toolu_1", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Łódź"}
    assert body["usage"]["prompt_tokens"] == 40
    assert body["usage"]["total_tokens"] == 44
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 30
    assert (report.usage.input_tokens, report.usage.output_tokens) == (80, 8)
    assert (report.usage.total_tokens, report.usage.cached_tokens) == (88, 60)
    (row, _) = driver.results(report.batches[0].id)
    assert row.result.choices[0].message.tool_calls[0].function.name == "weather"
    assert json.loads(row.raw)["result"]["message"]["content"][0]["type"] == "thinking", (
        "the provider's bytes"
    )


RAW_PARAMS = [
    b'{"model":"claude-x",  "max_tokens": 8, "messages": [{"role": "user", "content": "a\\u00e9\\u2028b"}]}',
    b'{ "messages":[ {"role":"user","content":"\xe2\x80\xa8 \xc3\xa9"} ],\t"temperature":0.10,'
    b'"model":"claude-x","max_tokens":1000000 }',
    b'{"model":"claude-x","max_tokens":5,"top_k":3,'
    b'"system":[{"type":"text","text":"body","cache_control":null}],'
    b'"messages":[{"role":"user","content":[{"type":"text","text":"say \\"body\\": {}"}]}],'
    b'"metadata":{"user_id":null},"tools":[{"name":"t","input_schema":{"type":"object","maximum":12345678901234567890123}}]}',
]


def native_file(path: Path) -> Path:
    """Native lines in any way that JSON can be written."""
    lines = [
        b'{"custom_id":"n-0","method":"POST","url":"/v1/messages","body":%s}\n' % RAW_PARAMS[0],
        b'  { "body" :%s , "custom_id": "body", "url": "\\/v1\\/messages", "method":"POST"} \r\n'
        % RAW_PARAMS[1],
        b'{"custom_id":"n 2","bo\\u0064y": %s ,"method":"POST","url":"/v1/messages"}' % RAW_PARAMS[2],
    ]
    path.write_bytes(b"".join(lines))
    return path


def test_native_bodies_are_untouched(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    job = Job(input=native_file(tmp_path / "in.jsonl"), output=tmp_path / "out", endpoint=NATIVE)
    report = driver.run(job, timeout=10)
    found = landed(job, report, ["n-0", "body", "n 2"])
    (call,) = world.server.find("POST", "/v1/messages/batches")
    # White space aside: every member, in its place, with every digit.
    assert [json.dumps(sent["params"]) for sent in call.json()["requests"]] == [
        json.dumps(json.loads(raw)) for raw in RAW_PARAMS
    ]
    assert b"12345678901234567890123" in call.body
    body = found.lines[0]["response"]["body"]
    assert body["type"] == "message", "and so are the answers"
    assert body["content"][0]["text"] == "echo: aé\u2028b"
    assert report.endpoint == NATIVE
    assert report.usage.total_tokens > 0


def test_native_results_without_a_job(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A batch does not tell its endpoint: whoever wants native bodies says so."""
    batch = driver.create(native_file(tmp_path / "in.jsonl"), NATIVE)
    world.finish(batch.id)
    native: list[Row] = driver.results(batch.id, endpoint=NATIVE)
    assert [row.custom_id for row in native] == ["n-0", "body", "n 2"]
    assert {row.result.type for row in native if row.result} == {"message"}
    assert {row.result.object for row in driver.results(batch.id)} == {"chat.completion"}


ODD_IDS = [
    "plain-id_1",
    "with spaces and / slashes",
    "ünïcödé 日本語 \U0001f600",
    "a" * 64,
    "a" * 65,
    "x" * 500,
    "é" * 40,
    "ab_b" + "cGxhaW4",  # what `plain` would be mapped to, if it had to be
    "ab_h" + "0" * 40,
    "ab_",
    "row\u2028with a separator",
    'quote " backslash \\ tab \t',
    " ",
    "plain",
    "é" * 41,
]


def test_ids_are_mapped_to_the_pattern_and_back(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    lines = [world.line(one) for one in ODD_IDS]
    job = Job(input=lines, output=tmp_path / "out")
    found = landed(job, driver.run(job, timeout=10), ODD_IDS)
    assert found.report.ok
    assert [found.text(one) for one in ODD_IDS] == [f"echo: say {one}" for one in ODD_IDS]
    (call,) = world.server.find("POST", "/v1/messages/batches")
    sent = [one["custom_id"] for one in call.json()["requests"]]
    assert all(SAFE.fullmatch(one) for one in sent)
    assert len(set(sent)) == len(ODD_IDS)
    assert sent[0] == "plain-id_1"
    assert sent[3] == "a" * 64


def test_short_ids_are_read_off_the_batch_alone(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Without the job that knows them, ids of up to 45 bytes still come back."""
    short = [one for one in ODD_IDS if len(one.encode()) <= 45]
    batch = driver.create(world.write(tmp_path / "in.jsonl", short), world.endpoint)
    world.finish(batch.id)
    assert [row.custom_id for row in driver.results(batch.id)] == short


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (OVERLOADED, 529),
        (Failure(400, "invalid_request_error", "messages: too long"), 400),
        (Failure(500, "api_error", "Internal server error"), 500),
    ],
)
def test_why_rows_failed(
    world: RemoteWorld, driver: Driver, tmp_path: Path, failure: Failure, status: int
) -> None:
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=1, failure=failure))
    job = world.job(tmp_path, count=3)
    report = driver.run(job, timeout=10)
    landed(job, report, row_ids(3))
    row = next(row for row in driver.results(report.batches[0].id) if row.outcome is Outcome.FAILED)
    assert (row.status_code, row.error.message) == (status, failure.message)


def test_no_progress_is_claimed_that_is_not_there(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    batch = driver.create(world.write(tmp_path / "in.jsonl", row_ids(4)), world.endpoint)
    assert (batch.request_counts.total, batch.request_counts.completed) == (4, 0)
    assert batch.metadata is None
    world.fake.finish(batch.id, failed=1)
    counts = driver.retrieve(batch.id).request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)


def test_the_pinned_version_is_sent_with_every_call(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Under a later one sampling parameters are refused inside batches."""
    world.let_batches_end()
    driver.run(world.job(tmp_path), timeout=10)
    assert {call.headers["anthropic-version"] for call in world.calls} == {"2023-06-01"}
