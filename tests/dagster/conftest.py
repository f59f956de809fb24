"""An instance with the gate rule, and a provider whose time the test moves on."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import dagster as dg
import httpx
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from dagster._core.execution.build_resources import wrap_resources_for_execution
from dagster._core.instance.types import InstanceType
from dagster._core.launcher.sync_in_memory_run_launcher import SyncInMemoryRunLauncher
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.run_coordinator import QueuedRunCoordinator
from dagster._core.storage.event_log import InMemoryEventLogStorage
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._core.storage.runs import InMemoryRunStorage

from anybatch import AsyncClient, Client, RetryPolicy
from anybatch.local.transport import LocalTransport
from anybatch.testing import shorten_pauses
from anybatch_dagster import BatchResource, build_batch_sensor
from anybatch_dagster.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

GATE_RULE = {"concurrency": {"runs": {"tag_concurrency_limits": [
    {"key": "anybatch/gate", "value": "waiting", "limit": 0}
]}}}  # fmt: skip

# Seconds that each provider's clock is ahead, by the path of its database: resources are copied by Dagster.
_AHEAD: dict[str, float] = {}


class ClockedResource(BatchResource):
    """The embedded provider, on a clock of its own."""

    def client(self) -> Client:
        return Client("local", client_args={"transport": self._transport()})

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        return AsyncClient("local", client_args={"transport": self._transport()}, retry=retry)

    def _transport(self) -> LocalTransport:
        path = self.api_base or ""
        return LocalTransport(path, now=lambda: time.time() + _AHEAD[path])


class FailingResource(BatchResource):
    """A provider whose every answer is the status in `api_base`; `hang` is none at all, `bug` one of ours."""

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        async def answer(_: httpx.Request) -> httpx.Response:
            if self.api_base == "hang":
                await asyncio.sleep(3600)
            if self.api_base == "bug":
                raise TypeError("a bug of ours")
            return httpx.Response(int(self.api_base or 0), json={"error": {"message": "no"}})

        args = {"transport": httpx.MockTransport(answer)}
        return AsyncClient(
            "openai-compatible", api_key="k", api_base="http://x/v1", client_args=args, retry=retry
        )


class Provider:
    """What a test sees and does at the provider's side."""

    def __init__(self, path: Path) -> None:
        self.resource = ClockedResource(
            provider="local", api_base=str(path), output=str(path.parent / "jobs")
        )
        self.resources = {
            "anybatch": self.resource,
            "io_manager": dg.FilesystemIOManager(base_dir=str(path.parent / "values")),
        }
        self._path = str(path)
        _AHEAD[self._path] = 0.0

    def pass_time(self, seconds: float) -> None:
        """Let batches get older."""
        _AHEAD[self._path] += seconds

    def statuses(self) -> list[str]:
        """Of all batches, oldest first."""
        with self.resource.client() as client:
            return [batch.status.value for batch in reversed(client.list(limit=100))]

    def ids(self) -> list[str]:
        """Of all batches, oldest first."""
        with self.resource.client() as client:
            return [batch.id for batch in reversed(client.list(limit=100))]


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    return Provider(tmp_path / "local.db")


@pytest.fixture(scope="session")
def _memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    # Making one costs a second: alembic compiles every migration of Dagster's history.
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path_factory.mktemp("dagster"))) as instance:
        yield instance


@pytest.fixture
def instance(_memory: dg.DagsterInstance) -> Iterator[dg.DagsterInstance]:
    """In memory: enough for runs in this process. Without the gate rule."""
    yield _memory
    _memory.wipe()


@pytest.fixture(scope="session")
def _gated_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance(
        instance_type=InstanceType.EPHEMERAL,
        local_artifact_storage=LocalArtifactStorage(str(tmp_path_factory.mktemp("gated"))),
        run_storage=InMemoryRunStorage(),
        event_storage=InMemoryEventLogStorage(),
        compute_log_manager=NoOpComputeLogManager(),
        run_coordinator=QueuedRunCoordinator(),
        run_launcher=SyncInMemoryRunLauncher(),
        settings=GATE_RULE,
    ) as instance:
        yield instance


@pytest.fixture
def gated(_gated_memory: dg.DagsterInstance) -> Iterator[dg.DagsterInstance]:
    """In memory, with the gate rule."""
    yield _gated_memory
    _gated_memory.wipe()


@pytest.fixture
def gated_instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """On disk, with the gate rule in its `dagster.yaml`."""
    (tmp_path / "dagster").mkdir()
    with dg.instance_for_test(overrides=GATE_RULE, temp_dir=str(tmp_path / "dagster")) as instance:
        yield instance


class _DeployedJob(InMemoryJob):
    """A job as a run worker has it, which loads it from a code location."""

    def __init__(self, job: dg.JobDefinition, repository: dg.RepositoryDefinition) -> None:
        super().__init__(job)
        self._repository = repository

    def get_repository_definition(self) -> dg.RepositoryDefinition:
        return self._repository

    def get_subset(self, **selection: Any) -> _DeployedJob:
        return _DeployedJob(self.get_definition().get_subset(**selection), self._repository)


