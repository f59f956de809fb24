"""A create whose answer was lost: the batch that it may have left is looked for before another is created."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import APIError, CreateOutcomeUnknownError, IncompleteListingError
from ..flow import Flow, sleep
from ..models import BatchStatus
from ..polling.listing import Reading
from ..retry import outcome_unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..models import Batch
    from .base import NewBatch, Provider, Sought

__all__ = ["ASK_AFTER", "create_once", "created_since", "find", "look", "oldest"]

log = logging.getLogger(__name__)

ASK_AFTER = (1.0, 3.0, 9.0)
"""The pauses before asking again whether a create that got no answer has left a batch, seconds."""
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
    reading, limit = Reading(since), provider.list_limit or 100
    while not reading.is_over:
        page = yield from provider.list_page(after=reading.after, limit=limit, options={})
        found |= {batch.id: batch for batch in reading.take(page) if is_meant(batch)}
    if found or reading.is_complete:
        return list(found.values())
    raise IncompleteListingError(
        f"{provider.name}'s list of batches could not be read to its end ({reading.pages} pages were): a "
        "batch that was not in it may exist all the same",
        provider=provider.name,
    )
