"""Jobs larger than a batch: split, run, and put together again in the order of the input."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from anybatch import BatchFailedError, BatchStatus, Job, Outcome
from tests.fakes.rows import Quirks

from .world import FORMATS, Driver, RemoteWorld, landed, row_ids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.provider import FakeProvider

ROWS = 20
IDS = row_ids(ROWS)
SIZES = [3, 3, 3, 3, 3, 3, 2]

every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")


@pytest.fixture
def small(driver: Driver) -> Iterator[Driver]:
    """A provider whose batches hold three requests."""
    had = driver.provider.limits
    driver.provider.limits = replace(had, requests=3)
    yield driver
    driver.provider.limits = had


def end_by_number(fake: FakeProvider, batch_id: str) -> None:
    """Each batch of the seven ends in another way."""
    quirks = Quirks(shuffled=True)
    match list(fake.batches).index(batch_id):
        case 1:
            fake.finish(batch_id, failed=1, quirks=quirks)
        case 2:
            fake.expire(batch_id, done=1, quirks=quirks)
        case 3:
            fake.finish(batch_id, quirks=Quirks(missing={"row-10"}, extra=["row-0"], bad_json={"row-11"}))
        case 5:
            fake.cancel_now(batch_id, done=2, quirks=quirks)
        case _:
            fake.finish(batch_id, quirks=quirks)


@every_format
def test_seven_shards(world: RemoteWorld, small: Driver, tmp_path: Path) -> None:
    world.end_with(end_by_number)
    job = world.job(tmp_path, count=ROWS)
    report = small.run_once(job, timeout=10)
    found = landed(job, report, IDS)
    assert [batch.shard for batch in report.batches] == list(range(7))
    assert [batch.rows for batch in report.batches] == SIZES
    assert [batch.id for batch in report.batches] == list(world.fake.batches)
    assert [batch.round for batch in report.batches] == [1] * 7
    assert [batch.status for batch in report.batches] == [
        BatchStatus.EXPIRED
        if number == 2
        else BatchStatus.CANCELLED
        if number == 5
        else BatchStatus.COMPLETED
        for number in range(7)
    ]
    special = {
        "row-3": Outcome.FAILED,
        "row-7": Outcome.EXPIRED,
        "row-8": Outcome.EXPIRED,
        "row-10": Outcome.MISSING,
        "row-11": Outcome.FAILED,
        "row-17": Outcome.CANCELLED,
    }
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | special
    assert report.unexpected == 1, "row-0 is no row of the fourth batch"
    assert len(found.stray) == 2
    assert [found.text(one) for one in IDS if one not in special] == [
        f"echo: say {one}" for one in IDS if one not in special
    ]
    if driver_keeps_metadata(small):
        marks = [batch.metadata["anybatch_shard"] for batch in world.fake.batches.values()]
        assert marks == [f"{number}/7" for number in range(7)]
        assert len({batch.metadata["anybatch_job"] for batch in world.fake.batches.values()}) == 1
    assert len({batch.input_file_id for batch in report.batches}) == (1 if world.name == "anthropic" else 7)


def driver_keeps_metadata(driver: Driver) -> bool:
    return driver.provider.traits.metadata is not None


@every_format
def test_shards_hold_their_part_of_the_input(world: RemoteWorld, small: Driver, tmp_path: Path) -> None:
    """Byte for byte where lines go as they are; split by bytes as well as by rows."""
    source = world.write(tmp_path / "in.jsonl", IDS)
    raw = source.read_bytes().splitlines(keepends=True)
    raw.insert(4, b"\n")
    source.write_bytes(b"".join(raw))
    batches = small.submit(Job(input=source, output=tmp_path / "out"))
    assert len(batches) == 7
    asked = [[one for one, _ in world.fake.requests(batch)] for batch in world.fake.batches.values()]
    assert [one for part in asked for one in part] == IDS
    assert [len(part) for part in asked] == SIZES
    if world.name == "openai":
        uploaded = b"".join(world.fake.files[batch.input_file_id].data for batch in batches)
        assert uploaded == source.read_bytes().replace(b"\n\n", b"\n")


@every_format
def test_split_by_bytes(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    had = driver.provider.limits
    driver.provider.limits = replace(had, bytes=1000)
    try:
        batches = driver.submit(world.job(tmp_path, count=ROWS))
    finally:
        driver.provider.limits = had
    assert len(batches) > 1
    if world.name == "anthropic":
        sizes = [call.body_size for call in world.server.find("POST", ".*/batches")]
    else:
        sizes = [len(file.data) for file in world.fake.files.values()][-len(batches) :]
    assert all(size <= 1020 for size in sizes)
    asked = [one for batch in world.fake.batches.values() for one, _ in world.fake.requests(batch)]
    assert asked == IDS


@pytest.mark.parametrize("shared_world", ["openai", "mistral"], indirect=True, scope="module")
def test_one_shard_is_refused(world: RemoteWorld, small: Driver, tmp_path: Path) -> None:
    """Its rows are named by their place in the whole input, and only it is submitted anew."""
    job = world.job(tmp_path, count=ROWS)
    batches = small.submit(job)
    world.fake.fail(batches[2].id, "token_limit_exceeded", "Enqueued token limit reached.", 2)
    for number in (0, 1, 3, 4, 5, 6):
        world.finish(batches[number].id)
    with pytest.raises(BatchFailedError, match="Enqueued token limit") as caught:
        small.collect(job)
    assert caught.value.batch_id == batches[2].id
    if world.name == "openai":
        assert [problem.line for problem in caught.value.problems] == [8]
    world.let_batches_end()
    report = small.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    ids = [batch.id for batch in report.batches]
    assert ids[:2] + ids[3:] == [batch.id for number, batch in enumerate(batches) if number != 2]
    assert ids[2] not in [batch.id for batch in batches]
    assert len(world.fake.batches) == 8


@every_format
def test_what_was_submitted_is_not_submitted_again(world: RemoteWorld, small: Driver, tmp_path: Path) -> None:
    """The fourth of seven creates is refused: the next attempt goes on from there."""
    from anybatch import BadRequestError
    from tests.fakes.faults import Respond

    job = world.job(tmp_path, count=ROWS)
    world.server.fail(
        "POST", ".*/(batches|batch/jobs)", Respond(400, {"error": {"message": "not now"}}), skip=3
    )
    with pytest.raises(BadRequestError, match="not now"):
        small.submit(job)
    first = list(world.fake.batches)
    assert len(first) == 3
    world.let_batches_end()
    report = small.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert [batch.id for batch in report.batches][:3] == first
    assert len(world.fake.batches) == 7
    ledger = json.loads((tmp_path / "out" / "job.json").read_text())
    assert [one["batch_id"] for one in ledger["shards"]] == list(world.fake.batches)
