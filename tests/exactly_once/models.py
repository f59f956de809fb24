"""Situations of two attempts at one job, and what a third must make of whatever becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
from upath import UPath

from anybatch import IncompleteListingError, Job, Standing, get_provider
from anybatch.flow import Do, Flow, Sleep
from anybatch.jobs.inputs import prepare
from anybatch.jobs.job import job_metadata
from anybatch.jobs.ledger import Ledger, Step
from anybatch.jobs.rounds import records_of
from anybatch.jobs.shard import Submission
from anybatch.jobs.submit import new_ledger, resume, stop, submit
from anybatch.rows.planning import Plan
from tests.exactly_once.explore import Findings, explore
from tests.exactly_once.stage import requests, write
from tests.exactly_once.unreliable import UnreliableFake
from tests.exactly_once.worlds import LEASE, START, Clock, World

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
        world = self.new_world()
        if self.step is not None:
            self._write_ledger(world)
        self.begin(world, "A")
        self.begin(world, "B", second)
        return world

    def new_world(self) -> World:
        """One in which nothing has been done yet."""
        self.clock.now = START
        fake = UnreliableFake(clock=self.clock)
        fake.lag = self.lag
        key = ("authorization", f"Bearer {fake.key}")
        number, place = self._free_place()
        world = World(fake, self.clock, place, key, is_create, torn_commits=self.store)
        world.spoils = self.spoils
        self._places[number] = place, world
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
            file = world.fake.store_file("in.jsonl", "batch", self.inputs[0].read_bytes())
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
        assert number == 1
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

    lag = 0.0  # seconds until a batch is in the provider's listing
    spoils: str | None = None  # what is wrong with all answers of a kind
    same = True  # both attempts have the same input
    most = 3  # batches that may ever be created


def made(value: T | None) -> T:
    assert value is not None
    return value


class ModelOfListings(Model):
    """Batches are listed late, or the listing cannot be read; for good, where `spoils` says so."""

    def check(self, world: World, number: int = 0) -> None:
        if self.spoils is not None:
            before = self.read(world)
            third = world.run(self.begin(world, "blind"))
            assert len(world.fake.batches) <= self.most, "a batch was bought again that is not in the listing"
            if third.raised is not None:
                assert isinstance(third.raised, IncompleteListingError), repr(third.raised)
                assert made(before).shards[0].tries, "no create was begun"
            world.spoils = None
        self.clock.now += self.lag
        super().check(world, number)


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
    batch = returned[0] if isinstance(returned, Standing) else returned
    return str(batch.id)


def fair(world: World, step: tuple[str, str]) -> bool:
    """No time passes while another attempt is creating or writing: nobody is stopped for a whole lease."""
    name, kind = step
    if kind != "go" or not isinstance((sleeper := world.attempts[name]).effect, Sleep):
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


def explored(model: Model, *faults: str, budget: int = 0, least: int = 1, **options: Any) -> Findings:
    """Explore a model; fails where there is a fault, and where there are far fewer or more states than ever.

    `least` is somewhat less than there are.
    """
    found = explore(
        options.pop("open_world", model.open),
        model.read,
        options.pop("check", model.check),
        faults=frozenset(faults),
        budget=budget,
        most_states=options.pop("most_states", 8 * least if least > 1 else 100_000),
        **options,
    )
    assert not found.faults, found.faults[0]
    assert found.endings > 0
    print(f"{found.states} states, of which {found.endings} are endings")
    assert found.states >= least, f"only {found.states} states were explored, not {least} and more"
    return found
