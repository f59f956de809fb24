"""Runs, code servers and daemons that are killed at a known step, and what comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from dagster._core.execution.backfill import BulkActionStatus

from tests.airflow.cluster.scenarios import scenario

from .account import BATCHES, CONTENT, FILES, SCENARIO, Status

if TYPE_CHECKING:
    from .cluster import Cluster

pytestmark = pytest.mark.deployment

LIMIT = 240.0
STEPS = [
    ("dies_before_create", "POST", BATCHES, False),  # takes longest to be sure that there is no batch
    ("dies_after_create", "POST", BATCHES, True),
    ("dies_after_upload", "POST", FILES, True),
]
RETRIED = {"dagster/max_retries": "1"}


@scenario
def test_a_submitting_run_dies_at_each_step(cluster: Cluster) -> None:
    """Dagster retries the runs by itself; none creates a second batch."""
    accounts = [cluster.accounts[name] for name, *_ in STEPS]
    holds = [
        account.server.hold(method, path, handled=handled, limit=LIMIT)
        for account, (_, method, path, handled) in zip(accounts, STEPS, strict=True)
    ]
    submitting = [account.launch(tags=RETRIED) for account in accounts]
    for account, hold, run_id in zip(accounts, holds, submitting, strict=True):
        hold.wait(120)
        account.process(run_id).kill()
        hold.drop()
        account.until_status(run_id, Status.FAILURE)
    for account in reversed(accounts):
        account.until_parked()
        account.fake.finish(account.fake.last.id)
    for account in accounts:
        account.until_landed()
        assert [run.status for run in account.runs()] == [Status.FAILURE, Status.SUCCESS, Status.SUCCESS]


@scenario
def test_a_collecting_run_dies(cluster: Cluster) -> None:
    account = cluster.accounts["dies_collecting"]
    account.launch(tags=RETRIED)
    (collecting,) = account.until_parked()
    hold = account.server.hold("GET", CONTENT, handled=True, limit=LIMIT)
    account.fake.finish(account.fake.last.id)
    hold.wait(120)
    account.process(collecting.run_id).kill()
    hold.drop()
    account.until_landed()
    assert [run.status for run in account.runs()] == [Status.SUCCESS, Status.FAILURE, Status.SUCCESS]


@scenario
def test_a_backfill_outlives_daemon_and_code_server(cluster: Cluster) -> None:
    """50 partitions with an asset downstream; both are killed while all batches run, and one is submitted.

    Not one process is alive for what waits.
    """
    many, torn = cluster.accounts["many"], cluster.accounts["torn"]
    assets = [many.submit, many.result, "sizes"]
    partitions = [f"p{number:02}" for number in range(50)]
    backfill = cluster.launch_backfill(assets, partitions, tags={SCENARIO: many.name})

    def active() -> int:
        return len(many.runs(Status.STARTED, Status.STARTING))

    many.until(lambda: len(many.parked()) == 5 and not active(), "all batches are waited for", 240)
    many.until(lambda: cluster.run_processes(many.location) == 0, "no process is alive", 30)

    hold = torn.server.hold("POST", BATCHES, handled=True, limit=LIMIT)
    submitting = torn.launch()
    hold.wait(120)
    assert cluster.run_processes(many.location) == 1  # the count does see those that are there
    cluster.kill("daemon")
    cluster.kill(many.location)
    hold.drop()
    for batch in many.fake.batches.values():
        many.fake.finish(batch.id)
    cluster.revive(many.location)

    # Nobody is there to say that the run is dead: a person sees it, and runs it again.
    cluster.terminate(submitting, force=True)
    cluster.reexecute(submitting)
    torn.finish(torn.until_watched())

    def over() -> bool:
        return cluster.instance.get_backfill(backfill).status is not BulkActionStatus.REQUESTED

    many.until(over, "the backfill is over", 240)
    assert cluster.instance.get_backfill(backfill).status is BulkActionStatus.COMPLETED_SUCCESS, many.story()
    for asset in assets:
        assert sorted(event.partition or "" for event in many.materializations(asset)) == partitions
    assert {event.metadata["rows"].value for event in many.materializations("sizes")} == {2}
    assert len(many.fake.batches) == 5
    asked = [row for batch in many.fake.batches.values() for row in batch.ids]
    assert sorted(asked) == [f"{partition}/row-{number}" for partition in partitions for number in range(2)]
