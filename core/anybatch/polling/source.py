"""The interface of clients and providers that polling needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ..models import Batch, Page


class Polling(Protocol):
    """The facts about a provider that polling needs.

    Attributes:
        poll_seconds: The seconds between two polls of a young batch, and of an old one.
        list_limit: The most entries in a page of a listing.
    """

    @property
    def poll_seconds(self) -> tuple[float, float]: ...
    @property
    def list_limit(self) -> int | None: ...


class Source(Protocol):
    """The methods of a client that the watcher needs."""

    @property
    def provider(self) -> Polling: ...
    async def retrieve(self, batch_id: str) -> Batch: ...
    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page: ...


MakeClient = Callable[[], AbstractAsyncContextManager[Source]]
