"""A job, a provider that keeps a record of what it was asked, and what must be true of both in the end."""

from __future__ import annotations

import json
import ssl
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anybatch import AsyncClient, Client, Job, Outcome, Report, RetryPolicy, get_provider
from anybatch.models import BatchStatus
from anybatch.providers.base import Limits
from tests.fakes.anthropic import AnthropicFake
from tests.fakes.mistral import MistralFake
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import Auto
from tests.fakes.proxy import FaultProxy
from tests.fakes.rows import Fate, Quirks
from tests.fakes.server import FakeServer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from anybatch.providers.base import Provider
    from tests.fakes.provider import FakeProvider

FINDABLE = ("openai", "mistral")  # remote formats whose batches can be looked up
JOBS = {"openai": "/v1/batches", "mistral": "/v1/batch/jobs", "anthropic": "/v1/messages/batches"}
ROWS = 6
LOOKS = (0.01, 0.05, 0.2)  # the pauses before a lost create is looked for, seconds
POLL = 0.02
QUICK = RetryPolicy(attempts=4, first_delay=0.001, longest_delay=0.005)
MODEL = {"local": "local:echo?delay=0.05"}
_DEAD = {BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED, BatchStatus.CANCELLING}


@cache
def tls() -> ssl.SSLContext:
    """One context for all clients: making it is most of what opening a client costs."""
    return ssl.create_default_context()


