"""A local provider with a clock that tests turn by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from anybatch.local import LocalTransport


class Clock:
    """Unix time that moves only when told."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


class Desk:
    """The few calls that most tests make of the provider, over a synchronous client."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.clock = clock
        self.client = httpx.Client(base_url="http://local/v1", transport=LocalTransport(path, now=clock))

    def upload(self, content: bytes, name: str = "in.jsonl", purpose: str = "batch") -> httpx.Response:
        return self.client.post("/files", files={"file": (name, content)}, data={"purpose": purpose})

    def create(self, content: bytes, endpoint: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
        file_id = self.upload(content).json()["id"]
        asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"} | more
        response = self.client.post("/batches", json=asked)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def look(self, batch_id: str, after: float = 0.0) -> dict[str, Any]:
        """The batch `after` seconds from now."""
        self.clock.time += after
        response = self.client.get(f"/batches/{batch_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def lines(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """A result file's lines by custom_id."""
        if file_id is None:
            return {}
        content = self.client.get(f"/files/{file_id}/content").content
        found = [json.loads(line) for line in content.splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> Iterator[Desk]:
    desk = Desk(tmp_path / "local.db", clock)
    yield desk
    desk.client.close()


@pytest.fixture
def requests() -> Callable[..., bytes]:
    """requests(count, model, **body) -> JSONL of chat requests with custom_ids row-0, row-1, …"""

    def build(
        count: int, model: str = "local:echo?delay=10", url: str = "/v1/chat/completions", **body: Any
    ) -> bytes:
        lines = []
        for number in range(count):
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": f"please judge number {number}"}],
            }
            line = {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body or asked}
            line["body"] = asked | body if url == "/v1/chat/completions" else {"model": model} | body
            lines.append(json.dumps(line).encode() + b"\n")
        return b"".join(lines)

    return build
