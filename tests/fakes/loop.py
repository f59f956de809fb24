"""An event loop in a thread: what the fake server and the fault proxy run on, so that tests need no loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

LIMIT = 1 << 20  # bytes a stream reader buffers: also the longest request head
PATIENCE = 10.0  # seconds any call into the loop may take


def reset(writer: asyncio.StreamWriter) -> None:
    """Drop a connection with RST, so that the peer sees an error instead of a polite end of stream."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    writer.transport.abort()


class LoopThread:
    """Runs loopback TCP servers in a thread of its own; a context manager that leaves nothing open."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.call(self.drop_connections())
            self.call(self.loop.shutdown_asyncgens())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                raise RuntimeError(f"{self._name} did not stop within {PATIENCE:g} s")
            self.loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return what it returns; for threads other than the loop's."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def listen(self, handler: Handler, port: int = 0) -> asyncio.Server:
        """Serve `handler` on 127.0.0.1; port 0 takes a free one."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await handler(reader, writer)
                writer.close()
                await writer.wait_closed()  # what was written still goes out
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the peer left, or the server is closing
            finally:
                self._connections.discard(task)
                writer.transport.abort()

        return self.call(asyncio.start_server(connected, "127.0.0.1", port, limit=LIMIT, backlog=1024))

    async def drop_connections(self) -> None:
        """End every open connection, and wait until their sockets are closed."""
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close their sockets one loop turn after abort()
        await asyncio.sleep(0)
