"""Finds submissions in Dagster's event log, where materializations of submit assets record them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dagster import (
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    EventLogRecord,
    RunsFilter,
)
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from .metadata import ResultMetadata, SubmissionMetadata

ROLE = "anybatch/role"  # an asset tag on both assets of a batch asset
SUBMIT, RESULT = "submit", "result"

TAG_BATCHES = "anybatch/batches"
TAG_DEADLINE = "anybatch/deadline"
TAG_ENDED = "anybatch/ended_at"
TAG_RESOURCE = "anybatch/resource"
TAG_STATUS = "anybatch/status"
TAG_SUBMISSION = "anybatch/submission"
TAG_SUBMIT_ASSET = "anybatch/submit_asset"

_PAGE = 1000
_TO_START = (DagsterRunStatus.QUEUED, DagsterRunStatus.MANAGED, DagsterRunStatus.STARTING)
_PARTITION_TAGS = ("dagster/partition", "dagster/asset_partition_range_")
_KEPT_TAGS = ("dagster/backfill", "dagster/priority", "dagster/max_retries", "dagster/retry_strategy")


@dataclass(frozen=True, slots=True)
class Submission:
    """What one run submitted: a run of the submit asset, or for a later round a run of the result asset.

    A run over several partitions has one submission for all of them. `timestamp` is in unix seconds.
    """

    run_id: str
    asset_key: AssetKey
    timestamp: float
    partitions: tuple[str, ...]
    facts: SubmissionMetadata

    @property
    def run_key(self) -> str:
        """Distinguishes submissions, also two that found the same batch."""
        return f"{self.facts.batches}:{self.run_id}"

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which a run that waits for it is found; people read them in the UI."""
        facts = self.facts
        tags = {
            TAG_SUBMISSION: self.run_id,
            TAG_SUBMIT_ASSET: self.asset_key.to_user_string(),
            TAG_BATCHES: facts.batches,
            TAG_RESOURCE: facts.resource,
            TAG_DEADLINE: str(facts.deadline) if facts.deadline is not None else None,
        }
        return {name: value for name, value in tags.items() if value is not None}


class Found(NamedTuple):
    """Submissions with the storage ids of their first events; `until` is the last id read, if more follow."""

    submissions: list[tuple[int, Submission]]
    until: int | None


def batch_asset_pairs(graph: AssetGraph) -> dict[AssetKey, AssetKey]:
    """The submit assets of a code location, each with its result asset.

    Read from the asset graph, because keys change after definition when modules are loaded under a prefix.
    """
    pairs = {}
    for key in graph.get_all_asset_keys():
        if graph.get(key).tags.get(ROLE) == RESULT:
            pairs.update(dict.fromkeys(graph.get(key).parent_keys, key))
    return pairs


def latest_ids(instance: DagsterInstance, keys: Sequence[AssetKey]) -> dict[AssetKey, int]:
    """The storage id of each asset's newest materialization, in one query."""
    entries = (record.asset_entry for record in instance.get_asset_records(keys))
    return {entry.asset_key: entry.last_materialization_storage_id or 0 for entry in entries}


def find_submissions(instance: DagsterInstance, submit_key: AssetKey, *, after: int, limit: int) -> Found:
    """The submissions of one asset whose events have storage ids above `after`, oldest first."""
    records = instance.fetch_materializations(
        AssetRecordsFilter(asset_key=submit_key, after_storage_id=after), limit=limit, ascending=True
    ).records
    by_run: dict[str, list[EventLogRecord]] = {}
    for record in records:
        by_run.setdefault(record.run_id, []).append(record)
    found = []
    for run_id, mine in by_run.items():
        events = [record.asset_materialization for record in mine]
        submission = _submission(run_id, submit_key, mine[0].timestamp, [event for event in events if event])
        if submission:
            found.append((mine[0].storage_id, submission))
    return Found(found, records[-1].storage_id if len(records) == limit else None)


