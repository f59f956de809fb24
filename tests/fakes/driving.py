"""What the tests of the fakes share: clients, input, and the calls that make a batch."""

from __future__ import annotations

import json
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from tests.fakes.anthropic_input import OLD
from tests.fakes.server import FakeServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.fakes.anthropic import AnthropicFake
    from tests.fakes.provider import FakeProvider

Json = dict[str, Any]
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
CHAT = "/v1/chat/completions"


def chat(custom_id: str, *, model: str = "gpt-5-mini", url: str = CHAT, **more: Any) -> Json:
    body = {"model": model, "messages": [{"role": "user", "content": f"say {custom_id}"}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def jsonl(*lines: Json) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def rows(content: bytes) -> list[Json]:
    return [json.loads(line) for line in content.split(b"\n") if line]


FIVE = [chat(f"r{number}") for number in range(5)]


def http(base_url: str = "", **options: Any) -> httpx.Client:
    """A client that spends no time on certificates."""
    return httpx.Client(base_url=base_url, verify=NO_TLS, trust_env=False, **{"timeout": 5, **options})


def get(url: str) -> httpx.Response:
    with http() as client:
        return client.get(url)


def broken_download(url: str) -> bytes:
    """What arrives of a download that breaks off."""
    received = bytearray()
    with http() as client, client.stream("GET", url) as response:
        try:
            for chunk in response.iter_bytes():
                received += chunk
        except httpx.RemoteProtocolError:
            return bytes(received)
    raise AssertionError("the download did not break off")


@contextmanager
def serving(fake: FakeProvider, **headers: str) -> Iterator[tuple[FakeServer, httpx.Client]]:
    """A server for the fake, and a client that has its key."""
    keys = {"authorization": f"Bearer {fake.key}", **headers}
    with FakeServer(fake) as server, http(server.api_base, headers=keys) as client:
        yield server, client


def upload(
    client: httpx.Client,
    *lines: Json,
    data: bytes | None = None,
    name: str = "in.jsonl",
    fields: Mapping[str, str] | None = None,
) -> httpx.Response:
    content = jsonl(*lines) if data is None else data
    form = {"purpose": "batch", **(fields or {})}
    return client.post("files", data=form, files={"file": (name, content)})


def create(client: httpx.Client, *lines: Json, data: bytes | None = None, **members: Any) -> httpx.Response:
    uploaded = upload(client, *lines, data=data).json()
    file_id = uploaded.get("data", uploaded)["id"]
    client.get(f"files/{file_id}")  # where a file must be processed first, this is when it is
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **members}
    return client.post("batches", json=body)


def results(client: httpx.Client, batch: Json) -> tuple[bytes | None, bytes | None]:
    """The bytes of the output and the error file."""
    ids = batch["output_file_id"], batch["error_file_id"]
    first, second = (client.get(f"files/{one}/content").content if one else None for one in ids)
    return first, second


def mistral_job(client: httpx.Client, *lines: Json, **members: Any) -> httpx.Response:
    data = jsonl(*({"custom_id": one["custom_id"], "body": one["body"]} for one in lines))
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)}).json()
    body = {"endpoint": CHAT, "input_files": [file["id"]], **members}
    return client.post("/v1/batch/jobs", json=body)


def message(custom_id: str, **params: Any) -> Json:
    messages = [{"role": "user", "content": f"say {custom_id}"}]
    return {
        "custom_id": custom_id,
        "params": {"model": "claude-x", "max_tokens": 9, "messages": messages, **params},
    }


THREE = [message(f"m-{number}") for number in range(3)]
BATCHES = "/v1/messages/batches"


@contextmanager
def serving_anthropic(fake: AnthropicFake, version: str = OLD) -> Iterator[tuple[FakeServer, httpx.Client]]:
    with serving(fake, **{"x-api-key": fake.key, "anthropic-version": version}) as (server, client):
        del client.headers["authorization"]
        yield server, client
