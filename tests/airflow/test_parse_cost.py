"""What a DAG file pays for importing anybatch: every DAG processor pays it, at every parse."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

LIMIT = 0.1  # seconds of CPU beyond what any DAG file pays
RUNS = 3

_PARSE = """
import json, socket, sqlite3, sys, time

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
began = time.process_time()
from anybatch_airflow import (
    AnyBatchCancelOperator, AnyBatchCreateOperator, AnyBatchOperator, AnyBatchResultsOperator, AnyBatchSensor,
)
with DAG("parsed", schedule=None):
    AnyBatchOperator(task_id="job", input="in.jsonl", output_folder="out")
    AnyBatchCreateOperator(task_id="create", input="in.jsonl")
    AnyBatchSensor(task_id="sensor", batch_id="batch_1")
    AnyBatchResultsOperator(task_id="results", batch_id="batch_1", output_folder="out")
    AnyBatchCancelOperator(task_id="cancel", batch_id="batch_1")
seconds = time.process_time() - began
print(json.dumps({"seconds": seconds, "early": early, "new": sorted(set(sys.modules) - before)}))
"""

_HEAVY = ("anybatch", "httpx", "sqlalchemy", "upath", "fsspec", "pandas", "openlineage", "tenacity", "orjson")
_OURS = ("triggers", "events", "hooks", "diagnosis")


def parse() -> dict[str, object]:
    """What one fresh process measures, with its bytecode already there, as on any second parse."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PARSE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_parsing_a_dag_costs_little() -> None:
    parse()
    measured = [parse() for _ in range(RUNS)]
    seconds = statistics.median(float(str(one["seconds"])) for one in measured)
    print(f"beyond any DAG file: {seconds * 1000:.0f} ms of CPU")
    assert seconds <= LIMIT
    [first, *_] = measured
    assert first["early"] == []  # the provider info is read while Airflow reads its configuration
    new = first["new"]
    assert isinstance(new, list)
    assert [name for name in new if name.split(".")[0] in _HEAVY] == []
    assert [name for name in new if name in {f"anybatch_airflow.{module}" for module in _OURS}] == []
