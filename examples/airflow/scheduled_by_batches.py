"""A DAG that runs when batches end that another system created, such as a nightly script.

The triggerer lists the account's batches once a minute, however many watchers there are. Each batch that ends
is an event of the asset, at least once; landing a batch twice puts the same files in the same place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, AssetWatcher, task

from anybatch_airflow import AnyBatchResultsOperator, BatchCompletedTrigger

PROVIDER = os.environ.get("ANYBATCH_PROVIDER", "local")
OUTPUT = os.environ.get("ANYBATCH_OUTPUT") or f"{Path(__file__).resolve().parents[2]}/out/airflow"

ended = BatchCompletedTrigger(
    provider=PROVIDER,
    metadata={"team": "reviews"},
    statuses=["completed", "expired"],  # an expired batch has rows as well
)
nightly = Asset("nightly_batches", watchers=[AssetWatcher(name="ended", trigger=ended)])

with DAG(
    "scheduled_by_batches", schedule=[nightly], is_paused_upon_creation=False, tags=["anybatch", "example"]
):

    @task
    def batches(triggering_asset_events: Any = None) -> list[dict[str, str]]:
        """The batches this run is for; events that come close together make one run."""
        payloads = [event.extra["payload"] for event in triggering_asset_events[nightly]]
        ids = dict.fromkeys(payload["batch_id"] for payload in payloads)
        return [{"batch_id": one, "output": f"{OUTPUT}/nightly/{one}"} for one in ids]

    AnyBatchResultsOperator.partial(task_id="land", provider=PROVIDER).expand_kwargs(batches())
