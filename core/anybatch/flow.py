"""Flows: protocol code written once, as generators, and run by two drivers.

A `Flow` yields effects and receives their results. Only the drivers, `perform` on an `httpx.Client` and
`aperform` on an `httpx.AsyncClient`, send, sleep or touch a disk on behalf of a flow.

    effect              what the flow receives
    httpx.Request       httpx.Response, read and successful; otherwise an APIError is thrown into the flow
    Download            None, once the whole body is in the file
    Sleep               None
    Do                  the return value of the function, which the async driver runs in a thread
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import httpx

from . import retry
from .sending import adownload_file, asend_request, download_file, send_request

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Download:
    """Stream the body of a GET into a file; resume with a Range header if it breaks off."""

    request: httpx.Request
    path: Path


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pause the flow."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Do:
    """Call a function that blocks, such as one that reads the input or writes the ledger."""

    function: Callable[[], Any]


Effect: TypeAlias = httpx.Request | Download | Sleep | Do
Flow: TypeAlias = Generator[Effect, Any, T]


def send(
    request: httpx.Request, *, repeatable: bool = True, repeat_conflict: bool = True, large: bool = False
) -> Flow[httpx.Response]:
    """Send one request, with retries.

    Args:
        request: The request.
        repeatable: Whether repeating it is harmless. Otherwise it is repeated only if the provider certainly
            did not act on it (429, no connection).
        repeat_conflict: Whether a 409 means a temporary lock, so that the request is repeated.
        large: Whether it carries a shard, so that the answer may take ten minutes.

    Returns:
        The successful response, read.

    Raises:
        APIError: The request failed, and is not repeated any more.
    """
    request.extensions["anybatch.repeatable"] = repeatable
    request.extensions["anybatch.repeat_conflict"] = repeat_conflict
    request.extensions["anybatch.large"] = large
    response: httpx.Response = yield request
    return response


def ask(
    request: httpx.Request,
    read: Callable[[httpx.Response], T],
    *,
    repeatable: bool = True,
    repeat_conflict: bool = True,
    large: bool = False,
) -> Flow[T]:
    """Send one request with retries, and read its answer.

    If `read` raises a ServerError, the request counts as failed and is repeated if that is harmless: a
    truncated or malformed answer is requested again, but a create is never sent twice because of it.

    Args:
        request: The request.
        read: Makes the result from the response. It is called twice.
        repeatable: See `send`.
        repeat_conflict: See `send`.
        large: See `send`.

    Returns:
        What `read` returns.

    Raises:
        APIError: The request failed, and is not repeated any more.
    """
    request.extensions["anybatch.read"] = read
    return read(
        (yield from send(request, repeatable=repeatable, repeat_conflict=repeat_conflict, large=large))
    )


def download(request: httpx.Request, path: Path) -> Flow[None]:
    """Download a body of any size into the file `path`."""
    yield Download(request, path)


def sleep(seconds: float) -> Flow[None]:
    """Pause the flow."""
    yield Sleep(seconds)


def do(function: Callable[[], T]) -> Flow[T]:
    """Call a function that blocks, without blocking an event loop."""
    result: T = yield Do(function)
    return result


# --- the drivers -------------------------------------------------------------------------------------


def perform(flow: Flow[T], http: httpx.Client, policy: retry.RetryPolicy) -> T:
    """Run a flow to its end on a blocking client."""

    def result_of(effect: Effect) -> Any:
        match effect:
            case httpx.Request():
                return policy.call(lambda: send_request(http, effect), effect)
            case Download(request, path):
                return download_file(http, policy, request, path)
            case Sleep(seconds):
                return time.sleep(seconds)
            case Do(function):
                return function()

    try:
        effect = next(flow)
        while True:
            try:
                result = result_of(effect)
            except Exception as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        flow.close()


async def aperform(flow: Flow[T], http: httpx.AsyncClient, policy: retry.RetryPolicy) -> T:
    """Run a flow to its end on an asynchronous client; the event loop is never blocked."""

    async def result_of(effect: Effect) -> Any:
        match effect:
            case httpx.Request():
                return await policy.acall(lambda: asend_request(http, effect), effect)
            case Download(request, path):
                return await adownload_file(http, policy, request, path)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Do(function):
                return await asyncio.to_thread(function)

    try:
        effect = next(flow)
        while True:
            try:
                result = await result_of(effect)
            except Exception as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        flow.close()
