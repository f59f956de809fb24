"""A job's folder, on disk and on an object store, and what lands in it."""

from __future__ import annotations

import asyncio
import io
import os
import uuid
from pathlib import Path

import httpx
import orjson
import pytest
from upath import UPath

from anybatch import LedgerConflictError, RetryPolicy, get_provider
from anybatch.flow import Flow, aperform, do
from anybatch.jobs.folder import JobFolder
from anybatch.jobs.ledger import Ledger, ShardRecord
from anybatch.models import BatchStatus, Outcome, RowError
from anybatch.providers.openai import parse_batch
from anybatch.rows.merge import Index, merge
from anybatch.rows.results import parse_landed
from anybatch.rows.tally import Tally


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
    rivals = before.model_copy(update={"recovery_rounds": 1})

    def put_files() -> None:
        assert folder.commit(before, rivals) is not None

    assert folder.commit(before, before.model_copy(update={"recoveries": 1}), first=put_files) is None
    now = folder.read()
    assert now is not None
    assert (now.recovery_rounds, now.recoveries) == (1, 0)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (1, "older anybatch .*let that version finish"),
        (3, "newer anybatch .*use that version"),
        (None, "not a file that anybatch wrote"),
        ("2", "older anybatch"),
    ],
)
def test_a_ledger_of_another_version_is_refused_and_left_as_it_is(
    folder: JobFolder, version: object, told: str
) -> None:
    """FAULTS A6: its batches are on record there, and what this version would write back may lose some."""
    before = folder.commit(None, ledger())
    assert before is not None
    text = orjson.loads((folder / "job.json").read_bytes())
    text = text | {"version": version} if version is not None else {"shards": []}
    (folder / "job.json").write_bytes(orjson.dumps(text))
    for act in (folder.read, lambda: folder.commit(before, before)):
        with pytest.raises(LedgerConflictError, match=told):
            act()
    assert orjson.loads((folder / "job.json").read_bytes()) == text


def test_members_of_a_ledger_that_nobody_knows_here_stay(folder: JobFolder) -> None:
    """FAULTS A6: a later version of anybatch that writes the same form may note more."""
    before = folder.commit(None, ledger())
    assert before is not None
    text = orjson.loads((folder / "job.json").read_bytes())
    text["trace"] = "0af7"
    text["shards"][0]["held_since"] = 5.0
    (folder / "job.json").write_bytes(orjson.dumps(text))
    now = folder.read()
    assert now is not None
    assert folder.commit(before, before) is None, "it is not the one that was written"
    again = now.with_shard(now.shards[0].model_copy(update={"batch_id": "b"}))
    assert folder.commit(now, again.model_copy(update={"landed_at": 7.0})) is not None
    text = orjson.loads((folder / "job.json").read_bytes())
    assert (text["trace"], text["shards"][0]["held_since"], text["landed_at"]) == ("0af7", 5.0, 7.0)


def test_what_is_put_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and folder: a claim that a power cut takes back would have its batch created twice."""
    local = JobFolder(UPath(tmp_path / "job"))
    assert local.commit(None, ledger()) is not None
    events: list[str] = []

    def synced(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name.rpartition('.')[0]}")

    replaced = Path.replace
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        Path, "replace", lambda *paths: events.append(f"name {paths[1].name}") or replaced(*paths)
    )
    (tmp_path / "rows").write_text("rows")
    local.put(tmp_path / "rows", "results.jsonl")
    local.replace("report.json", b"{}")
    assert events == [
        "sync .results.jsonl", "name results.jsonl", "sync ",
        "sync .report.json", "name report.json", "sync ",
    ]  # fmt: skip
    assert (local.path / "results.jsonl").read_text() == "rows"


def test_a_temporary_folder_is_removed_by_others_only_if_its_owner_is_dead(tmp_path: Path) -> None:
    local = JobFolder(UPath(tmp_path / "job"))
    with local.scratch() as mine:
        (mine / "rows").write_text("rows")
        left = local.scratch()
        (left.path / "rows").write_text("rows")
        os.close(left._guard)  # type: ignore[arg-type]  # as the kernel does when its owner is killed
        with local.scratch() as theirs:
            assert (mine / "rows").read_text() == "rows"
            assert theirs.is_dir()
            assert not left.path.exists()
    assert [path.name for path in (tmp_path / "job").iterdir()] == [".lock"]


def test_waiting_for_the_folder_does_not_block_the_event_loop(tmp_path: Path) -> None:
    """An attempt that collects waits for the lock in a thread."""
    local = JobFolder(UPath(tmp_path / "job"))

    async def both() -> bool:
        with local.locked():
            waiting = asyncio.create_task(aperform(_scratch(local), httpx.AsyncClient(), RetryPolicy()))
            await asyncio.sleep(0.05)
            blocked = waiting.done()
        await waiting
        return blocked

    assert asyncio.run(both()) is False


def _scratch(folder: JobFolder) -> Flow[None]:
    with (yield from do(folder.scratch)):
        pass


@pytest.mark.parametrize(
    ("counts", "read"),
    [
        ({"total": 3, "completed": "2", "failed": 1.0}, (3, 2, 1)),
        ({"total": 3, "completed": None, "failed": "n/a"}, (3, 0, 0)),
        ({"total": 3, "completed": {"rows": 2}, "failed": float("inf")}, (3, 0, 0)),
    ],
)
def test_counts_as_servers_send_them(counts: dict[str, object], read: tuple[int, int, int]) -> None:
    batch = parse_batch({"id": "b", "status": "completed", "request_counts": counts}, "openai")
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == read


@pytest.mark.parametrize(
    ("status", "good"), [(0, False), (100, False), (200, True), (299, True), (500, False)]
)
def test_a_status_that_is_no_success(tmp_path: Path, status: int, good: bool) -> None:
    """Servers write 0 where the model never answered, beside a body that says so."""
    line = {"custom_id": "a", "response": {"status_code": status, "body": {"id": "x"}}, "error": None}
    (tmp_path / "out.jsonl").write_bytes(orjson.dumps(line) + b"\n")
    tally, out = Tally(), io.BytesIO()
    provider = get_provider("openai", api_key="k")
    index = Index([tmp_path / "out.jsonl"], ["a"], provider, "/v1/chat/completions")
    merge(index, ["a"], BatchStatus.COMPLETED, out, io.BytesIO(), tally)
    expected = Outcome.SUCCEEDED if good else Outcome.FAILED
    assert (parse_landed(out.getvalue()).outcome, dict(tally.counts)) == (expected, {expected: 1})


@pytest.mark.parametrize(
    ("code", "told"), [("429", "429"), ('"server_error"', "server_error"), ("null", None)]
)
def test_the_code_of_a_landed_error_is_text_whatever_the_provider_sent(code: str, told: str | None) -> None:
    error = f'{{"code":{code},"message":"No."}}'
    row = parse_landed(f'{{"outcome":"failed","custom_id":"a","response":null,"error":{error}}}'.encode())
    assert (row.outcome, row.error) == (Outcome.FAILED, RowError(told, "No."))
