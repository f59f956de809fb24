"""Request lines: read, validated, numbered and split into shards, in one pass and constant memory.

Lines are cut at the newline byte alone: U+2028 and U+0085 are legal inside JSON text and end no record.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from ..errors import InputError, Problem
from ..providers.codec import Codec
from ..providers.content import Content, file_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from ..providers.base import Provider

MAX_PROBLEMS = 20
_MEMBERS = frozenset({"custom_id", "method", "url", "body"})
_BOMS = {
    b"\xef\xbb\xbf": "a UTF-8 byte order mark",
    b"\xff\xfe": "a UTF-16 byte order mark",
    b"\xfe\xff": "a UTF-16 byte order mark",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the input that one batch carries: `rows` requests from row `first_row` (from 0) on.

    `segments` are the byte ranges of its uploaded form in the content file; more than one where the input
    has blank lines between requests.
    """

    first_row: int
    rows: int
    size: int
    segments: tuple[tuple[int, int], ...]
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a valid input comes to. `digest` is the sha256 of its bytes; `content` the file of the shards."""

    shards: tuple[Shard, ...]
    rows: int
    digest: str
    content: Path
    mark: tuple[int, int]
    models: tuple[str, ...] = ()
    shard_requests: int | None = None

    def shard_content(self, shard: Shard) -> Content:
        return Content(self.content, shard.segments, shard.rows, self.mark)


def iter_lines(
    file: BinaryIO, hash_into: Callable[[bytes], object] | None = None
) -> Iterator[tuple[int, bytes]]:
    """The byte offset and bytes of each line, newline included; blank lines too."""
    offset = 0
    for raw in file:  # a binary file ends its lines at the newline byte and nowhere else
        if hash_into is not None:
            hash_into(raw)
        yield offset, raw
        offset += len(raw)


class _Problems:
    """Collects what is wrong, up to a cap."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.more = 0

    def add(self, line: int | None, field: str | None, message: str) -> None:
        if len(self.kept) < MAX_PROBLEMS:
            self.kept.append(Problem(line, field, message))
        else:
            self.more += 1

    def in_order(self) -> list[Problem]:
        return sorted(self.kept, key=lambda problem: problem.line or 0)  # repetitions are found late

    def __len__(self) -> int:
        return len(self.kept) + self.more


class _SeenIds:
    """Finds repeated custom_ids in constant memory: an index in a temporary file that SQLite spills to."""

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
        """Note an id. Returns the repetitions found so far, as (line, id, line of its first use)."""
        if (before := self._pending.setdefault(custom_id, line)) != line:
            return [*self.flush(), (line, custom_id, before)]
        return self.flush() if len(self._pending) >= self._BATCH else []

    def flush(self) -> list[tuple[int, str, int]]:
        """Compare the ids noted last with all before them."""
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
    """One line as a JSON object, or what is wrong with it (the line number is the caller's to add)."""
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
    """Whether a request line has exactly the members it should, so that `check_line` would find nothing."""
    if line.keys() != _MEMBERS or line["method"] != "POST" or line["url"] != endpoint:
        return False
    custom_id, body = line["custom_id"], line["body"]
    return type(custom_id) is str and custom_id != "" and type(body) is dict and "stream" not in body


def nesting(value: Any) -> int:
    """How deep lists and objects lie in each other: 1 for one that holds none."""
    deepest, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        deepest += 1
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return deepest


