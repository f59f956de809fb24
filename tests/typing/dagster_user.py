"""Assets, sensors and resources, as the author of a code location writes them."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from anybatch_dagster import (
    BatchAssets,
    BatchResource,
    batch_asset,
    build_batch_assets,
    build_batch_sensor,
    build_external_batch_sensor,
)


@dg.asset
def raw_reviews() -> list[dict[str, Any]]:
    return [{"id": "1", "text": "good"}]


@batch_asset(model="gpt-4o-mini", prompt="What is {text}?", id_column="id", max_rounds=2, on_timeout="cancel")
def reviews(raw_reviews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return raw_reviews


@batch_asset(model="gpt-4o-mini", on_partial="fail")
def lines() -> Iterator[dict[str, Any]]:
    yield {"custom_id": "1"}


made: BatchAssets = build_batch_assets(
    raw_reviews, name="made", model="gpt-4o-mini", prompt="What is {text}?", id_column="id"
)

defs = dg.Definitions(
    assets=[raw_reviews, *reviews, *lines, *made],
    sensors=[build_batch_sensor(), build_external_batch_sensor("theirs", event="materialization")],
    resources={"anybatch": BatchResource(provider="openai", api_key=dg.EnvVar("OPENAI_API_KEY"))},
)
