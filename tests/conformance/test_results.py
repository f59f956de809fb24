"""What real servers have been seen to do to results: whatever it is, every row is accounted for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from anybatch import BatchFailedError, BatchStatus, DeadlineExceededError, Outcome, ServerError, read_results
from anybatch.rows import downloads
from tests.fakes.faults import Respond
from tests.fakes.provider import State
from tests.fakes.rows import SEPARATORS, Failure, Quirks

from .world import FORMATS, REMOTE, SHAPES, Driver, RemoteWorld, landed, row_ids, said

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.fakes.provider import FakeProvider

IDS = row_ids(8)

every_provider = pytest.mark.parametrize("shared_world", REMOTE, indirect=True, scope="module")
every_shape = pytest.mark.parametrize("shared_world", SHAPES, indirect=True, scope="module")
every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
findable = pytest.mark.parametrize("shared_world", ["openai", "mistral"], indirect=True, scope="module")
openai_only = pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")


@dataclass(frozen=True)
class Case:
    """How the batch ends, and what is to come of it; rows not named succeed."""

    quirks: Quirks = field(default_factory=Quirks)
    state: State = State.COMPLETED
    done: int = 8
    failed: int = 0
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    strays: int = 0
    unexpected: int = 0
    stray_ids: tuple[str, ...] = ()

    def end(self, fake: FakeProvider, batch_id: str) -> object:
        if self.state is State.EXPIRED:
            return fake.expire(batch_id, done=self.done, failed=self.failed, quirks=self.quirks)
        if self.state is State.CANCELLED:
            return fake.cancel_now(batch_id, done=self.done, failed=self.failed, quirks=self.quirks)
        return fake.finish(batch_id, failed=self.failed, quirks=self.quirks)


def ended(outcome: Outcome, *ids: str) -> dict[str, Outcome]:
    return dict.fromkeys(ids, outcome)


FAILED_2 = ended(Outcome.FAILED, *IDS[:2])
ALL_FAILED = ended(Outcome.FAILED, *IDS)

EVERYWHERE = {  # run at every provider
    "expired with partial results": Case(
        state=State.EXPIRED, done=5, failed=1,
        outcomes=ended(Outcome.FAILED, "row-0") | ended(Outcome.EXPIRED, *IDS[5:]),
    ),
    "all at once": Case(
        Quirks(
            shuffled=True, missing={"row-5"}, extra=["row-99"], duplicated={"row-6"}, separators={"row-2"},
            bad_utf8={"row-3"}, bad_json={"row-4"}, blank_lines=True, crlf=True, unterminated=True,
        ),
        failed=2,
        outcomes=FAILED_2 | ended(Outcome.FAILED, "row-3", "row-4") | ended(Outcome.MISSING, "row-5"),
        strays=4, unexpected=2, stray_ids=("row-99", "row-6"),
    ),
}  # fmt: skip

BY_SHAPE = {  # run once for each shape of the batch object
    "both files": Case(failed=2, outcomes=FAILED_2),
    "error file only": Case(failed=8, outcomes=ALL_FAILED),
    "cancelled with partial results": Case(
        state=State.CANCELLED, done=3, failed=1,
        outcomes=ended(Outcome.FAILED, "row-0") | ended(Outcome.CANCELLED, *IDS[3:]),
    ),
}  # fmt: skip

BY_FORMAT = {  # run once for each wire format
    "in one file": Case(Quirks(files="output"), failed=2, outcomes=FAILED_2),
    "all in the error file": Case(Quirks(files="error"), failed=2, outcomes=FAILED_2),
    "an empty file": Case(Quirks(files="both")),
    "out of order": Case(Quirks(shuffled=True), failed=2, outcomes=FAILED_2),
    "U+2028 and U+0085 in a text": Case(Quirks(separators={"row-2", "row-7"})),
    "a broken UTF-8 byte": Case(
        Quirks(bad_utf8={"row-3"}), outcomes=ended(Outcome.FAILED, "row-3"), strays=1
    ),
    "a broken JSON line": Case(Quirks(bad_json={"row-4"}), outcomes=ended(Outcome.FAILED, "row-4"), strays=1),
    "a duplicate id": Case(
        Quirks(duplicated={"row-1"}), strays=1, unexpected=1, stray_ids=("row-1",)
    ),
    "an id never asked for": Case(
        Quirks(extra=["ghost", "row-08"]), strays=2, unexpected=2, stray_ids=("ghost", "row-08")
    ),
    "a missing line": Case(Quirks(missing={"row-5"}), outcomes=ended(Outcome.MISSING, "row-5")),
    "body as text": Case(Quirks(body_as_text=True), failed=2, outcomes=FAILED_2),
    "error as text": Case(Quirks(error_as_text=True), failed=2, outcomes=FAILED_2),
    "CRLF, blank lines and no last line end": Case(
        Quirks(crlf=True, blank_lines=True, unterminated=True), failed=2, outcomes=FAILED_2
    ),
    "files named later": Case(Quirks(files_after_looks=3), failed=2, outcomes=FAILED_2),
    "expired before anything was done": Case(
        state=State.EXPIRED, done=0, outcomes=ended(Outcome.EXPIRED, *IDS)
    ),
    "cancelled before anything was done": Case(
        state=State.CANCELLED, done=0, outcomes=ended(Outcome.CANCELLED, *IDS)
    ),
}  # fmt: skip


def account_for(world: RemoteWorld, driver: Driver, folder: Path, case: Case) -> None:
    """Run one job that ends like this, and find every row."""
    world.end_with(case.end)
    job = world.job(folder)
    report = driver.run_once(job, timeout=10)
    found = landed(job, report, IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | dict(case.outcomes)
    assert report.unexpected == case.unexpected
    assert len(found.stray) == case.strays
    assert report.batches[0].status == BatchStatus(case.state)
    for custom_id, outcome in found.outcomes.items():
        if outcome == Outcome.SUCCEEDED:
            spoilt = custom_id in case.quirks.separators
            assert found.text(custom_id) == f"echo: say {custom_id}{SEPARATORS if spoilt else ''}"
    for custom_id in (*case.quirks.bad_utf8, *case.quirks.bad_json):
        assert found.line(custom_id)["error"]["code"] == "undecodable_line"
        assert any(custom_id.encode() in raw for raw in found.stray), "the provider's bytes are within reach"
    for custom_id in case.stray_ids:
        assert any(custom_id.encode() in raw for raw in found.stray)
    for raw in found.stray:
        assert not raw.endswith(b"\r")


@every_provider
@pytest.mark.parametrize("case", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_results_at_every_provider(world: RemoteWorld, driver: Driver, tmp_path: Path, case: Case) -> None:
    account_for(world, driver, tmp_path, case)


@every_shape
@pytest.mark.parametrize("case", BY_SHAPE.values(), ids=BY_SHAPE.keys())
def test_results_in_every_shape(world: RemoteWorld, driver: Driver, tmp_path: Path, case: Case) -> None:
    account_for(world, driver, tmp_path, case)


@every_format
@pytest.mark.parametrize("case", BY_FORMAT.values(), ids=BY_FORMAT.keys())
def test_results_in_every_format(world: RemoteWorld, driver: Driver, tmp_path: Path, case: Case) -> None:
    if world.name == "anthropic" and case.quirks.files == "error":
        pytest.skip("Anthropic has one results file")
    account_for(world, driver, tmp_path, case)


@every_format
def test_why_a_row_failed(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    failure = Failure(429, "rate_limit_exceeded", "Too many requests at once.", "rate_limit_error")
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=1, failure=failure))
    job = world.job(tmp_path)
    driver.run(job, timeout=10)
    (batch,) = world.fake.batches
    (row,) = (row for row in driver.results(batch) if row.outcome is Outcome.FAILED)
    assert row.custom_id == "row-0"
    assert row.status_code == 429
    assert row.error.message == "Too many requests at once."
    raw = (tmp_path / "out" / "results.jsonl").read_text().splitlines()[0]
    assert "Too many requests at once." in raw


@openai_only
def test_lines_of_openai_shape_land_byte_for_byte(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    driver.run(world.job(tmp_path), timeout=10)
    theirs = world.fake.files[world.fake.last.output_file_id].data.splitlines(keepends=True)
    ours = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert ours == [b'{"outcome":"succeeded",' + line[1:] for line in theirs]


@openai_only
@pytest.mark.parametrize("as_text", [False, True], ids=["body", "body as text"])
def test_lines_that_only_python_would_write(
    world: RemoteWorld, driver: Driver, tmp_path: Path, as_text: bool
) -> None:
    """Half an emoji and NaN are no JSON, but their rows were paid for: they are mended."""

    def end(fake: FakeProvider, batch_id: str) -> None:
        file = fake.files[fake.finish(batch_id).output_file_id]
        lines = [json.loads(line) for line in file.data.splitlines()]
        for line in lines[2:4]:
            body = line["response"]["body"]
            body["choices"][0]["message"]["content"] += " \ud83d"
            body["choices"][0]["logprobs"] = [float("nan"), float("-inf")]
            line["response"]["body"] = json.dumps(body) if as_text else body
        file.data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    world.end_with(end)
    job = world.job(tmp_path)
    found = landed(job, driver.run(job, timeout=10), IDS)
    assert found.report.ok
    assert found.stray == []
    assert found.text("row-2") == "echo: say row-2 ?"
    assert found.line("row-3")["response"]["body"]["choices"][0]["logprobs"] == [None, None]
    assert [row.outcome for row in read_results(tmp_path / "out" / "results.jsonl")] == [
        Outcome.SUCCEEDED
    ] * 8
    assert driver.results(world.fake.last.id)[2].result.choices[0].message.content == "echo: say row-2 ?"


@openai_only
def test_of_two_lines_for_a_row_the_success_wins(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Whichever comes first; the other one is kept aside."""

    def end(fake: FakeProvider, batch_id: str) -> None:
        batch = fake.finish(batch_id)
        lines = fake.files[batch.output_file_id].data.splitlines(keepends=True)
        for number in (1, 2):
            bad = json.loads(lines[number]) | {"response": None, "error": {"code": "500", "message": "no"}}
            lines.insert(0 if number == 1 else len(lines), json.dumps(bad).encode() + b"\n")
        fake.files[batch.output_file_id].data = b"".join(lines)

    world.end_with(end)
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert report.ok
    assert report.unexpected == 2
    assert [json.loads(raw)["error"]["message"] for raw in found.stray] == ["no", "no"]
    assert report.usage.total_tokens == sum(
        line["response"]["body"]["usage"]["total_tokens"] for line in found.lines
    )


