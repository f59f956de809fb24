"""Batches that another system creates: each one that has ended is an event of an external asset.

    (a nightly script) ──▶ nightly_batches ──▶ nightly_results

Dagster materializes `nightly_results` by itself after each event. To see it, create a batch from anywhere:

    from anybatch import create_batch
    create_batch("local", "requests.jsonl", "/v1/chat/completions", metadata={"origin": "nightly"})
"""

import dagster as dg

from anybatch_dagster import BatchResource, build_external_batch_sensor

nightly_batches = dg.AssetSpec("nightly_batches", description="Batches of the nightly script.")


@dg.asset(deps=[nightly_batches], automation_condition=dg.AutomationCondition.eager())
def nightly_results(context: dg.AssetExecutionContext, anybatch: BatchResource) -> dg.MaterializeResult[None]:
    """The rows of the newest batch, landed like those of a batch asset."""
    event = context.instance.get_latest_materialization_event(nightly_batches.key)
    assert event is not None  # it is what this asset waited for
    assert event.asset_materialization is not None
    batch_id = str(event.asset_materialization.metadata["anybatch/batch"].value)
    report = anybatch.land_batches(batch_id, f"{context.instance.storage_directory()}/nightly/{batch_id}")
    counts = {outcome.value: count for outcome, count in report.counts.items() if count}
    return dg.MaterializeResult(metadata={"batch": batch_id, "results": report.results, **counts})


defs = dg.Definitions(
    assets=[nightly_batches, nightly_results],
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
