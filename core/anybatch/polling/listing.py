"""Read an account's listing page by page, and decide when it proves that a batch does not exist."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..models import Batch, Page

CLOCK_SKEW = 900.0
"""Seconds by which a provider's clock may differ from ours, when a listing is read back to some time."""
MOST_PAGES = 1000
"""The most pages of one reading (100,000 batches at 100 a page), since some servers' listings never end."""


class Reading:
    """The state of reading one listing.

    Reading ends with the listing, at a page that reaches back to before `since` (unix seconds), after
    `most_pages`, or if there is no way to read on. Only a complete reading proves that a batch does not
    exist: a batch that goes unnoticed would be paid for again.

    Attributes:
        after: The cursor of the next page; None for the first page.
        pages: The number of pages read.
        is_over: Whether reading has ended.
        is_complete: Whether it reached the end of the listing, or `since`.
    """

    def __init__(self, since: float = -math.inf, most_pages: int = MOST_PAGES) -> None:
        self.after: str | None = None
        self.pages = 0
        self.is_over = self.is_complete = False
        self._earliest, self._most = since - CLOCK_SKEW, most_pages
        self._seen: set[str] = set()

    def take(self, page: Page) -> Sequence[Batch]:
        """Record the next page, and return those of its batches that were on no page before.

        An empty page does not end the listing if it has a cursor.
        """
        self.pages += 1
        new = [batch for batch in page if batch.id not in self._seen]
        is_repeated = len(page) > 0 and not new
        self._seen |= {batch.id for batch in new}
        self.is_complete = not page.has_more or reaches(page, self._earliest)
        leads_on = page.next_cursor is not None and not is_repeated
        self.is_over = self.is_complete or not leads_on or self.pages >= self._most
        self.after = page.next_cursor
        return new

    @property
    def is_cut(self) -> bool:
        """Whether there are, or may be, more batches, but the provider offers no way to read on."""
        return self.is_over and not self.is_complete and self.pages < self._most


def reaches(page: Sequence[Batch], since: float) -> bool:
    """Whether a page, sorted newest first, reaches back to before a time (unix seconds).

    A page that is not sorted does not, so that a single wrong time does not end a listing.
    """
    times = [batch.created_at for batch in page if batch.created_at is not None]
    return bool(times) and times[-1] < since and times == sorted(times, reverse=True)


class Batches(Iterator["Batch"]):
    """An iterator over the batches of a listing, each once, newest first; it requests pages when needed.

    Attributes:
        reading: How far it has come, and at the end whether the listing was complete.
    """

    def __init__(self, ask: Callable[[str | None], Page], reading: Reading) -> None:
        self.reading, self._ask = reading, ask
        self._batches = (batch for page in self.pages() for batch in page)

    def pages(self) -> Iterator[Sequence[Batch]]:
        """Yield the same batches page by page.

        Yields:
            The new batches of each page.
        """
        while not self.reading.is_over:
            yield self.reading.take(self._ask(self.reading.after))

    def __next__(self) -> Batch:
        return next(self._batches)


class AsyncBatches(AsyncIterator["Batch"]):
    """The asynchronous `Batches`."""

    def __init__(self, ask: Callable[[str | None], Awaitable[Page]], reading: Reading) -> None:
        self.reading, self._ask = reading, ask
        self._batches = self._flat()

    async def pages(self) -> AsyncIterator[Sequence[Batch]]:
        """Yield the same batches page by page.

        Yields:
            The new batches of each page.
        """
        while not self.reading.is_over:
            yield self.reading.take(await self._ask(self.reading.after))

    async def _flat(self) -> AsyncIterator[Batch]:
        async for page in self.pages():
            for batch in page:
                yield batch

    async def __anext__(self) -> Batch:
        return await anext(self._batches)
