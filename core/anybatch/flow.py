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
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import httpx

from . import retry
from .errors import ConfigurationError, ServerError, TransportError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

T = TypeVar("T")

CHUNK = 1 << 16

TIMEOUT = httpx.Timeout(60.0, connect=15.0)
"""The default network timeouts, in seconds; `client_args` can set others."""
LARGE_TIMEOUT = httpx.Timeout(60.0, connect=15.0, read=600.0)
"""The same for a request that carries a shard: a provider reads and checks all of it before it answers."""

_MAX_REDIRECTS = 5
_PLAIN_HEADERS = frozenset({"accept", "accept-encoding", "connection", "user-agent"})


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
                return policy.call(lambda: _send(http, effect), effect)
            case Download(request, path):
                return _download(http, policy, request, path)
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
                return await policy.acall(lambda: _asend(http, effect), effect)
            case Download(request, path):
                return await _adownload(http, policy, request, path)
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


# --- one request -------------------------------------------------------------------------------------


def _prepare(http: httpx.Client | httpx.AsyncClient, request: httpx.Request) -> httpx.Request:
    # httpx adds the client's timeout to a request that was built without the client, but not its headers.
    # Headers from the user's client_args may hold a key: send them only to the account's own hosts.
    trusted = getattr(http.auth, "trusts", None)
    for name, value in http.headers.items():
        if trusted is None or trusted(request.url) or name in _PLAIN_HEADERS:
            request.headers.setdefault(name, value)
    if request.extensions.get("anybatch.large") and http.timeout == TIMEOUT:
        request.extensions["timeout"] = LARGE_TIMEOUT.as_dict()
    # httpx does not add the Host header to a request with a stream.
    request.headers.setdefault("host", request.url.netloc.decode("ascii"))
    return request


def _redirected(request: httpx.Request, response: httpx.Response, hops: int) -> httpx.Request | None:
    """Return the request that follows a redirect, or None if there is none.

    It carries no credentials; the client's auth decides whether the new host gets them. Raises
    ConfigurationError for the redirect of another method than GET, which would arrive as a GET.
    """
    if not response.has_redirect_location:
        return None
    if request.method != "GET":
        here, there = request.url, request.url.join(response.headers["location"])
        raise ConfigurationError(
            f"{here.host} did not act on {request.method} {here.path}, but redirects to {there.scheme}://"
            f"{there.netloc.decode('ascii')}; check whether api_base should begin with that address",
            status_code=response.status_code,
        )
    if hops >= _MAX_REDIRECTS:
        raise ServerError(
            f"{request.url.host} redirects more than {_MAX_REDIRECTS} times",
            status_code=response.status_code,
            should_retry=False,
        )
    headers = {
        name: value
        for name, value in request.headers.items()
        if name in {"accept", "accept-encoding", "range"}
    }
    url = request.url.join(response.headers["location"])
    return httpx.Request("GET", url, headers=headers, extensions=dict(request.extensions))


def _check(request: httpx.Request, response: httpx.Response) -> None:
    """Raise the APIError of an unsuccessful answer, or the one that the `read` of `ask` raises."""
    retry.raise_for_status(response)
    if (read := request.extensions.get("anybatch.read")) is not None:
        read(response)


def _send(http: httpx.Client, request: httpx.Request) -> httpx.Response:
    hops = 0
    while True:
        with retry.transport_errors(request):
            response = http.send(_prepare(http, request))
        following = _redirected(request, response, hops)
        if following is None:
            _check(request, response)
            return response
        request, hops = following, hops + 1


