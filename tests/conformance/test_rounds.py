"""Rows that are worth it are submitted again, in rounds; what was answered is kept, and paid for once."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anybatch import (
    APIError,
    BatchFailedError,
    BatchNotCompleteError,
    BatchStatus,
    CreateOutcomeUnknownError,
    DeadlineExceededError,
    InputChangedError,
    Job,
    JobError,
    NotFoundError,
    Outcome,
)
from tests.fakes.faults import ResetAfter, Respond
from tests.fakes.rows import Failure, Quirks

from .world import FORMATS, Driver, LocalWorld, RemoteWorld, cut, landed, row_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fakes.provider import FakeProvider

    End = Callable[[FakeProvider, str], object]

IDS = row_ids(8)
SHUFFLED = Quirks(shuffled=True)
CREATES = ".*/(batches|batch/jobs)"

every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
openai_only = pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")
findable = pytest.mark.parametrize("shared_world", ["openai", "mistral"], indirect=True, scope="module")
local_only = pytest.mark.parametrize("shared_world", ["local"], indirect=True, scope="module")


def expire(done: int) -> End:
    return lambda fake, batch_id: fake.expire(batch_id, done=done, quirks=SHUFFLED)


def cancel(done: int, failed: int = 0) -> End:
    return lambda fake, batch_id: fake.cancel_now(batch_id, done=done, failed=failed, quirks=SHUFFLED)


def fail(count: int, status: int = 400) -> End:
    return lambda fake, batch_id: fake.finish(
        batch_id, failed=count, failure=Failure(status), quirks=SHUFFLED
    )


def finish(fake: FakeProvider, batch_id: str) -> object:
    return fake.finish(batch_id, quirks=SHUFFLED)


def end_like(world: RemoteWorld, *ends: End) -> None:
    """The first batch ends like the first of these, and so on; further ones complete."""

    def end(fake: FakeProvider, batch_id: str) -> object:
        number = list(fake.batches).index(batch_id)
        return (ends[number] if number < len(ends) else finish)(fake, batch_id)

    world.end_with(end)


def asked(world: RemoteWorld) -> list[list[str]]:
    """The rows of each batch that was ever created, as they were uploaded."""
    return [[one for one, _ in world.fake.requests(batch)] for batch in world.fake.batches.values()]


def costs_nothing(world: RemoteWorld, driver: Driver, job: Job) -> None:
    """Running a landed job again returns its report and sends no request."""
    before = len(world.calls)
    assert driver.run(job) == job.report() is not None
    assert list(driver.submit(job)) == list(driver.resume(job)) == []
    assert len(world.calls) == before


@pytest.fixture
def fours(driver: Driver) -> Iterator[Driver]:
    """A provider whose batches hold four requests."""
    had = driver.provider.limits
    driver.provider.limits = replace(had, requests=4)
    yield driver
    driver.provider.limits = had


# --- which rows go again ---------------------------------------------------------------------------------


@every_format
def test_expired_rows_go_again(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert report.ok
    assert (report.rounds, asked(world)) == (2, [IDS, IDS[5:]])
    assert [batch.id for batch in report.batches] == list(world.fake.batches)
    assert [(batch.round, batch.shard, batch.rows) for batch in report.batches] == [(1, 0, 8), (2, 0, 3)]
    assert [batch.status for batch in report.batches] == [BatchStatus.EXPIRED, BatchStatus.COMPLETED]
    assert all((batch.created_at or 0) <= (batch.ended_at or 0) for batch in report.batches)
    assert all(batch.created_at and batch.ended_at for batch in report.batches)
    assert [found.text(one) for one in IDS] == [f"echo: say {one}" for one in IDS]
    spent = [line["response"]["body"]["usage"]["total_tokens"] for line in found.lines]
    assert report.usage.total_tokens == sum(spent)
    if driver.provider.traits.metadata is not None:
        marks = [batch.metadata for batch in world.fake.batches.values()]
        assert [(mark["anybatch_round"], mark["anybatch_shard"]) for mark in marks] == [
            ("1", "0/1"),
            ("2", "0/1"),
        ]
    costs_nothing(world, driver, job)


@openai_only
def test_too_few_rows_for_a_batch_stay_as_they_are(
    world: RemoteWorld, fours: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fours.provider.limits = replace(fours.provider.limits, requests=8, min_requests=4)
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    report = fours.run(job, timeout=10)
    assert landed(job, report, IDS).outcomes["row-5"] == Outcome.EXPIRED
    assert (report.rounds, asked(world)) == (1, [IDS])
    assert "3 rows could be submitted again, but a batch at openai needs at least 4 requests" in caplog.text
    caplog.clear()
    assert fours.submit(replace(job, max_rounds=3)).is_over
    assert "3 rows could be submitted again" in caplog.text


@every_format
def test_one_round_is_one_round(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """By default rows land as they ended; and no request more is sent than that takes."""
    end_like(world, expire(done=5))
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).outcomes["row-5"] == Outcome.EXPIRED
    assert (report.rounds, asked(world)) == (1, [IDS])
    costs_nothing(world, driver, job)


@every_format
@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_plain_job_costs_no_request_more(
    world: RemoteWorld, driver: Driver, tmp_path: Path, max_rounds: int
) -> None:
    """Upload, create, look until it has ended, look once more for its files, and read each of them once."""
    end_like(world, fail(1))
    job = world.job(tmp_path, max_rounds=max_rounds)
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.rounds == 1
    ledger = job.ledger()
    assert ledger is not None
    assert ledger.revision == 5, "opened, uploaded, claimed, created, landed"
    files = {call.path for call in world.calls if call.path.endswith(("/content", "/results"))}
    creates, looks = (1 if world.name == "anthropic" else 2), 2
    assert len(files) == creates, "Anthropic has one file of results, and none of requests"
    assert len(world.calls) == creates + looks + len(files), [str(call) for call in world.calls]


@every_format
def test_failures_that_may_pass_go_again(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """429 and 500 do, 400 does not."""
    ids = row_ids(12)
    end_like(world, fail(1, 400), fail(2, 429), fail(3, 500), fail(1, 400))
    job = world.job(tmp_path, count=12, max_rounds=5)
    report = fours.run(job, timeout=10)
    found = landed(job, report, ids)
    again = [*ids[4:6], *ids[8:11]]
    assert asked(world) == [ids[:4], ids[4:8], ids[8:], again[:4], again[4:]]
    refused = {"row-0", "row-4"}
    assert {one for one, outcome in found.outcomes.items() if outcome == Outcome.FAILED} == refused
    assert found.line("row-0")["response"]["status_code"] == 400
    assert report.rounds == 2, "no round is opened for rows that would be refused again"
    costs_nothing(world, fours, job)


@every_format
def test_missing_rows_go_again(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Those that no line speaks of, and those whose line is broken; strays of all rounds are kept."""
    odd = Quirks(missing={"row-2"}, bad_json={"row-4"}, extra=["ghost"], shuffled=True)
    odd_again = Quirks(extra=["row-0"])
    end_like(
        world,
        lambda fake, batch_id: fake.finish(batch_id, quirks=odd),
        lambda fake, batch_id: fake.finish(batch_id, quirks=odd_again),
    )
    job = world.job(tmp_path, max_rounds=2)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert report.ok
    assert asked(world) == [IDS, ["row-2", "row-4"]]
    assert report.unexpected == 2, "the ghost, and row-0 in a round that did not ask for it"
    assert len(found.stray) == 3
    assert found.text("row-0") == "echo: say row-0"


