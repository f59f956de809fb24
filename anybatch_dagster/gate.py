"""How a run waits without a process: it is queued, behind a gate that the batch sensor opens.

The gate is a run tag whose concurrency limit is 0 in the instance's `dagster.yaml`:

    concurrency:
      runs:
        tag_concurrency_limits:
          - {key: anybatch/gate, value: waiting, limit: 0}

Everything that knows about this is here. Dagster 1.13.26 brought a run status SUSPENDED ("waiting on
external work with no run worker") that nothing writes yet; once something does, `Gate` moves to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster import (
    DagsterEvent,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunsFilter,
    SensorEvaluationContext,
)
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

if TYPE_CHECKING:
    from dagster import AssetExecutionContext, AssetKey

TAG = "anybatch/gate"
WAITING = "waiting"
OPEN = "open"
CANCELLED = "cancelled"
IN_FLIGHT = "anybatch/in_flight"  # the resource whose account the run's batch is on, or will be
TURN = "anybatch/turn"  # the run that has been given a turn to submit; "waiting" until then

_IMPLICIT_JOB = "__ASSET_JOB"


class Gate:
    """The parked runs of one instance. Every method may be repeated without harm."""

    def __init__(self, instance: DagsterInstance) -> None:
        self._instance = instance

    @property
    def exists(self) -> bool:
        """Whether the instance holds back runs that wait; without the rule they would start at once."""
        queue = self._instance.get_concurrency_config().run_queue_config
        limits = queue.tag_concurrency_limits if queue else ()
        return any(
            (rule.get("key"), rule.get("value"), rule.get("limit")) == (TAG, WAITING, 0) for rule in limits
        )

    def waiting(self) -> Sequence[str]:
        """The ids of all parked runs, re-executed ones included: those inherit the tags."""
        return self._instance.get_run_ids(RunsFilter(statuses=[DagsterRunStatus.QUEUED], tags={TAG: WAITING}))

    def runs(self, run_ids: Collection[str]) -> Sequence[DagsterRun]:
        """These runs, oldest first."""
        return self._instance.get_runs(RunsFilter(run_ids=list(run_ids)), ascending=True) if run_ids else []

    def abandoned(self) -> Sequence[DagsterRun]:
        """Parked runs that a person has terminated, and that nothing was done about yet."""
        return self._instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.CANCELED], tags={TAG: WAITING}))

    def open(self, run_id: str, told: Mapping[str, str] | None = None) -> None:
        """Let a parked run start, with some more tags."""
        self._instance.add_run_tags(run_id, {**(told or {}), TAG: OPEN})

    def close_for_good(self, run_id: str) -> None:
        """Take a terminated run off the list of abandoned ones."""
        self._instance.add_run_tags(run_id, {TAG: CANCELLED})

    def fail(self, run_id: str, message: str) -> None:
        """End a parked run that cannot be started, in red."""
        run = self._instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            self._instance.report_run_failed(run, message)

    # --- turns: a cap on the batches in flight -----------------------------------------------------------

    def in_flight(self, resource: str) -> int:
        """How many runs have a batch on this account, or are about to submit one."""
        return self._instance.get_runs_count(
            RunsFilter(statuses=NOT_FINISHED_STATUSES, tags={IN_FLIGHT: resource})
        )

    def take_turn(self, run: DagsterRun, resource: str, most: int) -> bool:
        """Whether this run may submit now.

        It is counted before it counts: of two that ask at once, both may be sent back, and never both let in
        where there is room for one.
        """
        if run.tags.get(TURN) == run.run_id:  # the sensor has given it
            return True
        self._instance.add_run_tags(run.run_id, {IN_FLIGHT: resource})
        if self.in_flight(resource) <= most:
            return True
        self._instance.add_run_tags(run.run_id, {IN_FLIGHT: ""})
        return False

    def give_turn(self, run_id: str, resource: str) -> None:
        self._instance.add_run_tags(run_id, {IN_FLIGHT: resource, TURN: run_id, TAG: OPEN})

    # --- parking from within a run --------------------------------------------------------------------

    def can_park(self, run: DagsterRun) -> bool:
        """Whether a run can queue another one: there is the rule, and a daemon that can start what is queued.

        Processes that were started by hand belong to no code location.
        """
        return run.remote_job_origin is not None and self.exists

    def park(
        self, context: AssetExecutionContext, assets: Collection[AssetKey], tags: Mapping[str, str]
    ) -> str:
        """Queue a run of these assets behind the gate, and return its id; the same one for the same tags.

        It exists before the run that asks for it has finished. So a backfill, which fails what it finds
        without a result and without a run, always finds one of the two, even where no sensor is running.
        """
        ours = {name: value for name, value in tags.items() if name.startswith("anybatch/")}
        there = self._instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=ours), limit=1)
        parked = there[0] if there else self._new_run(context, assets, tags)
        if parked.status is DagsterRunStatus.NOT_STARTED:  # new, or of a process that was killed in between
            self._instance.report_dagster_event(DagsterEvent.job_enqueue(parked), run_id=parked.run_id)
        return parked.run_id

    def _new_run(
        self, context: AssetExecutionContext, assets: Collection[AssetKey], tags: Mapping[str, str]
    ) -> DagsterRun:
        run, repository = context.run, context.repository_def
        job = repository.get_job(run.job_name)
        same_job = set(assets) <= set(job.asset_layer.asset_graph.executable_asset_keys)
        if not same_job:
            job = repository.get_job(_IMPLICIT_JOB)
        assert run.remote_job_origin is not None
        origin = run.remote_job_origin
        code = run.job_code_origin
        names = {repository.asset_graph.get(key).assets_def.node_def.name for key in assets}
        return self._instance.create_run_for_job(
            job,
            run_config=config_for(run.run_config, names, whole=same_job),
            tags={**tags, TAG: WAITING},
            asset_selection=frozenset(assets),
            remote_job_origin=type(origin)(origin.repository_origin, job.name),
            job_code_origin=code._replace(job_name=job.name) if code else None,
            status=DagsterRunStatus.NOT_STARTED,
            repository_load_data=repository.repository_load_data,
        )


def is_from(run: DagsterRun, context: SensorEvaluationContext) -> bool:
    """Whether a run belongs to the code location of this sensor, whatever that defines by now."""
    if run.remote_job_origin is None or context.code_location_origin is None:
        return False
    origin = run.remote_job_origin.repository_origin
    mine = (context.code_location_origin.location_name, context.repository_name)
    return (origin.code_location_origin.location_name, origin.repository_name) == mine


def config_for(config: Mapping[str, Any], names: Collection[str], *, whole: bool = False) -> dict[str, Any]:
    """The part of a run's config that speaks of these ops, and of resources; `whole` keeps the job's own."""
    kept = dict(config) if whole else {"resources": config.get("resources")}
    kept["ops"] = {name: value for name, value in (config.get("ops") or {}).items() if name in names}
    return {section: value for section, value in kept.items() if value}
