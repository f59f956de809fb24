"""Answers as pydantic objects, in up to three rounds.

Rows that expired, went missing, or failed in a way that may pass go into another batch. No process is alive
between rounds either: the result run submits the next round, and a new run waits for it. After round 3 a row
without an answer, or whose answer does not fit `Verdict`, counts as a row without a result. More than one
such row in a hundred fails the check.

The stand-in model always refuses some rows (400), and these are not submitted again, so the check fails here.
"""

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel

from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor


class Verdict(BaseModel):
    """The form of each answer."""

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
