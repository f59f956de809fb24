"""Chat completions to Anthropic Messages and back: tables, the vendor's schema, round trips."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from anybatch.providers.messages import (
    Untranslatable,
    error_status,
    from_message,
    original_id,
    safe_id,
    to_messages,
)

SPECS = Path(os.environ.get("ANYBATCH_SPECS", Path(__file__).parents[2] / "shared" / "specs"))
PNG = base64.b64encode(b"\x89PNG picture").decode()
PDF = base64.b64encode(b"%PDF-1.7").decode()
TEXT = base64.b64encode("Grüße".encode()).decode()
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}


def body(messages: Any = USER, **parameters: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-4-5", "messages": messages, **parameters}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def call(id: str, arguments: str, name: str | None = "weather") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user_part(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part]}]


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def file(data: str, **more: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data, **more}}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]] = {
    "one string": (USER, USER, None),
    "system and developer": (
        [
            {"role": "system", "content": "Be brief."},
            *USER,
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        ],
        USER,
        "Be brief.\nBe kind.",
    ),
    "empty system": ([{"role": "system", "content": ""}, *USER], USER, None),
    "consecutive users": (USER * 2, USER * 2, None),
    "text parts": (
        user_part({"type": "text", "text": "Hi"}),
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        None,
    ),
    "empty part left out": (
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        None,
    ),
    "image by URL": (
        user_part(image("https://example.com/a.png", detail="auto")),
        [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}],
            }
        ],
        None,
    ),
    "image inline": (
        user_part(image(f"data:image/jpg;charset=x;base64,{PNG}")),
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": PNG}}
                ],
            }
        ],
        None,
    ),
    "PDF": (
        user_part(file(f"data:application/pdf;base64,{PDF}", filename="a.pdf")),
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                        "title": "a.pdf",
                    }
                ],
            }
        ],
        None,
    ),
    "bare base64 is a PDF": (
        user_part(file(PDF)),
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                    }
                ],
            }
        ],
        None,
    ),
    "text file": (
        user_part(file(TEXT, filename="a.txt")),
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "source": {"type": "text", "media_type": "text/plain", "data": "Grüße"},
                        "title": "a.txt",
                    }
                ],
            }
        ],
        None,
    ),
    "assistant as the SDK returns it": (
        [
            *USER,
            {
                "role": "assistant",
                "content": "Yes?",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            *USER,
        ],
        [*USER, {"role": "assistant", "content": "Yes?"}, *USER],
        None,
    ),
    "assistant refused": (
        [*USER, {"role": "assistant", "content": None, "refusal": "No."}, *USER],
        [*USER, {"role": "assistant", "content": "No."}, *USER],
        None,
    ),
    "parallel tool calls": (
        [
            *USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("a1", '{"city": "Köln"}'), call("functions.clock:1", "", "clock")],
            },
            {"role": "tool", "tool_call_id": "a1", "name": "weather", "content": "rain"},
            {
                "role": "tool",
                "tool_call_id": "functions.clock:1",
                "content": [{"type": "text", "text": "noon"}],
            },
            *USER,
        ],
        [
            *USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "a1", "name": "weather", "input": {"city": "Köln"}},
                    {"type": "tool_use", "id": "call_*", "name": "clock", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a1", "content": "rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_*",
                        "content": [{"type": "text", "text": "noon"}],
                    },
                ],
            },
            *USER,
        ],
        None,
    ),
    "text beside a tool call, empty result": (
        [
            *USER,
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call("a1", "{}")]},
            {"role": "tool", "tool_call_id": "a1", "content": ""},
        ],
        [
            *USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "a1", "name": "weather", "input": {}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a1"}]},
        ],
        None,
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversation(case: str) -> None:
    messages, expected, system = CONVERSATIONS[case]
    params = to_messages(body(messages))
    told = json.loads(re.sub(r'"call_[a-z2-7]{52}"', '"call_*"', json.dumps(params["messages"])))
    assert told == expected
    assert params.get("system") == system


PARAMETERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"max_completion_tokens": 8, "max_tokens": None}, {"max_tokens": 8}),
    ({"max_completion_tokens": 8, "max_tokens": 8}, {"max_tokens": 8}),
    ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
    ({"temperature": 1, "top_p": 1.0}, {}),
    ({"stop": "END"}, {"stop_sequences": ["END"]}),
    ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
    ({"stop": []}, {}),
    ({"user": "u1"}, {"metadata": {"user_id": "u1"}}),
    ({"safety_identifier": "s1"}, {"metadata": {"user_id": "s1"}}),
    ({"service_tier": "auto"}, {"service_tier": "auto"}),
    ({"service_tier": "default"}, {"service_tier": "standard_only"}),
    ({"reasoning_effort": "xhigh"}, {"output_config": {"effort": "xhigh"}}),
    ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
    ({"response_format": {"type": "text"}}, {}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    (
        {
            "reasoning_effort": "low",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "description": "An a", "schema": SCHEMA},
            },
        },
        {
            "output_config": {
                "effort": "low",
                "format": {"type": "json_schema", "schema": {"description": "An a", **SCHEMA}},
            }
        },
    ),
    (
        {"tools": [WEATHER, CLOCK]},
        {
            "tools": [
                {
                    "name": "weather",
                    "input_schema": WEATHER["function"]["parameters"],  # type: ignore[index]
                    "description": "The weather",
                    "strict": True,
                },
                {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
            ]
        },
    ),
]
CLOCK_OUT = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("clock")]}}
CHOICES: list[tuple[Any, bool | None, dict[str, Any] | None]] = [
    ("auto", None, None),
    ("auto", True, None),
    ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
    ("none", False, {"type": "none"}),
    ("required", None, {"type": "any"}),
    ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
    (named("clock"), None, {"type": "tool", "name": "clock"}),
    (ALLOWED, None, {"type": "any"}),
]
PARAMETERS += [
    (
        {"tools": [CLOCK], "tool_choice": choice, "parallel_tool_calls": parallel},
        {"tools": [CLOCK_OUT], **({"tool_choice": expected} if expected else {})},
    )
    for choice, parallel, expected in CHOICES
]
PARAMETERS += [({"tool_choice": "auto", "parallel_tool_calls": False}, {}), ({"tool_choice": "none"}, {})]
PARAMETERS += [({"tools": [WEATHER, CLOCK], "tool_choice": ALLOWED}, PARAMETERS[-3][1])]


@pytest.mark.parametrize(("given", "expected"), PARAMETERS, ids=lambda value: json.dumps(value)[:60])
def test_parameters(given: dict[str, Any], expected: dict[str, Any]) -> None:
    params = to_messages(body(**given), default_max_tokens=99)
    assert params == {"model": "claude-haiku-4-5", "messages": USER, "max_tokens": 99, **expected}


NO_EFFECT: dict[str, Any] = {
    "n": 1,
    "stream": False,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "store": False,
    "metadata": {},
    "modalities": ["text"],
    "verbosity": "medium",
    "functions": [],
    "seed": None,
    "tools": None,
    "temperature": None,
    "prediction": None,
    "anything": None,
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_makes_no_difference_is_passed_over(name: str) -> None:
    assert to_messages(body(**{name: NO_EFFECT[name]})) == to_messages(body())


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({name: value}, name)
    for name, value in {
        "n": 2,
        "stream": True,
        "seed": 7,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "logit_bias": {"1": 5},
        "logprobs": True,
        "top_logprobs": 3,
        "store": True,
        "metadata": {"k": "v"},
        "modalities": ["text", "audio"],
        "audio": {"voice": "ash"},
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "low",
        "functions": [{"name": "f"}],
        "function_call": "auto",
        "web_search_options": {},
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "reasoning_effort": "minimal",
        "response_format": {"type": "json_object"},
        "temperature": 1.5,
        "top_k": 5,
        "thinking": {"type": "adaptive"},
        "made_up": 0,
    }.items()
]
FOREIGN += [
    ({"stop": ["\n", "END"]}, "stop"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"user": "a", "safety_identifier": "b"}, "user"),
    ({"safety_identifier": "u" * 513}, "safety_identifier"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
    ({"tools": [CLOCK], "tool_choice": named("weather")}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
]
FOREIGN_MESSAGES: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": ""}], "messages[1].content"),
    ([{"role": "user", "content": "x", "name": "Ann"}], "messages[1].name"),
    ([{"role": "function", "content": "x"}], "messages[1].role"),
    ([{"role": "assistant", "content": None}], "messages[1].content"),
    ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages[1].audio"),
    ([{"role": "assistant", "content": "x", "reasoning_content": "y"}], "messages[1].reasoning_content"),
    (
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a", "type": "custom"}]}],
        "messages[1].tool_calls[0]",
    ),
    ([{"role": "system", "content": [image("https://x/y.png")]}], "messages[1].content[0]"),
    (
        user_part({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        "messages[1].content[0]",
    ),
    (user_part({"type": "file", "file": {"file_id": "file-1"}}), "messages[1].content[0].file"),
    (user_part(file("data:text/html;base64,YQ==")), "messages[1].content[0].file.file_data"),
    (user_part(image("data:image/tiff;base64,YQ==")), "messages[1].content[0].image_url.url"),
    (user_part(image("https://x/y.png", detail="low")), "messages[1].content[0].image_url.detail"),
    (
        user_part({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}),
        "messages[1].content[0].cache_control",
    ),
]
FOREIGN += [({"messages": [*USER, *messages]}, parameter) for messages, parameter in FOREIGN_MESSAGES]

# What remains of a parameter, or of its neighbours, where not nothing does.
KEPT: dict[str, dict[str, Any]] = {
    "stop": {"stop": "END"},
    "max_tokens": {"max_tokens": 6},
    "user": {"user": "b"},
    "tool_choice": {"tools": [CLOCK]},
}


@pytest.mark.parametrize(("given", "parameter"), FOREIGN, ids=lambda value: str(value)[:60])
def test_what_is_foreign_is_refused_or_dropped(given: dict[str, Any], parameter: str) -> None:
    with pytest.raises(Untranslatable) as caught:
        to_messages(body(**given))
    assert caught.value.parameter == parameter
    assert caught.value.reason
    params = to_messages(body(**given), drop=True)
    if "messages" in given:
        assert params["messages"][0] == USER[0]
    else:
        assert params == to_messages(body(**KEPT.get(parameter, {})))


@pytest.mark.parametrize("choice", ["required", named("weather")])
def test_a_choice_without_tools(choice: Any) -> None:
    with pytest.raises(Untranslatable, match="tool_choice: asks for a tool that is not in tools"):
        to_messages(body(tool_choice=choice))
    assert to_messages(body(tool_choice=choice), drop=True) == to_messages(body())


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": user_part({"text": "x"})}, "messages[0].content[0]"),
    ({"messages": user_part({"type": "text"})}, "messages[0].content[0].text"),
    ({"messages": user_part(image("file:///x.png"))}, "messages[0].content[0].image_url.url"),
    (
        {"messages": user_part(file("data:text/plain;base64,!", filename="x"))},
        "messages[0].content[0].file.file_data",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [call("a", "{")]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [call("a", "[]")]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]},
        "messages[0].tool_calls[0]",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [call("a", "{}", name=None)]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": "8"}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"stop": 3}, "stop"),
    ({"user": 3}, "user"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("given", "parameter"), MALFORMED, ids=lambda value: str(value)[:60])
def test_what_is_broken_is_refused_even_when_dropping(
    given: dict[str, Any], parameter: str, drop: bool
) -> None:
    with pytest.raises(Untranslatable) as caught:
        to_messages({**body(), **given}, drop=drop)
    assert caught.value.parameter == parameter
    assert str(caught.value) == f"{parameter}: {caught.value.reason}"


def test_the_body_is_not_changed() -> None:
    messages = CONVERSATIONS["parallel tool calls"][0]
    given = body(messages, tools=[WEATHER, CLOCK], tool_choice=ALLOWED, user="u")
    before = json.dumps(given)
    to_messages(given)
    assert json.dumps(given) == before


def message(**members: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 10,
        "output_tokens": 5,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 1000,
        "service_tier": "batch",
    }
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "usage": usage,
    }
    return answer | members


def test_answer() -> None:
    assert from_message(message(), created=1700000000) == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "claude-haiku-4-5",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 1110,
            "completion_tokens": 5,
            "total_tokens": 1115,
            "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 1000},
        },
    }


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("something new", "stop"),
        (None, "stop"),
    ],
)
def test_finish_reason(stop_reason: str | None, finish_reason: str) -> None:
    answer = from_message(message(stop_reason=stop_reason), created=0)
    assert answer["choices"][0]["finish_reason"] == finish_reason


def test_answer_blocks() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "It is ", "citations": None},
        {"type": "text", "text": "wet."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
    ]
    answer = from_message(message(content=blocks, stop_reason="tool_use"), created=0)
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "It is wet.",
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
            }
        ],
    }


def test_refusal() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "Not that."}
    answer = from_message(message(content=[], stop_reason="refusal", stop_details=details), created=0)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": "Not that."}


def test_answer_without_usage() -> None:
    assert from_message({"content": None}, created=0)["usage"]["total_tokens"] == 0


def test_answer_can_be_sent_back() -> None:
    blocks = [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln", "n": [1, None]}},
    ]
    completion = from_message(message(content=blocks, stop_reason="tool_use"), created=0)
    turns = to_messages(body([*USER, completion["choices"][0]["message"]]))["messages"]
    assert turns[1] == {"role": "assistant", "content": blocks}


def test_answer_fits_openai_types() -> None:
    chat = pytest.importorskip("openai.types.chat")
    blocks = [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "a", "name": "f", "input": {}}]
    completion = from_message(message(content=blocks, stop_reason="tool_use"), created=1)
    parsed = chat.ChatCompletion.model_validate(completion)
    assert parsed.choices[0].message.tool_calls[0].function.arguments == "{}"
    assert parsed.usage.prompt_tokens_details.cached_tokens == 100


@pytest.mark.parametrize(
    ("error_type", "status"),
    [
        ("invalid_request_error", 400),
        ("authentication_error", 401),
        ("billing_error", 402),
        ("permission_error", 403),
        ("not_found_error", 404),
        ("request_too_large", 413),
        ("rate_limit_error", 429),
        ("api_error", 500),
        ("timeout_error", 504),
        ("overloaded_error", 529),
        ("something new", 500),
    ],
)
def test_error_status(error_type: str, status: int) -> None:
    assert error_status(error_type) == status


IDS = [
    "row-1",
    "A_b-9",
    "x" * 64,
    "s3.GetObject",
    "Köln",
    "x" * 65,
    "ab_1",
    "",
    " ",
    "a\nb",
    "ab_bczM",
    "é" * 23,
]


@pytest.mark.parametrize("custom_id", IDS)
def test_ids_fit_and_come_back(custom_id: str) -> None:
    safe = safe_id(custom_id)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", safe)
    kept = len(custom_id.encode()) <= 64 and re.fullmatch(r"(?!ab_)[\w-]+", custom_id, re.ASCII) is not None
    assert (safe == custom_id) == kept
    assert original_id(safe) == (custom_id if kept or len(custom_id.encode()) <= 45 else safe)


def test_no_two_ids_become_one() -> None:
    mapped = [safe_id(custom_id) for custom_id in IDS]
    both = {*IDS, *mapped}
    assert len({safe_id(custom_id) for custom_id in both}) == len(both)


@pytest.mark.parametrize("foreign", ["ab_b!", "ab_b_w", "ab_bcm93LTE", "ab_bA", "ab_hello", "msg"])
def test_ids_that_safe_id_did_not_make_stay(foreign: str) -> None:
    # "ab_bcm93LTE" is base64url for "row-1", which needs no mapping.
    assert original_id(foreign) == foreign


# Everything above that translates is also held against the vendor's own schema.
def valid_bodies() -> list[dict[str, Any]]:
    bodies = [body(messages) for messages, _, _ in CONVERSATIONS.values()]
    return bodies + [body(**given) for given, _ in PARAMETERS]


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    path = SPECS / "anthropic.json"
    if not path.exists():
        pytest.skip(
            f"no API description at {path}; set ANYBATCH_SPECS to the folder that holds anthropic.json"
        )
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def validate(spec: dict[str, Any], schema: str, value: object) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    root = {"$ref": f"#/components/schemas/{schema}", "components": spec["components"]}
    jsonschema.Draft202012Validator(root).validate(value)


def test_requests_fit_the_vendors_schema(spec: dict[str, Any]) -> None:
    params = [to_messages(given) for given in valid_bodies()]
    params += [to_messages(body(**given), drop=True) for given, _ in FOREIGN]
    requests = [{"custom_id": safe_id(f"row {n}"), "params": each} for n, each in enumerate(params)]
    validate(spec, "CreateMessageBatchParams", {"requests": requests})
    assert len(requests) > 60


def test_the_schema_check_can_fail(spec: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    wrong = {"custom_id": "a", "params": {**to_messages(body()), "seed": 1}}
    with pytest.raises(jsonschema.ValidationError):
        validate(spec, "CreateMessageBatchParams", {"requests": [wrong]})


def test_error_types_are_the_vendors(spec: dict[str, Any]) -> None:
    schemas = spec["components"]["schemas"]
    refs = schemas["ErrorResponse"]["properties"]["error"]["oneOf"]
    kinds = [schemas[ref["$ref"].rsplit("/", 1)[1]]["properties"]["type"]["const"] for ref in refs]
    assert kinds
    assert [kind for kind in kinds if kind != "api_error" and error_status(kind) == 500] == []
