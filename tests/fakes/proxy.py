"""A TCP proxy on loopback that breaks connections on cue, in front of any HTTP/1.1 server.

    with FaultProxy(server.url) as proxy:
        proxy.fail("POST /v1/batches", ResetAfter())            # answered, but the client never hears
        …                                                       # drive a client at proxy.url

Unlike `FakeServer.fail` it needs nothing from the server behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from .faults import CutRequest, CutResponse, Fault, Hold, ResetAfter, ResetBefore, Rules, Stall
from .loop import LIMIT, LoopThread, reset
from .server import parse_head, read_head

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping
    from types import TracebackType

CHUNK = 1 << 16


class Cut(Exception):
    """The bytes a rule lets through have passed."""


class FaultProxy:
    """Forwards connections to `target` (http://host:port[/base]) while the context is open."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._base = parts.path
        self._rules = Rules()
        self._thread = LoopThread("fault-proxy")
        self._server: asyncio.Server | None = None
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        # bound for the proxy's whole life, but never listening: nobody else can take the port while we refuse
        self._seat = socket.socket()
        self._seat.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._seat.bind(("127.0.0.1", 0))
        self.port = self._seat.getsockname()[1]
        self._thread.__enter__()
        self.accept()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._thread.__exit__(kind, error, trace)
        self._seat.close()

    @property
    def url(self) -> str:
        """The proxy's own address, with the target's base path."""
        return f"http://127.0.0.1:{self.port}{self._base}"

    # faults

    def fail(self, pattern: str, fault: Fault, *, times: int = 1, skip: int = 0) -> None:
        """Apply `fault` to the next `times` requests that match, after `skip` of them.

        `pattern` is a regular expression for all of "METHOD target", the target with its query. The proxy
        knows ResetBefore, ResetAfter, CutRequest, CutResponse, Stall and Hold.
        """
        self._rules.add(pattern, fault, times=times, skip=skip)

    def hold(self, pattern: str, *, handled: bool, skip: int = 0) -> Hold:
        """Stop the next matching request until released, before it is forwarded or once it is answered."""
        hold = Hold(handled=handled)
        self.fail(pattern, hold, skip=skip)
        return hold

    @property
    def unused_faults(self) -> int:
        return self._rules.unused

    def refuse(self) -> None:
        """Drop all connections, and refuse new ones until `accept`."""
        if self._server is not None:
            self._thread.loop.call_soon_threadsafe(self._server.close)
            self._thread.call(self._thread.drop_connections())
            self._server = None

    def accept(self) -> None:
        """Take connections (again)."""
        if self._server is None:
            self._server = self._thread.listen(self._connected, self.port)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        self.refuse()
        try:
            yield
        finally:
            self.accept()

    def count(self, pattern: str) -> int:
        """How many requests have arrived whose "METHOD target" matches as a whole, forwarded or not."""
        return sum(re.fullmatch(pattern, line) is not None for line in list(self.requests))

    # forwarding

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection(*self._target, limit=LIMIT)
        try:
            while (head := await read_head(reader)) is not None:
                if not await self._exchange(head, reader, writer, upstream_reader, upstream):
                    break
        finally:
            upstream.transport.abort()

    async def _exchange(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream_reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> bool:
        """Forward one request and its response; False when the connections are to end."""
        start, headers = parse_head(head)
        line = start.rpartition(" ")[0]
        self.requests.append(line)
        fault = self._rules.take(line)
        if isinstance(fault, Stall):
            await asyncio.sleep(fault.seconds)
        if isinstance(fault, Hold) and not fault.handled:
            await fault.block()
        if isinstance(fault, ResetBefore) or (isinstance(fault, Hold) and fault.dropped):
            reset(writer)
            return False
        try:
            body = _body(reader, headers, to_end=False)
            await _send(upstream, head, body, fault.after if isinstance(fault, CutRequest) else None)
            answer = await upstream_reader.readuntil(b"\r\n\r\n")  # from here on the server has dealt with it
        except Cut:
            reset(upstream)
            reset(writer)
            return False
        if isinstance(fault, Hold) and fault.handled:
            await fault.block()
        if isinstance(fault, ResetAfter) or (isinstance(fault, Hold) and fault.dropped):
            reset(writer)
            return False
        return await _relay(answer, upstream_reader, writer, fault)


async def _relay(
    answer: bytes, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault | None
) -> bool:
    """Pass on a response whose head has been read; False when it was the connection's last."""
    start, headers = parse_head(answer)
    status = int(start.split(" ")[1])
    if 100 <= status < 200:
        writer.write(answer)
        return await _relay(await upstream.readuntil(b"\r\n\r\n"), upstream, writer, fault)
    unframed = "content-length" not in headers and "transfer-encoding" not in headers
    to_end = unframed and status not in (204, 304)
    try:
        body = _body(upstream, headers, to_end=to_end)
        await _send(writer, answer, body, fault.after if isinstance(fault, CutResponse) else None)
    except Cut:
        return False
    return not to_end and headers.get("connection", "").lower() != "close"


async def _send(
    writer: asyncio.StreamWriter, head: bytes, body: AsyncGenerator[bytes], limit: int | None
) -> None:
    """Write a message; Cut once `limit` bytes are written."""
    left = limit
    writer.write(head if left is None else head[:left])
    left = None if left is None else left - len(head)
    async with contextlib.aclosing(body):
        async for chunk in body:
            if left is not None and left <= 0:
                break
            writer.write(chunk if left is None else chunk[:left])
            left = None if left is None else left - len(chunk)
            await writer.drain()
    await writer.drain()
    if left is not None and left <= 0:
        raise Cut


async def _body(
    reader: asyncio.StreamReader, headers: Mapping[str, str], *, to_end: bool
) -> AsyncGenerator[bytes]:
    """The body's bytes as they are on the wire."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
            if size == 0:
                return
    left = int(headers.get("content-length", "0"))
    while left > 0 or to_end:
        chunk = await reader.read(CHUNK if to_end else min(left, CHUNK))
        if not chunk:
            return
        left -= len(chunk)
        yield chunk
