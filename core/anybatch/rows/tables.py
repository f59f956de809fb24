"""From a table to request lines, and from results back to the table: both streaming, in constant memory.

A table is an iterable of rows (mappings, database rows, named tuples, dataclasses, pydantic objects), a path
or fsspec URL of a CSV, TSV, JSONL or Parquet file, or a frame of pandas, polars, DuckDB or pyarrow. It may
come in parts: a list or an iterator of frames, batches, path objects or lists of rows is one table. Rows
count from 1.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from ..errors import ConfigurationError, InputError, Problem
from ..models import BatchResult, Outcome, Report, Row
from .readers import PathLike, Record, Table, as_path, bad_row, read_rows
from .results import read_results
from .shapes import advise, describe, flatten, is_frame, is_iterable_of_rows
from .sources import iter_requests, no_request, read_requests

__all__ = ["build_requests", "join_results", "read_requests", "read_rows", "write_jsonl"]

Prompt: TypeAlias = str | Callable[[Record], str | Sequence[Any] | Mapping[str, Any]]
RowId: TypeAlias = str | Callable[[Record], object] | None
Results: TypeAlias = "PathLike | Report | BatchResult | Iterable[Row]"
Parse: TypeAlias = Literal["json"] | Callable[[Any], Mapping[str, Any]] | None


# --- table to requests -----------------------------------------------------------------------------------

# Where the prompt goes, by the end of the endpoint; the longer ends first.
_MEMBERS = {
    "/chat/completions": "messages",
    "/completions": "prompt",
    "/messages": "messages",
    "/responses": "input",
    "/embeddings": "input",
    "/moderations": "input",
}
# Where the system prompt goes; "messages" stands for a message of its own.
_SYSTEM = {"/chat/completions": "messages", "/messages": "system", "/responses": "instructions"}


def build_requests(
    table: Table,
    prompt: Prompt,
    *,
    model: str,
    id_column: RowId = None,
    endpoint: str = "/v1/chat/completions",
    system: str | None = None,
    **body: Any,
) -> Iterator[Record]:
    """One request line for each row of a table, lazily: what `Job(input=…)` and `write_jsonl` take.

    prompt     a template, or a function of the row. In a template `{column}` is the row's value (None leaves
               nothing), `{price:.2f}` formats it, `{{` and `}}` are braces; names are column names and
               nothing else, so text in a table can never reach into objects. A function returns the prompt
               as text, a list (messages; inputs for embeddings), or a dict that is laid over the rest of the
               body.
    id_column  the column that holds custom_ids (text or whole numbers), a function of the row, or None for
               `row-1`, `row-2`, …: those are only as stable as the table's order.
    system     a system prompt, where the endpoint has one; a message list that begins with its own keeps
               that.
    body       the other parameters of every request, e.g. `max_tokens=200, response_format={…}`.

    Raises InputError naming the row, ConfigurationError for arguments that cannot be right.
    """
    _refuse_old_name(body)
    end = next((end for end in _MEMBERS if endpoint.endswith(end)), "")
    if system is not None and end not in _SYSTEM:
        raise ConfigurationError(f"system: requests to {endpoint} have no system prompt")
    if isinstance(prompt, str) and not end:
        raise ConfigurationError(
            f"prompt: how {endpoint} takes text is not known; give a function that returns a dict"
        )
    ask = _Template(prompt).fill if isinstance(prompt, str) else _called(prompt)
    name_row = _ids(id_column)
    defaults = {"model": model, **body}

    def requests() -> Iterator[Record]:
        for number, row in enumerate(read_rows(table), start=1):
            given = _body(ask(row, number), end, system, number)
            whole = {**defaults, **given}
            _check_body(whole, end, number)
            yield {"custom_id": name_row(row, number), "method": "POST", "url": endpoint, "body": whole}

    return requests()


def _refuse_old_name(body: Mapping[str, Any]) -> None:
    """`**body` takes any name: the one that `id_column` once had would go into every request."""
    if "id" in body:
        raise ConfigurationError("build_requests: the column of custom_ids is `id_column`, not `id`")


def _called(prompt: Any) -> Callable[[Record, int], Any]:
    if not callable(prompt):
        raise ConfigurationError(f"prompt: a template or a function, not {type(prompt).__name__}")
    return lambda row, _: prompt(row)


class _Template:
    """A format string that knows columns only: no attributes, no indexing, no nesting."""

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str | None, str, str | None]] = []
        try:
            for literal, column, spec, conversion in string.Formatter().parse(text):
                if column == "" or "{" in (spec or ""):
                    raise ValueError("a field is {column} or {column:format}")
                self._parts.append((literal, column, spec or "", conversion))
        except ValueError as error:
            raise ConfigurationError(
                f"prompt template: {error}; write {{{{ and }}}} for plain braces"
            ) from None

    def fill(self, row: Record, number: int) -> str:
        return "".join(
            literal if column is None else literal + self._value(row, number, column, spec, conversion)
            for literal, column, spec, conversion in self._parts
        )

    @staticmethod
    def _value(row: Record, number: int, column: str, spec: str, conversion: str | None) -> str:
        if column not in row:
            raise bad_row(number, column, f"there is no such column; there are {', '.join(map(repr, row))}")
        if row[column] is None:
            return ""
        try:
            return format(string.Formatter().convert_field(row[column], conversion), spec)
        except (ValueError, TypeError) as error:
            raise bad_row(
                number, column, f"{row[column]!r} cannot be formatted by {spec!r}: {error}"
            ) from None


def _ids(id_column: RowId) -> Callable[[Record, int], str]:
    """The custom_id of a row, by whatever rule was given."""
    if id_column is None:
        return lambda _, number: f"row-{number}"

    def name_row(row: Record, number: int) -> str:
        if isinstance(id_column, str) and id_column not in row:
            raise bad_row(
                number, id_column, f"there is no such column; there are {', '.join(map(repr, row))}"
            )
        value = row[id_column] if isinstance(id_column, str) else id_column(row)
        if isinstance(value, int | uuid.UUID) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value:
            column = id_column if isinstance(id_column, str) else None
            raise bad_row(number, column, f"a custom_id is text that is not empty, not {value!r}")
        return value

    return name_row


def _body(given: Any, end: str, system: str | None, number: int) -> Record:
    """What the prompt says of the body."""
    member = _MEMBERS.get(end)
    body: Record
    if isinstance(given, Mapping):
        body = dict(given)
    elif isinstance(given, str) and member == "messages":
        body = {member: [{"role": "user", "content": given}]}
    elif isinstance(given, str | list | tuple) and member is not None:
        body = {member: given if isinstance(given, str) else list(given)}
    else:
        wanted = "text, a list or a dict" if member else "a dict"
        raise bad_row(number, None, f"the prompt function returned {type(given).__name__}, not {wanted}")
    if system is None:
        return body
    if _SYSTEM[end] != "messages":
        return {_SYSTEM[end]: system, **body}
    messages = body.get("messages") or []
    if not (
        messages and isinstance(messages[0], Mapping) and messages[0].get("role") in ("system", "developer")
    ):
        body["messages"] = [{"role": "system", "content": system}, *messages]
    return body


def _check_body(body: Record, end: str, number: int) -> None:
    needed = [_MEMBERS[end]] if end else []
    needed += ["max_tokens"] if end == "/messages" else []  # Anthropic has no default for it
    if missing := [name for name in needed if body.get(name) is None]:
        raise bad_row(number, None, f"the body needs {' and '.join(missing)}")


def write_jsonl(path: PathLike, requests: Iterable[Mapping[str, Any]]) -> int:
    """Write request lines to a local or remote file, which appears whole or not at all, and count them.

    Raises InputError naming the line that is not JSON, NaN and infinity included.
    """
    target = as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    number = 0
    try:
        with temporary.open("wb") as file:
            for number, request in enumerate(iter_requests(requests), start=1):
                file.write(_encode(request, number, str(target)))
        temporary.rename(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    return number


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _encode(request: Mapping[str, Any], number: int, name: str) -> bytes:
    # Of a list of pairs, or of requests with two members each, dict() would make some object, too.
    if (wrong := no_request(request)) is not None:
        raise InputError(name, [Problem(number, None, wrong)])
    try:
        return _encoder.encode(dict(request)).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(name, [Problem(number, None, f"cannot be written as JSON: {error}")]) from None


# --- results to table ------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What is kept of a result."""

    outcome: str
    content: Any
    error: str | None


