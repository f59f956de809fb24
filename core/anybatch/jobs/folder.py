"""A job's folder, on disk or in an object store: atomic writes, and compare-and-swap of the ledger."""

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
    """A job's folder, on disk or in an object store.

    Attributes:
        path: The folder.
        local: The same folder as a local path; None if it is in an object store.
    """

    def __init__(self, path: UPath) -> None:
        self.path = path
        self.local = local_path(path)

    def __truediv__(self, name: str) -> UPath:
        return self.path / name

    def read(self) -> Ledger | None:
        """Read the ledger.

        Returns:
            The ledger, or None if the folder holds none yet.

        Raises:
            LedgerConflictError: `job.json` cannot be read, or another version of anybatch wrote it.
        """
        text = self._read("job.json")
        if text is None:
            return None
        if (wrong := _version_problem(text)) is not None:
            raise LedgerConflictError(f"{self / 'job.json'} {wrong}")
        return self._validated("job.json", Ledger, text)

    def read_report(self) -> Report | None:
        """Read the report, or None if there is none; LedgerConflictError if it cannot be read."""
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
                f"{self / name} is not a file that anybatch wrote: {error.errors()[0]['msg']}"
            ) from None

    def commit(
        self, before: Ledger | None, after: Ledger, *, first: Callable[[], None] | None = None
    ) -> Ledger | None:
        """Replace the ledger `before` by `after`, unless another attempt has written it in the meantime.

        On a local disk this is a compare-and-swap under a lock. In an object store the first write is
        exclusive if the store supports that; later writes compare right before they write, and once more
        after `first`, which may take long there.

        Args:
            before: The ledger that must still be in place; None if there must be none.
            after: The ledger to write; its revision is set here.
            first: Called once `before` is confirmed, before the write.

        Returns:
            The ledger as written, or None if another attempt was faster.
        """
        after = after.model_copy(update={"revision": before.revision + 1 if before else 1})
        with self.locked():
            # Compare the whole ledger: the revision alone starts again at 1 after a ledger was deleted.
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
        """Write a small file atomically; the caller holds the lock."""
        if self.local is None:
            (self.path / name).write_bytes(data)  # object stores write whole objects
            return
        temporary = self._temporary(self.local, name)
        with temporary.open("wb") as file:
            file.write(data)
        self._rename(temporary, self.local / name)

    def put(self, source: Path, name: str) -> None:
        """Move a local file into the folder atomically, under this name. The caller holds the lock."""
        if self.local is None:
            self.path.fs.put_file(str(source), (self.path / name).path)
            return
        temporary = self._temporary(self.local, name)
        shutil.move(source, temporary)
        self._rename(temporary, self.local / name)

    @staticmethod
    def _rename(temporary: Path, path: Path) -> None:
        """Rename a file so that its name and content survive a crash of the machine.

        If a claim were lost after its create was sent, the next attempt would create a second batch.
        """
        _fsync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some network file systems cannot fsync a folder
            _fsync(path.parent)

    @staticmethod
    def _temporary(folder: Path, name: str) -> Path:
        return folder / f".{name}.{uuid.uuid4().hex}"

    def fetch(self, name: str, scratch: Path) -> Path:
        """Return a file of the folder as a local file: the file itself, or a copy in `scratch`."""
        if self.local is not None:
            return self.local / name
        copy = scratch / f"{name}.fetched"
        with (self.path / name).open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        return copy

    def scratch(self) -> Scratch:
        """Make a temporary folder; inside a local job folder, so that landing is a rename.

        This waits for the lock, and first removes what killed attempts have left behind.
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
            # Only a killed attempt leaves these: writers hold the lock, which is ours now.
            if _TEMPORARY.fullmatch(name):
                (folder / name).unlink()
        for name in {name.removesuffix(_LOCK) for name in names if name.startswith(_SCRATCH)}:
            with contextlib.suppress(BlockingIOError):  # its owner is alive
                Scratch(folder / name, _open_lock(_guard(folder / name), wait=False)).remove()

    def discard(self, *names: str) -> None:
        """Remove files of the folder; those that are not there are ignored."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()

    def _create(self, name: str, data: bytes) -> bool:
        file = self.path / name
        try:
            file.fs.pipe_file(file.path, data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError):  # the store has no exclusive create
            file.write_bytes(data)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that keeps other attempts from writing; an object store has none."""
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
    """A temporary folder as a context manager; a lock file beside it shows that its owner is alive."""

    def __init__(self, path: Path, guard: int | None = None) -> None:
        self.path, self._guard = path, guard

    def remove(self) -> None:
        """Remove the folder with its content. Call this only once: it closes the lock."""
        remove_scratch(self.path)
        if self._guard is not None:
            os.close(self._guard)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def remove_scratch(path: Path) -> None:
    """Remove a temporary folder and its lock file; do nothing if they are gone."""
    shutil.rmtree(path, ignore_errors=True)
    _guard(path).unlink(missing_ok=True)


def _guard(scratch: Path) -> Path:
    return scratch.with_name(scratch.name + _LOCK)


def _open_lock(path: Path, *, wait: bool = True) -> int:
    """Lock a file; return a descriptor that holds the lock until it is closed.

    Raises BlockingIOError if another process holds it and `wait` is false. The file is opened for writing: on
    NFS, other hosts do not see a lock on a folder.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's file; on a local disk a read-only descriptor locks it as well
        handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _version_problem(text: bytes) -> str | None:
    """Return why this version of anybatch cannot continue with a ledger, or None if it can."""
    try:
        version = orjson.loads(text)["version"]
    except (ValueError, TypeError, KeyError):
        return "is not a file that anybatch wrote"
    if version == VERSION:
        return None
    versions = f"(its ledger version is {version}, this one's {VERSION})"
    if isinstance(version, int) and version > VERSION:
        return (
            f"was written by a newer anybatch {versions}: use that version here as well; continuing with "
            "this one might pay twice"
        )
    return (
        f"was written by an older anybatch {versions}: let that version finish the job, or give the job "
        "another folder, where it is submitted and paid for again"
    )


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode()
