"""Proof by exhaustion: two attempts in every order, each dying at any step, then a third that is left alone.

Here an attempt is the product's own flow, taken effect by effect, on a clock that moves only when somebody
sleeps; so a process that is stopped for any length of time is among the orders. After every state that two
attempts can reach, a third attempt must come to exactly one live batch, the one in the ledger.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from upath import UPath

from anybatch import Job, get_provider
from anybatch.flow import Do, Flow, Sleep
from anybatch.jobs import shard as shards
from anybatch.jobs.inputs import prepare
from anybatch.jobs.job import job_metadata
from anybatch.jobs.ledger import Ledger, Step
from anybatch.jobs.rounds import records_of
from anybatch.jobs.shard import Submission
from anybatch.jobs.submit import new_ledger, resume, stop, submit
from anybatch.providers import base
from anybatch.rows.requests import Plan
from tests.exactly_once.explore import Findings, explore
from tests.exactly_once.stage import requests, write
from tests.exactly_once.worlds import LEASE, START, Clock, World
from tests.fakes.openai import OpenAIFake

PRINT = "fingerprint"
T = TypeVar("T")


def is_create(request: httpx.Request) -> bool:
    return request.method == "POST" and request.url.path == "/v1/batches"


class Model:
    """Makes worlds in which attempts A and B have just begun, and lets a third one finish."""

    def __init__(self, home: Path, clock: Clock, step: Step | None, *, store: bool = False) -> None:
        """`step` is where the shard stands at first; None: there is no ledger yet, and attempts submit."""
        self.home, self.clock, self.step, self.store = home, clock, step, store
        self.provider = get_provider("openai", api_key="test-key", api_base="http://provider/v1")
        self.inputs = [write(home / f"{n}.jsonl", requests("m", n)) for n in (2, 3)]
        self.job = Job(input=self.inputs[0], output=home / "none", id="job", lease=LEASE)
        self.plan = made(prepare(self.job, self.provider, home))
        self.metadata = job_metadata(self.job, self.provider)
        self._places: list[tuple[Path | UPath, World | None]] = []
        self._jobs: dict[tuple[Path | UPath, int, int], Job] = {}

    def open(self, second: int = 0) -> World:
        """A new world; B has input number `second`, A the first."""
        self.clock.now = START
        fake = OpenAIFake(clock=self.clock)
        fake.cancel_looks = None  # to look changes nothing
        key = ("authorization", f"Bearer {fake.key}")
        number, place = self._free_place()
        world = World(fake, self.clock, place, key, is_create, torn_commits=self.store)
        self._places[number] = place, world
        if self.step is not None:
            self._write_ledger(world)
        self.begin(world, "A")
        self.begin(world, "B", second)
        return world

    def _free_place(self) -> tuple[int, Path | UPath]:
        """Folders are used again: there are thousands of worlds, but only few at a time."""
        for number, (place, world) in enumerate(self._places):
            if world is None or world.closed:
                return number, place
        number = len(self._places)
        place = UPath(f"memory://model/{number}") if self.store else self.home / f"w{number}"
        self._places.append((place, None))
        return number, place

    def job_in(self, world: World, number: int = 0, max_rounds: int = 1) -> Job:
        key = world.folder, number, max_rounds
        if key not in self._jobs:
            self._jobs[key] = replace(
                self.job, output=world.folder, input=self.inputs[number], max_rounds=max_rounds
            )
        return self._jobs[key]

    def _write_ledger(self, world: World) -> None:
        ledger = new_ledger(self.job, self.provider, self.plan, PRINT)
        if self.step is Step.UPLOADED:
            file = world.fake._store_file("in.jsonl", "batch", self.inputs[0].read_bytes())  # type: ignore[attr-defined]
            ledger = ledger.with_shard(
                ledger.shards[0].model_copy(update={"step": Step.UPLOADED, "file_id": file.id})
            )
        world.folder.mkdir(parents=True)
        self.job_in(world).folder.replace("job.json", ledger.model_dump_json().encode())

    def begin(self, world: World, name: str, number: int = 0) -> Any:
        job = self.job_in(world, number)
        if self.step is None:
            attempt = world.begin(name, submit(job, self.provider))
            world.step((name, "go"))  # reading the input concerns nobody else
            return attempt
        shard = records_of(self.plan)[0]
        submission = Submission(job, self.provider, self.plan_of, shard, self.metadata, name, PRINT)
        return world.begin(name, submission.run())

    def plan_of(self, ledger: Ledger, number: int) -> Flow[Plan]:
        assert number == 0
        return self.plan
        yield

    def read(self, world: World) -> Ledger | None:
        return self.job_in(world).folder.read()

    def check(self, world: World, number: int = 0) -> None:
        """A third attempt, left alone, comes to the one live batch."""
        ended = [attempt for attempt in world.attempts.values() if attempt.returned is not None]
        live = [batch.id for batch in world.fake.live_batches()]
        if len(ended) == len(world.attempts) and not world.faults and self.same:
            assert {_id_of(attempt.returned) for attempt in ended} == set(live), "both have one batch"
        third = world.run(self.begin(world, "C", number))
        assert third.raised is None, repr(third.raised)
        live = [batch.id for batch in world.fake.live_batches()]
        states = {batch.id: str(batch.state) for batch in world.fake.batches.values()}
        assert [_id_of(third.returned)] == live, states
        assert len(states) <= self.most, states
        ledger = self.read(world)
        assert ledger is not None
        assert [record.batch_id for record in ledger.current] == live
        assert world.fake.batches[live[0]].input_file_id == ledger.current[0].file_id

    same = True  # both attempts have the same input
    most = 3  # batches that may ever be created


def made(value: T | None) -> T:
    assert value is not None
    return value


class ModelOfRounds(Model):
    """Attempts A and B have both read the results of a batch that expired, and are about to open a round."""

    def begin(self, world: World, name: str, number: int = 0) -> Any:
        job = self.job_in(world, max_rounds=2)
        if name == "A":
            first = world.run(world.begin("first", submit(job, self.provider)))
            world.fake.expire(first.returned[0].id, done=1)
            ledger = made(self.read(world))
            shard = ledger.shards[0].model_copy(update={"attempt": "first"})
            job.folder.replace("job.json", ledger.with_shard(shard).model_dump_json().encode())
            world.attempts.clear()
            world.marks.clear()
        if name == "C":
            return world.begin(name, submit(job, self.provider))
        attempt = world.begin(name, resume(job, self.provider))
        while not is_commit(attempt.effect):  # until then it only reads
            world.step((name, "go"))
        return attempt


class ModelOfStop(Model):
    """Attempt A submits, B stops the job; whatever becomes of both, to stop it again leaves nothing alive."""

    def begin(self, world: World, name: str, number: int = 0) -> Any:
        if name == "A":
            return super().begin(world, name, number)
        return world.begin(name, stop(self.job_in(world, number), self.provider))

    def check(self, world: World, number: int = 0) -> None:
        if all(attempt.returned is not None for attempt in world.attempts.values()) and not world.faults:
            live = world.fake.live_batches()
            assert not live or self.read(world) is None, "both have ended undisturbed"
        third = world.run(self.begin(world, "C", number))
        assert third.raised is None, repr(third.raised)
        states = {batch.id: str(batch.state) for batch in world.fake.batches.values()}
        assert not world.fake.live_batches(), states
        assert len(states) <= self.most, states
        ledger = made(self.read(world))
        assert ledger.stopped_at is not None
        assert _ids_of(third.returned) == ledger.batch_ids


def _ids_of(returned: Any) -> list[str]:
    return [batch.id for batch in returned]


def is_commit(effect: Any) -> bool:
    function = getattr(effect.function, "func", None) if isinstance(effect, Do) else None
    return getattr(function, "__name__", None) == "commit"


def _id_of(returned: Any) -> str:
    batch = returned[0] if isinstance(returned, list) else returned
    return str(batch.id)


def fair(world: World, step: tuple[str, str]) -> bool:
    """No time passes while another attempt is creating or writing: nobody is stopped for a whole lease."""
    name, kind = step
    sleeper = world.attempts[name]
    if kind != "go" or not isinstance(sleeper.effect, Sleep):
        return True
    return not any(
        (other.has_claim or other.is_writing)
        and not (isinstance(other.effect, Sleep) and other.wake >= sleeper.wake)
        for other in world.attempts.values()
        if other is not sleeper and not other.ended
    )


def only_a(world: World, step: tuple[str, str]) -> bool:
    """Faults befall A alone: A and B are alike, so one fault may as well be A's."""
    return step[0] == "A" or step[1] in ("go", "deliver")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Model]]:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(base, "_ASK_AFTER", (1.0,))
    monkeypatch.setattr(shards, "_LEASE_POLL", LEASE)
    monkeypatch.setattr(shards, "_WRITE_TIME", 1.0)
    monkeypatch.setattr(logging.getLogger("anybatch"), "disabled", True)
    ram = Path("/dev/shm")
    home = ram / f"anybatch-{os.getpid()}" if ram.is_dir() else tmp_path
    home.mkdir(exist_ok=True)
    yield lambda step, kind=Model, **options: kind(home, clock, step, **options)
    if home != tmp_path:
        shutil.rmtree(home)


