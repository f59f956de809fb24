"""What the suite is run on: a provider with its fake behind it, and one set of verbs for both clients."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anybatch import Job, Outcome, Report, get_provider, provider_names
from anybatch.local import LocalTransport
from anybatch.testing.driver import MODES as MODES
from anybatch.testing.driver import QUICK, Driver
from anybatch.testing.driver import tls as tls
from tests.fakes.anthropic import AnthropicFake
from tests.fakes.dialects import DIALECTS
from tests.fakes.mistral import MistralFake
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import Auto
from tests.fakes.rows import Quirks
from tests.fakes.server import FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from anybatch.providers.base import Provider
    from tests.fakes.provider import FakeProvider
    from tests.fakes.server import Call

PROVIDERS = tuple(name for name in provider_names() if name in {*DIALECTS, "mistral", "anthropic", "local"})
REMOTE = tuple(name for name in PROVIDERS if name != "local")
FORMATS = ("openai", "mistral", "anthropic")  # one of each shape
SHAPES = (*FORMATS, "azure", "groq", "novita", "cerebras")  # and those of OpenAI's that deviate most

MODEL = "m-1"
CHAT = "/v1/chat/completions"
ENDPOINTS = {"perplexity": "/v1/responses", "zhipu": "/v4/chat/completions"}
WINDOWS = {"novita": "48h"}


class World:
    """One provider and what stands in for it; `clients` opened in it are closed with it."""

    model = MODEL
    key: str | None = "test-key"

    def __init__(self, name: str) -> None:
        self.name = name
        self.endpoint = ENDPOINTS.get(name, CHAT)
        self.window = WINDOWS.get(name, "24h")
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    api_base: str

    def provider(self) -> Provider:
        """An account that is polled without pause."""
        provider = get_provider(self.name, api_key=self.key, api_base=self.api_base)
        provider.poll_seconds = (0.0, 0.0)
        return provider

    def open(self, mode: str, **options: Any) -> Driver:
        driver = Driver(mode, self.provider(), **{"retry": QUICK, **options})
        return self._exits.enter_context(driver)

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        """A request body of this world's endpoint."""
        if self.endpoint == "/v1/responses":
            return {"model": self.model, "input": text, **more}
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **more}

    def line(self, custom_id: str, **more: Any) -> dict[str, Any]:
        body = self.body(f"say {custom_id}", **more)
        return {"custom_id": custom_id, "method": "POST", "url": self.endpoint, "body": body}

    def write(self, path: Path, ids: Iterable[str]) -> Path:
        """An input file with one request for each id."""
        path.write_text("".join(json.dumps(self.line(one)) + "\n" for one in ids))
        return path

    def job(self, folder: Path, count: int = 8, **more: Any) -> Job:
        """A job of `count` requests row-0, row-1, … that lands in `folder`/out."""
        source = self.write(folder / "in.jsonl", row_ids(count))
        given = {"endpoint": self.endpoint, "completion_window": self.window, **more}
        return Job(input=source, output=folder / "out", **given)

    def finish(self, batch_id: str) -> None:
        """Let the provider complete a batch."""
        raise NotImplementedError

    def let_batches_end(self) -> None:
        """From now on batches complete as soon as they are looked at."""
        raise NotImplementedError


