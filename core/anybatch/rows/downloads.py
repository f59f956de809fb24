"""Download a batch's result files until they hold as many rows as the provider counts.

A silently truncated body, an HTML page instead of a result file, files that the batch names only a little
after it has ended: each looks like a batch with fewer rows. Paid rows must not land as `missing` because of
that, so incomplete files are downloaded again until a settling time is over.
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

# All in seconds, from the first download of an ended batch.
# How long to download incomplete files again; we have seen a server name its files minutes after the end.
SETTLING = 300.0
# How long to ask again for a result file that answers 404.
GONE_AFTER = 900.0
# How long to download again if the files hold all rows that the provider counts, but it counts fewer rows
# than were sent: it may still be counting.
DOUBT = 15.0
_LATE = "the provider has not named its results yet"
PAUSES = (2.0, 5.0, 10.0, 20.0, 40.0)  # between two downloads; the last one repeats


class Measured(Protocol):
    """What was found in result files.

    Attributes:
        answered: The number of rows that have a line.
        ran: Those of them that the provider has run, which excludes expired and cancelled ones.
        succeeded: Those of them that succeeded.
        torn: The number of rows whose line breaks off at the end of a file.
        unclear: The number of lines that cannot be attributed to a row.
        breaks_off: Whether any line breaks off at the end of a file.
        problem: What is wrong with a file that is no result file at all; None if there is none.
    """

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
    """How many rows the result files of a batch must hold.

    Attributes:
        rows: All rows that they must hold.
        succeeded: The succeeded rows that they must hold.
        uncounted: The rows of the batch that the provider does not count at all.
    """

    rows: int
    succeeded: int
    uncounted: int = 0

    def and_also(self, later: Owed) -> Owed:
        """Combine with later counts: the higher ones hold, since counts may lag and even decrease."""
        fewest = min(self.uncounted, later.uncounted)
        return Owed(max(self.rows, later.rows), max(self.succeeded, later.succeeded), fewest)


def owed(batch: Batch, sent: int | None) -> Owed:
    """Return how many rows an ended batch's result files must hold, by the provider's counts.

    `sent` is the number of rows that the batch held, if known. A completed batch without counts must hold a
    line for every row, but only one of them must have succeeded.
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
    """Return how many of the promised rows were found.

    Some providers count rows that were never run as failed: then a line of such a row is a promised one.
    Others do not count them at all: then such a line must not stand in for a lost result.
    """
    never_run = found.answered - found.ran
    return found.ran + max(0, never_run - promised.uncounted)


def lacking(found: Measured, promised: Owed) -> str | None:
    """Return why result files are incomplete, or None if they are complete."""
    if found.problem is not None:
        return found.problem
    if found.breaks_off:
        return "a file ends in the middle of a line"
    if (rows := held(found, promised)) < promised.rows:
        return f"they hold {rows} of the {promised.rows} rows that the provider counts"
    return None


def is_loss(found: Measured, promised: Owed) -> bool:
    """Whether paid results are lacking.

    With some providers failed rows have no line, which is no loss. A line that stays broken loses only its
    own row.
    """
    broken = found.torn + found.unclear
    rows, succeeded = held(found, promised) + broken, found.succeeded + broken
    return rows < promised.rows and succeeded < promised.succeeded


@dataclass(frozen=True)
class Fetched(Generic[M]):
    """Downloaded result files.

    Attributes:
        batch: The batch, as last seen.
        paths: The files.
        found: What was found in them.
        loss: Why results are lost that the files should hold; None if none are.
    """

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
    """Download a batch's result files; while they are incomplete, download them again for a limited time."""
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
            log.info("batch %s: its results are not complete yet (%s); downloading again", batch.id, what)
        pause = PAUSES[min(looks, len(PAUSES) - 1)]
        yield from sleep(pause)
        waited, looks = waited + pause, looks + 1
        with suppress(NotFoundError):
            now: Batch = yield from provider.retrieve(batch.id)
            if now.status.is_terminal:  # otherwise a lagging replica has answered
                batch, promised = now, promised.and_also(owed(now, sent))


def _patience(
    batch: Batch, sent: int | None, found: Measured, short: str | None, gone: NotFoundError | None
) -> float:
    """Return how long to keep downloading, in seconds from the first download; 0 if all is complete."""
    if gone is not None:
        return GONE_AFTER
    if short is not None:
        return SETTLING
    # A provider that completes a batch and counts fewer rows than were sent may still be counting.
    is_doubtful = batch.status is BatchStatus.COMPLETED and sent is not None and found.answered < sent
    return DOUBT if is_doubtful else 0.0


def _loss(
    batch: Batch, found: Measured, promised: Owed, short: str | None, gone: NotFoundError | None
) -> AnyBatchError | None:
    is_short = held(found, promised) < promised.rows
    if gone is not None:
        return gone if is_short or not promised.rows else None
    if found.problem is not None and is_short:
        return ServerError(f"{found.problem}; nothing of the batch was landed", batch_id=batch.id)
    if is_loss(found, promised) or short == _LATE:
        return ServerError(
            f"the batch is {batch.status}, but its result files are not complete: {short}. They may be "
            "complete later: collect the batch again",
            batch_id=batch.id,
        )
    return None


# --- without a job, the custom_ids are not known ----------------------------------------------------------


class Counted(NamedTuple):
    """A `Measured` by the distinct custom_ids in result files."""

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
    """Count the rows in result files; if a row has two lines, a success counts."""
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
                elif not row.custom_id or row.custom_id in outcomes:  # some servers accept an id twice
                    unclear += 1
                if row.custom_id and (record is not None or raw.endswith(b"\n")):
                    good = row.outcome is Outcome.SUCCEEDED or record is None
                    outcomes[row.custom_id] = good or outcomes.get(row.custom_id, False)
                    if row.outcome not in NEVER_RUN:
                        ran.add(row.custom_id)
    return Counted(len(outcomes), len(ran), sum(outcomes.values()), torn, unclear)
