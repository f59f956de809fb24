"""The batch sensor: the only thing that watches while batches run.

A submission is found in the event log, its result run is parked behind the gate (or, where the instance has
no gate rule, held back until there is something to collect), its batches are looked at, and when they have
ended the gate is opened. Each tick may be cut off, repeated or overlap another: what it does to the instance
can be done twice, and the cursor moves only past what needs no more attention.

    state            where it is
    submitted        materializations of submit assets
    waiting          parked runs; unparked, the submissions behind the cursor
    collected        materializations of result assets
"""

import asyncio
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from anybatch import AnyBatchError, Batch, BatchStatus, NotFoundError, RetryPolicy

from . import submissions
from .gate import OPEN, TAG, Gate
from .metadata import progress_metadata
from .polling import Poller, Progress, progress_of
from .resource import BatchResource
from .submissions import RESULT, ROLE, Submission

MAX_NEW = 100  # submissions of one asset taken up in one tick
_SETTLED = 30.0  # seconds after which no event with a lower storage id can still appear
_OWN_RUN = 120.0  # seconds that a submitting run has to collect by itself
_POLL_SHARE = 0.6  # of a tick's budget; the rest is for the event log and the runs
_ONCE = RetryPolicy(attempts=1)  # the next tick is the retry


def build_batch_sensor(
    *,
    name: str = "anybatch_sensor",
    resource_keys: Collection[str] = ("anybatch",),
    minimum_interval_seconds: int = 10,
    tick_seconds: float = 12.0,
    park: bool | None = None,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The one sensor of a code location that waits for all its batch assets.

    resource_keys  keys of the `BatchResource`s in use
    tick_seconds   budget of a tick; sensors share a thread by default, so a slow one delays the others
    park           whether result runs wait in the queue; default: if the instance has the gate rule
    """
    memory = _Memory({key: Poller() for key in resource_keys})

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        gate = Gate(context.instance)
        parking = gate.exists if park is None else park
        return _Tick(context, gate, parking, memory, time.monotonic() + tick_seconds).run()

    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Waits for batches, and starts what they are waited for by.",
        default_status=default_status,
        asset_selection=dg.AssetSelection.tag(ROLE, RESULT).downstream(),
        required_resource_keys=set(resource_keys),
    )


@dataclass(frozen=True, slots=True)
class Pending:
    """Batches that something waits for: a parked run, or a submission that has no run yet."""

    batch_ids: tuple[str, ...]
    resource: str
    deadline: float | None
    mark: str | None = None
    run: dg.DagsterRun | None = None
    submission: Submission | None = None

    @classmethod
    def parked(cls, run: dg.DagsterRun) -> "Pending":
        tags = run.tags
        deadline = tags.get(submissions.TAG_DEADLINE)
        return cls(
            batch_ids=tuple(tags.get(submissions.TAG_BATCHES, "").split(", ")),
            resource=tags.get(submissions.TAG_RESOURCE, ""),
            deadline=float(deadline) if deadline else None,
            mark=tags.get(submissions.TAG_STATUS),
            run=run,
        )

    @classmethod
    def new(cls, submission: Submission) -> "Pending":
        facts = submission.facts
        return cls(facts.batch_ids, facts.resource or "", facts.deadline, submission=submission)


@dataclass(frozen=True)
class _Memory:
    """What the process remembers between ticks, to save calls; a new process does without."""

    pollers: dict[str, Poller]
    marks: dict[str, str] = field(default_factory=dict)  # of submissions that have no run, by run key


@dataclass
class _Tick:
    """One evaluation of the sensor; `until` is on the monotonic clock."""

    context: dg.SensorEvaluationContext
    gate: Gate
    parking: bool
    memory: _Memory
    until: float
    requests: list[dg.RunRequest] = field(default_factory=list)
    events: list[dg.AssetObservation] = field(default_factory=list)
    undecided: list[int] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        repository = self.context.repository_def
        assert repository is not None  # only a context made by hand has none
        self.graph = repository.asset_graph
        self.pairs = submissions.batch_asset_pairs(self.graph)
        self.after = int(json.loads(self.context.cursor)["after"]) if self.context.cursor else 0
        self.newest = self.after
        self.resources: dict[str, BatchResource] = {
            key: getattr(self.context.resources, key) for key in self.memory.pollers
        }

    def run(self) -> dg.SensorResult:
        parked = [Pending.parked(run) for run in self.gate.waiting() if self._is_ours(run)]
        new = list(self._new_submissions())
        pending = [*parked, *(entry for _, entry in new)]
        abandoned = [run for run in self.gate.abandoned() if self._is_ours(run)]
        asyncio.run(self._ask_providers(pending, abandoned))
        for entry in parked:
            self._see_to_parked(entry)
        for storage_id, entry in new:
            self._see_to_new(storage_id, entry)
        return self._result(pending)

    def _is_ours(self, run: dg.DagsterRun) -> bool:
        """Other code locations have a sensor of their own."""
        return _asset_of(run) in self.pairs

    @property
    def _late(self) -> bool:
        return time.monotonic() > self.until

    # --- finding -------------------------------------------------------------------------------------

    def _new_submissions(self) -> Iterable[tuple[int, Pending]]:
        """Submissions behind the cursor that no run was made for and no run has collected."""
        instance = self.context.instance
        for submit_key, result_key in self.pairs.items():
            found = submissions.find_submissions(instance, submit_key, after=self.after, limit=MAX_NEW)
            if found.until is not None:  # what comes after it was not read
                self.undecided.append(found.until + 1)
            if not found.submissions:
                continue
            collected = submissions.collected_submissions(instance, result_key, after=self.after)
            for storage_id, submission in found.submissions:
                self.newest = max(self.newest, storage_id)
                if time.time() - submission.timestamp < _SETTLED:
                    self.undecided.append(storage_id)
                if submission.run_id not in collected and not self._has_result_run(submission):
                    yield storage_id, Pending.new(submission)

    def _has_result_run(self, submission: Submission) -> bool:
        """A run key alone would do, but the daemon looks at it only after all this work.

        Unparked, most have none yet, and it is too dear to ask for each in each tick.
        """
        return self.parking and submissions.has_result_run(self.context.instance, submission)

    def _has_own_run(self, submission: Submission, run: dg.DagsterRun | None) -> bool:
        """Whether the run that submitted is about to look at the batch itself."""
        if run is None or run.is_finished or time.time() - submission.timestamp > _OWN_RUN:
            return False
        return self.pairs[submission.asset_key] in submissions.planned_assets(self.context.instance, run)

    # --- asking providers --------------------------------------------------------------------------------

    async def _ask_providers(self, pending: Sequence[Pending], abandoned: Sequence[dg.DagsterRun]) -> None:
        for entry in pending:
            if entry.resource not in self.resources:
                told = f"build_batch_sensor was not given the resource {entry.resource!r}"
                self.troubles.append(f"{', '.join(entry.batch_ids)}: {told}")
        await asyncio.gather(*(self._look(key, pending) for key in self.resources))
        wanted = {batch_id for entry in pending for batch_id in entry.batch_ids}
        for run in abandoned:
            with suppress(TimeoutError):  # the next tick tries again
                async with asyncio.timeout(max(0.0, self.until - time.monotonic())):
                    await self._cancel(run, wanted)

    async def _look(self, key: str, pending: Sequence[Pending]) -> None:
        """Look at the batches of one account, and see to it that trouble there stays there."""
        poller = self.memory.pollers[key]
        wanted = {batch_id for entry in pending if entry.resource == key for batch_id in entry.batch_ids}
        poller.keep_only(wanted)
        if not wanted:
            return
        seconds = max(0.1, (self.until - time.monotonic()) * _POLL_SHARE)
        try:
            async with self.resources[key].async_client(retry=_ONCE) as client:
                await poller.look(client, wanted, seconds, self.context.log)
        except AnyBatchError as error:  # the key, or the settings: for a person to see to
            self.troubles.append(f"resource {key!r}: {type(error).__name__}: {error}")

    async def _cancel(self, run: dg.DagsterRun, wanted: Collection[str]) -> None:
        """Cancel what a person has terminated here, unless something else waits for it."""
        entry = Pending.parked(run)
        if entry.resource not in self.resources:
            return
        try:
            async with self.resources[entry.resource].async_client(retry=_ONCE) as client:
                for batch_id in set(entry.batch_ids) - set(wanted):
                    batch = await client.retrieve(batch_id)
                    if not batch.status.is_terminal and batch.status is not BatchStatus.CANCELLING:
                        await client.cancel(batch_id)
                        self.context.log.info(f"cancelled {batch_id}: its waiting run was terminated")
        except NotFoundError:
            pass
        except AnyBatchError as error:
            self.troubles.append(f"cancelling {', '.join(entry.batch_ids)}: {error}")
            return
        self.gate.close_for_good(run.run_id)

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

    def _is_over(self, entry: Pending, progress: Progress | None) -> bool:
        """Whether to start what waits: the batches have ended, or the deadline has passed."""
        late = entry.deadline is not None and entry.deadline <= time.time()
        return late or (progress is not None and progress.ended)

    # --- acting --------------------------------------------------------------------------------------

    def _see_to_parked(self, entry: Pending) -> None:
        assert entry.run is not None
        progress, tags = self._progress(entry), {}
        if progress is not None and progress.mark != entry.mark:
            tags[submissions.TAG_STATUS] = progress.mark
            asset_key = _asset_of(entry.run)
            assert asset_key is not None
            self._observe(asset_key, entry.run.tags.get("dagster/partition"), entry, progress)
        if progress is not None and progress.ended_at:
            tags[submissions.TAG_ENDED] = str(progress.ended_at)
        if tags and not self._late:
            self.context.instance.add_run_tags(entry.run.run_id, tags)
        if self._is_over(entry, progress):
            self.gate.open(entry.run.run_id)

    def _see_to_new(self, storage_id: int, entry: Pending) -> None:
        submission, progress = entry.submission, self._progress(entry)
        assert submission is not None
        over = self._is_over(entry, progress)
        if progress is not None and not self.parking:
            self._note(submission, entry, progress)
        if self._late or not (over or self.parking):
            self.undecided.append(storage_id)
            return
        run = self.context.instance.get_run_by_id(submission.run_id)
        if self._has_own_run(submission, run):
            self.undecided.append(storage_id)
            return
        self.requests.append(self._request(submission, run, progress, over=over))

    def _request(
        self, submission: Submission, run: dg.DagsterRun | None, progress: Progress | None, *, over: bool
    ) -> dg.RunRequest:
        """The run that is to take the results, and to do what the submitting run skipped for want of them."""
        planned = submissions.planned_assets(self.context.instance, run) if run else set()
        assets = submissions.waiting_assets(self.graph, planned, self.pairs[submission.asset_key])
        return dg.RunRequest(
            run_key=submission.run_key,
            asset_selection=sorted(assets),
            tags={
                **(submissions.inherited_tags(run.tags) if run else {}),
                **_tags(submission, progress),
                **({TAG: OPEN} if over else self.gate.closed_tags),
            },
            run_config=_config_for(run, self.graph, assets),
        )

    def _note(self, submission: Submission, entry: Pending, progress: Progress) -> None:
        """Observe a submission that has no run to remember what was told of it."""
        if self.memory.marks.get(submission.run_key) != progress.mark:
            self.memory.marks[submission.run_key] = progress.mark
            partition = submission.partitions[0] if len(submission.partitions) == 1 else None
            self._observe(submission.asset_key, partition, entry, progress)

    def _observe(
        self, asset_key: dg.AssetKey, partition: str | None, entry: Pending, progress: Progress
    ) -> None:
        self.events.append(
            dg.AssetObservation(
                asset_key,
                partition=partition,
                description=f"{progress.mark}: {', '.join(entry.batch_ids)}",
                metadata=progress_metadata(progress),
            )
        )

    def _result(self, pending: Sequence[Pending]) -> dg.SensorResult:
        after = min((storage_id - 1 for storage_id in self.undecided), default=self.newest)
        # An event may be read again after the cursor was moved by a tick that this one overlaps.
        cursor = json.dumps({"after": max(self.after, after)})
        keys = {entry.submission.run_key for entry in pending if entry.submission}
        for key in self.memory.marks.keys() - keys:
            del self.memory.marks[key]
        for trouble in self.troubles:
            self.context.log.error(trouble)
        told = "; ".join([f"{len(pending) or 'nothing'} waiting", *self.troubles])
        return dg.SensorResult(
            run_requests=self.requests,
            asset_events=self.events,
            cursor=cursor,
            skip_reason=None if self.requests else dg.SkipReason(told),
        )


def _asset_of(run: dg.DagsterRun) -> dg.AssetKey | None:
    name = run.tags.get(submissions.TAG_SUBMIT_ASSET)
    return dg.AssetKey.from_user_string(name) if name else None


def _tags(submission: Submission, progress: Progress | None) -> dict[str, str]:
    """What a result run needs to know, readable for people beside it in the UI."""
    facts = submission.facts
    told = {
        submissions.TAG_SUBMISSION: submission.run_id,
        submissions.TAG_SUBMIT_ASSET: submission.asset_key.to_user_string(),
        submissions.TAG_BATCHES: facts.batches,
        submissions.TAG_RESOURCE: facts.resource,
        submissions.TAG_DEADLINE: str(facts.deadline) if facts.deadline is not None else None,
        submissions.TAG_STATUS: progress.mark if progress else None,
        submissions.TAG_ENDED: str(progress.ended_at) if progress and progress.ended_at else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _config_for(
    run: dg.DagsterRun | None, graph: AssetGraph, assets: Collection[dg.AssetKey]
) -> dict[str, Any]:
    """The part of the submitting run's config that speaks of these assets, and of resources."""
    config: Mapping[str, Any] = run.run_config if run else {}
    names = {graph.get(key).assets_def.node_def.name for key in assets}
    ops = {name: value for name, value in (config.get("ops") or {}).items() if name in names}
    kept = {"ops": ops, "resources": config.get("resources")}
    return {section: value for section, value in kept.items() if value}
