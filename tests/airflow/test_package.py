"""A provider that another package brings serves a whole DAG, as those that come along do."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from anybatch.testing import serve
from tests.acme import ENDS_AT_ONCE, AcmeFake
from tests.packages import write_package

from .versions import DagBag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAG_FILE = """
from airflow.sdk import DAG
from anybatch_airflow import AnyBatchOperator


def requests():
    for number in range(5):
        body = {"model": "m", "messages": [{"role": "user", "content": f"say {number}"}]}
        yield {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


with DAG("acme_job"):
    AnyBatchOperator(task_id="job", conn_id="acme", input=requests, output="OUT", shard_requests=2)
"""


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("acme_batches")
    module.Acme.traits = replace(module.Acme.traits, poll_seconds=(0.1, 0.5))
    yield
    del sys.modules["acme_batches"]


@pytest.mark.usefixtures("_installed")
def test_a_dag(
    settings: Path, tmp_path: Path, add_connection: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "airflow.dag_processing.bundles.local.LocalDagBundle"
    bundle = {"name": "acme", "classpath": kind, "kwargs": {"path": str(tmp_path)}}
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", json.dumps([bundle]))
    fake, extra = AcmeFake(ENDS_AT_ONCE, team="blue"), {"provider": "acme", "settings": {"team": "blue"}}
    with serve(fake) as url:
        add_connection("acme", conn_type="anybatch", password="test-key", host=url, extra=extra)
        dag_file = tmp_path / "acme_dag.py"
        dag_file.write_text(DAG_FILE.replace("OUT", str(tmp_path / "out")))
        bag = DagBag(dag_folder=str(dag_file))
        assert not bag.import_errors
        assert bag.dags["acme_job"].test().state == "success"
    [results] = (tmp_path / "out").rglob("results.jsonl")
    lines = [json.loads(raw) for raw in results.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{number}" for number in range(5)]
    assert {line["outcome"] for line in lines} == {"succeeded"}
    assert len(fake.batch_ids) == 3
