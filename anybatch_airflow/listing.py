"""Reading the account's listing, and when it says that a batch is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anybatch import Batch
    from anybatch.models import Page

CLOCK_SKEW = 900.0  # seconds that our clock and the provider's may differ
MOST_PAGES = 1000  # of one reading: 100,000 batches at a hundred a page, or a listing without end


class Reading:
    """Follows one listing from page to page.

    Absence is concluded from a listing alone that was read to its end, or back to a time before which the
    batch cannot have been created: a batch that goes unnoticed would be bought again.
    """

    def __init__(self) -> None:
        self.is_cut = False  # there is more, or may be, and no way to read on
        self._pages = 0
        self._seen: set[str] = set()

    def next_after(self, page: Page) -> str | None:
        """What `after` the next page is to be asked for; None at the end, and where `is_cut`.

        An empty page is no end if it leads on.
        """
        if not page.has_more:
            return None
        self._pages += 1
        ids = {batch.id for batch in page}
        is_repeated = bool(ids) and ids <= self._seen
        if page.next_cursor is None or is_repeated or self._pages >= MOST_PAGES:
            self.is_cut = True
            return None
        self._seen |= ids
        return page.next_cursor


def reaches(page: Sequence[Batch], since: float) -> bool:
    """Whether a page goes back to before that time, in the order of a listing: the newest first.

    A single odd time among others does not end a listing.
    """
    times = [batch.created_at for batch in page if batch.created_at is not None]
    return bool(times) and times[-1] < since and times == sorted(times, reverse=True)
