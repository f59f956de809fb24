"""The batch sensor: the only thing that watches while batches run.

A submission is found in the event log, where the run that made it did not park its result run itself; its
batches are looked at; and when they have ended, the gate of the parked run is opened (or, where the instance
has no gate rule, a run is started). Each tick may be cut off, repeated or overlap another: what it does to
the instance can be done twice, and the cursor moves only past what needs no more attention.

    state            where it is
    submitted        materializations of submit assets
    waiting          parked runs; without the gate, the submissions behind the cursor
    collected        materializations of result assets
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from anybatch import AnyBatchError, Batch

from . import submissions
from .gate import OPEN, TAG, WAITING, Gate, config_for, is_from
from .given_up import GivenUp, call_off
from .metadata import progress_metadata
from .pending import NewSubmissions, ParkedRuns, Pending
from .polling import ONCE, Aside, Poller, Progress, progress_of
from .removed import cancels_when_late, late_line, naming, removed_lines
from .resource import BatchResource
from .rounds import waiting_tags
from .submissions import RESULT, ROLE, Submission

MAX_STARTED = 100  # runs that one tick lets start: a queue does not start more in the time between two
MAX_TOLD = 50  # observations of one tick: Dagster writes them one by one, while other sensors wait
_OWN_RUN = 120.0  # seconds that a submitting run has to see to the result by itself
_POLL_SHARE = 0.6  # of a tick's budget; the rest is for the event log and the runs


def build_batch_sensor(
    *,
    name: str = "anybatch_sensor",
    resource_keys: Collection[str] = ("anybatch",),
    minimum_interval_seconds: int = 10,
    tick_seconds: float = 12.0,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The one sensor of a code location that waits for all its batch assets.

    Where the instance has the gate rule, result runs wait in the queue; else they are started when there is
    something to collect.

    resource_keys  keys of the `BatchResource`s in use
    tick_seconds   budget of a tick; sensors share a thread by default, so a slow one delays the others
    """
    memory = _Memory({key: Poller() for key in resource_keys})

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _Tick(context, Gate(context.instance), memory, time.monotonic() + tick_seconds).run()

    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Waits for batches, and starts what they are waited for by.",
        default_status=default_status,
        asset_selection=dg.AssetSelection.tag(ROLE, RESULT).downstream(),
        required_resource_keys=set(resource_keys),
    )


@dataclass
class _Memory:
    """What the process remembers between ticks, to save calls and queries; a new process does without."""

    pollers: dict[str, Poller]
    parked: ParkedRuns = field(default_factory=ParkedRuns)
    new: NewSubmissions = field(default_factory=lambda: NewSubmissions(None))
    marks: dict[str, str] = field(
        default_factory=dict
    )  # last told of submissions that have no run, by their keys
    aside: Aside = field(default_factory=Aside)


