"""Read and validate request lines, one by one.

Lines end at the newline byte only: U+2028 and U+0085 are legal inside JSON strings and end no line.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from ..errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


MAX_PROBLEMS = 20
_MEMBERS = frozenset({"custom_id", "method", "url", "body"})


def iter_lines(
    file: BinaryIO, hash_into: Callable[[bytes], object] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset and the bytes of each line, including its newline; also of blank lines."""
    offset = 0
    for raw in file:  # a binary file splits at the newline byte only
        if hash_into is not None:
            hash_into(raw)
        yield offset, raw
        offset += len(raw)


class Problems:
    """Collects the problems of an input: the first MAX_PROBLEMS, and the number of all others."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.more = 0

    def add(self, line: int | None, field: str | None, message: str) -> None:
        if len(self.kept) < MAX_PROBLEMS:
            self.kept.append(Problem(line, field, message))
        else:
            self.more += 1

    def in_order(self) -> list[Problem]:
        """Return the kept problems sorted by line; repeated ids are found later than others."""
        return sorted(self.kept, key=lambda problem: problem.line or 0)

    def __len__(self) -> int:
        return len(self.kept) + self.more


class SeenIds:
    """Finds repeated custom_ids in constant memory, with an SQLite index that spills to a temporary file."""

    _BATCH = 5000

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        try:
            self._db.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8000;"
                "CREATE TABLE seen (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID; BEGIN;"
            )
        except BaseException:
            self._db.close()
            raise
        self._pending: dict[str, int] = {}

    def add(self, custom_id: str, line: int) -> list[tuple[int, str, int]]:
        """Add an id; return the repetitions found so far, as (line, id, line of its first use)."""
        if (before := self._pending.setdefault(custom_id, line)) != line:
            return [*self.flush(), (line, custom_id, before)]
        return self.flush() if len(self._pending) >= self._BATCH else []

    def flush(self) -> list[tuple[int, str, int]]:
        """Compare the ids added last with all earlier ones; return the repetitions."""
        pending, self._pending = self._pending, {}
        before = self._db.total_changes
        self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", pending.items())
        if self._db.total_changes - before == len(pending):
            return []
        first = "SELECT line FROM seen WHERE id = ?"
        lines = ((line, custom_id, self._db.execute(first, (custom_id,)).fetchone()[0])
                 for custom_id, line in pending.items())  # fmt: skip
        return [repetition for repetition in lines if repetition[0] != repetition[2]]

    def close(self) -> None:
        self._db.close()


def decode_line(raw: bytes) -> dict[str, Any] | Problem:
    """Parse one line as a JSON object, or return what is wrong with it; the caller adds the line number."""
    try:
        value = orjson.loads(raw)
    except ValueError as error:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as bad:
            return Problem(None, None, f"not UTF-8: byte 0x{raw[bad.start]:02x} at column {bad.start + 1}")
        return Problem(None, None, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Problem(None, None, f"not a JSON object but {type(value).__name__}")
    return value


def is_plain(line: dict[str, Any], endpoint: str) -> bool:
    """Whether a request line has exactly the required members, so that `check_line` would find no problem."""
    if line.keys() != _MEMBERS or line["method"] != "POST" or line["url"] != endpoint:
        return False
    custom_id, body = line["custom_id"], line["body"]
    return type(custom_id) is str and custom_id != "" and type(body) is dict and "stream" not in body


def nesting(value: Any) -> int:
    """Return how deeply lists and objects are nested: 1 for one that holds no other."""
    deepest, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        deepest += 1
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return deepest


def check_line(line: dict[str, Any], endpoint: str, *, needs_envelope: bool) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with one request line, as (field, message)."""
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        yield "custom_id", "must be a non-empty string"
    method, url = line.get("method"), line.get("url")
    if (needs_envelope or method is not None) and method != "POST":
        yield "method", f"must be 'POST', not {method!r}"
    if (needs_envelope or url is not None) and url != endpoint:
        yield "url", f"is {url!r}, but the batch's endpoint is {endpoint!r}"
    body = line.get("body")
    if not isinstance(body, dict):
        yield "body", "must be a JSON object"
        return
    if body.get("stream"):
        yield "body.stream", "a batch cannot stream"
    if unknown := sorted(set(line) - _MEMBERS):
        yield unknown[0], "unknown member; a request line has custom_id, method, url and body"
