"""An instance with the gate rule, and a provider whose time the test moves on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from anybatch import AsyncClient, Client, RetryPolicy
from anybatch.local.transport import LocalTransport
from anybatch_dagster import BatchResource

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    """In memory: enough for runs in this process."""
    yield _memory
    _memory.wipe()


@pytest.fixture
def gated_instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """On disk, with the gate rule in its `dagster.yaml`."""
    (tmp_path / "dagster").mkdir()
    with dg.instance_for_test(overrides=GATE_RULE, temp_dir=str(tmp_path / "dagster")) as instance:
        yield instance


def request(custom_id: str, text: str = "hello", model: str = "local:echo?delay=60") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
