"""Reading an account's listing from page to page, and when it says that a batch is not there."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..models import Batch, Page

CLOCK_SKEW = 900.0
"""Seconds that our clock and a provider's may differ where a listing is read back to a point in time."""
MOST_PAGES = 1000
"""Pages of one reading: 100,000 batches at a hundred a page, or a listing without end."""


class Reading:
    """Follows one listing; `after` is what the next page is to be asked for, until it `is_over`.

    It is over at the end of the listing, at a page that reaches back to before `since` (unix seconds), after
    `most_pages`, and where there is no way to read on. Absence is concluded from a reading alone that
    `is_complete`: a batch that goes unnoticed would be bought again.
    """

    def __init__(self, since: float = -math.inf, most_pages: int = MOST_PAGES) -> None:
        self.after: str | None = None
        self.pages = 0
        self.is_over = self.is_complete = False
        self._earliest, self._most = since - CLOCK_SKEW, most_pages
        self._seen: set[str] = set()

    def take(self, page: Page) -> Sequence[Batch]:
        """Take up the page that was asked for; those of its batches that no page before had.

        An empty page is no end if it leads on.
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
        """Whether there is more, or may be, and the provider has shown no way to read on."""
        return self.is_over and not self.is_complete and self.pages < self._most


def reaches(page: Sequence[Batch], since: float) -> bool:
    """Whether a page goes back to before that time, in the order of a listing: the newest first.

    A single odd time among others does not end a listing.
    """
    times = [batch.created_at for batch in page if batch.created_at is not None]
    return bool(times) and times[-1] < since and times == sorted(times, reverse=True)


class Batches(Iterator["Batch"]):
    """The batches of a listing, each once, the newest first; a page is asked for when that before is used up.

    `reading` says how far it has come, and in the end whether that was all.
    """

    def __init__(self, ask: Callable[[str | None], Page], reading: Reading) -> None:
        self.reading, self._ask = reading, ask
        self._batches = (batch for page in self.pages() for batch in page)

    def pages(self) -> Iterator[Sequence[Batch]]:
        """The same, a page at a time."""
        while not self.reading.is_over:
            yield self.reading.take(self._ask(self.reading.after))

    def __next__(self) -> Batch:
        return next(self._batches)


class AsyncBatches(AsyncIterator["Batch"]):
    """`Batches`, awaited."""

    def __init__(self, ask: Callable[[str | None], Awaitable[Page]], reading: Reading) -> None:
        self.reading, self._ask = reading, ask
        self._batches = self._flat()

    async def pages(self) -> AsyncIterator[Sequence[Batch]]:
        """The same, a page at a time."""
        while not self.reading.is_over:
            yield self.reading.take(await self._ask(self.reading.after))

    async def _flat(self) -> AsyncIterator[Batch]:
        async for page in self.pages():
            for batch in page:
                yield batch

    async def __anext__(self) -> Batch:
        return await anext(self._batches)
