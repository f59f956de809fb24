"""Collection: the results of a job's batches, landed in the order of its input, and the account of them."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import orjson

from .errors import (
    BatchFailedError,
    BatchNotCompleteError,
    JobError,
    LedgerConflictError,
    Problem,
    ServerError,
)
from .flow import Flow, do, sleep
from .job import job_metadata, never_submitted
from .ledger import ShardRecord, remove_scratch
from .lines import iter_lines
from .merge import Tally, merge
from .models import Batch, BatchStatus, Outcome, Report, Row, RowError, iter_problems
from .results import landed_line
from .rounds import account_of, fold, ids_name, is_covered, part_of, rows_name, stray_name
from .shards import Move, next_move, retrieve, unnoted

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
# How long after its end such a batch is an error, since it may name them yet; later it lands without them.
GIVEN_UP = 86_400.0
_SETTLING_POLL = 10.0


def collect(job: Job, provider: Provider) -> Flow[Report]:
    """Land the results of a job whose batches have all ended; the report of one that has landed already.

    Of a job that was stopped, the rows that no batch has answered are cancelled.

    Raises BatchNotCompleteError, and BatchFailedError where the provider refused a whole batch.
    """
    folder = job.folder
    ledger = yield from do(folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted(job)
    if ledger.landed_at is not None and (report := (yield from do(folder.read_report))) is not None:
        return report
    if ledger.stopped_at is not None and ledger.is_untouched:
        raise never_submitted(job)
    ended = yield from ended_round(job, provider, ledger)
    try:
        with (yield from do(folder.scratch)) as scratch:
            gathered = yield from gather(provider, folder, ledger, ended, scratch)
            return (yield from land(job, provider, ledger, gathered))
    except (FileNotFoundError, LedgerConflictError):
        now = yield from do(folder.read)
        if now is None or now.landed_at == ledger.landed_at or _submitted(now) != _submitted(ledger):
            raise
        return (yield from collect(job, provider))  # another attempt has landed, and tidied up


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
                if is_covered(job, ledger) and ledger.stopped_at is None:
                    raise
                log.warning("job %s: lands without it: %s", ledger.job, error)
            else:
                ended.append((record, batch))
        elif not (yield from _may_stay_without(job, provider, ledger, record)):
            raise JobError(
                f"job {job.identity}: shard {record.shard} of round {record.round} has no batch yet; "
                "submit the job first"
            )
    return ended


def _may_stay_without(job: Job, provider: Provider, ledger: Ledger, record: ShardRecord) -> Flow[bool]:
    """Whether a shard has no batch, and needs none: its rows stay as they were before this round, or are
    cancelled, since the job was stopped."""
    if not record.round and ledger.stopped_at is None:
        return False
    if record.tries:
        if next_move(record, "", time.time(), job.lease) is Move.LEAVE:
            return False
        if (yield from unnoted(job, provider, ledger, record, job_metadata(job, provider))):
            return False
        log.warning(
            "job %s: shard %d of round %d lands without a batch: the create left none",
            ledger.job, record.shard, record.round,
        )  # fmt: skip
    return True


@dataclass(frozen=True)
class Gathered:
    """All rows of a job as they stand once a round has ended, put together in a scratch folder."""

    scratch: Path
    ended: list[Ended]
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
    gathered = Gathered(scratch, [], Tally(unexpected=ledger.unexpected))
    with ExitStack() as files:
        merged = yield from do(partial(_Merged, gathered, folder, ledger, provider, files))
        batches = {record.shard: batch for record, batch in ended}
        for record in ledger.current:
            if (batch := batches.get(record.shard)) is not None:
                batch, paths = yield from _downloaded(provider, batch, scratch)
                gathered.ended.append((record, batch))
                yield from do(partial(merged.add, paths, record, batch))
            elif not ledger.round:
                yield from do(partial(merged.add_stopped, record))
    if ledger.round:
        yield from do(partial(_fold, gathered, folder, ledger.round, merged.path))
    return gathered


def _downloaded(provider: Provider, batch: Batch, scratch: Path) -> Flow[tuple[Batch, list[Path]]]:
    """A batch's result files. Failed rows that are not in them are in a file that is named a little later."""
    waited = 0.0
    paths = yield from provider.download(batch, scratch)
    while waited < SETTLING and (yield from do(partial(_owes_errors, batch, paths))):
        yield from sleep(_SETTLING_POLL)
        waited += _SETTLING_POLL
        batch = yield from retrieve(provider, batch.id)
        if batch.error_file_id is not None:
            paths = yield from provider.download(batch, scratch)
    return batch, paths


