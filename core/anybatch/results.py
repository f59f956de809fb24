"""Result lines: decoded one by one, and merged into the order of the input.

A provider's result files come in any order, miss rows, repeat rows and hold broken lines. Merging reads each
file once, keeps only where each row's line lies, and writes the rows in input order: every request exactly
once, with one outcome. What belongs to no request is written elsewhere and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from .lines import iter_lines
from .models import BatchStatus, Body, Outcome, Row, RowError, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from .providers.base import Provider

_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')

UNDECODABLE = "undecodable_line"


def decode_line(raw: bytes, provider: Provider, endpoint: str | None) -> tuple[Row, dict[str, Any] | None]:
    """One result line as a row, and its JSON.

    A broken line costs its own row only: it becomes a failed row with the code `undecodable_line`, and an
    empty custom_id where not even that can be read.
    """
    try:
        record = orjson.loads(raw)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        row = provider.decode(record, endpoint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Row(
            _salvaged_id(raw), Outcome.FAILED, None, RowError(UNDECODABLE, str(error)), None, raw
        ), None
    return Row(row.custom_id, row.outcome, row.result, row.error, row.status_code, raw), record


def _salvaged_id(raw: bytes) -> str:
    found = _CUSTOM_ID.search(raw)
    try:
        return str(orjson.loads(found[1])) if found else ""
    except ValueError:
        return ""


def iter_rows(path: Path, provider: Provider, endpoint: str | None) -> Iterator[Row]:
    """The rows of one result file, in the file's order, in constant memory."""
    with path.open("rb") as file:
        for _, raw in iter_lines(file):
            if raw.strip():
                yield decode_line(raw.rstrip(b"\r\n"), provider, endpoint)[0]


