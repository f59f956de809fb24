"""A provider that another package brings serves whole assets, as those that come along do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from anybatch.testing import serve
from anybatch_dagster import BatchResource, batch_asset
from tests.acme import ENDS_AT_ONCE, AcmeFake
from tests.packages import write_package


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("acme_batches")
    module.Acme.traits = replace(module.Acme.traits, poll_seconds=(0.1, 0.5))
    yield
    del sys.modules["acme_batches"]


@batch_asset()
def answers() -> Iterator[dict[str, Any]]:
    for number in range(5):
        body = {"model": "m", "messages": [{"role": "user", "content": f"say {number}"}]}
        yield {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.usefixtures("_installed")
def test_assets(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    fake = AcmeFake(ENDS_AT_ONCE)
    with serve(fake) as url:
        resource = BatchResource(
            provider="acme", api_key="test-key", api_base=url, output=str(tmp_path / "jobs")
        )
        result = dg.materialize([*answers], instance=instance, resources={"anybatch": resource})
    assert result.success
    [results] = (tmp_path / "jobs").rglob("results.jsonl")
    assert results.read_bytes().count(b'{"outcome":"succeeded"') == 5
    assert len(fake.batch_ids) == 1
