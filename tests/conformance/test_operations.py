"""The four operations and their results, one suite for every provider."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anybatch import AuthenticationError, BatchNotCompleteError, BatchStatus, NotFoundError, Outcome

from .world import MODES, PROVIDERS, REMOTE, SHAPES, Driver, RemoteWorld, World, landed, row_ids, said

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anybatch import Batch, Page

every_provider = pytest.mark.parametrize("shared_world", PROVIDERS, indirect=True, scope="module")
every_shape = pytest.mark.parametrize("shared_world", [*SHAPES, "local"], indirect=True, scope="module")
every_remote_provider = pytest.mark.parametrize("shared_world", REMOTE, indirect=True, scope="module")


def created(world: World, driver: Driver, path: Path, rows: int = 3, **more: object) -> Batch:
    source = world.write(path / "in.jsonl", row_ids(rows))
    batch: Batch = driver.create(source, world.endpoint, completion_window=world.window, **more)
    return batch


@every_provider
def test_create_wait_results(world: World, driver: Driver, tmp_path: Path) -> None:
    keeps_metadata = driver.provider.traits.metadata is not None
    metadata = {"metadata": {"team": "a b", "run": "7"}} if keeps_metadata else {}
    batch = created(world, driver, tmp_path, **metadata)
    assert not batch.status.is_terminal
    assert batch.provider == world.name
    assert isinstance(batch.created_at, int)
    assert batch.id in (told := driver.check())
    assert world.name in told
    with pytest.raises(BatchNotCompleteError) as early:
        driver.results(batch.id)
    assert (early.value.batch_id, early.value.provider) == (batch.id, world.name)
    assert early.value.status in set(BatchStatus)
    with pytest.raises(BatchNotCompleteError):
        driver.download(batch.id, tmp_path / "files")

    world.finish(batch.id)
    seen: list[Batch] = []
    ended = driver.wait(batch.id, timeout=10, on_progress=seen.append)
    assert ended.status is BatchStatus.COMPLETED
    assert ended.id == batch.id
    assert seen[-1].status is ended.status
    assert [one.status for one in seen] == list(dict.fromkeys(one.status for one in seen)), "told on changes"
    assert isinstance(ended.completed_at, int)
    if ended.request_counts is not None:
        assert (ended.request_counts.total, ended.request_counts.completed) == (3, 3)
    assert (ended.metadata or {}).items() >= metadata.get("metadata", {}).items()
    assert ended.raw
    assert "raw=" not in repr(ended)

    rows = driver.results(batch.id)
    assert sorted(row.custom_id for row in rows) == row_ids(3)
    for row in rows:
        assert row.outcome is Outcome.SUCCEEDED
        assert row.status_code == 200
        assert row.error is None
        assert row.custom_id in said(row.result)
        assert row.result.usage == row.result["usage"], "members are attributes too"
        assert json.loads(row.raw)["custom_id"] == row.custom_id
    paths = driver.download(batch.id, tmp_path / "files")
    assert {
        json.loads(line)["custom_id"] for path in paths for line in path.read_bytes().splitlines()
    } == set(row_ids(3))


@pytest.mark.parametrize("shared_world", ["litellm", "mistral"], indirect=True, scope="module")
def test_downloads_of_two_batches_share_a_folder(world: World, driver: Driver, tmp_path: Path) -> None:
    """LiteLLM's ids are longer than a file name may be, and most of them is alike."""
    batches = [created(world, driver, tmp_path, rows=rows) for rows in (2, 3)]
    paths = []
    for batch in batches:
        world.finish(batch.id)
        paths += driver.download(batch.id, tmp_path / "files")
    assert [path.read_bytes().count(b"\n") for path in paths] == [2, 3]
    assert all(path.parent == tmp_path / "files" and len(path.name) < 200 for path in paths)


@every_provider
def test_list_is_paged_to_its_end(world: World, driver: Driver, tmp_path: Path) -> None:
    """Also where the listing never says that it has one."""
    before = {one.id for one in all_pages(driver, 100)}
    made = [created(world, driver, tmp_path, rows=1).id for _ in range(4)]
    pages = list(pages_of(driver, 2))
    ours = [one.id for page in pages for one in page if one.id not in before]
    assert ours == made[::-1], "all, once, newest first"
    assert all(len(page) <= 2 for page in pages)
    assert not pages[-1].has_more
    assert pages[-1].next_cursor is None
    assert isinstance(pages[0][0:1], tuple), "a page is a sequence"
    assert [one.id for one in driver.iter_batches() if one.id not in before] == made[::-1]
    assert {*made} <= {one.id for one in driver.iter_batches(since=time.time())}, "clocks may differ"
    if isinstance(world, RemoteWorld):
        world.fake.endless_list = True
        found = [batch.id for batch in all_pages(driver, 2)]
        assert found[:4] == made[::-1]
        assert set(found) == set(made)
        assert [one.id for one in driver.iter_batches()] == made[::-1], "each once"


