"""A job's folder on an object store, and what lands in it."""

from __future__ import annotations

import uuid

import pytest
from upath import UPath

from anybatch.ledger import JobFolder, Ledger, ShardRecord
from anybatch.models import Outcome, RowError
from anybatch.results import parse_landed


@pytest.fixture
def folder() -> JobFolder:
    return JobFolder(UPath(f"memory://{uuid.uuid4().hex}/job"))


def ledger(created_at: float = 1.0) -> Ledger:
    return Ledger(
        job="j", fingerprint="f", provider="openai", api_base="x", endpoint="/v1/chat/completions", rows=1,
        created_at=created_at, shards=(ShardRecord(shard=0, first_row=0, rows=1),),
    )  # fmt: skip


def test_a_rival_that_writes_during_the_files_before_a_commit_is_not_overwritten(folder: JobFolder) -> None:
    """What is put first may be gigabytes: long enough for another attempt to go on."""
    before = folder.commit(None, ledger())
    assert before is not None
    rivals = before.model_copy(update={"renewals": 1})

    def put_files() -> None:
        assert folder.commit(before, rivals) is not None

    assert folder.commit(before, before.model_copy(update={"renewed": 1}), first=put_files) is None
    now = folder.read()
    assert now is not None
    assert (now.renewals, now.renewed) == (1, 0)


@pytest.mark.parametrize(
    ("code", "told"), [("429", "429"), ('"server_error"', "server_error"), ("null", None)]
)
def test_the_code_of_a_landed_error_is_text_whatever_the_provider_sent(code: str, told: str | None) -> None:
    error = f'{{"code":{code},"message":"No."}}'
    row = parse_landed(f'{{"outcome":"failed","custom_id":"a","response":null,"error":{error}}}'.encode())
    assert (row.outcome, row.error) == (Outcome.FAILED, RowError(told, "No."))
