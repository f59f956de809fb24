"""What Anthropic checks when a message batch is created: one bad request refuses the whole batch.

The schema is the part of Anthropic's OpenAPI document that plain, tool-using and multimodal messages touch,
written out by hand; versions and the rules across messages follow the API's documentation.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from .provider import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .rows import Json

OLD, NEW = "2023-06-01", "2026-10-21"
VERSIONS = frozenset({OLD, NEW})
MAX_REQUESTS = 100_000
SAMPLING = ("temperature", "top_p", "top_k")


def _closed(required: str, **properties: Any) -> Json:
    """An object with these members and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _typed(kind: str, required: str = "", **properties: Any) -> Json:
    return _closed(f"type {required}", type={"const": kind}, **properties)


TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
ANY: Json = {}
CACHE = {"anyOf": [{"type": "null"}, _typed("ephemeral", ttl={"enum": ["5m", "1h"]})]}
NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,128}$"}
TEXT_BLOCK = _typed(
    "text", "text", text={"type": "string", "minLength": 1}, citations=ANY, cache_control=CACHE
)
IMAGE_TYPES = ["image/jpeg", "image/png", "image/gif", "image/webp"]
IMAGE_BLOCK = _typed(
    "image",
    "source",
    source={
        "anyOf": [
            _typed("base64", "data media_type", data=TEXT, media_type={"enum": IMAGE_TYPES}),
            _typed("url", "url", url=TEXT),
        ]
    },
    cache_control=CACHE,
)
DOCUMENT_BLOCK = _typed(
    "document",
    "source",
    source={"type": "object"},
    cache_control=CACHE,
    citations=ANY,
    context=ANY,
    title=ANY,
)
TOOL_ID = {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"}
TOOL_USE_BLOCK = _typed(
    "tool_use",
    "id name input",
    id=TOOL_ID,
    name={"type": "string", "minLength": 1, "maxLength": 200},
    input={"type": "object"},
    cache_control=CACHE,
)
PARTS = {"type": "array", "items": {"anyOf": [TEXT_BLOCK, IMAGE_BLOCK, DOCUMENT_BLOCK]}}
TOOL_RESULT_BLOCK = _typed(
    "tool_result",
    "tool_use_id",
    tool_use_id=TOOL_ID,
    content={"anyOf": [TEXT, PARTS]},
    is_error=FLAG,
    cache_control=CACHE,
)
THINKING_BLOCK = _typed("thinking", "thinking signature", thinking=TEXT, signature=TEXT)
BLOCKS = [TEXT_BLOCK, IMAGE_BLOCK, DOCUMENT_BLOCK, TOOL_USE_BLOCK, TOOL_RESULT_BLOCK, THINKING_BLOCK]
MESSAGE = _closed(
    "role content",
    role={"enum": ["user", "assistant"]},
    content={"anyOf": [TEXT, {"type": "array", "items": {"anyOf": BLOCKS}}]},
)
TOOL = _closed(
    "name input_schema",
    name=NAME,
    description=TEXT,
    input_schema={"type": "object", "required": ["type"], "properties": {"type": {"const": "object"}}},
    type={"enum": [None, "custom"]},
    strict=FLAG,
    cache_control=CACHE,
)
SERVER_TOOL = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {"type": {"type": "string", "pattern": r"_20\d{6}$"}},
}
TOOL_CHOICE = {
    "anyOf": [
        *(_typed(kind, disable_parallel_tool_use=FLAG) for kind in ("auto", "any")),
        _typed("tool", "name", name=TEXT, disable_parallel_tool_use=FLAG),
        _typed("none"),
    ]
}
THINKING = {
    "anyOf": [
        _typed("enabled", "budget_tokens", budget_tokens={"type": "integer", "minimum": 1024}, display=ANY),
        _typed("adaptive", display=ANY),
        _typed("disabled"),
    ]
}
OUTPUT_CONFIG = _closed(
    "",
    effort={"enum": [None, "low", "medium", "high", "xhigh", "max"]},
    format={"anyOf": [{"type": "null"}, _typed("json_schema", "schema", schema={"type": "object"})]},
)
PARAMS = _closed(
    "model messages max_tokens",
    model={"type": "string", "minLength": 1},
    messages={"type": "array", "items": MESSAGE, "minItems": 1},
    max_tokens={"type": "integer", "minimum": 0},
    system={"anyOf": [TEXT, {"type": "array", "items": TEXT_BLOCK}]},
    stop_sequences={"type": "array", "items": TEXT},
    temperature={"type": "number", "minimum": 0, "maximum": 1},
    top_p={"type": "number", "minimum": 0, "maximum": 1},
    top_k={"type": "integer", "minimum": 0},
    stream=FLAG,
    metadata=_closed("", user_id={"type": ["string", "null"], "maxLength": 512}),
    tools={"type": "array", "items": {"anyOf": [TOOL, SERVER_TOOL]}},
    tool_choice=TOOL_CHOICE,
    thinking=THINKING,
    output_config=OUTPUT_CONFIG,
    service_tier={"enum": ["auto", "standard_only"]},
    cache_control=CACHE,
    container={"type": ["string", "null"]},
    inference_geo={"type": ["string", "null"]},
)
ROW = _closed(
    "custom_id params", custom_id={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}, params=PARAMS
)
_ROW_VALIDATOR = Draft202012Validator(ROW)


def check_create(body: Json, version: str) -> None:
    """Refuse what the API refuses; messages begin with the place, as in `requests.0.params.max_tokens: …`."""
    for name in sorted(body.keys() - {"requests"}):
        raise Refusal(400, f"{name}: Extra inputs are not permitted")
    rows = body.get("requests")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_REQUESTS:
        raise Refusal(400, f"requests: List should have 1 to {MAX_REQUESTS} items")
    seen: set[str] = set()
    for index, row in enumerate(rows):
        error = best_match(_ROW_VALIDATOR.iter_errors(row))
        if error is not None:
            place = ".".join(str(part) for part in ("requests", index, *error.absolute_path))
            raise Refusal(400, f"{place}: {error.message[:300]}")
        if row["custom_id"] in seen:
            raise Refusal(400, f"requests.{index}.custom_id: '{row['custom_id']}' is not unique")
        seen.add(row["custom_id"])
        for place, problem in _params_problems(row["params"], version):
            raise Refusal(400, f"requests.{index}.params.{place}: {problem}")


def _params_problems(params: Json, version: str) -> list[tuple[str, str]]:
    """What the schema cannot say."""
    problems = [("stream", "is not supported in batches")] if params.get("stream") else []
    if params["max_tokens"] == 0:
        problems.append(("max_tokens", "must be at least 1 in batches"))
    if version == NEW:
        problems += [(name, f"is not supported since {NEW}") for name in SAMPLING if name in params]
    return problems + _turn_problems(params["messages"])


def _turn_problems(messages: Sequence[Json]) -> list[tuple[str, str]]:
    """Every tool_use must be answered in the next turn; consecutive messages of one role are one turn."""
    problems: list[tuple[str, str]] = []
    asked: set[str] = set()
    for role, turn in itertools.groupby(messages, key=lambda message: message["role"]):
        contents = [message["content"] for message in turn]
        blocks = [block for content in contents if isinstance(content, list) for block in content]
        answered = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if answered != asked:
            ids = ", ".join(sorted(answered ^ asked))
            problems.append(("messages", f"`tool_use` and `tool_result` blocks do not match: {ids}"))
        asked = {block["id"] for block in blocks if block["type"] == "tool_use"}
        if role == "user" and not all(contents):
            problems.append(("messages", "all messages must have non-empty content"))
    return problems
