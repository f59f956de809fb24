"""A provider whose every move the test makes, and a task that runs its batches there, without a database."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred

from anybatch_airflow import AnyBatchOperator

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.openai import OpenAIFake
    from tests.fakes.server import FakeServer

    from .conftest import TaskInstance

HOUR = 3600
ENDED = {"status": "ended", "batches": {}, "message": ""}
LATE = {"status": "timeout", "batches": {}, "message": "late"}


class World:
    """A provider, a task instance and its folder; `ago` seconds are what the provider's clock is behind."""

    def __init__(
        self, server: FakeServer, fake: OpenAIFake, conn_id: str, ti: TaskInstance, out: Path
    ) -> None:
        self.server, self.fake, self.conn_id, self.ti, self.out = server, fake, conn_id, ti, out
        self.ago = 0.0
        self.store: Any = None  # Airflow's task state store
        fake.clock = lambda: time.time() - self.ago

    def operator(self, **kwargs: Any) -> AnyBatchOperator:
        defaults = {"conn_id": self.conn_id, "output": self.out, "timeout": HOUR, "input": requests(4)}
        return AnyBatchOperator(**{"task_id": "task", **defaults, **kwargs})

    @property
    def context(self) -> Any:
        found = {"ti": self.ti, "run_id": self.ti.run_id}
        return found if self.store is None else {**found, "task_state_store": self.store}

    def attempt(self, **kwargs: Any) -> Any:
        """The trigger that a new attempt defers with, or its manifest."""
        return self.attempt_of(self.operator(**kwargs))

    def attempt_of(self, operator: AnyBatchOperator) -> Any:
        try:
            return operator.execute(self.context)
        except TaskDeferred as deferred:
            return deferred.trigger

    def woken(self, event: dict[str, Any], **kwargs: Any) -> Any:
        """The same for a task that is resumed: in a new process, with nothing but the event."""
        try:
            return self.operator(**{"input": [], **kwargs}).execute_complete(self.context, event)
        except TaskDeferred as deferred:
            return deferred.trigger

    @property
    def created(self) -> list[str]:
        return list(self.fake.batches)

    def rows_of(self, batch_id: str) -> list[str]:
        return self.fake.batches[batch_id].ids

    def landed(self) -> dict[str, str]:
        lines = map(json.loads, (self.out / "results.jsonl").read_text().splitlines())
        return {line["custom_id"]: line["outcome"] for line in lines}


def requests(rows: int) -> list[dict[str, Any]]:
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": "hello"}]}
    return [
        {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number in range(rows)
    ]
