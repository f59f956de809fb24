"""A tick of the batch sensor with 1,000 batches in flight: `python -m benchmarks.dagster_sensor [batches]`.

With parked runs and without the gate rule, on an SQLite instance in a temporary folder, against an
OpenAI-compatible listing in this process. All batches change before the tick "all change", and a tenth of
them ends before "a tenth ends". Wall and CPU time are of the tick alone, without what the daemon does with
its answer; nothing starts the runs that it requests.
"""

from __future__ import annotations

import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import httpx
import yaml
from dagster._core.events import DagsterEvent, DagsterEventType, StepMaterializationData
from dagster._core.events.log import EventLogEntry
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.test_utils import create_run_for_test

from anybatch import AsyncClient, RetryPolicy
from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor
from anybatch_dagster.metadata import SubmissionMetadata

GATE_RULE = {"concurrency": {"runs": {"tag_concurrency_limits": [
    {"key": "anybatch/gate", "value": "waiting", "limit": 0}
]}}}  # fmt: skip
NOW = int(time.time())
SETTLED = NOW - 3600  # older than what is read again because its order may not be certain yet
PAGE = 100


class Listing:
    """The provider: all batches, newest first; counts how often it is asked."""

    def __init__(self, batches: int) -> None:
        self.ids = [f"batch_{number:06}" for number in range(batches)]
        self.calls = self.done = 0
        self.ended: set[str] = set()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.calls += 1
        name = request.url.path.rpartition("/")[2]
        if name != "batches":
            return httpx.Response(200, json=self._batch(name))
        after = request.url.params.get("after")
        start = self.ids.index(after) + 1 if after else 0
        page = self.ids[start : start + PAGE]
        data = [self._batch(batch_id) for batch_id in page]
        more = start + PAGE < len(self.ids)
        return httpx.Response(200, json={"object": "list", "data": data, "has_more": more})

    def _batch(self, batch_id: str) -> dict[str, Any]:
        ended = batch_id in self.ended
        return {
            "id": batch_id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "status": "completed" if ended else "in_progress",
            "created_at": NOW - self.ids.index(batch_id),
            "completed_at": NOW if ended else None,
            "request_counts": {"total": 100, "completed": 100 if ended else self.done, "failed": 0},
            "metadata": {},
        }


LISTING = Listing(0)


class ListingResource(BatchResource):
    """An account whose provider allows polling at any rate: every batch is due in every tick."""

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        args = {"transport": httpx.MockTransport(LISTING.answer)}
        client = AsyncClient(
            "openai-compatible", api_key="k", api_base="http://x/v1", client_args=args, retry=retry
        )
        client.provider.poll_seconds = (0.01, 0.01)
        return client


@batch_asset(partitions_def=dg.DynamicPartitionsDefinition(name="parts"))
def texts() -> Iterator[dict[str, Any]]:
    yield {}


RESOURCES = {"anybatch": ListingResource(provider="openai-compatible")}
DEFINITIONS = dg.Definitions(assets=texts, resources=RESOURCES)


def facts_of(batch_id: str) -> SubmissionMetadata:
    return SubmissionMetadata(
        batches=batch_id,
        folder="/nowhere",
        resource="anybatch",
        deadline=NOW + 90_000.0,
        requests=100,
        round=1,
    )


def park(instance: dg.DagsterInstance, batch_id: str) -> None:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__")
    tags = {
        "anybatch/gate": "waiting",
        "anybatch/in_flight": "anybatch",
        "anybatch/submission": str(uuid.uuid4()),
        "anybatch/submit_asset": "texts_batch",
        "anybatch/batches": batch_id,
        "anybatch/resource": "anybatch",
        "anybatch/deadline": str(NOW + 90_000.0),
        "dagster/partition": batch_id,
        "dagster/backfill": "backfill",
    }
    create_run_for_test(
        instance,
        job_name="__ASSET_JOB",
        status=dg.DagsterRunStatus.QUEUED,
        tags=tags,
        asset_selection=frozenset([dg.AssetKey("texts")]),
        remote_job_origin=RemoteJobOrigin(repository, "__ASSET_JOB"),
    )


def submit(instance: dg.DagsterInstance, batch_id: str) -> None:
    event = dg.AssetMaterialization("texts_batch", partition=batch_id, metadata=dict(facts_of(batch_id)))
    run_id = str(uuid.uuid4())
    entry = EventLogEntry(
        user_message="",
        level=20,
        run_id=run_id,
        timestamp=float(SETTLED),
        error_info=None,
        job_name="__ASSET_JOB",
        dagster_event=DagsterEvent(
            DagsterEventType.ASSET_MATERIALIZATION.value,
            "__ASSET_JOB",
            event_specific_data=StepMaterializationData(event),
        ),
    )
    instance.handle_new_event(entry)


@contextmanager
def instance_with(batches: int, *, parked: bool) -> Iterator[dg.DagsterInstance]:
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/dagster.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump({"telemetry": {"enabled": False}, **(GATE_RULE if parked else {})}, file)
        with dg.DagsterInstance.from_config(folder) as instance:
            for batch_id in LISTING.ids[:batches]:
                (park if parked else submit)(instance, batch_id)
            yield instance


class Ticks:
    """The sensor of one process."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance, self.cursor = instance, None
        self.sensor = build_batch_sensor()

    def __call__(self, name: str) -> None:
        LISTING.calls = 0
        context = dg.build_sensor_context(
            self.instance, cursor=self.cursor, definitions=DEFINITIONS, resources=RESOURCES,
            sensor_name=self.sensor.name,
        )  # fmt: skip
        with context:
            wall, cpu = time.perf_counter(), time.process_time()
            data = self.sensor.evaluate_tick(context)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.cursor = data.cursor
        print(
            f"  {name:<22}{wall:6.2f} s wall {cpu:6.2f} s CPU {LISTING.calls:4} calls "
            f"{len(data.cursor or ''):5} B cursor {len(data.asset_events):4} observations "
            f"{len(data.run_requests or ()):4} runs asked for"
        )


def main(batches: int = 1000) -> None:
    global LISTING
    for parked in (True, False):
        LISTING = Listing(batches)
        print(f"{batches:,} in flight, {'parked' if parked else 'unparked'}")
        with instance_with(batches, parked=parked) as instance:
            ticks = Ticks(instance)
            for number in range(1 if parked else -(-batches // 100)):
                ticks("first of a process" if number == 0 else f"  going on reading {number}")
            ticks("nothing new")
            LISTING.done = 30
            ticks("all change")
            ticks("nothing new")
            LISTING.ended = set(LISTING.ids[: batches // 10])
            ticks("a tenth ends")
            ticks("nothing new")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