def check_line(line: dict[str, Any], endpoint: str, *, needs_envelope: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with one request line, as (field, message)."""
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        yield "custom_id", "must be a text that is not empty"
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
        yield unknown[0], "no such member of a request line; it has custom_id, method, url, body"


def make_plan(
    source: BinaryIO,
    name: str,
    provider: Provider,
    endpoint: str,
    *,
    content: Path,
    spool: BinaryIO | None,
    ids: BinaryIO | None = None,
    model: str | None = None,
    drop_untranslatable: bool = False,
    only: Iterable[str] | None = None,
    shard_requests: int | None = None,
) -> Plan:
    """Read the whole input once: validate every line, and cut it into shards.

    `content` is the local file that the shards will be read from: the input itself, or the file behind
    `spool`, which receives the uploaded form of each line. It takes a spool to send other lines than those of
    the input: to a provider that is not `verbatim`, and with a `model`, which goes into lines that name none.
    `ids` receives the custom_ids, one JSON string a line, in input order. Of the lines, those with the
    custom_ids in `only` are taken, which come in input order (None: all); the digest is the whole input's.
    No shard holds more than `shard_requests`, nor more than the provider's limits allow.
    Raises InputError with line numbers, all of them up to a cap.
    """
    mark = file_mark(content)
    planner = _Planner(
        provider, endpoint, model, drop_untranslatable, spool, ids, content, only, shard_requests
    )
    digest = hashlib.sha256()
    try:
        number = 0
        for number, (offset, raw) in enumerate(iter_lines(source, digest.update), start=1):
            planner.take(number, offset, raw)
        planner.end()
    finally:
        planner.close()
        if spool is not None:
            spool.flush()
    problems = planner.problems
    if problems:
        raise InputError(name, problems.in_order(), more=problems.more, provider=provider.name)
    return Plan(
        shards=tuple(planner.shards),
        rows=planner.rows,
        digest=digest.hexdigest(),
        content=content,
        mark=mark if spool is None else file_mark(content),
        models=tuple(planner.all_models),
        shard_requests=shard_requests,
    )


def _lines_of(file: BinaryIO, segments: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The lines in byte ranges of a file."""
    for start, end in segments:
        file.seek(start)
        while start < end:
            raw = file.readline()
            start += len(raw)
            yield orjson.loads(raw)


class _Planner:
    """The state of one pass over the input."""

    def __init__(
        self,
        provider: Provider,
        endpoint: str,
        model: str | None,
        drop: bool,
        spool: BinaryIO | None,
        ids: BinaryIO | None,
        content: Path,
        only: Iterable[str] | None = None,
        shard_requests: int | None = None,
    ) -> None:
        self.limits, self.codec = provider.limits, provider.codec
        self.most_requests = min(self.limits.requests, shard_requests or self.limits.requests)
        self.provider, self.endpoint, self.model, self.drop = provider, endpoint, model, drop
        self.content = content
        # Only where the codec has something to say of a whole shard is it read again, by these numbers.
        self.numbers = array("q") if type(provider.codec).check_shard is not Codec.check_shard else None
        self.spool, self.ids = spool, ids
        self.only = None if only is None else iter(only)
        self.wanted = None if self.only is None else next(self.only, None)
        self.spooled = 0
        self.problems = _Problems()
        self.seen = _SeenIds()
        self.shards: list[Shard] = []
        self.rows = 0
        self.all_models: dict[str, int] = {}  # model -> the first line that names it
        self.unreadable = False
        self._start_shard()

    def _start_shard(self) -> None:
        self.segments: list[tuple[int, int]] = []
        self.shard_rows = self.size = 0
        self.models: dict[str, None] = {}

    def take(self, number: int, offset: int, raw: bytes) -> None:
        if number == 1 and (bom := next((bom for bom in _BOMS if raw.startswith(bom)), None)):
            self.problems.add(1, None, f"begins with {_BOMS[bom]}; save the file as plain UTF-8")
            self.unreadable = len(bom) == 2  # every line of it would be wrong
            raw = raw.removeprefix(bom)
        if self.unreadable or raw.isspace():
            return
        line = decode_line(raw)
        if self.only is not None:
            if isinstance(line, Problem) or line.get("custom_id") != self.wanted:
                return
            self.wanted = next(self.only, None)
        if isinstance(line, Problem):
            self.problems.add(number, line.field, line.message)
            return
        before = len(self.problems)
        self._check(number, line)
        if len(self.problems) > before:
            return
        start, data_size = offset, len(raw)
        if self.spool is not None:
            uploaded = self._encode(number, raw, names_model="model" in line["body"])
            if uploaded is None:
                return
            start, data_size = self.spooled, len(uploaded)
            self.spool.write(uploaded)
            self.spooled += data_size
        if (message := self._too_large(data_size, line)) is not None:
            self.problems.add(number, None, message)
            return
        self._place(number, start, data_size, line)

    def _too_large(self, size: int, line: dict[str, Any]) -> str | None:
        name, limits = self.provider.name, self.limits
        if size > limits.bytes:
            return f"{size} bytes; a batch at {name} holds {limits.bytes}"
        if limits.line_bytes is not None and size > limits.line_bytes:
            return f"{size} bytes; a request at {name} has at most {limits.line_bytes}"
        if limits.nesting is not None and (depth := nesting(line)) > limits.nesting:
            return f"nested {depth} deep; {name} takes {limits.nesting}"
        return None

    def _check(self, number: int, line: dict[str, Any]) -> None:
        if not is_plain(line, self.endpoint):  # nearly all are; the full check is slower
            for name, message in check_line(line, self.endpoint, needs_envelope=self.codec.verbatim):
                self.problems.add(number, name, message)
        custom_id = line.get("custom_id")
        if isinstance(custom_id, str) and custom_id:
            self._report_repeated(self.seen.add(custom_id, number))
        body = line.get("body")
        if isinstance(body, dict):
            self._check_model(number, body.get("model", self.model))

    def _check_model(self, number: int, model: object) -> None:
        if not isinstance(model, str) or not model:
            self.problems.add(number, "body.model", "must name the model")
            return
        if self.model is not None and model != self.model:
            self.problems.add(number, "body.model", f"is {model!r}, but the job's model is {self.model!r}")
        elif self.provider.traits.one_model and self.all_models and model not in self.all_models:
            first, line = next(iter(self.all_models.items()))
            self.problems.add(
                number, "body.model", f"is {model!r}, but line {line} has {first!r}: {self.provider.name} "
                "runs one model a batch; make one job for each model"
            )  # fmt: skip
        else:
            self.all_models.setdefault(model, number)

    def _encode(self, number: int, raw: bytes, *, names_model: bool) -> bytes | None:
        if self.codec.verbatim and (names_model or self.model is None):
            return raw if raw.endswith(b"\n") else raw + b"\n"
        try:
            # Read again by the standard library: unlike the fast parser it keeps integers of any size.
            line: Mapping[str, Any] = json.loads(raw)
            if self.model is not None:
                line["body"].setdefault("model", self.model)
            if not self.codec.verbatim:
                line = self.codec.encode(line, self.endpoint, drop=self.drop)
        except ValueError as error:
            parameter = getattr(error, "parameter", None)
            where = f"body.{parameter}" if parameter else "body"
            self.problems.add(number, where, str(getattr(error, "reason", error)))
            return None
        return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    def _place(self, number: int, start: int, size: int, line: dict[str, Any]) -> None:
        too_large = self.size + size > self.limits.bytes
        if self.shard_rows and (self.shard_rows >= self.most_requests or too_large):
            self._end_shard()
        if self.segments and self.segments[-1][1] == start:
            self.segments[-1] = (self.segments[-1][0], start + size)
        else:
            self.segments.append((start, start + size))
        self.models[line["body"].get("model", self.model)] = None
        if not self.shard_rows:
            self.first_line = number
        if self.numbers is not None:
            self.numbers.append(number)
        self.shard_rows += 1
        self.size += size
        self.rows += 1
        if self.ids is not None:
            self.ids.write(orjson.dumps(line["custom_id"], option=orjson.OPT_APPEND_NEWLINE))

    def _end_shard(self) -> None:
        if self.shard_rows < self.limits.min_requests:
            self.problems.add(
                self.first_line, None, f"begins a batch of {self.shard_rows} requests; one at "
                f"{self.provider.name} has at least {self.limits.min_requests}"
            )  # fmt: skip
        if self.numbers is not None:
            for problem in self.codec.check_shard(self._shard_lines(self.numbers)):
                self.problems.add(problem.line, problem.field, problem.message)
            self.numbers = array("q")
        self.shards.append(
            Shard(
                self.rows - self.shard_rows,
                self.shard_rows,
                self.size,
                tuple(self.segments),
                tuple(self.models),
            )
        )
        self._start_shard()

    def _shard_lines(self, numbers: Iterable[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The lines of the shard that is full, in their uploaded form."""
        if self.spool is not None:
            self.spool.flush()
        with self.content.open("rb") as file:
            yield from zip(numbers, _lines_of(file, self.segments), strict=False)

    def _report_repeated(self, repetitions: list[tuple[int, str, int]]) -> None:
        for number, custom_id, before in repetitions:
            self.problems.add(number, "custom_id", f"{custom_id!r} was used before, in line {before}")

    def end(self) -> None:
        self._report_repeated(self.seen.flush())
        if self.shard_rows:
            self._end_shard()
        if not self.rows and not self.problems:
            self.problems.add(None, None, "holds no request")

    def close(self) -> None:
        self.seen.close()
