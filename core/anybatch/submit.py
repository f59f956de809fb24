"""Submission: every shard of a job's input gets its batch, once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
    AnyBatchError,
    APIError,
    ConfigurationError,
    CreateOutcomeUnknownError,
    InputChangedError,
    LedgerConflictError,
    OrphanError,
)
from .flow import Flow, do, sleep
from .job import fingerprint, job_metadata, shard_metadata
from .ledger import JobFolder, Ledger, ShardRecord, Step, local_path, open_path
from .lines import Plan, Shard, make_plan
from .models import Batch, BatchStatus
from .providers.base import NewBatch
from .retry import outcome_unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .job import Job
    from .providers.base import Provider

log = logging.getLogger(__name__)

_LEASE_POLL = 2.0


def submit(job: Job, provider: Provider) -> Flow[list[Batch]]:
    """See that every shard of the input has its batch, and return them as they stand.

    None where the results have landed already: there is nothing left to wait for.

    Raises InputError before anything is sent; OrphanError, InputChangedError and LedgerConflictError where
    it cannot go on safely.
    """
    metadata = job_metadata(job, provider)
    provider.check(job.endpoint, metadata, job.options)
    attempt = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        plan = yield from do(partial(prepare, job, provider, Path(scratch)))
        ledger = yield from open_ledger(job, provider, plan, Path(scratch))
        batches: list[Batch] = []
        if ledger.landed_at is not None and (yield from do(job.report)) is not None:
            return batches
        for number in range(len(ledger.shards)):
            submission = _Submission(job, provider, plan, number, metadata, attempt)
            batches.append((yield from submission.run()))
    return batches


def prepare(job: Job, provider: Provider, scratch: Path) -> Plan | None:
    """Validate and split the input. None where the input is gone but the job was submitted before."""
    source = job.input
    if not isinstance(source, str | os.PathLike):
        source = _spool_requests(source, scratch / "requests.jsonl")
    path = open_path(source)
    local = local_path(path) if provider.verbatim else None
    content = local or scratch / "content.jsonl"
    try:
        with path.open("rb") as file, (scratch / "ids.jsonl").open("wb") as ids:
            spool = None if local else content.open("wb")
            try:
                return make_plan(
                    file,
                    str(source),
                    provider,
                    job.endpoint,
                    content=content,
                    spool=spool,
                    ids=ids,
                    model=job.model,
                    drop_untranslatable=job.on_untranslatable == "drop",
                )
            finally:
                if spool is not None:
                    spool.close()
    except FileNotFoundError:
        ledger = job.folder.read()
        if ledger is None or any(record.step is not Step.CREATED for record in ledger.shards):
            raise ConfigurationError(f"no input at {source}") from None
        log.warning("input %s is gone; going on with the batches on record", source)
        return None
    except IsADirectoryError:
        raise ConfigurationError(f"input {source} is a folder, not a JSONL file") from None


def _spool_requests(requests: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write request objects down: they are read again for a later round, and may not come twice."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, request in enumerate(requests, start=1):
            if not isinstance(request, Mapping):
                raise ConfigurationError(f"request {number} is {type(request).__name__}, not a mapping")
            try:
                file.write(json.dumps(dict(request), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise ConfigurationError(f"request {number} does not go into JSON: {error}") from None
    return path


def open_ledger(job: Job, provider: Provider, plan: Plan | None, scratch: Path) -> Flow[Ledger]:
    """The ledger of this job and this input, made if there is none."""
    folder = job.folder
    while True:
        ledger = yield from do(folder.read)
        if ledger is not None and ledger.job != job.identity:
            raise LedgerConflictError(
                f"{folder.path} holds job {ledger.job!r}; job {job.identity!r} needs a folder of its own"
            )
        if plan is None:
            assert ledger is not None  # prepare() saw to it
            return ledger
        mark = fingerprint(job, provider, plan.digest)
        if ledger is not None and ledger.fingerprint == mark:
            return ledger
        if ledger is not None:
            yield from _abandon(job, provider, ledger)
        new = Ledger(
            job=job.identity,
            fingerprint=mark,
            provider=provider.name,
            api_base=provider.account.api_base,
            endpoint=job.endpoint,
            rows=plan.rows,
            created_at=time.time(),
            shards=tuple(
                ShardRecord(shard=number, first_row=shard.first_row, rows=shard.rows)
                for number, shard in enumerate(plan.shards)
            ),
        )
        opened = yield from do(partial(_open, folder, ledger, new, scratch))
        if opened is not None:
            return opened


def _open(folder: JobFolder, before: Ledger | None, new: Ledger, scratch: Path) -> Ledger | None:
    folder.path.mkdir(parents=True, exist_ok=True)
    # Results of another input must not be taken for those of this one.
    folder.discard("report.json", "results.jsonl", "stray.jsonl")
    for name in ("ids.jsonl", "requests.jsonl"):
        if (scratch / name).exists():
            copy = scratch / f"{name}.copy"
            shutil.copyfile(scratch / name, copy)
            folder.put(copy, name)
    return folder.commit(before, new)


def _abandon(job: Job, provider: Provider, ledger: Ledger) -> Flow[None]:
    """The input changed: stop what was submitted of the old one."""
    if job.on_changed == "fail":
        raise InputChangedError(
            f"job {job.identity} was submitted before with other input or options (batches: "
            f"{', '.join(ledger.batch_ids) or 'none yet'}); on_changed='cancel_and_resubmit' would replace it"
        )
    if ledger.provider != provider.name or ledger.api_base != provider.account.api_base:
        if ledger.landed_at is None and ledger.batch_ids:
            raise InputChangedError(
                f"job {job.identity} has batches at {ledger.provider} ({ledger.api_base}): "
                f"{', '.join(ledger.batch_ids)}; cancel them there, or give the job another output folder"
            )
        return
    for record in ledger.shards:
        ids = [record.batch_id] if record.batch_id else []
        if record.step is Step.CREATING and provider.can_find:
            metadata = shard_metadata(job_metadata(job, provider), record, len(ledger.shards))
            found = yield from provider.find(record.file_id, metadata, since=record.creating_at or 0)
            ids = [batch.id for batch in found]
        for batch_id in ids:
            batch = yield from provider.retrieve(batch_id)
            if not batch.status.is_terminal:
                log.warning("job %s changed: cancelling batch %s", job.identity, batch_id)
                yield from provider.cancel(batch_id)


class Move(Enum):
    """What to do next about a shard."""

    UPLOAD = auto()
    CREATE = auto()
    ATTACH = auto()
    ASK = auto()  # a create may have happened: look for the batch
    LEAVE = auto()  # another attempt is creating right now


def next_move(record: ShardRecord, attempt: str, now: float, lease: float) -> Move:
    """The next step for a shard, from what the ledger says of it."""
    match record.step:
        case Step.PLANNED:
            return Move.UPLOAD
        case Step.UPLOADED:
            return Move.CREATE
        case Step.CREATED:
            return Move.ATTACH
        case Step.CREATING:
            mine = record.attempt == attempt
            # An attempt that ends in good order takes its name off; one that was killed cannot.
            busy = record.attempt is not None and now < (record.creating_at or 0) + lease
            return Move.LEAVE if busy and not mine else Move.ASK


@dataclass
class _Submission:
    """Brings one shard to its batch: reads the ledger, takes one step, writes the ledger, again."""

    job: Job
    provider: Provider
    plan: Plan | None
    number: int
    metadata: Mapping[str, str]
    attempt: str

    def run(self) -> Flow[Batch]:
        folder = self.job.folder
        while True:
            ledger = yield from do(folder.read)
            if ledger is None:
                raise LedgerConflictError(f"{folder.path / 'job.json'} was removed while the job was running")
            record = ledger.shards[self.number]
            match next_move(record, self.attempt, time.time(), self.job.lease):
                case Move.UPLOAD:
                    yield from self._upload(ledger, record)
                case Move.CREATE:
                    if batch := (yield from self._create(ledger, record)):
                        return batch
                case Move.ASK:
                    if batch := (yield from self._ask(ledger, record)):
                        return batch
                case Move.LEAVE:
                    if self.provider.can_find and (batch := (yield from self._find(ledger, record))):
                        return batch
                    yield from sleep(min(_LEASE_POLL, self.job.lease))
                case Move.ATTACH:
                    if batch := (yield from self._attach(ledger, record)):
                        return batch

    def _commit(self, ledger: Ledger, record: ShardRecord) -> Flow[Ledger | None]:
        return (yield from do(partial(self.job.folder.commit, ledger, ledger.with_shard(record))))

    def _shard(self) -> tuple[Plan, Shard]:
        if self.plan is None:
            raise ConfigurationError(f"no input at {self.job.input}, and a batch has to be submitted again")
        return self.plan, self.plan.shards[self.number]

    def _upload(self, ledger: Ledger, record: ShardRecord) -> Flow[None]:
        plan, shard = self._shard()
        file_id = yield from self.provider.upload(plan.shard_content(shard), self.job.options)
        yield from self._commit(ledger, record.model_copy(update={"step": Step.UPLOADED, "file_id": file_id}))

    def _create(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        plan, shard = self._shard()
        creating = record.model_copy(
            update={
                "step": Step.CREATING,
                "attempt": self.attempt,
                "creating_at": time.time(),
                "tries": record.tries + 1,
            }
        )
        # From here on the batch may exist. The write fails if another attempt was faster.
        claimed = yield from self._commit(ledger, creating)
        if claimed is None:
            return None
        new = NewBatch(
            content=plan.shard_content(shard),
            endpoint=self.job.endpoint,
            completion_window=self.job.completion_window,
            metadata=shard_metadata(self.metadata, record, len(ledger.shards)),
            options=self.job.options,
            models=shard.models,
            # Every upload has its own file id: a batch that failed as a whole is submitted under a new key.
            idempotency_key=f"{ledger.fingerprint[:24]}-{record.round}-{record.shard}-{record.file_id}"[:255],
        )
        try:
            batch = yield from self.provider.create_once(new, record.file_id, since=claimed.created_at)
        except CreateOutcomeUnknownError as error:
            if not self.provider.can_find and self.job.on_orphan == "resubmit":
                # Accepted by the user: the lost batch, if there is one, is paid for as well.
                yield from self._commit(claimed, record)
                return None
            yield from self._commit(claimed, creating.model_copy(update={"attempt": None}))
            raise (error if self.provider.can_find else self._orphan(creating, error.message)) from error
        except AnyBatchError as error:
            if not (isinstance(error, APIError) and outcome_unknown(error)):
                # Refused: no batch exists, and the next attempt may simply try again.
                yield from self._commit(claimed, record)
            raise
        return (yield from self._record(claimed, creating, batch))

    def _record(self, ledger: Ledger, record: ShardRecord, batch: Batch) -> Flow[Batch | None]:
        """Write the batch down; if another attempt got there first, cancel this one and let theirs be."""
        log.info(
            "job %s: batch %s for %d rows (shard %d of %d)",
            self.job.identity, batch.id, record.rows, record.shard + 1, len(ledger.shards),
        )  # fmt: skip
        update = {"step": Step.CREATED, "batch_id": batch.id, "status": batch.status}
        created = record.model_copy(update=update)
        while (yield from self._commit(ledger, created)) is None:
            now = yield from do(self.job.folder.read)
            if now is None or now.fingerprint != ledger.fingerprint:
                theirs = None
            else:
                theirs = now.shards[self.number].batch_id
                if theirs is None:
                    ledger = now
                    continue
            if theirs != batch.id:
                log.warning(
                    "job %s: another attempt took over; cancelling batch %s", self.job.identity, batch.id
                )
                yield from self.provider.cancel(batch.id)
            if now is None or now.fingerprint != ledger.fingerprint:
                raise LedgerConflictError(
                    f"job {self.job.identity} was submitted anew by another attempt meanwhile",
                    batch_id=batch.id,
                )
            return None
        return batch

    def _find(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        metadata = shard_metadata(self.metadata, record, len(ledger.shards))
        found = yield from self.provider.find(record.file_id, metadata, since=ledger.created_at)
        if not found:
            return None
        batch = yield from self.provider.keep_one(found)
        log.info("job %s: re-attaching to batch %s", self.job.identity, batch.id)
        return (yield from self._record(ledger, record, batch))

    def _ask(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        """An attempt died between its create and its note of it."""
        if self.provider.can_find:
            if batch := (yield from self._find(ledger, record)):
                return batch
        elif not self.provider.idempotent_create and self.job.on_orphan == "fail":
            candidates = yield from self.provider.find(None, {}, since=record.creating_at or 0)
            raise self._orphan(record, "an attempt ended while it was creating the batch", candidates)
        yield from self._commit(ledger, record.model_copy(update={"step": Step.UPLOADED}))
        return None

    def _orphan(self, record: ShardRecord, why: str, candidates: Iterable[Batch] = ()) -> OrphanError:
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.creating_at))
        seen = ", ".join(
            f"{batch.id} ({batch.request_counts.total if batch.request_counts else '?'} requests)"
            for batch in candidates
        )
        name = self.provider.name
        return OrphanError(
            f"a batch of {record.rows} requests may be running at {name} unknown to job {self.job.identity}: "
            f"{why}. {name} offers no way to look a batch up by what it was made from. Check its batches "
            f"created since {began} (anybatch.list_batches({name!r}))"
            + (f"; there are: {seen}" if seen else "")
            + ". If one of them is this job's, cancel it. Then run again with on_orphan='resubmit'.",
            provider=name,
        )

    def _attach(self, ledger: Ledger, record: ShardRecord) -> Flow[Batch | None]:
        assert record.batch_id is not None  # Step.CREATED means just that
        batch = yield from self.provider.retrieve(record.batch_id)
        if batch.status is not BatchStatus.FAILED or record.attempt == self.attempt:
            return batch
        # It was refused as a whole and cost nothing; what was wrong may have passed (quota, a full queue).
        log.warning("job %s: batch %s had failed; submitting again", self.job.identity, batch.id)
        fresh = ShardRecord(
            shard=record.shard, round=record.round, first_row=record.first_row, rows=record.rows,
            tries=record.tries,
        )  # fmt: skip
        yield from self._commit(ledger, fresh)
        return None
