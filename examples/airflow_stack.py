"""A whole Airflow in a throw-away folder: SQLite, api-server, scheduler, triggerer, LocalExecutor.

    with AirflowStack(home, dags) as airflow:
        run_id = airflow.trigger("my_dag")
        airflow.wait_for_run("my_dag", run_id, timeout=300)

For demonstrations and tests. Everything listens on the loopback interface, on free ports. Every process that
was started is ended by its id, whatever happens.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

ENDED = frozenset({"success", "failed"})

# One process runs all commands: importing Airflow takes longer than either.
_PREPARE = """
import sys
from airflow.cli import cli_parser
for words in sys.argv[1:]:
    arguments = cli_parser.get_parser().parse_args(words.split())
    arguments.func(arguments)
"""


class StackError(RuntimeError):
    """Airflow did not start, or did not do something in time."""


class AirflowStack:
    """`home` is created and not removed, `dags` is the folder of DAG files, every process gets `env`.

    `say` is called with a line now and then while something takes long.
    """

    # Reading the DAG files once makes a dag-processor unnecessary.
    prepare: tuple[str, ...] = ("db migrate", "dags reserialize")

    def __init__(
        self,
        home: Path,
        dags: Path,
        *,
        parallelism: int = 2,
        env: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.home = home
        self.logs = home / "logs"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._say = say
        self.env = _environment(home, dags, self.url, parallelism) | dict(env or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._token: str | None = None

    # --- life ----------------------------------------------------------------------------------------

    def __enter__(self) -> AirflowStack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 240.0) -> None:
        """Make the database, read the DAG files, start the processes and return when all are healthy."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # Before the processes: scheduler and triggerer wait neither for the database nor for the DAGs.
        command = [sys.executable, "-c", _PREPARE, *self.prepare]
        self._run_to_end("prepare", command, "making the metadata database", timeout)
        for name in self.components():
            self.launch(name)
        self._until(self._healthy, f"starting {', '.join(self._processes)}", timeout)

    def components(self) -> dict[str, list[str]]:
        """The name of each process, and the words of the `airflow` command that starts it."""
        api_server = ["api-server", "--apps", "execution,core", "--workers", "1", "--host", "127.0.0.1"]
        return {
            "api-server": [*api_server, "--port", str(self.port)],
            "scheduler": ["scheduler", "--skip-serve-logs"],
            "triggerer": ["triggerer", "--skip-serve-logs"],
        }

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a process."""
        return self.env

    def launch(self, name: str) -> None:
        """Start one of the components."""
        self._spawn(name, [sys.executable, "-m", "airflow", *self.components()[name]])

    def stop(self) -> None:
        """End every process that was started, with its children."""
        deadline = time.monotonic() + 4
        # List them now: tasks are in process groups of their own, and lose their parent when it ends.
        children = [child for process in self._processes.values() for child in _family(process)]
        try:
            for process in self._processes.values():
                _signal_group(process, signal.SIGTERM)
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
        finally:  # also after a second Ctrl-C; a group outlives its leader if a child ignores the signal
            for process in self._processes.values():
                _signal_group(process, signal.SIGKILL)
                process.wait()
            for child in children:
                with contextlib.suppress(
                    psutil.NoSuchProcess
                ):  # psutil notices if another process has the id now
                    child.kill()
            self._processes.clear()

    def restart(self, name: str) -> None:
        """End one of the processes the way an orchestrator does, and start it anew."""
        process = self._processes.pop(name)
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        self._spawn(name, command=list(process.args))

    def pid(self, name: str) -> int:
        """The process id of a component."""
        return self._processes[name].pid

    def log_tail(self, lines: int = 12) -> str:
        """What went wrong, from the logs: the tasks' warnings and errors, the end of each process's log."""
        tasks = {path: _trouble(path) for path in sorted(self.logs.glob("dag_id=*/**/*.log*"))}
        processes = {path: _tail(path, lines) for path in sorted(self.logs.glob("*.log"))}
        return "\n".join(
            f"--- {path.relative_to(self.home)}\n{text}" for path, text in (tasks | processes).items() if text
        )

    # --- Airflow's own answers -------------------------------------------------------------------------

    def api(self, method: str, path: str, body: object = None) -> Any:
        """One call of the public REST API, e.g. `api("GET", "/api/v2/pools")`."""
        if self._token is None:
            self._token = str(self._http("GET", "/auth/token")["access_token"])
        return self._http(method, path, body, {"Authorization": f"Bearer {self._token}"})

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any] | None = None) -> str:
        """Start a run of a DAG; returns its run id."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {})}
        return str(self.api("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """The state of a run: queued, running, success or failed."""
        return str(self.api("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """All task instances of a run, as the REST API shows them."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances?limit=1000"
        return list(self.api("GET", path)["task_instances"])

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """The XCom that a task pushed under a key."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.api("GET", f"{path}?map_index={map_index}&deserialize=true")["value"]

    def wait_for_run(
        self, dag_id: str, run_id: str, *, timeout: float, each: Callable[[], None] = lambda: None
    ) -> str:
        """Return the final state; `each` is called about once a second meanwhile."""
        state = ""

        def ended() -> bool:
            nonlocal state
            each()
            state = self.run_state(dag_id, run_id)
            return state in ENDED

        self._until(ended, "", timeout)
        return state

    def busy_slots(self) -> int:
        """Pool slots taken, by Airflow's count: tasks that run or are about to. Deferred tasks take none."""
        pools = self.api("GET", "/api/v2/pools")["pools"]
        return sum(int(pool["running_slots"]) + int(pool["queued_slots"]) for pool in pools)

    def task_processes(self) -> int:
        """Processes that execute a task right now, by the operating system's count."""
        return sum(1 for _ in self._task_processes())

    def _task_processes(self) -> Iterator[str]:
        for process in psutil.Process(self.pid("scheduler")).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("airflow worker -- ") and "LocalExecutor" not in title:
                    yield title

    # --- inside ----------------------------------------------------------------------------------------

    def _healthy(self) -> bool:
        try:
            health = self._http("GET", "/api/v2/monitor/health")
        except (urllib.error.URLError, OSError):
            return False
        return all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "triggerer"))

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment(name), cwd=self.home, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._processes[name] = process
        return process

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _run_to_end(self, name: str, command: list[str], what: str, timeout: float) -> None:
        process = self._spawn(name, command)
        self._until(lambda: process.poll() is not None, what, timeout)
        del self._processes[name]
        if process.returncode:
            raise StackError(f"{name} ended with code {process.returncode}\n{_tail(self._log(name))}")

    def _until(self, done: Callable[[], bool], what: str, timeout: float, pause: float = 1.0) -> None:
        begun = time.monotonic()
        last_said = begun
        while not done():
            now = time.monotonic()
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise StackError(f"{name} ended with code {process.returncode}\n{_tail(self._log(name))}")
            if now - begun > timeout:
                raise StackError(f"{what or 'waiting'}: not done after {timeout:.0f} s\n{self.log_tail()}")
            if what and now - last_said >= 8:
                last_said = now
                self._say(f"… {what}, {now - begun:.0f} s")
            time.sleep(pause)

    def _http(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
            method=method,
        )
        for attempt in range(1, 6):
            try:
                with _direct.open(request, timeout=30) as response:
                    answer = response.read()
                    return json.loads(answer) if answer else None
            except (urllib.error.URLError, TimeoutError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                # SQLite may be locked for a moment, and a busy machine slow; only a GET is asked again.
                if refused or method != "GET" or attempt == 5 or not self._token:
                    raise
                time.sleep(attempt)
        raise AssertionError("unreachable")


# Loopback is never behind a proxy.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(home: Path, dags: Path, url: str, parallelism: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    settings = {
        "CORE__DAGS_FOLDER": str(dags),
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__PARALLELISM": str(parallelism),
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "API__BASE_URL": url,
        "API__SECRET_KEY": secrets.token_urlsafe(32),
        "API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "USAGE_DATA_COLLECTION__ENABLED": "False",
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",  # a task that has ended frees its slot sooner
    }
    return inherited | {
        "AIRFLOW_HOME": str(home),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **{f"AIRFLOW__{name}": value for name, value in settings.items()},
    }


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All descendants of a process."""
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _tail(path: Path, lines: int = 40, width: int = 300) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(line[:width] for line in text.splitlines()[-lines:])


def _trouble(path: Path) -> str:
    """The warnings and errors of a task's log, which holds one JSON object a line."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("level") in ("warning", "error", "critical"):
                causes = [
                    f"{each['exc_type']}: {each['exc_value']}" for each in entry.get("error_detail") or ()
                ]
                lines.append("  ".join([entry["timestamp"], entry["level"], str(entry["event"]), *causes]))
    return "\n".join(lines)
