"""The connection between a client and a fake server, which breaks when a test asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from ..models import BatchStatus


class Fake(Protocol):
    """An in-memory server of the provider's wire format: a function of requests that a test can control.

    Attributes:
        batch_ids: The ids of all batches that were ever created, oldest first.
    """

    def __call__(self, request: httpx.Request, /) -> httpx.Response: ...
    @property
    def batch_ids(self) -> Sequence[str]: ...
    def end(self, batch_id: str, status: BatchStatus) -> None:
        """Let a batch end.

        Args:
            batch_id: The id of the batch.
            status: COMPLETED with every row answered, EXPIRED or CANCELLED with the first half of them
                answered, or FAILED: refused as a whole, without results.
        """
        ...


class Wire:
    """Passes requests to the fake; the handler of an `httpx.MockTransport`, for both clients.

    Attributes:
        fake: The fake server.
        lost_creates: How many of the next creates make their batch but get no answer.
        fails_first: Whether every address answers its first GET with a 503.
        cuts_first: The first answer to a GET with more than so many bytes breaks off in the middle.
        calls: All requests so far.
    """

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.lost_creates = 0
        self.fails_first = False
        self.cuts_first: int | None = None
        self.calls: list[httpx.Request] = []
        self._asked: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        address = f"{request.method} {request.url}"
        is_first = request.method == "GET" and address not in self._asked
        self._asked.add(address)
        if is_first and self.fails_first:
            return httpx.Response(503, json={"error": {"message": "try again"}})
        before = len(self.fake.batch_ids)
        response = self.fake(request)
        if len(self.fake.batch_ids) > before and self.lost_creates > 0:
            self.lost_creates -= 1
            raise httpx.ReadError("the connection was reset")
        if is_first and self.cuts_first is not None and len(response.content) > self.cuts_first:
            self.cuts_first = None
            headers = {"content-length": str(len(response.content))}
            half = response.content[: len(response.content) // 2]
            return httpx.Response(response.status_code, headers=headers, stream=_Cut(half))
        return response


class _Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body during which the connection breaks."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent

    def __iter__(self) -> Iterator[bytes]:
        yield self._sent
        raise httpx.ReadError("the connection was reset")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk
