"""An Airflow home that is made for this test run and removed after it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anybatch.providers import local
from anybatch.providers.compatible import DIALECTS
from anybatch.providers.openai import Dialect
from anybatch.testing import shorten_pauses
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .stack import airflow_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from .world import World

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
HERE = Path(__file__).resolve().parent

# Airflow reads these when it is first imported, so this stands outside of all fixtures.
HOME = Path(tempfile.mkdtemp(prefix="anybatch-airflow-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("AIRFLOW")]:
    del os.environ[_name]
_BUNDLES = [
    {
        "name": name,
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": str(path)},
    }
    for name, path in (("examples", EXAMPLES / "airflow"), ("tests", HERE / "dags"))
]
os.environ |= {
    "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(_BUNDLES),
    "AIRFLOW_HOME": str(HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
}

# What Airflow's own packages raise before 3.3; nothing of it comes from an import of anybatch's.
OLD_WARNINGS = [
    "ignore:The `airflow.operators.branch:FutureWarning",
    "ignore:SelectableGroups dict interface:DeprecationWarning",
    "ignore:ProvidersManager.hooks is deprecated:FutureWarning",
    "ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning",
    "ignore:'HTTP_422_UNPROCESSABLE_ENTITY':DeprecationWarning",
    "ignore:in a future version of UPath:PendingDeprecationWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    if version("apache-airflow-core").startswith(("3.1.", "3.2.")):
        for line in OLD_WARNINGS:
            config.addinivalue_line("filterwarnings", line)


@dataclass
class TaskInstance:
    """What the operators use of a task instance."""

    dag_id: str = "dag"
    task_id: str = "task"
    run_id: str = "manual__2026-01-01"
    map_index: int = -1
    try_number: int = 1
    pushed: dict[str, Any] = field(default_factory=dict)

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def polled_every(dialect: Dialect, seconds: tuple[float, float]) -> Dialect:
    return replace(dialect, traits=replace(dialect.traits, poll_seconds=seconds))


@pytest.fixture(autouse=True)
def _frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local provider and OpenAI are looked at many times as often as in life."""
    monkeypatch.setattr(local, "_DIALECT", polled_every(local._DIALECT, (0.1, 0.5)))
    monkeypatch.setitem(DIALECTS, "openai", polled_every(DIALECTS["openai"], (0.3, 6.0)))


@pytest.fixture(scope="session")
def database() -> None:
    """The metadata database that `dag.test()` needs, and one API for all its tasks."""
    from airflow.sdk.execution_time import supervisor
    from airflow.utils.db import initdb

    initdb()
    # Making that API takes seconds; Airflow 3.3 keeps it by itself.
    supervisor.in_process_api_server = functools.cache(supervisor.in_process_api_server)


@pytest.fixture
def settings(database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of DAG files that `dag.test()` runs; returns the folder of results."""
    for name, value in {
        "ANYBATCH_OUTPUT": str(tmp_path / "out"),
        "ANYBATCH_MODEL": "local:echo?delay=0.4&fail=0.02",
        "AIRFLOW__ANYBATCH__MIN_DEFER_SECONDS": "0",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("anybatch.local.machine.LONGEST_MOMENT", 0.5)
    return tmp_path / "out"


@pytest.fixture
def ti() -> TaskInstance:
    return TaskInstance()


@pytest.fixture
def context(ti: TaskInstance) -> dict[str, Any]:
    return {"ti": ti, "run_id": ti.run_id}


@pytest.fixture
def api_base(tmp_path: Path) -> str:
    """A local provider of the test's own."""
    return f"sqlite:///{tmp_path}/local.db"


@pytest.fixture
def make_requests() -> Callable[..., list[dict[str, Any]]]:
    """`make_requests(rows, "delay=1&fail=0.5")`: chat requests to the stand-in model."""

    def make(rows: int = 3, wish: str = "delay=0", prompt: str = "Say hello") -> list[dict[str, Any]]:
        return [
            {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": f"local:echo?{wish}",
                    "messages": [{"role": "user", "content": f"{prompt} {number}"}],
                },
            }
            for number in range(1, rows + 1)
        ]

    return make


@pytest.fixture
def add_connection(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`add_connection("my_conn", conn_type=…, password=…)`: in the environment, as Airflow reads it."""

    def add(conn_id: str, **facts: Any) -> str:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(facts))
        return conn_id

    return add


@pytest.fixture
def keyed_server() -> Iterator[FakeServer]:
    """A server with OpenAI's API that knows one key, `sk-right`."""
    with FakeServer(OpenAIFake(key="sk-right")) as server:
        yield server


@pytest.fixture
def world(ti: TaskInstance, tmp_path: Path, add_connection: Callable[..., str]) -> Iterator[World]:
    from .world import World

    fake = OpenAIFake(key="k")
    fake.cancel_looks = None  # until the test ends the cancelling
    with FakeServer(fake) as server:
        conn_id = add_connection(
            "fake", conn_type="anybatch", password="k", host=server.api_base, extra={"provider": "openai"}
        )
        yield World(server, fake, conn_id, ti, tmp_path / "out")


@pytest.fixture(scope="session")
def stack() -> ModuleType:
    """The module that starts a whole Airflow, shared with the demonstration."""
    return airflow_stack


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is minutes in life is not, in this process."""
    shorten_pauses(monkeypatch)