def join_results(
    table: Table, results: Results, *, id_column: RowId = None, parse: Parse = None, prefix: str = ""
) -> Iterator[Record]:
    """The rows of a table, in order and each exactly once, with what became of them, lazily.

    Added to each row: `outcome` (`missing` where there is no result), `content` (a chat's text, a response's
    output text, an embedding's vector, else the whole body; None unless it succeeded) and `error` (text, or
    None). All names are preceded by `prefix`.

    results    a job's folder, its results.jsonl or its Report, or any iterable of rows, such as
               `client.results(…)`, or of such iterables. Results in the table's order are joined in one pass;
               others go through an index in a temporary file.
    id_column  as given to `build_requests`.
    parse      "json", or a function of the content: the members of the object it comes to become columns
               too. Content that cannot be parsed keeps its outcome and says why in `error`.

    Raises ConfigurationError where an added column would overwrite one, or where not a single result belongs
    to the table.
    """
    name_row = _ids(id_column)
    if parse not in (None, "json") and not callable(parse):
        raise ConfigurationError(f"parse: 'json' or a function, not {parse!r}")

    def joined() -> Iterator[Record]:
        with contextlib.closing(_Lookup(_result_rows(results))) as lookup:
            for number, row in enumerate(read_rows(table), start=1):
                found = lookup.take(name_row(row, number))
                found, fields = _parsed(found, parse)
                yield _merged(row, found._asdict(), fields, prefix, number)
            lookup.check()

    return joined()


