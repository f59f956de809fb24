"""Providers that throttle, fail, stall, cancel and let time run out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.fakes.faults import CutBody, Fault, ResetAfter, ResetBefore, Respond, Stall

from .job import ROWS, Job, started
from .scenarios import scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cluster import Cluster

pytestmark = pytest.mark.deployment

THROTTLED = Respond(429, {"error": {"message": "slow down"}}, headers={"retry-after": "3"})
BROKEN = Respond(500, {"error": {"message": "oops"}})


def outage(cluster: Cluster, name: str, fault: Fault, seconds: float) -> None:
    """Everything fails: so long at the submission and in the wait, and for 20 s in the collection."""
    with Job(cluster, "plain", name) as job:
        with failing(job, fault, seconds):
            job.start()
        batch = job.until_created()
        job.until_watched(tries=job.task.tries)
        with failing(job, fault, seconds):
            pass
        polls = [call for call in job.server.find("GET", "/v1/batches.*") if call.fault is fault]
        assert len(polls) >= seconds / 20, job.story()
        content = job.server.hold("GET", ".*/content", handled=False)
        job.fake.finish(batch.id)
        content.wait(180)
        with failing(job, fault, 20):
            content.drop()
        job.until_state("success")
        job.check()


@contextlib.contextmanager
def failing(job: Job, fault: Fault, seconds: float) -> Iterator[None]:
    """What is asked of the provider fails so long, once something has been asked."""
    asked = job.server.count()
    job.server.fail(".*", ".*", fault, times=10_000)
    yield
    job.until("the provider is asked", lambda: job.server.count() > asked)
    job.cluster.stopping.wait(seconds)
    job.server.clear_faults()


@scenario
def test_throttled_for_a_minute(cluster: Cluster) -> None:
    outage(cluster, "throttled", THROTTLED, 60)


@scenario
def test_broken(cluster: Cluster) -> None:
    outage(cluster, "broken", BROKEN, 20)


@scenario
def test_resets(cluster: Cluster) -> None:
    outage(cluster, "resets", ResetBefore(), 20)


@scenario
def test_broken_while_a_worker_waits(cluster: Cluster) -> None:
    """A wait on a worker slot outlives what a wait in the triggerer does."""
    with started(cluster, "plain_slot", "broken") as job:
        batch = job.until_created()
        job.until_looked_at(0)
        with failing(job, BROKEN, 95):
            pass
        job.finish(batch, tries=1)


@scenario
def test_answers_that_are_lost(cluster: Cluster) -> None:
    """Each kind of request is done once without its answer getting through."""
    with Job(cluster, "plain", "unanswered") as job:
        job.server.fail("POST", "/v1/files", ResetAfter())
        job.server.fail("POST", "/v1/batches", ResetAfter())
        job.server.fail("GET", "/v1/batches.*", ResetAfter())
        job.server.fail("GET", ".*/content", CutBody(after=100))
        job.start()
        batch = job.until_created()
        job.until_watched()
        job.finish(batch, tries=1)
        assert not job.server.unused_faults


@scenario
def test_stalls_of_half_a_minute(cluster: Cluster) -> None:
    """Each kind of request stalls once."""
    with Job(cluster, "plain", "stalls") as job:
        for method, path in (
            ("POST", "/v1/files"),
            ("POST", "/v1/batches"),
            ("GET", "/v1/batches/.*"),
            ("GET", ".*/content"),
        ):
            job.server.fail(method, path, Stall(30))
        job.start()
        batch = job.until_created()
        job.until_watched()
        job.finish(batch, tries=1)
        assert not job.server.unused_faults


@scenario
def test_cancelled_at_the_console(cluster: Cluster) -> None:
    """The same attempt submits again what the cancelled batch did not finish."""
    with started(cluster, "plain", "console") as job:
        job.until_watched()
        job.fake.cancel_now(job.fake.last.id, done=2)
        rest = job.until_created(2)
        job.finish(rest, batches=2, tries=1)
        assert rest.ids == ROWS[2:]


@scenario
def test_expired_with_one_round(cluster: Cluster) -> None:
    with started(cluster, "plain", "expired") as job:
        job.until_watched()
        job.fake.expire(job.fake.last.id, done=3)
        job.until_state("success")
        job.check(tries=1, outcomes={"succeeded": 3, "expired": 2})


@scenario
def test_expired_with_two_rounds(cluster: Cluster) -> None:
    with started(cluster, "twice", "expired") as job:
        job.until_watched()
        job.fake.expire(job.fake.last.id, done=3)
        rest = job.until_created(2)
        job.finish(rest, batches=2, tries=1)
        assert rest.ids == ROWS[3:]
