"""Turn a table into request lines, and join results to the table: both stream, in constant memory.

A table is an iterable of rows (mappings, database rows, named tuples, dataclasses, pydantic objects), a path
or fsspec URL of a CSV, TSV, JSONL or Parquet file, or a frame of pandas, polars, DuckDB or pyarrow. It may
come in parts: a list or an iterator of frames, batches, path objects or lists of rows is one table. Rows are
numbered from 1.
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
from .sources import iter_requests, read_requests, why_no_request

__all__ = ["build_requests", "join_results", "read_requests", "read_rows", "write_jsonl"]

Prompt: TypeAlias = str | Callable[[Record], str | Sequence[Any] | Mapping[str, Any]]
RowId: TypeAlias = str | Callable[[Record], object] | None
Results: TypeAlias = "PathLike | Report | BatchResult | Iterable[Row]"
Parse: TypeAlias = Literal["json"] | Callable[[Any], Mapping[str, Any]] | None


# --- table to requests -----------------------------------------------------------------------------------

# The body's member for the prompt, by the end of the endpoint; longer ends come first.
_MEMBERS = {
    "/chat/completions": "messages",
    "/completions": "prompt",
    "/messages": "messages",
    "/responses": "input",
    "/embeddings": "input",
    "/moderations": "input",
}
# The body's member for the system prompt; "messages" means an additional message.
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
    """Build one request line for each row of a table, lazily.

    Args:
        table: A path or fsspec URL of a CSV, TSV, JSONL or Parquet file; a frame of pandas, polars, DuckDB or
            pyarrow; an iterable of rows; or an iterable of such parts.
        prompt: A template, or a function of the row. In a template, `{column}` is replaced by the row's value
            (None by nothing), `{price:.2f}` formats it, and `{{` and `}}` are braces. A name is always a
            column's, so that text in a table can never reach into objects. A function returns the prompt as
            text, as a list (messages, or inputs for embeddings), or as a dict that overrides the body's
            other parameters.
        model: The model of every request.
        id_column: The column that holds the custom_ids (text or integers), or a function of the row. With
            None they are `row-1`, `row-2` and so on, and stay the same only while the table keeps its order.
        endpoint: The endpoint of every request. Its end decides where the prompt goes in the body.
        system: A system prompt, if the endpoint has one. A list of messages that begins with a system
            message keeps its own.
        body: Further parameters of every request, such as `max_tokens=200, response_format={…}`.

    Returns:
        An iterator of request objects, for `Job(input=…)` or `write_jsonl`. It raises InputError naming the
        row if one cannot be read or made into a request.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    _refuse_old_name(body)
    end = next((end for end in _MEMBERS if endpoint.endswith(end)), "")
    if system is not None and end not in _SYSTEM:
        raise ConfigurationError(
            f"system: requests to {endpoint} have no system prompt; put it into the prompt"
        )
    if isinstance(prompt, str) and not end:
        raise ConfigurationError(
            f"prompt: anybatch does not know where text goes in requests to {endpoint}; pass a function that "
            "returns a dict"
        )
    ask = _Template(prompt).fill if isinstance(prompt, str) else _called(prompt)
    name_row = _ids(id_column)
    defaults = {"model": model, **body}

    def requests() -> Iterator[Record]:
        for number, row in enumerate(read_rows(table), start=1):
            own = _body(ask(row, number), end, system, number)
            whole = {**defaults, **own}
            _check_body(whole, end, number)
            yield {"custom_id": name_row(row, number), "method": "POST", "url": endpoint, "body": whole}

    return requests()


def _refuse_old_name(body: Mapping[str, Any]) -> None:
    """Refuse the former name of `id_column`, which would otherwise go into every request's body."""
    if "id" in body:
        raise ConfigurationError(
            "build_requests: use `id_column` instead of `id` for the column of custom_ids"
        )


def _called(prompt: Any) -> Callable[[Record, int], Any]:
    if not callable(prompt):
        raise ConfigurationError(f"prompt: must be a template or a function, not {type(prompt).__name__}")
    return lambda row, _: prompt(row)


