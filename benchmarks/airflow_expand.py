"""`.expand()` over 500 inputs for real: every task submits on a worker, defers, resumes and lands.

One triggerer waits for all of them, and nothing is put into the database by hand. The provider is
`anybatch serve` on the loopback interface; its record shows what was created and cancelled. Takes about ten
minutes on two cores: `python -m benchmarks.airflow_expand`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from anybatch import BatchStatus, Client

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from airflow_stack import AirflowStack, free_port  # noqa: E402

NUMBER = int(os.environ.get("BENCH_NUMBER", "500"))
ROWS = 4  # in each input
DELAY = 60 + 0.6 * NUMBER  # seconds that a batch takes: until every task waits
TIMEOUT = 300 + 3 * NUMBER


def run() -> bool:
    """Print what happened, and return whether it was right.

    Each task must have one batch and every row, and no log line may report a blocked event loop.
    """
    with tempfile.TemporaryDirectory(prefix="anybatch-bench-") as name:
        home, port = Path(name), free_port()
        for number in range(NUMBER):
            write_input(home / "in" / f"{number:03}.jsonl")
        database = str(home / "batches.db")
        serve = [sys.executable, "-m", "anybatch.cli", "serve", "--port", str(port), "--db", database]
        with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                return measure(home, f"http://127.0.0.1:{port}/v1")
            finally:
                server.terminate()


def write_input(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    body = {"model": f"local:echo?delay={DELAY:g}", "messages": [{"role": "user", "content": "Hello"}]}
    lines = [
        {"custom_id": f"{path.stem}-{row}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for row in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(home: Path, api_base: str) -> bool:
    extra = {"provider": "openai-compatible"}
    connection = {"conn_type": "anybatch", "host": api_base, "password": "unused", "extra": extra}
    env = {
        "BENCH_HOME": str(home),
        "BENCH_NUMBER": str(NUMBER),
        "AIRFLOW_CONN_BENCH": json.dumps(connection),
        "AIRFLOW__API__MAXIMUM_PAGE_LIMIT": "1000",
        "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": str(NUMBER),
    }
    began = time.monotonic()
    waiting = 0  # the length of the triggerer's log when the first batch ended
    stack = AirflowStack(home / "airflow", HERE / "airflow_expand_dags", parallelism=4, env=env, say=say)
    with stack as airflow:
        airflow.trigger("expanded", "bench")
        most, last_said = 0, time.monotonic()
        deadline = time.monotonic() + TIMEOUT
        while (state := airflow.run_state("expanded", "bench")) not in ("success", "failed"):
            states = Counter(ti["state"] for ti in airflow.task_instances("expanded", "bench"))
            most = max(most, states["deferred"])
            if not states["success"]:
                waiting = (airflow.logs / "triggerer.log").stat().st_size
            if time.monotonic() - last_said > 30:
                last_said = time.monotonic()
                say(f"… {last_said - began:.0f} s: {dict(states)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {TIMEOUT:.0f} s: {dict(states)}")
            time.sleep(5)
        if state == "failed":
            say(airflow.log_tail())
        log = (airflow.logs / "triggerer.log").read_bytes()
    blocked, later = blocked_lines(log[:waiting]), blocked_lines(log[waiting:])
    reports = [json.loads(path.read_text()) for path in home.glob("out/*/report.json")]
    rows = Counter[str]()
    for report in reports:
        rows.update(report["counts"])
    statuses = statuses_at(api_base)
    say(f"{NUMBER} tasks, at most {most} waiting at once, {time.monotonic() - began:.0f} s in all")
    say(f"  batches at the provider: {dict(statuses)}")
    say(f"  rows: {dict(+rows)} in {len(reports)} reports")
    say(f"  blocked lines of the triggerer: {len(blocked)} while all wait, {len(later)} while they land")
    for line in blocked + later:
        say(f"    {line[:100]}")
    return (
        statuses == {BatchStatus.COMPLETED: NUMBER} and +rows == {"succeeded": NUMBER * ROWS} and not blocked
    )


def blocked_lines(log: bytes) -> list[str]:
    return re.findall(r".*blocked for.*", log.decode(errors="replace"))


def statuses_at(api_base: str) -> Counter[BatchStatus]:
    """How many batches the provider has in each status."""
    found = Counter[BatchStatus]()
    with Client("openai-compatible", api_base=api_base, api_key="unused") as client:
        after = None
        while True:
            page = client.list(after=after, limit=100)
            found.update(batch.status for batch in page)
            if not page.has_more:
                return found
            after = page.next_cursor


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(0 if run() else 1)