def latest_submission(
    instance: DagsterInstance, submit_key: AssetKey, partitions: Sequence[str]
) -> Submission | None:
    """The newest submission of an asset that covers the first of these partitions."""
    records = instance.fetch_materializations(
        AssetRecordsFilter(asset_key=submit_key, asset_partitions=list(partitions[:1]) or None), limit=1
    ).records
    return submission_of_run(instance, submit_key, records[0].run_id) if records else None


def submission_of_run(instance: DagsterInstance, submit_key: AssetKey, run_id: str) -> Submission | None:
    """What a run last submitted for an asset; None if nothing, or if the run was deleted."""
    entries = [
        entry
        for entry in instance.all_logs(run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
        if entry.dagster_event and entry.dagster_event.asset_key == submit_key
    ]
    events = [entry.asset_materialization for entry in entries]
    timestamp = entries[0].timestamp if entries else 0.0
    return _submission(run_id, submit_key, timestamp, [event for event in events if event])


def collected_submissions(instance: DagsterInstance, result_key: AssetKey, *, after: int) -> set[str]:
    """The run ids of submissions whose results were materialized after storage id `after`."""
    served: set[str] = set()
    while True:
        records = instance.fetch_materializations(
            AssetRecordsFilter(asset_key=result_key, after_storage_id=after), limit=_PAGE, ascending=True
        ).records
        events = [record.asset_materialization for record in records]
        facts = (ResultMetadata.extract(event.metadata) for event in events if event)
        served |= {one.submission for one in facts if one.submission is not None}
        if len(records) < _PAGE:
            return served
        after = records[-1].storage_id


def has_result_run(instance: DagsterInstance, submission: Submission) -> bool:
    """Whether a run was ever made to wait for this submission."""
    return bool(instance.get_run_ids(RunsFilter(tags=submission.tags), limit=1))


def is_waited_for(instance: DagsterInstance, submission: Submission, *, besides: str) -> bool:
    """Whether something other than the run `besides` is going to take the results.

    That is a run in the queue; or the sensor, if no run was ever made for the submission, as the sensor makes
    one. A run that has already started does not count: it may be about to end without the results.
    """
    runs = instance.get_runs(RunsFilter(tags=submission.tags))
    return not runs or any(run.status in _TO_START and run.run_id != besides for run in runs)


def planned_assets(instance: DagsterInstance, run: DagsterRun) -> set[AssetKey]:
    """The assets that a run set out to materialize, whatever kind of job it is."""
    if run.asset_selection:  # empty if the run is of a whole job, or was started in process
        return set(run.asset_selection)
    planned = instance.all_logs(run.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    keys = (entry.dagster_event.asset_key for entry in planned if entry.dagster_event)
    return {key for key in keys if key is not None}


def waiting_assets(graph: AssetGraph, planned: set[AssetKey], result_key: AssetKey) -> set[AssetKey]:
    """What to materialize once a batch has ended: the result asset, and what the first run skipped for it."""
    found, edge = {result_key}, {result_key}
    while edge:
        edge = {child for key in edge for child in graph.get(key).child_keys if child in planned} - found
        found |= edge
    return found


def inherited_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The submitting run's tags that its result run needs: a person's own, those of partition and backfill.

    A backfill counts only what runs with its tag have materialized.
    """

    def kept(name: str) -> bool:
        if name.startswith((".dagster/", "anybatch/")):
            return False
        return not name.startswith("dagster/") or name.startswith(_PARTITION_TAGS) or name in _KEPT_TAGS

    return {name: value for name, value in tags.items() if kept(name)}


def _submission(
    run_id: str, submit_key: AssetKey, timestamp: float, events: Sequence[AssetMaterialization]
) -> Submission | None:
    """The last submission among a run's events; earlier ones of the same run ended at once."""
    facts = SubmissionMetadata.extract(events[-1].metadata) if events else SubmissionMetadata()
    if not run_id or not facts.batches:  # a person reported the materialization: nothing was submitted
        return None
    partitions = dict.fromkeys(event.partition for event in events if event.partition is not None)
    return Submission(run_id, submit_key, timestamp, tuple(partitions), facts)
