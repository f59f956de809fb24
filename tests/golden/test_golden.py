"""A job folder that was written before reads and lands the same, whatever has moved since."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from anybatch import Client, Job
from tests.golden.record import HERE, JOB

FORMATS = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name[0].isalpha())
# What a report says of the moment and the place of landing.
VARIES = {"finished_at", "duration_s", "results"}


def replay(answers: list[dict[str, object]]) -> Callable[[httpx.Request], httpx.Response]:
    """The provider's recorded answers: the last one for each request."""
    known = {(str(one["method"]), str(one["path"])): one for one in answers}

    def serve(request: httpx.Request) -> httpx.Response:
        answer = known[request.method, request.url.path]
        return httpx.Response(int(str(answer["status"])), content=str(answer["body"]))

    return serve


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_of_an_earlier_version_lands_the_same(name: str, tmp_path: Path) -> None:
    golden, folder = HERE / name, tmp_path / "out"
    shutil.copytree(golden / "before", folder)
    answers = json.loads((golden / "answers.json").read_text())
    transport = httpx.MockTransport(replay(answers))
    api_base = json.loads((folder / "job.json").read_text())["api_base"]
    with Client(name, api_key="test-key", api_base=api_base, client_args={"transport": transport}) as client:
        job = Job(input=(), output=folder, id=JOB, max_rounds=2)
        ledger = job.ledger()
        assert ledger is not None
        assert [record.step for record in ledger.shards] == ["created"] * len(ledger.shards)
        client.collect(job)
    names = {path.name for path in (golden / "after").iterdir()}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    for one in names - {"report.json", "job.json"}:
        assert lines(folder / one) == lines(golden / "after" / one), one
    assert settled(folder / "report.json") == settled(golden / "after" / "report.json")
    noted, before = (settled(one / "job.json", "landed_at") for one in (folder, golden / "after"))
    assert noted == extended(before, noted)


def extended(known: object, noted: object) -> object:
    """What was known, with the members that were noted of it since: a ledger may have learned more."""
    if isinstance(known, dict) and isinstance(noted, dict):
        return noted | {name: extended(part, noted.get(name)) for name, part in known.items()}
    if isinstance(known, list) and isinstance(noted, list) and len(known) == len(noted):
        return [extended(*pair) for pair in zip(known, noted, strict=True)]
    return known


def lines(path: Path) -> bytes:
    """A file, without the moment in which a body was translated, which stands in for its creation."""
    return re.sub(rb'"created":\d+', b'"created":0', path.read_bytes())


def settled(path: Path, *also: str) -> dict[str, object]:
    value: dict[str, object] = json.loads(path.read_text())
    return {name: part for name, part in value.items() if name not in {*VARIES, *also}}


def test_there_is_one_for_each_wire_format() -> None:
    assert FORMATS == ["anthropic", "mistral", "openai"]
