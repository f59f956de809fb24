"""A batch's result files, fetched until they hold what the provider says they hold.

A body that is cut short without a sign of it, a page that is no result file, files that are named a little
after the batch has ended: each looks like a batch with fewer rows. Rows that were paid for must not land as
`missing` for that, so what is short is asked for again until a settling time is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from ..errors import AnyBatchError, NotFoundError, ServerError
from ..flow import Flow, do, sleep
from ..models import Batch, BatchStatus, Outcome
from ..providers.traits import Results
from .requests import iter_lines
from .results import NEVER_RUN, decode_line

if TYPE_CHECKING:
    from ..providers.base import Provider

log = logging.getLogger(__name__)

# How long what is short is asked for again after we have seen that the batch ended, seconds; a real server
# named its files minutes later.
SETTLING = 300.0
# How long a result file that answers 404 is asked for again, seconds.
GONE_AFTER = 900.0
# The same for files that hold all that the provider counts, where it counts fewer rows than were sent.
DOUBT = 15.0
_LATE = "the provider has not named its results yet"
PAUSES = (2.0, 5.0, 10.0, 20.0, 40.0)  # between two looks, seconds; the last one from then on


class Measured(Protocol):
    """What was found in result files: rows with a line, those of them that were run, those that succeeded,
    those whose line breaks off at the end of a file; whether any line does; lines that cannot be told whose
    they are; and what a file is that is something else."""

    @property
    def answered(self) -> int: ...
    @property
    def ran(self) -> int: ...
    @property
    def succeeded(self) -> int: ...
    @property
    def torn(self) -> int: ...
    @property
    def unclear(self) -> int: ...
    @property
    def breaks_off(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...


M = TypeVar("M", bound=Measured)


class Owed(NamedTuple):
    """How many rows the result files of a batch must hold: in all, and of rows that succeeded; and how many
    rows are in no count."""

    rows: int
    succeeded: int
    uncounted: int = 0

    def and_also(self, later: Owed) -> Owed:
        """What was promised once stays so: counts may lag, and even go back."""
        fewest = min(self.uncounted, later.uncounted)
        return Owed(max(self.rows, later.rows), max(self.succeeded, later.succeeded), fewest)


def owed(batch: Batch, sent: int | None) -> Owed:
    """What the provider's counts promise of a batch that has ended and held `sent` rows (None: not known).

    A completed batch without counts promises results, but where it does not say of how many rows it may have
    none for some of them.
    """
    counts = batch.request_counts
    done = counts.completed + counts.failed if counts is not None else 0
    if not done and batch.status is BatchStatus.COMPLETED:
        every = sent if sent is not None else counts.total if counts is not None else 1
        return Owed(every, min(every, 1))
    if counts is None:
        return Owed(0, 0)
    most = done if sent is None else min(done, sent)
    every = counts.total if sent is None else sent
    return Owed(most, min(counts.completed, most), max(0, every - most))


def held(found: Measured, promised: Owed) -> int:
    """How many of the promised rows were found.

    Some providers count rows that were never run as failed: a line for such a row is a promised one there.
    Others have them in no count: taken for promised ones, these lines would make up for lost answers.
    """
    never_run = found.answered - found.ran
    return found.ran + max(0, never_run - promised.uncounted)


def lacking(found: Measured, promised: Owed) -> str | None:
    """What is wrong with result files that are not what was promised; None where they are complete."""
    if found.problem is not None:
        return found.problem
    if found.breaks_off:
        return "a file ends in the middle of a line"
    if (rows := held(found, promised)) < promised.rows:
        return f"they hold {rows} of the {promised.rows} rows that the provider counts"
    return None


def is_loss(found: Measured, promised: Owed) -> bool:
    """Whether what is lacking was paid for. Rows that failed may have no line with some providers, and a line
    that is always broken costs its own row only."""
    broken = found.torn + found.unclear
    rows, succeeded = held(found, promised) + broken, found.succeeded + broken
    return rows < promised.rows and succeeded < promised.succeeded


@dataclass(frozen=True)
class Fetched(Generic[M]):
    """Result files, what was found in them, and why rows are lost that they should hold (None: none are)."""

    batch: Batch
    paths: list[Path]
    found: M
    loss: AnyBatchError | None


def fetch(
    provider: Provider,
    batch: Batch,
    directory: Path,
    measure: Callable[[Sequence[Path]], M],
    *,
    sent: int | None = None,
) -> Flow[Fetched[M]]:
    """Download a batch's result files, and again as long as they are not complete, for a while."""
    waited, looks, promised = 0.0, 0, owed(batch, sent)
    while True:
        gone: NotFoundError | None = None
        paths: list[Path] = []
        state = provider.results(batch)
        try:
            if state is Results.READY:
                paths = yield from provider.download(batch, directory)
        except NotFoundError as error:
            gone, paths = error, getattr(error, "paths", [])
        found = yield from do(partial(measure, paths))
        short = lacking(found, promised) or (_LATE if state is Results.NOT_YET else None)
        patience = _patience(batch, sent, found, short, gone)
        if waited >= patience:
            return Fetched(batch, paths, found, _loss(batch, found, promised, short, gone))
        if not looks:
            what = gone or short or "fewer rows than were sent"
            log.info("batch %s: its results are not complete yet (%s); asking again", batch.id, what)
        pause = PAUSES[min(looks, len(PAUSES) - 1)]
        yield from sleep(pause)
        waited, looks = waited + pause, looks + 1
        with suppress(NotFoundError):
            now: Batch = yield from provider.retrieve(batch.id)
            if now.status.is_terminal:  # else a replica that lags
                batch, promised = now, promised.and_also(owed(now, sent))


