"""What is sent, held against the providers' own OpenAPI documents."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import Job
from tests.fakes.rows import Quirks
from tests.fakes.specs import load_spec

from .test_anthropic import RICH, native_file
from .world import Driver, RemoteWorld, row_ids

if TYPE_CHECKING:
    from pathlib import Path

# Groq documents its paging by cursor in prose only.
EXTRA_QUERY = {"groq": {"limit", "cursor"}}
METADATA = {"openai": {"team": "a"}, "groq": {"team": "a"}, "mistral": {"team": "a"}, "anthropic": {}}
OPTIONS: dict[str, dict[str, Any]] = {
    "openai": {
        "input_expires_after": {"anchor": "created_at", "seconds": 86400},
        "output_expires_after": {"anchor": "created_at", "seconds": 86400},
    },
    "mistral": {"timeout_hours": 48},
}
LIST_OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {
        "status": ["QUEUED", "RUNNING"],
        "model": "m-1",
        "created_by_me": True,
        "metadata": {"team": "a"},
    }
}

specified = pytest.mark.parametrize(
    "shared_world", ["openai", "groq", "mistral", "anthropic"], indirect=True, scope="module"
)


@specified
def test_every_request_is_one_the_provider_describes(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """All verbs, with all they can carry: no request and no header, query or body that is not described."""
    spec = load_spec(world.name)
    source = world.write(tmp_path / "in.jsonl", row_ids(3))
    more: dict[str, Any] = OPTIONS.get(world.name, {})
    if METADATA[world.name]:
        more = {**more, "metadata": METADATA[world.name]}
    batch = driver.create(source, world.endpoint, **more)
    driver.retrieve(batch.id)
    driver.cancel(batch.id)
    for _ in range(3):
        driver.submit(Job(input=source, output=tmp_path / f"job-{_}", options=OPTIONS.get(world.name, {})))
    page = driver.list(limit=2)
    driver.list(after=page.next_cursor, limit=2)
    driver.list(**LIST_OPTIONS.get(world.name, {}))
    driver.check()
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=1, quirks=Quirks()))
    report = driver.run(world.job(tmp_path), timeout=10)
    driver.download(report.batches[0].id, tmp_path / "files")
    assert {call.status for call in world.calls} == {200}
    assert spec.problems(world.calls, extra_query=EXTRA_QUERY.get(world.name, set())) == []


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_translated_and_native_messages(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    spec = load_spec("anthropic")
    line = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": RICH}
    driver.submit(Job(input=[line], output=tmp_path / "chat"))
    driver.create(native_file(tmp_path / "in.jsonl"), "/v1/messages")
    assert world.server.count("POST", ".*/batches") == 2
    assert spec.problems(world.calls) == []


@pytest.mark.parametrize("shared_world", ["groq"], indirect=True, scope="module")
def test_lines_in_and_out(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Groq's document also describes the lines of both files; landed lines are such with one more member."""
    spec = load_spec("groq")
    world.end_with(lambda fake, batch_id: fake.expire(batch_id, done=3))
    report = driver.run(world.job(tmp_path, count=4), timeout=10)
    (batch,) = report.batches
    for raw in world.fake.files[batch.input_file_id].data.splitlines():
        assert spec.schema_problems("BatchRequestInput", json.loads(raw)) == []
    for raw in (tmp_path / "out" / "results.jsonl").read_bytes().splitlines():
        line = json.loads(raw)
        assert line.pop("outcome") in ("succeeded", "expired")
        assert spec.schema_problems("BatchRequestOutput", line) == []
