"""Classify 2,400 API operations by what they do: table -> requests -> batch -> results -> joined table.

While the batch runs, minutes to a day at a paid provider, the task is deferred and holds no worker slot.

It runs as it is, on the `local` provider: no key, no network, stand-in answers. To run it on a paid provider,
name it and set its key, on the workers and the triggerer alike:

    ANYBATCH_PROVIDER=openai  OPENAI_API_KEY=…

or make an Airflow connection of type `anybatch` and write `conn_id="…"` in place of `provider=PROVIDER`.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, task

from anybatch_airflow import AnyBatchOperator

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
MODEL = os.environ.get("ANYBATCH_MODEL") or {
    "local": "local:echo?delay=30&fail=0.01",  # 30 s, and one answer in a hundred is an error
    "anthropic": "claude-haiku-4-5",
    "mistral": "mistral-small-latest",
}.get(PROVIDER, "gpt-4o-mini")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "examples" / "data" / "api_operations.csv"
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{ROOT}/out/airflow"  # or "s3://my_aws_conn@bucket/…"

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


def make_requests() -> Iterator[dict[str, Any]]:
    """One request a row; the row's own id comes back with its answer."""
    from anybatch import build_requests

    return build_requests(
        TABLE, QUESTION, model=MODEL, id_column="operation_id", system=SYSTEM, response_format=ANSWER
    )


with DAG(
    "classify_operations",
    description="2,400 rows through an LLM batch, without a worker slot while it runs",
    # A retry finds the batch of the attempt before, and pays nothing.
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    is_paused_upon_creation=False,
    tags=["anybatch", "example"],
):
    classify = AnyBatchOperator(
        task_id="classify",
        provider=PROVIDER,
        input=make_requests,
        output=OUTPUT + "/{{ run_id }}",
        max_failed_ratio=0.05,
    )

    @task
    def join(manifest: dict[str, Any]) -> dict[str, Any]:
        """Put the answers beside their rows, those without an answer included."""
        from anybatch import join_results

        results = Path(manifest["results"])
        table = results.with_name("joined.csv")
        categories: Counter[str] = Counter()
        with table.open("w", newline="", encoding="utf-8") as file:
            rows = join_results(TABLE, results, id_column="operation_id", parse="json")
            columns = ["operation_id", "service", "operation", "category", "summary", "outcome", "error"]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                writer.writerow(row)
                categories[row.get("category") or "none"] += 1
        return {"table": str(table), "categories": dict(categories)}

    join(classify.output)
