"""What an attempt does next, and which of several batches stays: decided by pure functions."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from anybatch import Job, get_provider
from anybatch.job import fingerprint, job_metadata, shard_metadata, short
from anybatch.ledger import Ledger, ShardRecord, Step
from anybatch.models import Batch, BatchStatus
from anybatch.providers.base import oldest
from anybatch.shards import Move, next_move

NOW, LEASE = 1_800_000_000.0, 90.0


@pytest.mark.parametrize(
    ("step", "attempt", "age", "move"),
    [
        (Step.PLANNED, None, None, Move.UPLOAD),
        (Step.UPLOADED, None, None, Move.CREATE),
        (Step.UPLOADED, "other", 1.0, Move.CREATE),  # it has given its claim back
        (Step.CREATED, "me", 1.0, Move.ATTACH),
        (Step.CREATED, "other", 1e6, Move.ATTACH),
        (Step.CREATING, "me", 0.0, Move.RELEASE),  # our own, and we are not creating
        (Step.CREATING, "me", 1e6, Move.RELEASE),
        (Step.CREATING, "other", 0.0, Move.LEAVE),
        (Step.CREATING, "other", 89.9, Move.LEAVE),
        (Step.CREATING, "other", 90.0, Move.RELEASE),
        (Step.CREATING, "other", 1e9, Move.RELEASE),
        (Step.CREATING, "other", -5.0, Move.LEAVE),  # its clock is ahead of ours
        (Step.CREATING, "other", -90.0, Move.RELEASE),  # its clock is wrong: not waited for, for ever
        (Step.CREATING, "other", None, Move.RELEASE),
    ],
)
def test_next_move(step: Step, attempt: str | None, age: float | None, move: Move) -> None:
    began = None if age is None else NOW - age
    record = ShardRecord(shard=0, first_row=0, rows=1, step=step, attempt=attempt, creating_at=began)
    assert next_move(record, "me", NOW, LEASE) is move


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
    again = first.model_copy(update={"round": 1})
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
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_asked_is_not(change: dict[str, Any]) -> None:
    assert _print(**change) == _print()


def _print(digest: str = "d", provider: Any = OPENAI, **more: Any) -> str:
    return fingerprint(Job(**{"input": "in.jsonl", "output": "/out", **more}), provider, digest)


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
