"""The cluster: what runs in it, how it is hurt, and what it says of itself."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from tests.dagster.stack import Stack, dagster_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from .account import Account

HERE = Path(__file__).resolve().parent
KEY = "sk-cluster"
DEADLINE = 6  # seconds after which the daemon cuts a sensor tick off

LOCATIONS = {  # code locations, with the accounts that each one's assets use
    "steady": (
        "terminated", "repeated", "cut_off", "outage",
        "dies_after_upload", "dies_before_create", "dies_after_create", "dies_collecting",
    ),
    "doomed": ("many", "torn"),
}  # fmt: skip

_SETTINGS: dict[str, Any] = {
    "concurrency": {"runs": {"max_concurrent_runs": 12}},
    "run_coordinator": {
        "module": "dagster",
        "class": "QueuedRunCoordinator",
        "config": {
            "dequeue_interval_seconds": 1,
            "dequeue_use_threads": True,
            "dequeue_num_workers": 4,
        },
    },
    "run_retries": {"enabled": True, "max_retries": 0},  # those that ask for it by a tag
    "sensors": {"use_threads": True, "num_workers": 2},
}


class Stopped(Exception):
    """The cluster ends, whatever a scenario waits for."""


class Cluster(Stack):
    """A daemon, a webserver, and two code servers, of which one is there to be killed."""

    def __init__(self, home: Path, database: str, accounts: Mapping[str, Account]) -> None:
        storage = {"storage": {"postgres": {"postgres_url": f"postgresql+psycopg2://{database}"}}}
        env = {"CLUSTER_KEY": KEY, "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS": str(DEADLINE)}
        super().__init__(home, HERE / "definitions.py", config=_SETTINGS | storage, env=env)
        self.accounts = accounts
        for account in accounts.values():
            account.cluster = self
        self._ports = {name: dagster_stack.free_port() for name in LOCATIONS}
        self._begun = time.monotonic()
        self.stopping = threading.Event()
        self.calm: list[Future[None]] = []

    def components(self) -> dict[str, list[str]]:
        serve = ["dagster._cli", "code-server", "start", "-f", str(self.definitions), "-h", "127.0.0.1"]
        workspace = ["-w", str(self.home / "workspace.yaml")]
        web = ["dagster_webserver.cli", *workspace, "-h", "127.0.0.1", "-p", str(self.port)]
        return {
            **{
                name: [*serve, "--location-name", name, "-p", str(port)] for name, port in self._ports.items()
            },
            "daemon": ["dagster._daemon.cli", "run", *workspace],
            "webserver": web,
        }

    def environment(self, name: str) -> dict[str, str]:
        bases = {account: self.accounts[account].proxy.url for account in LOCATIONS.get(name, ())}
        return {**super().environment(name), "CLUSTER_ACCOUNTS": json.dumps(bases)}

    # --- life ------------------------------------------------------------------------------------------

    def start(self, timeout: float = 240.0) -> None:
        self.prepare()
        for name in LOCATIONS:
            self.launch(name)
        # The others take notice of a code server that comes later, but after a while only.
        self.until(lambda: all(map(self.is_up, LOCATIONS)), "starting the code servers", timeout)
        self.launch("daemon")
        self.launch("webserver")
        self.until(self._is_healthy, "starting daemon and webserver", timeout)

    def prepare(self) -> None:
        super().prepare()
        servers = [
            {"grpc_server": {"host": "127.0.0.1", "port": port, "location_name": name}}
            for name, port in self._ports.items()
        ]
        (self.home / "workspace.yaml").write_text(yaml.safe_dump({"load_from": servers}))
        assert self.instance is not None  # which makes the tables, once, before many want to

    def is_up(self, location: str) -> bool:
        """Whether a code server takes calls."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[location]), 1):
            return True
        return False

    def stop(self) -> None:
        self.stopping.set()
        super().stop()

    def kill(self, name: str) -> None:
        """SIGKILL to a component and all that it has started, at once: the machine is gone."""
        process = self._processes.pop(name)
        leader = psutil.Process(process.pid)
        for one in (leader, *leader.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def revive(self, location: str) -> None:
        """Start a code server that was killed, and then the daemon."""
        self.launch(location)
        self.until(lambda: self.is_up(location), f"{location} is up again", 60)
        self.launch("daemon")

    def pass_time(self, seconds: float) -> None:
        """Return after so long, for what lasts by itself; Stopped if the cluster ends meanwhile."""
        if self.stopping.wait(seconds):
            raise Stopped

    # --- what it says ------------------------------------------------------------------------------------

    def note(self, line: str) -> None:
        """Write down how far a scenario has come, beside the logs of the processes."""
        with self._log("scenarios").open("a") as log:
            log.write(f"{time.monotonic() - self._begun:6.1f} s  {line}\n")

    def until(self, done: Callable[[], Any], what: str, timeout: float, **options: Any) -> Any:
        """The same, for as long as the cluster is there."""

        def checked() -> Any:
            if self.stopping.is_set():
                raise Stopped
            return done()

        return super().until(checked, what, timeout, **options)
