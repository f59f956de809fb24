"""Jobs in the storm: what each row is to go through, the provider that puts it through that, and its record.

A job's rows have a plan: the outcome of each purchase, in order. The provider plays the plan, and afterwards
its record must be that plan: fewer purchases would be rows lost, more would be rows paid for twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

from anybatch import Client, Job, Outcome
from anybatch.models import BatchStatus
from tests.exactly_once.stage import requests, tls, write
from tests.exactly_once.weather import Gust, StormServer, Strike, Weather
from tests.fakes.anthropic import AnthropicFake
from tests.fakes.mistral import MistralFake
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import DEAD, Auto, FakeBatch, FakeProvider
from tests.fakes.rows import Failure, Fate, Quirks

ROOT = Path(__file__).parents[2]
LEASE = 0.3
DRAFT = "draft"  # what the ids of the other input begin with
SPOILED = "spoiled"  # the file in which attempts note what was spoiled for them
FAKES: dict[str, Callable[..., FakeProvider]] = {
    "openai": OpenAIFake, "mistral": MistralFake, "anthropic": AnthropicFake,
}  # fmt: skip
PASSING = Failure(500, "server_error", "The server had an error.", "server_error")
FINAL = Failure()

Plan = dict[str, list[Fate]]


@dataclass(frozen=True)
class Bought:
    """A batch on the provider's record: whether it runs, its rows, and their outcomes once it has ended."""

    id: str
    runs: bool
    rows: list[str]
    fates: dict[str, str]

    @property
    def is_draft(self) -> bool:
        return self.rows[0].startswith(DRAFT)


