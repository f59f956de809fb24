"""The fakes speak as the providers' OpenAPI documents say, and the documents find what is wrong."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.fakes.anthropic import OVERLOADED, AnthropicFake
from tests.fakes.anthropic_input import OLD
from tests.fakes.dialects import DIALECTS, OPENAI
from tests.fakes.driving import (
    BATCHES,
    CHAT,
    FIVE,
    THREE,
    Json,
    create,
    http,
    message,
    mistral_job,
    results,
    rows,
    serving,
    upload,
)
from tests.fakes.mistral import MistralFake
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer, Reply
from tests.fakes.specs import find_specs, load_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from tests.fakes.provider import FakeProvider


def drive_openai(client: httpx.Client, fake: FakeProvider) -> None:
    for end in (fake.finish, fake.expire):
        batch_id = create(client, *FIVE, metadata={"k": "v"}).json()["id"]
        client.get(f"batches/{batch_id}")
        end(batch_id, failed=1)
        batch = client.get(f"batches/{batch_id}").json()
        results(client, batch)
        client.delete(f"files/{batch['error_file_id']}")
    client.post(f"batches/{create(client, *FIVE).json()['id']}/cancel")
    client.get("batches")
    client.get("files")


def drive_mistral(client: httpx.Client, fake: FakeProvider) -> None:
    for end in (fake.finish, fake.expire, fake.cancel_now):
        job_id = mistral_job(client, *FIVE, model="m", metadata={"k": "v"}, timeout_hours=48).json()["id"]
        end(job_id, failed=0)
        job = client.get(f"/v1/batch/jobs/{job_id}?inline=true").json()
        client.get(f"/v1/files/{job['input_files'][0]}")
    bad = mistral_job(client, {"custom_id": "a", "body": {}}).json()["id"]
    client.get(f"/v1/batch/jobs/{bad}")
    client.post(f"/v1/batch/jobs/{mistral_job(client, *FIVE).json()['id']}/cancel")
    client.get("/v1/batch/jobs?page=0&page_size=100&status=RUNNING&status=QUEUED&order_by=-created&k=v")
    client.get("/v1/files")
    client.delete(f"/v1/batch/jobs/{bad}")


def drive_anthropic(client: httpx.Client, fake: FakeProvider) -> None:
    requests = {"requests": THREE}
    batch_id = client.post(BATCHES, json=requests).json()["id"]
    client.post(f"{BATCHES}/{batch_id}/cancel")
    fake.cancel_now(batch_id, done=1)
    client.get(f"{BATCHES}/{batch_id}/results")
    client.delete(f"{BATCHES}/{batch_id}")
    batch_id = client.post(BATCHES, json=requests).json()["id"]
    fake.finish(batch_id, failed=1, failure=OVERLOADED)
    client.get(f"{BATCHES}/{batch_id}/results")
    client.get(BATCHES, params={"limit": 5})
    client.get(f"{BATCHES}/none")


@pytest.mark.parametrize(
    ("name", "fake", "drive"),
    [
        ("openai", OpenAIFake(), drive_openai),
        ("groq", OpenAIFake(DIALECTS["groq"]), drive_openai),
        ("mistral", MistralFake(), drive_mistral),
        ("anthropic", AnthropicFake(), drive_anthropic),
    ],
)
def test_fakes_speak_as_documented(
    name: str, fake: FakeProvider, drive: Callable[[httpx.Client, FakeProvider], None]
) -> None:
    spec = load_spec(name)
    with serving(fake, **{"anthropic-version": OLD}) as (server, client):
        drive(client, fake)
        assert spec.problems(server.calls) == []
        assert len(server.calls) >= 8


@pytest.mark.parametrize(
    ("name", "method", "path", "body", "problem"),
    [
        ("openai", "POST", "/v1/batch", {}, "POST /v1/batch: no such operation"),
        ("openai", "POST", "/batches", {}, "POST /batches: no such operation"),
        (
            "openai",
            "POST",
            "/v1/batches",
            {"endpoint": CHAT, "input_file_id": "f"},
            "'completion_window' is a required",
        ),
        (
            "openai",
            "GET",
            "/v1/batches?limit=ten",
            None,
            "query parameter 'limit': value: 'ten' is not of type",
        ),
        ("openai", "GET", "/v1/batches?page=2", None, "query parameter 'page' is not described"),
        ("openai", "GET", "/v1/batches/b", {"a": 1}, "there should be no body"),
        (
            "groq",
            "POST",
            "/openai/v1/batches",
            {"endpoint": CHAT, "input_file_id": "f", "completion_window": "24h", "metadata": {"a": 1}},
            "metadata.a: 1 is not of type",
        ),
        (
            "mistral",
            "POST",
            "/v1/batch/jobs",
            {"endpoint": CHAT, "timeout_hours": 999},
            "timeout_hours: 999 is greater",
        ),
        (
            "mistral",
            "POST",
            "/v1/batch/jobs",
            {"endpoint": CHAT, "input_files": ["x"]},
            "input_files.0: 'x' is not a 'uuid'",
        ),
        (
            "mistral",
            "GET",
            "/v1/batch/jobs/none",
            None,
            "path parameter 'job_id': value: 'none' is not a 'uuid'",
        ),
        ("mistral", "GET", "/v1/batch/jobs?status=DONE", None, "query parameter 'status'"),
        ("anthropic", "POST", BATCHES, {"requests": [message("a b")]}, "custom_id: 'a b' does not match"),
        ("anthropic", "POST", BATCHES, {"requests": [message("a", n=1)]}, "'n' was unexpected"),
    ],
)
def test_documents_find_bad_requests(
    name: str, method: str, path: str, body: Json | None, problem: str
) -> None:
    with FakeServer(lambda _: Reply()) as server:
        with http() as client:
            client.request(method, server.url + path, json=body)
        problems = load_spec(name).request_problems(server.calls[0].request)
        assert any(re.search(problem, one) for one in problems), problems


def test_documents_look_into_forms_and_answers() -> None:
    spec = load_spec("openai")
    with serving(OpenAIFake()) as (server, client):
        upload(client, *FIVE, fields={"colour": "red"})
        upload(
            client, *FIVE, fields={"expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}
        )
        create(client, *FIVE)
        first, second, *_, created = server.calls
        assert "'colour' was unexpected" in spec.request_problems(first.request)[0]
        assert spec.request_problems(second.request) == []
        assert created.reply is not None
        shown = {**json.loads(created.reply.body), "status": "odd", "created_at": None}
        problems = spec.reply_problems(created.request, Reply.json(shown))
        assert [one.split(" -> 200: ")[1][:30] for one in problems] == [
            "created_at: None is not of typ",
            "status: 'odd' is not one of ['",
        ]
        assert spec.problems([second], extra_query=["x"]) == []


def test_documents_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANYBATCH_SPECS", str(tmp_path / "none"))
    assert find_specs() is None
    with pytest.raises(pytest.skip.Exception, match="no OpenAPI document of openai"):
        load_spec("openai")
    monkeypatch.setenv("ANYBATCH_SPECS", str(tmp_path))
    assert find_specs() == tmp_path


def test_output_lines_are_as_groq_documents_them() -> None:
    spec, fake = load_spec("groq"), OpenAIFake(OPENAI)
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        fake.expire(batch_id, done=3, failed=1)
        output, error = results(client, client.get(f"batches/{batch_id}").json())
        lines = rows((output or b"") + (error or b""))
        assert [spec.schema_problems("BatchRequestOutput", line) for line in lines] == [[]] * 5
        assert [spec.schema_problems("BatchRequestInput", line) for line in FIVE] == [[]] * 5
