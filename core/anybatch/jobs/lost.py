"""A batch of a job that the provider has lost, or never finishes cancelling: what `Job.on_lost` decides.

One dead batch must not lock the others' paid rows. Gone is what answers 404 for a quarter of an hour while
the same account answers for something else of the job: where nothing answers, the key is another account's,
and that is an error whatever the job says. The ledger notes since when, and nothing more: each attempt asks
again, so that a batch which comes back is taken, and decides by the `on_lost` that it was given.
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

# How long a batch may be in cancelling before it counts as lost, seconds; real ones take ten minutes.
STUCK_AFTER = 3600.0
LOOK_EVERY = 30.0
_ASK_MOST = 5  # other batches that are asked for

RESULTS_LOST = "results_lost"
"""The error code of rows whose answers the provider has lost."""

WAYS_OUT = (
    "on_lost='land' lands the job's other rows and leaves these `missing`, on_lost='resubmit' buys these "
    "rows again, Job.restart submits the input once more"
)


class AwayError(NotFoundError):
    """A batch answers 404, but not for long enough to be gone; the ledger says since when."""


def present(
    job: Job, provider: Provider, ledger: Ledger, record: ShardRecord, *, patient: bool = True
) -> Flow[Batch | None]:
    """The batch on record as it stands; None where it is lost, and the job may go on without it.

    Raises BatchLostError where it may not, and NotFoundError where nothing of this account answers. A batch
    that answers 404 is asked for until it is back or gone, or, if not `patient`, raises AwayError at once.
    """
    assert record.batch_id is not None
    try:
        batch: Batch = yield from provider.retrieve(record.batch_id)
    except NotFoundError as error:
        return (yield from _gone(job, provider, ledger, record, error, patient))
    if batch.status is not BatchStatus.CANCELLING:
        return batch
    if record.cancelling_at is None:
        yield from note(job, ledger, record, cancelling_at=time.time())
        return batch
    if time.time() - record.cancelling_at < STUCK_AFTER:
        return batch
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.cancelling_at))
    _go_without(job, record, f"batch {batch.id} has been cancelling since {since}")
    return None


def _gone(
    job: Job, provider: Provider, ledger: Ledger, record: ShardRecord, error: NotFoundError, patient: bool
) -> Flow[Batch | None]:
    since = record.gone_at
    if since is None:
        since = time.time()
        yield from note(job, ledger, record, gone_at=since)
    if not (yield from _account_answers(provider, ledger, record)):
        raise NotFoundError(
            f"{error.message.rstrip('.')}, and nothing else of the job answers: the key may be that of "
            "another account or project. If the batch is gone for good, Job.restart submits the input once "
            "more",
            code=error.code,
            batch_id=record.batch_id,
            status_code=error.status_code,
            request_id=error.request_id,
        ) from error
    while (left := since + GONE_AFTER - time.time()) > 0:
        if not patient:
            raise AwayError(error.message, batch_id=record.batch_id, status_code=error.status_code) from error
        yield from sleep(min(LOOK_EVERY, left))
        try:
            batch: Batch = yield from provider.retrieve(record.batch_id or "")
        except NotFoundError as again:
            error = again
        else:
            return batch
    _go_without(job, record, f"batch {record.batch_id} is gone ({error.message})", error)
    return None


def _go_without(job: Job, record: ShardRecord, what: str, cause: APIError | None = None) -> None:
    if job.on_lost == "fail":
        raise lost_error(job, record, what, cause) from cause
    log.warning(
        "job %s: %s; on_lost=%r, so the job goes on without the results of its %d rows",
        job.identity, what, job.on_lost, record.rows,
    )  # fmt: skip


def lost_error(job: Job, record: ShardRecord, what: str, cause: APIError | None = None) -> BatchLostError:
    """What to tell where results are lost, and the job does not accept that."""
    return BatchLostError(
        f"job {job.identity}: {what}, and with it the results of {record.rows} rows. {WAYS_OUT}",
        batch_id=record.batch_id,
        status_code=cause.status_code if cause else None,
        request_id=cause.request_id if cause else None,
    )


def lost_row(reason: object) -> RowError:
    """What the rows say whose results are lost."""
    return RowError(RESULTS_LOST, f"The provider has lost the answer: {reason}")


def _account_answers(provider: Provider, ledger: Ledger, record: ShardRecord) -> Flow[bool]:
    """Whether the provider answers for another batch of this job, or for the file that this one was made of.

    That the account lists any batches proves nothing: another account has some, too.
    """
    others = [one.batch_id for one in ledger.shards if one.batch_id and one.batch_id != record.batch_id]
    for batch_id in others[-_ASK_MOST:]:
        try:
            yield from provider.retrieve(batch_id)
        except NotFoundError:
            continue
        return True
    return record.file_id is not None and (yield from provider.has_file(record.file_id))


def note(job: Job, ledger: Ledger, record: ShardRecord, **update: object) -> Flow[None]:
    """Write down something about a shard's batch, unless it has another one by now."""
    while True:
        noted = record.model_copy(update=update)
        if (yield from do(partial(job.folder.commit, ledger, ledger.with_shard(noted)))) is not None:
            return
        now = yield from do(job.folder.read)
        theirs = now.latest(record) if now is not None and now.fingerprint == ledger.fingerprint else None
        if now is None or theirs is None or theirs.batch_id != record.batch_id:
            return
        ledger, record = now, theirs
