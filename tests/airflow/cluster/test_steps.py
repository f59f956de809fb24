"""A job in several tasks: submit, wait, land, and what comes of a wait that fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from .job import ROWS, Job, started
from .scenarios import scenario

if TYPE_CHECKING:
    from .cluster import Cluster

pytestmark = pytest.mark.deployment

CREATE, CANCEL = "/v1/batches", "/v1/batches/.*/cancel"


@scenario
def test_submit_wait_land(cluster: Cluster) -> None:
    """The task that submits dies when its batch is there, the one that waits is cleared: one batch."""
    with Job(cluster, "steps", "landed") as run:
        hold = run.server.hold("POST", CREATE, handled=True, limit=240)
        run.start()
        hold.wait(180)
        create, wait, land = map(run.of, ("create", "wait", "land"))
        dying, supervisor = create.processes()
        for process in (supervisor, dying):
            process.kill()
        hold.drop()
        wait.until_watched()
        assert create.task[:2] == ("success", 2)
        wait.clear()
        wait.until_watched(tries=2)
        batch = run.fake.last
        assert batch.is_live
        land.finish(batch, tries=1)
        assert run.of("cancel").task.state == "skipped"


@scenario
def test_a_wait_that_fails_and_a_branch_that_cancels(cluster: Cluster) -> None:
    """The one that waits leaves the batch alone, as it is not its own; what was done of it lands."""
    with started(cluster, "steps", "cancelled") as run:
        run.fake.cancel_looks = None
        wait, cancel, rest = map(run.of, ("wait", "cancel", "land_rest"))
        wait.until_watched()
        batch = run.fake.last
        wait.mark("failed")
        cancel.until_watched()
        run.fake.cancel_now(batch.id, done=2)
        rest.until_state("success")
        run.check_record(cancelled=1)
        assert run.server.count("POST", CANCEL) == 1
        lines = (run.folder / "rest" / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["custom_id"] for line in lines] == ROWS[:2]
        report = json.loads((run.folder / "rest" / "report.json").read_text())
        counts = {name: count for name, count in report["counts"].items() if count}
        assert counts == {"succeeded": 2, "cancelled": 3}
        assert run.of("land").task.state == "upstream_failed"
