"""Batches that other systems created, as events of an external asset."""

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
from .polling import Aside

if TYPE_CHECKING:
    from .resource import BatchResource

_PAGES = 20  # of the listing that are read in one tick
_MOST_EVENTS = 50  # of one tick: Dagster writes them one by one, while other sensors wait
_OVERLAP = 900  # seconds by which a batch may turn up as ended later than another that ended after it
_MOST_TOLD = 200  # ended batches that are remembered by a mark each, which bounds the cursor

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
    """A sensor that reports batches created outside of Dagster as events of an external asset, once each,
    when they have ended: what is downstream can be automated on them like on any other asset.

    An event may be reported a second time where a tick is cut off.

    event      "observation", or "materialization" for the batches that have results; of failed ones without
               any there are observations in any case
    endpoint, metadata, where  which batches: those with this endpoint, with all of this metadata, and for
               which the function holds
    partition  a function of the batch that names the asset's partition
    lookback   how long before its end a batch may have been created; also how far back the first tick looks
    """
    key = asset.key if isinstance(asset, dg.AssetSpec) else dg.AssetKey.from_coercible(asset)
    wanted = dict(metadata or {})
    aside = Aside()

    def is_wanted(batch: Batch) -> bool:
        marks = batch.metadata or {}
        return (
            batch.status.is_terminal
            and not str(marks.get("anybatch_job", "")).startswith("dagster:")
            and endpoint in (None, batch.endpoint)
            and wanted.items() <= marks.items()
            and (where is None or where(batch))
        )

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        resource: BatchResource = getattr(context.resources, resource_key)
        seen = Seen.read(context.cursor, time.time() - lookback.total_seconds())
        listing = _Listing(resource, seen.ended - lookback.total_seconds())
        if not aside.run(listing.read, tick_seconds):
            return dg.SensorResult(skip_reason="the provider does not answer in time", cursor=context.cursor)
        if listing.trouble:
            context.log.warning(listing.trouble)
        news = sorted(filter(seen.is_new, filter(is_wanted, listing.batches)), key=end_of)[:_MOST_EVENTS]
        return dg.SensorResult(
            asset_events=[_event(key, event, batch, partition) for batch in news],
            cursor=seen.with_told(news, all_read=listing.is_complete).write(),
            skip_reason=None if news else dg.SkipReason(listing.trouble or "no batch has ended"),
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
    """When a batch ended, unix seconds; where the provider does not say, when it was created."""
    return batch.ended_at or batch.created_at or 0


@dataclass(frozen=True)
class Seen:
    """Which ended batches were reported: all that ended before a point in time, and some after it."""

    ended: float
    told: Mapping[str, int] = field(default_factory=dict)  # a mark of each, and when it ended

    @classmethod
    def read(cls, cursor: str | None, since: float) -> Seen:
        """From a cursor; with none, nothing that ended before `since` is news."""
        return cls(**json.loads(cursor)) if cursor else cls(since)

    def write(self) -> str:
        return json.dumps({"ended": self.ended, "told": self.told}, separators=(",", ":"))

    def is_new(self, batch: Batch) -> bool:
        return end_of(batch) >= self.ended and _mark(batch) not in self.told

    def with_told(self, batches: list[Batch], *, all_read: bool = True) -> Seen:
        """With these, in order of their ends; what lies well behind the newest needs no mark any more.

        `all_read`: the listing was read to its end. Else what was not read may have ended before these, and
        is news as long as the marks suffice to tell.
        """
        told = {**self.told, **{_mark(batch): end_of(batch) for batch in batches}}
        newest = max(told.values(), default=-math.inf)
        kept = dict(sorted(told.items(), key=lambda item: item[1])[-_MOST_TOLD:])
        oldest = min(kept.values(), default=0) if len(kept) < len(told) else -math.inf
        ended = max(self.ended, newest - _OVERLAP if all_read else -math.inf, oldest)
        return Seen(ended, {mark: end for mark, end in kept.items() if end >= ended})


def _mark(batch: Batch) -> str:
    return hashlib.sha256(batch.id.encode()).hexdigest()[:6]


# --- asking, telling ---------------------------------------------------------------------------------


class _Listing:
    """The batches of an account that were created after a point in time, newest first.

    `is_complete`: it was read to its end; only then is a batch that is not in it not there.
    """

    def __init__(self, resource: BatchResource, created_after: float) -> None:
        self._resource, self._after = resource, created_after
        self.batches: list[Batch] = []
        self.is_complete = False
        self.trouble: str | None = None

    async def read(self) -> None:
        try:
            async with self._resource.async_client(retry=RetryPolicy(attempts=1)) as client:
                await self._pages(client)
        except AnyBatchError as error:
            self.trouble = f"{type(error).__name__}: {error}"

    async def _pages(self, client: AsyncClient) -> None:
        found = client.iter_batches(since=self._after, max_pages=_PAGES)
        async for batch in found:
            self.batches.append(batch)
        self.is_complete = found.reading.is_complete
        if found.reading.is_cut:
            self.trouble = (
                f"the provider says that it has more than the {len(self.batches):,} batches that were "
                "looked at, and not how to read on"
            )
        elif not self.is_complete:
            self.trouble = f"only the newest {len(self.batches):,} batches were looked at: shorten `lookback`"


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
    told: dict[str, Any] = {
        "asset_key": key,
        "partition": partition(batch) if partition else None,
        "description": f"{batch.id}: {batch.status.value}",
        "metadata": dict(facts),
    }
    # A batch that failed half-way may have rows that were paid for.
    has_results = batch.status is not BatchStatus.FAILED or bool(counts and counts.completed)
    if event == "materialization" and has_results:
        return dg.AssetMaterialization(**told)
    return dg.AssetObservation(**told)