def pages_of(driver: Driver, limit: int) -> Iterator[Page]:
    page = driver.list(limit=limit)
    yield page
    for _ in range(100):
        if page.next_cursor is None:
            return
        page = driver.list(after=page.next_cursor, limit=limit)
        yield page
    pytest.fail("the listing has no end")


def all_pages(driver: Driver, limit: int) -> list[Batch]:
    return [batch for page in pages_of(driver, limit) for batch in page]


@every_provider
def test_cancel(world: World, driver: Driver, tmp_path: Path) -> None:
    batch = created(world, driver, tmp_path)
    cancelled = driver.cancel(batch.id)
    assert cancelled.id == batch.id
    assert cancelled.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
    world.let_batches_end()
    ended = driver.wait(batch.id, timeout=10)
    assert ended.status is BatchStatus.CANCELLED
    assert isinstance(ended.cancelled_at, int)
    assert driver.cancel(batch.id).status is BatchStatus.CANCELLED, "asking again does no harm"


@every_shape
def test_cancel_of_a_batch_that_has_ended(world: World, driver: Driver, tmp_path: Path) -> None:
    batch = created(world, driver, tmp_path)
    world.finish(batch.id)
    assert driver.cancel(batch.id).status is BatchStatus.COMPLETED
    if world.name != "local":
        assert world.server.count("POST|DELETE", ".*cancel|.*/batches/.*") <= 1, "no use in repeating that"


@every_provider
def test_unknown_batch(world: World, driver: Driver) -> None:
    for verb in (driver.retrieve, driver.cancel, driver.wait, driver.results):
        with pytest.raises(NotFoundError) as caught:
            verb("batch/of someone")
        assert caught.value.status_code == 404
        assert caught.value.provider == world.name
        assert caught.value.batch_id == "batch/of someone"
    if world.name != "local":
        assert {call.path.count("%2F") for call in world.calls} == {1}, "ids are quoted"


@every_remote_provider
def test_wrong_key(world: RemoteWorld, mode: str) -> None:
    world.key = "another-key"
    try:
        driver = world.open(mode)
    finally:
        world.key = "test-key"
    with pytest.raises(AuthenticationError) as caught:
        driver.check()
    assert caught.value.status_code == 401
    assert len(world.calls) == 1, "at once"


@every_provider
def test_job_is_run_once(world: World, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    job = world.job(tmp_path)
    began = time.time()
    report = driver.run(job, timeout=10)
    found = landed(job, report, row_ids(8))
    assert report.ok
    assert all(custom_id in found.text(custom_id) for custom_id in row_ids(8))
    assert found.stray == []
    assert report.usage.total_tokens == report.usage.input_tokens + report.usage.output_tokens > 0
    assert (report.job, report.provider, report.endpoint) == (job.identity, world.name, world.endpoint)
    assert len(report.models) == 1
    assert began - 1 <= report.started_at <= report.finished_at <= time.time()
    (batch,) = report.batches
    assert (batch.shard, batch.round, batch.rows, batch.status) == (0, 1, 8, BatchStatus.COMPLETED)
    if world.name != "local":
        assert len(world.fake.batches) == 1
        world.calls.clear()
    assert driver.run(job) == report == driver.collect(job)
    assert list(driver.submit(job)) == []
    if world.name != "local":
        assert world.calls == [], "done is done, at no cost"


@every_shape
def test_job_is_taken_up_where_it_stands(world: World, driver: Driver, tmp_path: Path) -> None:
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    assert [one.id for one in driver.submit(job)] == [batch.id]
    with pytest.raises(BatchNotCompleteError) as caught:
        driver.collect(job)
    assert caught.value.batch_id == batch.id
    world.finish(batch.id)
    report = driver.collect(job)
    assert [one.id for one in report.batches] == [batch.id]
    landed(job, report, row_ids(8))


def test_both_modes_are_run() -> None:
    assert MODES == ("sync", "async")
    assert len(PROVIDERS) == 19
