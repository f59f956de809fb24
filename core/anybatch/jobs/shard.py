"""Get one batch for one shard, exactly once, despite concurrent attempts and crashes at any point.

    PLANNED ── upload ──> UPLOADED ── claim ──> CREATING ── create ──> CREATED
                             ^                     │
                             └── lease over, or ───┘
                                 create unanswered

Only the attempt that has moved the ledger to CREATING (its claim) sends a create. A claim is never extended:
an attempt that is suspended for longer than its lease loses the claim, and may still send its create. Then
the ledger decides which batch stays, each attempt cancels its own batch if it is not that one, and every
later attempt looks for batches that dead attempts have left. So there may be two batches for a moment, but
never one that goes unnoticed.

Once the ledger says that the job is stopped, nothing is uploaded or created any more. A shard that has a
batch keeps it, and the next attempt that sees the batch cancels it; a shard without a batch stays without.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from ..errors import (
    AnyBatchError,
    BadRequestError,
    CreateOutcomeUnknownError,
    IncompleteListingError,
    LedgerConflictError,
    NotFoundError,
    classify,
)
from ..flow import Flow, do, sleep
from ..models import Batch, BatchStatus
from ..providers.base import NewBatch
from ..providers.finding import find, oldest
from ..providers.traits import Results
from .job import shard_metadata
from .ledger import Ledger, ShardRecord, Step
from .lookup import cancel_unwanted, shard_key, sought_batch, unrecorded_batches
from .lost import retrieve_or_lost, update_shard
from .rounds import is_covered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..providers.base import Provider
    from ..rows.planning import Plan, Shard
    from .job import Job

log = logging.getLogger(__name__)

_LEASE_POLL = 2.0
# Seconds until another attempt's write is visible in a store without compare-and-swap.
_WRITE_TIME = 1.0


class Transition(Enum):
    """What to do next about a shard."""

    UPLOAD = auto()
    CREATE = auto()
    ATTACH = auto()
    RELEASE = auto()  # the attempt that was creating the batch has died
    LEAVE = auto()  # another attempt is creating the batch right now


def next_transition(record: ShardRecord, attempt: str, now: float, lease: float) -> Transition:
    """Return the next step for a shard from its record in the ledger; `now` and `lease` are in seconds."""
    match record.step:
        case Step.PLANNED:
            return Transition.UPLOAD
        case Step.UPLOADED:
            return Transition.CREATE
        case Step.CREATED:
            return Transition.ATTACH
        case Step.CREATING:
            # A claim from further in the future comes from a wrong clock: it must not be waited for longer.
            claimed = abs(now - (record.creating_at or 0)) < lease
            return Transition.LEAVE if claimed and record.attempt != attempt else Transition.RELEASE


@dataclass
class Submission:
    """Gets the batch of one shard: read the ledger, take one step, write the ledger, repeat.

    `run` returns None if the job was stopped before the shard had a batch, or if its batch is lost and the
    job continues without it. Unless `patient`, it raises MaybeLostError at the first 404 instead of waiting
    to see whether the batch is really gone.
    """

    job: Job
    provider: Provider
    plan_of: Callable[[Ledger, int], Flow[Plan]]  # the plan of a round
    shard: ShardRecord  # as recorded when this began
    metadata: Mapping[str, str]
    attempt: str
    fingerprint: str
    resubmit_failed_batch: bool = True  # whether to replace a batch that failed as a whole
    patient: bool = True
    unanswered: str = ""  # the error of this attempt's own create, if that got no answer

    def run(self) -> Flow[Batch | None]:
        self._is_lost = False
        while not self._is_lost:
            ledger = yield from read_ledger(self.job, self.fingerprint)
            record = self._mine(ledger)
            if ledger.stopped_at is not None and record.step in (Step.PLANNED, Step.UPLOADED):
                if not (found := (yield from self._unrecorded(ledger, record))):
                    return None
                yield from self._record(ledger, found)
                continue
            if ledger.landed_at is not None and record.batch_id is None:
                raise LedgerConflictError(f"another attempt has landed job {ledger.job} in the meantime")
            batch: Batch | None = None
            match next_transition(record, self.attempt, time.time(), self.job.lease):
                case Transition.UPLOAD:
                    yield from self._upload(ledger, record)
                case Transition.CREATE:
                    batch = yield from self._create(ledger, record)
                case Transition.RELEASE:
                    yield from self._commit(ledger, _released(record))
                case Transition.LEAVE:
                    batch = yield from self._leave(ledger, record)
                case Transition.ATTACH:
                    batch = yield from self._attach(ledger, record)
            if batch is not None:
                return batch
        return None

    def _mine(self, ledger: Ledger) -> ShardRecord:
        record = ledger.latest(self.shard)
        if record is None:  # the ledger was removed and created again
            raise replaced_error(self.job)
        return record

    def _commit(self, ledger: Ledger, record: ShardRecord) -> Flow[Ledger | None]:
        return (yield from do(partial(self.job.folder.commit, ledger, ledger.with_shard(record))))

    def _planned(self, ledger: Ledger, record: ShardRecord) -> Flow[tuple[Plan, Shard]]:
        plan = yield from self.plan_of(ledger, record.round)
        shard = plan.shards[record.shard] if record.shard < len(plan.shards) else None
        if shard is None or (shard.first_row, shard.rows) != (record.first_row, record.rows):
            raise LedgerConflictError(
                f"another version of anybatch split job {self.job.identity} into other batches; give the job "
                "another folder"
            )
        return plan, shard

    def _upload(self, ledger: Ledger, record: ShardRecord) -> Flow[None]:
        plan, shard = yield from self._planned(ledger, record)
        new = self._new_batch(ledger, record, plan, shard, key=f"anybatch-{uuid.uuid4().hex}")
        file_id = yield from self.provider.upload(new)
        yield from self._commit(ledger, record.model_copy(update={"step": Step.UPLOADED, "file_id": file_id}))

    def _create(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        if found := (yield from self._unrecorded(ledger, record)):
            return (yield from self._record(ledger, found))
        plan, shard = yield from self._planned(ledger, record)
        if (claimed := (yield from self._claim(ledger, record))) is None:
            return None
        new = self._new_batch(ledger, record, plan, shard, key=shard_key(ledger, record))
        try:
            batch = yield from self.provider.create(new, record.file_id)
        except AnyBatchError as error:
            if not classify(error).may_exist:
                yield from self._commit(claimed, _refused(record, error))
                raise
            yield from self._commit(claimed, _released(self._mine(claimed)))
            if self.unanswered:
                raise CreateOutcomeUnknownError(
                    f"two creates got no answer ({self.unanswered}; {error.message}); run the job again: the "
                    "next attempt looks for their batches before it creates another"
                ) from error
            self.unanswered = error.message
            return None
        kept = yield from self._record(claimed, [batch])
        return kept if not record.tries else None  # after earlier creates, look for duplicates once more

    def _new_batch(
        self, ledger: Ledger, record: ShardRecord, plan: Plan, shard: Shard, *, key: str
    ) -> NewBatch:
        return NewBatch(
            content=plan.shard_content(shard),
            endpoint=self.job.endpoint,
            completion_window=self.job.completion_window,
            metadata=shard_metadata(self.metadata, record, len(ledger.of_round(record.round))),
            options=self.job.options,
            models=shard.models,
            key=key,
        )

    def _claim(self, ledger: Ledger, record: ShardRecord) -> Flow[Ledger | None]:
        """Become the only attempt that creates, or return None. From here on the batch may exist."""
        update = {
            "step": Step.CREATING,
            "attempt": self.attempt,
            "creating_at": time.time(),
            "tries": record.tries + 1,
        }
        claimed = yield from self._commit(ledger, record.model_copy(update=update))
        if claimed is None or self.job.folder.local is not None:
            return claimed
        # In a store where writes can overwrite each other, the last writer has the claim.
        yield from wait_for_writes()
        return claimed if (yield from do(self.job.folder.read)) == claimed else None

    def _leave(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        sought = sought_batch(ledger, record, self.metadata)
        found: list[Batch] = []
        if self.provider.can_look(sought):
            with suppress(IncompleteListingError):  # the other attempt may still record its batch
                found = yield from find(self.provider, sought, since=ledger.created_at)
        if found:
            return (yield from self._record(ledger, found))
        yield from sleep(min(_LEASE_POLL, self.job.lease))
        return None

    def _record(self, ledger: Ledger, found: Sequence[Batch]) -> Flow[Batch | None]:
        """Record a batch and cancel its duplicates; return None if another attempt has recorded one."""
        kept, record = oldest(found), self._mine(ledger)
        file_id, stays = record.file_id, kept.id
        created = {"step": Step.CREATED, "batch_id": kept.id, "status": kept.status}
        while True:
            done = yield from self._commit(ledger, self._mine(ledger).model_copy(update=created))
            if done is not None:
                break
            now = yield from do(self.job.folder.read)
            theirs = now.latest(self.shard) if now and now.fingerprint == self.fingerprint else None
            if now is None or theirs is None or theirs.batch_id or theirs.file_id != file_id:
                stays = (theirs and theirs.batch_id) or ""
                break
            ledger = now
        for batch in found:
            if batch.id != stays:
                yield from cancel_unwanted(self.job, self.provider, batch)
        if done is None:
            return None
        log.info(
            "job %s: batch %s for %d rows (shard %d of %d, round %d)", self.job.identity, kept.id,
            record.rows, record.shard + 1, len(ledger.of_round(record.round)), record.round,
        )  # fmt: skip
        if done.stopped_at is not None or done.landed_at is not None:  # during the create
            return (yield from cancel_unwanted(self.job, self.provider, kept))
        return kept

    def _unrecorded(self, ledger: Ledger, record: ShardRecord) -> Flow[list[Batch]]:
        why = f"its create got no answer ({self.unanswered})" if self.unanswered else ""
        return (yield from unrecorded_batches(self.job, self.provider, ledger, record, self.metadata, why))

    def _attach(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        batch = yield from retrieve_or_lost(self.job, self.provider, ledger, record, patient=self.patient)
        if batch is None:
            self._is_lost = True
            return None
        for duplicate in (yield from self._unrecorded(ledger, record)):
            yield from cancel_unwanted(self.job, self.provider, duplicate)
        if ledger.stopped_at is not None:
            return (yield from self._stopped(ledger, record, batch))
        is_ours = record.attempt == self.attempt
        if batch.status is not BatchStatus.FAILED or is_ours or not self.resubmit_failed_batch:
            return batch
        if self.provider.results(batch) is not Results.NONE or not is_covered(self.job, ledger):
            return batch
        # The provider refused it as a whole, so it cost nothing; the reason may be gone (quota, full queue).
        log.warning(
            "job %s: batch %s had failed as a whole; submitting its rows again", self.job.identity, batch.id
        )
        yield from self._commit(ledger, record.without_batch())
        return None

    def _stopped(self, ledger: Ledger, record: ShardRecord, batch: Batch) -> Flow[Batch]:
        """Cancel the batch of a stopped job, and record since when it is being cancelled."""
        batch = yield from cancel_unwanted(self.job, self.provider, batch)
        if batch.status is BatchStatus.CANCELLING and record.cancelling_at is None:
            yield from update_shard(self.job, ledger, record, cancelling_at=time.time())
        return batch


def wait_for_writes() -> Flow[None]:
    """Wait until another attempt's write is visible, in a store without compare-and-swap."""
    yield from sleep(_WRITE_TIME)


def read_ledger(job: Job, fingerprint: str) -> Flow[Ledger]:
    """Read the ledger; raise LedgerConflictError if it no longer belongs to this submission."""
    ledger = yield from do(job.folder.read)
    if ledger is None:
        raise LedgerConflictError(f"{job.folder.path / 'job.json'} was removed while the job was running")
    if ledger.fingerprint != fingerprint:
        raise replaced_error(job)
    return ledger


def replaced_error(job: Job) -> LedgerConflictError:
    return LedgerConflictError(
        f"another attempt has submitted job {job.identity} with other input in the meantime"
    )


def _released(record: ShardRecord) -> ShardRecord:
    return record.model_copy(update={"step": Step.UPLOADED})


def _refused(record: ShardRecord, error: AnyBatchError) -> ShardRecord:
    """Return the record of a shard whose create was refused: no batch exists, so it may be tried again."""
    if record.file_id is None or not isinstance(error, BadRequestError | NotFoundError):
        return record
    # The uploaded file may be the reason (gone or expired): upload it again.
    return record.model_copy(update={"step": Step.PLANNED, "file_id": None, "tries": 0})
