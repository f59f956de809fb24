"""Rounds of re-submission: which rows go again, and how their later outcomes fold into the earlier ones.

A round's rows are a part of the input's, in the same order; so files are folded and searched side by side, in
constant memory.
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

# How often rows of cancelled batches and lost answers are submitted again in one attempt: somebody may insist
# on cancelling, and a provider on losing.
MAX_RECOVERIES = 2


def ids_name(number: int) -> str:
    """The file of a round's custom_ids, in a job's folder."""
    return f"ids-{number}.jsonl" if number > 1 else "ids.jsonl"


def rows_name(number: int) -> str:
    """The file of all rows as they stood when a round had ended."""
    return f"round-{number}.jsonl"


def stray_name(number: int) -> str:
    """The file of the stray lines up to then."""
    return f"stray-{number}.jsonl"


def part_of(ids: Iterable[bytes], records: Iterable[ShardRecord], row: int = 0) -> Iterator[bytes]:
    """The ids of these shards out of those of their round, of which the first to come is that of `row`."""
    lines = iter(ids)
    for record in records:
        start = record.first_row - row
        yield from islice(lines, start, start + record.rows)
        row = record.first_row + record.rows


# --- which rows ------------------------------------------------------------------------------------------


def worth_repeating(row: Row) -> bool:
    """Whether the same request may be answered if it is sent again."""
    match row.outcome:
        case Outcome.EXPIRED | Outcome.MISSING | Outcome.CANCELLED:
            return True
        case Outcome.FAILED:
            return _may_pass(row.status_code, row.error.code if row.error else None)
        case _:
            return False


def _may_pass(status: int | None, code: str | None) -> bool:
    if status is None and code is not None and re.fullmatch(r"[45]\d\d", code):
        status = int(code)  # some servers call an error by its HTTP status
    return classify(error_of(status, code)("", code=code, status_code=status)).row_again


def is_lost(row: Row) -> bool:
    """Whether the provider has lost the answer, which may have been paid for."""
    return row.outcome is Outcome.MISSING and row.error is not None and row.error.code == RESULTS_LOST


class Budget(NamedTuple):
    """What may be submitted again: rows that ended badly, rows of batches that were cancelled, and rows whose
    results the provider has lost."""

    repeat: bool
    cancelled: bool
    lost: bool = False

    def covers(self, row: Row, *, dead: bool) -> bool:
        """Whether this row goes again; `dead`: its batch was cancelled, and not just the row."""
        if is_lost(row):
            return self.lost
        if row.outcome is Outcome.CANCELLED:
            return dead and self.cancelled
        return self.repeat and worth_repeating(row)


def budget(job: Job, ledger: Ledger, statuses: Collection[BatchStatus]) -> Budget:
    """What may be submitted again once the batches of the current round have ended like this.

    Rounds for cancelled batches and lost results alone do not count against `max_rounds`. Of a job that was
    stopped nothing, unless it has landed so and is submitted with more rounds than before.
    """
    if ledger.stopped_at is not None and (ledger.landed_at is None or job.max_rounds <= ledger.max_rounds):
        return Budget(repeat=False, cancelled=False)
    return Budget(
        repeat=ledger.round - ledger.recovery_rounds < job.max_rounds,
        cancelled=BatchStatus.CANCELLED in statuses and ledger.recoveries < MAX_RECOVERIES,
        lost=job.on_lost == "resubmit" and ledger.recoveries < MAX_RECOVERIES,
    )


def is_covered(job: Job, ledger: Ledger) -> bool:
    """Whether the current round is within `max_rounds`, which may have been lowered since it was opened."""
    return ledger.round - ledger.recovery_rounds <= job.max_rounds


class Chosen(NamedTuple):
    """How many rows go again, and how many of them only because their batch was cancelled or lost."""

    rows: int = 0
    cancelled: int = 0
    lost: int = 0


def choose(
    rows: Iterable[bytes], ids: Iterable[bytes], dead: Iterable[bytes] | None, allowed: Budget, out: BinaryIO
) -> Chosen:
    """Write the ids of the rows that go again.

    `rows` are landed lines, `ids` their ids; `dead`, in the same order, the ids of the rows whose batch was
    cancelled (None: any may be). Raises JobError where the lines are not the rows of these ids.
    """
    chosen = cancelled = lost = 0
    try:
        for custom_id, raw, is_dead in _beside(rows, ids, dead):
            if landed_outcome(raw) is Outcome.SUCCEEDED:
                continue
            row = parse_landed(raw)
            if row.custom_id != orjson.loads(custom_id):
                raise ValueError(f"a row is {row.custom_id!r} in place of {custom_id.decode().strip()}")
            if allowed.covers(row, dead=is_dead):
                out.write(custom_id)
                chosen += 1
                cancelled += row.outcome is Outcome.CANCELLED
                lost += is_lost(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"the rows of earlier rounds are not as they were written: {error}") from None
    return Chosen(chosen, cancelled, lost)


def _beside(
    rows: Iterable[bytes], ids: Iterable[bytes], some: Iterable[bytes] | None
) -> Iterator[tuple[bytes, bytes, bool]]:
    """The id and line of each row, and whether its id is among `some` (None: each is)."""
    others = iter(some or ())
    wanted = next(others, None)
    for custom_id, raw in zip(ids, rows, strict=True):
        found = custom_id == wanted
        if found:
            wanted = next(others, None)
        yield custom_id, raw, found or some is None


# --- their later outcomes --------------------------------------------------------------------------------


def fold(
    rows: Iterable[bytes],
    ids: Iterable[bytes],
    later: Iterable[bytes],
    later_ids: Iterable[bytes],
    out: BinaryIO,
    tally: Tally,
) -> None:
    """Write all rows as they stand after one more round: a success wins, else the latest outcome.

    All are landed lines in input order. `tally` is that of the later rows; in the end it counts every row
    once, and the tokens of both. Raises JobError where the lines are not the rows of these ids.
    """
    tally.counts.clear()
    new = iter(later)
    try:
        for _, raw, again in _beside(rows, ids, later_ids):
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
        raise JobError(f"the rows of earlier rounds are not as they were written: {error!r}") from None


# --- the ledger ------------------------------------------------------------------------------------------


def account_of(record: ShardRecord, batch: Batch | None) -> BatchRecord:
    """A batch that has ended, or is lost (None), as the report tells of it."""
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
    """The shards of a round of which nothing has been done."""
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
    """The ledger with one more round, of these shards.

    `ended` are the batches before, with so many stray lines. `counts`: somebody has asked for it, so that it
    counts against `max_rounds`, whatever its rows are.
    """
    accounts = {(account.shard, account.round): account for account in ended}
    before = tuple(
        record.model_copy(update={"ended": accounts.get((record.shard, record.round), record.ended)})
        for record in ledger.shards
    )
    recovered = chosen.cancelled + chosen.lost
    update = {
        "shards": (*before, *shards),
        "landed_at": None,
        "stopped_at": None,
        "recovery_rounds": ledger.recovery_rounds + (not counts and recovered == chosen.rows),
        "recoveries": ledger.recoveries + (not counts and recovered > 0),
        "lost_round": ledger.round + 1 if chosen.lost else ledger.lost_round,
        "unexpected": unexpected,
    }
    return ledger.model_copy(update=update)
