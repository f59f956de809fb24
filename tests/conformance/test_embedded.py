"""The embedded provider, which has no fake: it is asked for trouble by the name of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from anybatch import BatchFailedError, BatchStatus, Outcome

from .world import Driver, LocalWorld, landed, row_ids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.parametrize("shared_world", ["local"], indirect=True, scope="module")

ROWS = 40
ENDINGS = {
    "fail=0.3": (BatchStatus.COMPLETED, {Outcome.FAILED}),
    "expire=0.3": (BatchStatus.EXPIRED, {Outcome.EXPIRED}),
    "missing=0.3": (BatchStatus.COMPLETED, {Outcome.MISSING}),
    # of a batch that expired, rows without a line count as expired
    "fail=0.2&expire=0.2&missing=0.2": (BatchStatus.EXPIRED, {Outcome.FAILED, Outcome.EXPIRED}),
    "cancel=50": (BatchStatus.CANCELLED, {Outcome.CANCELLED}),
    "fail=1": (BatchStatus.COMPLETED, {Outcome.FAILED}),
}


@pytest.fixture
def model(world: LocalWorld) -> Iterator[str]:
    """The name that is put before the wishes of a test."""
    had = world.model
    yield had
    world.model = had


@pytest.mark.parametrize("wish", ENDINGS)
def test_every_ending_is_accounted_for(
    world: LocalWorld, driver: Driver, tmp_path: Path, model: str, wish: str
) -> None:
    world.model = f"{model}&{wish}"
    world.let_batches_end()
    job = world.job(tmp_path, count=ROWS)
    report = driver.run(job, timeout=10)
    found = landed(job, report, row_ids(ROWS))
    status, outcomes = ENDINGS[wish]
    assert report.batches[0].status is status
    seen = {Outcome(line["outcome"]) for line in found.lines}
    assert seen - {Outcome.SUCCEEDED} == outcomes
    assert (Outcome.SUCCEEDED in seen) == (wish != "fail=1")
    assert report.unexpected == 0
    assert all(
        one in found.text(one) for one, outcome in found.outcomes.items() if outcome == Outcome.SUCCEEDED
    )


def test_a_batch_that_is_refused(world: LocalWorld, driver: Driver, tmp_path: Path, model: str) -> None:
    world.model = f"{model}&invalid=token_limit_exceeded"
    world.let_batches_end()
    with pytest.raises(BatchFailedError, match="token_limit_exceeded"):
        driver.run(world.job(tmp_path), timeout=10)


def test_both_clients_see_one_truth(world: LocalWorld, driver: Driver, tmp_path: Path) -> None:
    """Two clients on one database, as a worker and a triggerer are."""
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    for mode in ("sync", "async"):
        with world.open(mode) as other:
            assert other.retrieve(batch.id).status is driver.retrieve(batch.id).status
            assert [one.id for one in other.submit(job)] == [batch.id]
    world.finish(batch.id)
    with world.open("async") as other:
        landed(job, other.collect(job), row_ids(8))
