"""Workers and tasks that die or stall at a known step, and the attempt that comes after."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import pytest

from tests.fakes.faults import Respond

from .job import Job
from .scenarios import scenario

if TYPE_CHECKING:
    from .cluster import Cluster

pytestmark = pytest.mark.deployment

FILES, BATCHES, CONTENT = "/v1/files", "/v1/batches", "/v1/files/.*/content"
LIMIT = 240.0
STEPS = [  # the first takes longest to come to its point
    ("collect", "GET", CONTENT, True),
    ("before-upload", "POST", FILES, False),
    ("after-upload", "POST", FILES, True),
    ("before-create", "POST", BATCHES, False),
    ("after-create", "POST", BATCHES, True),
    ("recorded", "POST", BATCHES, True),
]


@scenario
def test_a_worker_dies_at_each_step(cluster: Cluster) -> None:
    """One SIGKILL of the worker `worker-2` with everything on it, while each task is at a step of its own."""
    with contextlib.ExitStack() as ending:
        enter = ending.enter_context
        jobs = [enter(Job(cluster, "doomed", name)) for name, *_ in STEPS]
        holds = [
            job.server.hold(method, path, handled=handled, limit=LIMIT)
            for job, (_, method, path, handled) in zip(jobs, STEPS, strict=True)
        ]
        collect, *early, recorded = jobs
        waiting = enter(Job(cluster, "doomed_slot", "waiting"))
        for job in (*jobs, waiting):
            job.start()
        collect.until_watched()
        collect.fake.finish(collect.fake.last.id)
        for hold in holds:
            hold.wait(180)
        # Its batch gets written down, but nobody takes notice of the task any more.
        recorded.process().parent().send_signal(signal.SIGSTOP)
        holds[-1].release()
        recorded.until("the batch is on record", lambda: bool(recorded.ledger_ids))
        waiting.until("it waits", lambda: waiting.server.count("GET", BATCHES + "/.*") > 0)

        cluster.kill("worker-2")
        for hold in holds:
            hold.drop()
        cluster.launch("worker-2")
        for job in (*early, recorded):
            job.until_watched(tries=2, timeout=200)
        waiting.until_retried()
        for job in (*early, recorded, waiting):
            job.fake.finish(job.fake.last.id)
        for job in (*jobs, waiting):
            job.until_state("success")
            job.check(tries=2)


@scenario
def test_a_create_that_stalls_past_its_successor(cluster: Cluster) -> None:
    """The task and its supervisor stop for longer than the lease of its claim; then both attempts create."""
    with Job(cluster, "plain", "zombie-create") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        zombie = job.process()
        supervisor = zombie.parent()
        for process in (supervisor, zombie):
            process.suspend()
        job.until_retried()
        batch = job.until_created(timeout=180)
        job.until_watched(tries=2)
        hold.release()
        double = job.until_created(2)
        zombie.resume()
        job.until("the zombie gives way", lambda: not double.is_live)
        supervisor.resume()
        job.finish(batch, batches=2, tries=2)


@scenario
def test_a_create_that_arrives_when_its_sender_is_dead(cluster: Cluster) -> None:
    """Its batch, which nobody was told of, is found and cancelled before the results land."""
    with Job(cluster, "plain", "late-create") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        zombie = job.process()
        for process in (zombie.parent(), zombie):
            process.kill()
        job.until_retried()
        batch = job.until_created(timeout=180)
        job.until_watched(tries=2)
        hold.release()
        double = job.until_created(2)
        job.finish(batch, batches=2, tries=2)
        assert not double.is_live


@scenario
def test_a_create_whose_supervisor_died(cluster: Cluster) -> None:
    """The task lives on and gets its answer while the next attempt is waiting for its claim to run out."""
    with Job(cluster, "plain", "orphaned-task") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        job.process().parent().kill()
        job.until_retried()
        hold.release()
        batch = job.until_created()
        job.until_watched(tries=2)
        job.finish(batch, tries=2)


@scenario
def test_two_attempts_collect(cluster: Cluster) -> None:
    with Job(cluster, "plain", "zombie-collect") as job:
        hold = job.server.hold("GET", CONTENT, handled=True, limit=LIMIT)
        job.start()
        job.until_watched()
        job.fake.finish(job.fake.last.id)
        hold.wait(180)
        zombie = job.process()
        supervisor = zombie.parent()
        for process in (supervisor, zombie):
            process.suspend()
        job.until_state("success")
        landed = (job.folder / "results.jsonl").stat()
        hold.release()
        zombie.resume()
        supervisor.resume()
        with contextlib.suppress(Exception):
            zombie.wait(60)
        assert not zombie.is_running()
        assert (job.folder / "results.jsonl").stat().st_mtime == landed.st_mtime
        job.check(tries=2)


@scenario
def test_cleared_while_it_creates(cluster: Cluster) -> None:
    with Job(cluster, "plain", "cleared-create") as job:
        hold = job.server.hold("POST", BATCHES, handled=True, limit=LIMIT)
        job.start()
        hold.wait(180)
        job.clear()
        job.until("a second attempt runs", lambda: job.task.tries == 2)
        hold.drop()
        job.until_watched(tries=2)
        job.finish(job.fake.last, tries=2)


@scenario
def test_a_retry_after_a_failure_in_collect(cluster: Cluster) -> None:
    with Job(cluster, "plain", "collect-failed") as job:
        job.server.fail("GET", CONTENT, Respond(403, {"error": {"message": "not you"}}))
        job.start()
        job.until_watched()
        job.finish(job.fake.last, tries=2)
        assert not job.server.unused_faults
