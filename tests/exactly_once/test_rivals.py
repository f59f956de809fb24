"""Two attempts at the same job at the same time: an orchestrator's zombie and its successor."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from anybatch import Job, Report
from anybatch.errors import ConfigurationError, LedgerConflictError
from tests.exactly_once.forge import Forge, fresh
from tests.exactly_once.stage import FINDABLE, Stage, check_results, requests, write
from tests.fakes.provider import Auto, FakeProvider

REPEATS = {"openai": 5, "mistral": 2, "local": 4}
LEASE = 0.3


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def together(stage: Stage, job: Job, count: int, offset: Callable[[], float]) -> list[Report]:
    """The reports of `count` attempts that begin at the same time, give or take an offset."""
    barrier = threading.Barrier(count)

    def attempt(delay: float) -> Report:
        barrier.wait()
        threading.Event().wait(delay)
        return stage.run(job)

    with ThreadPoolExecutor(count) as threads:
        return [one.result(60) for one in [threads.submit(attempt, offset()) for _ in range(count)]]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", REPEATS)
def test_at_once_in_threads(name: str, shards: int, tmp_path: Path) -> None:
    """No lease runs out, so for each shard one attempt creates and the others find; all report the same."""
    chance = random.Random(7)
    for number in range(REPEATS[name]):
        with Stage(name, fresh(tmp_path, str(number)), shards=shards) as stage:
            job = stage.job(lease=60)
            first, *others = together(stage, job, 3, lambda: chance.uniform(0, 0.04))
            assert all(report == first for report in others)
            stage.check(first, job)


@pytest.mark.parametrize("name", ["openai", "local"])
def test_at_once_in_processes(name: str, tmp_path: Path, forge: Forge, other_forge: Forge) -> None:
    for number in range(4):
        with Stage(name, fresh(tmp_path, str(number))) as stage:
            job = stage.job(lease=60)
            for one in (forge, other_forge):
                one.start(stage, job)
            assert (forge.ended(), other_forge.ended()) == ("0", "0")
            stage.check(stage.run(job), job)


def begin(threads: ThreadPoolExecutor, stage: Stage, job: Job) -> Future[Report]:
    return threads.submit(stage.run, job)


@pytest.mark.parametrize("name", FINDABLE)
def test_a_rival_finds_the_batch_of_a_create_under_way(
    name: str, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """The create is done but not answered: the rival does not wait for that, and creates nothing."""
    with Stage(name, tmp_path) as stage:
        job = stage.job(lease=60)
        hold = stage.server.hold("POST", stage.jobs, handled=True)
        slow = begin(threads, stage, job)
        hold.wait()
        quick = stage.run(job)
        hold.release()
        assert slow.result(20) == quick
        stage.check(quick, job)


@pytest.mark.parametrize("name", FINDABLE)
def test_a_create_slower_than_its_lease_is_overtaken_and_cancelled(
    name: str, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with Stage(name, tmp_path, ends=False) as stage:
        job = stage.job(lease=LEASE)
        hold = stage.server.hold("POST", stage.jobs, handled=False)
        slow = begin(threads, stage, job)
        hold.wait()
        with stage.client() as client:
            (batch,) = client.submit(job)  # waits for the lease to run out
        hold.release()
        stage.server.wait_for("POST", f"{stage.jobs}/[^/]+/cancel")
        assert stage.live() == [batch.id]
        stage.finish()
        report = slow.result(20)
        stage.check(report, job, created=2)


@pytest.mark.parametrize("name", FINDABLE)
def test_a_process_stopped_at_its_create_comes_back_too_late(name: str, tmp_path: Path, forge: Forge) -> None:
    """SIGSTOP, a rival does the whole job's submission, SIGCONT: the late batch is cancelled by its maker."""
    with Stage(name, tmp_path, ends=False) as stage:
        job, process, batch_id = overtaken(stage, forge)
        os.kill(process, signal.SIGCONT)
        assert forge.ended() == "0"
        assert len(stage.batches()) == 2
        assert stage.live() == [batch_id]
        stage.finish()
        stage.check(stage.run(job), job, created=2)


@pytest.mark.parametrize("name", FINDABLE)
def test_a_process_that_comes_back_too_late_and_is_killed(name: str, tmp_path: Path, forge: Forge) -> None:
    """It could create but not cancel: nobody alive knows of its batch, until the next attempt looks."""
    with Stage(name, tmp_path, ends=False) as stage:
        job, process, batch_id = overtaken(stage, forge)
        hold = stage.server.hold("POST", stage.jobs, handled=True)
        os.kill(process, signal.SIGCONT)
        hold.wait()
        forge.kill(process)
        hold.release()
        assert len(stage.live()) == 2
        with stage.client() as client:
            assert [batch.id for batch in client.submit(job)] == [batch_id]
        assert stage.live() == [batch_id]
        stage.finish()
        stage.check(stage.run(job), job, created=2)


