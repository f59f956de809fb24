"""`BatchResource` without batch assets: the four operations and the results, inside any asset or op.

Use this where batch assets do not fit. Nothing here waits, re-attaches or counts rows: a second
materialization of `embeddings_batch` pays for a second batch.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from anybatch import build_requests, write_jsonl
from anybatch_dagster import BatchResource

WORDS = [{"word": word} for word in ("sea", "lake", "river", "rain")]
ENDPOINT = "/v1/embeddings"


@dg.asset
def embeddings_batch(anybatch: BatchResource) -> dg.MaterializeResult[str]:
    """Create: a batch of embeddings; its id is the asset's value."""
    lines = build_requests(WORDS, "{word}", model="local:embed?delay=5", id_column="word", endpoint=ENDPOINT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "words.jsonl")
        write_jsonl(path, lines)
        batch = anybatch.create(path, ENDPOINT, metadata={"purpose": "embeddings"})
    return dg.MaterializeResult(value=batch.id, metadata={"batch": batch.id, "status": batch.status.value})


@dg.asset(output_required=False)
def embeddings(
    context: dg.AssetExecutionContext, embeddings_batch: str, anybatch: BatchResource
) -> Iterator[dg.Output[dict[str, Any]]]:
    """Retrieve, and read the results once the batch has ended: a vector for each word."""
    batch = anybatch.retrieve(embeddings_batch)
    if not batch.status.is_terminal:
        context.log.info(f"{batch.id} is {batch.status.value}: materialize again later")
        return
    rows = [row for row in anybatch.results(batch.id) if row.result]
    yield dg.Output({row.custom_id: row.result.data[0].embedding for row in rows})


@dg.asset
def account(anybatch: BatchResource) -> dg.MaterializeResult[None]:
    """List: how many of the account's last hundred batches have which status."""
    states = Counter(batch.status.value for batch in anybatch.list(limit=100))
    return dg.MaterializeResult(metadata=dict(states))


class Which(dg.Config):
    """The batch to cancel."""

    batch: str


@dg.op
def cancel_batch(config: Which, anybatch: BatchResource) -> None:
    """Cancel: the rows that are finished can still be read."""
    anybatch.cancel(config.batch)


@dg.job
def cancel_one() -> None:
    """Start this from the launchpad, with the id of a batch."""
    cancel_batch()


defs = dg.Definitions(
    assets=[embeddings_batch, embeddings, account],
    jobs=[cancel_one],
    resources={"anybatch": BatchResource(provider="local")},
)
