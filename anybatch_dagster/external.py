"""build_external_batch_sensor: reports batches that other systems created as events of an external asset."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg

from anybatch import AnyBatchError, AsyncClient, Batch, BatchStatus, RetryPolicy

from .metadata import ExternalBatchMetadata
from .polling import BackgroundRunner

if TYPE_CHECKING:
    from .resource import BatchResource

_PAGES = 20  # pages of the listing that one tick reads
_MAX_EVENTS = 50  # events in one tick: Dagster writes them one by one while other sensors wait
_OVERLAP = 900  # seconds after its end at which a provider may first show that a batch has ended
_MAX_REPORTED = 200  # hashes of reported batches in the cursor, which bounds its size

Event = Literal["observation", "materialization"]


def build_external_batch_sensor(
    asset: str | dg.AssetKey | dg.AssetSpec,
    *,
    name: str | None = None,
    resource_key: str = "anybatch",
    event: Event = "observation",
    endpoint: str | None = None,
    metadata: Mapping[str, str] | None = None,
    where: Callable[[Batch], bool] | None = None,
    partition: Callable[[Batch], str | None] | None = None,
    lookback: timedelta = timedelta(days=2),
    minimum_interval_seconds: int = 60,
    tick_seconds: float = 12.0,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """A sensor that reports each batch created outside of Dagster, once it has ended, as an event of an
    external asset.

    Assets downstream can be automated on these events as on any other asset. If a tick is cut off, an event
    may be reported twice.

    Args:
        asset: The external asset.
        name: Name of the sensor. Default: the asset's key and `_batches`.
        resource_key: Key of the `BatchResource`.
        event: "observation", or "materialization" for batches that have results; a batch without any is
            observed in either case.
        endpoint: Only batches on this endpoint.
        metadata: Only batches with all of this metadata.
        where: Only batches for which this function returns True.
        partition: Names the asset's partition for a batch.
        lookback: How long a batch may take from its creation to its end; the first tick looks back so far.
        minimum_interval_seconds: Seconds between two ticks.
        tick_seconds: Seconds that a tick may take.
        default_status: Whether the sensor runs without being switched on.
    """
    key = asset.key if isinstance(asset, dg.AssetSpec) else dg.AssetKey.from_coercible(asset)
    wanted = dict(metadata or {})
    background = BackgroundRunner()

    def is_wanted(batch: Batch) -> bool:
        found = batch.metadata or {}
        return (
            batch.status.is_terminal
            and not str(found.get("anybatch_job", "")).startswith("dagster:")
            and endpoint in (None, batch.endpoint)
            and wanted.items() <= found.items()
            and (where is None or where(batch))
        )

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        resource: BatchResource = getattr(context.resources, resource_key)
        seen = Seen.read(context.cursor, time.time() - lookback.total_seconds())
        listing = _Listing(resource, seen.ended - lookback.total_seconds())
        if not background.run(listing.read, tick_seconds):
            return dg.SensorResult(
                skip_reason="the provider did not answer in time; the next tick asks again",
                cursor=context.cursor,
            )
        if listing.problem:
            context.log.warning(listing.problem)
        news = sorted(filter(seen.is_new, filter(is_wanted, listing.batches)), key=end_of)[:_MAX_EVENTS]
        return dg.SensorResult(
            asset_events=[_event(key, event, batch, partition) for batch in news],
            cursor=seen.with_reported(news, all_read=listing.is_complete).write(),
            skip_reason=None if news else dg.SkipReason(listing.problem or "no batch has ended"),
        )

    return dg.SensorDefinition(
        name=name or f"{key.to_python_identifier()}_batches",
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description=f"Reports batches that other systems created, as events of `{key.to_user_string()}`.",
        default_status=default_status,
        required_resource_keys={resource_key},
    )


# --- what was reported -------------------------------------------------------------------------------


def end_of(batch: Batch) -> int:
    """When a batch ended, unix seconds; if the provider does not say, when it was created."""
    return batch.ended_at or batch.created_at or 0


@dataclass(frozen=True)
class Seen:
    """Which ended batches were reported.

    Attributes:
        ended: All that ended before this, in unix seconds, were reported.
        reported: Of those that ended later, a short hash of each id that was reported, and when it ended.
    """

    ended: float
    reported: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, cursor: str | None, since: float) -> Seen:
        """From a cursor. Without one, what ended before `since` counts as reported."""
        if not cursor:
            return cls(since)
        known = json.loads(cursor)
        return cls(known["ended"], known["told"])

    def write(self) -> str:
        return json.dumps({"ended": self.ended, "told": self.reported}, separators=(",", ":"))

    def is_new(self, batch: Batch) -> bool:
        return end_of(batch) >= self.ended and _short_hash(batch) not in self.reported

    def with_reported(self, batches: list[Batch], *, all_read: bool = True) -> Seen:
        """The same with these batches, which are in the order of their ends.

        Args:
            batches: What was reported now.
            all_read: Whether the listing was read to its end. If not, a batch on an unread page may have
                ended before these, so `ended` does not move, as long as the hashes suffice.
        """
        reported = {**self.reported, **{_short_hash(batch): end_of(batch) for batch in batches}}
        newest = max(reported.values(), default=-math.inf)
        kept = dict(sorted(reported.items(), key=lambda item: item[1])[-_MAX_REPORTED:])
        oldest = min(kept.values(), default=0) if len(kept) < len(reported) else -math.inf
        ended = max(self.ended, newest - _OVERLAP if all_read else -math.inf, oldest)
        return Seen(ended, {key: end for key, end in kept.items() if end >= ended})


def _short_hash(batch: Batch) -> str:
    return hashlib.sha256(batch.id.encode()).hexdigest()[:6]


# --- the listing and the events -------------------------------------------------------------------------


class _Listing:
    """The batches of an account that were created after a point in time, newest first.

    `is_complete` says that the listing was read to its end; only then is a batch that is not in it not there.
    """

    def __init__(self, resource: BatchResource, created_after: float) -> None:
        self._resource, self._after = resource, created_after
        self.batches: list[Batch] = []
        self.is_complete = False
        self.problem: str | None = None

    async def read(self) -> None:
        try:
            async with self._resource.async_client(retry=RetryPolicy(attempts=1)) as client:
                await self._pages(client)
        except AnyBatchError as error:
            self.problem = f"{type(error).__name__}: {error}"

    async def _pages(self, client: AsyncClient) -> None:
        found = client.iter_batches(since=self._after, max_pages=_PAGES)
        async for batch in found:
            self.batches.append(batch)
        self.is_complete = found.reading.is_complete
        if found.reading.is_cut:
            self.problem = (
                f"the provider says that there are more than these {len(self.batches):,} batches, but not "
                "how to read on; batches beyond them are not reported"
            )
        elif not self.is_complete:
            self.problem = f"only the newest {len(self.batches):,} batches were read: shorten `lookback`"


def _event(
    key: dg.AssetKey,
    event: Event,
    batch: Batch,
    partition: Callable[[Batch], str | None] | None,
) -> dg.AssetObservation | dg.AssetMaterialization:
    counts = batch.request_counts
    facts = ExternalBatchMetadata(
        batch=batch.id,
        status=batch.status.value,
        provider=batch.provider,
        endpoint=batch.endpoint,
        model=batch.model,
        requests=counts.total if counts else None,
        succeeded=counts.completed if counts else None,
        failed=counts.failed if counts else None,
        turnaround_s=float(batch.ended_at - batch.created_at)
        if batch.ended_at and batch.created_at
        else None,
    )
    arguments: dict[str, Any] = {
        "asset_key": key,
        "partition": partition(batch) if partition else None,
        "description": f"{batch.id}: {batch.status.value}",
        "metadata": dict(facts),
    }
    # A failed batch may have finished rows, which were paid for.
    has_results = batch.status is not BatchStatus.FAILED or bool(counts and counts.completed)
    if event == "materialization" and has_results:
        return dg.AssetMaterialization(**arguments)
    return dg.AssetObservation(**arguments)