def overtaken(stage: Stage, forge: Forge) -> tuple[Job, int, str]:
    """A process stopped right before its create is sent, and the batch that a rival has created meanwhile."""
    job = stage.job(lease=LEASE)
    process = forge.start(stage, job, verb="submit", how="SIGSTOP", at_create=True)
    assert forge.ended() == "stopped"
    assert not stage.batches()
    with stage.client() as client:
        (batch,) = client.submit(job)
    return job, process, batch.id


def test_both_collect_at_the_same_time(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """One lands while the other is still downloading; that one returns what has landed."""
    with Stage("openai", tmp_path) as stage:
        job = stage.job()
        with stage.client() as client:
            client.submit(job)
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True)
        slow = begin(threads, stage, job)
        hold.wait()
        quick = stage.run(job)
        hold.release()
        assert slow.result(20) == quick
        stage.check(quick, job)


def test_a_job_begins_in_the_folder_where_batches_are_being_landed(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """The rows of foreign batches must not replace the job's, which were paid for."""
    with Stage("openai", tmp_path) as stage, stage.client() as client:
        (foreign,) = client.submit(stage.job(output=tmp_path / "elsewhere"))
        stage.fake.finish(foreign.id)
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True)
        landing = threads.submit(client.land_batches, [foreign.id], tmp_path / "out")
        hold.wait()
        report = stage.run(stage.job())
        hold.release()
        with pytest.raises(ConfigurationError, match="holds job"):
            landing.result(20)
        check_results(stage.job(), report)


def test_the_input_changes_while_an_attempt_downloads(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """The old attempt must not land its results in what is by now another job's folder."""
    with Stage("openai", tmp_path) as stage:
        job = stage.job()
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True)
        old = begin(threads, stage, job)
        hold.wait()
        other = write(tmp_path / "other.jsonl", requests(stage.model, rows=3, say="other"))
        report = stage.run(stage.job(input=other))
        hold.release()
        with pytest.raises(LedgerConflictError, match=r"another attempt has submitted job .* again"):
            old.result(20)
        landed = (tmp_path / "out" / "results.jsonl").read_bytes()
        assert [json.loads(line)["custom_id"] for line in landed.splitlines()] == ["row-0", "row-1", "row-2"]
        assert stage.job(input=other).report() == report


def test_the_input_changes_while_an_attempt_uploads(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """The old attempt must not put its file into the other input's ledger."""
    with Stage("openai", tmp_path) as stage:
        hold = stage.server.hold("POST", "/v1/files", handled=True)
        old = begin(threads, stage, stage.job())
        hold.wait()
        other = write(tmp_path / "other.jsonl", requests(stage.model, rows=3, say="other"))
        with stage.client() as client:
            second = stage.server.hold("POST", "/v1/files", handled=True)
            new = threads.submit(client.run, stage.job(input=other))
            second.wait()
            hold.release()
            with pytest.raises(
                LedgerConflictError, match=r"another attempt has submitted job .* with other input"
            ):
                old.result(20)
            second.release()
            report = new.result(20)
        stage.check(report, stage.job(input=other), rows=3)


@pytest.mark.parametrize("on_changed", ["fail", "cancel_and_resubmit"])
def test_two_inputs_in_one_folder_at_once(on_changed: str, tmp_path: Path) -> None:
    """Whoever comes second replaces the first or is refused; what lands is of one piece.

    No batch ends before there are two, or one attempt has given up: else both might be paid for in full.
    """
    chance = random.Random(11)
    for number in range(6):
        with Stage("openai", fresh(tmp_path, str(number))) as stage:
            inputs = [
                write(stage.home / f"{n}.jsonl", requests(stage.model, rows=n, say=f"{n}")) for n in (3, 5)
            ]
            jobs = [stage.job(input=one, lease=60, on_changed=on_changed) for one in inputs]
            ends: list[Any] = []

            def end(fake: FakeProvider, batch_id: str, ends: list[Any] = ends) -> None:
                if len(ends) + len(fake.batches) > 1:
                    fake.finish(batch_id)

            stage.fake.auto = Auto(looks=1, end=end)

            def attempt(job: Job, delay: float, ends: list[Any] = ends, stage: Stage = stage) -> None:
                threading.Event().wait(delay)
                try:
                    ends.append((job, stage.run(job)))
                except Exception as error:
                    ends.append((job, error))

            with ThreadPoolExecutor(2) as threads:
                list(threads.map(attempt, jobs, [chance.uniform(0, 0.05) for _ in jobs]))
            ledger = jobs[0].ledger()
            assert ledger is not None
            last = jobs[ledger.rows == 5]
            report = stage.run(last)
            assert report.rows == ledger.rows
            stage.check(report, last, created=None, rows=report.rows)