def _owes_errors(batch: Batch, paths: Sequence[Path]) -> bool:
    """Whether rows are counted as failed that the output does not tell of, and no error file is named."""
    counts = batch.request_counts
    if counts is None or not counts.failed or not batch.output_file_id or batch.error_file_id:
        return False
    lines = 0
    for path in paths:
        with path.open("rb") as file:
            lines += sum(not raw.isspace() for _, raw in iter_lines(file))
    return lines < counts.completed + counts.failed


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
        try:
            merge(
                paths, self._ids_of(record), self._provider, self._endpoint, batch.status, self._out,
                self._stray.write, self._tally,
            )  # fmt: skip
        except ServerError as error:
            error.batch_id = batch.id
            raise
        for path in paths:
            path.unlink()

    def add_stopped(self, record: ShardRecord) -> None:
        """The rows of a shard that has no results, since the job was stopped."""
        error = RowError("job_stopped", "The job was stopped before this was answered.")
        for custom_id in self._ids_of(record):
            self._tally.counts[Outcome.CANCELLED] += 1
            self._out.write(landed_line(Row(custom_id, Outcome.CANCELLED, None, error)))

    def _ids_of(self, record: ShardRecord) -> list[str]:
        ids = [orjson.loads(one) for one in part_of(self._ids, [record], self._row)]
        self._row = record.first_row + record.rows
        if len(ids) < record.rows:
            raise JobError(f"{ids_name(record.round)} is shorter than the ledger says")
        return ids


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
        if (landed := (yield from do(partial(folder.commit, ledger, done, first=put)))) is not None:
            if landed.round:
                yield from do(partial(tidy, folder, landed))
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
        find = provider.retrieve if record is None else partial(retrieve, provider)
        batch, seen = seen or (yield from find(batch_id)), None
        if not batch.status.is_terminal:
            raise BatchNotCompleteError(batch.id, batch.status, provider=provider.name)
        has_files = bool(provider.result_requests(batch))
        if batch.status is BatchStatus.FAILED and not has_files:
            raise failed(batch, record)
        if has_files or not _owes_files(batch):
            return batch
        if waited >= SETTLING:
            if _may_come(batch):
                raise ServerError(
                    f"the batch is {batch.status} and counts rows as completed, but names no result files; "
                    "to collect it again may find them",
                    batch_id=batch.id,
                )
            return batch
        yield from sleep(_SETTLING_POLL)
        waited += _SETTLING_POLL


def _owes_files(batch: Batch) -> bool:
    """Whether there must be lines: of every row of a completed batch, else of those counted as done."""
    counts, completed = batch.request_counts, batch.status is BatchStatus.COMPLETED
    if counts is None:
        return completed
    return (counts.total if completed else counts.completed) > 0


def _may_come(batch: Batch) -> bool:
    """Whether rows were paid for whose files are missing, but not for so long that none will come."""
    counts = batch.request_counts
    return counts is not None and counts.completed > 0 and time.time() - (batch.ended_at or 0) < GIVEN_UP


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
    if folder.local is not None:
        remove_scratch(gathered.scratch)


def tidy(folder: JobFolder, landed: Ledger) -> None:
    """Remove what the last round was built on, now that all of it is in the results."""
    with folder.locked():
        if folder.read() == landed:
            for number in range(landed.round):
                folder.discard(rows_name(number), stray_name(number))


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