@every_format
def test_rounds_run_out(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    end_like(world, *[expire(done=1)] * 9)
    job = world.job(tmp_path, max_rounds=3)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert asked(world) == [IDS, IDS[1:], IDS[2:]]
    expected = dict.fromkeys(IDS, Outcome.EXPIRED) | dict.fromkeys(IDS[:3], Outcome.SUCCEEDED)
    assert found.outcomes == expected
    costs_nothing(world, driver, job)


@every_format
def test_three_rounds_of_three_kinds(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Expired, then cancelled, then failed: the later outcome stands where no round has an answer."""
    end_like(world, expire(done=2), cancel(done=2), fail(1, 500))
    job = world.job(tmp_path, max_rounds=2)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert asked(world) == [IDS, IDS[2:], IDS[4:]]
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | {"row-4": Outcome.FAILED}
    assert [batch.status for batch in report.batches] == ["expired", "cancelled", "completed"]
    assert report.rounds == 3


# --- batches that were cancelled ---------------------------------------------------------------------------


@every_format
def test_cancelled_at_the_console(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """What was done is kept, also what failed; exactly the rest is uploaded, whatever max_rounds says."""
    end_like(world, cancel(done=5, failed=1))
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert asked(world) == [IDS, IDS[5:]]
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | {"row-0": Outcome.FAILED}
    assert [batch.status for batch in report.batches] == [BatchStatus.CANCELLED, BatchStatus.COMPLETED]
    costs_nothing(world, driver, job)


@every_format
def test_cancelled_by_an_earlier_attempt(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """As when a task is killed and cleared: the next attempt finds the batch dying, and waits for its end."""
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    world.fake.start(first.id)
    world.fake.cancel_looks = None  # it takes its time to die
    driver.cancel(first.id)
    (dying,) = driver.submit(job)
    assert (dying.id, dying.status) == (first.id, BatchStatus.CANCELLING)
    with pytest.raises(BatchNotCompleteError):
        driver.collect(job)
    world.fake.cancel_now(first.id, done=3)
    world.let_batches_end()
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert asked(world) == [IDS, IDS[3:]]


@every_format
def test_cancelled_and_found_dead(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """The next attempt goes on at once; to re-attach to that again costs nothing."""
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    world.fake.cancel_now(first.id, done=2)
    (second,) = driver.submit(job)
    assert second.id != first.id
    assert not second.status.is_terminal
    assert (
        [batch.id for batch in driver.submit(job)]
        == [batch.id for batch in driver.resume(job)]
        == [second.id]
    )
    assert asked(world) == [IDS, IDS[2:]]
    world.finish(second.id)
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


@every_format
def test_cancelled_again_and_again(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Twice in one attempt rows go again, then somebody seems to mean it; the next attempt has two more."""
    end_like(world, *[cancel(done=1)] * 4)
    job = world.job(tmp_path)
    batches = driver.submit(job)
    while running := [batch for batch in batches if not batch.status.is_terminal]:
        assert not job.report()
        driver.wait(running[0].id, timeout=10)
        batches = driver.resume(job)
    assert asked(world) == [IDS, IDS[1:], IDS[2:]]
    assert [batch.status for batch in batches] == [BatchStatus.CANCELLED]
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert asked(world) == [IDS, IDS[1:], IDS[2:], IDS[3:], IDS[4:]]
    assert found.report.ok
    assert report.rounds == 5


@every_format
def test_cancelled_until_it_lands(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A landed job stays landed, also if its rows say that they were cancelled."""
    end_like(world, *[cancel(done=1)] * 9)
    job = world.job(tmp_path)
    found = landed(job, driver.run(job, timeout=10), IDS)
    expected = dict.fromkeys(IDS, Outcome.CANCELLED) | dict.fromkeys(IDS[:3], Outcome.SUCCEEDED)
    assert found.outcomes == expected
    costs_nothing(world, driver, job)
    world.fake.auto = None
    (batch,) = driver.submit(replace(job, max_rounds=2))
    assert asked(world)[3:] == [IDS[3:]]
    world.finish(batch.id)
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


@every_format
def test_one_of_three_shards_is_dead(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """Only its rows go again, and only those without an answer; its neighbours' failures stay."""
    ids = row_ids(11)
    end_like(world, fail(1, 500), cancel(done=1), expire(done=2))
    job = world.job(tmp_path, count=11)
    report = fours.run(job, timeout=10)
    found = landed(job, report, ids)
    assert asked(world) == [ids[:4], ids[4:8], ids[8:], ids[5:8]]
    assert found.outcomes == dict.fromkeys(ids, Outcome.SUCCEEDED) | {
        "row-0": Outcome.FAILED,
        "row-10": Outcome.EXPIRED,
    }
    assert [(batch.round, batch.shard) for batch in report.batches] == [(1, 0), (1, 1), (1, 2), (2, 0)]


@every_format
def test_one_shard_is_dead_while_another_runs(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """A round is opened when all of the one before has ended."""
    job = world.job(tmp_path)
    first, second = fours.submit(job)
    world.fake.cancel_now(first.id, done=1)
    for verb in (fours.submit, fours.resume):
        assert [batch.id for batch in verb(job)] == [first.id, second.id]
    world.finish(second.id)
    (third,) = fours.resume(job)
    assert asked(world)[2:] == [IDS[1:4]]
    world.finish(third.id)
    assert landed(job, fours.collect(job), IDS).report.ok


# --- the input of a later round ----------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("kind", ["path", "list", "generator"])
def test_resumed_without_the_input(world: RemoteWorld, driver: Driver, tmp_path: Path, kind: str) -> None:
    """The lines come from where they were kept, byte for byte; whoever resumes has none of them at hand."""
    job = world.job(tmp_path, max_rounds=2)
    lines = [world.line(one) for one in IDS]
    if kind != "path":
        job = replace(job, input=lines if kind == "list" else (line for line in lines))
    end_like(world, expire(done=6))
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    (second,) = driver.resume(replace(job, input=()))
    assert asked(world) == [IDS, IDS[6:]]
    bodies = [dict(world.fake.requests(batch)) for batch in world.fake.batches.values()]
    assert bodies[1] == {one: bodies[0][one] for one in IDS[6:]}
    driver.wait(second.id, timeout=10)
    again = replace(job, input=())
    assert all(batch.status.is_terminal for batch in driver.resume(again))
    assert landed(job, driver.collect(again), IDS).report.ok


@every_format
@pytest.mark.parametrize("how", ["removed", "changed", "spoilt"])
def test_an_input_that_is_not_what_it_was(
    world: RemoteWorld, driver: Driver, tmp_path: Path, how: str
) -> None:
    """Nothing of it is submitted; what there is lands."""
    job = world.job(tmp_path, max_rounds=2)
    end_like(world, expire(done=6))
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    source = tmp_path / "in.jsonl"
    had = source.read_bytes()
    match how:
        case "removed":
            source.unlink()
        case "changed":
            world.write(source, [*IDS, "row-8"])
        case "spoilt":
            source.write_bytes(had.replace(b'"row-7"', b'"row-7", "body": 1, "x": '))
    with pytest.raises(InputChangedError, match=r"rows could not be submitted again.*(removed|changed)"):
        driver.resume(replace(job, input=()))
    assert asked(world) == [IDS]
    assert job.report() is None
    if how == "changed":
        source.write_bytes(had)
        (second,) = driver.resume(job)
        source.unlink()
        driver.wait(second.id, timeout=10)
        assert landed(job, driver.run(job, timeout=10), IDS).report.ok
        return
    found = landed(job, driver.collect(job), IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | dict.fromkeys(IDS[6:], Outcome.EXPIRED)


@every_format
def test_an_input_lost_in_the_middle_of_a_round(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """Of an open round the second create is refused, and then the input goes: what there is lands."""
    end_like(world, expire(done=1), expire(done=1))
    job = world.job(tmp_path, max_rounds=2)
    for batch in fours.submit(job):
        fours.wait(batch.id, timeout=10)
    world.server.fail("POST", CREATES, Respond(400, {"error": {"message": "not now"}}), skip=1)
    with pytest.raises(Exception, match="not now"):
        fours.resume(job)
    assert asked(world)[2:] == [["row-1", "row-2", "row-3", "row-5"]]
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(InputChangedError, match="removed while the job ran"):
        fours.run(job, timeout=10)
    third = list(world.fake.batches)[2]
    fours.wait(third, timeout=10)
    report = fours.collect(job)
    found = landed(job, report, IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | dict.fromkeys(IDS[6:], Outcome.EXPIRED)
    assert [batch.round for batch in report.batches] == [1, 1, 2]


# --- a job that has landed -------------------------------------------------------------------------------


@every_format
def test_max_rounds_raised_after_landing(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Just the rest goes again; what has landed stays readable meanwhile, but is not the last word."""
    odd = Quirks(extra=["ghost"], shuffled=True)
    end_like(world, lambda fake, batch_id: fake.expire(batch_id, done=5, failed=1, quirks=odd))
    job = world.job(tmp_path, price=(1.0, 2.0))
    first = driver.run(job, timeout=10)
    before = cut(tmp_path / "out" / "results.jsonl")
    more = replace(job, max_rounds=2)
    world.fake.auto = None
    (batch,) = driver.submit(more)
    assert asked(world) == [IDS, IDS[5:]], "not the one that was refused"
    assert job.report() is None
    assert cut(tmp_path / "out" / "results.jsonl") == before
    with pytest.raises(BatchNotCompleteError):
        driver.collect(more)
    world.finish(batch.id)
    report = driver.run(more, timeout=10)
    found = landed(more, report, IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | {"row-0": Outcome.FAILED}
    assert cut(tmp_path / "out" / "results.jsonl")[:5] == before[:5]
    assert (report.rounds, report.unexpected, len(found.stray)) == (2, 1, 1)
    assert report.started_at == first.started_at
    assert report.batches[0] == first.batches[0]
    spent = [line["response"]["body"]["usage"] for line in found.lines[1:]]
    assert report.usage.total_tokens == sum(usage["total_tokens"] for usage in spent)
    assert report.cost == pytest.approx(
        sum(usage["prompt_tokens"] + 2 * usage["completion_tokens"] for usage in spent) / 1e6
    )
    for same in (job, more, replace(job, max_rounds=9)):
        costs_nothing(world, driver, same)


@every_format
def test_results_that_somebody_has_changed_are_not_gone_on_with(
    world: RemoteWorld, driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end_like(world, expire(done=5))
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    results = tmp_path / "out" / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[2:]))
    assert driver.run(replace(job, max_rounds=2)) == report
    results.unlink()
    assert driver.run(replace(job, max_rounds=2)) == report
    assert caplog.text.count("has landed; its failed rows are not submitted again") == 2
    assert asked(world) == [IDS]


@every_format
def test_restart(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Once more for each text, whatever was done before; and a run without one keeps to that."""
    job = world.job(tmp_path, on_changed="fail")
    (first,) = driver.submit(job)
    world.fake.start(first.id)
    again = replace(job, restart="a")
    (second,) = driver.submit(again)
    assert second.id != first.id
    assert not world.fake.batches[first.id].is_live, "what still ran was cancelled"
    for same in (again, job):
        assert [batch.id for batch in driver.submit(same)] == [second.id]
    world.let_batches_end()
    report = driver.run(again, timeout=10)
    assert landed(job, report, IDS).report.ok
    for same in (again, job):
        costs_nothing(world, driver, same)
    once_more = driver.run(replace(job, restart="b"), timeout=10)
    assert landed(job, once_more, IDS).report.ok
    assert [batch.id for batch in once_more.batches] == list(world.fake.batches)[2:]
    for same in (again, job, replace(job, restart="b")):
        costs_nothing(world, driver, same)
    assert asked(world) == [IDS] * 3
    with pytest.raises(InputChangedError):
        driver.submit(replace(job, restart="c", model=world.model))


@every_format
def test_restart_of_a_job_with_rounds(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """It begins at the beginning, and leaves nothing of the rounds before."""
    end_like(world, expire(done=3), expire(done=3))
    job = world.job(tmp_path, max_rounds=2)
    driver.run(job, timeout=10)
    report = driver.run(replace(job, restart="again"), timeout=10)
    assert asked(world) == [IDS, IDS[3:], IDS]
    assert landed(job, report, IDS).report.rounds == 1


# --- what goes wrong on the way --------------------------------------------------------------------------


@every_format
def test_resume_without_a_submission(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="was never submitted"):
        driver.resume(world.job(tmp_path))


@findable
def test_a_refused_batch_in_a_later_round(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """It fails the attempt; the next one submits that round anew, and nothing else."""
    end_like(
        world,
        expire(done=5),
        lambda fake, batch_id: fake.fail(batch_id, "token_limit_exceeded", "Too much.", 1),
    )
    job = world.job(tmp_path, max_rounds=2)
    with pytest.raises(BatchFailedError, match="Too much"):
        driver.run(job, timeout=10)
    assert asked(world) == [IDS, IDS[5:]]
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert asked(world) == [IDS, IDS[5:], IDS[5:]]
    assert len(report.batches) == report.rounds == 2


@openai_only
def test_a_round_that_is_always_refused_can_be_given_up(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """With a lower `max_rounds` the rows land as they were before it, and nothing more is submitted."""
    refuse = lambda fake, batch_id: fake.fail(batch_id, "model_retired", "Gone.", 1)  # noqa: E731
    end_like(world, expire(done=5), refuse, refuse)
    job = world.job(tmp_path, max_rounds=2)
    for _ in range(2):
        with pytest.raises(BatchFailedError, match="lower max_rounds"):
            driver.run(job, timeout=10)
    report = driver.run(world.job(tmp_path), timeout=10)
    assert report.counts[Outcome.SUCCEEDED] == 5
    assert sum(report.counts.values()) == len(IDS)
    assert asked(world) == [IDS, IDS[5:], IDS[5:]]


@openai_only
def test_a_landed_job_whose_input_is_gone_stays_landed(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    end_like(world, expire(done=5))
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    Path(str(job.input)).unlink()
    assert driver.run(replace(job, max_rounds=2), timeout=10) == report
    assert asked(world) == [IDS]


@every_format
def test_a_cancelled_batch_whose_input_is_gone(
    world: RemoteWorld, driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows cannot be submitted again, so they land as they are."""
    end_like(world, cancel(done=2))
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    Path(str(job.input)).unlink()
    (same,) = driver.resume(replace(job, input=()))
    assert same.id == first.id
    assert "lands with cancelled rows" in caplog.text
    found = landed(job, driver.run(job, timeout=10), IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.CANCELLED) | dict.fromkeys(IDS[:2], Outcome.SUCCEEDED)
    assert asked(world) == [IDS]


@openai_only
def test_a_cancelled_batch_whose_input_nobody_has_named(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """It is not gone: who knows where it is can go on."""
    end_like(world, cancel(done=2))
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    path = tmp_path / "out" / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"input": None}))
    with pytest.raises(InputChangedError):
        driver.resume(replace(job, input=()))
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


@every_format
@pytest.mark.parametrize("place", ["restart", "input"])
def test_a_batch_that_the_provider_knows_no_more(
    world: RemoteWorld, driver: Driver, tmp_path: Path, place: str
) -> None:
    """It is a clear error, and no obstacle to submitting the input, or another, anew."""
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    gone = world.fake.batches.pop(first.id)
    for verb in (driver.submit, driver.collect):
        with pytest.raises(NotFoundError, match=r"Job\.restart submits the input once more"):
            verb(job)
    ids = IDS
    if place == "input":
        ids = [*IDS, "row-8"]
        again = replace(job, input=world.write(tmp_path / "other.jsonl", ids))
    else:
        again = replace(job, restart="again")
    world.let_batches_end()
    assert landed(job, driver.run(again, timeout=10), ids).report.ok
    assert gone.id not in world.fake.batches


@findable
def test_a_claim_of_a_later_round_that_died_and_the_input_with_it(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """The create left no batch, as looking tells, and no other can follow: what there is lands."""
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    world.server.fail("POST", CREATES, Respond(500), times=1000, skip=1)
    with pytest.raises(CreateOutcomeUnknownError):
        driver.run(job, timeout=10)
    Path(str(job.input)).unlink()
    with pytest.raises(InputChangedError):
        driver.run(job, timeout=10)
    path = tmp_path / "out" / "job.json"
    had = json.loads(path.read_text())
    assert had["shards"][1]["tries"] > 1
    now = {"step": "creating", "attempt": "another", "creating_at": time.time()}
    path.write_text(json.dumps(had | {"shards": [had["shards"][0], had["shards"][1] | now]}))
    with pytest.raises(JobError, match="submit the job first"):
        driver.collect(job)
    path.write_text(json.dumps(had))
    found = landed(job, driver.collect(job), IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | dict.fromkeys(IDS[5:], Outcome.EXPIRED)
    assert asked(world) == [IDS]


@openai_only
def test_a_claim_of_a_later_round_that_left_a_batch(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    world.server.fail("POST", CREATES, ResetAfter(), skip=1)
    world.server.fail("GET", CREATES, Respond(503), times=1000)
    with pytest.raises(APIError, match="503"):
        driver.run(job, timeout=10)
    world.server.clear_faults()
    with pytest.raises(JobError, match="submit the job first"):
        driver.collect(replace(job, lease=0.0))
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert asked(world) == [IDS, IDS[5:]]


@findable
def test_a_create_of_a_later_round_gets_no_answer(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Its batch is found by the file of that round, and not created again."""
    end_like(world, expire(done=5))
    world.server.fail("POST", CREATES, ResetAfter(), skip=1)
    job = world.job(tmp_path, max_rounds=2)
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert asked(world) == [IDS, IDS[5:]]


@every_format
def test_the_deadline_is_that_of_all_rounds(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    end_like(world, expire(done=5), lambda fake, batch_id: None)  # the second batch never ends
    job = world.job(tmp_path, max_rounds=2)
    with pytest.raises(DeadlineExceededError):
        driver.run(job, timeout=0.2)
    assert asked(world) == [IDS, IDS[5:]]
    world.finish(list(world.fake.batches)[1])
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


# --- the embedded provider -------------------------------------------------------------------------------


@local_only
def test_local_cancelled_midway(world: LocalWorld, driver: Driver, tmp_path: Path) -> None:
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    world.time += 50
    driver.cancel(first.id)
    world.let_batches_end()
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert [(batch.round, batch.rows) for batch in report.batches] == [(1, 8), (2, 4)]


@local_only
def test_local_expires_three_times(world: LocalWorld, driver: Driver, tmp_path: Path) -> None:
    """Half of the rows are done when the window closes, each time."""
    world.let_batches_end()
    job = world.job(tmp_path, completion_window="50s", max_rounds=3)
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.counts[Outcome.SUCCEEDED] == 7
    assert [batch.rows for batch in report.batches] == [8, 4, 2]
    assert driver.run(job) == report
    last = driver.run(
        replace(job, max_rounds=4, restart="with more time", completion_window="24h"), timeout=10
    )
    assert (last.ok, last.rounds) == (True, 1)


@local_only
def test_local_resumed_by_other_processes(world: LocalWorld, driver: Driver, tmp_path: Path) -> None:
    """Submitted, resumed and collected by clients that share nothing but the folder and the provider."""
    lines = [world.line(one) for one in IDS]
    job = replace(world.job(tmp_path, max_rounds=2, completion_window="50s"), input=lines)
    (first,) = driver.submit(job)
    job = replace(job, input=())
    world.time += 60
    with world.open("async") as other:
        (second,) = other.resume(job)
        assert second.id != first.id
    world.time += 60
    with world.open("sync") as other:
        assert all(batch.status.is_terminal for batch in other.resume(job))
        report = other.collect(job)
    assert landed(job, report, IDS).report.counts[Outcome.SUCCEEDED] == 6
