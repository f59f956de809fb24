"""Collection: the results of a job's batches, landed in the order of its input, and the account of them."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import orjson

from .errors import BatchFailedError, BatchNotCompleteError, JobError, LedgerConflictError, Problem
from .flow import Flow, do, sleep
from .job import never_submitted
from .ledger import ShardRecord
from .merge import Tally, merge
from .models import Batch, BatchStatus, Outcome, Report, iter_problems
from .rounds import account_of, fold, ids_name, is_covered, part_of, rows_name, stray_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .job import Job
    from .ledger import JobFolder, Ledger
    from .providers.base import Provider

log = logging.getLogger(__name__)

Ended: TypeAlias = tuple[ShardRecord, Batch]

# How long a completed batch without result files is asked again, seconds; seen on real servers.
SETTLING = 300.0
_SETTLING_POLL = 10.0


def collect(job: Job, provider: Provider) -> Flow[Report]:
    """Land the results of a job whose batches have all ended; the report of one that has landed already.

    Raises BatchNotCompleteError, and BatchFailedError where the provider refused a whole batch.
    """
    folder = job.folder
    ledger = yield from do(folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted(job)
    if ledger.landed_at is not None and (report := (yield from do(folder.read_report))) is not None:
        return report
    ended = yield from ended_round(job, provider, ledger)
    with folder.scratch() as scratch:
        gathered = yield from gather(provider, folder, ledger, ended, scratch)
        return (yield from land(job, provider, ledger, gathered))


def ended_round(
    job: Job, provider: Provider, ledger: Ledger, seen: Sequence[Batch | None] = ()
) -> Flow[list[Ended]]:
    """The batches of the current round in their final state; `seen` is what they were a moment ago."""
    ended: list[Ended] = []
    for record, last in zip_longest(ledger.current, seen):
        if record.batch_id is not None:
            try:
                batch = yield from settled(provider, record.batch_id, record=record, seen=last)
            except BatchFailedError as error:
                if is_covered(job, ledger):
                    raise
                log.warning("job %s: its rows stay as they were before: %s", ledger.job, error)
            else:
                ended.append((record, batch))
        elif not record.round or record.tries:  # else its rows stay what they were before this round
            raise JobError(
                f"job {job.identity}: shard {record.shard} of round {record.round} has no batch yet; "
                "submit the job first"
            )
    return ended


@dataclass(frozen=True)
class Gathered:
    """All rows of a job as they stand once a round has ended, put together in a scratch folder."""

    scratch: Path
    ended: Sequence[Ended]
    tally: Tally

    @property
    def rows(self) -> Path:
        return self.scratch / "results.jsonl"

    @property
    def stray(self) -> Path:
        return self.scratch / "stray.jsonl"


def gather(
    provider: Provider, folder: JobFolder, ledger: Ledger, ended: Sequence[Ended], scratch: Path
) -> Flow[Gathered]:
    """Download a round that has ended, and put all rows together as they stand now."""
    gathered = Gathered(scratch, ended, Tally(unexpected=ledger.unexpected))
    with ExitStack() as files:
        merged = yield from do(partial(_Merged, gathered, folder, ledger, provider, files))
        for record, batch in ended:
            paths = yield from provider.download(batch, scratch)
            yield from do(partial(merged.add, paths, record, batch))
    if ledger.round:
        yield from do(partial(_fold, gathered, folder, ledger.round, merged.path))
    return gathered


class _Merged:
    """The rows of one round in the order of its ids, as they come, a shard at a time."""

    def __init__(
        self, gathered: Gathered, folder: JobFolder, ledger: Ledger, provider: Provider, files: ExitStack
    ) -> None:
        self.path = gathered.scratch / "later.jsonl" if ledger.round else gathered.rows
        self._ids = files.enter_context((folder / ids_name(ledger.round)).open("rb"))
        self._out: BinaryIO = files.enter_context(self.path.open("wb", buffering=1 << 20))
        self._stray: BinaryIO = files.enter_context(gathered.stray.open("wb"))
        if ledger.round and (before := folder / stray_name(ledger.round - 1)).exists():
            self._stray.write(before.read_bytes())
        self._provider, self._endpoint, self._tally = provider, ledger.endpoint, gathered.tally
        self._row = 0

    def add(self, paths: list[Path], record: ShardRecord, batch: Batch) -> None:
        ids = [orjson.loads(one) for one in part_of(self._ids, [record], self._row)]
        self._row = record.first_row + record.rows
        if len(ids) < record.rows:
            raise JobError(f"{ids_name(record.round)} is shorter than the ledger says")
        merge(
            paths, ids, self._provider, self._endpoint, batch.status, self._out,
            self._stray.write, self._tally,
        )  # fmt: skip
        for path in paths:
            path.unlink()


def _fold(gathered: Gathered, folder: JobFolder, number: int, later: Path) -> None:
    """Put the rows of round `number` in among those of the rounds before."""
    records = [record for record, _ in gathered.ended]
    with ExitStack() as files:
        try:
            rows = files.enter_context((folder / rows_name(number - 1)).open("rb"))
        except FileNotFoundError:
            raise LedgerConflictError(
                f"{rows_name(number - 1)} was removed, or another attempt has gone on with the job"
            ) from None
        ids = files.enter_context((folder / ids_name(0)).open("rb"))
        later_ids = part_of(files.enter_context((folder / ids_name(number)).open("rb")), records)
        out = files.enter_context(gathered.rows.open("wb", buffering=1 << 20))
        fold(rows, ids, files.enter_context(later.open("rb")), later_ids, out, gathered.tally)


def land(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Flow[Report]:
    """Land, unless another attempt has landed the same batches by now, or has gone on with the job."""
    folder, report = job.folder, make_report(job, provider, ledger, gathered)
    while True:
        done = ledger.model_copy(update={"landed_at": report.finished_at})
        put = partial(_land, folder, gathered, report)
        if (yield from do(partial(folder.commit, ledger, done, first=put))) is not None:
            return report
        now = yield from do(folder.read)
        if now is None or _submitted(now) != _submitted(ledger):
            raise LedgerConflictError(
                f"job {ledger.job} was submitted anew by another attempt meanwhile; nothing was landed"
            )
        if now.landed_at is not None and (theirs := (yield from do(folder.read_report))) is not None:
            return theirs
        ledger = now


def _submitted(ledger: Ledger) -> object:
    """What must be the same still for the same results to be right."""
    return ledger.fingerprint, [(record.round, record.batch_id, record.tries) for record in ledger.shards]


def settled(
    provider: Provider, batch_id: str, *, record: ShardRecord | None = None, seen: Batch | None = None
) -> Flow[Batch]:
    """The batch in its final state. Ended without files, though rows were counted, is not final yet.

    `record` is the shard that it carries, `seen` the batch as it was a moment ago.
    """
    waited = 0.0
    while True:
        batch, seen = seen or (yield from provider.retrieve(batch_id)), None
        if not batch.status.is_terminal:
            raise BatchNotCompleteError(batch.id, batch.status, provider=provider.name)
        has_files = bool(provider.result_requests(batch))
        if batch.status is BatchStatus.FAILED and not has_files:
            raise failed(batch, record)
        if has_files or not _owes_files(batch) or waited >= SETTLING:
            return batch
        yield from sleep(_SETTLING_POLL)
        waited += _SETTLING_POLL


def _owes_files(batch: Batch) -> bool:
    """Whether there must be lines: of every row of a completed batch, else of those counted as done."""
    counts, completed = batch.request_counts, batch.status is BatchStatus.COMPLETED
    if counts is None:
        return completed
    return (counts.total if completed else counts.completed) > 0


def failed(batch: Batch, record: ShardRecord | None = None) -> BatchFailedError:
    """The provider's reasons for refusing a batch, with the lines of the job's input they speak of."""
    first_row = record.first_row if record else 0
    # A later round holds some lines of the input only: their numbers in it say nothing to a reader.
    told = record is None or record.round == 0
    problems = [
        Problem(
            first_row + problem.line if told and problem.line is not None else None,
            problem.param,
            f"{problem.message or 'no message'}" + (f" ({problem.code})" if problem.code else ""),
        )
        for problem in iter_problems(batch.errors)
    ]
    return BatchFailedError(
        "the provider refused the batch; running the job again submits it anew"
        + ("" if told else ", and with a lower max_rounds lands what there is"),
        problems=problems,
        provider=batch.provider,
        batch_id=batch.id,
    )


def _land(folder: JobFolder, gathered: Gathered, report: Report) -> None:
    """Results first, then the report: whoever sees the report finds the results complete."""
    folder.put(gathered.rows, "results.jsonl")
    if gathered.stray.stat().st_size:
        folder.put(gathered.stray, "stray.jsonl")
    folder.replace("report.json", report.model_dump_json(indent=1).encode())
    # Now, not later: once the job is noted as landed nobody looks for what a kill has left.
    shutil.rmtree(gathered.scratch)


def make_report(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Report:
    """The account of a job from its rows."""
    now, tally = time.time(), gathered.tally
    before = [record.ended for record in ledger.shards if record.round < ledger.round and record.ended]
    cost = tally.cost
    if cost is None and job.price is not None:
        cost = (tally.input_tokens * job.price[0] + tally.output_tokens * job.price[1]) / 1e6
    return Report(
        job=job.identity,
        provider=provider.name,
        endpoint=ledger.endpoint,
        models=tuple(tally.models),
        rows=ledger.rows,
        counts={outcome: tally.counts[outcome] for outcome in Outcome},
        unexpected=tally.unexpected,
        usage=tally.usage,
        cost=cost,
        started_at=ledger.created_at,
        finished_at=now,
        duration_s=round(now - ledger.created_at, 3),
        rounds=ledger.round + 1,
        batches=(*before, *(account_of(record, batch) for record, batch in gathered.ended)),
        results=str(job.folder / "results.jsonl"),
    )
