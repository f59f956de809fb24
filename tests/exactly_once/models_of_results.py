"""Situations of two attempts at a job whose batches have ended: what becomes of rows that were paid for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from anybatch import BatchLostError, Job, Report, ServerError
from anybatch.flow import Do, Flow
from anybatch.jobs.collect import collect
from anybatch.jobs.inputs import prepare
from anybatch.jobs.submit import stop, submit
from anybatch.models import Batch
from tests.exactly_once.models import Model, is_commit, made
from tests.exactly_once.unreliable import Past
from tests.exactly_once.worlds import PROVIDER, Attempt, Clock, Event, World
from tests.fakes.rows import Failure, Fate


class ModelOfResults(Model):
    """A and B go on with a job whose `rows` were submitted as batches of so many, which have all ended.

    `check` looks at each state as it is, and then lets other attempts go on, one after the other, until the
    job has landed.
    """

    rows = 2
    per_batch = 1
    ready = False  # A and B have begun, and are about to change the ledger; until then they only read

    def __init__(self, home: Path, clock: Clock, step: None, **options: Any) -> None:
        super().__init__(home, clock, step)
        source = self.inputs[self.rows - 2]
        self.job = replace(self.job, input=source, shard_requests=self.per_batch, **options)
        self.plan = made(prepare(self.job, self.provider, home))
        self._past: tuple[Past, dict[str, bytes]] | None = None

    def open(self, second: int = 0) -> World:
        if self._past is None:
            self._past = self._made_past()
        past, files = self._past
        world = self.new_world()
        world.folder_counts = True
        world.fake.cancel_at_once = True
        world.fake.go_back(past)
        assert isinstance(world.folder, Path)
        world.folder.mkdir(parents=True)
        for name, data in files.items():
            (world.folder / name).write_bytes(data)
        self.clock.now += 10
        self.prepare(world)
        for name in ("A", "B"):
            self.begin(world, name)
        return world

    def _made_past(self) -> tuple[Past, dict[str, bytes]]:
        world = self.new_world()
        try:
            first = world.run(world.begin("first", submit(self.job_in(world), self.provider)))
            for number, batch in enumerate(made(first.returned)):
                self.end(world, number, batch.id)
            assert isinstance(world.folder, Path)
            return world.fake.remember(), {path.name: path.read_bytes() for path in world.folder.iterdir()}
        finally:
            world.close()

    @property
    def shards(self) -> int:
        return -(-self.rows // self.per_batch)

    def end(self, world: World, number: int, batch_id: str) -> None:
        """How the batch of a shard ends."""
        world.fake.finish(batch_id)

    def prepare(self, world: World) -> None:
        """What else there is before A and B begin."""

    def job_in(self, world: World, number: int = 0, max_rounds: int = 1) -> Job:
        key = world.folder, 0, 0
        if key not in self._jobs:
            self._jobs[key] = replace(self.job, output=world.folder)
        return self._jobs[key]

    def begin(self, world: World, name: str, number: int = 0) -> Attempt:
        attempt = self.begin_flow(world, name, self.job_in(world))
        while self.ready and not is_commit(attempt.effect):
            world.step((name, "go"))
        return attempt

    def begin_flow(self, world: World, name: str, job: Job) -> Attempt:
        attempt = world.begin(name, self.flow(name, job))
        if isinstance(attempt.effect, Do) and getattr(attempt.effect.function, "func", None) is prepare:
            world.answer(attempt, self.plan)  # the same for all
        return attempt

    def flow(self, name: str, job: Job) -> Flow[Any]:
        return run(job, self.provider)

    def check(self, world: World, number: int = 0) -> None:
        self.check_rows(world)
        last = self.land(world)
        assert last.raised is None, repr(last.raised)
        self.check_rows(world)
        assert self.landed(world), "it has landed"

    def land(self, world: World, **changes: Any) -> Attempt:
        """Let attempts go on, and the provider, until the job has landed or an attempt fails."""
        job = replace(self.job_in(world), **changes)
        for name in ("C", "D", "E", "F"):
            attempt = world.run(self.begin_flow(world, name, job))
            if attempt.raised is not None or isinstance(attempt.returned, Report):
                return attempt
            for batch in world.fake.running():
                world.fake.finish(batch.id)
        raise AssertionError("the job does not land")

    def landed(self, world: World) -> dict[str, Any]:
        """The lines that have landed, by custom_id; none before that."""
        if made(self.read(world)).landed_at is None:
            return {}
        lines = (self.job_in(world).folder / "results.jsonl").read_text().splitlines()
        rows = {row["custom_id"]: row for row in map(json.loads, lines)}
        assert len(rows) == len(lines) == self.rows
        return rows

    def check_rows(self, world: World) -> None:
        """What was answered is never bought again, and lands as its own batch has answered it."""
        answered = self.check_purchases(world)
        for custom_id, row in self.landed(world).items():
            if custom_id in answered and self.may_read(world, custom_id):
                assert row["outcome"] == "succeeded", f"{custom_id} was paid for, and landed as {row}"
            if row["outcome"] == "succeeded":
                text = row["response"]["body"]["choices"][0]["message"]["content"]
                assert text == f"echo: hello {custom_id.removeprefix('row-')}", f"{custom_id}: {text}"
            else:
                self.check_unanswered(world, custom_id, row)

    def may_read(self, world: World, custom_id: str) -> bool:
        """Whether the provider still has this answer."""
        return True

    def check_unanswered(self, world: World, custom_id: str, row: dict[str, Any]) -> None:
        raise AssertionError(f"{custom_id} has landed as {row}")

    def check_purchases(self, world: World) -> set[str]:
        """The rows that were answered, none of which was bought again then."""
        answered: set[str] = set()
        for batch in world.fake.ever:
            again = answered.intersection(world.fake.bought(batch))
            assert not again, f"{again} had been answered, and was bought again"
            answered |= {one for one, fate in batch.fates.items() if fate is Fate.SUCCEEDED}
        return answered


def run(job: Job, provider: Any) -> Flow[list[Batch] | Report]:
    """As `Client.run`, but for the waiting."""
    batches = yield from submit(job, provider)
    return (yield from landed_if_ended(job, provider, batches))


def landed_if_ended(job: Job, provider: Any, batches: list[Batch]) -> Flow[list[Batch] | Report]:
    if not all(batch.status.is_terminal for batch in batches):
        return batches
    return (yield from collect(job, provider))


class ModelOfCuts(ModelOfResults):
    """Downloads are answered short; B only collects."""

    rows, per_batch = 3, 2

    def flow(self, name: str, job: Job) -> Flow[Any]:
        return collect(job, self.provider) if name == "B" else run(job, self.provider)

    def check(self, world: World, number: int = 0) -> None:
        if self.spoils is not None:
            self.check_rows(world)
            assert not self.landed(world), "nothing lands of what is short"
            third = self.land(world)
            assert isinstance(third.raised, ServerError), repr(third.raised or third.returned)
            assert not self.landed(world)
            assert len(world.fake.ever) == self.shards, "nothing is bought again"
            world.spoils = None
        else:
            for attempt in world.attempts.values():
                assert attempt.raised is None, (
                    f"what is short at first is asked for again: {attempt.raised!r}"
                )
        super().check(world)


class ModelOfRepeats(ModelOfResults):
    """Downloads are answered short; one row of two has failed, and goes again."""

    per_batch = 2

    def end(self, world: World, number: int, batch_id: str) -> None:
        world.fake.finish(batch_id, failed=1, failure=Failure(500, "server_error", "Try again."))


class ModelOfLoss(ModelOfResults):
    """The provider loses the first batch, or its result file, at any time, for good."""

    lost = "batch"
    row = "row-0"
    does_without = False  # whether rows may land as missing

    def prepare(self, world: World) -> None:
        first = next(iter(world.fake.batches.values()))

        def lose() -> None:
            if self.lost == "batch":
                world.fake.lose(first.id)
            del world.fake.files[made(first.output_file_id)]

        world.events["lost"] = Event(lambda world: True, lambda world: lose())
        if self.ready:
            world.step((PROVIDER, "lost"))

    def may_read(self, world: World, custom_id: str) -> bool:
        return custom_id != self.row or "lost" not in world.happened

    def check_unanswered(self, world: World, custom_id: str, row: dict[str, Any]) -> None:
        assert self.does_without, f"{custom_id} has landed as {row}"
        assert (row["outcome"], row["error"]["code"]) == ("missing", "results_lost")
        assert custom_id == self.row
        assert "lost" in world.happened

    def check_purchases(self, world: World) -> set[str]:
        if self.job.on_lost != "resubmit":
            assert len(world.fake.ever) == self.shards, "nothing is bought again"
        answered = {f"row-{number}" for number in range(self.rows)}
        later = world.fake.ever[self.shards :]
        for batch in later:
            assert "lost" in world.happened
            assert world.fake.bought(batch) == [self.row], "only what was lost is bought again"
        assert len(later) <= self.most, f"{len(later)} batches for it"
        return answered

    def check(self, world: World, number: int = 0) -> None:
        self.does_without = self.job.on_lost == "land"
        self.check_rows(world)
        last = self.land(world)
        if self.job.on_lost == "fail" and "lost" in world.happened and not self.landed(world):
            assert isinstance(last.raised, BatchLostError), repr(last.raised or last.returned)
            last, self.does_without = self.land(world, on_lost="land"), True
        assert last.raised is None, repr(last.raised)
        self.check_rows(world)


class ModelOfStopMidway(ModelOfResults):
    """The first batch was refused as a whole: A submits it anew, while B stops the job and collects it.

    The provider may answer the new batch at any time, but where they are `ready`.
    """

    rows = 3
    collects = True  # B does, else it only stops the job

    def end(self, world: World, number: int, batch_id: str) -> None:
        if number:
            world.fake.finish(batch_id)
        else:
            world.fake.fail(batch_id, "token_limit_exceeded", "Enqueued token limit reached.")

    def flow(self, name: str, job: Job) -> Flow[Any]:
        if name == "A":
            return run(job, self.provider)
        return stop_and_collect(job, self.provider) if self.collects else stop(job, self.provider)

    def prepare(self, world: World) -> None:
        def answer(world: World) -> None:
            for batch in world.fake.running():
                world.fake.finish(batch.id)

        def before_create(attempt: Attempt) -> None:
            assert made(attempt.claim).stopped_at is None, "a create after the stop"

        if not self.ready:
            world.events["answered"] = Event(lambda world: bool(world.fake.running()), answer)
        world.before_create = before_create

    def check_unanswered(self, world: World, custom_id: str, row: dict[str, Any]) -> None:
        assert (custom_id, row["outcome"]) == ("row-0", "cancelled"), row

    def check(self, world: World, number: int = 0) -> None:
        for attempt in world.attempts.values():
            assert attempt.raised is None, f"{attempt.name} has raised {attempt.raised!r}"
        super().check(world)

    def land(self, world: World, **changes: Any) -> Attempt:
        last = world.run(world.begin("C", stop_and_collect(self.job_in(world), self.provider)))
        assert not world.fake.running(), "nothing runs once it is stopped"
        assert len(world.fake.ever) <= self.shards + 1
        return last


def stop_and_collect(job: Job, provider: Any) -> Flow[list[Batch] | Report]:
    batches = yield from stop(job, provider)
    return (yield from landed_if_ended(job, provider, batches))
