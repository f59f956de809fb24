"""What people do to a run that waits, and what providers and deadlines do to it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.airflow.cluster.scenarios import scenario
from tests.fakes.faults import Respond, Stall

from .account import BATCHES, CONTENT, GONE, ROWS, Status

if TYPE_CHECKING:
    from .cluster import Cluster

pytestmark = pytest.mark.deployment


@scenario
def test_terminating_cancels_and_running_again_takes_the_rest(cluster: Cluster) -> None:
    account = cluster.accounts["terminated"]
    account.fake.cancel_looks = None
    account.launch()
    (waiting,) = account.until_parked()
    batch = account.until_watched()
    cluster.terminate(waiting.run_id)
    account.until(lambda: batch.state in GONE, "it is cancelled at the provider", 60)
    assert cluster.run(waiting.run_id).status is Status.CANCELED
    account.fake.cancel_now(batch.id, done=2)

    cluster.reexecute(waiting.run_id)
    rest = account.until_created(2)
    assert account.until_watched() is rest
    account.finish(rest, batches=2)
    assert rest.ids == ROWS[2:]
    assert not account.parked()


@scenario
def test_running_again_what_was_done_costs_nothing(cluster: Cluster) -> None:
    account = cluster.accounts["repeated"]
    submitting = account.launch()
    account.until_status(submitting, Status.SUCCESS)
    batch = account.until_watched()

    again = cluster.reexecute(submitting)
    account.until_status(again, Status.SUCCESS)
    waiting = account.until_parked(2)  # both were asked for, and both get the results
    account.finish(batch, materializations=2)

    collected = cluster.reexecute(waiting[0].run_id)
    account.until_status(collected, Status.SUCCESS)
    submitted = cluster.launch_assets([account.submit], location=account.location)
    account.until_status(submitted, Status.SUCCESS)
    account.until_landed(materializations=3)
    assert account.server.count("POST", BATCHES) == 1


@scenario
def test_a_tick_that_is_cut_off_loses_and_doubles_nothing(cluster: Cluster) -> None:
    """The first look comes to nothing; the second sees the end, when the daemon has given its tick up."""
    account = cluster.accounts["cut_off"]
    account.launch()
    batch = account.until_watched()
    began = time.time()
    account.server.fail("GET", f"{BATCHES}.*", Stall(30))
    account.server.fail("GET", f"{BATCHES}.*", Stall(9))
    account.finish(batch)
    assert account.server.unused_faults == 0
    assert [run.status for run in account.runs()] == [Status.SUCCESS] * 2
    assert cluster.cut_off_ticks(account.location, since=began) >= 2


@scenario
def test_an_outage_of_a_minute_is_ridden_out(cluster: Cluster) -> None:
    """One batch is waited for meanwhile, another one is submitted, the results of a third are downloaded."""
    account = cluster.accounts["outage"]
    tags = {"dagster/max_retries": "2"}
    account.launch("collecting", tags=tags)
    ended = account.until_created()
    account.launch("waiting", tags=tags)
    account.until_parked(2)
    download = account.server.hold("GET", CONTENT, handled=False, limit=240)
    account.fake.finish(ended.id)
    download.wait(120)

    account.server.fail(".*", ".*", Respond(429, headers={"retry-after": "5"}), times=1_000_000)
    download.drop()
    account.launch("submitting", tags=tags)
    cluster.pass_time(20)
    account.server.clear_faults()
    account.server.fail(".*", ".*", Respond(500), times=1_000_000)
    cluster.pass_time(20)
    account.server.clear_faults()
    with account.proxy.refusing():
        cluster.pass_time(20)

    account.until_created(3)
    for batch in account.fake.batches.values():
        if not batch.is_terminal:
            account.fake.finish(batch.id)
    account.until_materialized(3)
    account.until_idle()
    assert len(account.fake.batches) == 3
    found = {event.partition: event for event in account.materializations()}
    assert sorted(found) == ["collecting", "submitting", "waiting"]
    for event in found.values():
        account.check(event)
    assert {"429", "500"} <= {str(call.status) for call in account.server.calls}
