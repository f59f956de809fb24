"""Calls that most wire formats are made of: JSON asked for and answered, and waits with a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx

from ..errors import BadRequestError, NotFoundError, ServerError
from ..flow import Flow, T, ask, send, sleep
from ..retry import redact
from .content import Content, LinesBody

# Where an answer keeps what it was read as: `ask` reads it twice.
_READ = "anybatch.json"
# What an object or a listing has, of which an error may be a member.
_IDS = frozenset({"id", "data", "name", "batch_id"})


def json_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object a provider answered with; anything else is a ServerError."""
    before: dict[str, Any] | None = response.extensions.get(_READ)
    if before is not None:
        return before
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        request = response.request
        raise ServerError(
            f"{request.url.host} answered {request.method} {request.url.path} "
            f"with something that is not a JSON object: {redact(response.text, request)[:200]!r}",
            status_code=response.status_code,
        )
    if body.get("error") and not body.keys() & _IDS:
        # Some servers, and gateways before them, report their failures with status 200.
        request = response.request
        raise ServerError(
            f"{request.url.host} answered {request.method} {request.url.path} with an error: "
            f"{redact(response.text, request)[:200]!r}",
            status_code=response.status_code,
        )
    response.extensions[_READ] = body
    return body


def get(url: str, params: Mapping[str, Any] | None = None) -> Flow[dict[str, Any]]:
    """GET a JSON object; parameters that are None are left out."""
    query = {name: value for name, value in (params or {}).items() if value is not None}
    return (yield from ask(httpx.Request("GET", url, params=query), json_of))


def answers(url: str) -> Flow[bool]:
    """Whether there is something at an address."""
    try:
        yield from get(url)
    except (NotFoundError, BadRequestError):
        return False
    return True


def post(
    url: str,
    body: object = None,
    *,
    repeatable: bool = True,
    repeat_conflict: bool = True,
    headers: Mapping[str, str] | None = None,
) -> Flow[dict[str, Any]]:
    """POST JSON and receive JSON."""
    request = httpx.Request("POST", url, json=body, headers=headers)
    return (yield from ask(request, json_of, repeatable=repeatable, repeat_conflict=repeat_conflict))


def post_lines(url: str, content: Content, *, head: bytes, tail: bytes) -> Flow[dict[str, Any]]:
    """POST a shard inside a JSON body, as the list between `head` and `tail`: a create, sent once."""
    body = LinesBody(content, head, tail)
    headers = {"content-type": "application/json", "content-length": str(body.size)}
    request = httpx.Request("POST", url, headers=headers, stream=body)
    return (yield from ask(request, json_of, repeatable=False, large=True))


def delete(url: str, *, repeat_conflict: bool = True) -> Flow[None]:
    """DELETE what is at an address; that there is nothing is no error."""
    with suppress(NotFoundError):
        yield from send(httpx.Request("DELETE", url), repeat_conflict=repeat_conflict)


def wait_until(
    is_ready: Callable[[T], bool], look: Callable[[], Flow[T]], *, every: float = 2.0, at_most: float = 600.0
) -> Flow[T]:
    """Look until what is there is ready, and return it; after `at_most` seconds of pauses as it is then.

    For what a provider prepares within seconds, in the middle of a create or a download: an uploaded file
    that is being checked, an address that is being signed.
    """
    waited = 0.0
    while True:
        found = yield from look()
        if is_ready(found) or waited >= at_most:
            return found
        yield from sleep(every)
        waited += every
