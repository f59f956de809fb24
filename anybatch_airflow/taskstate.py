"""What is known of a task's batches without a job folder.

Airflow's task state store survives a retry and a clear: there a job that has no folder keeps its ledger.
Where there is no such store (before Airflow 3.3), or nothing in it any more, the provider is asked for
batches that carry the job's marks.
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

_KEY = "anybatch_ledger"
_IDS = "anybatch_batch_ids"
_LOOK_BACK = 30 * 86400.0  # seconds; what is older has no results left at any provider
_DEAD = (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
# For ever (airflow.sdk.NEVER_EXPIRE is this very object): a record that is gone is a batch paid for again. It
# goes when its DAG run is deleted.
_FOR_EVER = timedelta.max


class StateStore(Protocol):
    """What is used of Airflow's `context["task_state_store"]`."""

    def get(self, key: str, default: Any = ...) -> Any: ...
    def set(self, key: str, value: Any, *, retention: Any = ...) -> None: ...


class NoStore:
    """Stands in where Airflow has none: it forgets with the attempt."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self._values[key] = value


class Found(NamedTuple):
    """The batches of a job that are known; where `is_whole` is False there may be others."""

    batches: Sequence[Batch] = ()
    is_whole: bool = True


class TaskStateFolder(JobFolder):
    """A job folder whose ledger is in a state store; the rest of it is scratch.

    `look` is asked once, before the first ledger is written: the batches that earlier attempts have left.
    """

    def __init__(self, scratch: Path, store: StateStore, look: Callable[[], Found]) -> None:
        super().__init__(open_path(scratch))
        self.local = None  # as with an object store, what is here is not compared and swapped under a lock
        self._store = store
        self._look = look

    def read(self) -> Ledger | None:
        """The ledger as the store has it."""
        found = self._store.get(_KEY)
        if found is None:
            return None
        try:
            return Ledger.model_validate(found)
        except ValueError as error:
            raise LedgerConflictError(
                f"the task state {_KEY!r} is not one that anybatch wrote, or is newer: {error}"
            ) from None

    def commit(
        self, before: Ledger | None, after: Ledger, *, first: Callable[[], None] | None = None
    ) -> Ledger | None:
        """Write `after` if the ledger still is `before`, compared right before the write."""
        if before is None:
            after = adopt(after, self._look())
        after = after.model_copy(update={"revision": before.revision + 1 if before else 1})
        if self.read() != before:
            return None
        if first is not None:
            first()
        self._store.set(_KEY, after.model_dump(mode="json"), retention=_FOR_EVER)
        return after


def adopt(ledger: Ledger, found: Found) -> Ledger:
    """A new ledger that knows of the batches that exist already, if they are of so many shards.

    Raises CreateOutcomeUnknownError where a shard would get a second batch for all that is known.
    """
    shards = []
    for record in ledger.shards:
        if batches := [batch for batch in found.batches if _is_of(batch, ledger, record)]:
            batch = oldest(batches)
            known = {"step": Step.CREATED, "tries": 1, "batch_id": batch.id, "status": batch.status}
            record = record.model_copy(update={**known, "file_id": batch.input_file_id})
        elif not found.is_whole:
            raise unread(ledger.provider)
        shards.append(record)
    return ledger.model_copy(update={"shards": tuple(shards)})


def _is_of(batch: Batch, ledger: Ledger, record: ShardRecord) -> bool:
    """Whether a batch carries the marks of this shard and round: a later round's holds other rows."""
    marks = shard_metadata({"anybatch_job": short(ledger.job)}, record, len(ledger.of_round(record.round)))
    return marks.items() <= (batch.metadata or {}).items()


def note_batches(context: Context, ids: Sequence[str]) -> None:
    """Write down what a job has created where it outlives the job's folder, if Airflow has such a place."""
    if (store := context.get("task_state_store")) is not None:
        store.set(_IDS, list(ids), retention=_FOR_EVER)


def earlier_batches(client: Client, context: Context, job: str) -> Found:
    """The batches that earlier attempts of a task have created, as far as anybody can tell.

    Not those that were cancelled, or refused as a whole.
    """
    store: StateStore | None = cast("Any", context.get("task_state_store"))
    if store is not None and (noted := store.get(_IDS)):
        found = Found(list(_retrieved(client, noted)))
    elif has_marks(client.provider):
        found = find_batches(client, job, begin_of_run(context))
    else:
        found = Found()
    alive = [batch for batch in found.batches if batch.status not in (*_DEAD, BatchStatus.FAILED)]
    return Found(alive, found.is_whole)


def _retrieved(client: Client, ids: Sequence[str]) -> Iterator[Batch]:
    for batch_id in ids:
        with suppress(NotFoundError):  # deleted, or of another account that was used before
            yield client.retrieve(batch_id)


def has_marks(provider: Provider) -> bool:
    """Whether batches can be looked up by the marks of their job."""
    return provider.can_find and provider.traits.metadata is not None


def begin_of_run(context: Context) -> float:
    """Since when a batch of this task may exist, unix seconds."""
    run = context.get("dag_run")
    return run.run_after.timestamp() if run else 0.0


def find_batches(client: Client, job: str, since: float) -> Found:
    """The batches at the provider that carry a job's mark and were not cancelled."""
    batches = client.iter_batches(since=max(since, time.time() - _LOOK_BACK))
    found = {
        batch.id: batch
        for batch in batches
        if batch.status not in _DEAD and (batch.metadata or {}).get("anybatch_job") == short(job)
    }
    return Found(list(found.values()), batches.reading.is_complete)


def forget_dead(client: Client, folder: TaskStateFolder) -> None:
    """Let go of batches on record that were cancelled: they are created anew."""
    ledger = folder.read()
    for record in ledger.shards if ledger else ():
        if ledger is None or record.batch_id is None or client.retrieve(record.batch_id).status not in _DEAD:
            continue
        ledger = folder.commit(ledger, ledger.with_shard(record.anew()))


def blind(provider: Provider, try_number: int) -> OrphanError:
    """What to say where nobody knows of an earlier attempt: no store does, and the provider cannot tell."""
    name = provider.name
    return OrphanError(
        f"attempt {try_number}: an earlier one may have created batches. This Airflow has no task state "
        f"store (3.3 has one), and {name} offers no way to look a batch up by its marks. Look at its batches "
        f"(anybatch.list_batches({name!r})), cancel what an earlier attempt left, and run again with "
        "on_orphan='resubmit'.",
        provider=name,
    )


def unread(provider: str) -> CreateOutcomeUnknownError:
    """What to say where a listing that should tell of earlier batches cannot be read to its end."""
    return CreateOutcomeUnknownError(
        f"{provider}'s list of batches could not be read to its end: an earlier attempt may have created "
        "batches that were not in it, and nothing was created. A retry reads it again; "
        "on_orphan='resubmit' takes it that there are none, and may pay twice.",
        provider=provider,
    )
