"""Under a real Dagster that is deployed anew while a run waits: with other code, or without the gate rule."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.server import FakeServer

from .stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.deployment]

DEFINITIONS = Path(__file__).resolve().parent / "deployed.py"
NO_RULE: dict[str, Any] = {"concurrency": {"runs": {"tag_concurrency_limits": []}}}

Status = dg.DagsterRunStatus


class Deployed:
    """A Dagster with the gate rule, and the provider that its assets use."""

    def __init__(self, stack: Stack, fake: OpenAIFake) -> None:
        self.stack, self.fake = stack, fake

    def park(self, name: str) -> tuple[dg.DagsterRun, FakeBatch]:
        """Materialize a batch asset; returns the waiting run and its batch when the sensor looks at it."""
        self.stack.launch_assets([f"{name}_batch", name])
        (waiting,) = self.stack.until(lambda: self.waiting(name), f"a run of {name} waits", 120)
        batch = self.fake.last
        self.until(lambda: batch.looks > 1, "the sensor looks at the batch")
        return waiting, batch

    def waiting(self, name: str) -> list[dg.DagsterRun]:
        tags = {"anybatch/gate": "waiting", "anybatch/submit_asset": f"{name}_batch"}
        return list(self.stack.instance.get_runs(dg.RunsFilter(statuses=[Status.QUEUED], tags=tags)))

    def until(self, done: Any, what: str, timeout: float = 120) -> Any:
        return self.stack.until(done, what, timeout)

    def landed(self, name: str) -> int:
        """How often the result was materialized."""
        return len(self.stack.instance.fetch_materializations(dg.AssetKey(name), limit=10).records)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    fake = OpenAIFake()
    with FakeServer(fake) as server:
        env = {
            "TEST_PROVIDER": "openai-compatible",
            "TEST_API_BASE": server.api_base,
            "TEST_KEY": fake.key,
        }
        with Stack(tmp_path_factory.mktemp("changing") / "dagster", DEFINITIONS, env=env) as stack:
            yield Deployed(stack, fake)


def test_a_renamed_asset_is_named_and_its_waiting_run_can_be_terminated(deployed: Deployed) -> None:
    """Row H2: it stayed queued, no tick named it, and terminating it left the batch running."""
    stack = deployed.stack
    waiting, batch = deployed.park("named")
    began = time.time()
    stack.restart(env={"TEST_NAME": "renamed"})

    def named() -> bool:
        told = (f"run {waiting.run_id}", "asset named_batch is not defined here any more", batch.id)
        return any(all(one in said for one in told) for said in stack.said_in_ticks(since=began))

    deployed.until(named, "a tick names run, asset and batch")
    assert stack.run(waiting.run_id).status is Status.QUEUED
    stack.terminate(waiting.run_id)
    deployed.until(lambda: batch.state in (State.CANCELLING, State.CANCELLED), "the batch is cancelled")
    assert stack.run(waiting.run_id).status is Status.CANCELED


def test_without_the_gate_rule_what_waited_is_waited_for_again_and_lands(deployed: Deployed) -> None:
    """Row H1: the run ended green, and the sensor said for ever that nothing was waiting."""
    stack = deployed.stack
    waiting, batch = deployed.park("secret")
    created = len(deployed.fake.batches)
    stack.restart(config=NO_RULE)
    deployed.until(lambda: stack.run(waiting.run_id).is_finished, "the run starts, and ends")
    assert stack.run(waiting.run_id).status is Status.SUCCESS
    assert deployed.landed("secret") == 0
    looks = batch.looks
    deployed.until(lambda: batch.looks > looks, "the sensor looks at the batch again")
    deployed.fake.finish(batch.id)
    deployed.until(lambda: deployed.landed("secret"), "the results land")
    deployed.until(lambda: all(run.is_finished for run in stack.instance.get_runs()), "all runs are over")
    assert deployed.landed("secret") == 1
    assert len(deployed.fake.batches) == created
