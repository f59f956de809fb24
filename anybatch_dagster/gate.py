"""How a run waits without a process: it stays in the queue until the batch sensor opens its gate.

A run behind the gate has the tag `anybatch/gate: waiting`, whose concurrency limit is 0 in `dagster.yaml`:

    concurrency:
      runs:
        tag_concurrency_limits:
          - {key: anybatch/gate, value: waiting, limit: 0}

Only this module knows of it. Dagster 1.13.26 brought a run status SUSPENDED ("waiting on external work with
no run worker"), which nothing in Dagster sets yet; once something does, `Gate` can use it instead.
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
IN_FLIGHT = "anybatch/in_flight"  # key of the resource on whose account the run has, or will have, a batch
TURN = "anybatch/turn"  # the id of a run that may submit; "waiting" until it may

_IMPLICIT_JOB = "__ASSET_JOB"


class Gate:
    """The parked runs of one instance. Every method may be called twice without harm."""

    def __init__(self, instance: DagsterInstance) -> None:
        self._instance = instance

    @property
    def exists(self) -> bool:
        """Whether the instance has the gate rule; without it, waiting runs would start at once."""
        queue = self._instance.get_concurrency_config().run_queue_config
        limits = queue.tag_concurrency_limits if queue else ()
        return any(
            (rule.get("key"), rule.get("value"), rule.get("limit")) == (TAG, WAITING, 0) for rule in limits
        )

    def waiting(self) -> Sequence[str]:
        """The ids of all parked runs, also of re-executed ones, which inherit the tags."""
        return self._instance.get_run_ids(RunsFilter(statuses=[DagsterRunStatus.QUEUED], tags={TAG: WAITING}))

    def runs(self, run_ids: Collection[str]) -> Sequence[DagsterRun]:
        """The runs with these ids, oldest first."""
        return self._instance.get_runs(RunsFilter(run_ids=list(run_ids)), ascending=True) if run_ids else []

    def abandoned(self) -> Sequence[DagsterRun]:
        """Parked runs that a person has terminated, and whose batches are not cancelled yet."""
        return self._instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.CANCELED], tags={TAG: WAITING}))

    def open(self, run_id: str, tags: Mapping[str, str] | None = None) -> None:
        """Let a parked run start, and add some tags to it."""
        self._instance.add_run_tags(run_id, {**(tags or {}), TAG: OPEN})

    def mark_cancelled(self, run_id: str) -> None:
        """Take a terminated run off the list of abandoned ones."""
        self._instance.add_run_tags(run_id, {TAG: CANCELLED})

    def fail(self, run_id: str, message: str) -> None:
        """Fail a parked run that cannot be started."""
        run = self._instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            self._instance.report_run_failed(run, message)

    # --- turns: at most `max_in_flight` batches ----------------------------------------------------------

    def in_flight(self, resource: str) -> int:
        """How many runs have a batch on this account, or are about to submit one."""
        return self._instance.get_runs_count(
            RunsFilter(statuses=NOT_FINISHED_STATUSES, tags={IN_FLIGHT: resource})
        )

    def take_turn(self, run: DagsterRun, resource: str, most: int) -> bool:
        """Whether this run may submit now.

        The run counts itself first, and then asks. So if two ask at once, both may have to wait, but never do
        both submit when there is room for one.
        """
        if run.tags.get(TURN) == run.run_id:  # the sensor gave it a turn
            return True
        self._instance.add_run_tags(run.run_id, {IN_FLIGHT: resource})
        if self.in_flight(resource) <= most:
            return True
        self._instance.add_run_tags(run.run_id, {IN_FLIGHT: ""})
        return False

    def give_turn(self, run_id: str, resource: str) -> None:
        """Let a run that waits for its turn start and submit."""
        self._instance.add_run_tags(run_id, {IN_FLIGHT: resource, TURN: run_id, TAG: OPEN})

    # --- parking from within a run --------------------------------------------------------------------

    def can_park(self, run: DagsterRun) -> bool:
        """Whether a run can queue another one: the gate rule exists, and a daemon can start what is queued.

        A run that was started by hand, in a process of its own, belongs to no code location, so no daemon
        could.
        """
        return run.remote_job_origin is not None and self.exists

    def park(
        self, context: AssetExecutionContext, assets: Collection[AssetKey], tags: Mapping[str, str]
    ) -> str:
        """Queue a run of these assets behind the gate; for the same tags it finds the run that is already
        there.

        The new run exists before the run that asks for it has finished. A backfill fails assets that have
        neither a result nor a run; so it always finds one, even if no sensor is running.

        Returns:
            The id of the parked run.
        """
        ours = {name: value for name, value in tags.items() if name.startswith("anybatch/")}
        there = self._instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=ours), limit=1)
        parked = there[0] if there else self._new_run(context, assets, tags)
        if (
            parked.status is DagsterRunStatus.NOT_STARTED
        ):  # new, or the process was killed before it queued the run
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
    """Whether a run belongs to this sensor's code location, whatever assets that defines by now."""
    if run.remote_job_origin is None or context.code_location_origin is None:
        return False
    origin = run.remote_job_origin.repository_origin
    mine = (context.code_location_origin.location_name, context.repository_name)
    return (origin.code_location_origin.location_name, origin.repository_name) == mine


def config_for(config: Mapping[str, Any], names: Collection[str], *, whole: bool = False) -> dict[str, Any]:
    """The part of a run's config that these ops and the resources need.

    Args:
        config: The run's config.
        names: Names of the ops.
        whole: Whether the new run is of the same job; then the job's own sections stay, too.
    """
    kept = dict(config) if whole else {"resources": config.get("resources")}
    kept["ops"] = {name: value for name, value in (config.get("ops") or {}).items() if name in names}
    return {section: value for section, value in kept.items() if value}
