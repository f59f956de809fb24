"""One triggerer with 500 waiting batches: anybatch, common-ai's LLMBatchTrigger, and Airflow's own timers.

The same Airflow, server and connection serve all three in turn, each with a newly started triggerer. `floor`
is 500 of Airflow's own timers: what a deferred task costs whatever it waits for. Memory is private memory
(USS) above that of the triggerer before the first trigger; CPU is process time from the first trigger on;
both are of the triggerer with its child. `delay` is from a batch's end at the server to its task running on a
worker.

Needs an environment with apache-airflow-providers-common-ai and openai: `make bench-airflow`.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from airflow_stack import AirflowStack, free_port  # noqa: E402

NUMBER = int(os.environ.get("BENCH_NUMBER", "500"))
SETTLE, WATCH, ENDED = 45.0, 60.0, 12  # seconds, seconds, batches that end
KINDS = ("floor", "anybatch", "commonai")
MEMORY, CPU = 20.0, 10.0  # how many times less anybatch must take


# --- the provider ----------------------------------------------------------------------------------------


class Provider(BaseHTTPRequestHandler):
    """OpenAI's batches, held in memory; they end when the benchmark says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    batches: dict[str, dict[str, Any]] = {}  # noqa: RUF012  the one table of the one server
    calls = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        type(self).calls += 1
        path, _, query = self.path.partition("?")
        if path == "/v1/batches":
            return self._answer(self._page(dict(part.split("=") for part in query.split("&") if part)))
        batch = self.batches.get(path.rpartition("/")[2])
        return self._answer(batch or {"error": {"message": "no such batch"}}, 200 if batch else 404)

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        newest_first = list(reversed(self.batches.values()))
        ids = [batch["id"] for batch in newest_first]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        page = newest_first[start : start + int(query.get("limit", "20"))]
        more = start + len(page) < len(ids)
        return {"object": "list", "data": page, "has_more": more, "last_id": page[-1]["id"] if page else None}

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def make_batch(batch_id: str) -> dict[str, Any]:
    now = int(time.time())
    return {
        "id": batch_id, "object": "batch", "endpoint": "/v1/chat/completions", "errors": None,
        "input_file_id": f"file-{batch_id}", "completion_window": "24h", "status": "in_progress",
        "output_file_id": None, "error_file_id": None, "created_at": now, "in_progress_at": now,
        "expires_at": now + 86_400, "request_counts": {"total": 10, "completed": 0, "failed": 0},
    }  # fmt: skip


