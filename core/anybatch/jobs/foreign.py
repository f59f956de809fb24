"""Landing of batches that no job of ours has made: all that is known of them is their ids.

Their rows land as a job's do, whole or not at all, but for two things: they come in the provider's order, and
a row that no line speaks of is counted and has no line, since its custom_id is not known.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ConfigurationError
from ..flow import Flow, do
from ..models import Outcome, Row, RowError
from ..rows.downloads import Fetched, fetch
from ..rows.merge import Index, merge, unanswered
from ..rows.results import UNDECODABLE, landed_line
from ..rows.tally import Tally
from .collect import ended_batch
from .landing import Gathered, put, report_of
from .ledger import ShardRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models import Batch, Report
    from ..providers.base import Provider
    from .folder import JobFolder

log = logging.getLogger(__name__)


def land_batches(
    provider: Provider,
    batch_ids: Sequence[str],
    folder: JobFolder,
    *,
    endpoint: str | None = None,
    identity: str | None = None,
    price: tuple[float, float] | None = None,
) -> Flow[Report]:
    """Land the rows of ended batches, batch after batch, in place of what the folder has.

    Raises BatchNotCompleteError and BatchFailedError before anything is fetched, ConfigurationError where the
    folder is a job's, and what is lost, as a job does: then nothing is replaced.
    """
    if not batch_ids:
        raise ConfigurationError("there is no batch to land")
    if (ledger := (yield from do(folder.read))) is not None:
        # A job lands its results itself, and a part of them is not to replace them.
        raise ConfigurationError(f"{folder.path} holds job {ledger.job!r}; give `output` a folder of its own")
    batches = []
    for batch_id in dict.fromkeys(batch_ids):
        batches.append((yield from ended_batch(provider, batch_id)))  # noqa: PERF401  `yield from` has no comprehension
    with (yield from do(folder.scratch)) as scratch:
        gathered = Gathered(scratch, [], Tally())
        with ExitStack() as files:
            landing = yield from do(partial(_Landing, gathered, files))
            for batch in batches:
                measure = partial(
                    Index, custom_ids=None, provider=provider, endpoint=endpoint or batch.endpoint,
                    rows=_total(batch),
                )  # fmt: skip
                fetched = yield from fetch(provider, batch, scratch, measure)
                if fetched.loss is not None:
                    raise fetched.loss
                yield from do(partial(landing.add, fetched))
        report = report_of(
            gathered,
            job=identity or str(folder.path),
            provider=provider.name,
            endpoint=endpoint or next((one.endpoint for one in batches if one.endpoint), ""),
            rows=landing.rows,
            started_at=min((one.created_at for one in batches if one.created_at), default=time.time()),
            price=price,
            results=str(folder / "results.jsonl"),
        )
        yield from do(partial(_put, folder, gathered, report))
        return report


def _total(batch: Batch) -> int:
    return batch.request_counts.total if batch.request_counts else 0


def _put(folder: JobFolder, gathered: Gathered, report: Report) -> None:
    with folder.locked():
        put(folder, gathered, report)


class _Landing:
    """The rows of one batch after the other, as they are written."""

    def __init__(self, gathered: Gathered, files: ExitStack) -> None:
        self._gathered, self.rows = gathered, 0
        self._out: BinaryIO = files.enter_context(gathered.rows.open("wb", buffering=1 << 20))
        self._stray: BinaryIO = files.enter_context(gathered.stray.open("wb"))

    def add(self, fetched: Fetched[Index]) -> None:
        found, batch, tally = fetched.found, fetched.batch, self._gathered.tally
        ids = list(found.places)
        merge(found, ids, batch.status, self._out, self._stray, tally)
        total = _total(batch)
        rows = max(total, len(ids)) if total else len(ids) + found.unclear
        # A line whose id cannot be read is a row all the same, if there are as many.
        nameless = min(found.unclear, rows - len(ids))
        for _ in range(nameless):
            problem = RowError(UNDECODABLE, "The line of this row cannot be read; it is in stray.jsonl.")
            self._out.write(landed_line(Row("", Outcome.FAILED, None, problem)))
        tally.counts[Outcome.FAILED] += nameless
        tally.unexpected -= nameless
        if unmentioned := rows - len(ids) - nameless:
            tally.counts[unanswered("", batch.status).outcome] += unmentioned
            log.warning("batch %s: %d rows are in none of its files and have no line", batch.id, unmentioned)
        record = ShardRecord(
            shard=len(self._gathered.ended), first_row=self.rows, rows=rows, batch_id=batch.id
        )
        self._gathered.ended.append((record, batch))
        self.rows += rows
        for path in fetched.paths:
            path.unlink()
