"""Answers as pydantic objects; what fails in passing is asked again, up to three times in all.

Rows that expired, are missing, or failed in a way that may pass go into another batch. Nothing is alive in
between either: the result run submits the round and waits anew. After the third round an answer that is still
missing, or is no `Verdict`, counts as a row without a result, and more than one in a hundred fails the check.

The stand-in model refuses some rows for good (400), which are not asked again, so here the check does fail.
"""

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel

from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor


class Verdict(BaseModel):
    """What the model is asked for."""

    sentiment: Literal["good", "bad", "neither"]
    reason: str


@dg.asset
def reviews() -> list[dict[str, Any]]:
    """The table."""
    return [{"review": f"r{number}", "text": f"Review number {number}"} for number in range(200)]


@batch_asset(
    model="local:echo?delay=5&fail=0.1",
    prompt="What does this review say?\n\n{text}",
    id_column="review",
    body={
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()},
        }
    },
    value=Verdict,
    max_rounds=3,
    max_failed_ratio=0.01,
    price=(0.075, 0.30),
)
def verdicts(reviews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for each review."""
    return reviews


@dg.asset
def bad_reviews(verdicts: Mapping[str, Verdict]) -> list[str]:
    """The reviews to look at."""
    return [review for review, verdict in verdicts.items() if verdict.sentiment == "bad"]


defs = dg.Definitions(
    assets=[reviews, *verdicts, bad_reviews],
    sensors=[build_batch_sensor()],
    resources={"anybatch": BatchResource(provider="local")},
)
