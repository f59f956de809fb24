"""`BatchResource`: the account, and where its key may be seen."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from anybatch import MissingKeyError, write_jsonl
from anybatch_dagster import BatchResource

from .conftest import request

KEY = "canary-7c1f"


@pytest.mark.parametrize("key", [KEY, dg.EnvVar("TEST_CANARY")])
def test_the_key_reaches_the_client_and_nothing_that_dagster_stores(
    key: Any, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance
) -> None:
    monkeypatch.setenv("TEST_CANARY", KEY)
    seen = []

    @dg.asset
    def user(anybatch: BatchResource) -> None:
        seen.append((anybatch.client().provider.auth_headers(), repr(anybatch)))

    resource = BatchResource(provider="openai", api_key=key, api_base="http://127.0.0.1:9/v1")
    result = dg.materialize([user], resources={"anybatch": resource}, instance=instance)
    ((headers, told),) = seen
    assert KEY in str(headers)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    snapshot = instance.get_job_snapshot(run.job_snapshot_id or "")
    stored = [
        repr(resource),
        told,
        repr(snapshot),
        repr(run.run_config),
        *map(repr, instance.all_logs(run.run_id)),
    ]
    assert [text for text in stored if KEY in text] == []


def test_an_env_var_is_also_read_outside_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CANARY", KEY)
    with BatchResource(provider="openai", api_key=dg.EnvVar("TEST_CANARY")).client() as client:
        assert KEY in str(client.provider.auth_headers())


def test_without_a_key_the_providers_own_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with BatchResource(provider="openai").client() as client:
        assert KEY in str(client.provider.auth_headers())


def test_alone_it_gives_the_four_operations(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    requests = tmp_path / "requests.jsonl"
    write_jsonl(requests, [request("a")])
    seen = []

    @dg.asset
    def by_hand(anybatch: BatchResource) -> None:
        with anybatch.client() as client:
            batch = client.create(requests, "/v1/chat/completions")
            seen.append(client.retrieve(batch.id).id)
            seen.append(client.list(limit=1)[0].id)
            client.cancel(batch.id)

    resource = BatchResource(provider="local", api_base=f"sqlite:///{tmp_path}/local.db")
    assert dg.materialize([by_hand], resources={"anybatch": resource}, instance=instance).success
    assert len(set(seen)) == 1


def test_it_is_not_called_dagsters_own() -> None:
    assert not BatchResource._is_dagster_maintained()


def test_each_operation_is_one_call(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    write_jsonl(
        requests, [request("a", model="local:echo?delay=0"), request("b", model="local:echo?delay=0")]
    )
    resource = BatchResource(provider="local", api_base=f"sqlite:///{tmp_path}/local.db")
    batch = resource.create(requests, metadata={"team": "x"})
    assert resource.retrieve(batch.id).metadata == {"team": "x"}
    assert [one.id for one in resource.list(limit=5)] == [batch.id]
    assert sorted(row.custom_id for row in resource.results(batch.id)) == ["a", "b"]
    assert resource.cancel(batch.id).status.is_terminal  # over already, which is no error


def test_a_check_says_who_answers_or_why_nobody_does(tmp_path: Path) -> None:
    resource = BatchResource(provider="local", api_base=f"sqlite:///{tmp_path}/local.db")
    assert "answers with this key" in resource.check()
    with pytest.raises(MissingKeyError):
        BatchResource(provider="openai").check()
