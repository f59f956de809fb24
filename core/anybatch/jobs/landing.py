"""Landing: the rows of a job put in place with their report, whole or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ..errors import (
    LedgerConflictError,
)
from ..flow import Flow, do
from ..models import Batch, BatchRecord, Outcome, Report
from ..rows.tally import Tally
from .folder import remove_scratch
from .inputs import SPOOL
from .ledger import ShardRecord
from .rounds import account_of, rows_name, stray_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..providers.base import Provider
    from .folder import JobFolder
    from .job import Job
    from .ledger import Ledger

Ended: TypeAlias = "tuple[ShardRecord, Batch | None]"
"""A shard and its batch in its final state; None where that is lost, and the job goes on without it."""


@dataclass(frozen=True)
class Gathered:
    """All rows of a job as they stand once a round has ended, put together in a scratch folder."""

    scratch: Path
    ended: list[Ended]
    tally: Tally

    @property
    def accounts(self) -> list[BatchRecord]:
        """The batches of the round that has ended, as the report tells of them."""
        return [account_of(record, batch) for record, batch in self.ended]

    @property
    def rows(self) -> Path:
        return self.scratch / "results.jsonl"

    @property
    def stray(self) -> Path:
        return self.scratch / "stray.jsonl"


def land(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Flow[Report]:
    """Land, unless another attempt has landed the same batches by now, or has gone on with the job."""
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
                f"job {ledger.job} was submitted anew by another attempt meanwhile; nothing was landed"
            )
        if now.landed_at is not None and (theirs := (yield from do(folder.read_report))) is not None:
            return theirs
        ledger = now


def submission_of(ledger: Ledger) -> object:
    """What must be the same still for the same results to be right."""
    return ledger.fingerprint, [(record.round, record.batch_id, record.tries) for record in ledger.shards]


def put(folder: JobFolder, gathered: Gathered, report: Report) -> None:
    """Results first, then the report: whoever sees the report finds the results complete; under the lock."""
    folder.put(gathered.rows, "results.jsonl")
    if gathered.stray.stat().st_size:
        folder.put(gathered.stray, "stray.jsonl")
    else:
        folder.discard("stray.jsonl")  # an earlier landing's
    folder.replace("report.json", report.model_dump_json(indent=1).encode())
    # Now, not later: once the job is noted as landed nobody looks for what a kill has left.
    if folder.local is not None:
        remove_scratch(gathered.scratch)


def remove_leftovers(job: Job, landed: Ledger) -> None:
    """Remove what nothing needs any more: the rows of earlier rounds, which are in the results, and the
    request lines.
    """
    folder = job.folder
    names = [name(number) for number in range(1, landed.round) for name in (rows_name, stray_name)]
    if job.keep_requests != "always" and landed.input is None:
        names.append(SPOOL)
    if names:
        with folder.locked():
            if folder.read() == landed:
                folder.discard(*names)


def make_report(job: Job, provider: Provider, ledger: Ledger, gathered: Gathered) -> Report:
    """The account of a job from its rows."""
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
    """The account of rows that were gathered, after those of the batches `before`."""
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
        batches=(*before, *gathered.accounts),
        results=results,
    )