class Keeper:
    """Where attempts come from, one at a time. They can be killed from any thread."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._running: int | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.exactly_once.storm_child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self._home)},  # what the killed leave there goes with the rest
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(70)  # an attempt ends by itself

    def start(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        process = int(self._heard())
        with self._lock:
            self._running = process

    def kill(self) -> None:
        """Kill the attempt that is under way, if one is."""
        with self._lock:
            if self._running is not None:
                os.kill(self._running, signal.SIGKILL)

    def ended(self) -> str:
        """How the attempt ended, once it has: an exit status, or the name of a signal."""
        how = str(self._heard())
        with self._lock:
            self._running = None
        return how

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that attempts come from has died"
        return json.loads(line)


class World(ABC):
    """One job at one provider, and what was begun there before with other input."""

    weather: Weather | None = None  # those of a provider in this process
    server: StormServer | None = None

    def __init__(self, name: str, home: Path, random: Random, spoiled: Counter[str]) -> None:
        self.name, self.home, self.random, self.spoiled = name, home, random, spoiled
        self.rows = [f"row-{number}" for number in range(random.randrange(6, 15))]
        self.shard_requests = random.randrange(2, 5)
        self.model = self.draft_model = "m-1"
        self.key, self.api_base = "none", ""
        self.say = f"say {random.randrange(1000)}"
        self.has_draft = random.random() < 0.3  # other input, which the job's own replaces
        self.as_objects = random.random() < 0.3
        self._exits = ExitStack()
        home.mkdir()

    @abstractmethod
    def client(self) -> Client:
        """One that looks on from outside, in good weather."""

    @abstractmethod
    def record(self) -> list[Bought]:
        """Every batch ever created, in that order, but those that a person has cancelled."""

    @abstractmethod
    def check_purchases(self, row: str, outcomes: list[str]) -> None:
        """That a row was bought as often as its outcomes require, and no more."""

    def close(self) -> None:
        self._exits.close()

    def brew(self, strike: Strike | None, gust: Gust | None, calm: set[str]) -> None:
        """The weather of the next attempt."""
        if self.weather is not None:
            self.weather.strike, self.weather.gust, self.weather.calm = strike, gust, calm

    def settle(self) -> None:
        """Wait until all that has arrived was dealt with."""
        if self.server is not None:
            self.server.settle()

    def requests(self) -> int:
        """How many requests have arrived so far."""
        return self.server.count() if self.server is not None else 0

    def terms(self, *, draft: bool = False, on_orphan: str = "fail") -> dict[str, Any]:
        """What the job is made with."""
        lines, path = requests(self.model, len(self.rows), self.say), self.home / "in.jsonl"
        if draft:
            drafts = enumerate(requests(self.draft_model, 4, "a draft"))
            lines = [{**line, "custom_id": f"{DRAFT}-{number}"} for number, line in drafts]
            path = self.home / "draft.jsonl"
        return {
            "input": lines if self.as_objects else str(write(path, lines)),
            "output": str(self.home / "out"),
            "lease": LEASE,
            "max_rounds": 2,
            "shard_requests": self.shard_requests,
            "on_orphan": on_orphan,
        }

    def job(self) -> Job:
        return Job(**self.terms())

    def answer(self, row: str) -> str:
        """How the answer to a row begins."""
        return f"{self.say} {row.removeprefix('row-')}"


class Remote(World):
    """A fake server in this process.

    A batch ends at some retrieve of it, as its rows' plans say. What the listing alone shows goes on running,
    so that a person can cancel it.
    """

    weather: Weather
    server: StormServer

    def __init__(
        self, name: str, home: Path, random: Random, spoiled: Counter[str], kill: Callable[[], None]
    ) -> None:
        super().__init__(name, home, random, spoiled)
        self.answered: defaultdict[str, list[Fate]] = defaultdict(list)
        self.cancelled: list[str] = []  # by a person
        self.plan, self.final = self._plan()
        auto = Auto(looks=1, end=lambda _, batch_id: self._end(batch_id))
        self.fake = FAKES[name](auto=auto, quirks=Quirks(shuffled=True))
        self.weather = Weather(self.fake, Random(random.random()), kill, self._note)
        self.server = self._exits.enter_context(StormServer(self.weather))
        self.key, self.api_base = self.fake.key, self.server.api_base

    def _note(self, what: str) -> None:
        self.spoiled[what] += 1

    def client(self) -> Client:
        self.weather.rate = 0.0
        return Client(self.name, api_key=self.key, api_base=self.api_base, client_args={"verify": tls()})

    def answer(self, row: str) -> str:
        return f"echo: {super().answer(row)}"

    # what becomes of the rows

    def _plan(self) -> tuple[Plan, set[str]]:
        """The outcomes of each row's purchases, by shards; and the rows whose failure is final."""
        plan: Plan = {}
        final: set[str] = set()
        for start in range(0, len(self.rows), self.shard_requests):
            shard = self.rows[start : start + self.shard_requests]
            bad = {row for row in shard if self.random.random() < 0.5} or {shard[0]}
            ending = self.random.choice(("whole", "passing", "final", "expired", "expired", "cancelled"))
            fate = {"passing": Fate.FAILED, "final": Fate.FAILED}.get(ending)
            for row in shard:
                if ending == "whole" or row not in bad:
                    plan[row] = [Fate.SUCCEEDED]
                elif ending == "final":
                    plan[row] = [Fate.FAILED]
                    final.add(row)
                else:
                    plan[row] = [fate or Fate(ending), self._second(ending)]
        return plan, final

    def _second(self, ending: str) -> Fate:
        # Rounds for cancelled rows alone do not count: one that failed in it would go a third time.
        if ending == "cancelled" or self.random.random() < 0.7:
            return Fate.SUCCEEDED
        return self.random.choice((Fate.FAILED, Fate.EXPIRED))

    def _end(self, batch_id: str) -> None:
        """End a batch that is retrieved, sooner or later, as its rows' plans say."""
        batch, asked = self.fake.batches[batch_id], self.weather.asked
        assert asked is not None
        if asked.segments[-1] != batch_id or batch.ids[0].startswith(DRAFT) or self.random.random() < 0.4:
            return
        fates = {}
        for row in batch.ids:
            due, been = self.plan[row], len(self.answered[row])
            fates[row] = due[min(been, len(due) - 1)]  # bought too often: found out in the end
            self.answered[row].append(fates[row])
        done = [row for row, fate in fates.items() if fate in (Fate.SUCCEEDED, Fate.FAILED)]
        failed = [row for row, fate in fates.items() if fate is Fate.FAILED]
        if Fate.EXPIRED in fates.values():
            self.fake.expire(batch_id, done=done, failed=failed)
        elif Fate.CANCELLED in fates.values():
            self.fake.cancel_now(batch_id, done=done, failed=failed)
        else:
            failure = FINAL if self.final.intersection(failed) else PASSING
            self.fake.finish(batch_id, failed=failed, failure=failure)

    # the record

    def record(self) -> list[Bought]:
        return [
            Bought(batch.id, batch.is_live and not batch.is_terminal, self._rows_of(batch), _fates(batch))
            for batch in self.fake.batches.values()
            if batch.id not in self.cancelled
        ]

    def _rows_of(self, batch: FakeBatch) -> list[str]:
        return [row for row, _ in self.fake.requests(batch)]

    def check_purchases(self, row: str, outcomes: list[str]) -> None:
        assert outcomes == [str(fate) for fate in self.plan[row]], f"{row} was to be {self.plan[row]}"

    def do_as_told(self, error: str) -> bool:
        """What an OrphanError tells a person to do: find the batch, and cancel it. Whether that was possible.

        Where the error could not read the list of batches it names none, and there is nothing to go by yet.
        """
        ledger = self.job().ledger()
        assert ledger is not None
        shards = [shard for one in (ledger, *ledger.replaced) for shard in one.shards]
        known = {shard.batch_id for shard in shards}
        orphans = [
            batch.id
            for batch in list(self.fake.batches.values())
            if batch.state not in DEAD and batch.id not in known
        ]
        doubts = [shard for shard in shards if shard.tries and shard.batch_id is None]
        assert len(orphans) <= len(doubts), f"more than was in doubt: {orphans}"
        if orphans and "could not be read" in error:
            return False
        for batch_id in orphans:
            assert batch_id in error, f"{batch_id} is not named: {error}"
            self.fake.cancel_now(batch_id)
            self.cancelled.append(batch_id)
        return True


