"""Creates without an answer: look for the batch that they may have left before creating another."""

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
"""The pauses before each look for the batch of a create that got no answer, in seconds."""
_DEAD = frozenset({BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.CANCELLING})


def find(provider: Provider, sought: Sought, *, since: float) -> Flow[list[Batch]]:
    """Find all matching batches among those created since `since` (unix seconds).

    Raises IncompleteListingError if there is none in a listing that could not be read to its end.
    """
    return (yield from _search(provider, lambda batch: provider.matches(batch, sought), since))


def created_since(provider: Provider, since: float) -> Flow[list[Batch]]:
    """Return all batches created since `since` (unix seconds), for a person to judge which one is theirs."""
    earliest = since - 60  # the provider's clock may be behind ours
    return (yield from _search(provider, lambda batch: (batch.created_at or 0) >= earliest, since))


def look(provider: Provider, sought: Sought, *, since: float) -> Flow[list[Batch]]:
    """Repeat `find` for some seconds until it finds a batch: a create may be slow rather than lost."""
    found: list[Batch] = []
    for pause in ASK_AFTER:
        yield from sleep(pause)
        if found := (yield from find(provider, sought, since=since)):
            break
    return found


def create_once(provider: Provider, new: NewBatch, file_id: str | None, *, since: float) -> Flow[Batch]:
    """Create a batch; if that gets no answer, look for the batch before creating it again.

    Raises CreateOutcomeUnknownError if the provider offers no way to look.
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
            f"the create got no answer ({lost.message}), and {provider.name} offers no way to find out "
            "whether the batch exists; check the provider's list of batches before creating it again",
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
            f"failed as well ({error.message}); check the provider's list of batches before creating another",
            provider=provider.name,
            status_code=error.status_code,
        ) from error
    try:
        # The first create may have been slow rather than lost: look for its batch once more.
        duplicates = found or (yield from find(provider, sought, since=since))
        return (yield from _keep_one(provider, [batch, *(one for one in duplicates if one.id != batch.id)]))
    except APIError as error:
        log.warning("batch %s may have a duplicate that could not be cancelled: %s", batch.id, error)
        return batch


def oldest(batches: Sequence[Batch]) -> Batch:
    """Return the oldest batch that is alive, so that all concurrent attempts keep the same one."""
    return min(batches, key=lambda batch: (batch.status in _DEAD, batch.created_at or 0, batch.id))


def _keep_one(provider: Provider, batches: Sequence[Batch]) -> Flow[Batch]:
    """Keep the oldest batch, and cancel its duplicates."""
    kept = oldest(batches)
    for duplicate in batches:
        if duplicate.id != kept.id and not duplicate.status.is_terminal:
            yield from provider.cancel(duplicate.id)
    return kept


def _search(provider: Provider, is_match: Callable[[Batch], bool], since: float) -> Flow[list[Batch]]:
    """Return the matching batches among all that the account has created since `since` (unix seconds).

    Only a listing that was read to its end, or back to older batches, proves that there is none: otherwise
    this raises IncompleteListingError, since a batch that goes unnoticed would be paid for again.
    """
    found: dict[str, Batch] = {}
    reading, limit = Reading(since), provider.list_limit or 100
    while not reading.is_over:
        page = yield from provider.list_page(after=reading.after, limit=limit, options={})
        found |= {batch.id: batch for batch in reading.take(page) if is_match(batch)}
    if found or reading.is_complete:
        return list(found.values())
    raise IncompleteListingError(
        f"{provider.name}'s list of batches could not be read to its end (only {reading.pages} pages): a "
        "batch may exist although it was not in those",
        provider=provider.name,
    )
