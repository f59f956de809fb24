"""Lineage: datasets by their right names, figures and nothing else about the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import HookLineageCollector, NoOpCollector
from airflow.sdk import ObjectStoragePath

from anybatch_airflow import AnyBatchHook
from anybatch_airflow.lineage import asset_uri, dataset_name, openlineage_facets, report_lineage

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

MANIFEST: dict[str, Any] = {
    "job": "airflow:dag/task/run", "provider": "openai", "endpoint": "/v1/chat/completions",
    "models": ["gpt"], "results": "s3://aws@bucket/out/results.jsonl", "rows": 3, "rounds": 1,
    "counts": {"succeeded": 2, "failed": 1}, "input_tokens": 30, "output_tokens": 9, "cost": 0.01,
    "batch_ids": ["batch_1"], "duration_s": 4.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("location", "uri", "name"),
    [
        ("/data/in put.csv", "file:///data/in%20put.csv", ("file", "/data/in put.csv")),
        (Path("/data/in.csv"), "file:///data/in.csv", ("file", "/data/in.csv")),
        ("s3://conn@bucket/a/b.jsonl", "s3://bucket/a/b.jsonl", ("s3://bucket", "a/b.jsonl")),
        ("gs://bucket/", "gs://bucket/", ("gs://bucket", "/")),
        (ObjectStoragePath("s3://aws@x/in.jsonl"), "s3://x/in.jsonl", ("s3://x", "in.jsonl")),
        ([{"custom_id": "a"}], None, None),
        (None, None, None),
    ],
)
def test_datasets_have_the_names_of_the_specifications(
    location: object, uri: str | None, name: tuple[str, str] | None
) -> None:
    assert asset_uri(location) == uri
    assert dataset_name(location) == name


def test_a_relative_path_is_made_absolute() -> None:
    assert asset_uri("in.csv") == f"file://{Path.cwd()}/in.csv"


def test_the_collector_is_told_what_was_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, hook = HookLineageCollector(), AnyBatchHook(None, provider="local")
    monkeypatch.setattr("airflow.providers.common.compat.sdk.get_hook_lineage_collector", lambda: collector)
    report_lineage(hook, "/data/in.csv", MANIFEST)
    told = collector.collected_assets
    assert [item.asset.uri for item in told.inputs] == ["file:///data/in.csv"]
    [output] = told.outputs
    assert output.asset.uri == "s3://bucket/out/results.jsonl"
    assert output.asset.extra["rows"] == 3
    [extra] = told.extra
    assert (extra.key, extra.value["counts"], extra.context) == ("anybatch", MANIFEST["counts"], hook)


def test_without_a_reader_nothing_is_kept() -> None:
    from airflow.providers.common.compat.lineage.hook import get_hook_lineage_collector

    report_lineage(AnyBatchHook(None, provider="local"), "/data/in.csv", MANIFEST)
    assert isinstance(get_hook_lineage_collector(), NoOpCollector)


def test_openlineage_gets_datasets_and_figures() -> None:
    from openlineage.client.serde import Serde

    found: OperatorLineage[Any, Any] | None = openlineage_facets("s3://aws@bucket/in.csv", MANIFEST)
    assert found is not None
    assert [(one.namespace, one.name) for one in found.inputs] == [("s3://bucket", "in.csv")]
    [output] = found.outputs
    assert (output.namespace, output.name) == ("s3://bucket", "out/results.jsonl")
    assert output.outputFacets["outputStatistics"].rowCount == 3
    run = json.loads(Serde.to_json(found.run_facets["anybatch"]))
    assert {name: value for name, value in run.items() if not name.startswith("_")} == {
        "job": "airflow:dag/task/run", "provider": "openai", "endpoint": "/v1/chat/completions",
        "models": ["gpt"], "rows": 3, "rounds": 1, "counts": {"succeeded": 2, "failed": 1},
        "inputTokens": 30, "outputTokens": 9, "cost": 0.01, "batchIds": ["batch_1"], "durationS": 4.5,
    }  # fmt: skip


def test_a_task_that_landed_nothing_still_names_its_input() -> None:
    found = openlineage_facets("/data/in.csv", None)
    assert found is not None
    assert [one.name for one in found.inputs] == ["/data/in.csv"]
    assert found.outputs == []
    assert found.run_facets == {}


_ABSENT = """
import sys
sys.modules["airflow.providers.openlineage"] = None
from anybatch_airflow.lineage import openlineage_facets
assert openlineage_facets("in.csv", {"rows": 1, "results": "out"}) is None
assert not any(name.startswith("openlineage") for name in sys.modules)
"""


def test_without_openlineage_there_are_no_facets_and_no_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ABSENT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
