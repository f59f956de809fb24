"""Find batches that creates of a shard have left unrecorded: cancel them, or describe them to a person."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import (
    APIError,
    IncompleteListingError,
    OrphanError,
)
from ..flow import Flow
from ..models import Batch, BatchStatus
from ..providers.base import Sought
from ..providers.finding import created_since, find, look
from ..providers.traits import Cancel
from .job import shard_metadata
from .ledger import Ledger, ShardRecord

if TYPE_CHECKING:
    from ..providers.base import Provider
    from .job import Job

log = logging.getLogger(__name__)


def cancel_unwanted(job: Job, provider: Provider, batch: Batch) -> Flow[Batch]:
    """Cancel a batch that the job does not want (any more), if it still runs."""
    if batch.status.is_terminal or batch.status is BatchStatus.CANCELLING:
        return batch
    if provider.traits.cancel is Cancel.NONE:
        log.warning(
            "job %s: batch %s is no longer wanted, but runs on: %s cannot cancel batches",
            job.identity, batch.id, provider.name,
        )  # fmt: skip
        return batch
    log.warning("job %s: cancelling batch %s, which is no longer wanted", job.identity, batch.id)
    return (yield from provider.cancel(batch.id))


def shard_key(ledger: Ledger, record: ShardRecord) -> str:
    """Return the idempotency key of a shard's create.

    The key is the same whenever the create is repeated from the same upload. It differs for another job with
    the same input, for the batch that replaces a refused one, and after other input was submitted in between:
    so "already exists" always means that this very create has made the batch.
    """
    facts = [ledger.job, ledger.fingerprint, ledger.submission, record.round, record.shard, record.dead,
             record.file_id]  # fmt: skip
    return "anybatch-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def sought_batch(ledger: Ledger, record: ShardRecord, metadata: Mapping[str, str]) -> Sought:
    """Return the facts by which a shard's batch is recognised in a listing."""
    marks = shard_metadata(metadata, record, len(ledger.of_round(record.round)))
    return Sought(record.file_id, marks, shard_key(ledger, record), ledger.endpoint, record.rows)


def unrecorded_batches(
    job: Job,
    provider: Provider,
    ledger: Ledger,
    record: ShardRecord,
    metadata: Mapping[str, str],
    why: str = "",
) -> Flow[list[Batch]]:
    """Find the batches that creates of this shard may have left beside the recorded one.

    Raises OrphanError if there may be one, the provider offers no way to look for it, and `Job.on_orphan` is
    "fail".
    """
    if record.tries <= (record.batch_id is not None):
        return []
    sought = sought_batch(ledger, record, metadata)
    if provider.can_look(sought):
        # A create that has begun just now may be slow rather than lost: look several times.
        recent = bool(why) or abs(time.time() - (record.creating_at or 0)) < job.lease
        search = look if recent and record.batch_id is None else find
        try:
            others = yield from search(provider, sought, since=ledger.created_at)
        except IncompleteListingError as error:
            if record.batch_id is None and job.on_orphan == "fail":
                error.message += (
                    f", and a create of {record.rows} rows of job {job.identity} may have left one. A later "
                    "attempt looks again; on_orphan='resubmit' assumes that there is none"
                )
                raise
            others = []
        return [batch for batch in others if batch.id != record.batch_id]
    if record.batch_id is None and not provider.traits.idempotent_create and job.on_orphan == "fail":
        raise (yield from _orphan(job, provider, ledger, record, why))
    return []


def _orphan(job: Job, provider: Provider, ledger: Ledger, record: ShardRecord, why: str) -> Flow[OrphanError]:
    """Build the error that tells a person where to look, and for what."""
    name, began = provider.name, record.creating_at or ledger.created_at
    try:
        candidates = yield from created_since(provider, began)
    except APIError as error:  # the provider may be down, which may be why the create got no answer
        candidates, unread = [], f"its list of batches could not be read: {error.message}. "
    else:
        unread = "none is listed now. "  # the sentence that is shown without candidates
    seen = ", ".join(
        f"{batch.id} ({batch.request_counts.total if batch.request_counts else '?'} requests)"
        for batch in candidates
        if batch.id not in ledger.batch_ids
    )
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began))
    return OrphanError(
        f"a batch of {record.rows} requests may be running at {name} that job {job.identity} does not know: "
        f"{why or 'an attempt ended while it was creating the batch'}. {name} offers no way to look a batch "
        f"up by what it was made from. Check its batches created since {since} "
        f"(anybatch.list_batches({name!r})); "
        + (f"there are: {seen}. " if seen else unread)
        + "If one of them is this job's, cancel it. Then run again with on_orphan='resubmit'.",
        provider=name,
    )