def requests(model: str, rows: int = ROWS, say: str = "hello") -> list[dict[str, Any]]:
    """Request lines row-0, row-1, …"""
    return [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": f"{say} {number}"}]},
        }
        for number in range(rows)
    ]


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Stage:
    """One provider, remote or local, and a folder for a job's input and output.

    Remote batches end at the first look at them, with the first `failed` rows in an error file; unless `ends`
    is False, then `finish` ends them. Those of the first round expire with `done` rows answered, if that is
    given. A job of ROWS rows takes `shards` batches.
    """

    def __init__(
        self,
        name: str,
        home: Path,
        *,
        ends: bool = True,
        failed: int = 0,
        done: int | None = None,
        shards: int = 1,
        proxy: bool = False,
    ) -> None:
        self.name, self.home, self.failed, self.done, self.shards = name, home, failed, done, shards
        self.model = MODEL.get(name, "m-1")
        self.input = write(home / "in.jsonl", requests(self.model))
        self._exits = ExitStack()
        self.proxy: FaultProxy | None = None
        if name == "local":
            self.api_base = f"sqlite://{home / 'local.db'}"
            return
        makes: dict[str, type[FakeProvider]] = {
            "openai": OpenAIFake, "mistral": MistralFake, "anthropic": AnthropicFake,
        }  # fmt: skip
        auto = Auto(looks=1, end=lambda fake, batch_id: self._end(batch_id))
        self.fake = makes[name](auto=auto if ends else None, quirks=Quirks(shuffled=True))
        self.server = self._exits.enter_context(FakeServer(self.fake))
        self.api_base = self.server.api_base
        if proxy:
            self.proxy = self._exits.enter_context(FaultProxy(self.server.api_base))
            self.api_base = self.proxy.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    @property
    def jobs(self) -> str:
        """The path that batches are created at and listed from."""
        return JOBS[self.name]

    @property
    def key(self) -> str | None:
        return None if self.name == "local" else self.fake.key

    def provider(self) -> Provider:
        provider = get_provider(self.name, api_key=self.key, api_base=self.api_base)
        provider.poll_seconds = (0.05, 0.05)
        provider.limits = Limits(requests=ROWS // self.shards)
        return provider

    def client(self, *, retry: RetryPolicy = QUICK, timeout: float = 10.0) -> Client:
        return Client(self.provider(), retry=retry, client_args={"verify": tls(), "timeout": timeout})

    def aclient(self, *, retry: RetryPolicy = QUICK, timeout: float = 10.0) -> AsyncClient:
        return AsyncClient(self.provider(), retry=retry, client_args={"verify": tls(), "timeout": timeout})

    def job(self, **more: Any) -> Job:
        return Job(**{"input": self.input, "output": self.home / "out", "lease": 0.3, **more})

    def run(self, job: Job | None = None) -> Report:
        """One undisturbed attempt, as a new process would make it."""
        with self.client() as client:
            return client.run(job or self.job(), timeout=30)

    # the provider's record

    def batches(self) -> dict[str, bool]:
        """Every batch ever created, and whether somebody pays for it."""
        if self.name != "local":
            return {batch.id: batch.is_live for batch in self.fake.batches.values()}
        with self.client() as client:
            return {batch.id: batch.status not in _DEAD for batch in client.list(limit=100)}

    def live(self) -> list[str]:
        return [batch_id for batch_id, live in self.batches().items() if live]

    def posts(self) -> int:
        return self.server.count("POST")

    def finish(self) -> None:
        """Complete every batch that is still running."""
        for batch in list(self.fake.batches.values()):
            if not batch.is_terminal and batch.is_live:
                self._end(batch.id)

    def _end(self, batch_id: str) -> None:
        first = (self.fake.batches[batch_id].metadata or {}).get("anybatch_round") == "1"
        if self.done is not None and first:
            self.fake.expire(batch_id, done=self.done)
        else:
            self.fake.finish(batch_id, failed=self.failed)

    # what must be true

    def check(
        self, report: Report, job: Job | None = None, *, created: int | None = 1, rows: int = ROWS
    ) -> None:
        """One live batch a shard, `created` times as many in all; each row once; and again costs nothing."""
        job = job or self.job()
        batches, live = self.batches(), self.live()
        assert len(live) == self.shards, f"live: {live} of {batches}"
        if created is not None:
            assert len(batches) == created * self.shards, f"created: {batches}"
        assert sorted(batch.id for batch in report.batches) == sorted(live)
        check_results(job, report, rows, self.failed)
        before = self._asked()
        assert self.run(job) == report
        assert self.batches() == batches
        assert self.name == "local" or self._asked() == before, "a landed job needs no request"

    def _asked(self) -> int:
        """How many requests clients have made; a proxy forwards a stalled one long after."""
        if self.proxy is not None:
            return len(self.proxy.requests)
        return self.server.count() if self.name != "local" else 0

    def check_rounds(self, report: Report, rows: Sequence[int], job: Job | None = None) -> None:
        """Batches of so many rows were created, no other; each row was answered once, and landed."""
        job = job or self.job()
        batches = list(self.fake.batches.values())
        assert [len(batch.ids) for batch in batches] == list(rows), [batch.metadata for batch in batches]
        assert all(batch.is_terminal for batch in batches)
        assert [batch.id for batch in report.batches] == [batch.id for batch in batches]
        answered = [one for batch in batches for one, fate in batch.fates.items() if fate is Fate.SUCCEEDED]
        assert sorted(answered) == [f"row-{number}" for number in range(ROWS)]
        check_results(job, report, kept={f"ids-{number}.jsonl" for number in range(2, report.rounds + 1)})
        before = self.server.count()
        assert self.run(job) == report
        assert self.server.count() == before, "a landed job needs no request"


def check_results(
    job: Job, report: Report, rows: int = ROWS, failed: int = 0, kept: Set[str] = frozenset()
) -> None:
    """All rows, each once, in input order; and no more files than there should be."""
    folder = job.folder
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"row-{number}" for number in range(rows)]
    outcomes = [Outcome.FAILED] * failed + [Outcome.SUCCEEDED] * (rows - failed)
    assert [line["outcome"] for line in lines] == outcomes
    assert report.rows == rows
    assert (report.counts[Outcome.FAILED], report.counts[Outcome.SUCCEEDED]) == (failed, rows - failed)
    assert (report.ok, report.unexpected) == (not failed, 0)
    assert job.report() == report
    names = {path.name for path in folder.path.iterdir()} - {"requests.jsonl", ".lock"}
    assert names == {"job.json", "ids.jsonl", "results.jsonl", "report.json", *kept}
