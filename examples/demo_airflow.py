"""Run the example DAG on a real Airflow, in a throw-away folder, and show what happens.

    python examples/demo_airflow.py [--keep]

Scheduler, triggerer, api-server and LocalExecutor on SQLite, in a temporary folder; the `local` provider,
which needs no key and no network, or the one that ANYBATCH_PROVIDER names. `--keep` leaves the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from airflow_stack import AirflowStack, StackError

from anybatch import AnyBatchError, Batch, Client

HERE = Path(__file__).resolve().parent
DAG_ID = "classify_operations"
RUN_ID = "demo"
PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
TIMEOUT = 420.0 if PROVIDER == "local" else 25 * 3600.0


class Show:
    """Prints what a person wants to see, with the seconds since the start; never silent for long."""

    def __init__(self) -> None:
        self.begun = self._last_at = time.monotonic()
        self._stage = self._line = ""
        threading.Thread(target=self._remind, daemon=True).start()

    def __call__(self, line: str) -> None:
        self._last_at, self._line = time.monotonic(), line
        print(f"{self._last_at - self.begun:6.1f} s  {line}", flush=True)

    def progress(self, stage: str, line: str) -> None:
        """Print the line if the stage is a new one, or the last line is some seconds old."""
        if stage != self._stage or (line != self._line and time.monotonic() - self._last_at > 3):
            self._stage = stage
            self(line)

    def _remind(self) -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - self._last_at > 9:
                self(self._line)


class Watch:
    """Looks at a running DAG from outside: the batch at its provider, the slots at Airflow."""

    def __init__(self, airflow: AirflowStack, client: Client, show: Show) -> None:
        self._airflow, self._client, self._show = airflow, client, show
        self._batch: Batch | None = None
        self._asked = 0.0
        self.while_waiting: Counter[int] = Counter()

    def look(self) -> None:
        """One look, one line."""
        states = {ti["task_id"]: ti["state"] for ti in self._airflow.task_instances(DAG_ID, RUN_ID)}
        if states.get("classify") == "deferred":
            self._look_at_batch()
        busy, processes = self._airflow.busy_slots(), self._airflow.task_processes()
        if states.get("classify") == "deferred":
            self.while_waiting[max(busy, processes)] += 1
        tasks = ", ".join(f"{task} {state or 'to come'}" for task, state in sorted(states.items()))
        status, done = _progress(self._batch)
        slots = f"worker slots busy {busy}, task processes {processes}"
        self._show.progress(f"{tasks}{status}{slots}", f"{tasks} │ {status}{done} │ {slots}")

    def _look_at_batch(self) -> None:
        pause = 1 if PROVIDER == "local" else 15  # a paid provider is not asked every second
        if time.monotonic() - self._asked < pause or (self._batch and self._batch.status.is_terminal):
            return
        [batch_id] = self._airflow.xcom(DAG_ID, RUN_ID, "classify", "batch_ids")
        self._batch = self._client.retrieve(batch_id)
        self._asked = time.monotonic()


def main() -> int:
    """Exit status 0 if the DAG ran to its end and no slot was held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder with the database and the logs")
    keep = parser.parse_args().keep
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    home = Path(tempfile.mkdtemp(prefix="anybatch-demo-"))
    show = Show()
    try:
        return run(home, show)
    except (StackError, AnyBatchError) as error:
        show(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        show("interrupted; everything that was started has been ended")
        return 130
    finally:
        if keep:
            show(f"left behind: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
            show(f"removed {home}; --keep would leave it")


def run(home: Path, show: Show) -> int:
    """The whole demonstration inside `home`."""
    show("Airflow: scheduler, triggerer, api-server, LocalExecutor with 2 slots, SQLite")
    show(f"in {home}")
    env = {
        "ANYBATCH_OUTPUT": str(home / "out"),
        "ANYBATCH_PROVIDER": PROVIDER,
        "XDG_STATE_HOME": str(home / "state"),  # where the local provider keeps its database
    }
    os.environ.update(env)
    airflow = AirflowStack(home / "airflow", HERE / "airflow", parallelism=2, env=env, say=show)
    with Client(PROVIDER) as client, airflow:
        show("Airflow is up")
        begun = time.monotonic()
        airflow.trigger(DAG_ID, RUN_ID)
        show(f"DAG {DAG_ID} started: 2,400 rows, one batch, provider {PROVIDER}")
        watch = Watch(airflow, client, show)
        state = airflow.wait_for_run(DAG_ID, RUN_ID, timeout=TIMEOUT, each=watch.look)
        watch.look()
        took = time.monotonic() - begun
        show(f"DAG run {state} after {took:.1f} s")
        if state != "success":
            print(airflow.log_tail(), file=sys.stderr)
            return 1
        manifest = airflow.xcom(DAG_ID, RUN_ID, "classify")
        joined = airflow.xcom(DAG_ID, RUN_ID, "join")
        show("stopping Airflow")
    return report(manifest, joined, watch, show)


def report(manifest: dict[str, Any], joined: dict[str, Any], watch: Watch, show: Show) -> int:
    """Print where the results are, a few of them, and the counts."""
    print("\nmanifest of the task, as in XCom\n" + json.dumps(manifest, indent=1))
    print(f"\nresults      {manifest['results']}\njoined table {joined['table']}\n")
    with open(joined["table"], newline="", encoding="utf-8") as file:
        for row in islice(csv.DictReader(file), 8):
            print(f"  {row['operation_id']:<52} {row['category']:<8} {row['summary'][:60]}")
    categories = sorted(joined["categories"].items(), key=lambda item: -item[1])
    print("  …" + ("  (the stand-in model answers at random)" if PROVIDER == "local" else ""))
    print("\nanswers: " + ", ".join(f"{count:,} {kind}" for kind, count in categories))
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in manifest["counts"].items() if count)
    print(f"rows:    {manifest['rows']:,}: {counts}")
    looks = sum(watch.while_waiting.values())
    held = looks - watch.while_waiting[0]
    print(f"slots:   looked {looks} times while the task waited; busy in {held} of them\n")
    return 0 if looks and not held else 1


def _progress(batch: Batch | None) -> tuple[str, str]:
    if batch is None:
        return "no batch yet", ""
    counts = batch.request_counts
    done = f" {counts.completed + counts.failed:,}/{counts.total:,}" if counts and counts.total else ""
    return f"batch {batch.status.value}", done


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
