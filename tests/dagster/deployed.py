"""What `test_deployment.py` runs under a real Dagster; the provider comes from the environment."""

import os
from collections.abc import Iterator
from typing import Any

import dagster as dg

from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor

PARTS = dg.StaticPartitionsDefinition([f"p{number}" for number in range(10)])
DELAY = os.environ.get("TEST_DELAY", "60")


def requests(delay: str, rows: int = 5) -> Iterator[dict[str, Any]]:
    for number in range(rows):
        body = {"model": f"local:echo?delay={delay}", "messages": [{"role": "user", "content": "hello"}]}
        yield {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }


@batch_asset(partitions_def=PARTS)
def texts() -> Iterator[dict[str, Any]]:
    yield from requests(DELAY)


@dg.asset(partitions_def=PARTS)
def lengths(texts: str) -> int:
    with open(texts, encoding="utf-8") as file:
        return len(file.read())


@batch_asset(name=os.environ.get("TEST_NAME", "named"))  # a person may give it another name
def named() -> Iterator[dict[str, Any]]:
    yield from requests(DELAY)


@batch_asset()
def secret() -> Iterator[dict[str, Any]]:
    yield from requests(DELAY)


@batch_asset(resource_key="mistaken")
def refused() -> Iterator[dict[str, Any]]:
    yield from requests("0")


PROVIDER, BASE = os.environ["TEST_PROVIDER"], os.environ["TEST_API_BASE"]
RESOURCES = {
    "anybatch": BatchResource(
        provider=PROVIDER, api_base=BASE, api_key=None if PROVIDER == "local" else dg.EnvVar("TEST_KEY")
    ),
    "mistaken": BatchResource(provider=PROVIDER, api_base=BASE, api_key="canary-in-the-code"),
}

defs = dg.Definitions(
    assets=[*texts, lengths, *named, *secret, *refused],
    jobs=[
        dg.define_asset_job("job_secret", selection=["secret_batch", "secret"]),
        dg.define_asset_job("job_refused", selection=["refused_batch", "refused"]),
    ],
    sensors=[
        build_batch_sensor(
            minimum_interval_seconds=5, tick_seconds=20, resource_keys=["anybatch", "mistaken"]
        )
    ],
    resources=RESOURCES,
    executor=dg.in_process_executor,
)
