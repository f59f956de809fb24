"""Classify 2,400 API operations by what they do: table -> requests -> batch -> results -> joined table.

    operations ──▶ operation_kinds_batch ──▶ operation_kinds ──▶ classified_operations

While the batch runs, minutes to a day at a paid provider, no run is alive. Try it, with `dagster.yaml` from
this folder in $DAGSTER_HOME:

    dagster dev -f definitions.py

It runs as it is, on the `local` provider: no key, no network, stand-in answers. To run it on a paid provider,
name it and set its key:

    ANYBATCH_PROVIDER=openai  OPENAI_API_KEY=…
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from anybatch import build_requests, join_results
from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
MODEL = os.environ.get("ANYBATCH_MODEL") or {
    "local": "local:echo?delay=30&fail=0.01",  # 30 s, and one answer in a hundred is an error
    "anthropic": "claude-haiku-4-5",
    "mistral": "mistral-small-latest",
}.get(PROVIDER, "gpt-4o-mini")
TABLE = Path(__file__).resolve().parents[1] / "data" / "api_operations.csv"

QUESTION = "{description}\n\n(Operation {operation} of {service})"
SYSTEM = "Say what this API operation does to the caller's data, and sum it up in one short sentence."
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "operation",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "category": {"type": "string", "enum": ["read", "write", "delete", "admin"]},
                "summary": {"type": "string"},
            },
            "required": ["category", "summary"],
            "additionalProperties": False,
        },
    },
}


@dg.asset(group_name="example")
def operations() -> list[dict[str, str]]:
    """The table: one API operation a row, with its description."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@batch_asset(group_name="example", max_failed_ratio=0.05)
def operation_kinds(operations: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """What each operation does, by a model; the row's own id comes back with its answer."""
    yield from build_requests(
        operations, QUESTION, model=MODEL, id_column="operation_id", system=SYSTEM, response_format=ANSWER
    )


@dg.asset(group_name="example")
def classified_operations(
    operations: list[dict[str, str]], operation_kinds: str
) -> dg.MaterializeResult[list[dict[str, Any]]]:
    """The table with the answers beside its rows, those without an answer included."""
    rows = list(join_results(operations, operation_kinds, id_column="operation_id", parse="json"))
    categories = Counter(row.get("category") or "none" for row in rows)
    return dg.MaterializeResult(value=rows, metadata={"dagster/row_count": len(rows), **categories})


defs = dg.Definitions(
    assets=[operations, *operation_kinds, classified_operations],
    jobs=[dg.define_asset_job("classify_operations", selection="*")],
    sensors=[build_batch_sensor(minimum_interval_seconds=5)],
    resources={"anybatch": BatchResource(provider=PROVIDER)},
    executor=dg.in_process_executor,  # the steps wait for the network more than they compute
)
