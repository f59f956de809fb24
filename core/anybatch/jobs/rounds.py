"""Rounds: which rows are submitted again, and how their new outcomes are merged with the old ones.

A round's rows are a part of the input's rows, in the same order, so files are merged side by side in constant
memory.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import orjson

from ..errors import JobError, classify, error_of
from ..models import BatchRecord, BatchStatus, Outcome, Row
from ..rows.results import landed_outcome, parse_landed
from .ledger import ShardRecord
from .lost import RESULTS_LOST

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from ..models import Batch
    from ..rows.planning import Plan
    from ..rows.tally import Tally
    from .job import Job
    from .ledger import Ledger

# How often one attempt resubmits rows of cancelled batches and lost results: otherwise a person who keeps
# cancelling, or a provider that keeps losing, would make it resubmit without end.
MAX_RECOVERIES = 2


def ids_name(number: int) -> str:
    """The name of the file with a round's custom_ids, in a job's folder."""
    return f"ids-{number}.jsonl" if number > 1 else "ids.jsonl"


def rows_name(number: int) -> str:
    """The name of the file with all rows as of the end of a round."""
    return f"round-{number}.jsonl"


def stray_name(number: int) -> str:
    """The name of the file with all stray lines as of the end of a round."""
    return f"stray-{number}.jsonl"


def ids_of_shards(ids: Iterable[bytes], records: Iterable[ShardRecord], row: int = 0) -> Iterator[bytes]:
    """Yield the ids of these shards from those of their round; the next id read is that of row `row`."""
    lines = iter(ids)
    for record in records:
        start = record.first_row - row
        yield from islice(lines, start, start + record.rows)
        row = record.first_row + record.rows


# --- which rows ------------------------------------------------------------------------------------------


def worth_repeating(row: Row) -> bool:
    """Whether the row may succeed if the same request is sent again."""
    match row.outcome:
        case Outcome.EXPIRED | Outcome.MISSING | Outcome.CANCELLED:
            return True
        case Outcome.FAILED:
            return _may_pass(row.status_code, row.error.code if row.error else None)
        case _:
            return False


def _may_pass(status: int | None, code: str | None) -> bool:
    if status is None and code is not None and re.fullmatch(r"[45]\d\d", code):
        status = int(code)  # some servers send the HTTP status as the error code
    return classify(error_of(status, code)("", code=code, status_code=status)).row_again


def is_lost(row: Row) -> bool:
    """Whether the provider has lost the row's result, which may have been paid for."""
    return row.outcome is Outcome.MISSING and row.error is not None and row.error.code == RESULTS_LOST


class Budget(NamedTuple):
    """Which rows may be submitted again.

    Attributes:
        repeat: Rows that expired, are missing, or failed with an error that may be temporary.
        cancelled: Rows of cancelled batches.
        lost: Rows whose results the provider has lost.
    """

    repeat: bool
    cancelled: bool
    lost: bool = False

    def covers(self, row: Row, *, batch_cancelled: bool) -> bool:
        """Whether this row may be submitted again, given whether its whole batch was cancelled."""
        if is_lost(row):
            return self.lost
        if row.outcome is Outcome.CANCELLED:
            return batch_cancelled and self.cancelled
        return self.repeat and worth_repeating(row)


def budget(job: Job, ledger: Ledger, statuses: Collection[BatchStatus]) -> Budget:
    """Decide what may be submitted again, given the final statuses of the current round's batches.

    Rounds that only replace cancelled batches and lost results do not count against `max_rounds`. A stopped
    job submits nothing again, unless it has landed and `max_rounds` is now higher.
    """
    if ledger.stopped_at is not None and (ledger.landed_at is None or job.max_rounds <= ledger.max_rounds):
        return Budget(repeat=False, cancelled=False)
    return Budget(
        repeat=ledger.round - ledger.recovery_rounds < job.max_rounds,
        cancelled=BatchStatus.CANCELLED in statuses and ledger.recoveries < MAX_RECOVERIES,
        lost=job.on_lost == "resubmit" and ledger.recoveries < MAX_RECOVERIES,
    )


def is_covered(job: Job, ledger: Ledger) -> bool:
    """Whether the current round is within `max_rounds`; a new attempt may have lowered that."""
    return ledger.round - ledger.recovery_rounds <= job.max_rounds


def fills_batches(rows: int, least: int, most: int) -> bool:
    """Whether so many rows can be split into batches of at least and at most so many requests.

    They are split as `rows.planning` does: full batches, of which the last two may share their rows.
    """
    if rows <= most:
        return rows >= least
    last = rows % most or most
    return last >= least or most + last >= 2 * least


class Chosen(NamedTuple):
    """How many rows are submitted again, and how many of them were cancelled with their batch, or lost."""

    rows: int = 0
    cancelled: int = 0
    lost: int = 0