def landed_line(row: Row) -> bytes:
    """A row as a line of `results.jsonl`: OpenAI's output line behind a leading member `outcome`."""
    response = None
    if row.result is not None or row.status_code is not None:
        response = {"status_code": row.status_code, "request_id": None, "body": row.result}
    error = {"code": row.error.code, "message": row.error.message} if row.error else None
    line = {"outcome": row.outcome, "custom_id": row.custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def has_openai_shape(record: dict[str, Any], custom_id: str, outcome: Outcome) -> bool:
    """Whether a provider's line is an output line of OpenAI's to the letter."""
    response, error = record.get("response"), record.get("error")
    if record.get("custom_id") != custom_id or "outcome" in record:
        return False
    if outcome is Outcome.SUCCEEDED:
        return (
            error is None
            and isinstance(response, dict)
            and isinstance(response.get("body"), dict)
            and isinstance(response.get("status_code"), int)
        )
    return response is None and isinstance(error, dict) and isinstance(error.get("message"), str)


def parse_landed(raw: bytes) -> Row:
    """A line of `results.jsonl` as a row again."""
    record = orjson.loads(raw)
    response, error = record.get("response") or {}, record.get("error")
    body = response.get("body")
    return Row(
        record["custom_id"],
        Outcome(record["outcome"]),
        Body(body) if isinstance(body, dict) else None,
        RowError(error.get("code"), str(error.get("message"))) if isinstance(error, dict) else None,
        response.get("status_code"),
        raw,
    )


# --- merging -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What the rows of a job add up to."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    unexpected: int = 0
    models: dict[str, None] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None

    def add_body(self, body: Body) -> None:
        """Add one response's model and tokens, as chat, responses, embeddings and messages report them."""
        model, usage = body.get("model"), body.get("usage")
        if isinstance(model, str):
            self.models[model] = None
        if not isinstance(usage, dict):
            return
        cached = _count(usage.get("cache_read_input_tokens"))
        created = _count(usage.get("cache_creation_input_tokens"))
        into = _count(usage.get("prompt_tokens", usage.get("input_tokens"))) + cached + created
        out = _count(usage.get("completion_tokens", usage.get("output_tokens")))
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.input_tokens += into
        self.output_tokens += out
        self.total_tokens += max(_count(usage.get("total_tokens")), into + out)
        self.cached_tokens += cached or _count(
            details.get("cached_tokens") if isinstance(details, dict) else 0
        )
        if isinstance(cost := usage.get("cost"), int | float):
            self.cost = (self.cost or 0.0) + cost

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            total_tokens=self.total_tokens,
            cached_tokens=self.cached_tokens,
        )


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the line of a row lies, what became of the row, and whether the line can land as it is."""

    file: int
    offset: int
    size: int
    outcome: Outcome
    kept: bool


def _reread(file: BinaryIO, place: _Place) -> bytes:
    """A line, without moving the file for whoever is reading it."""
    position = file.tell()
    file.seek(place.offset)
    raw = file.read(place.size).strip()
    file.seek(position)
    return raw


def merge(
    paths: Sequence[Path],
    custom_ids: Sequence[str],
    provider: Provider,
    endpoint: str,
    status: BatchStatus,
    out: BinaryIO,
    stray: Callable[[bytes], object],
    tally: Tally,
) -> None:
    """Write one batch's rows to `out` in the order of `custom_ids`, each exactly once.

    A row that no line speaks of shares the fate of its batch: expired, cancelled, else missing. Of two lines
    for one row a success wins, else the first. Lines that no request asked for go to `stray`, as do the
    losers and the undecodable ones. Memory: an index of one batch.
    """
    expected = dict.fromkeys(custom_ids)
    original = provider.original_ids(custom_ids)
    places: dict[str, _Place] = {}
    strayed: set[str] = set()  # whose line in `places` is in `stray` as well

    def note(number: int, offset: int, raw: bytes) -> None:
        row, record = decode_line(raw, provider, endpoint)
        custom_id = original.get(row.custom_id, row.custom_id)
        undecodable = row.error is not None and row.error.code == UNDECODABLE
        known = places.get(custom_id)
        better = known is None or (row.outcome is Outcome.SUCCEEDED is not known.outcome)
        if undecodable or custom_id not in expected or not better:
            stray(raw.rstrip(b"\r\n") + b"\n")
        if known is not None and better and custom_id not in strayed:
            stray(_reread(files[known.file], known) + b"\n")
        if undecodable:
            strayed.add(custom_id)
        if custom_id not in expected or known is not None:
            tally.unexpected += 1
        if custom_id in expected and better:
            kept = record is not None and has_openai_shape(record, custom_id, row.outcome)
            places[custom_id] = _Place(number, offset, len(raw), row.outcome, kept)
            if row.outcome is Outcome.SUCCEEDED and row.result is not None:
                tally.add_body(row.result)

    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for number, file in enumerate(files):
            for offset, raw in iter_lines(file):
                if raw.strip():
                    note(number, offset, raw)
        for custom_id in custom_ids:
            place = places.get(custom_id)
            if place is None:
                row = unanswered(custom_id, status)
                tally.counts[row.outcome] += 1
                out.write(landed_line(row))
                continue
            tally.counts[place.outcome] += 1
            raw = _reread(files[place.file], place)
            if place.kept:
                # OpenAI's shape already: the provider's own bytes, behind one more member.
                out.write(b'{"outcome":"%s",%s\n' % (place.outcome.encode(), raw[1:]))
            else:
                row, _ = decode_line(raw, provider, endpoint)
                out.write(landed_line(replace(row, custom_id=custom_id)))


_FATES = {
    BatchStatus.EXPIRED: (Outcome.EXPIRED, "batch_expired", "The batch expired before it came to this."),
    BatchStatus.CANCELLED: (Outcome.CANCELLED, "batch_cancelled", "The batch was cancelled before this."),
}


def unanswered(custom_id: str, status: BatchStatus) -> Row:
    """The row of a request that the result files do not mention."""
    missing = (Outcome.MISSING, "missing", "The provider's result files do not mention this request.")
    outcome, code, message = _FATES.get(status, missing)
    return Row(custom_id, outcome, None, RowError(code, message))


def read_landed(path: Any) -> Iterable[Row]:
    """The rows of a landed `results.jsonl` (any path object with `open`), in input order."""
    with path.open("rb") as file:
        for _, raw in iter_lines(file):
            if raw.strip():
                yield parse_landed(raw)
