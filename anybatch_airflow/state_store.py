"""What is known about a task's batches without a job folder.

Airflow's task state store survives retries and clears: a job without a folder keeps its ledger there. Where
there is no store (before Airflow 3.3), or it is empty, the provider is asked for batches with the job's
metadata: anybatch puts the job's identity, round and shard on each batch.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from anybatch import (
    BatchStatus,
    CreateOutcomeUnknownError,
    LedgerConflictError,
    NotFoundError,
    OrphanError,
)
from anybatch.jobs.folder import JobFolder
from anybatch.jobs.job import shard_metadata, short
from anybatch.jobs.ledger import Ledger, ShardRecord, Step
from anybatch.paths import open_path
from anybatch.providers.finding import oldest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client
    from anybatch.providers.base import Provider

_LEDGER_KEY = "anybatch_ledger"
_IDS_KEY = "anybatch_batch_ids"
_MAX_AGE = 30 * 86400.0  # seconds; no provider keeps the results of older batches
_CANCELLED = (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
# The object that airflow.sdk.NEVER_EXPIRE is. If a record expired, its batch would be paid for again. Airflow
# deletes the record with its DAG run.
_NEVER_EXPIRE = timedelta.max


class StateStore(Protocol):
    """The part of Airflow's `context["task_state_store"]` that is used here."""

    def get(self, key: str, default: Any = ...) -> Any: ...
    def set(self, key: str, value: Any, *, retention: Any = ...) -> None: ...


class NoStore:
    """Stands in for a store where Airflow has none; it lasts as long as the attempt."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self._values[key] = value


class KnownBatches(NamedTuple):
    """The batches of a job that are known; if `is_whole` is False there may be others."""

    batches: Sequence[Batch] = ()
    is_whole: bool = True


class TaskStateFolder(JobFolder):
    """A job folder whose ledger is in a state store; its other files are temporary.

    Args:
        scratch: The temporary folder.
        store: Where the ledger is.
        look: Finds the batches that earlier attempts left; called once, before the first ledger is written.
    """

    def __init__(self, scratch: Path, store: StateStore, look: Callable[[], KnownBatches]) -> None:
        super().__init__(open_path(scratch))
        self.local = None  # no lock file: the ledger is not on a disk
        self._store = store
        self._look = look

    def read(self) -> Ledger | None:
        """The ledger in the store; None if there is none."""
        found = self._store.get(_LEDGER_KEY)
        if found is None:
            return None
        try:
            return Ledger.model_validate(found)
        except ValueError as error:
            raise LedgerConflictError(
                f"the task state {_LEDGER_KEY!r} is not a ledger of this version of anybatch; delete it to "
                f"submit again, and pay again: {error}"
            ) from None

    def commit(
        self, before: Ledger | None, after: Ledger, *, first: Callable[[], None] | None = None
    ) -> Ledger | None:
        """Write `after` if the ledger is still `before`; return None if it is not.

        The comparison comes right before the write, without a lock: a store has none.
        """
        if before is None:
            after = adopt(after, self._look())
        after = after.model_copy(update={"revision": before.revision + 1 if before else 1})
        if self.read() != before:
            return None
        if first is not None:
            first()
        self._store.set(_LEDGER_KEY, after.model_dump(mode="json"), retention=_NEVER_EXPIRE)
        return after


def adopt(ledger: Ledger, found: KnownBatches) -> Ledger:
    """A new ledger that records the batches which exist already, shard by shard.

    Raises:
        CreateOutcomeUnknownError: A shard has no known batch, and not all batches are known: it might get a
            second one.
    """
    shards = []
    for record in ledger.shards:
        if batches := [batch for batch in found.batches if _belongs_to(batch, ledger, record)]:
            batch = oldest(batches)
            known = {"step": Step.CREATED, "tries": 1, "batch_id": batch.id, "status": batch.status}
            record = record.model_copy(update={**known, "file_id": batch.input_file_id})
        elif not found.is_whole:
            raise incomplete_list_error(ledger.provider)
        shards.append(record)
    return ledger.model_copy(update={"shards": tuple(shards)})


def _belongs_to(batch: Batch, ledger: Ledger, record: ShardRecord) -> bool:
    """Whether a batch carries the metadata of this shard and round; a later round's holds other rows."""
    metadata = shard_metadata({"anybatch_job": short(ledger.job)}, record, len(ledger.of_round(record.round)))
    return metadata.items() <= (batch.metadata or {}).items()


