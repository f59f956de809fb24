"""How an OpenAI-like server checks what it is sent: the create call at once, the input file later."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .provider import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .dialects import Dialect
    from .rows import Json

MAX_PROBLEMS = 50
CREATE_MEMBERS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata"})


def check_create(body: Json, dialect: Dialect) -> None:
    """Refuse what the API refuses immediately: unknown or missing members, endpoint, window, metadata."""
    for name in sorted(body.keys() - CREATE_MEMBERS - dialect.create_options):
        raise Refusal(400, f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(name), str):
            raise Refusal(
                400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name
            )
    if dialect.endpoints is not None and body["endpoint"] not in dialect.endpoints:
        supported = ", ".join(sorted(dialect.endpoints))
        message = f"Invalid value: '{body['endpoint']}'. Supported values are: {supported}."
        raise Refusal(400, message, code="invalid_value", param="endpoint")
    if not re.fullmatch(dialect.windows, body["completion_window"]):
        message = f"Invalid value: '{body['completion_window']}'."
        raise Refusal(400, message, code="invalid_value", param="completion_window")
    _check_metadata(body.get("metadata"), lists=dialect.metadata_lists)
    after = body.get("output_expires_after")
    if after is not None and not (
        after.get("anchor") == "created_at" and 3600 <= after.get("seconds", 0) <= 2592000
    ):
        raise Refusal(
            400, "Invalid 'output_expires_after'.", code="invalid_value", param="output_expires_after"
        )


def _check_metadata(metadata: Any, *, lists: bool) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > 16:
        raise Refusal(400, "Invalid 'metadata': too many properties.", code="object_above_max_properties")
    for key, value in metadata.items():
        if not (isinstance(value, str) or (lists and isinstance(value, list))):
            raise Refusal(400, f"Invalid type for 'metadata.{key}': expected a string.", code="invalid_type")
        if not 1 <= len(key) <= 64 or len(value) > 512:
            raise Refusal(400, f"Invalid 'metadata.{key}': string too long.", code="string_above_max_length")


def read_lines(data: bytes) -> Iterator[Json]:
    """The lines of valid input."""
    for line in data.split(b"\n"):
        if line.strip():
            yield json.loads(line)


def line_problems(data: bytes, endpoint: str, dialect: Dialect) -> list[Json]:
    """What asynchronous validation finds, as members of `errors.data`; at most MAX_PROBLEMS."""
    lines = data.removesuffix(b"\n").split(b"\n") if data.strip() else []
    if not lines:
        return [_problem("empty_file", "The input file is empty.", None)]
    if len(lines) > dialect.max_rows:
        message = f"The batch input file contains too many requests. The limit is {dialect.max_rows}."
        return [_problem("too_many_tasks", message, None)]
    seen: set[str] = set()
    models: set[Any] = set()
    problems: list[Json] = []
    for number, raw in enumerate(lines, 1):
        problems += _check_line(raw, number, endpoint, dialect, seen, models)
        if len(problems) >= MAX_PROBLEMS:
            break
    return problems[:MAX_PROBLEMS]


def _check_line(
    raw: bytes, number: int, endpoint: str, dialect: Dialect, seen: set[str], models: set[Any]
) -> Iterator[Json]:
    try:
        line = json.loads(raw.decode())  # a byte order mark is no JSON either
    except ValueError:
        line = None
    if not isinstance(line, dict):
        yield _problem("invalid_json_line", "This line is not parseable as valid JSON.", number)
        return
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        yield _problem(
            "missing_required_parameter", "Missing required parameter: 'custom_id'.", number, "custom_id"
        )
    elif custom_id in seen:
        message = f"The custom_id '{custom_id}' is used more than once."
        yield _problem("duplicate_custom_id", message, number, "custom_id")
    else:
        seen.add(custom_id)
    if dialect.bare_lines:
        for name in sorted(line.keys() - {"custom_id", "body"}):
            yield _problem("unknown_parameter", f"Unknown parameter: '{name}'.", number, name)
    elif line.get("method") != "POST":
        yield _problem("invalid_method", "The HTTP method of a request must be POST.", number, "method")
    elif line.get("url") != endpoint:
        message = f"The URL provided for this request does not match the batch endpoint '{endpoint}'."
        yield _problem("url_mismatch", message, number, "url")
    if not isinstance(body, dict):
        yield _problem("missing_required_parameter", "Missing required parameter: 'body'.", number, "body")
        return
    if body.get("stream"):
        yield _problem(
            "invalid_request", "Streaming is not supported in the Batch API.", number, "body.stream"
        )
    if not isinstance(body.get("model"), str):
        yield _problem("model_not_found", "Missing required parameter: 'body.model'.", number, "body.model")
        return
    models.add(body["model"])
    if len(models) > 1 and not dialect.mixed_models:
        message = f"The model '{body['model']}' does not match that of the other requests of this batch."
        yield _problem("model_mismatch", message, number, "body.model")


def _problem(code: str, message: str, line: int | None, param: str | None = None) -> Json:
    return {"code": code, "message": message, "param": param, "line": line}