def _fates(batch: FakeBatch) -> dict[str, str]:
    return {row: str(fate) for row, fate in batch.fates.items()}


class Local(World):
    """The embedded provider: its SQLite file, whose model decides about the rows."""

    def __init__(self, name: str, home: Path, random: Random, spoiled: Counter[str]) -> None:
        super().__init__(name, home, random, spoiled)
        # A batch that has completed without any row would be taken for one whose results are still to come.
        bad = random.choice(("expire=0.4", "expire=0.2&missing=0.15"))
        delay, seed = random.uniform(0.05, 0.3), random.randrange(1000)
        outage = f"&outage=0..{random.uniform(0.01, 0.08):.2f}" if random.random() < 0.3 else ""
        self.model = f"local:echo?delay={delay:.2f}&fail=0.15&{bad}&seed={seed}{outage}"
        self.draft_model = "local:echo?delay=600"
        self.api_base = f"sqlite://{home / 'local.db'}"
        self._exits.callback(self._count_spoiled)

    def _count_spoiled(self) -> None:
        """What the attempts have noted: the weather is inside their processes."""
        if (seen := self.home / SPOILED).exists():
            self.spoiled.update(seen.read_text().splitlines())

    def client(self) -> Client:
        return Client("local", api_base=self.api_base)

    def record(self) -> list[Bought]:
        with self.client() as client:
            found, page = [], client.list(limit=100)
            assert not page.has_more
            for batch in reversed(page):
                running = not batch.status.is_terminal and batch.status is not BatchStatus.CANCELLING
                assert batch.input_file_id is not None
                lines = (self.home / "local.db.files" / batch.input_file_id).read_bytes().splitlines()
                unseen = "expired" if batch.status is BatchStatus.EXPIRED else "missing"
                rows = [str(json.loads(line)["custom_id"]) for line in lines]
                fates = dict.fromkeys(rows, unseen)
                if batch.status.is_terminal:
                    fates |= {row.custom_id: _outcome(row) for row in client.results(batch.id)}
                found.append(Bought(batch.id, running, rows, fates))
        return found

    def check_purchases(self, row: str, outcomes: list[str]) -> None:
        final = {"succeeded", "refused"}
        *before, last = outcomes
        assert not final.intersection(before), f"{row} needed no more after the first of {outcomes}"
        assert last in final or len(outcomes) == 2, f"{row} was to go again: {outcomes}"


def _outcome(row: Any) -> str:
    return "refused" if row.outcome is Outcome.FAILED and row.status_code == 400 else str(row.outcome)


# Which requests are struck, and up to which one of them in an attempt.
STRUCK: tuple[tuple[str | None, int], ...] = (
    (None, 30), ("upload", 4), ("create", 4), ("create", 4), ("retrieve", 12), ("list", 6), ("download", 8),
)  # fmt: skip


def strike_of(random: Random) -> tuple[Strike | None, int, float | None]:
    """At which request to kill, or before which write, or after how many seconds."""
    how = random.random()
    if how < 0.25:
        return None, random.randrange(1, 160), None
    if how < 0.45:
        return None, 0, random.uniform(0.0, 0.6)
    kind, most = random.choice(STRUCK)
    where = random.choice(("arrived", "handled"))
    delay = random.choice((0.0, 0.0, random.uniform(0.001, 0.03)))
    drop = where == "arrived" and not delay and random.random() < 0.5
    return Strike(where, kind, random.randrange(1, most + 1), delay, drop), 0, None


def open_world(
    name: str, home: Path, random: Random, spoiled: Counter[str], kill: Callable[[], None]
) -> World:
    if name == "local":
        return Local(name, home, random, spoiled)
    return Remote(name, home, random, spoiled, kill)


def landed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]