class RemoteWorld(World):
    """A provider whose wire format a fake serves."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name)
        self.fake: FakeProvider
        if name == "mistral":
            self.fake = MistralFake(key=self.key, **options)
        elif name == "anthropic":
            self.fake = AnthropicFake(key=self.key, **options)
        else:
            self.fake = OpenAIFake(DIALECTS[name], key=self.key, **options)
        self.server = self._exits.enter_context(FakeServer(self.fake))
        self.api_base = self.server.api_base
        self._before = 0

    def fresh(self) -> Self:
        """As if new, for the next test; the calls of the tests before are forgotten."""
        self.server.clear_faults()
        self.fake.auto, self.fake.quirks, self.fake.endless_list = None, Quirks(), False
        self.fake.cancel_looks = 1
        self.server.calls.clear()
        self.fake.batches.clear()
        return self

    @property
    def calls(self) -> list[Call]:
        return self.server.calls

    def finish(self, batch_id: str) -> None:
        self.fake.finish(batch_id)

    def let_batches_end(self) -> None:
        self.end_with(lambda fake, batch_id: fake.finish(batch_id))

    def end_with(self, end: Callable[[FakeProvider, str], object]) -> None:
        """From now on batches end like this as soon as they are looked at."""
        self.fake.auto = Auto(looks=1, end=end)


class LocalWorld(World):
    """The embedded provider, with a clock that the test turns."""

    model = "local:echo?delay=100"
    key = None

    def __init__(self, folder: Path) -> None:
        super().__init__("local")
        self.time = 1_700_000_000.0
        self.running = False
        self.path = folder / "local.db"
        self.api_base = f"sqlite:///{self.path}"

    def now(self) -> float:
        if self.running:
            self.time += 60.0
        return self.time

    def provider(self) -> Provider:
        provider = super().provider()
        for name in ("transport", "atransport"):
            setattr(provider, name, lambda: LocalTransport(self.path, now=self.now))
        return provider

    def fresh(self) -> Self:
        self.running = False
        return self

    def finish(self, batch_id: str) -> None:
        self.time += 200.0

    def let_batches_end(self) -> None:
        self.running = True


def open_world(name: str, folder: Path) -> RemoteWorld | LocalWorld:
    return LocalWorld(folder) if name == "local" else RemoteWorld(name)


# --- what a job has left behind ------------------------------------------------------------------------


def row_ids(count: int) -> list[str]:
    return [f"row-{number}" for number in range(count)]


@dataclass(frozen=True)
class Landed:
    """The files of a finished job; `lines` are the result lines in their order, `stray` bytes."""

    report: Report
    lines: list[dict[str, Any]]
    stray: list[bytes]

    @property
    def outcomes(self) -> dict[str, str]:
        return {line["custom_id"]: line["outcome"] for line in self.lines}

    def line(self, custom_id: str) -> dict[str, Any]:
        return next(line for line in self.lines if line["custom_id"] == custom_id)

    def text(self, custom_id: str) -> str:
        return said(self.line(custom_id)["response"]["body"])


def landed(job: Job, report: Report, ids: Iterable[str]) -> Landed:
    """The results of a job, once every row is found accounted for."""
    folder, ids = Path(job.output), list(ids)
    lines = [json.loads(raw) for raw in cut(folder / "results.jsonl")]
    assert [line["custom_id"] for line in lines] == ids, "each request once, in the order of the input"
    assert report.rows == len(ids) == sum(report.counts.values())
    tally = Counter(line["outcome"] for line in lines)
    assert {outcome: tally[outcome] for outcome in Outcome} == dict(report.counts)
    for line in lines:
        assert next(iter(line)) == "outcome"
        good = line["outcome"] == Outcome.SUCCEEDED
        assert (
            (line["response"] or {}).get("status_code") == 200 if good else line["error"] or line["response"]
        )
        assert not (good and line["error"])
    assert report == job.report()
    assert report.ok == all(line["outcome"] == Outcome.SUCCEEDED for line in lines)
    stray = cut(folder / "stray.jsonl") if (folder / "stray.jsonl").exists() else []
    kept = {"ids.jsonl", "job.json", "report.json", "results.jsonl", *(["stray.jsonl"] if stray else [])}
    kept |= {f"ids-{number}.jsonl" for number in range(2, report.rounds + 1)}
    names = {path.name for path in folder.iterdir()} - {".lock"}
    names -= {"requests.jsonl"}  # of requests given as objects
    assert names == kept, "nothing temporary is left"
    return Landed(report, lines, stray)


def cut(path: Path) -> list[bytes]:
    """The lines of a file, cut at the newline byte alone."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return data.split(b"\n")[:-1]


def said(body: dict[str, Any]) -> str:
    """What the stand-in model answered, from a chat completion or a response."""
    if body.get("object") == "response":
        text = body["output"][0]["content"][0]["text"]
    else:
        text = body["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text
