"""anybatch on Airflow: a job end to end in one task that holds no worker slot while the batch runs."""

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

# Airflow imports this package while it is itself half imported (provider discovery), so what needs
# Airflow is looked up on first use.
_HOMES = {
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
