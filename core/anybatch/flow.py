"""Protocol code is written once, as generators; two drivers run it.

A `Flow` yields effects and receives their results. `perform` and `aperform` are the only places where
anybatch sends, sleeps or touches a disk on behalf of a flow, the one on an `httpx.Client`, the other on an
`httpx.AsyncClient`.

    effect              received
    httpx.Request       httpx.Response, read and successful; an APIError is thrown into the flow otherwise
    Download            None, once the whole body is in the file
    Sleep               None
    Do                  what the function returned (in a thread under the async driver)
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
"""Seconds to wait for the network, where the caller has not said otherwise (`client_args`)."""
LARGE_TIMEOUT = httpx.Timeout(60.0, connect=15.0, read=600.0)
"""The same for a request that carries a shard: providers read and check all of it before they answer."""

_MAX_REDIRECTS = 5
_PLAIN_HEADERS = frozenset({"accept", "accept-encoding", "connection", "user-agent"})


@dataclass(frozen=True, slots=True)
class Download:
    """Stream the answer of a GET into a file, resuming by Range after a break."""

    request: httpx.Request
    path: Path


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pause the flow for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Do:
    """Call a function that blocks: reading the input, writing the ledger."""

    function: Callable[[], Any]


Effect: TypeAlias = httpx.Request | Download | Sleep | Do
Flow: TypeAlias = Generator[Effect, Any, T]


def send(
    request: httpx.Request, *, repeatable: bool = True, repeat_conflict: bool = True, large: bool = False
) -> Flow[httpx.Response]:
    """Send one request, with retries; a request that is not repeatable is sent again only where the
    provider certainly did not act on it (429, no connection). 409 stands for a lock that passes, unless
    `repeat_conflict` is False. `large` is one that carries a shard: its answer may take ten minutes."""
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
    """`send`, for what `read` makes of the answer.

    A ServerError that `read` raises counts as a failure of the request: where that is repeatable, it is sent
    again. So an answer that is cut short or malformed is asked for again, and a create never is.
    """
    request.extensions["anybatch.read"] = read
    return read(
        (yield from send(request, repeatable=repeatable, repeat_conflict=repeat_conflict, large=large))
    )


def download(request: httpx.Request, path: Path) -> Flow[None]:
    """Fetch a body of any size into `path`."""
    yield Download(request, path)


def sleep(seconds: float) -> Flow[None]:
    """Pause."""
    yield Sleep(seconds)


def do(function: Callable[[], T]) -> Flow[T]:
    """Run blocking code where it blocks nobody."""
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
    # Hand-built requests get the client's timeout when sent, but not its headers. Those that the caller has
    # added may hold a key: they are for the account's host only, like the account's own key.
    trusted = getattr(http.auth, "trusts", None)
    for name, value in http.headers.items():
        if trusted is None or trusted(request.url) or name in _PLAIN_HEADERS:
            request.headers.setdefault(name, value)
    if request.extensions.get("anybatch.large") and http.timeout == TIMEOUT:
        request.extensions["timeout"] = LARGE_TIMEOUT.as_dict()
    # httpx writes it itself, but not for a request that was given a stream.
    request.headers.setdefault("host", request.url.netloc.decode("ascii"))
    return request


def _redirected(request: httpx.Request, response: httpx.Response, hops: int) -> httpx.Request | None:
    """The request to make next when a GET is sent elsewhere; the client's auth decides whether the new
    host is shown the key. Raises ConfigurationError for what is not a GET: it would arrive as one."""
    if not response.has_redirect_location:
        return None
    if request.method != "GET":
        here, there = request.url, request.url.join(response.headers["location"])
        raise ConfigurationError(
            f"{here.host} did not act on {request.method} {here.path}, but redirects to {there.scheme}://"
            f"{there.netloc.decode('ascii')}; should api_base begin like that?",
            status_code=response.status_code,
        )
    if hops >= _MAX_REDIRECTS:
        raise ServerError(
            f"{request.url.host} redirects without end", status_code=response.status_code, should_retry=False
        )
    headers = {
        name: value
        for name, value in request.headers.items()
        if name in {"accept", "accept-encoding", "range"}
    }
    url = request.url.join(response.headers["location"])
    return httpx.Request("GET", url, headers=headers, extensions=dict(request.extensions))


def _check(request: httpx.Request, response: httpx.Response) -> None:
    """Raise the APIError that an answer stands for, or that what is to read it (`ask`) makes of it."""
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
    """A file that grows over several answers: says what to ask for, and takes what comes."""

    def __init__(self, request: httpx.Request, file: BinaryIO) -> None:
        self.size = 0
        self._first = request
        self._file = file
        self._validator: str | None = None
        self._in_parts = True  # whether ranges make sense: of an encoded body, or for some servers, none do
        self._total: int | None = None
        # What the answer with which the file was begun said of the whole.
        self._length: int | None = None
        self._content_type: str | None = None

    def request(self) -> httpx.Request:
        # Ranges count encoded bytes, so the body must come as it is.
        headers = httpx.Headers(self._first.headers)
        headers["accept-encoding"] = "identity"
        if self.size and self._in_parts:
            headers["range"] = f"bytes={self.size}-"
            if self._validator:
                headers["if-range"] = self._validator
        return httpx.Request("GET", self._first.url, headers=headers, extensions=dict(self._first.extensions))

    def begin(self, response: httpx.Response) -> None:
        """Take up the answer: go on where the file ends, or from the start where the server cannot.

        Raises ServerError for a part that was not asked for, or is one of another file: taken for the whole,
        or joined to the page of a gateway, it would lose rows.
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
                    f"{response.request.url.host} sent a part of the file that was not asked for",
                    status_code=206,
                )
            other_length = None not in (total, self._length) and total != self._length
            if other_length or response.headers.get("content-type") != self._content_type:
                self.restart()
                raise ServerError(
                    f"{response.request.url.host} goes on with another file than it began with",
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
        """Raise TransportError where the answer ended before the end of the file that it told of."""
        if self._total is not None and self.size < self._total:
            raise TransportError(f"the answer ended at byte {self.size} of {self._total}")

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.size = 0

    def is_whole(self, response: httpx.Response) -> bool:
        """Whether a 416 says that nothing was missing. Raises ServerError for one that makes no sense."""
        if response.status_code != 416:
            return False
        asked = "range" in response.request.headers
        if asked and response.headers.get("content-range") == f"bytes */{self.size}":
            return True
        self.restart()
        raise ServerError(
            f"{response.request.url.host} says that the file has no such range, "
            + ("though it had one before" if asked else "where the whole of it was asked for"),
            status_code=416,
        )

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.size += len(chunk)


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """First byte and total size of a partial answer; (-1, None) where it does not say where it begins."""
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
                if body.size <= before:  # as long as bytes come, go on
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