@every_shape
def test_results_without_a_job(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Rows that were paid for are waited for: the counts tell of them (but SiliconFlow's may be null)."""
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    world.fake.expire(batch.id, done=6, failed=1, quirks=Quirks(files_after_looks=2))
    tally = Counter(row.outcome for row in driver.results(batch.id))
    assert tally[Outcome.SUCCEEDED] == 5
    assert tally[Outcome.FAILED] == 1
    assert tally[Outcome.EXPIRED] == (0 if world.name == "mistral" else 2), "Mistral writes no such lines"


@every_format
@pytest.mark.parametrize("verb", ["results", "download"])
def test_files_that_are_named_later(world: RemoteWorld, driver: Driver, tmp_path: Path, verb: str) -> None:
    (batch,) = driver.submit(world.job(tmp_path))
    world.fake.finish(batch.id, quirks=Quirks(files_after_looks=2))
    if verb == "results":
        assert sorted(row.custom_id for row in driver.results(batch.id)) == IDS
    else:
        (path,) = driver.download(batch.id, tmp_path / "files")
        assert path.read_bytes().count(b"\n") == 8


@openai_only
def test_settling_is_bounded(
    world: RemoteWorld, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "SETTLING", 3 * downloads.PAUSES[0])
    (batch,) = driver.submit(world.job(tmp_path))
    world.fake.finish(batch.id, quirks=Quirks(files="neither"))
    world.calls.clear()
    with pytest.raises(ServerError, match="hold 0 of the 8 rows that the provider counts"):
        driver.results(batch.id)
    assert 3 <= len(world.calls) <= 5


@findable
def test_files_that_are_never_named(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """That is an error, since the rows were paid for, until `on_lost` says to do without them."""
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, quirks=Quirks(files="neither")))
    job = world.job(tmp_path)
    with pytest.raises(ServerError, match=r"hold 0 of the 8 rows .* on_lost='land'"):
        driver.run(job, timeout=10)
    assert job.report() is None
    report = driver.run(replace(job, on_lost="land"), timeout=10)
    assert landed(job, report, IDS).outcomes == dict.fromkeys(IDS, Outcome.MISSING)


@openai_only
@pytest.mark.parametrize("comes", [True, False])
def test_an_error_file_that_is_named_later(
    world: RemoteWorld, driver: Driver, tmp_path: Path, comes: bool
) -> None:
    """It is waited for while rows are counted as failed that no line tells of."""

    def end(fake: FakeProvider, batch_id: str) -> None:
        batch = fake.finish(batch_id, failed=2)
        hidden.append(batch.error_file_id)
        batch.error_file_id = None

    hidden: list[str | None] = []
    world.end_with(end)
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    driver.wait(batch.id, timeout=10)
    if comes:
        hold = world.server.hold("GET", ".*/batches/[^/]+", handled=False, skip=1)
        with ThreadPoolExecutor(1) as threads:
            collecting = threads.submit(driver.collect, job)
            hold.wait()
            world.fake.last.error_file_id = hidden[0]
            hold.release()
            report = collecting.result(10)
    else:
        report = driver.collect(job)
    bad = Outcome.FAILED if comes else Outcome.MISSING
    assert landed(job, report, IDS).outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | ended(bad, *IDS[:2])
    assert report.batches[0].error_file_id == (hidden[0] if comes else None)


@every_format
@pytest.mark.parametrize(
    "text", ["<html>\n<body>Please log in.</body>\n</html>\n", '{"error": {"message": "log in"}}\n']
)
def test_a_download_that_is_no_result_file(
    world: RemoteWorld, driver: Driver, tmp_path: Path, text: str
) -> None:
    """Nothing lands of it, and the next attempt may find the file itself."""
    world.let_batches_end()
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    driver.wait(batch.id, timeout=10)
    world.server.fail("GET", ".*/(content|results)", Respond(200, text), times=99)
    with pytest.raises(
        ServerError, match=r"is not a result file; it begins with '.'; nothing of the batch was landed"
    ) as caught:
        driver.collect(job)
    assert caught.value.batch_id == batch.id
    assert "log in" not in str(caught.value)  # it might be a prompt
    assert job.report() is None
    world.server.clear_faults()
    world.server.fail("GET", ".*/(content|results)", Respond(200, text))
    assert landed(job, driver.collect(job), IDS).report.ok, "one that comes once is asked for again"


@openai_only
def test_an_error_file_that_is_none(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=2))
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    driver.wait(batch.id, timeout=10)
    errors = f".*/{world.fake.last.error_file_id}/content"
    world.server.fail("GET", errors, Respond(200, "<html>Please log in.</html>"), times=99)
    with pytest.raises(
        ServerError, match="is not a result file; it begins with '<'; nothing of the batch was landed"
    ):
        driver.collect(job)
    world.server.clear_faults()
    world.server.fail("GET", errors, Respond(200, "<html>Please log in.</html>"))
    assert landed(job, driver.collect(job), IDS).report.counts[Outcome.FAILED] == 2


