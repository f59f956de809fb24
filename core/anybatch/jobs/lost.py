"""Lost batches: a batch that the provider no longer knows, or never finishes cancelling.

One lost batch must not keep the paid rows of the others from landing; `Job.on_lost` decides what happens. A
batch is lost if it answers 404 for 15 minutes while the same account still finds another batch or file of the
job. If it finds none of them, the key probably belongs to another account, which is an error whatever
`on_lost` says. The ledger records only since when a batch has been gone: each attempt asks the provider
again, so a batch that comes back is used, and applies its own `on_lost`.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from ..errors import APIError, BatchLostError, NotFoundError
from ..flow import Flow, do, sleep
from ..models import BatchStatus, RowError
from ..rows.downloads import GONE_AFTER

if TYPE_CHECKING:
    from ..models import Batch
    from ..providers.base import Provider
    from .job import Job
    from .ledger import Ledger, ShardRecord

log = logging.getLogger(__name__)

# Seconds that a batch may be cancelling before it counts as lost; OpenAI takes up to ten minutes.
STUCK_AFTER = 3600.0
LOOK_EVERY = 30.0
_ASK_MOST = 5  # how many of the job's other batches are tried

RESULTS_LOST = "results_lost"
"""The error code of rows whose results the provider has lost."""

WAYS_OUT = (
    "on_lost='land' lands the job's other rows and reports these as `missing`, on_lost='resubmit' pays for "
    "these rows again, and Job.restart submits the input once more"
)


class MaybeLostError(NotFoundError):
    """A batch answers 404, but not yet for long enough to count as lost; the ledger says since when."""


def retrieve_or_lost(
    job: Job, provider: Provider, ledger: Ledger, record: ShardRecord, *, patient: bool = True
) -> Flow[Batch | None]:
    """Retrieve a shard's batch; return None if it is lost and the job may continue without it.

    Raises BatchLostError if it may not, and NotFoundError if the account finds nothing else of the job
    either. While a batch answers 404, this asks again until it is back or lost; unless `patient`, it raises
    MaybeLostError instead.
    """
    assert record.batch_id is not None
    try:
        batch: Batch = yield from provider.retrieve(record.batch_id)
    except NotFoundError as error:
        return (yield from _gone(job, provider, ledger, record, error, patient))
    if record.gone_at is not None:  # otherwise the next 404, however much later, would count as lost at once
        yield from update_shard(job, ledger, record, gone_at=None)
        record = record.model_copy(update={"gone_at": None})
    if batch.status is not BatchStatus.CANCELLING:
        return batch
    if record.cancelling_at is None:
        yield from update_shard(job, ledger, record, cancelling_at=time.time())
        return batch
    if time.time() - record.cancelling_at < STUCK_AFTER:
        return batch
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.cancelling_at))
    _accept_without(job, record, f"batch {batch.id} has been cancelling since {since}")
    return None


def _gone(
    job: Job, provider: Provider, ledger: Ledger, record: ShardRecord, error: NotFoundError, patient: bool
) -> Flow[Batch | None]:
    if not (yield from _account_answers(provider, ledger, record)):
        raise NotFoundError(
            f"{error.message.rstrip('.')}, and nothing else of the job was found either: the key may belong "
            "to another account or project. If it does not, the batch is lost, and Job.restart submits the "
            "input once more",
            code=error.code,
            batch_id=record.batch_id,
            status_code=error.status_code,
            request_id=error.request_id,
        ) from error
    now, since = time.time(), record.gone_at
    if since is None:
        since = now
        yield from update_shard(job, ledger, record, gone_at=since)
    # The batch may have been back in between, seen only by a poller, which writes no ledger: look once more.
    until = max(since + GONE_AFTER, now + LOOK_EVERY)
    while (left := until - time.time()) > 0:
        if not patient:
            raise MaybeLostError(
                error.message, batch_id=record.batch_id, status_code=error.status_code
            ) from error
        yield from sleep(min(LOOK_EVERY, left))
        try:
            batch: Batch = yield from provider.retrieve(record.batch_id or "")
        except NotFoundError as again:
            error = again
        else:
            yield from update_shard(job, ledger, record, gone_at=None)
            return batch
    _accept_without(job, record, f"batch {record.batch_id} is gone ({error.message})", error)
    return None


def _accept_without(job: Job, record: ShardRecord, what: str, cause: APIError | None = None) -> None:
    if job.on_lost == "fail":
        raise lost_error(job, record, what, cause) from cause
    log.warning(
        "job %s: %s; on_lost=%r, so the job continues without the results of its %d rows",
        job.identity, what, job.on_lost, record.rows,
    )  # fmt: skip


def lost_error(job: Job, record: ShardRecord, what: str, cause: APIError | None = None) -> BatchLostError:
    """Build the error for lost results, if `Job.on_lost` is "fail"."""
    return BatchLostError(
        f"job {job.identity}: {what}, and with it the results of {record.rows} rows. {WAYS_OUT}",
        batch_id=record.batch_id,
        status_code=cause.status_code if cause else None,
        request_id=cause.request_id if cause else None,
    )


def lost_row(reason: object) -> RowError:
    """Return the error of rows whose results are lost."""
    return RowError(RESULTS_LOST, f"The provider has lost the result: {reason}")


def _account_answers(provider: Provider, ledger: Ledger, record: ShardRecord) -> Flow[bool]:
    """Whether the account finds another batch of this job, or the input file of this one.

    Listing the account's batches would prove nothing: another account has batches, too.
    """
    others = [one.batch_id for one in ledger.shards if one.batch_id and one.batch_id != record.batch_id]
    for batch_id in others[-_ASK_MOST:]:
        try:
            yield from provider.retrieve(batch_id)
        except NotFoundError:
            continue
        return True
    return record.file_id is not None and (yield from provider.has_file(record.file_id))


def update_shard(job: Job, ledger: Ledger, record: ShardRecord, **update: object) -> Flow[None]:
    """Record facts about a shard's batch in the ledger, unless the shard has another batch by now."""
    while True:
        updated = record.model_copy(update=update)
        if (yield from do(partial(job.folder.commit, ledger, ledger.with_shard(updated)))) is not None:
            return
        now = yield from do(job.folder.read)
        theirs = now.latest(record) if now is not None and now.fingerprint == ledger.fingerprint else None
        if now is None or theirs is None or theirs.batch_id != record.batch_id:
            return
        ledger, record = now, theirs
