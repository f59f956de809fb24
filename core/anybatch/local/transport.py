"""An httpx transport for the application: it answers requests to `http://local/v1/…` in process."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import httpx

from .app import App
from .protocol import Request, Response
from .store import database_path

__all__ = ["BASE_URL", "LocalTransport", "blocking", "database_path"]

BASE_URL = "http://local/v1"
CHUNK_TIMEOUT = 300.0  # seconds


class LocalTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers an httpx client, sync or async, from a database.

    Async requests do their work in a thread, so that SQLite and large files never block the event loop.

    Args:
        path: The database file; it is created if it is missing.
        now: The clock, in unix seconds.

    Raises:
        StoreError: The database cannot be opened; it is an OSError.
    """

    def __init__(self, path: Path | str, *, now: Callable[[], float] = time.time) -> None:
        self._app = App(path, now=now)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = cast(httpx.SyncByteStream, request.stream)
        response = self._app.handle(_request(request, iter(body)))
        return _response(request, response, _SyncBody)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if isinstance(request.stream, httpx.SyncByteStream):  # such as a multipart upload: read in the thread
            asked = _request(request, iter(request.stream))
            response = await asyncio.to_thread(self._app.handle, asked)
        else:
            loop = asyncio.get_running_loop()
            asked = _request(request, blocking(aiter(request.stream), loop))
            thread = ThreadPoolExecutor(1)  # with asyncio's own threads, this body could wait for itself
            try:
                response = await loop.run_in_executor(thread, self._app.handle, asked)
            finally:
                thread.shutdown(wait=False)  # waiting would block the loop that the thread reads from
        return _response(request, response, _AsyncBody)

    def close(self) -> None:
        self._app.close()

    async def aclose(self) -> None:
        await asyncio.to_thread(self._app.close)


def blocking(chunks: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop) -> Iterator[bytes]:
    """Read an async iterator of `loop` from another thread, chunk by chunk."""
    while True:
        chunk = asyncio.run_coroutine_threadsafe(_next(chunks), loop).result(CHUNK_TIMEOUT)
        if chunk is None:
            return
        yield chunk


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def _request(request: httpx.Request, body: Iterator[bytes]) -> Request:
    headers = {name.lower(): value for name, value in request.headers.items()}
    return Request(request.method, request.url.path, request.url.query.decode(), headers, body)


def _response(
    request: httpx.Request, response: Response, stream: "type[_SyncBody] | type[_AsyncBody]"
) -> httpx.Response:
    body = response.body
    if isinstance(body, bytes):
        return httpx.Response(response.status, headers=response.headers, content=body, request=request)
    return httpx.Response(response.status, headers=response.headers, stream=stream(body), request=request)


class _SyncBody(httpx.SyncByteStream):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        with contextlib.suppress(AttributeError):  # only generators hold a file open
            self._chunks.close()  # type: ignore[attr-defined]


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await asyncio.to_thread(next, self._chunks, None)) is not None:
            yield chunk

    async def aclose(self) -> None:
        await asyncio.to_thread(_SyncBody(self._chunks).close)
