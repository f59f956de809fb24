"""What follows from how a job stands, by tables: deadlines, the next move, results that are good enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anybatch import Batch, BatchRecord, BatchStatus, Outcome, Report, Standing
from anybatch.jobs.ledger import Ledger, ShardRecord
from anybatch.jobs.policies import Move, OnTimeout, deadlines_of, next_move, rows_problem

HOUR = 3600
NOW = 1_800_000_000


def batch(status: str, created_at: int | None = None, cancelling_at: int | None = None) -> Batch:
    return Batch(
        id="b", status=BatchStatus(status), created_at=created_at, cancelling_at=cancelling_at,
        provider="p", raw_status=status,
    )  # fmt: skip


def report(rounds: int = 1, **counts: int) -> Report:
    outcomes = {Outcome(name): count for name, count in counts.items()}
    record = BatchRecord(id="b1", shard=0, round=1, rows=3, status=BatchStatus.COMPLETED)
    return Report(
        job="j", provider="p", endpoint="e", rows=sum(counts.values()), counts=outcomes, started_at=0,
        finished_at=1, duration_s=1, results="r", rounds=rounds, batches=(record,),
    )  # fmt: skip


# --- the deadline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "created_at", "cancelling_at", "expected"),
    [
        ("in_progress", NOW, None, NOW + 2 * HOUR),
        ("in_progress", None, None, NOW + HOUR),  # a provider that does not tell: by our own record
        ("in_progress", NOW - 9 * HOUR, None, NOW - 7 * HOUR),  # over: it does not begin anew
        ("cancelling", NOW - 9 * HOUR, None, NOW + HOUR),
        ("cancelling", NOW - 9 * HOUR, NOW - 600, NOW - 600 + HOUR),
        ("cancelling", NOW, NOW, NOW + 2 * HOUR),  # never earlier than without
        ("cancelling", NOW - 9 * HOUR, NOW - 3 * HOUR, NOW - 2 * HOUR),  # nor for ever
    ],
)
def test_the_deadline_of_a_batch(
    status: str, created_at: int | None, cancelling_at: int | None, expected: int
) -> None:
    given = batch(status, created_at, cancelling_at)
    standing = Standing(batches=(given,), created_at=NOW - HOUR)
    assert deadlines_of(standing, 2 * HOUR, NOW) == {"b": expected}


def ledger(stopped_at: float | None = None, **shards: float | None) -> Ledger:
    """A ledger of a job with these batches, and when their creation began."""
    records = tuple(
        ShardRecord(shard=number, first_row=0, rows=1, batch_id=batch_id, creating_at=creating_at)
        for number, (batch_id, creating_at) in enumerate(shards.items())
    )
    return Ledger(
        job="j", fingerprint="f", provider="p", api_base="a", endpoint="e", rows=1, created_at=NOW - 3 * HOUR,
        shards=records, stopped_at=stopped_at,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "batches", "expected"),
    [
        (ledger(b=None), [], {}),
        (ledger(b=None), [batch("completed", NOW), batch("cancelled", NOW)], {}),
        (ledger(b=NOW - 60), [batch("in_progress", NOW)], {"b": NOW + 2 * HOUR}),
        (ledger(b=NOW - 60), [batch("in_progress")], {"b": NOW - 60 + 2 * HOUR}),
        (ledger(b=None), [batch("in_progress")], {"b": NOW - HOUR}),  # the job's beginning
        (ledger(other=NOW), [batch("in_progress")], {"b": NOW - HOUR}),
        (ledger(NOW - 60, b=NOW), [batch("cancelling", NOW)], {"b": NOW - 60 + HOUR}),
        (ledger(NOW - 9 * HOUR, b=NOW), [batch("in_progress", NOW)], {"b": NOW - 8 * HOUR}),
    ],
)
def test_what_runs_has_a_deadline(record: Ledger, batches: list[Batch], expected: dict[str, float]) -> None:
    assert deadlines_of(Standing.of(record, batches), 2 * HOUR, NOW) == expected


@pytest.mark.parametrize("record", [ledger(NOW - 60, b=NOW), ledger(b=NOW)])
def test_a_batch_that_may_be_done_without_has_a_little_longer_to_end_being_cancelled(record: Ledger) -> None:
    """FAULTS A4b: the job, which says that it is lost, must be asked when its own hour is over."""
    standing = Standing.of(record, [batch("cancelling", NOW - 9 * HOUR, NOW - 60)])
    expected = {"b": NOW - 60 + HOUR + 300}
    assert deadlines_of(standing, 0, NOW, outlasts_lost=True) == expected


@pytest.mark.parametrize("wrong", [-1e14, 0, NOW * 1000, NOW - 30 * 24 * HOUR])
def test_a_time_that_cannot_be_is_not_believed(wrong: int) -> None:
    """FAULTS A8: a provider may send milliseconds, or the year 1; our own note of the submission holds."""
    standing = Standing.of(ledger(b=NOW - 60), [batch("in_progress", int(wrong))])
    assert deadlines_of(standing, 2 * HOUR, NOW) == {"b": NOW - 60 + 2 * HOUR}
    standing = Standing.of(ledger(b=NOW - 60), [batch("cancelling", NOW, int(wrong))])
    standing = replace(standing, cancelling={"b": NOW - 30})
    assert deadlines_of(standing, 0, NOW) == {"b": NOW - 30 + HOUR}


@pytest.mark.parametrize(
    ("deadlines", "on_timeout", "is_stopped", "expected"),
    [
        ([], "cancel", False, Move.LAND),
        ([], "leave", True, Move.LAND),
        ([NOW + 1, NOW + 9], "cancel", False, Move.WAIT),
        ([NOW + 1], "land_partial", True, Move.WAIT),
        ([NOW], "leave", False, Move.LEAVE),
        ([NOW + 9, NOW - 9], "cancel", False, Move.CANCEL),
        ([NOW - 9], "land_partial", False, Move.STOP),
        ([NOW - 9], "land_partial", True, Move.GIVE_UP),
        ([NOW - 9], "leave", True, Move.GIVE_UP),  # changed since
    ],
)
def test_what_comes_next(
    deadlines: list[float], on_timeout: OnTimeout, is_stopped: bool, expected: Move
) -> None:
    running = tuple(batch("in_progress") for _ in deadlines)
    standing = Standing(batches=running, stopped_at=NOW if is_stopped else None)
    given = {str(number): deadline for number, deadline in enumerate(deadlines)}
    assert next_move(standing, given, on_timeout, NOW) is expected


def test_what_is_held_is_waited_for() -> None:
    """Shards that wait for room, or a time to come back, are something to wait for, though no batch runs."""
    for standing in (Standing(held=2), Standing(come_back_at=NOW + 9)):
        assert not standing.is_over
        assert next_move(standing, {}, "cancel", NOW) is Move.WAIT
    assert Standing().is_over


# --- landed, and good enough? ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "ratio", "fails"),
    [
        ({"succeeded": 1, "failed": 99}, None, False),
        ({"failed": 2}, None, True),
        ({"expired": 1, "missing": 1}, None, True),
        ({}, None, False),
        ({}, 0.0, False),
        ({"succeeded": 9, "failed": 1}, 0.1, False),
        ({"succeeded": 9, "expired": 1}, 0.09, True),
        ({"succeeded": 9}, 0.0, False),
        ({"succeeded": 9, "cancelled": 1}, 0.0, True),
        ({"failed": 3}, 1.0, False),
    ],
)
def test_the_share_of_failed_rows_decides(counts: dict[str, int], ratio: float | None, fails: bool) -> None:
    assert bool(rows_problem(report(**counts), max_failed_ratio=ratio)) is fails


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    ("counts", "fails"),
    [
        ({"succeeded": 99, "missing": 1}, "1 of 100 rows have no result (99 succeeded, 1 missing)"),
        ({"succeeded": 100}, None),
        ({}, None),
    ],
)
def test_on_partial_fail_accepts_no_gap(
    counts: dict[str, int], fails: str | None, ratio: float | None
) -> None:
    problem = rows_problem(report(**counts), "fail", ratio)
    assert (problem is None) if fails is None else (problem is not None and problem.startswith(fails))


def test_rows_that_are_invalid_have_no_result() -> None:
    problem = rows_problem(report(succeeded=10), "fail", invalid=2)
    assert problem is not None
    assert problem.startswith("2 of 10 rows have no result (8 succeeded, 2 invalid)")
