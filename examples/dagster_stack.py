"""A whole Dagster in a throw-away folder: `dagster dev` with webserver, daemon and code server, on SQLite.

    with DagsterStack(home, definitions) as dagster:
        run_id = dagster.launch_job("my_job")
        dagster.until(lambda: dagster.run(run_id).is_finished, "my job", timeout=300)

For demonstrations and tests. It listens on the loopback interface, on a free port. Every process that was
started is ended by the id of its group, whatever happens.
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
    from collections.abc import Callable, Iterator, Mapping, Sequence

RULES = Path(__file__).resolve().parent / "dagster" / "dagster.yaml"

# A shell ignores interrupts in what it runs in the background, and Dagster would inherit that.
_LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from importlib import import_module
command = sys.argv.pop(1)
sys.argv[0] = "dagster"
import_module(command).main()
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
_TERMINATE = """mutation($id: String!, $policy: TerminateRunPolicy) {
  terminateRun(runId: $id, terminatePolicy: $policy) {
  __typename ... on TerminateRunFailure { message } ... on PythonError { message }
} }"""
_REEXECUTE = """mutation($params: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
} }"""


class StackError(RuntimeError):
    """Dagster did not start, or did not do something in time."""


class DagsterStack:
    """`home` is created and not removed, `definitions` is a Python file, every process gets `env`.

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
        self.definitions = definitions
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._config = _merge(
            yaml.safe_load(RULES.read_text()), {"telemetry": {"enabled": False}, **(config or {})}
        )
        self._env = {**os.environ, "DAGSTER_HOME": str(home), "PYTHONUNBUFFERED": "1", **(env or {})}
        # Container images often set it, and then every run compiles Dagster again: 8 s of CPU instead of 3.
        self._env.pop("PYTHONDONTWRITEBYTECODE", None)
        self._say = say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._instance: dg.DagsterInstance | None = None
        self._locations: dict[str, dict[str, str]] = {}  # by name, what selects its definitions

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
        self.prepare()
        for name in self.components():
            self.launch(name)
        self.until(self._is_healthy, f"starting {', '.join(self._processes)}", timeout)

    def prepare(self) -> None:
        """Make the home folder, with the instance's settings."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(self._config))

    def components(self) -> dict[str, list[str]]:
        """The name of each process: the module of the command that starts it, and the command's words."""
        words = ["dev", "-f", str(self.definitions), "-h", "127.0.0.1", "-p", str(self.port)]
        return {"dagster": ["dagster._cli", *words]}

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a process."""
        return self._env

    def launch(self, name: str) -> None:
        """Start one of the components."""
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, *self.components()[name]],
                env=self.environment(name),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, ended as a whole
            )

    def stop(self) -> None:
        """End every process that was started, with its children."""
        if self._instance is not None:
            self._instance.dispose()
            self._instance = None
        deadline = time.monotonic() + 5
        children = list(self._children())  # list them now: they lose their parent when it ends
        try:
            for process in self._processes.values():
                _signal_group(process, signal.SIGTERM)
            for process in self._processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
        finally:  # also after a second Ctrl-C; a group outlives its leader if a child ignores the signal
            for process in self._processes.values():
                _signal_group(process, signal.SIGKILL)
                process.wait()
            for child in children:
                with suppress(psutil.NoSuchProcess):  # psutil notices if another process has the id now
                    child.kill()
            self._processes.clear()

    def log_tail(self, lines: int = 40) -> str:
        """The end of what the processes have printed."""
        tails = {path: path.read_text(errors="replace").splitlines() for path in self.home.glob("*.log")}
        return "\n".join("\n".join([f"--- {path.name}", *tail[-lines:]]) for path, tail in tails.items())

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    # --- orders --------------------------------------------------------------------------------------

    def launch_job(self, job: str, *, config: Mapping[str, Any] | None = None) -> str:
        """Start a run of a job; returns its id."""
        selector = {**self._selector(None), "jobName": job}
        params = {"selector": selector, "runConfigData": dict(config or {})}
        answer = self._mutate(_LAUNCH_RUN, "launchRun", {"params": params})
        return str(answer["run"]["runId"])

    def launch_assets(
        self, assets: Sequence[str], *, tags: Mapping[str, str] | None = None, location: str | None = None
    ) -> str:
        """Start a run of some assets; returns its id."""
        selector = {
            **self._selector(location),
            "jobName": "__ASSET_JOB",
            "assetSelection": _keys(assets),
        }
        params = {"selector": selector, "executionMetadata": {"tags": _tags(tags)}}
        answer = self._mutate(_LAUNCH_RUN, "launchRun", {"params": params})
        return str(answer["run"]["runId"])

    def launch_backfill(
        self, assets: Sequence[str], partitions: Sequence[str], *, tags: Mapping[str, str] | None = None
    ) -> str:
        """Start a backfill of some assets; returns its id."""
        params = {
            "assetSelection": _keys(assets),
            "partitionNames": list(partitions),
            "fromFailure": False,
            "tags": _tags(tags),
        }
        answer = self._mutate(_LAUNCH_BACKFILL, "launchPartitionBackfill", {"params": params})
        return str(answer["backfillId"])

    def terminate(self, run_id: str, *, force: bool = False) -> None:
        """Terminate a run, as the button in the UI does; `force` is for a run whose process is gone."""
        policy = "MARK_AS_CANCELED_IMMEDIATELY" if force else "SAFE_TERMINATE"
        self._mutate(_TERMINATE, "terminateRun", {"id": run_id, "policy": policy})

    def reexecute(self, run_id: str, *, from_failure: bool = False) -> str:
        """Re-execute a run, as a whole or from where it failed, as the UI does; returns the new id."""
        strategy = "FROM_FAILURE" if from_failure else "ALL_STEPS"
        params = {"parentRunId": run_id, "strategy": strategy}
        answer = self._mutate(_REEXECUTE, "launchRunReexecution", {"params": params})
        return str(answer["run"]["runId"])

    # --- looking -------------------------------------------------------------------------------------

    @property
    def instance(self) -> dg.DagsterInstance:
        """The instance, read in this process from the same database."""
        if self._instance is None:
            self._instance = dg.DagsterInstance.from_config(str(self.home))
        return self._instance

    def run(self, run_id: str) -> dg.DagsterRun:
        """A run as it stands now."""
        run = self.instance.get_run_by_id(run_id)
        if run is None:
            raise StackError(f"there is no run {run_id}")
        return run

    def run_processes(self, *names: str) -> int:
        """Processes that execute a run or a step now, of these components or of all.

        The code server starts each by multiprocessing.
        """
        return sum(map(_is_run, self._children(*names)))

    def _children(self, *names: str) -> Iterator[psutil.Process]:
        for name, process in list(self._processes.items()):
            if not names or name in names:
                with suppress(psutil.NoSuchProcess):
                    yield from psutil.Process(process.pid).children(recursive=True)

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
        begun = last_said = time.monotonic()
        while not (found := done()):
            now = time.monotonic()
            for name, process in list(self._processes.items()):
                if process.poll() is not None:
                    raise StackError(f"{what}: {name} has ended\n{self.log_tail()}")
            if now - begun > timeout:
                raise StackError(f"{what}: not within {timeout:.0f} s\n{self.log_tail()}")
            if each is not None:
                each()
            elif now - last_said > 5:
                last_said = now
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
        for node in nodes:
            name = node["location"]["name"]
            self._locations[name] = {"repositoryName": node["name"], "repositoryLocationName": name}
        return True

    def _selector(self, location: str | None) -> dict[str, str]:
        return self._locations[location or next(iter(self._locations))]

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


def _keys(assets: Sequence[str]) -> list[dict[str, list[str]]]:
    return [{"path": name.split("/")} for name in assets]


def _tags(tags: Mapping[str, str] | None) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in (tags or {}).items()]


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
