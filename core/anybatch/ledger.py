"""The durable record of a job, and the folder that holds it.

The ledger is what makes a second attempt re-attach instead of paying again: every step is written down before
the next one is taken. It holds ids, hashes and counts; never a prompt, never a key.

    job.json        the ledger
    ids.jsonl       the custom_ids in input order, one JSON string a line
    requests.jsonl  the request lines, where they were given as objects and not as a file
    results.jsonl   the rows in input order
    stray.jsonl     result lines that no request asked for, if there were any
    report.json     the account; it is the last word once the ledger says that the job has landed

and where rows were submitted again, in rounds:

    ids-<n>.jsonl    the custom_ids of round n, in input order
    round-<n>.jsonl  all rows as they stood when round n had ended; kept while a later round builds on it
    stray-<n>.jsonl  the stray lines up to then, if there were any

On a local disk an empty `.lock` lies beside them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import LedgerConflictError
from .models import BatchRecord, BatchStatus, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from upath import UPath

M = TypeVar("M", bound=BaseModel)

_LOCK = ".lock"
_SCRATCH = ".anybatch-"
_TEMPORARY = re.compile(r"\.[\w-]+\.jsonl?\.[0-9a-f]{32}")


class Step(StrEnum):
    """How far a shard has come; each is written to the ledger before the next begins."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"  # a create is about to be sent, or was; the batch may exist
    CREATED = "created"