class _Template:
    """A format string whose fields are columns only: no attributes, no indexing, no nesting."""

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str | None, str, str | None]] = []
        try:
            for literal, column, spec, conversion in string.Formatter().parse(text):
                if column == "" or "{" in (spec or ""):
                    raise ValueError("a field must be {column} or {column:format}")
                self._parts.append((literal, column, spec or "", conversion))
        except ValueError as error:
            raise ConfigurationError(
                f"prompt template: {error}; write {{{{ and }}}} for literal braces"
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
    """Return a function that gives a row's custom_id."""
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
            raise bad_row(number, column, f"a custom_id must be a non-empty text, not {value!r}")
        return value

    return name_row


def _body(prompt: Any, end: str, system: str | None, number: int) -> Record:
    """Build the part of the body that depends on the row: the prompt and the system prompt."""
    member = _MEMBERS.get(end)
    body: Record
    if isinstance(prompt, Mapping):
        body = dict(prompt)
    elif isinstance(prompt, str) and member == "messages":
        body = {member: [{"role": "user", "content": prompt}]}
    elif isinstance(prompt, str | list | tuple) and member is not None:
        body = {member: prompt if isinstance(prompt, str) else list(prompt)}
    else:
        wanted = "text, a list or a dict" if member else "a dict"
        raise bad_row(number, None, f"the prompt function returned {type(prompt).__name__}, not {wanted}")
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
    """Write request lines to a local or remote file, which appears complete or not at all.

    Args:
        path: The file to write: a path or fsspec URL. Its folder is created if necessary.
        requests: Request objects; nested lists and iterators are flattened.

    Returns:
        The number of lines written.

    Raises:
        InputError: A request cannot be written as JSON (which has no NaN and no infinity); it names the line.
        ConfigurationError: The value cannot hold requests.
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
    # Check first: dict() would also accept a list of pairs, and make a wrong object of it.
    if (wrong := why_no_request(request)) is not None:
        raise InputError(name, [Problem(number, None, wrong)])
    try:
        return _encoder.encode(dict(request)).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(name, [Problem(number, None, f"cannot be written as JSON: {error}")]) from None


# --- results to table ------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """The part of a result that is joined to the table's row."""

    outcome: str
    content: Any
    error: str | None


def join_results(
    table: Table, results: Results, *, id_column: RowId = None, parse: Parse = None, prefix: str = ""
) -> Iterator[Record]:
    """Join results to the rows of a table, lazily: each row exactly once, in the table's order.

    Each row gets three more columns: `outcome` (`missing` if there is no result), `content` (the text of a
    chat or response, the vector of an embedding, otherwise the whole body; None unless the row succeeded) and
    `error` (text, or None).

    Args:
        table: The table that the requests were built from.
        results: A job's folder, its `results.jsonl` or its Report; or an iterable of rows, such as
            `client.results(…)`, or of such iterables. Results in the table's order are joined in one pass;
            others go through an index in a temporary file.
        id_column: The same as for `build_requests`.
        parse: "json", or a function of the content. The members of the resulting object become columns, too.
            If the content cannot be parsed, the row keeps its outcome and `error` says why.
        prefix: Put before the name of every added column.

    Yields:
        The rows with the added columns.

    Raises:
        ConfigurationError: An added column would overwrite one of the table, no result at all belongs to the
            table, or an argument is invalid.
        InputError: The table or the results cannot be read.
    """
    name_row = _ids(id_column)
    if parse not in (None, "json") and not callable(parse):
        raise ConfigurationError(f"parse: must be 'json' or a function, not {parse!r}")

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
                "or a parse function that returns other names"
            )
        row = {**row, **named}
    return row


def _parsed(found: _Found, parse: Parse) -> tuple[_Found, Mapping[str, Any]]:
    if parse is None or found.outcome != Outcome.SUCCEEDED or found.error is not None:
        return found, {}
    try:
        fields = json.loads(found.content) if parse == "json" else parse(found.content)
    except Exception as error:  # an error of the user's parser must not lose the other rows
        problem = str(error) if parse == "json" else f"{type(error).__name__}: {error}"
    else:
        if isinstance(fields, Mapping):
            return found, fields
        problem = f"the result is {type(fields).__name__}, not an object"
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
    """Yield results one by one, also from nested lists and iterators, such as those of several batches."""
    if is_frame(results) or not is_iterable_of_rows(results):
        raise ConfigurationError(
            "results must be a job's folder or Report, or an iterable of anybatch.Row, not "
            f"{describe(results)}{advise(results)}"
        )
    rows = flatten(results, lambda item, _: item.results if isinstance(item, BatchResult) else None, "")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Row):
            raise ConfigurationError(
                f"result {number} is {describe(row)}, not an anybatch.Row; for a result file, pass its path"
            )
        yield row


class _Lookup:
    """Results by custom_id: read one by one while they come in the table's order, then from an index."""

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
        """Raise ConfigurationError if no result belongs to the table: one of the arguments must be wrong."""
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
    """Return the content of a response body, which its shape identifies, and the refusal if there is one."""
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
