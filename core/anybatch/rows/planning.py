"""Validate the input and split it into shards, in one pass and constant memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from ..errors import ConfigurationError, InputError, Problem
from ..providers.codec import Codec
from ..providers.content import Content, file_stamp
from .requests import Problems, SeenIds, check_line, decode_line, is_plain, iter_lines, nesting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from ..providers.base import Provider

_BOMS = {
    b"\xef\xbb\xbf": "a UTF-8 byte order mark",
    b"\xff\xfe": "a UTF-16 byte order mark",
    b"\xfe\xff": "a UTF-16 byte order mark",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the input that one batch carries.

    Attributes:
        first_row: The number of its first row, from 0.
        rows: The number of its rows.
        size: The size of its uploaded form, bytes.
        segments: The byte ranges of its uploaded form in the content file: (start, end). Blank lines in the
            input make more than one.
        models: The models that it asks for.
    """

    first_row: int
    rows: int
    size: int
    segments: tuple[tuple[int, int], ...]
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A valid input, split into shards.

    Attributes:
        shards: The shards, in input order.
        rows: The number of all rows.
        digest: The sha256 of the input's bytes.
        content: The file that the shards are read from.
        stamp: The size and modification time of that file when it was validated.
        models: The models that the input asks for.
        shard_requests: The most rows in one shard, if the job limits them.
    """

    shards: tuple[Shard, ...]
    rows: int
    digest: str
    content: Path
    stamp: tuple[int, int]
    models: tuple[str, ...] = ()
    shard_requests: int | None = None

    def shard_content(self, shard: Shard) -> Content:
        """Return the uploaded form of one shard."""
        return Content(self.content, shard.segments, shard.rows, self.stamp)


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
    """Read the whole input once: validate every line, and split it into shards.

    Args:
        source: The open input.
        name: Its name, for errors.
        provider: The account that the shards are for.
        endpoint: The endpoint of every request.
        content: The local file that the shards are read from: the input itself, or the file behind `spool`.
        spool: Receives the uploaded form of each line. It is needed if that differs from the input's line:
            for a provider whose codec is not `verbatim`, and with a `model`.
        ids: Receives the custom_ids in input order, one JSON string per line.
        model: The model for lines that name none.
        drop_untranslatable: Whether to drop parameters that have no counterpart in the provider's API.
        only: The custom_ids of the lines to take, in input order; None takes all.
        shard_requests: The most rows in one shard, if lower than the provider's limit.

    Returns:
        The plan. Its digest is that of the whole input, whatever `only` is.

    Raises:
        InputError: Lines are invalid; it names the first MAX_PROBLEMS of them.
        ConfigurationError: The provider's smallest batch is larger than `shard_requests`.
    """
    stamp = file_stamp(content)
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
        stamp=stamp if spool is None else file_stamp(content),
        models=tuple(planner.all_models),
        shard_requests=shard_requests,
    )


def _lines_of(file: BinaryIO, segments: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield the lines in these byte ranges of a file."""
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
        if self.most_requests < self.limits.min_requests:
            raise ConfigurationError(
                f"shard_requests: a batch at {provider.name} needs at least {self.limits.min_requests} "
                f"requests, not {shard_requests}",
                provider=provider.name,
            )
        self.provider, self.endpoint, self.model, self.drop = provider, endpoint, model, drop
        self.content = content
        # Checking a whole shard reads it again: skip that for codecs without such a check.
        self.checks_shards = type(provider.codec).check_shard is not Codec.check_shard
        # Line number, offset and size of the last rows: as many as the provider's smallest batch needs.
        self.tail: deque[tuple[int, int, int]] | None = None
        if self.limits.min_requests > 1:
            self.tail = deque(maxlen=self.limits.min_requests)
        self.spool, self.ids = spool, ids
        self.only = None if only is None else iter(only)
        self.wanted = None if self.only is None else next(self.only, None)
        self.spooled = 0
        self.problems = Problems()
        self.seen = SeenIds()
        self.shards: list[Shard] = []
        self.rows = 0
        self.all_models: dict[str, int] = {}  # model -> the first line that names it
        self.unreadable = False
        self._start_shard()

    def _start_shard(self) -> None:
        self.segments: list[tuple[int, int]] = []
        self.shard_rows = self.size = 0
        self.models: dict[str, None] = {}
        self.numbers = array("q")  # of its lines, if the codec checks whole shards

    def take(self, number: int, offset: int, raw: bytes) -> None:
        """Validate one line and put it into a shard."""
        if number == 1 and (bom := next((bom for bom in _BOMS if raw.startswith(bom)), None)):
            self.problems.add(1, None, f"begins with {_BOMS[bom]}; save the file as plain UTF-8")
            self.unreadable = len(bom) == 2  # UTF-16: report one problem instead of one per line
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
            return f"is {size} bytes long; a whole batch at {name} holds {limits.bytes}"
        if limits.line_bytes is not None and size > limits.line_bytes:
            return f"is {size} bytes long; a request at {name} may have {limits.line_bytes}"
        if limits.nesting is not None and (depth := nesting(line)) > limits.nesting:
            return f"is nested {depth} levels deep; {name} accepts {limits.nesting}"
        return None

    def _check(self, number: int, line: dict[str, Any]) -> None:
        if not is_plain(line, self.endpoint):  # nearly all lines are plain; the full check is slower
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
            self.problems.add(number, "body.model", "must name the model, or the job needs a `model`")
            return
        if self.model is not None and model != self.model:
            self.problems.add(number, "body.model", f"is {model!r}, but the job's model is {self.model!r}")
        elif self.provider.traits.one_model and self.all_models and model not in self.all_models:
            first, line = next(iter(self.all_models.items()))
            self.problems.add(
                number, "body.model", f"is {model!r}, but line {line} has {first!r}: {self.provider.name} "
                "runs one model per batch; make one job for each model"
            )  # fmt: skip
        else:
            self.all_models.setdefault(model, number)

    def _encode(self, number: int, raw: bytes, *, names_model: bool) -> bytes | None:
        if self.codec.verbatim and (names_model or self.model is None):
            return raw if raw.endswith(b"\n") else raw + b"\n"
        try:
            # Parse again with the standard library: unlike orjson it keeps integers of any size.
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
        self.models[line["body"].get("model", self.model)] = None
        self._append(number, start, size)
        self.rows += 1
        if self.tail is not None:
            self.tail.append((number, start, size))
        if self.ids is not None:
            self.ids.write(orjson.dumps(line["custom_id"], option=orjson.OPT_APPEND_NEWLINE))

    def _append(self, number: int, start: int, size: int) -> None:
        """Append a line to the current shard."""
        if self.segments and self.segments[-1][1] == start:
            self.segments[-1] = (self.segments[-1][0], start + size)
        else:
            self.segments.append((start, start + size))
        if self.checks_shards:
            self.numbers.append(number)
        self.shard_rows += 1
        self.size += size

    def _end_shard(self) -> None:
        if self.checks_shards:
            for problem in self.codec.check_shard(self._shard_lines(self.numbers)):
                self.problems.add(problem.line, problem.field, problem.message)
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
        """Yield the lines of the current shard with their line numbers, in their uploaded form."""
        if self.spool is not None:
            self.spool.flush()
        with self.content.open("rb") as file:
            yield from zip(numbers, _lines_of(file, self.segments), strict=False)

    def _report_repeated(self, repetitions: list[tuple[int, str, int]]) -> None:
        for number, custom_id, before in repetitions:
            self.problems.add(number, "custom_id", f"{custom_id!r} was used before, in line {before}")

    def end(self) -> None:
        """Close the last shard, and check what only the whole input shows."""
        self._report_repeated(self.seen.flush())
        if self.shard_rows:
            self._fill_last()
            self._end_shard()
        if not self.problems and (message := self._too_few()) is not None:
            self.problems.add(None, None, message)

    def _fill_last(self) -> None:
        """If the last shard is smaller than a batch may be, move rows from the shard before into it."""
        least, lacking = self.limits.min_requests, self.limits.min_requests - self.shard_rows
        if self.tail is None or lacking <= 0 or not self.shards:
            return
        before, rows = self.shards[-1], list(self.tail)
        moved = sum(size for _, _, size in rows[:lacking])
        if before.rows - lacking < least or self.size + moved > self.limits.bytes:
            return
        cut = rows[0][1]
        self.shards[-1] = replace(
            before,
            rows=before.rows - lacking,
            size=before.size - moved,
            segments=tuple((start, min(end, cut)) for start, end in before.segments if start < cut),
        )
        # Which models the moved rows have is not known: take all of the shard before.
        models = dict.fromkeys(before.models) | self.models
        self._start_shard()
        self.models = models
        for number, start, size in rows:
            self._append(number, start, size)

    def _too_few(self) -> str | None:
        """Return why there are too few rows for this provider's batches, or None if there are enough."""
        name, limits = self.provider.name, self.limits
        if not self.rows:
            return "holds no request"
        if self.rows < limits.min_requests:
            return f"holds {self.rows} requests; a batch at {name} needs at least {limits.min_requests}"
        short = next((shard for shard in self.shards if shard.rows < limits.min_requests), None)
        if short is None:
            return None
        return (
            f"would need a batch of {short.rows} requests, from request {short.first_row + 1} on; a batch at "
            f"{name} needs at least {limits.min_requests}, and may hold at most {self.most_requests} and "
            f"{limits.bytes} bytes here"
        )

    def close(self) -> None:
        self.seen.close()
