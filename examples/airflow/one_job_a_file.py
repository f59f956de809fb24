"""Dynamic mapping: one job for each file that an earlier task has found.

Only paths go through XCom. Each mapped task has an identity of its own, so clearing one of them repeats only
that one. None of them holds a worker slot while its batch runs, and one poller looks at all batches.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from airflow.sdk import DAG, task

from anybatch_airflow import AnyBatchOperator

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
MODEL = os.environ.get("ANYBATCH_MODEL", "local:echo?delay=5")
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{Path(__file__).resolve().parents[2]}/out/airflow"

with DAG("one_job_a_file", is_paused_upon_creation=False, tags=["anybatch", "example"]):

    @task
    def export(run_id: str) -> list[str]:
        """Write files of requests, as an export of yours would; returns their paths."""
        folder = Path(OUTPUT) / "exports" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for city in ("Lagos", "Lima", "Lyon"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"One fact about {city}"}]}
            request = {"custom_id": city, "method": "POST", "url": "/v1/chat/completions", "body": body}
            path = folder / f"{city}.jsonl"
            path.write_text(json.dumps(request) + "\n")
            paths.append(str(path))
        return paths

    AnyBatchOperator.partial(
        task_id="run",
        provider=PROVIDER,
        output=OUTPUT + "/facts/{{ run_id }}/{{ ti.map_index }}",
        map_index_template="{{ task.input }}",
    ).expand(input=export())
