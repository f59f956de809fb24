"""The calls that most wire formats consist of: JSON requests and answers, and bounded waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx

from ..errors import BadRequestError, NotFoundError, ServerError
from ..flow import Flow, T, ask, send, sleep
from ..retry import redact
from .content import Content, LinesBody

# The extension of a response that keeps its parsed JSON: `ask` reads it twice.
_READ = "anybatch.json"
# Members of an object or a listing; if an answer has one, its `error` is part of that, and no failure.
_IDS = frozenset({"id", "data", "name", "batch_id"})


def json_of(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in a provider's answer; raise ServerError for anything else."""
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
        # Some servers, and gateways in front of them, report failures with status 200.
        request = response.request
        raise ServerError(
            f"{request.url.host} answered {request.method} {request.url.path} with an error: "
            f"{redact(response.text, request)[:200]!r}",
            status_code=response.status_code,
        )
    response.extensions[_READ] = body
    return body


def get(url: str, params: Mapping[str, Any] | None = None) -> Flow[dict[str, Any]]:
    """GET a JSON object.

    Args:
        url: The address.
        params: Query parameters; those that are None are left out.

    Returns:
        The object.

    Raises:
        APIError: The provider refused the request, or did not answer with a JSON object.
    """
    query = {name: value for name, value in (params or {}).items() if value is not None}
    return (yield from ask(httpx.Request("GET", url, params=query), json_of))


def answers(url: str) -> Flow[bool]:
    """Whether a GET of this address finds something."""
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
    """POST JSON, and receive a JSON object.

    Args:
        url: The address.
        body: The value to send as JSON; None sends no body.
        repeatable: Whether the request may be repeated if it gets no answer: false for a create, which might
            then leave two batches.
        repeat_conflict: Whether to repeat the request after a 409.
        headers: Additional headers.

    Returns:
        The object.

    Raises:
        APIError: The provider refused the request, or did not answer with a JSON object.
    """
    request = httpx.Request("POST", url, json=body, headers=headers)
    return (yield from ask(request, json_of, repeatable=repeatable, repeat_conflict=repeat_conflict))


def post_lines(url: str, content: Content, *, head: bytes, tail: bytes) -> Flow[dict[str, Any]]:
    """POST a shard inside a JSON body, for a create that carries its requests; it is sent only once.

    Args:
        url: The address.
        content: The shard; its lines become the elements of a list.
        head: The body before the list's elements, such as `b'{"requests":['`.
        tail: The body after them, such as `b']}'`.

    Returns:
        The JSON object in the answer.

    Raises:
        APIError: The provider refused the request, or did not answer with a JSON object.
    """
    body = LinesBody(content, head, tail)
    headers = {"content-type": "application/json", "content-length": str(body.size)}
    request = httpx.Request("POST", url, headers=headers, stream=body)
    return (yield from ask(request, json_of, repeatable=False, large=True))


def delete(url: str, *, repeat_conflict: bool = True) -> Flow[None]:
    """DELETE an object; it is no error if there is none.

    Args:
        url: The address.
        repeat_conflict: Whether to repeat the request after a 409.

    Raises:
        APIError: The provider refused the request.
    """
    with suppress(NotFoundError):
        yield from send(httpx.Request("DELETE", url), repeat_conflict=repeat_conflict)


def wait_until(
    is_ready: Callable[[T], bool], look: Callable[[], Flow[T]], *, every: float = 2.0, at_most: float = 600.0
) -> Flow[T]:
    """Look at something until it is ready.

    This is for things that a provider prepares within seconds during a create or a download, such as an
    uploaded file that is being checked, or an address that is being signed.

    Args:
        is_ready: Whether what was found is ready.
        look: The flow that looks.
        every: Seconds between two looks.
        at_most: Seconds of pauses after which to give up.

    Returns:
        What was found last: it is ready, unless the time was up.
    """
    waited = 0.0
    while True:
        found = yield from look()
        if is_ready(found) or waited >= at_most:
            return found
        yield from sleep(every)
        waited += every
