"""The cluster: what runs in it, how it is hurt, and what it says of itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from celery import Celery

from tests.airflow.stack import airflow_stack

from .services import connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

HERE = Path(__file__).resolve().parent
KEY = "sk-cluster"
TRIGGERERS = ("triggerer-1", "triggerer-2")

# Whoever dies is missed within seconds instead of minutes.
_SETTINGS = {
    "CELERY__SYNC_PARALLELISM": "1",
    "CORE__EXECUTOR": "CeleryExecutor",
    "CORE__HOSTNAME_CALLABLE": "cluster_host.name",
    "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "DAG_PROCESSOR__PARSING_PROCESSES": "1",
    "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "3",
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "8",
}


class Stopped(Exception):
    """The cluster ends, whatever a scenario waits for."""


class Cluster(airflow_stack.AirflowStack):  # type: ignore[misc, name-defined]
    """A worker for the queue `default`, one for the queue `doomed` that is there to be killed; then the first
    takes over its queue."""

    prepare = ("db migrate",)

    def __init__(self, home: Path, output: Path, database: str, broker: str) -> None:
        settings = _SETTINGS | {
            "CELERY__BROKER_URL": broker,
            "CELERY__RESULT_BACKEND": broker,
            "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{database}",
        }
        env = {f"AIRFLOW__{name}": value for name, value in settings.items()} | {
            "AIRFLOW_CONN_PROVIDER": f"openai://:{KEY}@",
            "ANYBATCH_OUTPUT": str(output),
            "PYTHONPATH": os.pathsep.join([str(HERE / "host"), os.environ.get("PYTHONPATH", "")]),
        }
        super().__init__(home, HERE / "dags", parallelism=32, env=env)
        self.output = output
        self.stopping = threading.Event()
        self._broker = broker
        self._database = connect(database)
        self._one_query = threading.Lock()
        self._log_begins: dict[str, int] = {}
        self.calm: list[Future[None]] = []  # scenarios that need each triggerer to do its work

    def components(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = super().components()
        triggerer = found.pop("triggerer")
        found |= {"dag-processor": ["dag-processor"]}
        found |= dict.fromkeys(TRIGGERERS, triggerer)
        return found | {
            "worker-1": self._worker("worker-1", "default", 16),
            "worker-2": self._worker("worker-2", "doomed", 12),
        }

    def _worker(self, name: str, queue: str, slots: int) -> list[str]:
        return ["celery", "worker", "--celery-hostname", name, "--queues", queue, "--concurrency", str(slots),
                "--skip-serve-logs", "--without-mingle", "--without-gossip",
                "--pid", str(self.home / f"{name}.pid")]  # fmt: skip

    def environment(self, name: str) -> dict[str, str]:
        return {**self.env, "CLUSTER_HOST": name}

    # --- life ------------------------------------------------------------------------------------------

    def start(self, timeout: float = 240.0) -> None:
        super().start(timeout)
        self.api("GET", "/api/v2/pools")  # the token, before many threads want one

    def stop(self) -> None:
        self.stopping.set()
        super().stop()

    def close(self) -> None:
        self._database.close()

    def launch(self, name: str) -> None:
        self._log_begins[name] = self._log(name).stat().st_size if self._log(name).exists() else 0
        super().launch(name)

    def kill(self, name: str) -> None:
        """SIGKILL to a component and all that it has started, at once: the machine is gone."""
        process = self._processes.pop(name)
        leader = psutil.Process(process.pid)
        for one in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def take_over(self, name: str, queue: str) -> None:
        """Let a worker serve one queue more."""
        with Celery(broker=self._broker) as app:
            told = app.control.add_consumer(queue, destination=[f"celery@{name}"], reply=True, timeout=10)
        assert told, f"{name} does not answer"

    def freeze(self, name: str) -> None:
        os.killpg(self.pid(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.killpg(self.pid(name), signal.SIGCONT)

    def restart(self, name: str) -> None:
        """SIGTERM and a new one, as in a deployment that replaces its machines one after the other."""
        super().restart(name)
        self.until_up(name)

    def until_storm(self) -> None:
        """Return when triggerers may be hurt: nobody needs calm any more."""
        self.until("the calm ones are done", lambda: all(one.done() for one in self.calm), 300)

    def until_up(self, name: str) -> None:
        self.until(f"{name} is up again", lambda: self.is_up(name), 60)

    def is_up(self, name: str) -> bool:
        """Whether a worker or a triggerer that was launched takes work."""
        if name in TRIGGERERS:
            beats = "job_type = 'TriggererJob' AND state = 'running' AND hostname = %s"
            fresh = "latest_heartbeat > now() - interval '4 seconds'"
            return bool(self.query(f"SELECT id FROM job WHERE {beats} AND {fresh}", name))
        with self._log(name).open("rb") as log:
            log.seek(self._log_begins[name])
            return b" ready." in log.read()

    def _healthy(self) -> bool:
        return (
            super()._healthy()
            and all(self.is_up(name) for name in (*TRIGGERERS, "worker-1", "worker-2"))
            and bool(self.query("SELECT 1 FROM serialized_dag LIMIT 1"))
        )

    # --- what it says ------------------------------------------------------------------------------------

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the metadata database."""
        with self._one_query, self._database.cursor() as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    def until(
        self, what: str, done: Callable[[], bool], timeout: float, tell: Callable[[], str] = lambda: ""
    ) -> None:
        """Return once it is so; AssertionError when it is not in time."""
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"not in {timeout:g} s: {what}\n{tell() or self.log_tail()}"
            if self.stopping.wait(0.4):
                raise Stopped
