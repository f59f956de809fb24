"""One attempt at a job through each surface, told in the same words."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, TaskDeferred
from dagster._core.execution.api import execute_run

from anybatch import AnyBatchError, Client, Job, RetryPolicy, RowsLackingError
from anybatch.errors import classify
from anybatch_airflow import AnyBatchOperator
from anybatch_dagster import BatchResource, batch_asset
from tests.airflow.conftest import TaskInstance
from tests.airflow.world import requests
from tests.dagster.conftest import Deployment, _DeployedJob
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

KEY = "k"


@dataclass
class Provider:
    """The provider's side."""

    server: FakeServer
    fake: OpenAIFake

    @property
    def statuses(self) -> list[str]:
        return [batch.state.value for batch in self.fake.batches.values()]

    @property
    def ids(self) -> list[str]:
        return list(self.fake.batches)


@dataclass(frozen=True)
class End:
    """How an attempt has ended: "landed", "lacking" (landed with too few results), "final" (no retry helps)
    or "again" (one may); `counts` and `rounds` are those of the report, if there is one."""

    how: str
    counts: dict[str, int] | None = None
    rounds: int | None = None
    told: str = field(default="", compare=False)


@dataclass
class Surface(ABC):
    """A way to run a job. Each `attempt` is the same job again, by a process that knows what is on disk."""

    provider: Provider
    folder: Path

    @property
    def job_folder(self) -> Path:
        """Where the ledger of the job lies."""
        return self.folder

    @abstractmethod
    def _attempt(self, input: Sequence[dict[str, Any]], **options: Any) -> tuple[str, str]:
        """How it ended, and what was told of it; options are those of `AnyBatchOperator`."""

    def attempt(self, rows: int = 4, **options: Any) -> End:
        how, told = self._attempt(requests(rows), **options)
        path = self.job_folder / "report.json"
        if not path.exists():
            return End(how, told=told)
        report = json.loads(path.read_text())
        counts = {outcome: count for outcome, count in report["counts"].items() if count}
        return End(how, counts, report["rounds"], told)


class Plain(Surface):
    """`Client.run`."""

    def _attempt(self, input: Sequence[dict[str, Any]], **options: Any) -> tuple[str, str]:
        named = ("timeout", "on_timeout", "on_partial", "max_failed_ratio")
        run = {name: options.pop(name) for name in named if name in options}
        base, retry = self.provider.server.api_base, RetryPolicy(attempts=2, first_delay=0.01)
        with Client("openai", api_key=KEY, api_base=base, retry=retry) as client:
            try:
                client.run(Job(input=input, output=self.folder, id="job", **options), **run)
            except RowsLackingError as error:
                return "lacking", str(error)
            except AnyBatchError as error:
                return "final" if classify(error).is_final else "again", str(error)
        return "landed", ""


class Airflow(Surface):
    """`AnyBatchOperator`, deferred, with the trigger run beside it."""

    tries = 0

    def _attempt(self, input: Sequence[dict[str, Any]], **options: Any) -> tuple[str, str]:
        self.tries += 1
        context: Any = {"ti": TaskInstance(try_number=self.tries), "run_id": "r"}
        event: dict[str, Any] | None = None
        while True:
            # Each stretch on a worker is a process of its own.
            operator = AnyBatchOperator(
                task_id="task", input=list(input), output=self.folder, conn_id="fake", min_defer_seconds=0,
                **options,
            )  # fmt: skip
            try:
                if event is None:
                    operator.execute(context)
                else:
                    operator.execute_complete(context, event)
            except TaskDeferred as deferred:
                event = asyncio.run(_event_of(deferred.trigger))
            except AirflowFailException as error:
                landed = (self.folder / "report.json").exists()
                return "lacking" if landed else "final", str(error)
            except (AirflowException, AnyBatchError) as error:
                return "again", str(error)
            else:
                return "landed", ""


async def _event_of(trigger: Any) -> dict[str, Any]:
    async for event in trigger.run():
        return dict(event.payload)
    raise AssertionError("the trigger ended without an event")


class _Deployment(Deployment):
    """Keeps the errors that runs ended with."""

    error: BaseException | None = None

    def _execute(self, run: dg.DagsterRun) -> dg.DagsterRun:
        job = _DeployedJob(self.repository.get_job(run.job_name), self.repository)
        try:
            execute_run(job, run, self.instance, raise_on_error=True)
        except Exception as error:
            self.error = error
        return self.again(run)


class Dagster(Surface):
    """`@batch_asset`, whose result run is parked, with the sensor ticking beside it."""

    instance: dg.DagsterInstance
    cursor: str | None = None

    @property
    def job_folder(self) -> Path:
        return self.folder / "reviews_batch"

    def _attempt(self, input: Sequence[dict[str, Any]], **options: Any) -> tuple[str, str]:
        @batch_asset(**options)
        def reviews():  # type: ignore[no-untyped-def]
            yield from input

        resource = BatchResource(
            provider="openai", api_key=KEY, api_base=self.provider.server.api_base, output=str(self.folder)
        )
        deployment = _Deployment(self.instance, [*reviews], {"anybatch": resource})
        deployment.cursor = self.cursor
        last = deployment.run("reviews_batch", "reviews")
        while deployment.queue:
            trouble = deployment.tick().skip_message or ""
            for run in deployment.dequeue():
                last = run
            if "AuthenticationError" in trouble:  # a person reads it at the sensor, and looks for themselves
                last = deployment.run("reviews")
                break
            time.sleep(0.02)
        self.cursor = deployment.cursor
        return self._how(deployment, last)

    def _how(self, deployment: _Deployment, run: dg.DagsterRun) -> tuple[str, str]:
        error, landed = deployment.error, (self.job_folder / "report.json").exists()
        if error is not None:
            final = isinstance(error, dg.Failure) and not error.allow_retries
            return "lacking" if landed else "final" if final else "again", str(error)
        checks = self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        passed = all(
            one.dagster_event.asset_check_evaluation_data.passed for one in checks if one.dagster_event
        )
        return "landed" if passed else "lacking", ""