class ShardRecord(BaseModel):
    """One shard of a round: the rows from `first_row` on of what that round submits.

    `round` counts re-submissions, `tries` the creates from this file that may have left a batch: above 0
    before the batch is known, or above 1 after, there may be one that no attempt has heard of. `ended` is the
    batch as the report tells of it, noted when a later round is opened. `cancelling_at` is when we first saw
    the batch being cancelled, `gone_at` when the provider first knew no such batch, in unix seconds.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    shard: int
    round: int = 0
    first_row: int
    rows: int
    step: Step = Step.PLANNED
    tries: int = 0
    file_id: str | None = None
    batch_id: str | None = None
    attempt: str | None = None  # who is creating …
    creating_at: float | None = None  # … since when, unix seconds
    status: BatchStatus | None = None
    ended: BatchRecord | None = None
    cancelling_at: float | None = None
    gone_at: float | None = None


class Ledger(BaseModel):
    """What is known of a job.

    `revision` grows with every write. `shards` are those of all rounds. `stopping` holds what was begun with
    earlier input, until all of its batches are known and cancelled. `input` is where the input lies, if that
    was a path; `restarts` are the values of `Job.restart` so far; `shard_requests` is that of the first
    submission, by which every later attempt splits the input alike. `stopped_at` is when the job was stopped,
    `max_rounds` what it was last submitted with: only with more of them do its rows go again after that.

    Of rounds: `renewals` counts those that were opened for cancelled batches alone, `renewed` how often this
    attempt has submitted rows of cancelled batches again, `unexpected` the stray lines of the rounds before.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    version: int = 1
    revision: int = 0
    job: str
    fingerprint: str
    provider: str
    api_base: str
    endpoint: str
    rows: int
    created_at: float
    shards: tuple[ShardRecord, ...]
    landed_at: float | None = None
    stopping: tuple[Ledger, ...] = ()
    input: str | None = None
    restarts: tuple[str, ...] = ()
    stopped_at: float | None = None
    max_rounds: int = 1
    renewals: int = 0
    renewed: int = 0
    unexpected: int = 0
    shard_requests: int | None = None

    @property
    def batch_ids(self) -> list[str]:
        return [record.batch_id for record in self.shards if record.batch_id]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was uploaded yet: what is needed of the input may not have been written down."""
        return not self.round and all(record.step is Step.PLANNED for record in self.shards)

    @property
    def round(self) -> int:
        """The current round: 0, or the number of times that rows were submitted again."""
        return max((record.round for record in self.shards), default=0)

    @property
    def current(self) -> tuple[ShardRecord, ...]:
        """The shards of the current round."""
        return self.of_round(self.round)

    def of_round(self, number: int) -> tuple[ShardRecord, ...]:
        return tuple(record for record in self.shards if record.round == number)

    def latest(self, record: ShardRecord) -> ShardRecord | None:
        """What this ledger says of the shard that another one spoke of."""
        same = (new for new in self.shards if (new.shard, new.round) == (record.shard, record.round))
        return next(same, None)

    def with_shard(self, record: ShardRecord) -> Ledger:
        shards = tuple(
            record if (old.shard, old.round) == (record.shard, record.round) else old for old in self.shards
        )
        return self.model_copy(update={"shards": shards})


class JobFolder:
    """A job's folder, on disk or in an object store."""

    def __init__(self, path: UPath) -> None:
        self.path = path
        self.local = local_path(path)

    def __truediv__(self, name: str) -> UPath:
        return self.path / name

    def read(self) -> Ledger | None:
        """The ledger as it stands now; None where the job has none yet."""
        return self._read_model("job.json", Ledger)

    def read_report(self) -> Report | None:
        return self._read_model("report.json", Report)

    def _read_model(self, name: str, model: type[M]) -> M | None:
        file = (self.local or self.path) / name
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            raise LedgerConflictError(
                f"{file} is not one that anybatch wrote, or is newer: {error.errors()[0]['msg']}"
            ) from None

    def commit(
        self, before: Ledger | None, after: Ledger, *, first: Callable[[], None] | None = None
    ) -> Ledger | None:
        """Write `after` if the ledger still is `before`; None where another attempt has written meanwhile.

        `first` is called once that is certain, before the write. On a local disk this is a compare-and-swap
        under a lock; in an object store the first write is exclusive where the store can, later ones are
        compared right before they are written, and once more after `first`, which may take long there.
        """
        after = after.model_copy(update={"revision": before.revision + 1 if before else 1})
        with self.locked():
            # Not the revision alone: it begins anew when a ledger is deleted.
            if self.read() != before:
                return None
            if first is not None:
                first()
                if self.local is None and self.read() != before:
                    return None
            if before is None and self.local is None:
                return after if self._create("job.json", _json(after)) else None
            self.replace("job.json", _json(after))
        return after

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file so that readers see the old one or the new one, never a part; under the lock."""
        if self.local is None:
            (self.path / name).write_bytes(data)  # an object appears whole
            return
        temporary = self._temporary(self.local, name)
        with temporary.open("wb") as file:
            file.write(data)
        self._rename(temporary, self.local / name)

    def put(self, source: Path, name: str) -> None:
        """Move a local file into the folder under this name, at once or not at all; under the lock."""
        if self.local is None:
            self.path.fs.put_file(str(source), (self.path / name).path)
            return
        temporary = self._temporary(self.local, name)
        shutil.move(source, temporary)
        self._rename(temporary, self.local / name)

    @staticmethod
    def _rename(temporary: Path, path: Path) -> None:
        """Give a file its name so that it keeps it, and its content, whatever becomes of the machine.

        A claim that is lost after its create was sent would let the next attempt create a second batch.
        """
        _to_disk(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some network file systems know no such thing of a folder
            _to_disk(path.parent)

    @staticmethod
    def _temporary(folder: Path, name: str) -> Path:
        return folder / f".{name}.{uuid.uuid4().hex}"

    def fetch(self, name: str, scratch: Path) -> Path:
        """A file of the folder as one on this machine's disk: itself, or a copy in `scratch`."""
        if self.local is not None:
            return self.local / name
        copy = scratch / f"{name}.fetched"
        with (self.path / name).open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        return copy

    def scratch(self) -> Scratch:
        """A temporary folder; beside the results where they are local, so that landing is a rename.

        What attempts that were killed have left here is removed on the way. Waits for the lock.
        """
        if self.local is None:
            return Scratch(Path(tempfile.mkdtemp(prefix=_SCRATCH)))
        with self.locked():
            self._sweep(self.local)
            path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.local))
            return Scratch(path, _open_lock(_guard(path)))

    @staticmethod
    def _sweep(folder: Path) -> None:
        names = {path.name for path in folder.iterdir()}
        for name in names:
            if _TEMPORARY.fullmatch(name):  # whoever writes one holds the lock, as we do now
                (folder / name).unlink()
        for name in {name.removesuffix(_LOCK) for name in names if name.startswith(_SCRATCH)}:
            with contextlib.suppress(BlockingIOError):  # in use
                Scratch(folder / name, _open_lock(_guard(folder / name), wait=False)).remove()

    def discard(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()

    def _create(self, name: str, data: bytes) -> bool:
        file = self.path / name
        try:
            file.fs.pipe_file(file.path, data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError):  # a store that cannot
            file.write_bytes(data)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other attempts from writing; an object store has no such thing."""
        if self.local is None:
            yield
            return
        self.local.mkdir(parents=True, exist_ok=True)
        handle = _open_lock(self.local / _LOCK)
        try:
            yield
        finally:
            os.close(handle)


class Scratch:
    """A temporary folder, as a context manager; a file beside it is locked while its owner lives."""

    def __init__(self, path: Path, guard: int | None = None) -> None:
        self.path, self._guard = path, guard

    def remove(self) -> None:
        """Remove it, and whatever is in it; not to be done again."""
        remove_scratch(self.path)
        if self._guard is not None:
            os.close(self._guard)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def remove_scratch(path: Path) -> None:
    """Remove a temporary folder and its guard; again does nothing."""
    shutil.rmtree(path, ignore_errors=True)
    _guard(path).unlink(missing_ok=True)


def _guard(scratch: Path) -> Path:
    return scratch.with_name(scratch.name + _LOCK)


def _open_lock(path: Path, *, wait: bool = True) -> int:
    """A file descriptor that holds the lock until it is closed.

    Raises BlockingIOError if somebody else has it, and we do not wait. The lock is on a file that is open for
    writing: on NFS one on a folder is known to its own host only.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's; on a local disk this is as good
        handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode()


def is_path(value: object) -> TypeGuard[str | os.PathLike[str] | UPath]:
    """Whether this names a file: text, a path, or a path object of an object store (fsspec's, Airflow's)."""
    return isinstance(value, str | os.PathLike) or hasattr(type(value), "fs")


def open_path(path: str | os.PathLike[str] | UPath) -> UPath:
    """A local path or fsspec URL as a path object."""
    from upath import UPath  # costs a quarter of the import time of all else: only jobs pay it

    return UPath(path) if isinstance(path, str | os.PathLike) and not isinstance(path, UPath) else path


def local_path(path: UPath) -> Path | None:
    """The path on this machine's disk, None where it is an object store's."""
    return Path(path.path) if path.protocol in ("", "file") else None
