"""What a batch owes, by tables: when result files are complete, and when what is lacking was paid for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anybatch import BatchStatus, RequestCounts, get_provider
from anybatch.models import Batch
from anybatch.rows.downloads import Counted, Owed, count_rows, is_loss, lacking, owed

DONE, EXPIRED, CANCELLED = BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED


def batch(status: BatchStatus, counts: tuple[int, int, int] | None) -> Batch:
    given = None if counts is None else RequestCounts(total=counts[0], completed=counts[1], failed=counts[2])
    return Batch(id="b", status=status, request_counts=given, provider="p", raw_status=status)


@pytest.mark.parametrize(
    ("status", "counts", "sent", "expected"),
    [
        (DONE, (10, 8, 2), 10, Owed(10, 8)),
        (DONE, (10, 8, 2), None, Owed(10, 8)),
        (DONE, (10, 8, 0), 10, Owed(8, 8)),  # the provider owns to two rows without an answer
        (DONE, (12, 12, 0), 10, Owed(10, 10)),  # more than was sent is nobody's
        (DONE, None, 10, Owed(10, 1)),  # without counts there may be rows without an answer
        (DONE, (0, 0, 0), 10, Owed(10, 1)),
        (DONE, (10, 0, 0), None, Owed(10, 1)),
        (DONE, None, None, Owed(1, 1)),
        (DONE, (0, 0, 0), None, Owed(0, 0)),
        (EXPIRED, (10, 5, 1), 10, Owed(6, 5)),
        (EXPIRED, None, 10, Owed(0, 0)),
        (CANCELLED, (10, 0, 0), 10, Owed(0, 0)),
    ],
)
def test_what_a_batch_owes(
    status: BatchStatus, counts: tuple[int, int, int] | None, sent: int | None, expected: Owed
) -> None:
    assert owed(batch(status, counts), sent)[:2] == expected[:2]


def ran(answered: int, succeeded: int, torn: int, unclear: int = 0, problem: str | None = None) -> Counted:
    """Rows that were all run."""
    return Counted(answered, answered, succeeded, torn, unclear, problem)


@pytest.mark.parametrize(
    ("found", "promised", "complete", "loss"),
    [
        (ran(10, 8, 0), Owed(10, 8), True, False),
        (ran(9, 8, 0), Owed(10, 8), False, False),  # a failed row without a line was not paid for
        (ran(9, 7, 0), Owed(10, 8), False, True),
        (ran(10, 7, 0), Owed(10, 8), True, False),  # an answer of status 400 that is counted as completed
        (ran(9, 7, 1), Owed(10, 8), False, False),  # one line that breaks off costs its row only
        (ran(10, 10, 0, 0, "a page"), Owed(10, 10), False, False),
        (ran(0, 0, 0), Owed(0, 0), True, False),
        (ran(9, 7, 0, 1), Owed(10, 8), False, False),  # nor does one that cannot be told whose it is
        (ran(3, 3, 0), Owed(10, 1), False, False),
        (ran(0, 0, 0), Owed(10, 1), False, True),
    ],
)
def test_when_files_are_complete(found: Counted, promised: Owed, complete: bool, loss: bool) -> None:
    assert (lacking(found, promised) is None) == complete
    assert is_loss(found, promised) == loss


def test_rows_are_counted_once(tmp_path: Path) -> None:
    good = {"response": {"status_code": 200, "body": {"id": "x"}}, "error": None}
    bad = {"response": {"status_code": 500, "body": {}}, "error": None}
    lines = [{"custom_id": "a", **bad}, {"custom_id": "a", **good}, {"custom_id": "b", **bad}]
    text = "\n\n".join(json.dumps(line) for line in lines) + '\n{"custom_id": "c", "resp'
    (tmp_path / "out.jsonl").write_text(text)
    provider = get_provider("openai", api_key="k")
    assert count_rows(provider, None, [tmp_path / "out.jsonl"]) == Counted(2, 2, 1, 1, 1)
