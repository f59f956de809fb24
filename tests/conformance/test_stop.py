"""A job that is stopped: what runs is cancelled, what was finished lands, and nothing is paid for again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anybatch import BatchStatus, JobError, NotFoundError, OrphanError, Outcome
from tests.conformance.test_rounds import (
    CREATES,
    IDS,
    asked,
    cancel,
    costs_nothing,
    end_like,
    every_format,
    expire,
    findable,
    openai_only,
)
from tests.fakes.faults import ResetAfter, Respond

from .world import Driver, RemoteWorld, landed

if TYPE_CHECKING:
    from collections.abc import Iterator

CANCELS = ".*/cancel"
ENDING = (BatchStatus.CANCELLING, BatchStatus.CANCELLED)


@pytest.fixture
def fours(driver: Driver) -> Iterator[Driver]:
    """A provider whose batches hold four requests."""
    had = driver.provider.limits
    driver.provider.limits = replace(had, requests=4)
    yield driver
    driver.provider.limits = had


def expected(answered: list[str], ids: list[str] = IDS) -> dict[str, str]:
    return dict.fromkeys(ids, Outcome.CANCELLED) | dict.fromkeys(answered, Outcome.SUCCEEDED)


@every_format
@pytest.mark.parametrize("max_rounds", [1, 2])
def test_a_running_job(world: RemoteWorld, driver: Driver, tmp_path: Path, max_rounds: int) -> None:
    """No attempt submits its rows again, neither while its batch ends nor once it has landed."""
    job = world.job(tmp_path, max_rounds=max_rounds)
    (first,) = driver.submit(job)
    (stopped,) = driver.stop(job)
    assert (stopped.id, stopped.status in ENDING) == (first.id, True)
    assert world.fake.live_batches() == []
    for again in (driver.submit, driver.resume, driver.stop):
        assert [batch.id for batch in again(job)] == [first.id]
    assert world.server.count("POST", CANCELS) == 1
    if not world.fake.batches[first.id].is_terminal:
        world.fake.cancel_now(first.id, done=3)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    answered = [one for one, outcome in found.outcomes.items() if outcome == Outcome.SUCCEEDED]
    assert found.outcomes == expected(answered)
    assert [batch.id for batch in report.batches] == [first.id]
    assert list(driver.stop(job)) == []
    costs_nothing(world, driver, job)


@every_format
def test_a_job_of_which_only_a_part_was_submitted(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """The rows that never had a batch are cancelled like the others, and need no input."""
    job = world.job(tmp_path)
    world.server.fail("POST", CREATES, Respond(400, {"error": {"message": "not now"}}), skip=1)
    with pytest.raises(Exception, match="not now"):
        fours.submit(job)
    (stopped,) = fours.stop(job)
    Path(str(job.input)).unlink()
    world.fake.cancel_looks = 0
    report = fours.run(job, timeout=10)
    assert landed(job, report, IDS).outcomes == expected([])
    assert [batch.id for batch in report.batches] == [stopped.id]
    assert len(world.fake.batches) == 1


@every_format
def test_a_job_of_which_nothing_was_created(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    job = world.job(tmp_path, max_rounds=2)
    world.server.fail("POST", CREATES, Respond(400, {"error": {"message": "not now"}}))
    with pytest.raises(Exception, match="not now"):
        driver.submit(job)
    assert list(driver.stop(job)) == []
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).outcomes == expected([])
    assert world.fake.batches == {}
    assert report.batches == ()
    costs_nothing(world, driver, job)
    world.let_batches_end()
    again = driver.run(replace(job, max_rounds=3), timeout=10)
    assert landed(job, again, IDS).report.ok


@every_format
def test_more_rounds_after_landing(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    job = world.job(tmp_path, max_rounds=2)
    (first,) = driver.submit(job)
    driver.stop(replace(job, input=(), max_rounds=1))
    if not world.fake.batches[first.id].is_terminal:
        world.fake.cancel_now(first.id, done=2)
    landed(job, driver.run(job, timeout=10), IDS)
    costs_nothing(world, driver, job)
    more = replace(job, max_rounds=3)
    (second,) = driver.submit(more)
    assert second.id != first.id
    ledger = job.ledger()
    assert ledger is not None
    assert ledger.stopped_at is None
    driver.stop(more)
    if not world.fake.batches[second.id].is_terminal:
        world.fake.cancel_now(second.id, done=1)
    driver.run(more, timeout=10)
    costs_nothing(world, driver, more)
    world.let_batches_end()
    report = driver.run(replace(job, max_rounds=4), timeout=10)
    assert landed(job, report, IDS).report.ok


@every_format
@pytest.mark.parametrize("lands", [False, True])
def test_a_restart_submits_all_of_it(world: RemoteWorld, driver: Driver, tmp_path: Path, lands: bool) -> None:
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    driver.stop(job)
    if lands:
        if not world.fake.batches[first.id].is_terminal:
            world.fake.cancel_now(first.id)
        driver.collect(job)
    world.let_batches_end()
    report = driver.run(replace(job, restart="again"), timeout=10)
    assert landed(job, report, IDS).report.ok
    assert asked(world)[1:] == [IDS]


@every_format
def test_what_has_landed_stays(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    before = len(world.calls)
    assert list(driver.stop(job)) == []
    assert (driver.collect(job), len(world.calls)) == (report, before)


@openai_only
def test_a_job_that_was_never_submitted(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="was never submitted"):
        driver.stop(world.job(tmp_path))


@every_format
def test_a_batch_that_ends_before_it_can_be_cancelled(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """What it has answered was paid for, and lands."""
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    world.finish(first.id)
    (same,) = driver.stop(job)
    assert same.status is BatchStatus.COMPLETED
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


@every_format
def test_a_later_round(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Its rows are cancelled; what the round before has answered stays."""
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    world.fake.auto = None
    (second,) = driver.resume(job)
    driver.stop(job)
    if not world.fake.batches[second.id].is_terminal:
        world.fake.cancel_now(second.id, done=1)
    report = driver.run(job, timeout=10)
    found = landed(job, report, IDS)
    assert set(found.outcomes.values()) == {Outcome.SUCCEEDED, Outcome.CANCELLED}
    assert [found.outcomes[one] for one in IDS[:5]] == [Outcome.SUCCEEDED] * 5
    assert len(world.fake.batches) == 2


