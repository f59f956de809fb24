"""What a DAG file pays for importing anybatch: every DAG processor pays it, at every parse."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# CPU beyond what any DAG file pays, as a share of what a known piece of work takes: about 60 ms.
LIMIT = 1.0
RUNS = 5

# Each child of the fork starts as a process that has seen Airflow and nothing of anybatch's operators.
_PARSE = """
import json, os, socket, sqlite3, sys, time

WORK = 9  # makes the measure about 60 ms

def refused(*_args, **_kwargs):
    raise AssertionError("no network and no database while a DAG is parsed")

import anybatch_airflow.provider_info
early = sorted(set(sys.modules) & {"airflow", "anybatch", "httpx", "pydantic"})
from airflow.sdk import DAG, BaseOperator, task
with DAG("other", schedule=None):
    BaseOperator(task_id="other")
before = set(sys.modules)
socket.socket.connect = socket.getaddrinfo = refused
sqlite3.connect = refused

def measure():
    # What a busy machine makes slower, it makes slower as well.
    began = time.process_time()
    function = "def f(self, a: int = 0): return [a, str(a), self.f]"
    source = "".join(f"class C{number}:\\n  {function}\\n" for number in range(150))
    for _ in range(WORK):
        exec(compile(source, "measure", "exec"), {})
    return time.process_time() - began

def parse():
    measured = measure()
    began = time.process_time()
    from anybatch_airflow import (
        AnyBatchCancelOperator, AnyBatchCreateOperator, AnyBatchOperator, AnyBatchResultsOperator,
        AnyBatchSensor,
    )
    with DAG("parsed", schedule=None):
        AnyBatchOperator(task_id="job", input="in.jsonl", output="out")
        AnyBatchCreateOperator(task_id="create", input="in.jsonl")
        AnyBatchSensor(task_id="sensor", batch_id="batch_1")
        AnyBatchResultsOperator(task_id="results", batch_id="batch_1", output="out")
        AnyBatchCancelOperator(task_id="cancel", batch_id="batch_1")
    seconds = time.process_time() - began
    told = {"seconds": seconds, "measure": (measured + measure()) / 2, "early": early}
    print(json.dumps({**told, "new": sorted(set(sys.modules) - before)}))

for _ in range(int(sys.argv[1])):
    if not os.fork():
        parse()
        break
    assert os.wait()[1] == 0
"""

_HEAVY = ("anybatch", "httpx", "sqlalchemy", "upath", "fsspec", "pandas", "openlineage", "tenacity", "orjson")
# The table of options alone, for the operators' defaults and choices.
_LIGHT = {"anybatch", "anybatch._version", "anybatch.jobs", "anybatch.jobs.options"}
_OURS = ("triggers", "events", "hooks", "diagnosis")


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """What each process measures, with its bytecode already there, as on any second parse."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PARSE, str(RUNS + 1)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, *rest = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rest) == RUNS
    return rest


def test_parsing_a_dag_costs_little(measured: list[dict[str, Any]]) -> None:
    share, seconds = min((one["seconds"] / one["measure"], one["seconds"]) for one in measured)
    print(f"beyond any DAG file: {seconds * 1000:.0f} ms of CPU, {share:.2f} of the measure's")
    assert share <= LIMIT


def test_parsing_a_dag_imports_little(measured: list[dict[str, Any]]) -> None:
    [first, *_] = measured
    assert first["early"] == []  # the provider info is read while Airflow reads its configuration
    new = first["new"]
    assert [name for name in new if name.split(".")[0] in _HEAVY and name not in _LIGHT] == []
    assert [name for name in new if name in {f"anybatch_airflow.{module}" for module in _OURS}] == []
    assert "anybatch_airflow.operators.job" in new
