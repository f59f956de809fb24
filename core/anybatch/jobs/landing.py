"""Landing: put a job's results and report in place, whole or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ..errors import LedgerConflictError
from ..flow import Flow, do
from ..models import Batch, BatchRecord, Outcome, Report
from ..rows.tally import Tally
from .folder import remove_scratch
from .inputs import SPOOL
from .ledger import ShardRecord
from .rounds import record_of_batch, rows_name, stray_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..providers.base import Provider
    from .folder import JobFolder
    from .job import Job
    from .ledger import Ledger

Ended: TypeAlias = "tuple[ShardRecord, Batch | None]"
"""A shard and its batch in a final state; None if the batch is lost and the job continues without it."""


@dataclass(frozen=True)
class Gathered:
    """All rows of a job as of the end of a round, in a scratch folder."""

    scratch: Path
    ended: list[Ended]
    tally: Tally

    @property
    def batch_records(self) -> list[BatchRecord]:
        """The batches of the round, as the report describes them."""
        return [record_of_batch(record, batch) for record, batch in self.ended]

    @property
    def rows(self) -> Path:
        """The file of all rows, in input order."""
        return self.scratch / "results.jsonl"

    @property
    def stray(self) -> Path:
        """The file of all stray lines."""
        return self.scratch / "stray.jsonl"


def land(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Flow[Report]:
    """Land the rows and return the report; if another attempt has landed the same batches, return its report.

    Raises LedgerConflictError if another attempt has moved the job on.
    """
    folder, report = job.folder, make_report(job, provider, ledger, gathered)
    while True:
        done = ledger.model_copy(update={"landed_at": report.finished_at})
        first = partial(put, folder, gathered, report)
        if (landed := (yield from do(partial(folder.commit, ledger, done, first=first)))) is not None:
            yield from do(partial(remove_leftovers, job, landed))
            return report
        now = yield from do(folder.read)
        if now is None or submission_of(now) != submission_of(ledger):
            raise LedgerConflictError(
                f"another attempt has submitted job {ledger.job} again in the meantime; nothing was landed"
            )
        if now.landed_at is not None and (theirs := (yield from do(folder.read_report))) is not None:
            return theirs
        ledger = now


def submission_of(ledger: Ledger) -> object:
    """The facts that must be unchanged for the gathered results to be valid."""
    return ledger.fingerprint, [(record.round, record.batch_id, record.tries) for record in ledger.shards]


def put(folder: JobFolder, gathered: Gathered, report: Report) -> None:
    """Put results and report in place; the caller holds the lock.

    The report comes last, so that a process that sees the report finds complete results.
    """
    folder.put(gathered.rows, "results.jsonl")
    if gathered.stray.stat().st_size:
        folder.put(gathered.stray, "stray.jsonl")
    else:
        folder.discard("stray.jsonl")  # of an earlier landing
    folder.replace("report.json", report.model_dump_json(indent=1).encode())
    # Remove the scratch folder before the ledger says "landed": after that, nobody cleans up after a kill.
    if folder.local is not None:
        remove_scratch(gathered.scratch)


def remove_leftovers(job: Job, landed: Ledger) -> None:
    """Remove the files of earlier rounds, whose rows are in the results, and the request lines."""
    folder = job.folder
    names = [name(number) for number in range(1, landed.round) for name in (rows_name, stray_name)]
    if landed.is_spooled and job.keep_requests != "always":
        names.append(SPOOL)
    if names:
        with folder.locked():
            if folder.read() == landed:
                folder.discard(*names)


def make_report(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Report:
    """Build the report of a job from its rows."""
    return report_of(
        gathered,
        job=job.identity,
        provider=provider.name,
        endpoint=ledger.endpoint,
        rows=ledger.rows,
        started_at=ledger.created_at,
        price=job.price,
        results=str(job.folder / "results.jsonl"),
        rounds=ledger.round,
        before=[record.ended for record in ledger.shards if record.round < ledger.round and record.ended],
    )


def report_of(
    gathered: Gathered,
    *,
    job: str,
    provider: str,
    endpoint: str,
    rows: int,
    started_at: float,
    price: tuple[float, float] | None,
    results: str,
    rounds: int = 1,
    before: Sequence[BatchRecord] = (),
) -> Report:
    """Build the report of gathered rows; `before` are the batches of earlier rounds."""
    now, tally = time.time(), gathered.tally
    return Report(
        job=job,
        provider=provider,
        endpoint=endpoint,
        models=tuple(tally.models),
        rows=rows,
        counts={outcome: tally.counts[outcome] for outcome in Outcome},
        unexpected=tally.unexpected,
        usage=tally.usage,
        cost=tally.cost_at(price),
        started_at=started_at,
        finished_at=now,
        duration_s=round(now - started_at, 3),
        rounds=rounds,
        batches=(*before, *gathered.batch_records),
        results=results,
    )
