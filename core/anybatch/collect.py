"""Collection: the results of a job's batches, landed in the order of its input, and the account of them."""

from __future__ import annotations

import shutil
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from .errors import BatchFailedError, BatchNotCompleteError, JobError, LedgerConflictError, Problem
from .flow import Flow, do, sleep
from .merge import Tally, merge
from .models import Batch, BatchRecord, BatchStatus, Outcome, Report, iter_problems

if TYPE_CHECKING:
    from .job import Job
    from .ledger import JobFolder, Ledger, ShardRecord
    from .providers.base import Provider

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
        raise JobError(f"job {job.identity} was never submitted to {folder.path}")
    if ledger.landed_at is not None and (report := (yield from do(folder.read_report))) is not None:
        return report
    batches: list[Batch] = []
    for record in ledger.shards:
        if record.batch_id is None:
            raise JobError(f"job {job.identity}: shard {record.shard} has no batch yet; submit the job first")
        batches.append((yield from settled(provider, record.batch_id, first_row=record.first_row)))
    tally = Tally()
    with folder.scratch() as scratch:
        ids = yield from do(partial(_Ids, folder))
        landing = _Landing(scratch, provider, ledger.endpoint, tally)
        try:
            for record, batch in zip(ledger.shards, batches, strict=True):
                paths = yield from provider.download(batch, scratch)
                yield from do(partial(landing.add, paths, record, batch, ids))
        finally:
            landing.close()
            ids.close()
        report = make_report(job, provider, ledger, batches, tally)
        return (yield from _finish(folder, ledger, landing, report))


def _finish(folder: JobFolder, ledger: Ledger, landing: _Landing, report: Report) -> Flow[Report]:
    """Land, unless another attempt has landed the same batches by now, or has given the job another input."""
    while True:
        done = ledger.model_copy(update={"landed_at": report.finished_at})
        land = partial(_land, folder, landing, report)
        if (yield from do(partial(folder.commit, ledger, done, first=land))) is not None:
            return report
        now = yield from do(folder.read)
        if now is None or (now.fingerprint, now.batch_ids) != (ledger.fingerprint, ledger.batch_ids):
            raise LedgerConflictError(
                f"job {ledger.job} was submitted anew by another attempt meanwhile; nothing was landed"
            )
        if now.landed_at is not None and (theirs := (yield from do(folder.read_report))) is not None:
            return theirs
        ledger = now


def settled(provider: Provider, batch_id: str, *, first_row: int = 0) -> Flow[Batch]:
    """The batch in its final state. Ended without files, though rows were counted, is not final yet."""
    waited = 0.0
    while True:
        batch = yield from provider.retrieve(batch_id)
        if not batch.status.is_terminal:
            raise BatchNotCompleteError(batch.id, batch.status, provider=provider.name)
        has_files = bool(provider.result_requests(batch))
        if batch.status is BatchStatus.FAILED and not has_files:
            raise failed(batch, first_row)
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


def failed(batch: Batch, first_row: int = 0) -> BatchFailedError:
    """The provider's reasons for refusing a batch, with the rows of the job's input they speak of."""
    problems = [
        Problem(
            None if problem.line is None else first_row + problem.line,
            problem.param,
            f"{problem.message or 'no message'}" + (f" ({problem.code})" if problem.code else ""),
        )
        for problem in iter_problems(batch.errors)
    ]
    return BatchFailedError(
        "the provider refused the batch; running the job again submits it anew",
        problems=problems,
        provider=batch.provider,
        batch_id=batch.id,
    )


class _Ids:
    """The custom_ids of a job, read a shard at a time."""

    def __init__(self, folder: JobFolder) -> None:
        self._file = (folder / "ids.jsonl").open("rb")

    def take(self, rows: int) -> list[str]:
        ids = [orjson.loads(line) for line in islice(self._file, rows)]
        if len(ids) < rows:
            raise JobError("ids.jsonl is shorter than the ledger says")
        return ids

    def close(self) -> None:
        self._file.close()


class _Landing:
    """The results as they are put together, in a scratch folder."""

    def __init__(self, scratch: Path, provider: Provider, endpoint: str, tally: Tally) -> None:
        self.results, self.stray = scratch / "results.jsonl", scratch / "stray.jsonl"
        self._provider, self._endpoint, self._tally = provider, endpoint, tally
        self._out, self._stray = self.results.open("wb", buffering=1 << 20), self.stray.open("wb")

    def add(self, paths: list[Path], record: ShardRecord, batch: Batch, ids: _Ids) -> None:
        merge(
            paths, ids.take(record.rows), self._provider, self._endpoint, batch.status, self._out,
            self._stray.write, self._tally,
        )  # fmt: skip
        for path in paths:
            path.unlink()

    def close(self) -> None:
        self._out.close()
        self._stray.close()


def _land(folder: JobFolder, landing: _Landing, report: Report) -> None:
    """Results first, then the report: whoever sees the report finds the results complete."""
    folder.put(landing.results, "results.jsonl")
    if landing.stray.stat().st_size:
        folder.put(landing.stray, "stray.jsonl")
    folder.replace("report.json", report.model_dump_json(indent=1).encode())
    # Now, not later: once the job is noted as landed nobody looks for what a kill has left.
    shutil.rmtree(landing.results.parent)


def make_report(job: Job, provider: Provider, ledger: Ledger, batches: list[Batch], tally: Tally) -> Report:
    """The account of a job from its rows."""
    now = time.time()
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
        batches=tuple(
            BatchRecord(
                id=batch.id,
                shard=record.shard,
                round=record.round,
                rows=record.rows,
                status=batch.status,
                input_file_id=batch.input_file_id or record.file_id,
                output_file_id=batch.output_file_id,
                error_file_id=batch.error_file_id,
            )
            for record, batch in zip(ledger.shards, batches, strict=True)
        ),
        results=str(job.folder / "results.jsonl"),
    )
