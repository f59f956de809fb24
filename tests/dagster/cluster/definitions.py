"""What a code server of the test cluster serves: a batch asset for each account it is told of."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from anybatch_dagster import BatchAssets, BatchResource, batch_asset, build_batch_assets, build_batch_sensor

ACCOUNTS: dict[str, str] = json.loads(os.environ["CLUSTER_ACCOUNTS"])  # names, with the provider's base URL
PARTITIONS = {
    "many": dg.StaticPartitionsDefinition([f"p{number:02}" for number in range(50)]),
    "outage": dg.StaticPartitionsDefinition(["waiting", "submitting", "collecting"]),
}


def lines(rows: int) -> Iterator[dict[str, Any]]:
    for number in range(rows):
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"row {number}"}]}
        yield {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@batch_asset(
    resource_key="many",
    partitions_def=PARTITIONS["many"],
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=10),
)
def many(context: dg.AssetExecutionContext) -> dict[str, list[dict[str, Any]]]:
    return {partition: list(lines(2)) for partition in context.partition_keys}


@dg.asset(
    partitions_def=PARTITIONS["many"],
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=10),
)
def sizes(context: dg.AssetExecutionContext, many: Mapping[str, str]) -> None:
    for partition, path in many.items():
        with open(path, encoding="utf-8") as file:
            context.add_asset_metadata({"rows": len(file.readlines())}, partition_key=partition)


def of_account(name: str) -> BatchAssets:
    return build_batch_assets(
        lambda: lines(5), name=name, resource_key=name, partitions_def=PARTITIONS.get(name)
    )


defs = dg.Definitions(
    assets=[asset for name in ACCOUNTS if name != "many" for asset in of_account(name)]
    + ([*many, sizes] if "many" in ACCOUNTS else []),
    # The budget of a tick is far beyond the deadline at which the daemon of this cluster cuts ticks off.
    sensors=[build_batch_sensor(minimum_interval_seconds=5, tick_seconds=20, resource_keys=list(ACCOUNTS))],
    resources={
        name: BatchResource(provider="openai", api_base=base, api_key=dg.EnvVar("CLUSTER_KEY"))
        for name, base in ACCOUNTS.items()
    },
    executor=dg.in_process_executor,
)
