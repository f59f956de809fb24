"""What an attempt does next, and which of several batches stays: decided by pure functions."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import permutations
from typing import Any, Literal

import pytest

from anybatch import ConfigurationError, Job, JobError, get_provider
from anybatch.jobs.inputs import restarts
from anybatch.jobs.job import fingerprint, job_metadata, shard_metadata, short
from anybatch.jobs.ledger import Ledger, ShardRecord, Step
from anybatch.jobs.lost import lost_row
from anybatch.jobs.rounds import Budget, budget, choose, fills_batches, fold, ids_of_shards, worth_repeating
from anybatch.jobs.shard import Transition, next_transition
from anybatch.models import Batch, BatchStatus, Body, Outcome, Row, RowError
from anybatch.providers.finding import oldest
from anybatch.rows.results import landed_line, parse_landed
from anybatch.rows.tally import Tally

NOW, LEASE = 1_800_000_000.0, 90.0


@pytest.mark.parametrize(
    ("step", "attempt", "age", "move"),
    [
        (Step.PLANNED, None, None, Transition.UPLOAD),
        (Step.UPLOADED, None, None, Transition.CREATE),
        (Step.UPLOADED, "other", 1.0, Transition.CREATE),  # it has given its claim back
        (Step.CREATED, "me", 1.0, Transition.ATTACH),
        (Step.CREATED, "other", 1e6, Transition.ATTACH),
        (Step.CREATING, "me", 0.0, Transition.RELEASE),  # our own, and we are not creating
        (Step.CREATING, "me", 1e6, Transition.RELEASE),
        (Step.CREATING, "other", 0.0, Transition.LEAVE),
        (Step.CREATING, "other", 89.9, Transition.LEAVE),
        (Step.CREATING, "other", 90.0, Transition.RELEASE),
        (Step.CREATING, "other", 1e9, Transition.RELEASE),
        (Step.CREATING, "other", -5.0, Transition.LEAVE),  # its clock is ahead of ours
        (Step.CREATING, "other", -90.0, Transition.RELEASE),  # its clock is wrong: not waited for, for ever
        (Step.CREATING, "other", None, Transition.RELEASE),
    ],
)
def test_next_transition(step: Step, attempt: str | None, age: float | None, move: Transition) -> None:
    began = None if age is None else NOW - age
    record = ShardRecord(shard=0, first_row=0, rows=1, step=step, attempt=attempt, creating_at=began)
    assert next_transition(record, "me", NOW, LEASE) is move


def batch(number: int, created_at: int | None, status: BatchStatus = BatchStatus.IN_PROGRESS) -> Batch:
    return Batch(id=f"b{number}", created_at=created_at, status=status, provider="test", raw_status="")


@pytest.mark.parametrize(
    ("batches", "kept"),
    [
        ([batch(1, 5)], "b1"),
        ([batch(1, 5), batch(2, 4)], "b2"),
        ([batch(2, 5), batch(1, 5)], "b1"),  # of the same second: everybody must choose alike
        ([batch(1, None), batch(2, 4)], "b1"),
        ([batch(1, 4, BatchStatus.CANCELLED), batch(2, 5)], "b2"),
        ([batch(1, 4, BatchStatus.CANCELLING), batch(2, 5)], "b2"),
        ([batch(1, 4, BatchStatus.FAILED), batch(2, 5, BatchStatus.EXPIRED)], "b2"),
        ([batch(1, 4, BatchStatus.COMPLETED), batch(2, 5)], "b1"),
        ([batch(1, 4, BatchStatus.FAILED), batch(2, 5, BatchStatus.CANCELLED)], "b1"),
        ([batch(1, 4, BatchStatus.UNKNOWN), batch(2, 5)], "b1"),
    ],
)
def test_oldest_is_the_same_for_everybody(batches: list[Batch], kept: str) -> None:
    assert {oldest(order).id for order in permutations(batches)} == {kept}


def test_a_shard_is_replaced_by_its_number_and_round() -> None:
    first, second = (ShardRecord(shard=number, first_row=number, rows=1) for number in (0, 1))
    again = first.model_copy(update={"round": 2})
    ledger = Ledger(
        job="j", fingerprint="f", provider="p", api_base="b", endpoint="e", rows=2, created_at=NOW,
        shards=(first, second, again),
    )  # fmt: skip
    after = ledger.with_shard(again.model_copy(update={"batch_id": "b"}))
    assert [record.batch_id for record in after.shards] == [None, None, "b"]
    assert after.batch_ids == ["b"]


OPENAI = get_provider("openai", api_key="k1")


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "other"},
        {"endpoint": "/v1/embeddings"},
        {"model": "m"},
        {"completion_window": "48h"},
        {"options": {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}},
        {"on_untranslatable": "drop"},
        {"restarts": ("again",)},
        {"provider": get_provider("openai", api_key="k1", api_base="http://other/v1")},
        {"provider": get_provider("mistral", api_key="k1")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_asked_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert _print(**change) != _print()


@pytest.mark.parametrize(
    "change",
    [
        {"provider": get_provider("openai", api_key="k2")},
        {"id": "named"},
        {"output": "/elsewhere"},
        {"on_changed": "fail"},
        {"on_orphan": "resubmit"},
        {"lease": 1.0},
        {"price": (1.0, 2.0)},
        {"max_rounds": 3},
        {"restart": "not in force until the ledger has it"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_asked_is_not(change: dict[str, Any]) -> None:
    assert _print(**change) == _print()


def test_the_restart_in_force_is_the_last_one() -> None:
    assert _print(restarts=("a", "b")) == _print(restarts=("b",)) != _print(restarts=("a",))


def _print(digest: str = "d", provider: Any = OPENAI, restarts: tuple[str, ...] = (), **more: Any) -> str:
    return fingerprint(Job(**{"input": "in.jsonl", "output": "/out", **more}), provider, digest, restarts)


@pytest.mark.parametrize(
    ("before", "restart", "after"),
    [
        ((), None, ()),
        ((), "a", ("a",)),
        (("a",), "a", ("a",)),
        (("a",), None, ("a",)),
        (("a",), "b", ("a", "b")),
        (("a", "b"), "a", ("a", "b")),  # a straggler does not undo what came after it
    ],
)
def test_each_restart_counts_once(
    before: tuple[str, ...], restart: str | None, after: tuple[str, ...]
) -> None:
    assert restarts(Job(input="i", output="/out", restart=restart), ledger(restarts=before)) == after
    assert restarts(Job(input="i", output="/out", restart="a"), None) == ("a",)


# --- rounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "status", "code", "again"),
    [
        ("succeeded", 200, None, False),
        ("expired", None, "batch_expired", True),
        ("missing", None, "missing", True),
        ("cancelled", None, "batch_cancelled", True),
        ("failed", 429, "rate_limit_exceeded", True),
        ("failed", 429, None, True),
        ("failed", 408, None, True),
        ("failed", 500, "server_error", True),
        ("failed", 503, "invalid_state", True),  # the status is the clearer word
        ("failed", 529, "overloaded_error", True),
        ("failed", 400, None, False),
        ("failed", 400, "server_error", False),
        ("failed", 401, "invalid_api_key", False),
        ("failed", 404, "model_not_found", False),
        ("failed", 409, None, False),
        ("failed", 413, None, False),
        ("failed", 422, None, False),
        ("failed", None, None, True),
        ("failed", None, "undecodable_line", True),
        ("failed", None, "rate_limit_exceeded", True),
        ("failed", None, "token_limit_exceeded", True),
        ("failed", None, "500", True),
        ("failed", None, "429", True),
        ("failed", None, "400", False),
        ("failed", None, "invalid_request_error", False),
        ("failed", None, "InvalidRequestError", False),
        ("failed", None, "context_length_exceeded", False),
        ("failed", None, "unsupported_parameter", False),
        ("failed", None, "content_policy_violation", False),
        ("failed", 200, None, True),
        ("failed", 200, "invalid_prompt", False),
    ],
)
def test_which_rows_are_worth_repeating(
    outcome: str, status: int | None, code: str | None, again: bool
) -> None:
    assert worth_repeating(row(outcome, status, code)) is again


def row(outcome: str, status: int | None = None, code: str | None = None, custom_id: str = "1") -> Row:
    error = None if outcome == "succeeded" else RowError(code, "told")
    return Row(custom_id, Outcome(outcome), Body() if outcome == "succeeded" else None, error, status)


def ledger(*, rounds: int = 1, **more: Any) -> Ledger:
    shards = tuple(ShardRecord(shard=0, round=number, first_row=0, rows=1) for number in range(1, rounds + 1))
    return Ledger(job="j", fingerprint="f", provider="p", api_base="b", endpoint="e", rows=1, created_at=NOW,
                  shards=shards, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("max_rounds", "rounds", "recovery_rounds", "recoveries", "cancelled", "expected"),
    [
        (1, 1, 0, 0, False, (False, False)),
        (1, 1, 0, 0, True, (False, True)),
        (1, 3, 2, 2, True, (False, False)),  # twice in this attempt
        (1, 3, 2, 0, True, (False, True)),  # twice in another one
        (2, 1, 0, 0, False, (True, False)),
        (2, 2, 0, 0, False, (False, False)),
        (2, 2, 1, 1, False, (True, False)),  # recoveries do not count
        (2, 3, 1, 1, True, (False, True)),
        (3, 2, 0, 2, True, (True, False)),
    ],
)
def test_what_may_go_again(
    max_rounds: int,
    rounds: int,
    recovery_rounds: int,
    recoveries: int,
    cancelled: bool,
    expected: tuple[bool, bool],
) -> None:
    statuses = {BatchStatus.COMPLETED, *([BatchStatus.CANCELLED] if cancelled else [])}
    job = Job(input="i", output="/out", max_rounds=max_rounds)
    before = ledger(rounds=rounds, recovery_rounds=recovery_rounds, recoveries=recoveries)
    assert budget(job, before, statuses)[:2] == expected


@pytest.mark.parametrize(
    ("max_rounds", "before", "landed", "expected"),
    [
        (5, 1, False, (False, False)),  # not before it has landed
        (1, 1, True, (False, False)),
        (2, 2, True, (False, False)),  # what it was allowed when it was stopped is no reason to go on
        (3, 2, True, (True, True)),
    ],
)
def test_what_may_go_again_of_a_job_that_was_stopped(
    max_rounds: int, before: int, landed: bool, expected: tuple[bool, bool]
) -> None:
    stopped = ledger().model_copy(
        update={"stopped_at": NOW, "max_rounds": before, "landed_at": NOW if landed else None}
    )
    job = Job(input="i", output="/out", max_rounds=max_rounds)
    assert budget(job, stopped, {BatchStatus.CANCELLED})[:2] == expected


@pytest.mark.parametrize(
    ("on_lost", "recoveries", "again"),
    [("fail", 0, False), ("land", 0, False), ("resubmit", 0, True), ("resubmit", 2, False)],
)
@pytest.mark.parametrize("max_rounds", [1, 2])
def test_lost_rows_go_again_by_on_lost_alone(
    on_lost: Literal["fail", "land", "resubmit"], recoveries: int, again: bool, max_rounds: int
) -> None:
    """FAULTS A4b: whatever `max_rounds` is, and as often in one attempt as rows of cancelled batches."""
    job = Job(input="i", output="/out", max_rounds=max_rounds, on_lost=on_lost)
    allowed = budget(job, ledger(recoveries=recoveries), {BatchStatus.COMPLETED})
    lost = replace(row("missing"), error=lost_row("batch b is gone"))
    out = io.BytesIO()
    assert choose([landed_line(lost)], ids("1"), None, allowed, out) == (again, 0, again)


ROWS = [("a", "succeeded"), ("b", "cancelled"), ("c", "expired"), ("d", "cancelled"), ("e", "failed")]


@pytest.mark.parametrize(
    ("repeat", "allow_cancelled", "dead", "chosen", "cancelled"),
    [
        (True, True, "ab", "bce", 1),  # d's batch was not cancelled
        (True, False, "ab", "ce", 0),
        (False, True, "abd", "bd", 2),
        (False, True, "", "", 0),
        (True, True, None, "bcde", 2),
        (False, False, None, "", 0),
    ],
)
def test_which_rows_are_chosen(
    repeat: bool, allow_cancelled: bool, dead: str | None, chosen: str, cancelled: int
) -> None:
    out = io.BytesIO()
    lines = [landed_line(row(outcome, 500, custom_id=one)) for one, outcome in ROWS]
    marked = None if dead is None else ids(dead)
    found = choose(lines, ids("abcde"), marked, Budget(repeat, allow_cancelled), out)
    assert out.getvalue() == b"".join(ids(chosen))
    assert found == (len(chosen), cancelled, 0)


def ids(letters: str) -> list[bytes]:
    return [f'"{letter}"\n'.encode() for letter in letters]


def test_a_later_outcome_stands_unless_there_was_a_success() -> None:
    body = Body(usage={"prompt_tokens": 3, "completion_tokens": 4})
    before = [
        replace(row(outcome, custom_id=one), result=body if one == "a" else None) for one, outcome in ROWS
    ]
    after = [
        row("failed", 500, custom_id="a"),
        row("succeeded", custom_id="c"),
        row("missing", custom_id="e"),
    ]
    out, tally = io.BytesIO(), Tally(input_tokens=10)
    fold(map(landed_line, before), ids("abcde"), map(landed_line, after), ids("ace"), out, tally)
    landed = [parse_landed(line) for line in out.getvalue().splitlines()]
    assert [(one.custom_id, str(one.outcome)) for one in landed] == [
        ("a", "succeeded"), ("b", "cancelled"), ("c", "succeeded"), ("d", "cancelled"), ("e", "missing"),
    ]  # fmt: skip
    assert (tally.input_tokens, tally.output_tokens) == (13, 4), "of both"
    assert tally.counts == {Outcome.SUCCEEDED: 2, Outcome.CANCELLED: 2, Outcome.MISSING: 1}


@pytest.mark.parametrize("rows", [[], ["nonsense"], ["succeeded"] * 4, ["succeeded"] * 6, ["other"] * 5])
def test_rows_that_are_not_those_of_the_ids(rows: list[str]) -> None:
    lines = [
        landed_line(row(outcome)) if outcome == "succeeded" else b'{"outcome":"failed"}\n' for outcome in rows
    ]
    for act in (
        lambda: choose(lines, ids("abcde"), None, Budget(True, True), io.BytesIO()),
        lambda: fold(lines, ids("abcde"), [], ids("b"), io.BytesIO(), Tally()),
    ):
        with pytest.raises(JobError, match="were changed, or do not match"):
            act()


@pytest.mark.parametrize(
    ("rows", "least", "most", "expected"),
    [
        (1, 1, 10, True),
        (3, 4, 10, False),
        (4, 4, 10, True),
        (12, 4, 10, True),  # 10 and 2: the last two share 12
        (15, 10, 10, False),
        (20, 10, 10, True),
        (15, 8, 10, False),
        (17, 8, 10, True),
        (25, 8, 10, False),  # 9, 8 and 8 would do, but only the last two share
    ],
)
def test_whether_rows_fill_batches(rows: int, least: int, most: int, expected: bool) -> None:
    assert fills_batches(rows, least, most) == expected


def test_part_of_the_ids() -> None:
    parts = [ShardRecord(shard=n, round=2, first_row=row, rows=2) for n, row in ((0, 0), (2, 4))]
    assert list(ids_of_shards(ids("abcdefgh"), parts)) == ids("abef")
    assert list(ids_of_shards(ids("efgh"), parts[1:], 4)) == ids("ef")


@pytest.mark.parametrize("wrong", [{"max_rounds": 0}, {"max_rounds": "2"}, {"restart": ""}, {"restart": 1}])
def test_options_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Job(**{"input": "i", "output": "/out", **wrong})


@pytest.mark.parametrize("length", [1, 199, 200, 201, 5000])
def test_a_short_identity_fits_and_stays_unlike_others(length: int) -> None:
    one, two = short("a" * length), short("a" * (length - 1) + "b")
    assert len(one) <= 200
    assert one != two
    assert (one == "a" * length) == (length <= 200)


def test_marks_name_job_shard_and_round() -> None:
    record = ShardRecord(shard=2, round=1, first_row=0, rows=1)
    marks = shard_metadata(job_metadata(Job(input="i", output="/out", id="me"), OPENAI), record, 3)
    assert marks == {"anybatch_job": "me", "anybatch_shard": "2/3", "anybatch_round": "1"}
    assert shard_metadata({}, record, 3) == {}
