"""What the sensor waits for: parked runs, and submissions that have no run yet.

The instance holds the truth. Reading all of it in every tick would be expensive, so the process that
evaluates the sensor remembers what it has read. A new process, or one whose last answer was lost, reads again
from the cursor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from . import submissions
from .gate import TURN, WAITING, Gate
from .submissions import Submission

MAX_NEW = 100  # new submissions of one asset that a tick reads; of parked runs it reads five times as many
_SETTLED = 30.0  # seconds; after that no event with a lower storage id can still appear


@dataclass(frozen=True, slots=True)
class Pending:
    """Batches that a parked run waits for, or that were submitted and have no run yet.

    Attributes:
        batch_ids: The batches; none if the run waits for its turn to submit.
        resource: Key of the `BatchResource`.
        deadline: Unix seconds.
        run: The parked run.
        submission: The submission, if there is no run.
    """

    batch_ids: tuple[str, ...]
    resource: str
    deadline: float | None
    run: dg.DagsterRun | None = None
    submission: Submission | None = None

    @classmethod
    def parked(cls, run: dg.DagsterRun) -> Pending:
        tags = run.tags
        deadline, batches = tags.get(submissions.TAG_DEADLINE), tags.get(submissions.TAG_BATCHES)
        return cls(
            batch_ids=tuple(batches.split(", ")) if batches else (),
            resource=tags.get(submissions.TAG_RESOURCE, ""),
            deadline=float(deadline) if deadline else None,
            run=run,
        )

    @classmethod
    def new(cls, submission: Submission) -> Pending:
        facts = submission.facts
        return cls(facts.batch_ids, facts.resource or "", facts.deadline, submission=submission)

    @property
    def asset_key(self) -> dg.AssetKey | None:
        """The submit asset, by the name that it had when it submitted."""
        if self.submission is not None:
            return self.submission.asset_key
        name = self.run.tags.get(submissions.TAG_SUBMIT_ASSET) if self.run else None
        return dg.AssetKey.from_user_string(name) if name else None

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.deadline <= time.time()

    @property
    def waiter(self) -> str:
        """Who waits, for messages."""
        if self.run is not None:
            return f"run {self.run.run_id}"
        assert self.submission is not None
        return f"what run {self.submission.run_id} submitted"

    @property
    def key(self) -> str:
        """Identifies it for as long as it waits."""
        if self.run is not None:
            return self.run.run_id
        assert self.submission is not None
        return f"{self.submission.asset_key.to_user_string()}:{self.submission.run_key}"

    @property
    def reported_stage(self) -> str | None:
        """The `Progress.stage` that was last reported of a parked run, by any process."""
        return self.run.tags.get(submissions.TAG_STATUS) if self.run else None

    @property
    def waits_for_turn(self) -> bool:
        """Whether the run waits for its turn to submit (`max_in_flight`)."""
        return self.run is not None and self.run.tags.get(TURN) == WAITING


class ParkedRuns:
    """The parked runs of this code location; each is read once, later ticks only ask for ids."""

    def __init__(self) -> None:
        self._known: dict[str, Pending | None] = {}

    def read(self, gate: Gate, is_ours: Callable[[dg.DagsterRun], bool]) -> list[Pending]:
        """All parked runs that were read so far and still wait, oldest first."""
        there = gate.waiting()
        self._known = {run_id: self._known[run_id] for run_id in there if run_id in self._known}
        new = [run_id for run_id in reversed(there) if run_id not in self._known][: 5 * MAX_NEW]
        for run in gate.runs(new):
            self._known[run.run_id] = Pending.parked(run) if is_ours(run) else None
        return [entry for entry in self._known.values() if entry is not None]

    def note_tags(self, entry: Pending, tags: Mapping[str, str]) -> None:
        """Note tags that were just added to a run."""
        assert entry.run is not None
        run = entry.run.with_tags({**entry.run.tags, **tags})
        self._known[run.run_id] = Pending.parked(run)


@dataclass
class _Reading:
    """How far the submissions of one asset were read; numbers are storage ids of the event log."""

    after: int  # everything up to here needs no second reading
    latest: int | None = None  # the asset's newest event when all was read; None while there is more to read
    handled: set[int] = field(default_factory=set)  # later than `after`


class NewSubmissions:
    """Submissions that no run waits for yet. Without the gate rule these are all submissions.

    The cursor lies before all of these, and before events that are so young that earlier ones may still
    appear. It names their assets, so that a process whose code no longer defines an asset still finds its
    submissions.
    """

    def __init__(self, cursor: str | None) -> None:
        self.cursor = cursor
        known = json.loads(cursor) if cursor else {}
        self._floor = int(known.get("after", 0))
        self._assets = {dg.AssetKey.from_user_string(name) for name in known.get("assets", ())}
        self._newest = self._floor
        self._reading: dict[dg.AssetKey, _Reading] = {}
        self._results: dict[dg.AssetKey, int] = {}
        self._found: dict[int, Pending] = {}
        self._requested: set[int] = set()

    def read(
        self,
        instance: dg.DagsterInstance,
        pairs: Mapping[dg.AssetKey, dg.AssetKey],
        is_late: Callable[[], bool],
    ) -> None:
        """Find new submissions, and drop those that are collected or have a run by now."""
        removed: dict[dg.AssetKey, None] = dict.fromkeys(self._assets - pairs.keys())
        latest = submissions.latest_ids(instance, [*pairs.keys(), *pairs.values(), *removed])
        for submit_key, result_key in {**pairs, **removed}.items():
            reading = self._reading.setdefault(submit_key, _Reading(self._floor))
            if (now := latest.get(submit_key, 0)) <= self._floor:
                reading.latest = now
            elif now != reading.latest and not is_late():
                self._read_asset(instance, submit_key, result_key, reading, now)
            if result_key is None:
                continue
            if (collected := latest.get(result_key, 0)) != self._results.get(result_key):
                self._drop_collected(instance, submit_key, result_key)
                self._results[result_key] = collected
        self._drop_requested(instance)

    def pending(self) -> Iterable[tuple[int, Pending]]:
        """The submissions that no run waits for, with the storage ids of their events, in that order."""
        return sorted(self._found.items(), key=lambda item: item[0])

    def drop(self, entry: Pending) -> None:
        """Stop waiting for a submission."""
        for storage_id in [storage_id for storage_id, found in self._found.items() if found is entry]:
            self._forget(storage_id)

    def requested(self, storage_id: int) -> None:
        """Note that a run was requested for it."""
        self._requested.add(storage_id)

    def move(self) -> str:
        """The new cursor: where a process that knows nothing has to begin to read."""
        unread = [reading.after for reading in self._reading.values() if reading.latest is None]
        behind = min([*unread, *(storage_id - 1 for storage_id in self._found), self._newest])
        known: dict[str, Any] = {"after": max(self._floor, behind)}
        still = {key for key in self._assets if key in self._reading and self._reading[key].latest is None}
        if names := still | {entry.asset_key for entry in self._found.values() if entry.asset_key}:
            known["assets"] = sorted(key.to_user_string() for key in names)
        self.cursor = json.dumps(known)
        return self.cursor

    def _read_asset(
        self,
        instance: dg.DagsterInstance,
        submit_key: dg.AssetKey,
        result_key: dg.AssetKey | None,
        reading: _Reading,
        latest: int,
    ) -> None:
        found = submissions.find_submissions(instance, submit_key, after=reading.after, limit=MAX_NEW)
        fresh = [
            (storage_id, submission)
            for storage_id, submission in found.submissions
            if storage_id not in reading.handled
        ]
        if fresh:
            collected: set[str] = set()
            if result_key is not None:
                collected = submissions.collected_submissions(instance, result_key, after=reading.after)
            for storage_id, submission in fresh:
                reading.handled.add(storage_id)
                if submission.run_id not in collected and not submissions.has_result_run(
                    instance, submission
                ):
                    self._found[storage_id] = Pending.new(submission)
        young = [
            storage_id
            for storage_id, submission in found.submissions
            if time.time() - submission.timestamp < _SETTLED
        ]
        until = found.until or latest
        self._newest = max(self._newest, until)
        reading.after = min([storage_id - 1 for storage_id in young] + [until])
        reading.handled = {storage_id for storage_id in reading.handled if storage_id > reading.after}
        reading.latest = None if young or found.until else latest

    def _drop_collected(
        self, instance: dg.DagsterInstance, submit_key: dg.AssetKey, result_key: dg.AssetKey
    ) -> None:
        """Drop submissions whose result asset a person has materialized before the sensor did."""
        mine = {
            storage_id: entry.submission.run_id
            for storage_id, entry in self._found.items()
            if entry.submission and entry.submission.asset_key == submit_key
        }
        if not mine:
            return
        collected = submissions.collected_submissions(instance, result_key, after=min(mine))
        for storage_id, run_id in mine.items():
            if run_id in collected:
                self._forget(storage_id)

    def _drop_requested(self, instance: dg.DagsterInstance) -> None:
        """Drop submissions whose requested run exists by now.

        Until the daemon has made it, each tick requests it again.
        """
        for storage_id in list(self._requested):
            submission = self._found[storage_id].submission
            if submission and submissions.has_result_run(instance, submission):
                self._forget(storage_id)

    def _forget(self, storage_id: int) -> None:
        del self._found[storage_id]
        self._requested.discard(storage_id)
