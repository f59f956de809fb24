"""What the tests use of Airflow that has another home before 3.3, and which version this is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

AIRFLOW = tuple(map(int, version("apache-airflow-core").split(".")[:2]))

if AIRFLOW >= (3, 2):
    from airflow.dag_processing.dagbag import DagBag
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime as Providers
    from airflow.sdk.serde import deserialize, serialize
    from airflow.serialization.serialized_objects import DagSerialization
else:
    from airflow.models.dagbag import DagBag
    from airflow.providers_manager import ProvidersManager as Providers
    from airflow.serialization.serde import deserialize, serialize
    from airflow.serialization.serialized_objects import SerializedDAG as DagSerialization

__all__ = ["AIRFLOW", "DagBag", "DagSerialization", "Providers", "deserialize", "needs", "serialize"]


def needs(minor: int, what: str) -> Any:
    """Skips a test of something that Airflow has from 3.`minor` on."""
    return pytest.mark.skipif((3, minor) > AIRFLOW, reason=f"{what}: since Airflow 3.{minor}")
