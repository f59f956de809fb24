"""A small real HTTP/1.1 server on loopback: serves a fake provider, records all requests, and fails on cue.

    fake = OpenAIFake()
    with FakeServer(fake) as server:
        server.fail("POST", "/v1/batches", ResetAfter())        # the next create: done, but unanswered
        …                                                       # drive a client at server.api_base
        assert server.count("POST", "/v1/batches") == 1

The application runs on the server's own thread, one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, unquote

from .faults import HOLD_LIMIT, CutBody, Fault, Hold, ResetAfter, ResetBefore, Respond, Rules, Stall
from .loop import LoopThread, reset

if TYPE_CHECKING:
    from types import TracebackType

RECORDED = 16 << 20  # bytes of a request body that are kept for assertions
CRASHED = 418  # answers for a bug in the application: a status no client takes for a provider's blip


@dataclass(frozen=True)
class Request:
    """One request as the application sees it; header names are lower case, the path is still quoted."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def segments(self) -> list[str]:
        return [unquote(part) for part in self.path.strip("/").split("/")]

    def first(self, name: str, default: str | None = None) -> str | None:
        """The first value of a query parameter."""
        return self.query.get(name, [default])[0]


@dataclass(frozen=True)
class Reply:
    """One answer; the server adds content-length."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Reply:
        """A JSON answer; header names may be spelt with underscores."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, json.dumps(value).encode(), {"content-type": "application/json", **named})


App = Callable[[Request], Reply]


@dataclass
class Call:
    """A request that arrived, and what became of it.

    `handled`: the application has seen it; `done`: the server is through with it; `status`: of the answer.
    """

    request: Request
    at: float
    body_size: int
    fault: Fault | None = None
    handled: bool = False
    done: bool = False
    status: int | None = None
    reply: Reply | None = None

    @property
    def method(self) -> str:
        return self.request.method

    @property
    def path(self) -> str:
        return self.request.path

    @property
    def query(self) -> Mapping[str, list[str]]:
        return self.request.query

    @property
    def headers(self) -> Mapping[str, str]:
        return self.request.headers

    @property
    def body(self) -> bytes:
        return self.request.body

    def json(self) -> Any:
        return json.loads(self.request.body)

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.status}"


