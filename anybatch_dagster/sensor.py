"""The batch sensor: the only thing that watches while batches run.

It finds submissions in the event log, as far as the submitting run has not parked a result run itself. It
looks at their batches, and when these have ended it opens the gate of the parked run (or, in an instance
without the gate rule, starts a run). A tick may be cut off, repeated, or overlap another one. So everything
that it does to the instance can be done twice without harm, and the cursor moves only past what needs no more
attention.

    state            where it is recorded
    submitted        materializations of submit assets
    waiting          parked runs; without the gate rule, submissions after the cursor
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
from .abandoned import Abandoned, cancel_abandoned, cancels_when_late, late_line, naming, removed_lines
from .gate import OPEN, TAG, WAITING, Gate, config_for, is_from
from .metadata import progress_metadata
from .pending import NewSubmissions, ParkedRuns, Pending
from .polling import ONCE, BackgroundRunner, Poller, Progress, progress_of
from .resource import BatchResource
from .steps import waiting_tags
from .submissions import RESULT, ROLE, Submission

MAX_STARTED = 100  # runs that one tick starts: Dagster's queue does not start more between two ticks
MAX_OBSERVATIONS = 50  # observations in one tick: Dagster writes them one by one while other sensors wait
_OWN_RUN = 120.0  # seconds that a submitting run has to reach the result asset, or to park a run for it
_POLL_SHARE = 0.6  # the providers' share of a tick's time; the rest is for the event log and the runs


def build_batch_sensor(
    *,
    name: str = "anybatch_sensor",
    resource_keys: Collection[str] = ("anybatch",),
    minimum_interval_seconds: int = 10,
    tick_seconds: float = 12.0,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The sensor that waits for all batch assets of a code location; each code location needs one.

    With the gate rule in `dagster.yaml`, result runs wait in the queue; without it, they are made when there
    is something to collect.

    Args:
        name: Name of the sensor.
        resource_keys: Keys of all `BatchResource`s that the batch assets use.
        minimum_interval_seconds: Seconds between two ticks.
        tick_seconds: Seconds that a tick may take. By default Dagster's sensors share a thread, so a slow
            tick delays the others.
        default_status: Whether the sensor runs without being switched on.
    """
    memory = _Memory({key: Poller() for key in resource_keys})

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _Tick(context, Gate(context.instance), memory, time.monotonic() + tick_seconds).run()

    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Looks at the running batches, and starts the runs that wait for them.",
        default_status=default_status,
        asset_selection=dg.AssetSelection.tag(ROLE, RESULT).downstream(),
        required_resource_keys=set(resource_keys),
    )


@dataclass
class _Memory:
    """What the process remembers between ticks, to save calls and queries; a new process starts without."""

    pollers: dict[str, Poller]
    parked: ParkedRuns = field(default_factory=ParkedRuns)
    new: NewSubmissions = field(default_factory=lambda: NewSubmissions(None))
    # What was last reported of submissions that have no run, by their keys.
    stages: dict[str, str] = field(default_factory=dict)
    background: BackgroundRunner = field(default_factory=BackgroundRunner)


