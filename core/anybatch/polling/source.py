"""What polling needs of a client, and of the provider behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ..models import Batch, Page


class Polling(Protocol):
    """What a provider says about polling: first and largest interval in seconds, entries on a list page."""

    @property
    def poll_seconds(self) -> tuple[float, float]: ...
    @property
    def list_limit(self) -> int | None: ...


class Source(Protocol):
    """What the watcher needs of a client."""

    @property
    def provider(self) -> Polling: ...
    async def retrieve(self, batch_id: str) -> Batch: ...
    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page: ...


MakeClient = Callable[[], AbstractAsyncContextManager[Source]]
