"""Run the example on a real Dagster, in a throw-away folder, and show what happens.

    python examples/demo_dagster.py [--keep]

`dagster dev` (webserver, daemon, code server) on SQLite, in a temporary folder; the `local` provider, which
needs no key and no network. `--keep` leaves the folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_stack import DagsterStack, StackError

from anybatch import Batch, Client

HERE = Path(__file__).resolve().parent
JOB = "classify_operations"
RESULT, TABLE = dg.AssetKey("operation_kinds"), dg.AssetKey("classified_operations")
TIMEOUT = 300.0


class Show:
    """Prints what a person wants to see, with the seconds since the start."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._last = ""
        self._last_at = self.begun

    def __call__(self, line: str) -> None:
        self._last_at = time.monotonic()
        print(f"{self._last_at - self.begun:6.1f} s  {line}", flush=True)

    def change(self, line: str) -> None:
        """Print the line if it says something new, or nothing has been said for a while."""
        if line != self._last or time.monotonic() - self._last_at > 8:
            self._last = line
            self(line)


class Watch:
    """Looks at the job from outside: the batch at its provider, the runs and their processes at Dagster."""

    def __init__(self, dagster: DagsterStack, client: Client, show: Show) -> None:
        self._dagster, self._client, self._show = dagster, client, show
        self.while_waiting: Counter[int] = Counter()

    def look(self) -> None:
        """One look, one line."""
        batches = list(self._client.list(limit=1))
        processes = self._dagster.run_processes()
        runs = self._dagster.instance.get_runs(ascending=True)
        # Count only once the submitting process is gone: the waiting run exists before that.
        if any(map(_is_parked, runs)) and (self.while_waiting or not processes):
            self.while_waiting[processes] += 1
        runs = ", ".join(
            f"{name} run {'waits in the queue' if _is_parked(run) else run.status.value.lower()}"
            for name, run in zip(("submit", "result"), runs, strict=False)
        )
        progress = _progress(batches[0]) if batches else "no batch yet"
        self._show.change(f"{runs} │ {progress} │ run processes alive: {processes}")


def main() -> int:
    """Exit status 0 if the job ran to its end and no process was alive while the batch ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder with the database and the logs")
    keep = parser.parse_args().keep
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    warnings.simplefilter("ignore")  # Dagster's warnings about its own preview features
    home = Path(tempfile.mkdtemp(prefix="anybatch-demo-"))
    show = Show()
    try:
        return run(home, show)
    except StackError as error:
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


def run(home: Path, show: Show) -> int:
    """The whole demonstration inside `home`."""
    show("Dagster: webserver, daemon and code server on SQLite")
    show(f"in {home}")
    env = {
        "ANYBATCH_PROVIDER": "local",
        "XDG_STATE_HOME": str(home / "state"),  # where the local provider keeps its database
    }
    os.environ.update(env)
    dagster = DagsterStack(home / "dagster", HERE / "dagster" / "definitions.py", env=env, say=show)
    with Client("local") as client, dagster:
        show(f"Dagster is up at {dagster.url}")
        begun = time.monotonic()
        submit_run = dagster.launch_job(JOB)
        show(f"job {JOB} started: 2,400 rows, one batch of about 30 s")
        watch = Watch(dagster, client, show)
        dagster.until(lambda: _is_over(dagster, submit_run), JOB, TIMEOUT, each=watch.look, pause=2)
        watch.look()
        show(f"job ended after {time.monotonic() - begun:.1f} s")
        result, table = (dagster.instance.get_latest_materialization_event(key) for key in (RESULT, TABLE))
        if result is None or table is None or result.asset_materialization is None:
            show("the results were not materialized")
            print(dagster.log_tail(), file=sys.stderr)
            return 1
        facts = {name: value.value for name, value in result.asset_materialization.metadata.items()}
        rows = _table(dagster.home)
        show("stopping Dagster")
        dagster.stop()
        return report(facts, rows, watch, show)


def report(facts: dict[str, Any], rows: list[dict[str, Any]], watch: Watch, show: Show) -> int:
    """Print where the results are, a few of them, and the counts."""
    print(f"\nmetadata of the asset {RESULT.to_user_string()}")
    for name, value in facts.items():
        if name != "preview":
            print(f"  {name:<24} {value}")
    print(f"\nresults      {facts['anybatch/results']}")
    print(f"joined table {TABLE.to_user_string()}, {len(rows):,} rows\n")
    for row in islice(rows, 8):
        print(f"  {row['operation_id']:<52} {row.get('category', ''):<8} {row.get('summary', '')[:60]}")
    categories = Counter(row.get("category") or "none" for row in rows)
    print("  …\n\nanswers: " + ", ".join(f"{count:,} {kind}" for kind, count in categories.most_common()))
    outcomes = Counter(str(row["outcome"]) for row in rows)
    print("rows:    " + ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common()))
    looks = sum(watch.while_waiting.values())
    held = looks - watch.while_waiting[0]
    print(f"waiting: looked {looks} times while the batch ran; a run process was alive in {held} of them\n")
    show("done")
    return 0 if looks and not held else 1


def _is_over(dagster: DagsterStack, submit_run: str) -> bool:
    """Whether the job is over: a run failed, or the last asset exists and its run has ended."""
    runs = dagster.instance.get_runs()
    if any(run.is_failure_or_canceled for run in runs):
        return True
    done = dagster.instance.get_latest_materialization_event(TABLE) is not None
    return done and dagster.run(submit_run).is_finished and all(run.is_finished for run in runs)


def _is_parked(run: dg.DagsterRun) -> bool:
    return run.status is dg.DagsterRunStatus.QUEUED and run.tags.get("anybatch/gate") == "waiting"


def _table(home: Path) -> list[dict[str, Any]]:
    """The joined table, as an asset downstream would get it from the IO manager."""
    import pickle

    rows: list[dict[str, Any]] = pickle.loads((home / "storage" / TABLE.path[-1]).read_bytes())
    return rows


def _progress(batch: Batch) -> str:
    counts = batch.request_counts
    done = f" {counts.completed + counts.failed:,}/{counts.total:,}" if counts else ""
    return f"batch {batch.status.value}{done}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