def _patience(
    batch: Batch, sent: int | None, found: Measured, short: str | None, gone: NotFoundError | None
) -> float:
    """How long to ask again for what was found, seconds from the first look; 0 where it is complete."""
    if gone is not None:
        return GONE_AFTER
    if short is not None:
        return SETTLING
    # Who completes a batch and counts fewer rows than were sent may not have counted to the end.
    is_doubtful = batch.status is BatchStatus.COMPLETED and sent is not None and found.answered < sent
    return DOUBT if is_doubtful else 0.0


def _loss(
    batch: Batch, found: Measured, promised: Owed, short: str | None, gone: NotFoundError | None
) -> AnyBatchError | None:
    is_short = held(found, promised) < promised.rows
    if gone is not None:
        return gone if is_short or not promised.rows else None
    if found.problem is not None and is_short:
        return ServerError(f"{found.problem}, and nothing of it was landed", batch_id=batch.id)
    if is_loss(found, promised) or short == _LATE:
        return ServerError(
            f"the batch is {batch.status}, but its result files are not complete: {short}. To collect it "
            "again may find them complete",
            batch_id=batch.id,
        )
    return None


# --- without a job: who asks knows no custom_ids --------------------------------------------------------


class Counted(NamedTuple):
    """Distinct custom_ids in result files."""

    answered: int
    ran: int
    succeeded: int
    torn: int
    unclear: int = 0
    problem: str | None = None

    @property
    def breaks_off(self) -> bool:
        return self.torn > 0


def count_rows(provider: Provider, endpoint: str | None, paths: Sequence[Path]) -> Counted:
    """Count the rows in result files; of two lines for one row a success counts."""
    outcomes: dict[str, bool] = {}
    ran: set[str] = set()
    torn = unclear = 0
    for path in paths:
        with path.open("rb") as file:
            for _, raw in iter_lines(file):
                if raw.isspace():
                    continue
                row, record = decode_line(raw, provider, endpoint)
                if record is None and not raw.endswith(b"\n"):
                    torn += 1
                elif not row.custom_id or row.custom_id in outcomes:  # some servers take an id twice
                    unclear += 1
                if row.custom_id and (record is not None or raw.endswith(b"\n")):
                    good = row.outcome is Outcome.SUCCEEDED or record is None
                    outcomes[row.custom_id] = good or outcomes.get(row.custom_id, False)
                    if row.outcome not in NEVER_RUN:
                        ran.add(row.custom_id)
    return Counted(len(outcomes), len(ran), sum(outcomes.values()), torn, unclear)
