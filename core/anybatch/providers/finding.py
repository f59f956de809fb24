"""A create whose answer was lost: the batch that it may have left is looked for before another is created."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import APIError, CreateOutcomeUnknownError, IncompleteListingError
from ..flow import Flow, sleep
from ..models import BatchStatus
from ..retry import outcome_unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..models import Batch, Page
    from .base import NewBatch, Provider, Sought

log = logging.getLogger(__name__)

ASK_AFTER = (1.0, 3.0, 9.0)
"""The pauses before asking again whether a create that got no answer has left a batch, seconds."""
# How far a provider's clock may be off when a listing is searched back to a point in time, seconds.
_CLOCK_SKEW = 900
# Pages of one listing that are read at most: 100,000 batches of 100 a page, or a listing without end.
_MOST_PAGES = 1000
_DEAD = frozenset({BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.CANCELLING})


def find(provider: Provider, sought: Sought, *, since: float) -> Flow[list[Batch]]:
    """All batches that match, of those created since then (unix seconds).

    Raises IncompleteListingError where none was found in a listing that could not be read to its end.
    """
    return (yield from _search(provider, lambda batch: provider.matches(batch, sought), since))


def created_since(provider: Provider, since: float) -> Flow[list[Batch]]:
    """All batches created since then, for a person to judge which one is theirs."""
    earliest = since - 60
    return (yield from _search(provider, lambda batch: (batch.created_at or 0) >= earliest, since))


def look(provider: Provider, sought: Sought, *, since: float) -> Flow[list[Batch]]:
    """`find`, repeated for a while as long as nothing is there: a create may be slow rather than lost."""
    found: list[Batch] = []
    for pause in ASK_AFTER:
        yield from sleep(pause)
        if found := (yield from find(provider, sought, since=since)):
            break
    return found


def create_once(provider: Provider, new: NewBatch, file_id: str | None, *, since: float) -> Flow[Batch]:
    """Create, and where the answer was lost look for the batch before creating it again.

    Raises CreateOutcomeUnknownError where the provider offers no way to look.
    """
    try:
        return (yield from provider.create(new, file_id))
    except APIError as error:
        if not outcome_unknown(error):
            raise
        lost = error
    sought = new.sought(file_id)
    if not provider.can_look(sought):
        raise CreateOutcomeUnknownError(
            f"the create got no answer ({lost.message}), and {provider.name} offers no way to ask whether "
            "the batch exists; look at the provider's list of batches before creating it again",
            provider=provider.name,
            status_code=lost.status_code,
            request_id=lost.request_id,
        ) from lost
    try:
        found = yield from look(provider, sought, since=since)
        batch = oldest(found) if found else (yield from provider.create(new, file_id))
    except APIError as error:
        raise CreateOutcomeUnknownError(
            f"a create got no answer ({lost.message}), and looking for its batch or creating it again "
            f"failed as well ({error.message}); it was not repeated",
            provider=provider.name,
            status_code=error.status_code,
        ) from error
    try:
        # The first create may have been slow rather than lost.
        doubles = found or (yield from find(provider, sought, since=since))
        return (yield from _keep_one(provider, [batch, *(one for one in doubles if one.id != batch.id)]))
    except APIError as error:
        log.warning("batch %s may have a double that could not be cancelled: %s", batch.id, error)
        return batch


def oldest(batches: Sequence[Batch]) -> Batch:
    """The oldest batch that is not dead: the same one for everybody who asks."""
    return min(batches, key=lambda batch: (batch.status in _DEAD, batch.created_at or 0, batch.id))


def _keep_one(provider: Provider, batches: Sequence[Batch]) -> Flow[Batch]:
    """Keep the oldest batch, and cancel its doubles."""
    kept = oldest(batches)
    for double in batches:
        if double.id != kept.id and not double.status.is_terminal:
            yield from provider.cancel(double.id)
    return kept


def _search(provider: Provider, is_meant: Callable[[Batch], bool], since: float) -> Flow[list[Batch]]:
    """The account's batches that are meant, of all that were created since then (unix seconds).

    That there is none is concluded from a listing alone that was read to its end, or back to batches older
    than that: a batch that goes unnoticed would be bought again. Else IncompleteListingError.
    """
    found: dict[str, Batch] = {}
    seen: set[str] = set()
    after: str | None = None
    for _ in range(_MOST_PAGES):
        page = yield from provider.list_page(after=after, limit=provider.list_limit or 100, options={})
        found |= {batch.id: batch for batch in page if is_meant(batch)}
        repeated = len(page) > 0 and seen.issuperset(batch.id for batch in page)
        if not page.has_more or _reaches(page, since - _CLOCK_SKEW):
            return list(found.values())
        if page.next_cursor is None or repeated:
            break
        seen.update(batch.id for batch in page)
        after = page.next_cursor
    if found:
        return list(found.values())
    raise IncompleteListingError(
        f"{provider.name}'s list of batches could not be read to its end ({len(seen)} were read): a batch "
        "that was not in it may exist all the same",
        provider=provider.name,
    )


def _reaches(page: Page, since: float) -> bool:
    """Whether the page is in the order of a listing, newest first, and reaches back to before that time."""
    times = [batch.created_at for batch in page if batch.created_at is not None]
    return bool(times) and times[-1] < since and times == sorted(times, reverse=True)