@pytest.mark.parametrize("shared_world", [name for name in SHAPES if name != "anthropic"], indirect=True)
def test_batch_that_the_provider_refuses(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Its reasons are told, with the rows of the input they speak of; running again submits it anew."""
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    line = None if world.name in ("mistral", "novita", "cerebras") else 4
    world.fake.fail(batch.id, "token_limit_exceeded", "Enqueued token limit reached.", line)
    if world.name == "mistral":
        world.fake.last.errors = [{"message": "Enqueued token limit reached.", "count": 1}]
    for verb in (
        driver.collect,
        lambda job: driver.results(batch.id),
        lambda job: driver.download(batch.id, tmp_path),
    ):
        with pytest.raises(BatchFailedError, match="Enqueued token limit reached") as caught:
            verb(job)
        assert caught.value.batch_id == batch.id
        assert caught.value.provider == world.name
        assert [problem.line for problem in caught.value.problems] == [line]
    assert "report.json" not in [path.name for path in (tmp_path / "out").iterdir()]
    world.let_batches_end()
    report = driver.run(job, timeout=10)
    landed(job, report, IDS)
    assert report.batches[0].id != batch.id
    assert len(world.fake.live_batches()) == 1


@every_shape
def test_unknown_status_is_no_end(
    world: RemoteWorld, driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and bounded by the deadline; the batch can still end well."""
    (batch,) = driver.submit(world.job(tmp_path))
    world.fake.start(batch.id)
    world.fake.set_status(batch.id, "hibernating")
    seen: list[str] = []
    waits = 0
    for timeout in (0.06, 0.6, 6.0):  # the shortest in which this machine, as busy as it is, looks twice
        waits += 1
        before = world.fake.last.looks
        seen.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(DeadlineExceededError) as caught:
            driver.wait(batch.id, timeout=timeout, on_progress=lambda one: seen.append(one.status))
        assert caught.value.batch_id == batch.id
        if world.fake.last.looks >= before + 2:
            break
    else:
        pytest.fail("nobody looks twice")
    assert "hibernating" in str(caught.value)
    assert seen == [BatchStatus.UNKNOWN]
    told = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert 1 <= len(told) <= waits
    assert all("hibernating" in one and batch.id in one for one in told)
    world.fake.set_status(batch.id, None)
    world.fake.finish(batch.id)
    assert driver.wait(batch.id, timeout=10).status is BatchStatus.COMPLETED


@every_format
def test_run_ends_at_its_deadline(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """The error is the same from both clients; the batch is left running and taken up again."""
    job = world.job(tmp_path)
    with pytest.raises(DeadlineExceededError) as caught:
        driver.run(job, timeout=0.05)
    assert caught.value.batch_id == world.fake.last.id
    world.let_batches_end()
    landed(job, driver.run(job, timeout=10), IDS)
    assert len(world.fake.batches) == 1


@pytest.mark.parametrize("shared_world", ["perplexity", "openai"], indirect=True)
def test_rows_of_a_landed_job_are_read_back(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=1))
    driver.run(world.job(tmp_path), timeout=10)
    rows = list(read_results(tmp_path / "out" / "results.jsonl"))
    assert [row.custom_id for row in rows] == IDS
    assert [row.outcome for row in rows] == [Outcome.FAILED, *[Outcome.SUCCEEDED] * 7]
    assert all(said(row.result) == f"echo: say {row.custom_id}" for row in rows[1:])
    assert rows[0].status_code == 400
