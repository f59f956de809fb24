"""Requests, responses and errors of OpenAI's HTTP API, independent of any server or client library."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .standin import error_body

CHUNK = 1 << 18
MAX_JSON = 1 << 20


@dataclass(frozen=True)
class Request:
    """An HTTP request; header names are lower-case, and `body` is read at most once."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()


@dataclass(frozen=True)
class Response:
    """An HTTP response; a body that is not bytes is a stream of as many bytes as its content-length says."""

    status: int
    headers: dict[str, str]
    body: bytes | Iterator[bytes]


class Refusal(Exception):
    """An error answer in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.response = json_response(
            error_body(message, "server_error" if status >= 500 else kind, code, param),
            status,
            headers,
        )


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value).encode()
    fixed = {"content-type": "application/json", "content-length": str(len(body))}
    return Response(status, fixed | dict(headers or {}), body)


def page(items: list[dict[str, Any]], *, more: bool) -> Response:
    ends = {"first_id": items[0]["id"] if items else None, "last_id": items[-1]["id"] if items else None}
    return json_response({"object": "list", "data": items, **ends, "has_more": more})


def read_query(request: Request, *known: str) -> dict[str, str]:
    query = dict(parse_qsl(request.query, keep_blank_values=True))
    unknown = query.keys() - set(known)
    if unknown:
        name = min(unknown)
        raise Refusal(400, f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    return query


def read_limit(query: Mapping[str, str], default: int, most: int) -> int:
    text = query.get("limit", str(default))
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise Refusal(400, f"'limit' must be a whole number from 1 to {most}.", param="limit")
    return int(text)


def read_json(request: Request) -> dict[str, Any]:
    body = b""
    for chunk in request.body:
        body += chunk
        if len(body) > MAX_JSON:
            raise Refusal(413, "The request body is too large.")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body of your request must be a JSON object.")
    return value


def read_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return [start, stop) of a single-range header; ignore anything else (None), as RFC 9110 14.2 allows."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.replace(" ", "")) if header else None
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size or start >= stop:
        headers = {"content-range": f"bytes */{size}"}
        raise Refusal(416, "The requested range is not satisfiable.", headers=headers)
    return start, stop


def read_file(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (chunk := file.read(min(CHUNK, length))):
            length -= len(chunk)
            yield chunk
