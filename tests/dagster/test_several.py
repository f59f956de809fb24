"""Jobs of several batches at a fake server, where one batch fares otherwise than the rest."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from anybatch import Outcome, Row, read_results
from anybatch.jobs import policies
from anybatch_dagster import BatchResource, build_batch_assets
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.server import FakeServer

from .conftest import Deployment, request

ROWS = ["a", "b", "c"]
GONE = (State.CANCELLING, State.CANCELLED)


class Several:
    """A batch asset whose job has a batch for each of three rows, in a deployment."""

    def __init__(
        self, instance: dg.DagsterInstance, server: FakeServer, fake: OpenAIFake, path: Path
    ) -> None:
        self.instance, self.server, self.fake = instance, server, fake
        self._resource = BatchResource(
            provider="openai", api_base=server.api_base, api_key=fake.key, output=str(path / "jobs")
        )
        self._storage = dg.FilesystemIOManager(base_dir=str(path / "values"))

    def deploy(self, **options: Any) -> Deployment:
        def texts() -> Iterator[dict[str, Any]]:
            yield from (request(row, model="gpt-4o-mini") for row in ROWS)

        assets = build_batch_assets(texts, name="texts", shard_requests=1, **options)
        return Deployment(self.instance, assets, {"anybatch": self._resource, "io_manager": self._storage})

    @property
    def batches(self) -> list[FakeBatch]:
        return list(self.fake.batches.values())

    def lose(self, batch: FakeBatch) -> None:
        """The provider forgets a batch."""
        del self.fake.batches[batch.id]


@pytest.fixture
def several(gated: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Several]:
    """A provider whose word is believed at once: that a batch is gone, or never ends being cancelled."""
    monkeypatch.setattr("anybatch.jobs.lost.GONE_AFTER", 0.0)
    monkeypatch.setattr("anybatch.jobs.lost.LOOK_EVERY", 0.0)
    monkeypatch.setattr("anybatch.jobs.lost.STUCK_AFTER", 0.0)
    fake = OpenAIFake()
    with FakeServer(fake) as server:
        yield Several(gated, server, fake, tmp_path)


def version(deployment: Deployment) -> str:
    """The data version of the newest submission."""
    return (deployment.materializations("texts_batch")[-1].tags or {})["dagster/data_version"]


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_another_batch_for_one_shard_is_another_version_of_the_data(place: int, several: Several) -> None:
    """Row A1: the version came from the batch last in the list, whichever shard was submitted anew."""
    deployment = several.deploy()
    deployment.run("texts_batch")
    first = version(deployment)
    deployment.run("texts_batch")
    assert version(deployment) == first
    several.fake.fail(several.batches[place].id, "token_limit_exceeded", "too many at once")
    deployment.run("texts_batch")
    assert len(several.batches) == 4
    assert version(deployment) != first


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_terminating_a_run_cancels_the_other_batches_of_one_that_is_lost(
    place: int, several: Several
) -> None:
    """Row A4b: the first 404 ended the cancelling, and was taken for the end of all of them."""
    deployment = several.deploy()
    deployment.run("texts_batch", "texts")
    (waiting,) = deployment.parked
    several.lose(several.batches[place])
    deployment.instance.report_run_canceled(waiting)
    deployment.tick()
    assert [batch.state in GONE for batch in several.batches] == [True, True]
    assert deployment.again(waiting).tags["anybatch/gate"] == "cancelled"


@pytest.mark.parametrize("status", [404, 403])
@pytest.mark.parametrize("place", range(len(ROWS)))
def test_a_batch_that_cannot_be_cancelled_keeps_none_of_the_others_running(
    place: int, status: int, several: Several
) -> None:
    """Row A4b: at the deadline the first refusal ended the cancelling of all."""
    deployment = several.deploy(timeout=0, on_timeout="cancel")
    deployment.run("texts_batch")
    path = f"/v1/batches/{several.batches[place].id}/cancel"
    several.server.fail("POST", path, Respond(status, {"error": {"message": "no"}}))
    run = deployment.run("texts")
    assert run.status is dg.DagsterRunStatus.FAILURE
    assert several.server.unused_faults == 0
    assert [batch.state in GONE for batch in several.batches] == [number != place for number in range(3)]


# --- waiting, where one batch is lost ----------------------------------------------------------------------


@pytest.mark.parametrize("on_lost", ["fail", "land", "resubmit"])
@pytest.mark.parametrize("place", range(len(ROWS)))
def test_a_batch_that_is_lost_does_not_end_the_waiting_for_the_others(
    place: int, on_lost: str, several: Several
) -> None:
    """Row A4b: it counts as ended; whether the rows that it had are missed is decided when all have ended."""
    deployment = several.deploy(on_lost=on_lost)
    deployment.run("texts_batch", "texts")
    several.lose(several.batches[place])
    for batch in several.batches:
        deployment.tick()
        assert deployment.dequeue() == []
        several.fake.start(batch.id)
        several.fake.finish(batch.id)
    deployment.tick()
    assert len(deployment.dequeue()) == 1


def test_lost_batches_alone_end_the_waiting(several: Several) -> None:
    """Row A4b: nothing is left to wait for."""
    deployment = several.deploy(on_lost="land")
    deployment.run("texts_batch", "texts")
    for batch in several.batches:
        several.lose(batch)
    deployment.tick()
    assert len(deployment.dequeue()) == 1


def test_by_default_a_lost_batch_fails_the_asset_and_is_named(several: Several) -> None:
    """Row A4b: what there is of the others is left where it is, for a person to decide."""
    deployment = several.deploy()
    deployment.run("texts_batch", "texts")
    lost, *others = several.batches
    several.lose(lost)
    for batch in others:
        several.fake.finish(batch.id)
    deployment.tick()
    (run,) = deployment.dequeue()
    assert run.status is dg.DagsterRunStatus.FAILURE
    entries = deployment.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert any(lost.id in str(entry.dagster_event) for entry in entries)
    assert deployment.materializations("texts") == []


@pytest.mark.parametrize("on_lost", ["fail", "land", "resubmit"])
def test_a_batch_that_never_ends_being_cancelled_is_given_up_or_waited_for_as_on_lost_says(
    on_lost: str, several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row A4b: the core takes it for lost when it has seen it for an hour; and a stopped job buys nothing."""
    several.fake.cancel_looks = None
    deployment = several.deploy(timeout=0, on_timeout="land_partial", on_lost=on_lost)
    deployment.run("texts_batch", "texts")
    assert all(batch.state is State.CANCELLING for batch in several.batches)
    monkeypatch.setattr(policies, "CANCEL_TIME", 0.0)  # the hour is over
    run = deployment.run("texts")
    if on_lost == "fail":
        assert run.status is dg.DagsterRunStatus.FAILURE
    else:
        assert run.status is dg.DagsterRunStatus.SUCCESS, "it was seen being cancelled when it was stopped"
        assert [row.outcome for row in rows(deployment)] == [Outcome.MISSING] * 3


