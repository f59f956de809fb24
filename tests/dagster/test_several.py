"""Jobs of several batches at a fake server, where one batch fares otherwise than the rest."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

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
def several(gated: dg.DagsterInstance, tmp_path: Path) -> Iterator[Several]:
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
