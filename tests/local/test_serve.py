"""`anybatch serve` as its users meet it: a process, a port, the official SDK."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from anybatch.local import LocalTransport


class Server:
    """server(*options) starts one on a free port and returns its base URL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: list[subprocess.Popen[str]] = []

    def __call__(self, *options: str, **environment: str) -> str:
        command = [
            sys.executable,
            "-m",
            "anybatch.cli",
            "serve",
            "--port",
            "0",
            "--db",
            str(self.path),
            *options,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        self.running.append(process)
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:2] == ["anybatch", "serves"]
        return words[2]

    def peak_memory(self) -> int:
        """The most memory that the server ever had, in KB."""
        status = Path(f"/proc/{self.running[-1].pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "x.db")
    yield server
    for process in server.running:
        process.terminate()
        process.communicate(timeout=20)


def sdk(base_url: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def test_the_official_sdk_drives_it(serve, tmp_path, requests):
    with sdk(serve()) as client:
        path = tmp_path / "in.jsonl"
        path.write_bytes(requests(30, "local:echo?delay=1&fail=0.2"))
        with path.open("rb") as content:
            file = client.files.create(file=content, purpose="batch")
        assert (file.bytes, file.filename, file.status) == (path.stat().st_size, "in.jsonl", "processed")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"job": "7"},
        )
        assert (batch.status, batch.metadata) == ("validating", {"job": "7"})
        deadline = time.monotonic() + 30
        while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
            time.sleep(0.05)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.completed + batch.request_counts.failed == 30
        assert batch.usage is not None
        assert batch.usage.total_tokens > 0
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        texts = [
            client.files.content(file_id).text for file_id in (batch.output_file_id, batch.error_file_id)
        ]
        rows = [json.loads(line) for text in texts for line in text.splitlines()]
        assert {row["custom_id"] for row in rows} == {f"row-{number}" for number in range(30)}
        assert [model.id for model in client.models.list()] == ["local:echo", "local:embed"]
        assert {one.id for one in client.files.list(purpose="batch")} == {file.id}
        assert client.files.delete(file.id).deleted


def test_the_sdk_pages_and_cancels(serve, requests):
    with sdk(serve()) as client:
        file = client.files.create(file=("in.jsonl", requests(4, "local:echo?delay=60")), purpose="batch")
        ids = [
            client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            ).id
            for _ in range(7)
        ][::-1]
        assert [batch.id for batch in client.batches.list(limit=3)] == ids
        assert client.batches.cancel(ids[0]).status == "cancelling"
        with pytest.raises(openai.NotFoundError) as caught:
            client.batches.retrieve("batch_none")
        assert caught.value.request_id
        with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
            client.files.create(file=("in.txt", b"{}"), purpose="batch")


def test_server_and_transport_see_one_truth(serve, tmp_path, requests):
    with (
        sdk(serve()) as client,
        httpx.Client(base_url="http://local/v1", transport=LocalTransport(tmp_path / "x.db")) as local,
    ):
        file = client.files.create(file=("in.jsonl", requests(4)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert local.post(f"/batches/{batch.id}/cancel").json()["status"] == "cancelling"
        assert client.batches.retrieve(batch.id).status in ("cancelling", "cancelled")


def test_a_key_is_required_where_one_is_set(serve):
    base_url = serve("--api-key-env", "DOOR_KEY", DOOR_KEY="sesame")
    with sdk(base_url, "sesame") as client:
        assert list(client.batches.list()) == []
    with sdk(base_url, "thistle") as client, pytest.raises(openai.AuthenticationError):
        client.batches.list()


def test_ranges_and_odd_requests_over_http(serve):
    with httpx.Client(base_url=serve()) as client:
        file = client.post(
            "/files", files={"file": ("a.jsonl", b"0123456789")}, data={"purpose": "batch"}
        ).json()
        part = client.get(f"/files/{file['id']}/content", headers={"range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, b"234")
        assert client.put("/files").status_code == 405
        assert client.post("/files", content=b"no form").status_code == 400
        assert client.get("/nothing").json()["error"]["code"] == "unknown_url"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_upload_of_any_size_takes_constant_memory(serve, tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(b"x" * 1_000_000)
    base_url = serve()
    with httpx.Client(base_url=base_url) as client:
        client.get("/files")
    before = serve.peak_memory()
    with httpx.Client(base_url=base_url, timeout=60) as client, path.open("rb") as content:
        sent: dict[str, Any] = client.post(
            "/files", files={"file": content}, data={"purpose": "batch"}
        ).json()
        assert sent["bytes"] == 60_000_000
        with client.stream("GET", f"/files/{sent['id']}/content") as response:
            assert sum(map(len, response.iter_bytes())) == 60_000_000
    assert serve.peak_memory() - before < 30_000
