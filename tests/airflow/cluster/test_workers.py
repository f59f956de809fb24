"""Workers and tasks that die or stall at a known step, and the attempt that comes after."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from tests.fakes.faults import Respond

from .job import ROWS, Job, answered
from .scenarios import scenario

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.fakes.faults import Hold

    from .cluster import Cluster

pytestmark = pytest.mark.deployment

FILES, BATCHES, CONTENT = "/v1/files", "/v1/batches", "/v1/files/.*/content"
CANCEL = "/v1/batches/.*/cancel"
LIMIT = 240.0
MOVED = ["worker-2", "worker-1"]


class Step(NamedTuple):
    """Where a task is when its worker dies: at the first request like this, or after `skip` of them; those
    that are `handled` get no answer, the others do not get through."""

    dag_id: str
    name: str
    method: str
    path: str
    handled: bool
    skip: int = 0


STEPS = [
    Step("doomed", "before-upload", "POST", FILES, handled=False),
    Step("doomed", "after-upload", "POST", FILES, handled=True),
    Step("doomed", "before-create", "POST", BATCHES, handled=False),
    Step("doomed", "after-create", "POST", BATCHES, handled=True),
    Step("doomed", "recorded", "POST", BATCHES, handled=True),
    Step("doomed", "collect", "GET", CONTENT, handled=True),
    Step("doomed", "landed", "GET", CONTENT, handled=True),
    Step("doomed_twice", "second-round", "POST", BATCHES, handled=True, skip=1),
    Step("doomed_cancel", "cancelled", "POST", CANCEL, handled=True),
    Step("doomed_land", "landed-in-part", "POST", CANCEL, handled=True),
]
CREATING = [step.name for step in STEPS[:5]]


@scenario
def test_a_worker_dies_at_each_step(cluster: Cluster) -> None:
    """One SIGKILL of the worker `worker-2` with everything on it, while each task is at a step of its own;
    the next attempts are on the other worker."""
    with contextlib.ExitStack() as ending:
        jobs = {step.name: ending.enter_context(Job(cluster, step.dag_id, step.name)) for step in STEPS}
        waiting = ending.enter_context(Job(cluster, "doomed_slot", "waiting"))
        alone = ending.enter_context(Job(cluster, "doomed_alone", "deferred"))
        everyone = [*jobs.values(), waiting]
        holds = _bring_to_steps(jobs, (waiting, alone))
        alone.until_watched()
        waiting.until("it waits", lambda: waiting.server.count("GET", BATCHES + "/.*") > 0)
        assert not [job.run_id for job in everyone if job.task.tries != 1]

        cluster.kill("worker-2")
        for hold in holds.values():
            hold.drop()
        cluster.take_over("worker-1", "doomed")
        alone.fake.finish(alone.fake.last.id)
        waiting.until_retried()
        waiting.fake.finish(waiting.fake.last.id)
        _see_through(jobs)
        waiting.until_state("success")
        waiting.check(tries=2)
        for job in everyone:
            assert job.hosts == MOVED, job.run_id

        # Its folder is one of each worker's own: it fails at once, and nothing is submitted a second time.
        alone.until("the task has failed", lambda: alone.task.state == "failed")
        alone.check_record()
        assert "has no record of this task's batches" in alone.log()
        assert alone.hosts == MOVED[1:]


def _bring_to_steps(jobs: Mapping[str, Job], others: Iterable[Job]) -> dict[str, Hold]:
    """Start all, and return when each of the jobs is where its worker is to die."""
    holds = {
        step.name: jobs[step.name].server.hold(
            step.method, step.path, handled=step.handled, skip=step.skip, limit=LIMIT
        )
        for step in STEPS
    }
    for name in ("cancelled", "landed-in-part"):
        jobs[name].fake.cancel_looks = None
    for job in (*reversed([*jobs.values()]), *others):  # the last steps take longest to come to
        job.start()
    for name in ("collect", "landed", "second-round"):
        job = jobs[name]
        job.until_watched()
        if name == "second-round":
            job.fake.expire(job.fake.last.id, done=2)
        else:
            job.fake.finish(job.fake.last.id)
    for hold in holds.values():
        hold.wait(180)
    # What these two do next gets done, but nobody takes notice of the task any more.
    recorded, landed = jobs["recorded"], jobs["landed"]
    for name in ("recorded", "landed"):
        _, supervisor = jobs[name].processes()
        supervisor.suspend()
        holds[name].release()
    recorded.until("the batch is on record", lambda: bool(recorded.ledger_ids))
    landed.until("the results have landed", lambda: landed.has_landed)
    return holds


def _see_through(jobs: Mapping[str, Job]) -> None:
    """See that the second attempt of each goes on where the first one died."""
    second, cancelled, partial = (jobs[name] for name in ("second-round", "cancelled", "landed-in-part"))
    creating = [jobs[name] for name in CREATING]
    for job in (*creating, second, cancelled, partial):
        job.until_watched(tries=2, timeout=200)
    for job in (*creating, second):
        job.fake.finish(job.fake.last.id)
    partial.fake.cancel_now(partial.fake.last.id, done=2)
    cancelled.finish_rest(cancelled.fake.last, tries=2)
    for job in (*creating, jobs["collect"], jobs["landed"]):
        job.until_state("success")
        job.check(tries=2)
    assert jobs["landed"].server.count("GET", CONTENT) == 1
    second.until_state("success")
    second.check(batches=2, tries=2)
    assert second.fake.last.ids == ROWS[2:]
    partial.until_state("success")
    partial.check(cancelled=1, tries=2, outcomes={"succeeded": 2, "cancelled": 3})


@scenario
def test_a_create_that_stalls_past_its_successor(cluster: Cluster) -> None:
    """The task and its supervisor stop for longer than the lease of its claim; then both attempts create.

    No provider refuses a second create, and nobody can recall one that was sent. So there are two batches for
    a moment, and none is orphaned: the zombie finds its own to be one too many and cancels it before a row of
    it is done.
    """
    with Job(cluster, "plain", "zombie-create") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        zombie, supervisor = job.processes()
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
        job.finish(batch, batches=2, cancelled=1, tries=2)
        assert not answered(double)


@scenario
def test_a_create_that_arrives_when_its_sender_is_dead(cluster: Cluster) -> None:
    """Its batch, which nobody was told of, is found and cancelled before the results land.

    Two batches for the rows of one, as the next attempt cannot know that a request is still on its way; and
    none is orphaned: the late one is cancelled before a row of it is done.
    """
    with Job(cluster, "plain", "late-create") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        zombie, supervisor = job.processes()
        for process in (supervisor, zombie):
            with contextlib.suppress(psutil.NoSuchProcess):  # the one may end with the other
                process.kill()
        job.until_retried()
        batch = job.until_created(timeout=180)
        job.until_watched(tries=2)
        hold.release()
        double = job.until_created(2)
        job.finish(batch, batches=2, cancelled=1, tries=2)
        assert not double.is_live
        assert not answered(double)


@scenario
def test_a_create_whose_supervisor_died(cluster: Cluster) -> None:
    """The task lives on and gets its answer while the next attempt is waiting for its claim to run out."""
    with Job(cluster, "plain", "orphaned-task") as job:
        hold = job.server.hold("POST", BATCHES, handled=False, limit=LIMIT)
        job.start()
        hold.wait(180)
        _, supervisor = job.processes()
        supervisor.kill()
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
        zombie, supervisor = job.processes()
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
        job.server.fail("GET", CONTENT, Respond(423, {"error": {"message": "locked"}}))
        job.start()
        job.until_watched()
        job.finish(job.fake.last, tries=2)
        assert not job.server.unused_faults
