"""Result lines: a provider's decoded into rows, rows written as landed lines and read again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from ..errors import ConfigurationError
from ..models import Body, Outcome, Report, Row, RowError
from ..paths import open_path
from ..providers.reading import mended_json
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
"""What the line of a row says that nobody has paid for."""


def decode_line(raw: bytes, provider: Provider, endpoint: str | None) -> tuple[Row, dict[str, Any] | None]:
    """One result line as a row (without its `raw`, for whoever has it), and its JSON.

    A broken line costs its own row only: it becomes a failed row with the code `undecodable_line`, and an
    empty custom_id where not even that can be read.
    """
    try:
        record = _record(raw)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        row = provider.codec.decode(record, endpoint)
    except Exception as error:  # whatever is wrong with one line, the others land
        reason = str(error) or type(error).__name__
        return Row(_salvaged_id(raw), Outcome.FAILED, None, RowError(UNDECODABLE, reason)), None
    return row, record


class _Mended(dict[str, Any]):
    """A record whose line is not JSON to the letter, and cannot land as it is."""


def _record(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError:
        mended = mended_json(raw)
        return _Mended(mended) if isinstance(mended, dict) else mended


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
            if not raw.isspace():
                raw = raw.rstrip(b"\r\n")
                yield replace(decode_line(raw, provider, endpoint)[0], raw=raw)


def landed_line(row: Row) -> bytes:
    """A row as a line of `results.jsonl`: OpenAI's output line behind a leading member `outcome`."""
    response = None
    if row.result is not None or row.status_code is not None:
        response = {"status_code": row.status_code, "request_id": None, "body": row.result}
    error = {"code": row.error.code, "message": row.error.message} if row.error else None
    line = {"outcome": row.outcome, "custom_id": row.custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def writable(row: Row) -> tuple[Row, bytes]:
    """A row and its landed line; a failed row in its place where it does not go into JSON, as one that is
    nested too deep or holds a number without bounds."""
    try:
        return row, landed_line(row)
    except (TypeError, ValueError, RecursionError) as error:
        problem = RowError(UNDECODABLE, f"the answer cannot be written down: {error}")
        failed = Row(row.custom_id, Outcome.FAILED, None, problem)
        return failed, landed_line(failed)


def has_openai_shape(record: dict[str, Any], custom_id: str, outcome: Outcome) -> bool:
    """Whether a provider's line is an output line of OpenAI's to the letter."""
    response, error = record.get("response"), record.get("error")
    if record.get("custom_id") != custom_id or "outcome" in record or isinstance(record, _Mended):
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
    """The outcome of a landed line, which leads it. Raises ValueError for a line that is none."""
    if not raw.startswith(_OUTCOME):
        raise ValueError("not a landed line")
    return Outcome(raw[len(_OUTCOME) : raw.find(b'"', len(_OUTCOME))].decode())


def parse_landed(raw: bytes) -> Row:
    """A line of `results.jsonl` as a row again."""
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
    code = error.get("code")  # some servers send a number, and their lines land as they are
    return RowError(None if code is None else str(code), str(error.get("message")))


def read_results(results: str | os.PathLike[str] | UPath | Report) -> Iterator[Row]:
    """The rows of a job that has landed, in input order and in constant memory.

    Args:
        results: The job's folder, its `results.jsonl`, or its report; a path or an fsspec URL.

    Raises:
        ConfigurationError: There is no such file, as while the job is running.
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