class FakeServer:
    """Serves `app` on a free loopback port while the context is open.

    `latency` seconds pass before each request is handled. An exception in the application answers 418 and is
    raised again when the context closes, so that a test cannot pass over a broken fake.
    """

    def __init__(self, app: App, *, latency: float = 0.0) -> None:
        self.app = app
        self.latency = latency
        self.calls: list[Call] = []
        self.connections = 0
        self._crashes: list[Exception] = []
        self._rules = Rules()
        self._changed = threading.Condition()
        self._thread = LoopThread("fake-server")

    def __enter__(self) -> Self:
        self._thread.__enter__()
        self._server = self._thread.listen(self._connected)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.loop.call_soon_threadsafe(self._server.close)
        self._thread.__exit__(kind, error, trace)
        if self._crashes and error is None:
            raise ExceptionGroup("the fake application crashed", self._crashes)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def api_base(self) -> str:
        """The base URL a client of this provider takes: with the application's `base_path`, if it has one."""
        return self.url + getattr(self.app, "base_path", "")

    # faults

    def fail(self, method: str, path: str, fault: Fault, *, times: int = 1, skip: int = 0) -> None:
        """Apply `fault` to the next `times` requests whose method and whole path match, after `skip` of them.

        `method` and `path` are regular expressions; the path is without query.
        """
        self._rules.add(f"(?:{method}) (?:{path})", fault, times=times, skip=skip)

    def hold(
        self, method: str, path: str, *, handled: bool, skip: int = 0, limit: float = HOLD_LIMIT
    ) -> Hold:
        """Stop the next matching request until released: see `Hold`."""
        hold = Hold(handled=handled, limit=limit)
        self.fail(method, path, hold, skip=skip)
        return hold

    def clear_faults(self) -> None:
        self._rules.clear()

    @property
    def unused_faults(self) -> int:
        return self._rules.unused

    # the record

    def find(self, method: str = ".*", path: str = ".*") -> list[Call]:
        """The requests so far whose method and whole path match, in order of arrival, faulted or not."""
        pattern = re.compile(f"(?:{method}) (?:{path})")
        return [call for call in list(self.calls) if pattern.fullmatch(f"{call.method} {call.path}")]

    def count(self, method: str = ".*", path: str = ".*") -> int:
        return len(self.find(method, path))

    def wait_for(self, method: str, path: str, *, count: int = 1, timeout: float = 10.0) -> list[Call]:
        """Wait until `count` matching requests have come and been dealt with; else AssertionError."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: sum(call.done for call in self.find(method, path)) >= count, timeout
            )
        assert done, f"{self.count(method, path)} of {count} requests {method} {path} within {timeout:g} s"
        return self.find(method, path)

    # serving

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while (request := await _read_request(reader, writer)) is not None:
            if not await self._exchange(request, writer):
                break

    async def _exchange(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False when the connection is to end."""
        fault = self._rules.take(f"{request.method} {request.path}")
        call = Call(_shortened(request), time.time(), len(request.body), fault)
        self.calls.append(call)
        try:
            await asyncio.sleep(self.latency + (fault.seconds if isinstance(fault, Stall) else 0))
            reply = await self._answer(request, call, fault)
            if reply is None:
                reset(writer)
                return False
            call.reply, call.status = reply, reply.status
            await _write_reply(writer, reply, fault.after if isinstance(fault, CutBody) else len(reply.body))
        finally:
            call.done = True
            with self._changed:
                self._changed.notify_all()
        return not isinstance(fault, CutBody) and request.headers.get("connection", "").lower() != "close"

    async def _answer(self, request: Request, call: Call, fault: Fault | None) -> Reply | None:
        """What to answer; None for a reset."""
        if isinstance(fault, Respond):
            body, content_type = fault.encode()
            return Reply(fault.status, body, {"content-type": content_type, **fault.headers})
        if isinstance(fault, ResetBefore):
            return None
        if isinstance(fault, Hold) and not fault.handled:
            await fault.block()
            if fault.dropped:
                return None
        reply = self._handle(request)
        call.handled = True
        if isinstance(fault, Hold) and fault.handled:
            await fault.block()
        lost = isinstance(fault, ResetAfter) or (isinstance(fault, Hold) and fault.dropped)
        return None if lost else reply

    def _handle(self, request: Request) -> Reply:
        try:
            return self.app(request)
        except Exception as error:
            self._crashes.append(error)
            return Reply(CRASHED, traceback.format_exc().encode(), {"content-type": "text/plain"})


def _shortened(request: Request) -> Request:
    if len(request.body) <= RECORDED:
        return request
    return Request(request.method, request.path, request.query, request.headers, request.body[:RECORDED])


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request of a connection, or None when the client has closed it."""
    head = await read_head(reader)
    if head is None:
        return None
    start, headers = parse_head(head)
    method, target, _ = start.split(" ", 2)
    path, _, query = target.partition("?")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await _read_body(reader, headers)
    return Request(method, path, parse_qs(query, keep_blank_values=True), headers, body)


async def read_head(reader: asyncio.StreamReader) -> bytes | None:
    """The next message head with its empty line, or None at the end of the stream."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None


def parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    """The start line, and the headers by lower-case name."""
    start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return start, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = bytearray()
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
        return bytes(body)
    return await reader.readexactly(int(headers.get("content-length", "0")))


async def _write_reply(writer: asyncio.StreamWriter, reply: Reply, length: int) -> None:
    phrase = HTTPStatus(reply.status).phrase if reply.status in set(HTTPStatus) else "Unknown"
    lines = [f"HTTP/1.1 {reply.status} {phrase}", f"content-length: {len(reply.body)}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
    writer.write(memoryview(reply.body)[:length])
    await writer.drain()
