"""What is waited for: parked runs and submissions, found once and then remembered.

The instance holds the truth, and reading all of it in every tick would be dear: what was read is kept in the
process that evaluates the sensor. A new process, or one whose last answer was lost, reads again from the
cursor.
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

MAX_NEW = 100  # submissions of one asset, and MAX_NEW * 5 parked runs, that are taken up in one tick
_SETTLED = 30.0  # seconds after which no event with a lower storage id can still appear


@dataclass(frozen=True, slots=True)
class Pending:
    """Batches that something waits for: a parked run, or a submission that has no run yet.

    `turn`: there is no batch yet; the run waits for its turn to submit one.
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
        """The submit asset, by the name that it had then."""
        if self.submission is not None:
            return self.submission.asset_key
        name = self.run.tags.get(submissions.TAG_SUBMIT_ASSET) if self.run else None
        return dg.AssetKey.from_user_string(name) if name else None

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.deadline <= time.time()

    @property
    def who(self) -> str:
        """Who waits, for people."""
        if self.run is not None:
            return f"run {self.run.run_id}"
        assert self.submission is not None
        return f"what run {self.submission.run_id} submitted"

    @property
    def key(self) -> str:
        """Names it for as long as it waits."""
        if self.run is not None:
            return self.run.run_id
        assert self.submission is not None
        return f"{self.submission.asset_key.to_user_string()}:{self.submission.run_key}"

    @property
    def mark(self) -> str | None:
        """What was last told of a parked run, by whatever process."""
        return self.run.tags.get(submissions.TAG_STATUS) if self.run else None

    @property
    def turn(self) -> bool:
        return self.run is not None and self.run.tags.get(TURN) == WAITING


class ParkedRuns:
    """The parked runs of this code location; each is read once, and then only its id is asked for."""

    def __init__(self) -> None:
        self._known: dict[str, Pending | None] = {}

    def read(self, gate: Gate, is_ours: Callable[[dg.DagsterRun], bool]) -> list[Pending]:
        """All that wait now, oldest first as far as they were read."""
        there = gate.waiting()
        self._known = {run_id: self._known[run_id] for run_id in there if run_id in self._known}
        new = [run_id for run_id in reversed(there) if run_id not in self._known][: 5 * MAX_NEW]
        for run in gate.runs(new):
            self._known[run.run_id] = Pending.parked(run) if is_ours(run) else None
        return [entry for entry in self._known.values() if entry is not None]

    def told(self, entry: Pending, tags: Mapping[str, str]) -> None:
        """Note tags that were just given to a run."""
        assert entry.run is not None
        run = entry.run.with_tags({**entry.run.tags, **tags})
        self._known[run.run_id] = Pending.parked(run)


@dataclass
class _Reading:
    """How far the submissions of one asset were read; ids are of the event log."""

    after: int  # nothing before or at it needs to be read again
    latest: int | None = None  # of the asset when all was read, None while there is more to read
    handled: set[int] = field(default_factory=set)  # after `after`


class NewSubmissions:
    """Submissions that no run waits for yet: in an instance without the gate, all of them.

    The cursor is behind all of these, and behind what is too young for its order to be certain. It names
    their assets, so that a process finds them which runs code where an asset is gone.
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
        self._asked: set[int] = set()

    def read(
        self,
        instance: dg.DagsterInstance,
        pairs: Mapping[dg.AssetKey, dg.AssetKey],
        is_late: Callable[[], bool],
    ) -> None:
        """Find what is new, and let go of what has been seen to meanwhile."""
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
        self._drop_asked(instance)

    def pending(self) -> Iterable[tuple[int, Pending]]:
        """Those that no run waits for, by the storage ids of their events."""
        return sorted(self._found.items(), key=lambda item: item[0])

    def drop(self, entry: Pending) -> None:
        """Wait no more for a submission."""
        for storage_id in [storage_id for storage_id, found in self._found.items() if found is entry]:
            self._forget(storage_id)

    def asked(self, storage_id: int) -> None:
        """Note that a run was asked for."""
        self._asked.add(storage_id)

    def move(self) -> str:
        """The cursor, moved on to where a process that knows nothing has to begin."""
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
        """A person may have materialized the result before the sensor did."""
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

    def _drop_asked(self, instance: dg.DagsterInstance) -> None:
        """A run that was asked for exists once the daemon has the answer, and is asked for until then."""
        for storage_id in list(self._asked):
            submission = self._found[storage_id].submission
            if submission and submissions.has_result_run(instance, submission):
                self._forget(storage_id)

    def _forget(self, storage_id: int) -> None:
        del self._found[storage_id]
        self._asked.discard(storage_id)
