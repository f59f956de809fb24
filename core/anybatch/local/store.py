"""The store: one SQLite file for records and a folder beside it for bytes, shared by any number of processes.

SQLite runs in WAL mode: readers never wait, and writers wait for each other for up to 30 s. File contents are
plain files (`<database>.files/<file id>`), so that an upload of hundreds of megabytes neither holds the write
lock nor goes through the log. A file is complete before the record that names it is committed; what a killed
process leaves behind is removed a day later.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote
from uuid import uuid4

SCHEMA_VERSION = 1
STALE_AFTER = 24 * 3600.0  # seconds until bytes that no record names are removed
SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created REAL NOT NULL,
    bytes INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    expires REAL, deleted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created REAL NOT NULL,
    endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL,
    expires REAL NOT NULL, metadata TEXT,
    output_lifetime REAL NOT NULL, model TEXT, upstream INTEGER NOT NULL,
    fault_to REAL NOT NULL DEFAULT 0, rows INTEGER, problems TEXT, cancel_at REAL,
    events TEXT NOT NULL DEFAULT '[]', completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, final TEXT
);
CREATE INDEX batches_fault ON batches (fault_to);
CREATE INDEX batches_input ON batches (input_file_id);
CREATE TABLE plans (batch_id TEXT PRIMARY KEY, outcomes BLOB NOT NULL);
CREATE TABLE results (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
"""


class StoreError(OSError):
    """The database cannot be opened, or is not anybatch's."""


def database_path(api_base: str | None) -> Path:
    """Return the database file that an `api_base` names.

    Args:
        api_base: `sqlite:///abs/path.db` or a plain path. The default is `$XDG_STATE_HOME/anybatch/local.db`,
            or `~/.local/state/anybatch/local.db` without that variable.

    Returns:
        The absolute path.

    Raises:
        ValueError: `api_base` is neither.
    """
    if not api_base:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(state) / "anybatch" / "local.db"
    scheme, colon, rest = api_base.partition(":")
    if colon and scheme.lower() != "sqlite":
        raise ValueError(
            f"The local provider uses an SQLite file: expected sqlite:///absolute/path.db, not {api_base!r}."
        )
    path = unquote(rest.removeprefix("//")) if colon else api_base
    if path.strip("/") in ("", ":memory:"):
        raise ValueError(
            f"The local provider needs a file that several processes can open, not {api_base!r}."
        )
    if path.startswith("/"):
        path = "/" + path.lstrip("/")  # SQLAlchemy writes sqlite:////abs/path.db for the same path
    return Path(path.removeprefix("/") if path.startswith("/~") else path).expanduser().absolute()


class Store:
    """The database at `path`, created if it is missing. It is thread-safe, and survives a fork.

    If a thread is still at work when the store is closed, such as recording an answer that was paid for, it
    finishes, and closes its connection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(path.name + ".files")
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._owner = os.getpid()
        self._abandoned: list[sqlite3.Connection | None] = []
        self._closed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._exclusive("open"):
                self._prepare()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StoreError(f"Cannot open the local provider's database {path}: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._reset_after_fork()
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            connection.row_factory = sqlite3.Row
            try:
                connection.execute("PRAGMA synchronous=NORMAL")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self) -> None:
        connection = self._connect()
        connection.execute("PRAGMA journal_mode=WAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN;{SCHEMA};PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"its version is {version}, but this release reads version {SCHEMA_VERSION}")
        self._sweep()

    def _sweep(self) -> None:
        """Remove bytes that no record names and that are older than a day."""
        known = {row["id"] for row in self.all("SELECT id FROM files")}
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                unknown = entry.name not in known and not entry.name.endswith(
                    ".lock"
                )  # one may be held for days
                if unknown and entry.stat().st_mtime < time.time() - STALE_AFTER:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Open a write transaction; keep it short, since others wait for it."""
        with self._guard() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # A failed commit (a full disk) leaves the transaction open, so that no later one could begin.
                # After some errors SQLite has already rolled back by itself.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _guard(self) -> Iterator[sqlite3.Connection]:
        self._reset_after_fork()
        with self._lock:
            connection = self._connect()
            try:
                yield connection
            finally:
                if self._closed and not connection.in_transaction:
                    self.close()

    def _reset_after_fork(self) -> None:
        """Forget the parent's connection in a forked child, which must neither use nor close it."""
        if self._owner != os.getpid():
            self._abandoned.append(self._connection)
            self._connection, self._owner, self._lock = None, os.getpid(), threading.RLock()

    def all(self, sql: str, *arguments: Any, **named: Any) -> list[sqlite3.Row]:
        """Return the rows of a query; its parameters are `?`, passed in order, or `:name`, passed by name."""
        with self._guard() as connection:
            return connection.execute(sql, named or arguments).fetchall()

    def one(self, sql: str, *arguments: Any, **named: Any) -> sqlite3.Row | None:
        rows = self.all(sql, *arguments, **named)
        return rows[0] if rows else None

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to become the only process and thread that works on `name`; yield False if another one does.

        The kernel releases the claim when its holder dies, so a killed process blocks nobody.
        """
        path = self.folder / f"{name}.lock"
        with path.open("ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _same_file(handle, path):  # its holder has removed it between our open and our lock
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def blob(self, file_id: str) -> Path:
        return self.folder / file_id

    @contextlib.contextmanager
    def new_blob(self) -> Iterator[tuple[str, BinaryIO]]:
        """Yield an id and a writable file for new bytes; remove the file if the block raises.

        The caller commits the record afterwards.
        """
        file_id = f"file-{uuid4().hex[:24]}"
        try:
            with self.blob(file_id).open("wb", buffering=1 << 18) as handle:
                yield file_id, handle
        except BaseException:
            self.blob(file_id).unlink(missing_ok=True)
            raise

    def discard(self, file_ids: Iterable[str]) -> None:
        """Remove the bytes of files; this cannot be undone, even if their records remain."""
        for file_id in file_ids:
            self.blob(file_id).unlink(missing_ok=True)


def add_file(
    connection: sqlite3.Connection,
    file_id: str,
    *,
    created: float,
    size: int,
    filename: str,
    purpose: str,
    lifetime: float | None,
) -> None:
    """Record a file whose bytes are complete; `lifetime` is in seconds."""
    expires = None if lifetime is None else created + lifetime
    connection.execute(
        "INSERT INTO files (id, created, bytes, filename, purpose, expires) VALUES (?, ?, ?, ?, ?, ?)",
        (file_id, created, size, filename, purpose, expires),
    )


def _same_file(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.fstat(handle.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