def choose(
    rows: Iterable[bytes],
    ids: Iterable[bytes],
    cancelled_ids: Iterable[bytes] | None,
    allowed: Budget,
    out: BinaryIO,
) -> Chosen:
    """Write the ids of the rows that are submitted again.

    `rows` are landed lines and `ids` their ids. `cancelled_ids` are the ids of the rows whose batch was
    cancelled, in the same order; None counts every row as such. Raises JobError if `rows` and `ids` differ.
    """
    chosen = cancelled = lost = 0
    try:
        for custom_id, raw, batch_cancelled in _paired(rows, ids, cancelled_ids):
            if landed_outcome(raw) is Outcome.SUCCEEDED:
                continue
            row = parse_landed(raw)
            if row.custom_id != orjson.loads(custom_id):
                raise ValueError(
                    f"a row's custom_id is {row.custom_id!r} instead of {custom_id.decode().strip()}"
                )
            if allowed.covers(row, batch_cancelled=batch_cancelled):
                out.write(custom_id)
                chosen += 1
                cancelled += row.outcome is Outcome.CANCELLED
                lost += is_lost(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"the files of earlier rounds were changed, or do not match: {error}") from None
    return Chosen(chosen, cancelled, lost)


def _paired(
    rows: Iterable[bytes], ids: Iterable[bytes], some: Iterable[bytes] | None
) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield each row's id and line, and whether its id is among `some` (None means that every id is)."""
    others = iter(some or ())
    wanted = next(others, None)
    for custom_id, raw in zip(ids, rows, strict=True):
        found = custom_id == wanted
        if found:
            wanted = next(others, None)
        yield custom_id, raw, found or some is None


# --- their new outcomes ----------------------------------------------------------------------------------


def fold(
    rows: Iterable[bytes],
    ids: Iterable[bytes],
    later: Iterable[bytes],
    later_ids: Iterable[bytes],
    out: BinaryIO,
    tally: Tally,
) -> None:
    """Write all rows as of the end of one more round: a success wins over any other outcome, then the latest.

    `rows` and `later` are landed lines in input order. `tally` is that of the later rows; at the end it
    counts every row once, and the tokens of all rounds. Raises JobError if lines and ids differ.
    """
    tally.counts.clear()
    new = iter(later)
    try:
        for _, raw, again in _paired(rows, ids, later_ids):
            answer = next(new) if again else raw
            outcome = landed_outcome(raw)
            if outcome is Outcome.SUCCEEDED:
                answer = raw
                if (body := parse_landed(raw).result) is not None:
                    tally.add_body(body)
            elif again:
                outcome = landed_outcome(answer)
            tally.counts[outcome] += 1
            out.write(answer)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise JobError(f"the files of earlier rounds were changed, or do not match: {error!r}") from None


# --- the ledger ------------------------------------------------------------------------------------------


def record_of_batch(record: ShardRecord, batch: Batch | None) -> BatchRecord:
    """Return a batch as the report describes it; `batch` is None if the provider has lost it."""
    if batch is None:
        return BatchRecord(
            id=record.batch_id or "",
            shard=record.shard,
            round=record.round,
            rows=record.rows,
            status=BatchStatus.UNKNOWN,
            input_file_id=record.file_id,
        )
    return BatchRecord(
        id=batch.id,
        shard=record.shard,
        round=record.round,
        rows=record.rows,
        status=batch.status,
        created_at=batch.created_at,
        ended_at=batch.ended_at,
        input_file_id=batch.input_file_id or record.file_id,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
    )


def records_of(plan: Plan, number: int = 1) -> tuple[ShardRecord, ...]:
    """Return the records of a planned round's shards, none of which is uploaded yet."""
    return tuple(
        ShardRecord(shard=shard, round=number, first_row=part.first_row, rows=part.rows)
        for shard, part in enumerate(plan.shards)
    )


def next_round(
    ledger: Ledger,
    shards: Sequence[ShardRecord],
    ended: Sequence[BatchRecord],
    unexpected: int,
    chosen: Chosen,
    *,
    counts: bool = False,
) -> Ledger:
    """Return the ledger with one more round of these shards.

    `ended` are the batches of the round before and `unexpected` its stray lines. `counts` says that the user
    asked for the round, so that it counts against `max_rounds` even if it only replaces cancelled batches.
    """
    batches = {(batch.shard, batch.round): batch for batch in ended}
    before = tuple(
        record.model_copy(update={"ended": batches.get((record.shard, record.round), record.ended)})
        for record in ledger.shards
    )
    recovered = chosen.cancelled + chosen.lost
    update = {
        "shards": (*before, *shards),
        "landed_at": None,
        "stopped_at": None,
        "recovery_rounds": ledger.recovery_rounds + (not counts and recovered == chosen.rows),
        "recoveries": ledger.recoveries + (recovered > 0 and (not counts or chosen.lost > 0)),
        "lost_round": ledger.round + 1 if chosen.lost else ledger.lost_round,
        "unexpected": unexpected,
    }
    return ledger.model_copy(update=update)