def explored(model: Model, *faults: str, budget: int = 0, **options: Any) -> Findings:
    found = explore(
        options.pop("open_world", model.open),
        model.read,
        options.pop("check", model.check),
        faults=frozenset(faults),
        budget=budget,
        **options,
    )
    assert not found.faults, found.faults[0]
    assert found.endings > 1
    return found


def test_two_attempts_in_any_order(model: Callable[..., Model]) -> None:
    """Stopped for any time and killed anywhere: two batches at the most, and one in the end."""
    world = model(Step.PLANNED)
    world.most = 2
    assert explored(world, alike=True).states > 200


def test_two_attempts_that_are_not_stopped_for_long(model: Callable[..., Model]) -> None:
    """Killed anywhere, in every order, but nobody is stopped for a whole lease: never a second batch."""
    world = model(Step.PLANNED)
    world.most = 1
    assert explored(world, "kill", budget=1, allowed=fair, alike=True).states > 100


def test_a_create_that_is_lost(model: Callable[..., Model]) -> None:
    world = model(Step.UPLOADED)
    world.most = 2
    assert explored(world, "lost", budget=1, allowed=only_a).states > 1000


@pytest.mark.deployment
@pytest.mark.parametrize(
    ("faults", "budget", "most"),
    [(("lost", "never"), 1, 2), (("down", "lost"), 2, 2), (("kill", "lost"), 2, 2)],
)
def test_more_faults(model: Callable[..., Model], faults: tuple[str, ...], budget: int, most: int) -> None:
    world = model(Step.UPLOADED)
    world.most = most
    explored(world, *faults, budget=budget, allowed=only_a)


