"""A whole Dagster in a throw-away folder: `dagster dev` with webserver, daemon and code server, on SQLite.

    with DagsterStack(home, definitions) as dagster:
        run_id = dagster.launch_job("my_job")
        dagster.until(lambda: dagster.run(run_id).is_finished, "my job", timeout=300)

For demonstrations and tests. It listens on the loopback interface, on a port found free, and every process
that was started is ended by the id of its group, whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RULES = Path(__file__).resolve().parent / "dagster" / "dagster.yaml"

# A shell that runs this in the background has interrupts ignored, and dagster would inherit that.
_LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from dagster._cli import main
sys.argv[0] = "dagster"
main()
"""

_HEALTH = """{
  instance { daemonHealth { allDaemonStatuses { daemonType healthy required } } }
  repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } }
  workspaceOrError { ... on Workspace { locationEntries {
    locationOrLoadError { ... on PythonError { message } } } } }
}"""
_LAUNCH_RUN = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
} }"""
_LAUNCH_BACKFILL = """mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message }
} }"""
_TERMINATE = """mutation($id: String!) { terminateRun(runId: $id) {
  __typename ... on TerminateRunFailure { message } ... on PythonError { message }
} }"""


class StackError(RuntimeError):
    """Dagster did not start, or did not do in time what it was asked for."""


class DagsterStack:
    """`home` is made and left behind, `definitions` is a Python file, every process gets `env`.

    `config` is laid over the example's `dagster.yaml`.
    """

    def __init__(
        self,
        home: Path,
        definitions: Path,
        *,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.home = home
        self.log = home / "dagster.log"
        self.definitions = definitions
        self._config = _merge(
            yaml.safe_load(RULES.read_text()), {"telemetry": {"enabled": False}, **(config or {})}
        )
        self._env = {**os.environ, "DAGSTER_HOME": str(home), "PYTHONUNBUFFERED": "1", **(env or {})}
        # Images for containers like to set it, and then every run compiles Dagster anew: 8 s of CPU, not 3.
        self._env.pop("PYTHONDONTWRITEBYTECODE", None)
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._instance: dg.DagsterInstance | None = None
        self._location: dict[str, str] = {}

    # --- life ----------------------------------------------------------------------------------------

    def __enter__(self) -> DagsterStack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 240.0) -> None:
        """Start the processes and return when the definitions are loaded and the daemons are at work."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(self._config))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", _LAUNCH, "dev", "-f", str(self.definitions), "-h", "127.0.0.1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-p", str(self.port)],
                env=self._env,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, ended as a whole
            )
        self.until(self._is_healthy, "starting webserver, daemon and code server", timeout)

    def stop(self) -> None:
        """End every process that was started, with its children."""
        if self._instance is not None:
            self._instance.dispose()
            self._instance = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            _signal_group(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:  # also when a person is impatient; a group outlives its leader if a child did not listen
            _signal_group(process, signal.SIGKILL)
            process.wait()

    def log_tail(self, lines: int = 40) -> str:
        """The end of what the processes have printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # --- orders --------------------------------------------------------------------------------------

    def launch_job(self, job: str, *, config: Mapping[str, Any] | None = None) -> str:
        """Start a run of a job; returns its id."""
        selector = {**self._location, "jobName": job}
        params = {"selector": selector, "runConfigData": dict(config or {})}
        answer = self._mutate(_LAUNCH_RUN, "launchRun", {"params": params})
        return str(answer["run"]["runId"])

    def launch_backfill(self, assets: Sequence[str], partitions: Sequence[str]) -> str:
        """Start a backfill of some assets; returns its id."""
        selection = [{"path": name.split("/")} for name in assets]
        params = {"assetSelection": selection, "partitionNames": list(partitions), "fromFailure": False}
        answer = self._mutate(_LAUNCH_BACKFILL, "launchPartitionBackfill", {"params": params})
        return str(answer["backfillId"])

    def terminate(self, run_id: str) -> None:
        """What the button in the UI does."""
        self._mutate(_TERMINATE, "terminateRun", {"id": run_id})

    # --- looking -------------------------------------------------------------------------------------

    @property
    def instance(self) -> dg.DagsterInstance:
        """The same database, read from here."""
        if self._instance is None:
            self._instance = dg.DagsterInstance.from_config(str(self.home))
        return self._instance

    def run(self, run_id: str) -> dg.DagsterRun:
        """A run as it stands now."""
        run = self.instance.get_run_by_id(run_id)
        if run is None:
            raise StackError(f"there is no run {run_id}")
        return run

    def run_processes(self) -> int:
        """Processes that execute a run or a step now: the code server starts each by multiprocessing."""
        if self._process is None:
            return 0
        with suppress(psutil.NoSuchProcess):
            return sum(map(_is_run, psutil.Process(self._process.pid).children(recursive=True)))
        return 0

    def until(
        self,
        done: Callable[[], Any],
        what: str,
        timeout: float,
        *,
        each: Callable[[], None] | None = None,
        pause: float = 1.0,
    ) -> Any:
        """Wait for something to become true, calling `each` in between; returns what `done` did."""
        begun = told = time.monotonic()
        while not (found := done()):
            now = time.monotonic()
            if self._process is None or self._process.poll() is not None:
                raise StackError(f"{what}: dagster dev has ended\n{self.log_tail()}")
            if now - begun > timeout:
                raise StackError(f"{what}: not within {timeout:.0f} s\n{self.log_tail()}")
            if each is not None:
                each()
            elif now - told > 5:
                told = now
                self._say(f"{what} …")
            time.sleep(pause)
        return found

    def _is_healthy(self) -> bool:
        try:
            data = self.graphql(_HEALTH)
        except (urllib.error.URLError, OSError):
            return False
        for entry in data["workspaceOrError"].get("locationEntries") or []:
            if message := (entry["locationOrLoadError"] or {}).get("message"):
                raise StackError(f"{self.definitions}: {message}")
        nodes = data["repositoriesOrError"].get("nodes") or []
        daemons = data["instance"]["daemonHealth"]["allDaemonStatuses"]
        if not nodes or not all(daemon["healthy"] for daemon in daemons if daemon["required"]):
            return False
        self._location = {
            "repositoryName": nodes[0]["name"],
            "repositoryLocationName": nodes[0]["location"]["name"],
        }
        return True

    def _mutate(self, query: str, name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.graphql(query, variables)[name]
        if not answer["__typename"].endswith("Success"):
            raise StackError(f"{name}: {answer}")
        return answer

    def graphql(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call of the webserver's API."""
        body = json.dumps({"query": query, "variables": dict(variables or {})}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            found = json.load(answer)
        if found.get("errors"):
            raise StackError(str(found["errors"]))
        data: dict[str, Any] = found["data"]
        return data


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_run(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return any("multiprocessing.spawn" in word for word in process.cmdline())
    return False


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its own leader: start_new_session


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
