"""Every dialect of the OpenAI fake deviates as its provider does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.dialects import DIALECTS, LITELLM, Dialect
from tests.fakes.driving import (
    CHAT,
    FIVE,
    Json,
    chat,
    create,
    results,
    rows,
    serving,
    upload,
)
from tests.fakes.openai import OpenAIFake

if TYPE_CHECKING:
    import httpx

URLS = {"perplexity": "/v1/responses", "zhipu": "/v4/chat/completions"}
WINDOWS = {"novita": "48h"}
DONE = {"nebius": "done", "novita": "COMPLETED", "azure": "Completed"}
WAITING = {"siliconflow": "in_queue", "cerebras": "queued", "novita": "VALIDATING", "azure": "Validating"}


def dialect_lines(dialect: Dialect) -> list[Json]:
    lines = [chat(custom_id, url=URLS.get(dialect.name, CHAT)) for custom_id in ("r0", "r1")]
    return (
        [{"custom_id": one["custom_id"], "body": one["body"]} for one in lines]
        if dialect.bare_lines
        else lines
    )


def dialect_batch(client: httpx.Client, dialect: Dialect, **members: Any) -> httpx.Response:
    window = WINDOWS.get(dialect.name, "24h")
    endpoint = URLS.get(dialect.name, CHAT)
    return create(client, *dialect_lines(dialect), endpoint=endpoint, completion_window=window, **members)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_every_dialect_from_create_to_results(dialect: Dialect) -> None:
    fake = OpenAIFake(dialect)
    with serving(fake, **{"api-key": fake.key}) as (_, client):
        created = dialect_batch(client, dialect).json()
        assert created["status"] == WAITING.get(dialect.name, "validating")
        fake.finish(created["id"], failed=["r1"])
        batch = client.get(f"batches/{created['id']}").json()
        assert batch["status"] == DONE.get(dialect.name, "completed")
        output, error = results(client, batch)
        assert output is not None
        assert error is not None
        assert [row["custom_id"] for row in rows(output) + rows(error)] == ["r0", "r1"]
        assert [one["id"] for one in client.get("batches").json()["data"]] == [created["id"]]


def test_azure() -> None:
    fake = OpenAIFake(DIALECTS["azure"])
    with serving(fake, **{"api-key": fake.key}) as (_, client):
        del client.headers["authorization"]
        file = upload(
            client, *FIVE, fields={"expires_after.seconds": "1209600", "expires_after.anchor": "created_at"}
        ).json()
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        assert (file["status"], client.post("batches", json=body).status_code) == ("pending", 400)
        assert client.get(f"files/{file['id']}").json()["status"] == "processed"
        created = client.post("batches", json=body).json()
        assert created["created_at"].endswith("Z")
        assert (created["endpoint"], created["error_file_id"]) == (None, "")
        assert created["request_counts"] == {"total": None, "completed": None, "failed": None}
        fake.finish(created["id"])
        batch = client.get(f"batches/{created['id']}").json()
        output, error = results(client, batch)
        assert output is not None
        assert (error, "id" in rows(output)[0]) == (b"", False)


def test_groq() -> None:
    fake = OpenAIFake(DIALECTS["groq"])
    with serving(fake) as (_, client):
        ids = [dialect_batch(client, fake.dialect).json()["id"] for _ in range(3)][::-1]
        first = client.get("batches?limit=2").json()
        assert first.keys() == {"object", "data", "paging"}
        second = client.get("batches", params={"limit": 2, "cursor": first["paging"]["next_cursor"]}).json()
        assert [one["id"] for one in first["data"] + second["data"]] == ids
        assert second["paging"] == {"next_cursor": None}
        asked = client.get("batches", params={"id": ids[:2]}).json()
        assert [one["id"] for one in asked["data"]] == ids[:2]
        bad = create(client, chat("a", method="GET"), completion_window="7d").json()["id"]
        assert client.get(f"batches/{bad}").json()["errors"][0]["code"] == "invalid_method"


def test_perplexity_repeats_a_create_with_its_key() -> None:
    fake = OpenAIFake(DIALECTS["perplexity"])
    with serving(fake) as (_, client):
        client.headers["idempotency-key"] = "k1"
        first, again = (dialect_batch(client, fake.dialect).json()["id"] for _ in range(2))
        client.headers["idempotency-key"] = "k2"
        assert (again, dialect_batch(client, fake.dialect).json()["id"] == first) == (first, False)
        assert len(fake.batches) == 2
        assert upload(client, data=b"{oops\n").json()["error"]["code"] == "invalid_json_line"
        assert (
            upload(
                client, *dialect_lines(fake.dialect), fields={"expires_after[seconds]": "3600"}
            ).status_code
            == 400
        )
        after = {"anchor": "created_at", "seconds": 3600}
        client.headers["idempotency-key"] = "k3"
        assert dialect_batch(client, fake.dialect, output_expires_after=after).status_code == 400


def test_nebius_and_siliconflow_and_novita_shapes() -> None:
    nebius, silicon, novita = (OpenAIFake(DIALECTS[name]) for name in ("nebius", "siliconflow", "novita"))
    with serving(nebius) as (_, client):
        created = dialect_batch(client, nebius.dialect).json()
        assert (created["request_counts"], len(created["id"])) == ({}, 36)
        nebius.finish(created["id"])
        output, _ = results(client, client.get(f"batches/{created['id']}").json())
        assert rows(output or b"")[0]["response"]["object"] == "chat.completion"
    with serving(silicon) as (_, client):
        assert upload(client, *FIVE).json().keys() == {"code", "message", "status", "data"}
        assert dialect_batch(client, silicon.dialect, replace={"model": "x"}).json()["request_counts"] is None
        assert client.get("batches/none").json().keys() == {"code", "message", "data"}
    with serving(novita) as (_, client):
        created = dialect_batch(client, novita.dialect).json()
        assert client.get(f"batches/{created['id']}").json()["status"] == "PROGRESS"
        assert (created["total"], created["errors"], created["output_file_id"]) == (0, "", "")
        assert isinstance(created["created_at"], str)
        bad = create(client, chat("a"), completion_window="48h").json()["id"]  # lines with method and url
        assert client.get(f"batches/{bad}").json()["errors"].startswith("Unknown parameter: 'method'.")


def test_cerebras() -> None:
    fake = OpenAIFake(DIALECTS["cerebras"])
    with serving(fake) as (_, client):
        first, second = (
            dialect_batch(client, fake.dialect, metadata={"a": ["b"]}).json()["id"] for _ in range(2)
        )
        assert client.post(f"batches/{first}/cancel").status_code == 404
        assert client.delete(f"batches/{first}").json()["status"] == "cancelling"
        assert client.get(f"batches/{second}/results").status_code == 409
        fake.expire(second, done=1)
        good, bad = rows(client.get(f"batches/{second}/results").content)
        assert (good["status"], good["response"]["object"]) == ("succeeded", "chat.completion")
        assert (bad["status"], bad["error"]["code"]) == ("expired", "batch_expired")


@pytest.mark.parametrize(
    ("name", "metadata", "query", "found"),
    [
        ("dashscope", {"ds_name": "nightly"}, {"ds_name": "night"}, True),
        ("dashscope", {"ds_name": "nightly"}, {"ds_name": "daily"}, False),
        ("dashscope", {}, {"status": "in_progress,validating"}, True),
        ("dashscope", {}, {"input_file_ids": "file-x"}, False),
        ("doubleword", {"job": "abc"}, {"search": "abc"}, True),
        ("doubleword", {"job": "abc"}, {"search": "xyz"}, False),
        ("openai", {"job": "abc"}, {"search": "xyz"}, True),  # no such filter: ignored
    ],
)
def test_list_filters(name: str, metadata: Json, query: dict[str, str], found: bool) -> None:
    fake = OpenAIFake(DIALECTS[name])
    with serving(fake) as (_, client):
        dialect_batch(client, fake.dialect, metadata=metadata)
        assert bool(client.get("batches", params=query).json()["data"]) is found


def test_parasail_mixes_models_and_litellm_ids_are_opaque() -> None:
    with serving(OpenAIFake(DIALECTS["parasail"])) as (_, client):
        batch_id = create(client, chat("a"), chat("b", model="other")).json()["id"]
        assert client.get(f"batches/{batch_id}").json()["status"] == "in_progress"
    with serving(OpenAIFake(LITELLM)) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        assert batch_id.endswith("==")
        assert len(batch_id) > 100
        assert client.get(f"batches/{batch_id.replace('=', '%3D')}").json()["id"] == batch_id