# --- what the core makes of it -----------------------------------------------------------------------------


@pytest.fixture
def decided() -> None:
    """Skips what only a core can do that goes by `on_lost`."""


def figures(deployment: Deployment) -> dict[str, Any]:
    """Of the one materialization of the result."""
    (event,) = deployment.materializations("texts")
    return {name.removeprefix("anybatch/"): value.value for name, value in event.metadata.items()}


def rows(deployment: Deployment) -> list[Row]:
    """What has landed."""
    newest = deployment.materializations("texts")[-1]
    return list(read_results(Path(str(newest.metadata["anybatch/results"].value))))


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize("place", range(len(ROWS)))
def test_what_the_others_answered_lands_and_the_lost_rows_are_missing(place: int, several: Several) -> None:
    """Row A4b: two paid batches landed nowhere."""
    deployment = several.deploy(on_lost="land")
    deployment.run("texts_batch", "texts")
    several.lose(several.batches[place])
    for batch in several.batches:
        several.fake.finish(batch.id)
    deployment.tick()
    (run,) = deployment.dequeue()
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert (figures(deployment)["succeeded"], figures(deployment)["missing"]) == (2, 1)
    landed = rows(deployment)
    assert [row.custom_id for row in landed] == ROWS
    assert landed[place].outcome is Outcome.MISSING
    assert landed[place].error is not None
    assert landed[place].error.code == "results_lost"


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize("place", range(len(ROWS)))
def test_only_the_lost_rows_are_bought_again(place: int, several: Several) -> None:
    """Row A4b: `restart`, the only way out, bought all of them."""
    deployment = several.deploy(on_lost="resubmit")
    deployment.run("texts_batch", "texts")
    several.lose(several.batches[place])
    for batch in several.batches:
        several.fake.finish(batch.id)
    deployment.tick()
    (run,) = deployment.dequeue()
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert deployment.materializations("texts") == []
    again = several.fake.finish(several.fake.last.id)
    assert again.ids == [ROWS[place]]
    deployment.tick()
    deployment.dequeue()
    assert figures(deployment)["succeeded"] == 3
    assert len(several.batches) == 3  # two of the first round, and one of the second


@pytest.mark.usefixtures("decided")
def test_a_person_who_asks_too_early_does_not_end_the_waiting_either(several: Several) -> None:
    """Row A4b: the run sees the loss itself, and goes on to wait for the batches that there are."""
    deployment = several.deploy(on_lost="land")
    deployment.run("texts_batch")
    several.lose(several.batches[1])
    early = deployment.run("texts")
    assert early.status is dg.DagsterRunStatus.SUCCESS
    assert deployment.parked[-1].tags["anybatch/batches"] == ", ".join(one.id for one in several.batches)
    for batch in several.batches:
        several.fake.finish(batch.id)
    deployment.tick()
    assert {run.status for run in deployment.dequeue()} == {dg.DagsterRunStatus.SUCCESS}
    assert [row.outcome for row in rows(deployment)] == [
        Outcome.SUCCEEDED,
        Outcome.MISSING,
        Outcome.SUCCEEDED,
    ]


@pytest.mark.usefixtures("decided")
def test_what_never_ends_being_cancelled_is_done_without(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row A4b: one batch in `cancelling` kept what the others had finished from landing."""
    several.fake.cancel_looks = None
    monkeypatch.setattr(policies, "CANCEL_TIME", 0.0)  # the hour is over at once
    monkeypatch.setattr(policies, "FIRST_LOOK", 0.5)
    deployment = several.deploy(timeout=0, on_timeout="land_partial", on_lost="land")
    deployment.run("texts_batch", "texts")
    stuck, *others = several.batches
    for batch in others:
        several.fake.cancel_now(batch.id, done=1)
    until = time.monotonic() + 20
    while not deployment.materializations("texts") and time.monotonic() < until:
        deployment.tick()
        deployment.dequeue()
    assert [row.outcome for row in rows(deployment)] == [Outcome.MISSING, *2 * [Outcome.SUCCEEDED]]
    assert stuck.state is State.CANCELLING