@pytest.mark.deployment
def test_a_create_that_arrives_late(model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time, or never; on top of the two batches that attempts can make which were stopped."""
    # To look takes no time here: a claim is either valid or not, which the waiting for it decides alone.
    monkeypatch.setattr(base, "_ASK_AFTER", (0.0,))
    world = model(Step.UPLOADED)
    world.most = 3
    explored(world, "late", budget=1, allowed=only_a)


@pytest.mark.deployment
def test_two_submissions_from_nothing(model: Callable[..., Model]) -> None:
    """The opening of the ledger is among the steps."""
    world = model(None)
    world.most = 2
    explored(world, alike=True)


@pytest.mark.deployment
@pytest.mark.parametrize("last", [0, 1])
def test_two_inputs(model: Callable[..., Model], last: int) -> None:
    """B has other input than A, and the third either: one live batch, of its own."""
    world = model(None)
    world.most, world.same = 4, False
    explored(
        world,
        open_world=lambda: world.open(second=1),
        check=lambda found: world.check(found, last),
    )


def test_a_store_where_writes_can_overwrite_each_other(model: Callable[..., Model]) -> None:
    """Comparing and writing are two steps there; as long as no write takes long, never a second batch."""
    world = model(Step.UPLOADED, store=True)
    world.most = 1
    explored(world, "kill", budget=1, allowed=fair, alike=True)


@pytest.mark.deployment
def test_two_attempts_open_a_round(model: Callable[..., Model]) -> None:
    """Of which one creates its batch, in any order, each dying anywhere."""
    world = model(None, kind=ModelOfRounds)
    world.most = 1 + 2
    found = explored(world, alike=True)
    assert found.states > 200


def test_a_job_that_is_stopped_while_it_is_submitted(model: Callable[..., Model]) -> None:
    """In any order, each dying anywhere: never a second batch, and none that goes on."""
    world = model(Step.PLANNED, kind=ModelOfStop)
    world.most = 1
    assert explored(world).states > 100


@pytest.mark.parametrize("fault", ["lost", "kill"])
def test_a_job_that_is_stopped_while_a_create_is_lost(model: Callable[..., Model], fault: str) -> None:
    world = model(Step.UPLOADED, kind=ModelOfStop)
    world.most = 1
    explored(world, fault, budget=1)


@pytest.mark.deployment
def test_a_job_that_is_stopped_in_a_store(model: Callable[..., Model]) -> None:
    """As long as no write takes long."""
    world = model(Step.UPLOADED, kind=ModelOfStop, store=True)
    world.most = 1
    explored(world, "kill", budget=1, allowed=fair)