async def _asend(http: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    hops = 0
    while True:
        with retry.transport_errors(request):
            response = await http.send(_prepare(http, request))
        following = _redirected(request, response, hops)
        if following is None:
            _check(request, response)
            return response
        request, hops = following, hops + 1


# --- one download ------------------------------------------------------------------------------------


class _Resumable:
    """A file that is downloaded in several parts if the connection breaks."""

    def __init__(self, request: httpx.Request, file: BinaryIO) -> None:
        self.size = 0
        self._first = request
        self._file = file
        self._validator: str | None = None
        self._in_parts = True  # False if the body is encoded, or if the server does not support ranges
        self._total: int | None = None
        # From the answer that began the file; those of later parts must agree.
        self._length: int | None = None
        self._content_type: str | None = None

    def request(self) -> httpx.Request:
        """Build the request for the rest of the file."""
        # Ranges count encoded bytes, so the body must not be compressed.
        headers = httpx.Headers(self._first.headers)
        headers["accept-encoding"] = "identity"
        if self.size and self._in_parts:
            headers["range"] = f"bytes={self.size}-"
            if self._validator:
                headers["if-range"] = self._validator
        return httpx.Request("GET", self._first.url, headers=headers, extensions=dict(self._first.extensions))

    def begin(self, response: httpx.Response) -> None:
        """Prepare for the body of an answer: append to the file, or start again if it is the whole file.

        Raises ServerError for a part that was not requested, and for a part of another file: accepting either
        would lose rows.
        """
        self._total = None
        etag = response.headers.get("etag", "")
        if response.status_code == 206:
            start, total = _content_range(response)
            changed = bool(self._validator and etag and etag != self._validator)
            if "range" not in response.request.headers or start != self.size or changed:
                self.restart()
                self._in_parts = False
                raise ServerError(
                    f"{response.request.url.host} sent a part of the file that was not requested",
                    status_code=206,
                )
            other_length = None not in (total, self._length) and total != self._length
            if other_length or response.headers.get("content-type") != self._content_type:
                self.restart()
                raise ServerError(
                    f"{response.request.url.host} continued with another file than it began with",
                    status_code=206,
                )
            self._total = total
        else:
            self.restart()
            if response.headers.get("content-encoding", "identity") != "identity":
                self._in_parts = False
            length = response.headers.get("content-length", "")
            self._length = int(length) if re.fullmatch(r"\d{1,18}", length) else None
            self._content_type = response.headers.get("content-type")
        self._validator = etag if etag and not etag.startswith("W/") else None

    def end(self) -> None:
        """Raise TransportError if the answer ended before the end of the file that it announced."""
        if self._total is not None and self.size < self._total:
            raise TransportError(f"the answer ended at byte {self.size} of {self._total}")

    def restart(self) -> None:
        """Discard what was downloaded so far."""
        self._file.seek(0)
        self._file.truncate()
        self.size = 0

    def is_whole(self, response: httpx.Response) -> bool:
        """Whether a 416 means that the file is complete; raise ServerError if it contradicts itself."""
        if response.status_code != 416:
            return False
        has_range = "range" in response.request.headers
        if has_range and response.headers.get("content-range") == f"bytes */{self.size}":
            return True
        self.restart()
        raise ServerError(
            f"{response.request.url.host} answers that the file has no such range, "
            + ("although it is longer" if has_range else "although the whole file was requested"),
            status_code=416,
        )

    def write(self, chunk: bytes) -> None:
        """Append a chunk of the body."""
        self._file.write(chunk)
        self.size += len(chunk)


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """Return the first byte and the total size of a partial answer; (-1, None) if it states no range."""
    found = re.fullmatch(
        r"bytes (\d{1,18})-\d{1,18}/(?:(\d{1,18})|\*)", response.headers.get("content-range", "")
    )
    return (int(found[1]), int(found[2]) if found[2] else None) if found else (-1, None)


def _download(http: httpx.Client, policy: retry.RetryPolicy, first: httpx.Request, path: Path) -> None:
    with path.open("wb") as file:
        body = _Resumable(first, file)

        def attempt() -> None:
            request, hops = body.request(), 0
            while True:
                with retry.transport_errors(request):
                    response = http.send(_prepare(http, request), stream=True)
                    try:
                        following = _redirected(request, response, hops)
                        if following is None and response.is_success:
                            body.begin(response)
                            for chunk in response.iter_bytes():
                                body.write(chunk)
                            body.end()
                        elif following is None:
                            response.read()
                    finally:
                        response.close()
                if following is None:
                    if not body.is_whole(response):
                        retry.raise_for_status(response)
                    return
                request, hops = following, hops + 1

        while True:
            before = body.size
            try:
                return policy.call(attempt, first)
            except TransportError:
                if body.size <= before:  # as long as more bytes arrive, try again
                    raise


async def _adownload(
    http: httpx.AsyncClient, policy: retry.RetryPolicy, first: httpx.Request, path: Path
) -> None:
    with path.open("wb") as file:
        body = _Resumable(first, file)

        async def attempt() -> None:
            request, hops = body.request(), 0
            while True:
                with retry.transport_errors(request):
                    response = await http.send(_prepare(http, request), stream=True)
                    try:
                        following = _redirected(request, response, hops)
                        if following is None and response.is_success:
                            body.begin(response)
                            async for chunk in response.aiter_bytes():
                                body.write(chunk)
                            body.end()
                        elif following is None:
                            await response.aread()
                    finally:
                        await response.aclose()
                if following is None:
                    if not body.is_whole(response):
                        retry.raise_for_status(response)
                    return
                request, hops = following, hops + 1

        while True:
            before = body.size
            try:
                return await policy.acall(attempt, first)
            except TransportError:
                if body.size <= before:
                    raise