class Deployment:
    """A code location, and what its daemon does: sensor ticks, and starting what is in the queue."""

    def __init__(
        self,
        instance: dg.DagsterInstance,
        assets: Sequence[Any],
        resources: Mapping[str, Any],
        jobs: Sequence[Any] = (),
        **sensor_options: Any,
    ) -> None:
        self.instance, self.assets, self.resources = instance, assets, resources
        self.definitions = dg.Definitions(
            assets=assets, resources=resources, jobs=jobs, executor=dg.in_process_executor
        )
        self.repository = self.definitions.get_repository_def()
        self._sensor_options = sensor_options
        self._sensor = build_batch_sensor(**sensor_options)
        self.cursor: str | None = None
        self.location = "here"

    def run(
        self,
        *names: str,
        job_name: str = "__ASSET_JOB",
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> dg.DagsterRun:
        """Materialize these assets in a run of the code location, and wait for its end."""
        partition = {"dagster/partition": partition_key} if partition_key else {}
        keys = [dg.AssetKey.from_user_string(name) for name in names]
        return self._execute(self._create(keys, {**partition, **(tags or {})}, run_config, job_name))

    def _create(
        self,
        keys: Collection[dg.AssetKey],
        tags: Mapping[str, str] | None,
        run_config: Mapping[str, Any] | None,
        job_name: str = "__ASSET_JOB",
    ) -> dg.DagsterRun:
        location = RegisteredCodeLocationOrigin(self.location)
        return self.instance.create_run_for_job(
            self.repository.get_job(job_name),
            run_config=run_config,
            tags=tags,
            asset_selection=frozenset(keys) or None,
            remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job_name),
            status=dg.DagsterRunStatus.NOT_STARTED,
        )

    def execute_again(self, run: dg.DagsterRun) -> dg.DagsterRun:
        """Queue a run like this one, as a person does in the UI: it inherits the tags."""
        keys = run.asset_selection or ()
        again = self._create(keys, run.tags, run.run_config, run.job_name)
        self.instance.report_dagster_event(dg.DagsterEvent.job_enqueue(again), run_id=again.run_id)
        return self.again(again)

    def _execute(self, run: dg.DagsterRun) -> dg.DagsterRun:
        job = _DeployedJob(self.repository.get_job(run.job_name), self.repository)
        execute_run(job, run, self.instance)
        return self.again(run)

    def again(self, run: dg.DagsterRun) -> dg.DagsterRun:
        """A run as it stands."""
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    def tick(self, *, remember: bool = False) -> Any:
        """One evaluation of the sensor, by a process that knows only the cursor, unless it is to remember.

        What it asks for is put into the queue.
        """
        if not remember:
            self._sensor = build_batch_sensor(**self._sensor_options)
        context = dg.SensorEvaluationContext(
            instance_ref=None,
            instance=self.instance,
            cursor=self.cursor,
            repository_name="__repository__",
            repository_def=self.repository,
            sensor_name=self._sensor.name,
            resources=wrap_resources_for_execution(self.resources),
            code_location_origin=RegisteredCodeLocationOrigin(self.location),
        )
        with context:
            data = self._sensor.evaluate_tick(context)
        self.cursor = data.cursor
        for requested in data.run_requests or ():
            run = self._create(requested.asset_selection or (), requested.tags, requested.run_config)
            self.instance.report_dagster_event(dg.DagsterEvent.job_enqueue(run), run_id=run.run_id)
        return data

    @property
    def queue(self) -> list[dg.DagsterRun]:
        filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED])
        return list(self.instance.get_runs(filters, ascending=True))

    @property
    def parked(self) -> list[dg.DagsterRun]:
        return [run for run in self.queue if run.tags.get("anybatch/gate") == "waiting"]

    def remove_gate_rule(self, patch: pytest.MonkeyPatch) -> None:
        """Edit `dagster.yaml`, and restart Dagster."""
        assert self.instance._settings is not None
        patch.setitem(self.instance._settings, "concurrency", {})  # type: ignore[arg-type]
        assert not Gate(self.instance).exists

    def dequeue(self) -> list[dg.DagsterRun]:
        """Start what the gate does not hold back, and wait for it."""
        held = "waiting" if Gate(self.instance).exists else None
        started = [run for run in self.queue if held is None or run.tags.get("anybatch/gate") != held]
        return [self._execute(run.with_status(dg.DagsterRunStatus.STARTING)) for run in started]

    def materializations(self, name: str) -> list[dg.AssetMaterialization]:
        """Of an asset, oldest first."""
        key = dg.AssetKey.from_user_string(name)
        records = self.instance.fetch_materializations(key, limit=1000, ascending=True).records
        return [record.asset_materialization for record in records if record.asset_materialization]


def request(custom_id: str, text: str = "hello", model: str = "local:echo?delay=60") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is minutes in life is not, in this process."""
    shorten_pauses(monkeypatch)
