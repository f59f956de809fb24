"""One account with its batch asset, and the provider of its own that it talks to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import dagster as dg
import psutil

from anybatch import Outcome, read_results
from anybatch_dagster.metadata import ResultMetadata
from tests.dagster.stack import dagster_stack
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.proxy import FaultProxy
from tests.fakes.server import FakeServer

from .cluster import KEY, LOCATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .cluster import Cluster

FILES, BATCHES, CONTENT = "/v1/files", "/v1/batches", "/v1/files/.*/content"
ROWS = [f"row-{number}" for number in range(5)]
GONE = (State.CANCELLING, State.CANCELLED)
SCENARIO = "scenario"  # a tag of the runs: those that wait inherit it

Status = dg.DagsterRunStatus


class Account:
    """While the context is open the provider is there; `proxy` is the way to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.submit, self.result = f"{name}_batch", name
        self.location = next(where for where, names in LOCATIONS.items() if name in names)
        self.fake = OpenAIFake(key=KEY)
        self.server = FakeServer(self.fake)
        self.cluster: Cluster
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        self._ending.enter_context(self.server)
        self.proxy = self._ending.enter_context(FaultProxy(self.server.api_base))
        return self

    def __exit__(self, *error: Any) -> None:
        self._ending.__exit__(*error)

    # --- what a person does ------------------------------------------------------------------------------

    def launch(self, partition: str | None = None, *, tags: Mapping[str, str] | None = None) -> str:
        """Materialize the asset, all of it; returns the run's id."""
        found = {SCENARIO: self.name, **(tags or {})}
        if partition:
            found["dagster/partition"] = partition
        return self.cluster.launch_assets([self.submit, self.result], tags=found, location=self.location)

    # --- what Dagster says -------------------------------------------------------------------------------

    def runs(self, *statuses: dg.DagsterRunStatus, **tags: str) -> Sequence[dg.DagsterRun]:
        """The runs of this scenario, oldest first."""
        filters = dg.RunsFilter(statuses=list(statuses) or None, tags={SCENARIO: self.name, **tags})
        return self.cluster.instance.get_runs(filters, ascending=True)

    def parked(self) -> Sequence[dg.DagsterRun]:
        return self.runs(Status.QUEUED, **{"anybatch/gate": "waiting"})

    def process(self, run_id: str) -> psutil.Process:
        """The process that executes a run."""
        entries = self.cluster.instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        events = (entry.dagster_event for entry in entries)
        facts = [event.engine_event_data.metadata for event in events if event]
        (pid,) = {int(str(one["pid"].value)) for one in facts if "pid" in one}
        return psutil.Process(pid)

    def materializations(self, asset: str | None = None) -> list[dg.AssetMaterialization]:
        """Of the result asset, oldest first."""
        key = dg.AssetKey(asset or self.result)
        records = self.cluster.instance.fetch_materializations(key, limit=1000, ascending=True).records
        return [record.asset_materialization for record in records if record.asset_materialization]

    def story(self) -> str:
        """What became of the runs and of the batches, for people."""
        told = [
            f"{self.name}: {batch.id} {batch.state} looks {batch.looks}"
            for batch in self.fake.batches.values()
        ]
        for run in self.runs():
            gate, status = run.tags.get("anybatch/gate"), run.tags.get("anybatch/status")
            told.append(f"run {run.run_id} {run.status.value} gate={gate} {status}")
            for entry in self.cluster.instance.all_logs(run.run_id):
                event = entry.dagster_event
                if entry.level >= 30 or (event and event.is_failure):
                    told.append(f"    {entry.message[:600]}")
        return "\n".join([*told, *map(str, self.server.calls[-20:])])

    # --- waiting -----------------------------------------------------------------------------------------

    def until(self, done: Callable[[], Any], what: str, timeout: float = 240) -> Any:
        try:
            found = self.cluster.until(done, f"{self.name}: {what}", timeout, pause=1)
        except dagster_stack.StackError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None
        self.cluster.note(f"{self.name}: {what}")
        return found

    def until_created(self, count: int = 1) -> FakeBatch:
        """Return the batch of this number when the provider has it."""
        self.until(lambda: len(self.fake.batches) >= count, f"batch {count} is there")
        return list(self.fake.batches.values())[count - 1]

    def until_parked(self, count: int = 1) -> Sequence[dg.DagsterRun]:
        """Return the waiting runs when there are so many."""
        self.until(lambda: len(self.parked()) == count, f"{count} runs wait")
        return self.parked()

    def until_watched(self) -> FakeBatch:
        """Return when the sensor has looked at the newest batch after a run was parked."""
        self.until_parked()
        batch, seen = self.fake.last, self.fake.last.looks
        self.until(lambda: batch.looks > seen, "the sensor looks at the batch")
        return batch

    def until_status(self, run_id: str, wanted: dg.DagsterRunStatus) -> None:
        """Return when a run has ended like this; it fails at once where it has ended otherwise."""
        self.until(lambda: self.cluster.run(run_id).is_finished, f"run {run_id} is over")
        assert self.cluster.run(run_id).status is wanted, self.story()

    def until_materialized(self, count: int = 1) -> dg.AssetMaterialization:
        """Return the result's newest materialization when there are so many."""
        self.until(lambda: len(self.materializations()) >= count, f"materialization {count}")
        return self.materializations()[-1]

    def until_idle(self) -> None:
        """Return when every run of the scenario is over."""
        self.until(lambda: all(run.is_finished for run in self.runs()), "all runs are over")

    # --- what has to hold at the end -----------------------------------------------------------------------

    def finish(self, batch: FakeBatch, *, batches: int = 1, materializations: int = 1) -> None:
        """Let the batch complete; then all has landed, and there was nothing more than that."""
        self.fake.finish(batch.id)
        self.until_landed(batches=batches, materializations=materializations)

    def until_landed(self, *, batches: int = 1, materializations: int = 1) -> None:
        event = self.until_materialized(materializations)
        self.until_idle()
        assert len(self.fake.batches) == batches, self.story()
        assert len(self.materializations()) == materializations, self.story()
        self.check(event)

    def check(self, event: dg.AssetMaterialization, rows: Sequence[str] = ROWS) -> None:
        """Every row is there once, in order, with an answer."""
        facts = ResultMetadata.extract(event.metadata)
        assert (facts.requests, facts.succeeded) == (len(rows), len(rows)), self.story()
        landed = list(read_results(Path(str(facts.results))))
        assert [row.custom_id for row in landed] == list(rows)
        assert {row.outcome for row in landed} == {Outcome.SUCCEEDED}
