"""The operators: a whole job as one task, and its steps as tasks of their own."""

from __future__ import annotations

from anybatch_airflow.operators.cancel import AnyBatchCancelOperator
from anybatch_airflow.operators.create import AnyBatchCreateOperator
from anybatch_airflow.operators.job import AnyBatchOperator
from anybatch_airflow.operators.results import AnyBatchResultsOperator

__all__ = ["AnyBatchCancelOperator", "AnyBatchCreateOperator", "AnyBatchOperator", "AnyBatchResultsOperator"]
