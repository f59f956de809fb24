"""Result lines: decode a provider's line into a row, write a row as a landed line, and read that again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from ..errors import ConfigurationError
from ..models import Body, Outcome, Report, Row, RowError
from ..paths import open_path
from ..providers.reading import repaired_json
from .requests import iter_lines

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from upath import UPath

    from ..providers.base import Provider

__all__ = [
    "NEVER_RUN",
    "UNDECODABLE",
    "decode_line",
    "has_openai_shape",
    "iter_rows",
    "landed_line",
    "landed_outcome",
    "parse_landed",
    "read_results",
    "writable",
]

_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')

UNDECODABLE = "undecodable_line"
NEVER_RUN = frozenset({Outcome.EXPIRED, Outcome.CANCELLED})
"""The outcomes of rows that the provider has not run, and so not charged."""


def decode_line(raw: bytes, provider: Provider, endpoint: str | None) -> tuple[Row, dict[str, Any] | None]:
    """Decode one result line: return its row (without `raw`), and the parsed JSON.

    A broken line loses only its own row: it becomes a failed row with the code `undecodable_line`, and with
    an empty custom_id if even that cannot be read.
    """
    try:
        record = _record(raw)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        row = provider.codec.decode(record, endpoint)
    except Exception as error:  # one line must not keep the others from landing
        reason = str(error) or type(error).__name__
        return Row(_salvaged_id(raw), Outcome.FAILED, None, RowError(UNDECODABLE, reason)), None
    return row, record


class _Repaired(dict[str, Any]):
    """A record whose line is not strictly JSON, so that it cannot land as it is."""


def _record(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError:
        repaired = repaired_json(raw)
        return _Repaired(repaired) if isinstance(repaired, dict) else repaired


def _salvaged_id(raw: bytes) -> str:
    found = _CUSTOM_ID.search(raw)
    try:
        return str(orjson.loads(found[1])) if found else ""
    except ValueError:
        return ""


def iter_rows(path: Path, provider: Provider, endpoint: str | None) -> Iterator[Row]:
    """Yield the rows of one result file, in the file's order, in constant memory."""
    with path.open("rb") as file:
        for _, raw in iter_lines(file):
            if not raw.isspace():
                raw = raw.rstrip(b"\r\n")
                yield replace(decode_line(raw, provider, endpoint)[0], raw=raw)


def landed_line(row: Row) -> bytes:
    """Return a row as a line of `results.jsonl`: OpenAI's output line with a leading member `outcome`."""
    response = None
    if row.result is not None or row.status_code is not None:
        response = {"status_code": row.status_code, "request_id": None, "body": row.result}
    error = {"code": row.error.code, "message": row.error.message} if row.error else None
    line = {"outcome": row.outcome, "custom_id": row.custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def writable(row: Row) -> tuple[Row, bytes]:
    """Return a row and its landed line; a failed row instead if this one cannot be written as JSON.

    That happens to rows that are nested too deeply or hold an infinite number.
    """
    try:
        return row, landed_line(row)
    except (TypeError, ValueError, RecursionError) as error:
        problem = RowError(UNDECODABLE, f"the result cannot be written as JSON: {error}")
        failed = Row(row.custom_id, Outcome.FAILED, None, problem)
        return failed, landed_line(failed)


def has_openai_shape(record: dict[str, Any], custom_id: str, outcome: Outcome) -> bool:
    """Whether a provider's line is exactly an output line of OpenAI's, so that it can land as it is."""
    response, error = record.get("response"), record.get("error")
    if record.get("custom_id") != custom_id or "outcome" in record or isinstance(record, _Repaired):
        return False
    if outcome is Outcome.SUCCEEDED:
        return (
            error is None
            and isinstance(response, dict)
            and isinstance(response.get("body"), dict)
            and isinstance(response.get("status_code"), int)
        )
    return response is None and isinstance(error, dict) and isinstance(error.get("message"), str)


_OUTCOME = b'{"outcome":"'


def landed_outcome(raw: bytes) -> Outcome:
    """Return the outcome at the beginning of a landed line; raise ValueError if there is none."""
    if not raw.startswith(_OUTCOME):
        raise ValueError("not a landed line")
    return Outcome(raw[len(_OUTCOME) : raw.find(b'"', len(_OUTCOME))].decode())


def parse_landed(raw: bytes) -> Row:
    """Parse a line of `results.jsonl` as a row."""
    record = orjson.loads(raw)
    response, error = record.get("response") or {}, record.get("error")
    body = response.get("body")
    return Row(
        record["custom_id"],
        Outcome(record["outcome"]),
        Body(body) if isinstance(body, dict) else None,
        _landed_error(error) if isinstance(error, dict) else None,
        response.get("status_code"),
        raw,
    )


def _landed_error(error: dict[str, Any]) -> RowError:
    code = error.get("code")  # a number in lines of some servers, which land as they are
    return RowError(None if code is None else str(code), str(error.get("message")))


def read_results(results: str | os.PathLike[str] | UPath | Report) -> Iterator[Row]:
    """Read the rows of a job that has landed, in constant memory.

    Args:
        results: The job's folder or its `results.jsonl` (a path or fsspec URL), or the job's report.

    Returns:
        An iterator of the rows, in input order.

    Raises:
        ConfigurationError: There is no such file; it appears once the job has landed.
    """
    path = open_path(results.results if isinstance(results, Report) else results)
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ConfigurationError(f"{file}: there is no such file; it appears once the job has landed")
    return _read_lines(file)


def _read_lines(path: UPath) -> Iterator[Row]:
    with path.open("rb") as file:
        for _, raw in iter_lines(file):
            if not raw.isspace():
                yield parse_landed(raw)
