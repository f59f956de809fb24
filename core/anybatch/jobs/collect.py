"""Collection: download the results of a job's batches, and land them in input order with a report."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import orjson

from ..errors import (
    AnyBatchError,
    BatchFailedError,
    BatchNotCompleteError,
    JobError,
    LedgerConflictError,
    NotFoundError,
    Problem,
)
from ..flow import Flow, do
from ..models import Batch, BatchStatus, Outcome, Report, Row, RowError, iter_problems
from ..providers.traits import Results
from ..rows.downloads import Fetched, fetch
from ..rows.merge import Index, merge
from ..rows.results import landed_line
from ..rows.tally import Tally
from .job import job_metadata, never_submitted_error
from .landing import Ended, Gathered, land, submission_of
from .ledger import ShardRecord
from .lookup import unrecorded_batches
from .lost import WAYS_OUT, lost_error, lost_row, retrieve_or_lost
from .rounds import fold, ids_name, ids_of_shards, is_covered, rows_name, stray_name
from .shard import Transition, next_transition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..providers.base import Provider
    from .folder import JobFolder
    from .job import Job
    from .ledger import Ledger

log = logging.getLogger(__name__)


def collect(job: Job, provider: Provider) -> Flow[Report]:
    """Land the results of a job whose batches have all ended, and return its report.

    If the job has landed before, this returns the existing report. In a stopped job, rows without a result
    are `cancelled`. Raises BatchNotCompleteError if a batch still runs, and BatchFailedError if the provider
    refused a batch as a whole.
    """
    folder = job.folder
    ledger = yield from do(folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted_error(job)
    if ledger.landed_at is not None and (report := (yield from do(folder.read_report))) is not None:
        return report
    if ledger.stopped_at is not None and ledger.is_untouched:
        raise never_submitted_error(job)
    ended = yield from ended_round(job, provider, ledger)
    try:
        with (yield from do(folder.scratch)) as scratch:
            gathered = yield from gather(job, provider, ledger, ended, scratch)
            return (yield from land(job, provider, ledger, gathered))
    except (FileNotFoundError, LedgerConflictError):
        now = yield from do(folder.read)
        if now is None or now.landed_at == ledger.landed_at or submission_of(now) != submission_of(ledger):
            raise
        # Another attempt has landed the job and removed the files that this one was reading.
        return (yield from collect(job, provider))


def ended_round(
    job: Job, provider: Provider, ledger: Ledger, seen: Sequence[Batch] = ()
) -> Flow[list[Ended]]:
    """Return the shards of the current round with their batches, all in a final state.

    `seen` are batches that were retrieved a moment ago, and need not be retrieved again.
    """
    ended: list[Ended] = []
    known = {batch.id: batch for batch in seen}
    for record in ledger.current:
        if record.batch_id is not None:
            batch = known.get(record.batch_id) or (yield from retrieve_or_lost(job, provider, ledger, record))
            if batch is None:
                ended.append((record, None))
            elif is_refused(provider, batch):
                if is_covered(job, ledger) and ledger.stopped_at is None:
                    raise batch_failed_error(batch, record)
                log.warning(
                    "job %s lands without shard %d: %s",
                    ledger.job, record.shard, batch_failed_error(batch, record),
                )  # fmt: skip
            elif not batch.status.is_terminal:
                raise BatchNotCompleteError(batch.id, batch.status, provider=provider.name)
            else:
                ended.append((record, batch))
        elif not (yield from _may_stay_without(job, provider, ledger, record)):
            raise JobError(
                f"job {job.identity}: shard {record.shard} of round {record.round} has no batch yet; "
                "submit the job first"
                + (", or collect it with on_lost='land'" if record.round == ledger.lost_round else "")
            )
    return ended


def _may_stay_without(job: Job, provider: Provider, ledger: Ledger, record: ShardRecord) -> Flow[bool]:
    """Whether a shard without a batch needs none: its rows keep the outcomes of earlier rounds, or are
    cancelled since the job was stopped."""
    if ledger.stopped_at is None:
        buys_lost = record.round == ledger.lost_round and job.on_lost == "resubmit"
        if record.round == 1 or buys_lost:
            return False
    if record.tries:
        if next_transition(record, "", time.time(), job.lease) is Transition.LEAVE:
            return False
        if (yield from unrecorded_batches(job, provider, ledger, record, job_metadata(job, provider))):
            return False
        log.warning(
            "job %s: shard %d of round %d lands without results: its create left no batch",
            ledger.job, record.shard, record.round,
        )  # fmt: skip
    return True


def gather(
    job: Job, provider: Provider, ledger: Ledger, ended: Sequence[Ended], scratch: Path
) -> Flow[Gathered]:
    """Download the results of a round that has ended, and write all rows of the job to a scratch folder.

    Raises BatchLostError or ServerError if result files are lost or incomplete and `Job.on_lost` is "fail".
    """
    gathered, folder = Gathered(scratch, [], Tally(unexpected=ledger.unexpected)), job.folder
    with ExitStack() as files:
        merged = yield from do(partial(_Merged, gathered, folder, ledger, provider, files))
        batches = {record.shard: batch for record, batch in ended}
        for record in ledger.current:
            if record.shard not in batches:
                if ledger.round == 1:
                    yield from do(partial(merged.add_stopped, record))
            elif (batch := batches[record.shard]) is None:
                gathered.ended.append((record, None))
                yield from do(partial(merged.add_lost, record))
            else:
                ids = yield from do(partial(merged.ids_of, record))
                index = partial(Index, custom_ids=ids, provider=provider, endpoint=ledger.endpoint)
                fetched = yield from fetch(provider, batch, scratch, index, sent=record.rows)
                if fetched.loss is not None:
                    _accept_loss(job, record, fetched.loss)
                gathered.ended.append((record, fetched.batch))
                yield from do(partial(merged.add, ids, fetched))
    if ledger.round > 1:
        yield from do(partial(_fold, gathered, folder, ledger.round, merged.path))
    return gathered


def _accept_loss(job: Job, record: ShardRecord, loss: AnyBatchError) -> None:
    """Raise an error for lost results, unless `Job.on_lost` lets the job continue without them."""
    if job.on_lost == "fail":
        if isinstance(loss, NotFoundError):
            what = f"a result file of batch {record.batch_id} is gone ({loss.message})"
            raise lost_error(job, record, what, loss) from loss
        loss.message += f". If they stay incomplete: {WAYS_OUT}"
        raise loss
    log.warning("job %s: %s; on_lost=%r, so the job continues without them", job.identity, loss, job.on_lost)


class _Merged:
    """Writes the rows of one round in the order of its ids, shard by shard."""

    def __init__(
        self, gathered: Gathered, folder: JobFolder, ledger: Ledger, provider: Provider, files: ExitStack
    ) -> None:
        self.path = gathered.scratch / "later.jsonl" if ledger.round > 1 else gathered.rows
        self._ids = files.enter_context((folder / ids_name(ledger.round)).open("rb"))
        self._out: BinaryIO = files.enter_context(self.path.open("wb", buffering=1 << 20))
        self._stray: BinaryIO = files.enter_context(gathered.stray.open("wb"))
        if ledger.round > 1 and (before := folder / stray_name(ledger.round - 1)).exists():
            self._stray.write(before.read_bytes())
        self._provider, self._endpoint, self._tally = provider, ledger.endpoint, gathered.tally
        self._row = 0

    def add(self, custom_ids: list[str], fetched: Fetched[Index]) -> None:
        """Write the rows of a shard from its result files, and remove those."""
        lost = lost_row(fetched.loss.message) if fetched.loss is not None else None
        merge(fetched.found, custom_ids, fetched.batch.status, self._out, self._stray, self._tally, lost=lost)
        for path in fetched.paths:
            path.unlink()

    def add_lost(self, record: ShardRecord) -> None:
        """Write the rows of a shard whose batch is lost."""
        error = lost_row(f"batch {record.batch_id} is gone.")
        for custom_id in self.ids_of(record):
            self._tally.counts[Outcome.MISSING] += 1
            self._out.write(landed_line(Row(custom_id, Outcome.MISSING, None, error)))

    def add_stopped(self, record: ShardRecord) -> None:
        """Write the rows of a shard that has no results since the job was stopped."""
        error = RowError("job_stopped", "The job was stopped before this request was answered.")
        for custom_id in self.ids_of(record):
            self._tally.counts[Outcome.CANCELLED] += 1
            self._out.write(landed_line(Row(custom_id, Outcome.CANCELLED, None, error)))

    def ids_of(self, record: ShardRecord) -> list[str]:
        """Read the custom_ids of the next shard."""
        ids = [orjson.loads(one) for one in ids_of_shards(self._ids, [record], self._row)]
        self._row = record.first_row + record.rows
        if len(ids) < record.rows:
            raise JobError(f"{ids_name(record.round)} holds fewer custom_ids than the ledger counts rows")
        return ids


def _fold(gathered: Gathered, folder: JobFolder, number: int, later: Path) -> None:
    """Merge the rows of round `number` with those of the rounds before."""
    records = [record for record, _ in gathered.ended]
    with ExitStack() as files:
        try:
            rows = files.enter_context((folder / rows_name(number - 1)).open("rb"))
        except FileNotFoundError:
            raise LedgerConflictError(
                f"{folder / rows_name(number - 1)} is gone: it was removed, or another attempt has moved the "
                "job on"
            ) from None
        ids = files.enter_context((folder / ids_name(1)).open("rb"))
        later_ids = ids_of_shards(files.enter_context((folder / ids_name(number)).open("rb")), records)
        out = files.enter_context(gathered.rows.open("wb", buffering=1 << 20))
        fold(rows, ids, files.enter_context(later.open("rb")), later_ids, out, gathered.tally)


def is_refused(provider: Provider, batch: Batch) -> bool:
    """Whether the provider refused a batch as a whole, so that it has no results."""
    return batch.status is BatchStatus.FAILED and provider.results(batch) is Results.NONE


def ended_batch(provider: Provider, batch_id: str) -> Flow[Batch]:
    """Retrieve a batch that has ended.

    Raises BatchNotCompleteError if it still runs, and BatchFailedError if it was refused as a whole.
    """
    batch = yield from provider.retrieve(batch_id)
    if not batch.status.is_terminal:
        raise BatchNotCompleteError(batch.id, batch.status, provider=provider.name)
    if is_refused(provider, batch):
        raise batch_failed_error(batch)
    return batch


def batch_failed_error(batch: Batch, record: ShardRecord | None = None) -> BatchFailedError:
    """Build the error for a refused batch: the provider's reasons, with the lines of the job's input."""
    first_row = record.first_row if record else 0
    # A later round's file holds only some lines of the input: its line numbers would mislead the reader.
    is_whole_input = record is None or record.round == 1
    problems = [
        Problem(
            first_row + problem.line if is_whole_input and problem.line is not None else None,
            problem.param,
            f"{problem.message or 'no message'}" + (f" ({problem.code})" if problem.code else ""),
        )
        for problem in iter_problems(batch.errors)
    ]
    return BatchFailedError(
        "the provider refused the batch; running the job again submits its rows again"
        + ("" if is_whole_input else ", and running it with a lower max_rounds lands the results so far"),
        problems=problems,
        provider=batch.provider,
        batch_id=batch.id,
    )
