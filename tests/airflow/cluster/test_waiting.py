"""What people do to a task that waits, and what time does."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from .job import Job, start_mapped, started
from .scenarios import calm, scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cluster import Cluster

pytestmark = pytest.mark.deployment

DEFERRED = "Pausing task as DEFERRED"


@scenario
@calm
def test_a_clear_keeps_the_batch(cluster: Cluster) -> None:
    with started(cluster, "plain", "cleared") as job:
        job.until_watched()
        batch = job.until_created()
        kept = job.kept
        job.clear()
        job.until_kept(kept)
        job.until_watched(tries=2)
        job.check_record()
        job.finish(batch, tries=2)


def ended_by_hand(cluster: Cluster, name: str, end: Callable[[Job], None], state: str) -> None:
    """The batch is cancelled; a clear keeps what it has finished, and only the rest is submitted again."""
    with Job(cluster, "plain", name) as job:
        job.fake.cancel_looks = None
        job.start()
        job.until_watched()
        batch = job.until_created()
        end(job)
        job.until_cancelled(batch)
        assert job.task.state == state
        job.check_record(cancelled=1)
        job.until_over(state)
        job.clear()
        job.until_watched(tries=2)
        job.finish_rest(batch, tries=2)


@scenario
@calm
def test_marked_failed_and_cleared(cluster: Cluster) -> None:
    ended_by_hand(cluster, "marked-failed", lambda job: job.mark("failed"), "failed")


@scenario
@calm
def test_marked_success_and_cleared(cluster: Cluster) -> None:
    ended_by_hand(cluster, "marked-success", lambda job: job.mark("success"), "success")


@scenario
@calm
def test_a_failed_run_and_a_clear(cluster: Cluster) -> None:
    ended_by_hand(cluster, "run-failed", lambda job: job.mark_run("failed"), "failed")


@scenario
@calm
def test_a_run_that_times_out_cancels(cluster: Cluster) -> None:
    with started(cluster, "hurried", "timed-out") as job:
        job.until_watched()
        job.age(hours=1)
        job.until_cancelled(job.until_created())
        assert job.task.state == "skipped"
        job.check_record(cancelled=1)


@scenario
@calm
def test_a_deleted_dag_cancels(cluster: Cluster) -> None:
    with started(cluster, "deleted", "while-waiting") as job:
        job.until_watched()
        cluster.api("DELETE", "/api/v2/dags/deleted")
        job.until_cancelled(job.until_created())
        job.check_record(cancelled=1)


@scenario
@calm
def test_one_index_of_a_mapped_task(cluster: Cluster) -> None:
    """What is done to it is done to its own batch only."""
    with contextlib.ExitStack() as ending:
        jobs = [ending.enter_context(Job(cluster, "mapped", "each", map_index=index)) for index in range(3)]
        cleared, marked, left = jobs
        marked.fake.cancel_looks = None
        start_mapped(jobs)
        for job in jobs:
            job.until_watched()
        batch = marked.until_created()
        kept = cleared.kept
        cleared.clear()
        marked.mark("failed")
        marked.until_cancelled(batch)
        marked.clear()
        cleared.until_kept(kept)
        for job in (cleared, marked):
            job.until_watched(tries=2)
        for job in (cleared, left):
            job.check_record()
            job.fake.finish(job.fake.last.id)
        marked.finish_rest(batch, tries=2)
        for job, tries in ((cleared, 2), (left, 1)):
            job.until_state("success")
            job.check(tries=tries)
        marked.until_over("success")


@scenario
def test_many_batches_and_one_deferral(cluster: Cluster) -> None:
    """The trigger waits for the last of them, and tells what became of each."""
    with started(cluster, "sharded", "three") as job:
        job.until_created(3)
        task = job.until_watched()
        first, second, third = job.fake.batches.values()
        job.fake.finish(first.id)
        job.fake.expire(second.id, done=1)
        seen = third.looks
        job.until("the last one is looked at", lambda: third.looks > seen + 1)
        assert job.task[:4] == task[:4]
        job.fake.finish(third.id)
        job.until_state("success")
        job.check(batches=3, tries=1, outcomes={"succeeded": 4, "expired": 1})
        assert f"{first.id} is completed, {second.id} is expired, {third.id} is completed" in job.log()
        assert job.log().count(DEFERRED) == 1


@scenario
def test_a_clear_of_what_has_landed(cluster: Cluster) -> None:
    """Rows that have had their rounds are not submitted once more, and nothing is fetched again."""
    with started(cluster, "twice", "landed-and-cleared") as job:
        job.until_watched()
        job.fake.expire(job.fake.last.id, done=3)
        rest = job.until_created(2)
        job.until_watched()
        job.fake.finish(rest.id, failed=1)
        job.until_state("success")
        asked = job.server.count()
        job.until_over("success")
        job.clear()
        job.until("the second attempt is over", lambda: job.task[:2] == ("success", 2))
        job.check(batches=2, tries=2, outcomes={"succeeded": 4, "failed": 1})
        assert job.server.count() == asked


@scenario
def test_execution_timeout_is_for_the_worker_and_not_for_the_wait(cluster: Cluster) -> None:
    with started(cluster, "brief", "deferred") as job:
        batch = job.until_created()
        job.until("the wait is longer", lambda: time.time() > batch.created_at + 25)
        job.finish(batch, tries=1)


@scenario
def test_execution_timeout_on_a_worker_slot(cluster: Cluster) -> None:
    with started(cluster, "brief_slot", "waiting") as job:
        batch = job.until_created()
        job.until("another attempt waits", lambda: job.task.tries >= 2 and job.task.state == "running")
        job.finish(batch)


@scenario
def test_too_late_and_left_running(cluster: Cluster) -> None:
    with started(cluster, "late_leave", "retried") as job:
        batch = job.until_created()
        job.until_state("up_for_retry")
        assert batch.is_live
        job.finish(batch, tries=2)


@scenario
def test_too_late_and_cancelled(cluster: Cluster) -> None:
    """The next attempt waits for the end of the batch, keeps its finished rows and submits the rest."""
    with Job(cluster, "late_cancel", "retried") as job:
        job.fake.cancel_looks = None
        job.start()
        batch = job.until_created()
        job.until_cancelled(batch)
        job.until_watched(tries=2)
        job.finish_rest(batch, tries=2)


@scenario
def test_too_late_and_landed_in_part(cluster: Cluster) -> None:
    with Job(cluster, "late_land", "once") as job:
        job.fake.cancel_looks = None
        job.start()
        batch = job.until_created()
        job.until_cancelled(batch)
        job.fake.cancel_now(batch.id, done=2)
        job.until_state("success")
        job.check(cancelled=1, tries=1, outcomes={"succeeded": 2, "cancelled": 3})


@scenario
def test_a_clear_and_a_mark_on_a_worker_slot(cluster: Cluster) -> None:
    """The same where the wait is on a worker: a clear keeps the batch, and only an end cancels it."""
    with Job(cluster, "plain_slot", "cleared-and-marked") as job:
        job.fake.cancel_looks = None
        job.start()
        batch = job.until_created()
        job.until_looked_at(0)
        process, _ = job.processes()
        job.clear()
        job.until("the first attempt has ended", lambda: not process.is_running())
        job.until_waits(tries=2)
        job.check_record()
        job.mark("failed")
        job.until_cancelled(batch)
        assert job.task.state == "failed"
        job.until_over("failed")
        job.clear()
        job.until_waits(tries=3)
        job.finish_rest(batch, tries=3)
