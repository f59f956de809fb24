"""anybatch on Airflow: one task runs a whole batch job, and holds no worker slot while the batch runs.

Where things are:

    operators/       AnyBatchOperator (a whole job) and the single steps: create, results, cancel
    sensors          AnyBatchSensor waits for batches that something else created
    decorators       @task.anybatch
    triggers         AnyBatchTrigger: what a deferred task waits with
    events           BatchCompletedTrigger: schedules DAGs by batches, through an AssetWatcher
    hooks            AnyBatchHook: from an Airflow connection to a client; its test is in diagnosis
    base             what operators and sensors share: account, identity, deferral, errors
    inputs           the options `input`, `prompt`, `output` and `batch_id`
    carried          what a task needs again after its wait
    landing          what a task does once results have landed: manifest, lineage, asset events, verdict
    reporting        the texts of log lines and messages, the facts in events and XComs
    kill             cancelling the batches of a task that a person ended
    state_store      what is known about earlier attempts without a job folder
    lineage, links   OpenLineage and hook lineage; the buttons on a task instance
    provider_info    what the package declares to Airflow
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybatch_airflow.events import BatchCompletedTrigger
    from anybatch_airflow.hooks import AnyBatchHook
    from anybatch_airflow.operators import (
        AnyBatchCancelOperator,
        AnyBatchCreateOperator,
        AnyBatchOperator,
        AnyBatchResultsOperator,
    )
    from anybatch_airflow.sensors import AnyBatchSensor
    from anybatch_airflow.triggers import AnyBatchTrigger

__all__ = [
    "AnyBatchCancelOperator",
    "AnyBatchCreateOperator",
    "AnyBatchHook",
    "AnyBatchOperator",
    "AnyBatchResultsOperator",
    "AnyBatchSensor",
    "AnyBatchTrigger",
    "BatchCompletedTrigger",
    "__version__",
]

__version__ = "0.1.0"

# While Airflow discovers providers it imports this package, and is itself only half imported. So names that
# need Airflow are imported on first use.
_MODULES = {
    "AnyBatchCancelOperator": "operators.cancel",
    "AnyBatchCreateOperator": "operators.create",
    "AnyBatchHook": "hooks",
    "AnyBatchOperator": "operators.job",
    "AnyBatchResultsOperator": "operators.results",
    "AnyBatchSensor": "sensors",
    "AnyBatchTrigger": "triggers",
    "BatchCompletedTrigger": "events",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
