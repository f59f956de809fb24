"""What the stand-in model answers."""

import base64
import json
import math
import struct
from typing import Any

import jsonschema
import pytest

from anybatch.local import faults, standin
from anybatch.local.schema import conform

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "good day"}]
    },
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "good day"}]}]},
    "/v1/completions": {"prompt": ["good day", "good night"]},
    "/v1/embeddings": {"input": ["good day", "good night"]},
    "/v1/moderations": {"input": "good day"},
}


def answer(endpoint: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "local:echo?fail=0.1"} | BODIES[endpoint] | body
    assert standin.check(endpoint, asked) is None
    return standin.answer(endpoint, asked, identity="x", created=1)


@pytest.mark.parametrize("endpoint", standin.ENDPOINTS)
def test_every_endpoint_has_its_shape(endpoint):
    from openai.types import CreateEmbeddingResponse, ModerationCreateResponse
    from openai.types.chat import ChatCompletion
    from openai.types.completion import Completion
    from openai.types.responses import Response

    shapes: dict[str, Any] = {
        "/v1/chat/completions": ChatCompletion,
        "/v1/responses": Response,
        "/v1/completions": Completion,
        "/v1/embeddings": CreateEmbeddingResponse,
        "/v1/moderations": ModerationCreateResponse,
    }
    said = answer(endpoint)
    assert said["model"] == "local:echo (stand-in)"
    assert answer(endpoint) == said
    shapes[endpoint].model_validate(said)


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_the_prompt_is_echoed_and_counted(endpoint):
    said = answer(endpoint)
    assert "good day [" in json.dumps(said)
    read, written = standin.usage_of(said)
    assert said["usage"]["total_tokens"] == read + written
    assert read >= 2
    assert written >= 2


def test_embeddings_are_unit_vectors_of_the_text():
    first, second = (item["embedding"] for item in answer("/v1/embeddings", dimensions=256)["data"])
    assert first != second
    for vector in (first, second):
        assert len(vector) == 256
        assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-4)
    packed = answer("/v1/embeddings", dimensions=256, encoding_format="base64")["data"][0]["embedding"]
    assert struct.unpack("<256f", base64.b64decode(packed)) == pytest.approx(first)
    assert len(answer("/v1/embeddings", input=[1, 2, 3])["data"]) == 1


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"enum": ["x", "y", "z"]}},
        "required": ["a", "b"],
    },
    {"type": "object", "additionalProperties": False},
    {"type": "array", "items": {"type": "number", "minimum": 3, "maximum": 4}, "minItems": 2, "maxItems": 5},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "c"}], "minItems": 2},
    {"type": "integer", "minimum": 10, "multipleOf": 7},
    {"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 6},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.001},
    {"type": "number", "maximum": -5},
    {"type": "string", "minLength": 500},
    {"type": "string", "maxLength": 3},
    {"type": "string", "format": "date-time"},
    {"type": ["string", "null"]},
    {"type": "null"},
    {"const": {"deep": [1]}},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string"}}},
            {"properties": {"b": {"type": "integer"}}},
        ]
    },
    {
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "below": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                },
                "required": ["name", "below"],
            },
            "Chain": {
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Chain"}, {"type": "null"}]}},
                "required": ["next"],
            },
        },
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Tree"}, "chain": {"$ref": "#/$defs/Chain"}},
        "required": ["tree", "chain"],
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_structured_answers_conform_to_their_schema(schema):
    for number in range(20):
        document = conform(schema, f"tell me of item {number}, please")
        jsonschema.validate(document, schema)
        assert conform(schema, f"tell me of item {number}, please") == document


def test_choices_vary_with_the_prompt():
    schema = SCHEMAS[0]
    assert {conform(schema, f"item {number}")["b"] for number in range(50)} == {"x", "y", "z"}
    assert conform(schema, "a very fine day")["a"] == "a very fine day"


def test_a_schema_without_any_finite_document_ends():
    assert conform({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "x")
    assert conform({"$ref": "#"}, "x") == "x"


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"label": {"enum": ["p", "q"]}},
    "required": ["label"],
}


@pytest.mark.parametrize("model", ["local:echo", "gpt-5"])
def test_every_model_obeys_response_format(model):
    chat = answer(
        "/v1/chat/completions",
        model=model,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    )
    jsonschema.validate(json.loads(chat["choices"][0]["message"]["content"]), SCHEMA)
    response = answer(
        "/v1/responses", model=model, text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    )
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), SCHEMA)
    plain = answer("/v1/chat/completions", model=model, response_format={"type": "json_object"})
    assert "echo" in json.loads(plain["choices"][0]["message"]["content"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_forced_tool_is_called(choice):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    said = answer("/v1/chat/completions", tools=tools, tool_choice=choice)["choices"][0]
    assert said["finish_reason"] == "tool_calls"
    call = said["message"]["tool_calls"][0]["function"]
    assert call["name"] == "f"
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    free = answer("/v1/chat/completions", tools=tools, tool_choice="auto")["choices"][0]
    assert free["message"]["content"]


def test_shares_are_met_and_depend_on_seed_and_id_alone():
    fates = [faults.parse("local:echo?fail=0.2&expire=0.1").fate(f"row-{number}") for number in range(5000)]
    assert 0.18 < fates.count(faults.FAIL) / 5000 < 0.22
    assert 0.08 < fates.count(faults.EXPIRE) / 5000 < 0.12
    again = [
        faults.parse("local:echo?delay=9&expire=0.1&fail=0.2").fate(f"row-{number}") for number in range(5000)
    ]
    assert fates == again


def test_the_table_lists_every_parameter():
    listed = {
        line.split("`")[1].split("=")[0]
        for line in (faults.__doc__ or "").splitlines()
        if line.startswith("| `")
    }
    assert listed == set(faults.Faults.__dataclass_fields__) == set(faults._PARSERS)
