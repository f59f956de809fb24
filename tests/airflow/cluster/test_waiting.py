"""What people do to a task that waits, and what time does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from .job import ROWS, Job, started
from .scenarios import calm, scenario

if TYPE_CHECKING:
    from .cluster import Cluster

pytestmark = pytest.mark.deployment


@scenario
@calm
def test_a_clear_keeps_the_batch(cluster: Cluster) -> None:
    with started(cluster, "plain", "cleared") as job:
        job.until_watched()
        batch = job.until_created()
        job.clear()
        job.until_watched(tries=2)
        assert batch.is_live
        job.finish(batch)


@scenario
@calm
def test_marked_failed_cancels(cluster: Cluster) -> None:
    with started(cluster, "plain", "marked-failed") as job:
        job.until_watched()
        job.mark("failed")
        job.until_cancelled(job.until_created())
        assert job.task.state == "failed"
        assert len(job.fake.batches) == 1


@scenario
@calm
def test_marked_success_cancels(cluster: Cluster) -> None:
    with started(cluster, "plain", "marked-success") as job:
        job.until_watched()
        job.mark("success")
        job.until_cancelled(job.until_created())
        assert job.task.state == "success"
        assert len(job.fake.batches) == 1


@scenario
@calm
def test_a_failed_run_cancels(cluster: Cluster) -> None:
    with started(cluster, "plain", "run-failed") as job:
        job.until_watched()
        job.mark_run("failed")
        job.until_cancelled(job.until_created())
        assert len(job.fake.batches) == 1


@scenario
@calm
def test_a_run_that_times_out_cancels(cluster: Cluster) -> None:
    with started(cluster, "hurried", "timed-out") as job:
        job.until_watched()
        job.age(hours=1)
        job.until_cancelled(job.until_created())
        assert job.task.state == "skipped"
        assert len(job.fake.batches) == 1


@scenario
@calm
def test_a_deleted_dag_cancels(cluster: Cluster) -> None:
    with started(cluster, "deleted", "while-waiting") as job:
        job.until_watched()
        cluster.api("DELETE", "/api/v2/dags/deleted")
        job.until_cancelled(job.until_created())
        assert len(job.fake.batches) == 1


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
@calm
def test_a_clear_after_marked_failed(cluster: Cluster) -> None:
    """What the cancelled batch has finished is kept, only the rest is submitted again."""
    with Job(cluster, "plain", "marked-and-cleared") as job:
        job.fake.cancel_looks = None
        job.start()
        job.until_watched()
        batch = job.until_created()
        job.mark("failed")
        job.until_cancelled(batch)
        job.until("the run is over", lambda: cluster.run_state("plain", job.run_id) == "failed")
        job.clear()
        job.until_watched(tries=2)
        job.fake.cancel_now(batch.id, done=2)
        rest = job.until_created(2)
        job.finish(rest, batches=2, tries=2)
        assert rest.ids == ROWS[2:]


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
        job.fake.cancel_now(batch.id, done=2)
        rest = job.until_created(2)
        job.finish(rest, batches=2, tries=2)
        assert rest.ids == ROWS[2:]


@scenario
def test_too_late_and_landed_in_part(cluster: Cluster) -> None:
    with Job(cluster, "late_land", "once") as job:
        job.fake.cancel_looks = None
        job.start()
        batch = job.until_created()
        job.until_cancelled(batch)
        job.fake.cancel_now(batch.id, done=2)
        job.until_state("success")
        job.check(tries=1, outcomes={"succeeded": 2, "cancelled": 3})
