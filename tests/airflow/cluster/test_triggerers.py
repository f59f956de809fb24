"""Triggerers that die, stall and are replaced, and a scheduler that dies."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from .cluster import TRIGGERERS
from .job import Job, started
from .scenarios import scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .cluster import Cluster

pytestmark = pytest.mark.deployment


@scenario
def test_triggerers_come_and_go(cluster: Cluster) -> None:
    """SIGKILL of one, a rolling restart of both, SIGSTOP and SIGCONT of one: nobody notices.

    Nor that the scheduler is killed while the batches end. A task that is marked failed in between has its
    batch cancelled all the same, and a clear submits the rest.
    """
    with contextlib.ExitStack() as ending:
        jobs = [ending.enter_context(started(cluster, "plain", f"moved-{number}")) for number in range(3)]
        marked = ending.enter_context(started(cluster, "plain", "moved-and-marked"))
        everyone = [*jobs, marked]
        for job in everyone:
            job.until_watched()
        cluster.until_storm()

        victim = _owner(jobs[0])
        _moves(cluster, everyone, victim, lambda: cluster.kill(victim))
        cluster.launch(victim)
        cluster.until_up(victim)

        for name in TRIGGERERS:
            _moves(cluster, everyone, name, lambda name=name: cluster.restart(name), may_return=True)

        marked.fake.cancel_looks = None
        batch = marked.fake.last
        marked.mark("failed")
        marked.until_cancelled(batch)
        marked.check_record(cancelled=1)
        marked.until_over("failed")
        marked.clear()

        stalled = _owner(jobs[0])
        theirs = [job for job in jobs if _owner(job) == stalled]
        _moves(cluster, jobs, stalled, lambda: cluster.freeze(stalled))
        kept = [job.kept for job in theirs]
        cluster.thaw(stalled)
        for job, before in zip(theirs, kept, strict=True):
            job.until_kept(before)
        for job in jobs:
            job.check_record()

        cluster.kill("scheduler")
        for job in jobs:
            job.fake.finish(job.fake.last.id)
        cluster.launch("scheduler")
        for job in jobs:
            job.until_state("success")
            job.check(tries=1)
        marked.until_watched(tries=2)
        marked.finish_rest(batch, tries=2)


def _owner(job: Job) -> str:
    owner = job.task.triggerer
    assert owner is not None
    return owner


def _moves(
    cluster: Cluster, jobs: Sequence[Job], name: str, hurt: Callable[[], None], *, may_return: bool = False
) -> None:
    """Hurt a triggerer, and see that the jobs it had are looked after again."""
    looks = [job.looks() for job in jobs]
    hurt()
    for job, before in zip(jobs, looks, strict=True):
        job.until("it is watched elsewhere", lambda job=job: may_return or _owner(job) != name, 60)
        job.until_looked_at(before)
