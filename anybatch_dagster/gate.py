"""How a result run waits without a process: it is queued, behind a gate that the batch sensor opens.

The gate is a run tag whose concurrency limit is 0 in the instance's `dagster.yaml`:

    concurrency:
      runs:
        tag_concurrency_limits:
          - {key: anybatch/gate, value: waiting, limit: 0}

Everything that knows about this is here. Dagster 1.13.26 brought a run status SUSPENDED ("waiting on
external work with no run worker") that nothing writes yet; once something does, `Gate` moves to it.
"""

from collections.abc import Sequence

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

TAG = "anybatch/gate"
WAITING = "waiting"
OPEN = "open"
CANCELLED = "cancelled"


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

    @property
    def closed_tags(self) -> dict[str, str]:
        """The tags that park a new run."""
        return {TAG: WAITING}

    def waiting(self) -> Sequence[DagsterRun]:
        """All parked runs, re-executed ones included: those inherit the tag of the run they repeat."""
        return self._instance.get_runs(
            RunsFilter(statuses=[DagsterRunStatus.QUEUED], tags={TAG: WAITING}), ascending=True
        )

    def abandoned(self) -> Sequence[DagsterRun]:
        """Parked runs that a person has terminated, and that nothing was done about yet."""
        return self._instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.CANCELED], tags={TAG: WAITING}))

    def open(self, run_id: str) -> None:
        self._instance.add_run_tags(run_id, {TAG: OPEN})

    def close_for_good(self, run_id: str) -> None:
        """Take a terminated run off the list of abandoned ones."""
        self._instance.add_run_tags(run_id, {TAG: CANCELLED})