def end_batch(batch_id: str) -> None:
    Provider.batches[batch_id] |= {
        "status": "completed", "completed_at": int(time.time()), "output_file_id": f"out-{batch_id}",
        "request_counts": {"total": 10, "completed": 10, "failed": 0},
    }  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One kind of trigger, `NUMBER` of them: bytes and seconds are of the whole triggerer."""

    kind: str
    memory: int
    cpu_start: float
    cpu_steady: float  # seconds of CPU in an hour
    calls: float  # a minute
    blocked: int
    delays: list[float]


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def private_bytes(pid: int) -> int:
    return sum(process.memory_full_info().uss for process in tree(pid))


def cpu_seconds(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in tree(pid))


def until(what: str, done: Any, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not in {timeout:.0f} s")
        time.sleep(0.5)


def measure(airflow: AirflowStack, kind: str, marks: Path) -> Reading:
    Provider.batches.clear()
    for number in range(NUMBER):
        Provider.batches[f"batch_{kind}_{number:04}"] = make_batch(f"batch_{kind}_{number:04}")
    print(
        f"… {kind}: {NUMBER} tasks defer, {SETTLE + WATCH:.0f} s of waiting, then some batches end",
        flush=True,
    )
    airflow.restart("triggerer")
    time.sleep(10)
    pid = airflow.pid("triggerer")
    log = airflow.logs / "triggerer.log"
    size_before = log.stat().st_size
    memory, cpu = private_bytes(pid), cpu_seconds(pid)
    defer = [sys.executable, str(HERE / "airflow_defer.py")]
    subprocess.run(defer, env=airflow.env, check=True)
    airflow.trigger(kind, "bench")
    until("the tasks are mapped", lambda: _states(airflow, kind)["scheduled"] >= NUMBER, 300)
    subprocess.run([*defer, kind], env=airflow.env, check=True)
    deferred = lambda: _states(airflow, kind)["watched"]  # noqa: E731
    until(f"{NUMBER} {kind} tasks wait", lambda: deferred() >= NUMBER, 400)
    time.sleep(SETTLE)
    cpu_start = cpu_seconds(pid) - cpu
    began, calls = time.monotonic(), Provider.calls
    steady = cpu_seconds(pid)
    time.sleep(WATCH)
    seconds = time.monotonic() - began
    reading = Reading(
        kind,
        private_bytes(pid) - memory,
        cpu_start,
        (cpu_seconds(pid) - steady) * 3600 / seconds,
        (Provider.calls - calls) * 60 / seconds,
        0,
        [],
    )
    delays = [] if kind == "floor" else measure_delays(kind, marks)
    with log.open(errors="replace") as lines:
        lines.seek(size_before)
        blocked = re.findall(r".*blocked for.*", lines.read())
    for line in blocked:
        say(f"  {line[:200]}")
    airflow.api("PATCH", f"/api/v2/dags/{kind}/dagRuns/bench", {"state": "failed"})
    return Reading(**{**vars(reading), "delays": delays, "blocked": len(blocked)})


def _states(airflow: AirflowStack, kind: str) -> Counter[str]:
    """How many tasks are in each state; "watched" are those whose triggers the triggerer runs."""
    found = airflow.task_instances(kind, "bench")
    watched = sum(ti["state"] == "deferred" and ti["triggerer_job"] is not None for ti in found)
    return Counter([ti["state"] for ti in found]) + Counter(watched=watched)


def measure_delays(kind: str, marks: Path) -> list[float]:
    """Let some batches end one after another, at moments that match no poll."""
    ends: dict[str, float] = {}
    chance = random.Random(7)
    for number in chance.sample(range(NUMBER), ENDED):
        end_batch(f"batch_{kind}_{number:04}")
        ends[f"batch_{kind}_{number:04}"] = time.time()
        time.sleep(chance.uniform(2, 4))
    until("the tasks run again", lambda: all((marks / name).exists() for name in ends), 400)
    return [float((marks / name).read_text()) - ended for name, ended in ends.items()]


def say(line: str) -> None:
    print(line, flush=True)


# --- the run -----------------------------------------------------------------------------------------------


def run() -> bool:
    """Measure all three, print a table, and return whether anybatch stays within the limits."""
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Provider)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = {
        "conn_type": "pydanticai", "password": "sk-bench",
        "host": f"http://127.0.0.1:{server.server_port}/v1", "extra": {"model": "openai:gpt-5"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="anybatch-bench-") as name:
        marks = Path(name) / "marks"
        marks.mkdir()
        env = {
            "AIRFLOW_CONN_BENCH": json.dumps(connection),
            "AIRFLOW__API__MAXIMUM_PAGE_LIMIT": "1000",
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": str(NUMBER + 8),
            "AIRFLOW__SCHEDULER__MAX_TIS_PER_QUERY": "256",
            "BENCH_NUMBER": str(NUMBER),
            "BENCH_MARKS": str(marks),
        }
        stack = AirflowStack(Path(name) / "airflow", HERE / "airflow_dags", env=env, say=say)
        with stack as airflow:
            airflow.api("POST", "/api/v2/pools", {"name": "bench", "slots": 8})
            readings = {kind: measure(airflow, kind, marks) for kind in KINDS}
    server.shutdown()
    return report(readings)


def report(readings: dict[str, Reading]) -> bool:
    floor = readings["floor"]
    print(f"{NUMBER} waiting in one triggerer, a batch each:")
    print(f"  {'':10}{'KB':>8}{'KB-floor':>10}{'ms start':>10}{'ms/hour':>10}{'calls/min':>11}"
          f"{'blocked':>9}{'delay s (median, most)':>25}")  # fmt: skip
    for reading in readings.values():
        delay = (
            f"{statistics.median(reading.delays):.1f}, {max(reading.delays):.1f}" if reading.delays else ""
        )
        print(
            f"  {reading.kind:10}{reading.memory / NUMBER / 1e3:8.1f}"
            f"{(reading.memory - floor.memory) / NUMBER / 1e3:10.1f}{reading.cpu_start / NUMBER * 1e3:10.2f}"
            f"{reading.cpu_steady / NUMBER * 1e3:10.1f}{reading.calls:11.1f}{reading.blocked:9}{delay:>25}"
        )
    ours, theirs = readings["anybatch"], readings["commonai"]
    memory = (theirs.memory - floor.memory) / max(1, ours.memory - floor.memory)
    cpu = (theirs.cpu_steady - floor.cpu_steady) / max(1e-9, ours.cpu_steady - floor.cpu_steady)
    print(f"  above the floor, common-ai takes {memory:.1f}x the memory and {cpu:.1f}x the CPU of anybatch")
    print(f"  limits: {MEMORY:g}x, {CPU:g}x, no blocked line, no longer delay")
    return (
        memory >= MEMORY
        and cpu >= CPU
        and not ours.blocked
        and statistics.median(ours.delays) <= statistics.median(theirs.delays) + 1
    )


if __name__ == "__main__":
    sys.exit(0 if run() else 1)
