"""The folder of a job, on disk or in an object store: how its files are read, written and kept whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from ..errors import LedgerConflictError
from ..models import Report
from ..paths import local_path
from .ledger import VERSION, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from upath import UPath

__all__ = ["JobFolder", "Scratch", "remove_scratch"]

M = TypeVar("M", bound=BaseModel)

_LOCK = ".lock"
_SCRATCH = ".anybatch-"
_TEMPORARY = re.compile(r"\.[\w-]+\.jsonl?\.[0-9a-f]{32}")


class JobFolder:
    """A job's folder, on disk or in an object store."""

    def __init__(self, path: UPath) -> None:
        self.path = path
        self.local = local_path(path)

    def __truediv__(self, name: str) -> UPath:
        return self.path / name

    def read(self) -> Ledger | None:
        """The ledger as it stands now; None where the job has none yet."""
        text = self._read("job.json")
        if text is None:
            return None
        if (wrong := _unfit(text)) is not None:
            raise LedgerConflictError(f"{self / 'job.json'} {wrong}")
        return self._validated("job.json", Ledger, text)

    def read_report(self) -> Report | None:
        text = self._read("report.json")
        return None if text is None else self._validated("report.json", Report, text)

    def _read(self, name: str) -> bytes | None:
        try:
            return ((self.local or self.path) / name).read_bytes()
        except FileNotFoundError:
            return None

    def _validated(self, name: str, model: type[M], text: bytes) -> M:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            raise LedgerConflictError(
                f"{self / name} is not one that anybatch wrote: {error.errors()[0]['msg']}"
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


def _unfit(text: bytes) -> str | None:
    """Why this version cannot go on with a ledger, if it cannot."""
    try:
        version = orjson.loads(text)["version"]
    except (ValueError, TypeError, KeyError):
        return "is not one that anybatch wrote"
    if version == VERSION:
        return None
    versions = f"(ledger version {version}, here it is {VERSION})"
    if isinstance(version, int) and version > VERSION:
        return (
            f"was written by a newer anybatch {versions}: use that version here as well; to go on with this "
            "one might pay twice"
        )
    return (
        f"was written by an older anybatch {versions}: let that version finish the job, or give the job "
        "another folder, where it is submitted, and paid for, anew"
    )


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode()
