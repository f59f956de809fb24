"""Landing of batches that no job has created: all we know of them is their ids.

Their rows land like a job's, whole or not at all, with two differences: they come in the provider's order,
and a row without a result line is counted but has no line in `results.jsonl`, since its custom_id is unknown.
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
    """Land the rows of ended batches, batch after batch, replacing what the folder holds.

    Args:
        provider: The account that has the batches.
        batch_ids: Their ids; repeated ones count once.
        folder: Where to land.
        endpoint: Their endpoint, for providers that do not report it.
        identity: The name of the job in the report; by default the folder's path.
        price: USD per million input tokens and per million output tokens, if the provider reports no cost.

    Returns:
        The report.

    Raises:
        ConfigurationError: There is no batch id, or the folder belongs to a job.
        BatchNotCompleteError: A batch still runs.
        BatchFailedError: The provider refused a batch as a whole.
        NotFoundError: There is no such batch, or its result file is gone.
        ServerError: Result files stayed incomplete. After any error the folder is as it was.
    """
    if not batch_ids:
        raise ConfigurationError("batch_ids: there is no batch to land; pass at least one id")
    yield from do(partial(_refuse_folder_of_job, folder))
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


def _refuse_folder_of_job(folder: JobFolder) -> None:
    """Raise if a job lives here: these rows may be only a part of its results, and must not replace them."""
    if (ledger := folder.read()) is not None:
        raise ConfigurationError(f"{folder.path} holds job {ledger.job!r}; give `output` a folder of its own")


def _put(folder: JobFolder, gathered: Gathered, report: Report) -> None:
    with folder.locked():
        _refuse_folder_of_job(folder)  # one may have begun during the downloads
        put(folder, gathered, report)


class _Landing:
    """Writes the rows of one batch after the other."""

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
        # A line whose id cannot be read counts as a row, as long as the batch has that many rows.
        nameless = min(found.unclear, rows - len(ids))
        for _ in range(nameless):
            problem = RowError(UNDECODABLE, "This row's line cannot be read; it is kept in stray.jsonl.")
            self._out.write(landed_line(Row("", Outcome.FAILED, None, problem)))
        tally.counts[Outcome.FAILED] += nameless
        tally.unexpected -= nameless
        if unmentioned := rows - len(ids) - nameless:
            tally.counts[unanswered("", batch.status).outcome] += unmentioned
            log.warning(
                "batch %s: %d rows are not in its result files, and so have no line in results.jsonl",
                batch.id, unmentioned,
            )  # fmt: skip
        record = ShardRecord(
            shard=len(self._gathered.ended), first_row=self.rows, rows=rows, batch_id=batch.id
        )
        self._gathered.ended.append((record, batch))
        self.rows += rows
        for path in fetched.paths:
            path.unlink()