@dataclass
class _Tick:
    """One evaluation of the sensor; `until` is its end on the monotonic clock."""

    context: dg.SensorEvaluationContext
    gate: Gate
    memory: _Memory
    until: float
    requests: list[dg.RunRequest] = field(default_factory=list)
    events: list[dg.AssetObservation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        repository = self.context.repository_def
        assert repository is not None  # only a context that was made by hand has none
        self.graph: AssetGraph = repository.asset_graph
        self.pairs = submissions.batch_asset_pairs(self.graph)
        self.parking = self.gate.exists
        self.resources: dict[str, BatchResource] = {
            key: getattr(self.context.resources, key) for key in self.memory.pollers
        }
        if (
            self.context.cursor != self.memory.new.cursor
        ):  # this process is new, or the last tick's answer was lost
            self.memory.new = NewSubmissions(self.context.cursor)

    def run(self) -> dg.SensorResult:
        parked = self.memory.parked.read(self.gate, self._is_ours)
        self.memory.new.read(self.context.instance, self.pairs, lambda: self._is_out_of_time)
        new = list(self.memory.new.pending())
        entries = [*parked, *(entry for _, entry in new)]
        removed = [entry for entry in entries if self._is_removed(entry)]
        overdue = {entry.key: entry for entry in removed if entry.is_late}
        pending = [entry for entry in entries if not entry.waits_for_turn and entry.key not in overdue]
        self._look(pending, self._abandoned(overdue.values()))
        for entry in parked:
            self._open_if_over(entry)
        for storage_id, entry in new:
            self._start_if_over(storage_id, entry)
        self._give_turns([entry for entry in parked if entry.waits_for_turn and not self._is_removed(entry)])
        for entry in pending:
            self._observe(entry)
        self.problems += removed_lines([entry for entry in removed if entry.key not in overdue])
        return self._result(pending)

    def _is_ours(self, run: dg.DagsterRun) -> bool:
        """Whether a run is this code location's; others have a sensor of their own."""
        return Pending.parked(run).asset_key in self.pairs or is_from(run, self.context)

    def _is_removed(self, entry: Pending) -> bool:
        """Whether its asset is no longer defined, so that no run of it could start."""
        return entry.asset_key not in self.pairs

    @property
    def _is_out_of_time(self) -> bool:
        return time.monotonic() > self.until

    def _is_enough(self, started: Sized) -> bool:
        """Whether the rest has to wait for the next tick."""
        return self._is_out_of_time or len(started) >= MAX_STARTED

    # --- looking at providers ----------------------------------------------------------------------------

    def _abandoned(self, overdue: Iterable[Pending]) -> list[Abandoned]:
        """The batches that no run will collect, and what to do once they are cancelled."""
        found = []
        for run in self.gate.abandoned():
            if self._is_ours(run):
                done = partial(self._mark_cancelled, run.run_id)
                found.append(Abandoned(Pending.parked(run), "its waiting run was terminated", done))
        for entry in overdue:
            why = "its deadline has passed, and its asset is not defined here any more"
            cancels = cancels_when_late(self.context.instance, entry)
            found.append(Abandoned(entry, why, partial(self._end_removed, entry), cancels))
        return found

    def _mark_cancelled(self, run_id: str, _: bool) -> None:
        self.gate.mark_cancelled(run_id)

    def _end_removed(self, entry: Pending, cancelled: bool) -> None:
        """Stop waiting: no asset is defined that could take the results."""
        line = late_line(entry, cancelled=cancelled)
        if entry.run is not None:
            self.gate.fail(entry.run.run_id, line)
        else:
            self.memory.new.drop(entry)
        self.problems.append(line)

    def _look(self, pending: Sequence[Pending], abandoned: Sequence[Abandoned]) -> None:
        """Look at the batches, and cancel abandoned ones, in a part of the tick's time."""
        wanted: dict[str, set[str]] = {key: set() for key in self.resources}
        unknown: dict[str, list[str]] = {}
        for entry in pending:
            if entry.resource in wanted:
                wanted[entry.resource].update(entry.batch_ids)
            else:
                unknown.setdefault(entry.resource, []).extend(entry.batch_ids)
        for key, batch_ids in unknown.items():
            hint = f"build_batch_sensor was not given the resource {key!r}; add it to resource_keys"
            self.problems.append(f"{naming(batch_ids)}: {hint}")
        seconds = max(0.1, (self.until - time.monotonic()) * _POLL_SHARE)
        problems: list[str] = []
        done: list[tuple[Abandoned, bool]] = []

        async def look() -> None:
            looks = (self._look_at(key, wanted[key], seconds, problems) for key in self.resources)
            cancels = (
                cancel_abandoned(one, self.resources, wanted, seconds, self.context.log, problems, done)
                for one in abandoned
            )
            await asyncio.gather(*looks, *cancels)

        if not self.memory.background.is_busy:
            for key, poller in self.memory.pollers.items():
                poller.keep_only(wanted[key])
        if not self.memory.background.run(look, seconds + 0.2):  # each look ends itself after `seconds`
            self.problems.append(
                f"a provider did not answer within the {seconds:.0f} s of a tick; the next tick asks again"
            )
        self.problems += problems
        for given, cancelled in done.copy():  # a copy: the thread may still be adding to it
            given.done(cancelled)

    async def _look_at(self, key: str, wanted: Collection[str], seconds: float, problems: list[str]) -> None:
        """Look at the batches of one account; its errors must not concern other accounts."""
        if not wanted:
            return
        try:
            async with self.resources[key].async_client(retry=ONCE) as client:
                await self.memory.pollers[key].look(client, wanted, seconds, self.context.log)
        except AnyBatchError as error:  # a wrong key or setting, which a person has to mend
            problems.append(f"resource {key!r}: {type(error).__name__}: {error}")

    # --- deciding ------------------------------------------------------------------------------------

    def _progress(self, entry: Pending) -> Progress | None:
        """How far the batches are; None until each was seen once. One that is gone counts as ended."""
        poller = self.memory.pollers.get(entry.resource)
        states = poller.states(entry.batch_ids) if poller else {}
        if len(states) < len(entry.batch_ids):
            return None
        seen = [state for state in states.values() if isinstance(state, Batch)]
        if not seen:
            return Progress("gone", True, None, 0, 0, 0)
        return progress_of(seen)

    def _is_over(self, entry: Pending) -> bool:
        """Whether to start the waiting run: its batches have ended, or its deadline has passed."""
        progress = self._progress(entry)
        return entry.is_late or (progress is not None and progress.ended)

    # --- acting --------------------------------------------------------------------------------------

    def _open_if_over(self, entry: Pending) -> None:
        if (
            entry.run is None
            or entry.waits_for_turn
            or self._is_removed(entry)
            or self._is_enough(self.opened)
        ):
            return
        if self._is_over(entry):
            self.gate.open(entry.run.run_id, _progress_tags(self._progress(entry)))
            self.opened.add(entry.run.run_id)

    def _start_if_over(self, storage_id: int, entry: Pending) -> None:
        """Request the run that takes the results: to start now if there are some, else to wait behind the
        gate.

        Without the gate rule it is requested only when there are results.
        """
        submission, over = entry.submission, self._is_over(entry)
        if submission is None or self._is_removed(entry) or self._is_enough(self.requests):
            return
        if not (over or self.parking):
            return
        run = self.context.instance.get_run_by_id(submission.run_id)
        if self._has_own_run(submission, run):
            return
        self.memory.new.requested(storage_id)
        # The submitting run may have parked one since the submission was read.
        if not submissions.has_result_run(self.context.instance, submission):
            self.requests.append(self._request(submission, run, self._progress(entry), over=over))

    def _has_own_run(self, submission: Submission, run: dg.DagsterRun | None) -> bool:
        """Whether the submitting run is still about to reach the result asset itself."""
        if run is None or run.is_finished or time.time() - submission.timestamp > _OWN_RUN:
            return False
        return self.pairs[submission.asset_key] in submissions.planned_assets(self.context.instance, run)

    def _request(
        self, submission: Submission, run: dg.DagsterRun | None, progress: Progress | None, *, over: bool
    ) -> dg.RunRequest:
        """The run that will take the results, and will materialize what the submitting run skipped."""
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
        """Let runs that wait for their turn submit, as far as there is room on their account."""
        for key, resource in self.resources.items():
            mine = [entry.run for entry in entries if entry.run and entry.resource == key]
            if not mine:
                continue
            most = resource.max_in_flight
            room = len(mine) if most is None else most - self.gate.in_flight(key)
            for run in mine[: max(0, room)]:
                if not self._is_out_of_time:
                    self.gate.give_turn(run.run_id, key)

    def _observe(self, entry: Pending) -> None:
        """Report a change of progress as an observation, once.

        The tag of a parked run keeps what was last reported of it.
        """
        progress = self._progress(entry)
        if (
            progress is None
            or self._is_removed(entry)
            or self._is_out_of_time
            or len(self.events) >= MAX_OBSERVATIONS
        ):
            return
        before = entry.reported_stage if entry.run else self.memory.stages.get(entry.key)
        if progress.stage == before:
            return
        asset_key = entry.asset_key
        assert asset_key is not None
        if entry.run is None:
            self.memory.stages[entry.key] = progress.stage
        elif entry.run.run_id not in self.opened:
            tags = _progress_tags(progress)
            self.context.instance.add_run_tags(entry.run.run_id, tags)
            self.memory.parked.note_tags(entry, tags)
        self.events.append(
            dg.AssetObservation(
                asset_key,
                partition=_partition_of(entry),
                description=f"{progress.stage}: {', '.join(entry.batch_ids)}",
                metadata=progress_metadata(progress),
            )
        )

    def _result(self, pending: Sequence[Pending]) -> dg.SensorResult:
        self.memory.stages = {
            entry.key: self.memory.stages[entry.key] for entry in pending if entry.key in self.memory.stages
        }
        for problem in self.problems:
            self.context.log.error(problem)
        summary = "; ".join([f"{len(pending) or 'nothing'} waiting", *self.problems])
        return dg.SensorResult(
            run_requests=self.requests,
            asset_events=self.events,
            cursor=self.memory.new.move(),
            skip_reason=None if self.requests else dg.SkipReason(summary),
        )


def _partition_of(entry: Pending) -> str | None:
    if entry.run is not None:
        return entry.run.tags.get("dagster/partition")
    partitions = entry.submission.partitions if entry.submission else ()
    return partitions[0] if len(partitions) == 1 else None


def _progress_tags(progress: Progress | None) -> dict[str, str]:
    """Tags for the run that waits: how far its batches are."""
    if progress is None:
        return {}
    ended = {submissions.TAG_ENDED: str(progress.ended_at)} if progress.ended_at else {}
    return {submissions.TAG_STATUS: progress.stage, **ended}
