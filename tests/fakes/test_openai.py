"""The OpenAI fake: from upload to results, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fakes.dialects import Dialect
from tests.fakes.driving import (
    CHAT,
    FIVE,
    Json,
    chat,
    create,
    jsonl,
    results,
    rows,
    serving,
    upload,
)
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

if TYPE_CHECKING:
    from pathlib import Path


def test_openai_batch_from_upload_to_results() -> None:
    fake = OpenAIFake()
    with serving(fake) as (server, client):
        created = create(client, *FIVE, metadata={"job": "a"}).json()
        assert (created["status"], created["metadata"]) == ("validating", {"job": "a"})
        url = f"batches/{created['id']}"
        assert client.get(url).json()["status"] == "in_progress"
        fake.set_progress(created["id"], completed=2, failed=1)
        assert client.get(url).json()["request_counts"] == {"total": 5, "completed": 2, "failed": 1}
        fake.finish(created["id"], failed=["r3"])
        batch = client.get(url).json()
        assert (batch["status"], batch["request_counts"]) == (
            "completed",
            {"total": 5, "completed": 4, "failed": 1},
        )
        assert batch["usage"] == {
            "input_tokens": 8,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 12,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 20,
        }
        output, error = results(client, batch)
        assert output is not None
        assert [row["custom_id"] for row in rows(output)] == ["r0", "r1", "r2", "r4"]
        assert rows(output)[0]["response"]["body"]["choices"][0]["message"]["content"] == "echo: say r0"
        assert error is not None
        (row,) = rows(error)
        assert (row["response"]["status_code"], row["error"]) == (400, None)
        assert row["response"]["body"]["error"]["code"] == "context_length_exceeded"
        assert client.delete(f"files/{batch['output_file_id']}").json()["deleted"] is True
        assert client.get(f"files/{batch['output_file_id']}").status_code == 404
        assert server.count("POST", "/v1/batches") == 1


def test_official_sdk_drives_the_fake(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    fake = OpenAIFake()
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(*FIVE))
    with FakeServer(fake) as server, openai.OpenAI(api_key=fake.key, base_url=server.api_base) as client:
        ids = []
        for number in range(5):
            expiry = {"anchor": "created_at", "seconds": 3600}
            file = client.files.create(file=path, purpose="batch", expires_after=expiry)
            batch = client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"n": str(number)}
            )
            ids.append(batch.id)
            assert file.expires_at == file.created_at + 3600
        assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]
        assert server.count("GET", "/v1/batches") == 3
        assert client.batches.cancel(ids[0]).status == "cancelling"
        assert [client.batches.retrieve(ids[0]).status for _ in range(2)] == ["cancelling", "cancelled"]
        fake.finish(ids[1], failed=1)
        done = client.batches.retrieve(ids[1])
        assert (done.status, done.request_counts.completed, done.metadata) == ("completed", 4, {"n": "1"})
        assert len(client.files.content(done.output_file_id).read().splitlines()) == 4
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_none")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").batches.retrieve(ids[1])


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"", "empty_file", None),
        (jsonl(chat("a")) + b"{oops\n", "invalid_json_line", 2),
        (jsonl(chat("a")) + b"\xff\xfe\n", "invalid_json_line", 2),
        (b"\xef\xbb\xbf" + jsonl(chat("a")), "invalid_json_line", 1),
        (jsonl(chat("a"), chat("b"), chat("a")), "duplicate_custom_id", 3),
        (jsonl(chat("a"), chat("b", url="/v1/responses")), "url_mismatch", 2),
        (jsonl(chat("a", method="GET")), "invalid_method", 1),
        (jsonl(chat("a"), chat("b", model="other")), "model_mismatch", 2),
        (jsonl(chat("a", body={"model": "m", "stream": True})), "invalid_request", 1),
        (jsonl(chat("a", body={})), "model_not_found", 1),
        (jsonl(chat("")), "missing_required_parameter", 1),
    ],
)
def test_openai_finds_bad_input_after_accepting_it(data: bytes, code: str, line: int | None) -> None:
    with serving(OpenAIFake()) as (_, client):
        created = create(client, data=data)
        assert (created.status_code, created.json()["status"]) == (200, "validating")
        batch = client.get(f"batches/{created.json()['id']}").json()
        assert (batch["status"], batch["output_file_id"]) == ("failed", None)
        assert [(one["code"], one["line"]) for one in batch["errors"]["data"]] == [(code, line)]


def test_openai_fails_a_batch_over_its_limits() -> None:
    fake = OpenAIFake(Dialect("small", max_rows=4))
    with serving(fake) as (_, client):
        too_many, enqueued = create(client, *FIVE).json(), create(client, *FIVE[:4]).json()
        fake.fail(enqueued["id"], "token_limit_exceeded", "Enqueued token limit reached for gpt-5-mini.")
        shown = [client.get(f"batches/{one['id']}").json() for one in (too_many, enqueued)]
        codes = [one["errors"]["data"][0]["code"] for one in shown]
        assert codes == ["too_many_tasks", "token_limit_exceeded"]
        assert fake.live_batches() == []


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"name": "x"}, "name"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"metadata": {"a": 1}}, None),
        ({"metadata": {"a" * 65: "b"}}, None),
        ({"metadata": {"a": "b" * 513}}, None),
        ({"metadata": {str(number): "x" for number in range(17)}}, None),
    ],
)
def test_openai_refuses_a_bad_create(members: Json, param: str | None) -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        reply = create(client, *FIVE, **members)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert fake.batches == {}


@pytest.mark.parametrize(
    ("name", "fields", "status"),
    [
        ("in.json", {}, 400),
        ("in.jsonl", {"purpose": "fine-tune"}, 400),
        ("in.jsonl", {"colour": "red"}, 400),
        ("in.jsonl", {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, 400),
        ("in.jsonl", {"expires_after.anchor": "created_at", "expires_after.seconds": "7200"}, 400),
        ("in.jsonl", {"expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}, 200),
    ],
)
def test_openai_checks_uploads(name: str, fields: dict[str, str], status: int) -> None:
    with serving(OpenAIFake()) as (_, client):
        assert upload(client, *FIVE, name=name, fields=fields).status_code == status


def test_openai_refuses_a_wrong_key_path_and_media_type() -> None:
    with serving(OpenAIFake()) as (server, client):
        assert client.get("batches", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get(server.url + "/batches").status_code == 404
        assert client.post("batches", content=b"{}").status_code == 415
        assert client.get("batches/batch_none").json()["error"]["type"] == "invalid_request_error"
        assert [client.get(f"batches?limit={limit}").status_code for limit in (0, 1, 100, 101)] == [
            400,
            200,
            200,
            400,
        ]
