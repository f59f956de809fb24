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

from anybatch import UnknownOptionError
from anybatch.providers import Setting
from anybatch.testing import serve
from anybatch_dagster import BatchResource, batch_asset
from tests.acme import ENDS_AT_ONCE, AcmeFake
from tests.packages import write_package


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("acme_batches")
    account = module.Acme.traits.account
    account = replace(account, settings=(*account.settings, Setting("pin", secret=True)))
    module.Acme.traits = replace(module.Acme.traits, poll_seconds=(0.1, 0.5), account=account)
    yield
    del sys.modules["acme_batches"]


@batch_asset()
def answers() -> Iterator[dict[str, Any]]:
    for number in range(5):
        body = {"model": "m", "messages": [{"role": "user", "content": f"say {number}"}]}
        yield {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.usefixtures("_installed")
def test_assets(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    fake = AcmeFake(ENDS_AT_ONCE, team="blue")
    with serve(fake) as url:
        resource = BatchResource(
            provider="acme",
            api_key="test-key",
            api_base=url,
            settings={"team": "blue"},
            output=str(tmp_path / "jobs"),
        )
        result = dg.materialize([*answers], instance=instance, resources={"anybatch": resource})
    assert result.success
    [results] = (tmp_path / "jobs").rglob("results.jsonl")
    assert results.read_bytes().count(b'{"outcome":"succeeded"') == 5
    assert len(fake.batch_ids) == 1


SECRET = "canary-5d2e"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("pin", [SECRET, dg.EnvVar("TEST_CANARY")])
def test_settings_reach_the_client_and_no_secret_what_dagster_stores(
    pin: Any, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    monkeypatch.setenv("TEST_CANARY", SECRET)
    seen: list[dict[str, str]] = []

    @dg.asset
    def user(anybatch: BatchResource) -> None:
        with anybatch.client() as client:
            seen.append(dict(client.account.settings))

    settings = {"team": "blue", "pin": pin}
    resource = BatchResource(provider="acme", api_key="test-key", settings=settings)
    result = dg.materialize([user], resources={"anybatch": resource}, instance=instance)
    with resource.client() as client:  # outside of a run
        seen.append(dict(client.account.settings))
    assert seen == [{"team": "blue", "pin": SECRET}] * 2
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    snapshot = repr(instance.get_job_snapshot(run.job_snapshot_id or ""))
    logs = map(repr, instance.all_logs(run.run_id))
    assert [text for text in (repr(resource), snapshot, *logs) if SECRET in text] == []
    assert "blue" in snapshot


@pytest.mark.usefixtures("_installed")
def test_unknown_settings_are_refused_by_name() -> None:
    resource = BatchResource(provider="acme", api_key="test-key", settings={"zone": "a"})
    with pytest.raises(UnknownOptionError, match="acme has no setting zone; it has team, pin"):
        resource.client()