def record_batch_ids(context: Context, ids: Sequence[str]) -> None:
    """Record a job's batches outside its folder, if Airflow has such a place: the folder may be lost."""
    if (store := context.get("task_state_store")) is not None:
        store.set(_IDS_KEY, list(ids), retention=_NEVER_EXPIRE)


def batches_of_earlier_attempts(client: Client, context: Context, job: str) -> KnownBatches:
    """The batches that earlier attempts of a task created, as far as Airflow's record or the provider can
    say.

    Leaves out those that were cancelled, or refused as a whole.
    """
    store: StateStore | None = cast("Any", context.get("task_state_store"))
    if store is not None and (noted := store.get(_IDS_KEY)):
        found = KnownBatches(list(_retrieved(client, noted)))
    elif can_find_by_metadata(client.provider):
        found = find_batches(client, job, start_of_run(context))
    else:
        found = KnownBatches()
    alive = [batch for batch in found.batches if batch.status not in (*_CANCELLED, BatchStatus.FAILED)]
    return KnownBatches(alive, found.is_whole)


def _retrieved(client: Client, ids: Sequence[str]) -> Iterator[Batch]:
    for batch_id in ids:
        with suppress(NotFoundError):  # deleted, or the connection had another account then
            yield client.retrieve(batch_id)


def can_find_by_metadata(provider: Provider) -> bool:
    """Whether a job's batches can be found by the metadata that anybatch puts on them."""
    return provider.can_find and provider.traits.metadata is not None


def start_of_run(context: Context) -> float:
    """Unix seconds before which no batch of this task can exist."""
    run = context.get("dag_run")
    return run.run_after.timestamp() if run else 0.0


def find_batches(client: Client, job: str, since: float) -> KnownBatches:
    """The batches at the provider that carry a job's metadata and were not cancelled."""
    batches = client.iter_batches(since=max(since, time.time() - _MAX_AGE))
    found = {
        batch.id: batch
        for batch in batches
        if batch.status not in _CANCELLED and (batch.metadata or {}).get("anybatch_job") == short(job)
    }
    return KnownBatches(list(found.values()), batches.reading.is_complete)


def forget_cancelled(client: Client, folder: TaskStateFolder) -> None:
    """Remove cancelled batches from the record, so that they are created anew."""
    ledger = folder.read()
    for record in ledger.shards if ledger else ():
        if (
            ledger is None
            or record.batch_id is None
            or client.retrieve(record.batch_id).status not in _CANCELLED
        ):
            continue
        ledger = folder.commit(ledger, ledger.with_shard(record.without_batch()))


def unknown_attempts_error(provider: Provider, try_number: int) -> OrphanError:
    """For a retry that cannot know what the attempt before it created: no store, and no way to look it up."""
    name = provider.name
    return OrphanError(
        f"attempt {try_number}: an earlier attempt may have created batches. This Airflow has no task state "
        f"store (3.3 has one), and {name} offers no way to look a batch up by its metadata. Look at its "
        f"batches (anybatch.list_batches({name!r})), cancel what an earlier attempt left, and run again with "
        "on_orphan='resubmit'.",
        provider=name,
    )


def incomplete_list_error(provider: str) -> CreateOutcomeUnknownError:
    """For a retry that looked for earlier batches in a listing which cannot be read to its end."""
    return CreateOutcomeUnknownError(
        f"{provider}'s list of batches could not be read to its end: an earlier attempt may have created "
        "batches that were not in it, so nothing was created. A retry reads the list again; "
        "on_orphan='resubmit' assumes that there are no others, and may pay twice.",
        provider=provider,
    )
