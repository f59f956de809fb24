"""Batches that another system creates: of each that has ended, an external asset has one event.

    (a nightly script) ──▶ nightly_batches ──▶ nightly_errors

`nightly_errors` is materialized by itself whenever there is news. To see it, create a batch from anywhere:

    from anybatch import create_batch
    create_batch("local", "requests.jsonl", "/v1/chat/completions", metadata={"origin": "nightly"})
"""

from collections import Counter

import dagster as dg

from anybatch_dagster import BatchResource, build_external_batch_sensor

nightly_batches = dg.AssetSpec("nightly_batches", description="Batches of the nightly script.")


@dg.asset(deps=[nightly_batches], automation_condition=dg.AutomationCondition.eager())
def nightly_errors(context: dg.AssetExecutionContext, anybatch: BatchResource) -> dg.MaterializeResult[None]:
    """What went wrong in the newest of them, by error code."""
    event = context.instance.get_latest_materialization_event(nightly_batches.key)
    assert event is not None  # it is what this asset waited for
    assert event.asset_materialization is not None
    batch_id = str(event.asset_materialization.metadata["anybatch/batch"].value)
    codes = Counter(str(row.error.code) for row in anybatch.results(batch_id) if row.error)
    return dg.MaterializeResult(metadata={"batch": batch_id, **codes})


defs = dg.Definitions(
    assets=[nightly_batches, nightly_errors],
    sensors=[
        build_external_batch_sensor(
            nightly_batches,
            event="materialization",
            metadata={"origin": "nightly"},
            endpoint="/v1/chat/completions",
        )
    ],
    resources={"anybatch": BatchResource(provider="local")},
)