@dataclass
class _Tick:
    """One evaluation of the sensor; `until` is on the monotonic clock."""

    context: dg.SensorEvaluationContext
    gate: Gate
    memory: _Memory
    until: float
    requests: list[dg.RunRequest] = field(default_factory=list)
    events: list[dg.AssetObservation] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        repository = self.context.repository_def
        assert repository is not None  # only a context made by hand has none
        self.graph: AssetGraph = repository.asset_graph
        self.pairs = submissions.batch_asset_pairs(self.graph)
        self.parking = self.gate.exists
        self.resources: dict[str, BatchResource] = {
            key: getattr(self.context.resources, key) for key in self.memory.pollers
        }
        if self.context.cursor != self.memory.new.cursor:  # another process, or a tick whose answer was lost
            self.memory.new = NewSubmissions(self.context.cursor)

    def run(self) -> dg.SensorResult:
        parked = self.memory.parked.read(self.gate, self._is_ours)
        self.memory.new.read(self.context.instance, self.pairs, lambda: self._late)
        new = list(self.memory.new.pending())
        entries = [*parked, *(entry for _, entry in new)]
        removed = [entry for entry in entries if self._is_removed(entry)]
        overdue = {entry.key: entry for entry in removed if entry.is_late}
        pending = [entry for entry in entries if not entry.turn and entry.key not in overdue]
        self._look(pending, self._given_up(overdue.values()))
        for entry in parked:
            self._open_if_over(entry)
        for storage_id, entry in new:
            self._start_if_over(storage_id, entry)
        self._give_turns([entry for entry in parked if entry.turn and not self._is_removed(entry)])
        for entry in pending:
            self._tell(entry)
        self.troubles += removed_lines([entry for entry in removed if entry.key not in overdue])
        return self._result(pending)

    def _is_ours(self, run: dg.DagsterRun) -> bool:
        """Other code locations have a sensor of their own; what was launched from here stays ours."""
        return Pending.parked(run).asset_key in self.pairs or is_from(run, self.context)

    def _is_removed(self, entry: Pending) -> bool:
        """Whether its asset is not defined any more, so that no run of it could start."""
        return entry.asset_key not in self.pairs

    @property
    def _late(self) -> bool:
        return time.monotonic() > self.until

    def _is_enough(self, started: Sized) -> bool:
        """Whether the rest has to wait for the next tick."""
        return self._late or len(started) >= MAX_STARTED

    # --- looking at providers ----------------------------------------------------------------------------

    def _given_up(self, overdue: Iterable[Pending]) -> list[GivenUp]:
        """What is waited for no more, and what to do once its batches are as they are to be."""
        found = []
        for run in self.gate.abandoned():
            if self._is_ours(run):
                done = partial(self._close_for_good, run.run_id)
                found.append(GivenUp(Pending.parked(run), "its waiting run was terminated", done))
        for entry in overdue:
            why = "its deadline has passed, and its asset is not defined here any more"
            cancels = cancels_when_late(self.context.instance, entry)
            found.append(GivenUp(entry, why, partial(self._end_removed, entry), cancels))
        return found

    def _close_for_good(self, run_id: str, _: bool) -> None:
        self.gate.close_for_good(run_id)

    def _end_removed(self, entry: Pending, cancelled: bool) -> None:
        """Wait no more for what no asset is there to take."""
        line = late_line(entry, cancelled=cancelled)
        if entry.run is not None:
            self.gate.fail(entry.run.run_id, line)
        else:
            self.memory.new.drop(entry)
        self.troubles.append(line)

    def _look(self, pending: Sequence[Pending], given_up: Sequence[GivenUp]) -> None:
        """See how the batches are, and cancel those that were given up, for a part of the tick's time."""
        wanted: dict[str, set[str]] = {key: set() for key in self.resources}
        unknown: dict[str, list[str]] = {}
        for entry in pending:
            if entry.resource in wanted:
                wanted[entry.resource].update(entry.batch_ids)
            else:
                unknown.setdefault(entry.resource, []).extend(entry.batch_ids)
        for key, batch_ids in unknown.items():
            told = f"build_batch_sensor was not given the resource {key!r}"
            self.troubles.append(f"{naming(batch_ids)}: {told}")
        seconds = max(0.1, (self.until - time.monotonic()) * _POLL_SHARE)
        troubles: list[str] = []
        done: list[tuple[GivenUp, bool]] = []

        async def look() -> None:
            looks = (self._look_at(key, wanted[key], seconds, troubles) for key in self.resources)
            cancels = (
                call_off(one, self.resources, wanted, seconds, self.context.log, troubles, done)
                for one in given_up
            )
            await asyncio.gather(*looks, *cancels)

        if not self.memory.aside.is_busy:
            for key, poller in self.memory.pollers.items():
                poller.keep_only(wanted[key])
        if not self.memory.aside.run(look, seconds + 0.2):  # each of them has its own bound, of `seconds`
            self.troubles.append(f"a provider takes more than the {seconds:.0f} s of a tick to answer")
        self.troubles += troubles
        for given, cancelled in done.copy():  # its thread may be at work still
            given.done(cancelled)

    async def _look_at(self, key: str, wanted: Collection[str], seconds: float, troubles: list[str]) -> None:
        """Look at the batches of one account, and see to it that trouble there stays there."""
        if not wanted:
            return
        try:
            async with self.resources[key].async_client(retry=ONCE) as client:
                await self.memory.pollers[key].look(client, wanted, seconds, self.context.log)
        except AnyBatchError as error:  # the key, or the settings: for a person to see to
            troubles.append(f"resource {key!r}: {type(error).__name__}: {error}")

    # --- deciding ------------------------------------------------------------------------------------

    def _progress(self, entry: Pending) -> Progress | None:
        """How far it is; None as long as not every batch was seen. A batch that is gone counts as ended."""
        poller = self.memory.pollers.get(entry.resource)
        states = poller.states(entry.batch_ids) if poller else {}
        if len(states) < len(entry.batch_ids):
            return None
        seen = [state for state in states.values() if isinstance(state, Batch)]
        if not seen:
            return Progress("gone", True, None, 0, 0, 0)
        return progress_of(seen)

    def _is_over(self, entry: Pending) -> bool:
        """Whether to start what waits: the batches have ended, or the deadline has passed."""
        progress = self._progress(entry)
        return entry.is_late or (progress is not None and progress.ended)

    # --- acting --------------------------------------------------------------------------------------

    def _open_if_over(self, entry: Pending) -> None:
        if entry.run is None or entry.turn or self._is_removed(entry) or self._is_enough(self.opened):
            return
        if self._is_over(entry):
            self.gate.open(entry.run.run_id, _progress_tags(self._progress(entry)))
            self.opened.add(entry.run.run_id)

    def _start_if_over(self, storage_id: int, entry: Pending) -> None:
        """Ask for the run that takes the results: now if there are some, or, parked, to wait for them."""
        submission, over = entry.submission, self._is_over(entry)
        if submission is None or self._is_removed(entry) or self._is_enough(self.requests):
            return
        if not (over or self.parking):
            return
        run = self.context.instance.get_run_by_id(submission.run_id)
        if self._has_own_run(submission, run):
            return
        self.memory.new.asked(storage_id)
        # Since it was read, the run that submitted may have parked one.
        if not submissions.has_result_run(self.context.instance, submission):
            self.requests.append(self._request(submission, run, self._progress(entry), over=over))

    def _has_own_run(self, submission: Submission, run: dg.DagsterRun | None) -> bool:
        """Whether the run that submitted is about to see to the result itself."""
        if run is None or run.is_finished or time.time() - submission.timestamp > _OWN_RUN:
            return False
        return self.pairs[submission.asset_key] in submissions.planned_assets(self.context.instance, run)

    def _request(
        self, submission: Submission, run: dg.DagsterRun | None, progress: Progress | None, *, over: bool
    ) -> dg.RunRequest:
        """The run that is to take the results, and to do what the submitting run skipped for want of them."""
        planned = submissions.planned_assets(self.context.instance, run) if run else set()
        assets = submissions.waiting_assets(self.graph, planned, self.pairs[submission.asset_key])
        names = {self.graph.get(key).assets_def.node_def.name for key in assets}
        return dg.RunRequest(
            run_key=submission.run_key,
            asset_selection=sorted(assets),
            tags={
                **waiting_tags(submission, run),
                **_progress_tags(progress),
                TAG: OPEN if over else WAITING,
            },
            run_config=config_for(run.run_config, names) if run else {},
        )

    def _give_turns(self, entries: Sequence[Pending]) -> None:
        """Let runs submit that were held back, as far as there is room on their account."""
        for key, resource in self.resources.items():
            mine = [entry.run for entry in entries if entry.run and entry.resource == key]
            if not mine:
                continue
            most = resource.max_in_flight
            room = len(mine) if most is None else most - self.gate.in_flight(key)
            for run in mine[: max(0, room)]:
                if not self._late:
                    self.gate.give_turn(run.run_id, key)

    def _tell(self, entry: Pending) -> None:
        """Observe a change, once; of a parked run, its tag remembers what was told."""
        progress = self._progress(entry)
        if progress is None or self._is_removed(entry) or self._late or len(self.events) >= MAX_TOLD:
            return
        before = entry.mark if entry.run else self.memory.marks.get(entry.key)
        if progress.mark == before:
            return
        asset_key = entry.asset_key
        assert asset_key is not None
        if entry.run is None:
            self.memory.marks[entry.key] = progress.mark
        elif entry.run.run_id not in self.opened:
            tags = _progress_tags(progress)
            self.context.instance.add_run_tags(entry.run.run_id, tags)
            self.memory.parked.told(entry, tags)
        self.events.append(
            dg.AssetObservation(
                asset_key,
                partition=_partition_of(entry),
                description=f"{progress.mark}: {', '.join(entry.batch_ids)}",
                metadata=progress_metadata(progress),
            )
        )

    def _result(self, pending: Sequence[Pending]) -> dg.SensorResult:
        self.memory.marks = {
            entry.key: self.memory.marks[entry.key] for entry in pending if entry.key in self.memory.marks
        }
        for trouble in self.troubles:
            self.context.log.error(trouble)
        told = "; ".join([f"{len(pending) or 'nothing'} waiting", *self.troubles])
        return dg.SensorResult(
            run_requests=self.requests,
            asset_events=self.events,
            cursor=self.memory.new.move(),
            skip_reason=None if self.requests else dg.SkipReason(told),
        )


def _partition_of(entry: Pending) -> str | None:
    if entry.run is not None:
        return entry.run.tags.get("dagster/partition")
    partitions = entry.submission.partitions if entry.submission else ()
    return partitions[0] if len(partitions) == 1 else None


def _progress_tags(progress: Progress | None) -> dict[str, str]:
    """What is told of the batches at the run that waits for them."""
    if progress is None:
        return {}
    ended = {submissions.TAG_ENDED: str(progress.ended_at)} if progress.ended_at else {}
    return {submissions.TAG_STATUS: progress.mark, **ended}
