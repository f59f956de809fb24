"""`@task.anybatch`: a function returns a table, the prompt is a template over its columns.

The table goes from the function into the batch, and is not stored in XCom; XCom gets the manifest.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, task

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "examples" / "data" / "api_operations.csv"
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{ROOT}/out/airflow"

with DAG("decorated", is_paused_upon_creation=False, tags=["anybatch", "example"]):

    @task.anybatch(
        provider=PROVIDER,
        model=os.environ.get("ANYBATCH_MODEL", "local:echo?delay=5"),
        prompt="Sum up in one sentence: {description}",
        id_column="operation_id",
        output=OUTPUT + "/summaries/{{ run_id }}/{{ ti.map_index }}",
    )
    def summaries(service: str) -> Iterator[dict[str, Any]]:
        """The operations of one service."""
        with TABLE.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["service"] == service:
                    yield row

    @task
    def total(manifests: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows, tokens and results of all services together."""
        return {
            "rows": sum(manifest["rows"] for manifest in manifests),
            "tokens": sum(manifest["input_tokens"] + manifest["output_tokens"] for manifest in manifests),
            "results": [manifest["results"] for manifest in manifests],
        }

    total(summaries.expand(service=["Elastic Load Balancing", "Amazon Kinesis Analytics"]))
