"""What Airflow is told of the package, and what importing it costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import anybatch_airflow
from anybatch_airflow.provider_info import get_provider_info


def test_the_info_is_what_airflow_accepts() -> None:
    import airflow
    import jsonschema

    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)
    # A provider whose package-name is not its distribution's is refused.
    assert get_provider_info()["package-name"] == importlib.metadata.metadata("anybatch")["Name"]


def test_the_info_names_what_exists() -> None:
    info = get_provider_info()
    modules = [name for kind in ("hooks", "operators", "sensors", "triggers") for entry in info[kind]
               for name in entry["python-modules"]]  # fmt: skip
    assert len(modules) == 4
    for name in modules:
        importlib.import_module(name)
    [kind] = info["connection-types"]
    module, _, hook = kind["hook-class-name"].rpartition(".")
    assert getattr(importlib.import_module(module), hook).conn_type == kind["connection-type"]


def test_airflow_knows_the_connection_type() -> None:
    from airflow.providers_manager import ProvidersManager
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    hook = ProvidersManagerTaskRuntime().hooks["anybatch"]
    assert hook is not None
    assert hook.hook_class_name == "anybatch_airflow.hooks.AnyBatchHook"
    manager = ProvidersManager()
    assert manager.field_behaviours["anybatch"]["relabeling"]["password"] == "API key"
    fields = {name for name in manager.connection_form_widgets if name.startswith("extra__anybatch__")}
    assert fields == {"extra__anybatch__provider", "extra__anybatch__client_args"}


def test_public_names_are_pinned() -> None:
    assert anybatch_airflow.__all__ == [
        "AnyBatchHook",
        "AnyBatchOperator",
        "AnyBatchSensor",
        "AnyBatchTrigger",
        "__version__",
    ]
    assert anybatch_airflow.__all__ == sorted(anybatch_airflow.__all__)
    for name in anybatch_airflow.__all__:
        assert getattr(anybatch_airflow, name)
    assert anybatch_airflow.__version__ == importlib.metadata.version("anybatch")
    with pytest.raises(AttributeError, match="AnyBatchOperater"):
        _ = anybatch_airflow.AnyBatchOperater


_PARSE = """
import sys, time
import anybatch_airflow.provider_info
early = [name for name in ("airflow", "anybatch", "httpx", "pydantic") if name in sys.modules]
import airflow.sdk
begun = time.process_time()
from anybatch_airflow import AnyBatchOperator, AnyBatchSensor
AnyBatchOperator(task_id="t", input="in.jsonl", output_folder="out")
AnyBatchSensor(task_id="s", batch_id="batch_1")
cost = time.process_time() - begun
heavy = ("anybatch", "anybatch_airflow.triggers")
late = [name for name in sys.modules if name in heavy or name.startswith("anybatch.")]
print(early, late, cost)
assert not early and not late and cost < 0.1
"""


def test_parsing_a_dag_costs_little() -> None:
    """No client, no trigger, no more than 100 ms of CPU beyond airflow.sdk; nothing at all for the info."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PARSE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