@openai_only
def test_a_later_round_of_which_nothing_was_created(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Its rows are what they were before it."""
    end_like(world, expire(done=5))
    job = world.job(tmp_path, max_rounds=2)
    world.server.fail("POST", CREATES, Respond(400, {"error": {"message": "not now"}}), skip=1)
    with pytest.raises(Exception, match="not now"):
        driver.run(job, timeout=10)
    assert list(driver.stop(job)) == []
    found = landed(job, driver.run(job, timeout=10), IDS)
    assert found.outcomes == dict.fromkeys(IDS, Outcome.SUCCEEDED) | dict.fromkeys(IDS[5:], Outcome.EXPIRED)


@findable
def test_a_create_that_got_no_answer(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Its batch is looked for, and cancelled."""
    job = world.job(tmp_path)
    world.server.fail("POST", CREATES, ResetAfter())
    world.server.fail("GET", CREATES, Respond(503), times=1000)
    with pytest.raises(Exception, match="503"):
        driver.submit(job)
    world.server.clear_faults()
    (stopped,) = driver.stop(job)
    assert [stopped.id] == list(world.fake.batches)
    assert world.fake.live_batches() == []
    assert driver.submit(job)[0].id == stopped.id


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_a_create_that_nobody_can_look_up(world: RemoteWorld, fours: Driver, tmp_path: Path) -> None:
    """What is known is cancelled; of the other a person is told, until they accept that it may run."""
    job = world.job(tmp_path, lease=0.1)
    world.server.fail("POST", CREATES, ResetAfter(), skip=1)
    with pytest.raises(OrphanError):
        fours.submit(job)
    for again in (fours.stop, fours.stop, fours.submit):
        with pytest.raises(OrphanError, match="may be running"):
            again(job)
    first, second = world.fake.batches.values()
    assert (first.is_live, second.is_live) == (False, True)
    with pytest.raises(OrphanError):
        fours.collect(job)
    report = fours.collect(replace(job, on_orphan="resubmit"))
    assert landed(job, report, IDS).outcomes == expected([])
    assert len(world.fake.batches) == 2


@openai_only
def test_a_batch_that_cannot_be_cancelled_keeps_none_of_the_others(
    world: RemoteWorld, fours: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path)
    first, second = fours.submit(job)
    gone = world.fake.batches.pop(first.id)
    with pytest.raises(NotFoundError):
        fours.stop(job)
    assert not world.fake.batches[second.id].is_live
    world.fake.batches[first.id] = gone
    assert [batch.id for batch in fours.stop(job)] == [first.id, second.id]
    assert not gone.is_live


@openai_only
def test_a_refused_batch(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """It is not submitted anew, and its rows land like those that never had a batch."""
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    world.fake.fail(first.id, "token_limit_exceeded", "Too much.")
    driver.stop(job)
    assert landed(job, driver.run(job, timeout=10), IDS).outcomes == expected([])
    assert len(world.fake.batches) == 1


@openai_only
def test_an_attempt_killed_between_its_note_and_its_cancels(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Whoever comes next cancels what runs."""
    job = world.job(tmp_path)
    driver.submit(job)
    world.server.fail("GET", ".*/batches/.*", Respond(500), times=1000)
    with pytest.raises(Exception, match="500"):
        driver.stop(job)
    world.server.clear_faults()
    assert len(world.fake.live_batches()) == 1
    (batch,) = driver.submit(job)
    assert batch.status in ENDING
    assert world.fake.live_batches() == []


@openai_only
def test_what_was_begun_with_earlier_input_is_cancelled_too(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path)
    driver.submit(job)
    world.server.fail("POST", CANCELS, Respond(500), times=1000)
    with pytest.raises(Exception, match="500"):
        driver.submit(replace(job, restart="again"))
    world.server.clear_faults()
    assert len(world.fake.live_batches()) == 1
    assert list(driver.stop(job)) == []
    assert world.fake.live_batches() == []


@openai_only
def test_a_ledger_from_before_jobs_could_be_stopped(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    path = tmp_path / "out" / "job.json"
    ledger = json.loads(path.read_text())
    for name in ("stopped_at", "max_rounds"):
        del ledger[name]
    path.write_text(json.dumps(ledger))
    (stopped,) = driver.stop(job)
    assert stopped.id == first.id
    assert world.fake.live_batches() == []


@openai_only
def test_cancelled_by_hand_and_then_stopped(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A round that was opened for a cancelled batch is stopped like any other."""
    end_like(world, cancel(done=2))
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    driver.wait(first.id, timeout=10)
    world.fake.auto = None
    (second,) = driver.resume(job)
    driver.stop(job)
    world.fake.cancel_now(second.id, done=1)
    assert landed(job, driver.run(job, timeout=10), IDS).outcomes == expected(IDS[:3])
    assert len(world.fake.batches) == 2