def _merged(row: Record, found: Record, fields: Mapping[str, Any], prefix: str, number: int) -> Record:
    for added in (found, fields):
        named = {f"{prefix}{name}": value for name, value in added.items()}
        if clash := sorted(named.keys() & row.keys()):
            raise ConfigurationError(
                f"row {number} would get a second column {', '.join(map(repr, clash))}: pass another prefix, "
                "or a parse function that names its fields otherwise"
            )
        row = {**row, **named}
    return row


def _parsed(found: _Found, parse: Parse) -> tuple[_Found, Mapping[str, Any]]:
    if parse is None or found.outcome != Outcome.SUCCEEDED or found.error is not None:
        return found, {}
    try:
        fields = json.loads(found.content) if parse == "json" else parse(found.content)
    except Exception as error:  # whatever a parser says of one row must not lose the others
        problem = str(error) if parse == "json" else f"{type(error).__name__}: {error}"
    else:
        if isinstance(fields, Mapping):
            return found, fields
        problem = f"it comes to {type(fields).__name__}, not to an object"
    what = "content is not JSON" if parse == "json" else "content could not be parsed"
    return found._replace(error=f"{what}: {problem}"), {}


def _result_rows(results: Any) -> Iterable[Row]:
    if isinstance(results, Report | BatchResult):
        results = results.results
    path = as_path(results)
    if path is None:
        return _given_results(results)
    return read_results(path)


def _given_results(results: Any) -> Iterator[Row]:
    """Results one by one, also out of lists and iterators of them, as of several batches."""
    if is_frame(results) or not is_iterable_of_rows(results):
        raise ConfigurationError(
            "results are a job's folder or Report, or an iterable of anybatch.Row, not "
            f"{describe(results)}{advise(results)}"
        )
    rows = flatten(results, lambda item, _: item.results if isinstance(item, BatchResult) else None, "")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Row):
            raise ConfigurationError(
                f"result {number} is {describe(row)}, not an anybatch.Row; of a file of results pass the path"
            )
        yield row


class _Lookup:
    """Results by custom_id: taken one after another while they come in the order asked for, else indexed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = iter(rows)
        self._index: sqlite3.Connection | None = None
        self._matched = False

    def take(self, custom_id: str) -> _Found:
        found = self._next(custom_id) if self._index is None else self._lookup(custom_id)
        self._matched |= found is not None
        return found or _Found(str(Outcome.MISSING), None, "there is no result for this row")

    def _next(self, custom_id: str) -> _Found | None:
        row = next(self._rows, None)
        if row is None:
            return None
        if row.custom_id == custom_id:
            return _found(row)
        self._index = sqlite3.connect("", check_same_thread=False)  # "" is a temporary file
        self._index.execute("CREATE TABLE results (id TEXT PRIMARY KEY, found TEXT) WITHOUT ROWID")
        rest = itertools.chain([row], self._rows)
        lines = ((row.custom_id, json.dumps(_found(row))) for row in rest)
        self._index.executemany("INSERT OR IGNORE INTO results VALUES (?, ?)", lines)
        return self._lookup(custom_id)

    def _lookup(self, custom_id: str) -> _Found | None:
        assert self._index is not None
        line = self._index.execute("SELECT found FROM results WHERE id = ?", (custom_id,)).fetchone()
        return _Found(*json.loads(line[0])) if line else None

    def check(self) -> None:
        """There were results and none was asked for: table or `id_column` is another one, or is used up."""
        if not self._matched and (self._index is not None or next(self._rows, None) is not None):
            raise ConfigurationError(
                "none of the results belongs to a row of this table: pass the table and the id_column "
                "that the requests were built from (an iterator can be read only once)"
            )

    def close(self) -> None:
        if self._index is not None:
            self._index.close()


def _found(row: Row) -> _Found:
    outcome = str(row.outcome)
    if outcome == Outcome.SUCCEEDED:
        content, refusal = _content(row.result or {})
        return _Found(outcome, content, f"the model refused: {refusal}" if refusal else None)
    error = row.error
    if error is None:
        return _Found(outcome, None, f"the request {outcome}")
    return _Found(outcome, None, f"{error.code}: {error.message}" if error.code else error.message)


def _content(body: Mapping[str, Any]) -> tuple[Any, str | None]:
    """What a response body says, told by its shape, and a refusal if that is all it says."""
    match body:
        case {"choices": [{"message": {} as message}, *_]}:  # /v1/chat/completions
            return message.get("content"), message.get("refusal")
        case {"choices": [{"text": text}, *_]}:  # /v1/completions
            return text, None
        case {"object": "response", "output": list(items)}:  # /v1/responses
            messages = [item for item in items if item.get("type") == "message"]
            parts = [part for message in messages for part in message.get("content") or []]
            texts = [part["text"] for part in parts if "text" in part]
            refusals = [part["refusal"] for part in parts if "refusal" in part]
            return "".join(texts) if texts else None, "".join(refusals) or None
        case {"data": [{"embedding": _}, *_] as vectors}:  # /v1/embeddings, one input or several
            found = [vector["embedding"] for vector in vectors]
            return found[0] if len(found) == 1 else found, None
        case {"type": "message", "content": list(blocks)}:  # /v1/messages
            return "".join(block["text"] for block in blocks if "text" in block), None
        case _:
            return dict(body), None
