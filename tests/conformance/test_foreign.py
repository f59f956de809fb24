"""`land_batches`: the results of batches that no job has made, in every wire format, with both clients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import (
    BatchFailedError,
    BatchNotCompleteError,
    ConfigurationError,
    Outcome,
    Report,
    ServerError,
)
from tests.fakes.rows import Quirks

from .test_lost_rows import CUTS, Cut, cutting, whole_again  # noqa: F401  a fixture
from .world import FORMATS, Driver, RemoteWorld, row_ids

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.fakes.server import Reply, Request

every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
openai = pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")


def create(world: RemoteWorld, driver: Driver, folder: Path, ids: Iterable[str]) -> str:
    batch = driver.create(world.write(folder / "in.jsonl", ids), world.endpoint)
    return str(batch.id)


def land(world: RemoteWorld, driver: Driver, batch_ids: Any, folder: Path, **options: Any) -> Report:
    report: Report = driver.land_batches(batch_ids, folder, endpoint=world.endpoint, **options)
    return report


def lines(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@every_format
def test_rows_land_as_a_job_has_them(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.fake.quirks = Quirks(shuffled=True, duplicated={"row-2"})
    world.let_batches_end()
    job = world.job(tmp_path)
    theirs = driver.run(job, timeout=10)
    (batch,) = theirs.batches
    report = land(world, driver, batch.id, tmp_path / "landed", price=(1.0, 2.0))
    same = {"rows", "counts", "unexpected", "usage", "models", "endpoint", "provider"}
    assert report.model_dump(include=same) == theirs.model_dump(include=same)
    assert report.batches == (batch.model_copy(update={"input_file_id": report.batches[0].input_file_id}),)
    assert report.batches[0].ended_at is not None
    assert report.cost == pytest.approx((report.usage.input_tokens + 2 * report.usage.output_tokens) / 1e6)
    ours = {line["custom_id"]: line for line in lines(tmp_path / "landed")}
    assert ours == {line["custom_id"]: line for line in lines(tmp_path / "out")}
    assert lines(tmp_path / "landed", "stray.jsonl") == lines(tmp_path / "out", "stray.jsonl")
    world.fake.quirks = Quirks()
    other = create(world, driver, tmp_path, row_ids(2))
    driver.wait(other, timeout=10)
    land(world, driver, other, tmp_path / "landed")  # of the landing before nothing is left
    assert not (tmp_path / "landed" / "stray.jsonl").exists()
    names = {path.name for path in (tmp_path / "landed").iterdir()}
    assert names == {".lock", "results.jsonl", "report.json"}


@every_format
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_download_that_is_cut_short_is_asked_for_again(
    world: RemoteWorld, driver: Driver, tmp_path: Path, cut: Cut
) -> None:
    batch_id = create(world, driver, tmp_path, row_ids(8))
    world.finish(batch_id)
    spoiled = cutting(world, cut, times=2)
    report = land(world, driver, [batch_id], tmp_path / "landed")
    assert (spoiled(), report.counts[Outcome.SUCCEEDED], report.rows) == (2, 8, 8)


@every_format
def test_a_page_that_is_no_result_file_lands_nothing(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """B4: the page of a log-in landed as rows."""
    good = create(world, driver, tmp_path, row_ids(2))
    world.finish(good)
    land(world, driver, good, tmp_path / "landed")
    before = (tmp_path / "landed" / "results.jsonl").read_bytes()
    cutting(world, CUTS["a page of a log-in"], times=10**6)
    with pytest.raises(ServerError, match="is not a result file; it begins with '<'"):
        land(world, driver, good, tmp_path / "landed")
    assert (tmp_path / "landed" / "results.jsonl").read_bytes() == before


def appending(world: RemoteWorld, *more: dict[str, Any], first: bool = False) -> None:
    """Let the output files have more lines than the fake writes."""
    fake, added = world.fake, b"".join(json.dumps(line).encode() + b"\n" for line in more)

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if request.path.endswith("/content") and reply.status == 200:
            return replace(reply, body=added + reply.body if first else reply.body + added)
        return reply

    world.server.app = serve


FAILED = {"custom_id": "row-1", "response": None, "error": {"code": "server_error", "message": "oops"}}


@openai
@pytest.mark.parametrize("first", [True, False])
def test_of_two_lines_for_one_row_the_success_counts(
    world: RemoteWorld, driver: Driver, tmp_path: Path, first: bool
) -> None:
    """B4: a failure stayed that a later line mends."""
    batch_id = create(world, driver, tmp_path, row_ids(3))
    world.finish(batch_id)
    appending(world, FAILED, first=first)
    report = land(world, driver, batch_id, tmp_path / "landed")
    assert (report.rows, report.counts[Outcome.SUCCEEDED], report.unexpected) == (3, 3, 1)
    assert [line["error"] for line in lines(tmp_path / "landed", "stray.jsonl")] == [FAILED["error"]]


@openai
def test_rows_without_a_line_are_counted_and_lines_without_an_id_are_rows(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    world.fake.quirks = Quirks(missing={"row-0", "row-1"})
    batch_id = create(world, driver, tmp_path, row_ids(4))
    world.finish(batch_id)
    fake = world.fake
    appending(world, {"no": "id"})
    report = land(world, driver, batch_id, tmp_path / "landed")
    counts = {outcome: count for outcome, count in report.counts.items() if count}
    assert counts == {Outcome.SUCCEEDED: 2, Outcome.FAILED: 1, Outcome.MISSING: 1}
    assert (report.rows, report.unexpected) == (4, 0)
    (nameless,) = [line for line in lines(tmp_path / "landed") if not line["custom_id"]]
    assert nameless["error"]["code"] == "undecodable_line"
    assert lines(tmp_path / "landed", "stray.jsonl") == [{"no": "id"}]
    world.server.app = fake


@every_format
def test_several_batches_land_in_one_file(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    first = create(world, driver, tmp_path, ["a", "b"])
    second = create(world, driver, tmp_path, ["a", "c"])
    world.finish(first)
    with pytest.raises(BatchNotCompleteError, match=second):
        land(world, driver, [first, second], tmp_path / "landed")
    world.finish(second)
    report = land(world, driver, [first, second, first], tmp_path / "landed", id="mine")
    assert sorted(line["custom_id"] for line in lines(tmp_path / "landed")) == ["a", "a", "b", "c"]
    assert [(one.id, one.shard, one.rows) for one in report.batches] == [(first, 0, 2), (second, 1, 2)]
    assert (report.job, report.rows) == ("mine", 4)
    assert report == Report.model_validate_json((tmp_path / "landed" / "report.json").read_text())


@openai
def test_what_cannot_be_landed(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    batch_id = create(world, driver, tmp_path, row_ids(1))
    world.fake.fail(batch_id, "token_limit_exceeded", "Too many tokens")
    with pytest.raises(BatchFailedError, match="token_limit_exceeded"):
        land(world, driver, batch_id, tmp_path / "landed")
    with pytest.raises(ConfigurationError, match="no batch"):
        land(world, driver, [], tmp_path / "landed")
    driver.submit(world.job(tmp_path, id="another"))
    with pytest.raises(ConfigurationError, match="holds job 'another'"):
        land(world, driver, batch_id, tmp_path / "out")
