"""Read a table of any kind as a stream of dicts, in constant memory.

A table may come in parts (chunks, frames, record batches); its rows still come one by one and are numbered
from 1 throughout. An item that is no row is refused by its number.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from ..errors import ConfigurationError, InputError, Problem
from ..paths import open_path
from .requests import iter_lines
from .shapes import (
    ArrowTable,
    PandasFrame,
    PolarsFrame,
    advise,
    column_name,
    columns_of,
    describe,
    flatten,
    is_arrow,
    is_column,
    is_iterable_of_rows,
    is_missing,
    is_pandas,
    is_polars,
)

if TYPE_CHECKING:
    from upath import UPath

_CHUNK = 1024  # how many rows are converted to Python objects at a time

Record: TypeAlias = dict[str, Any]
PathLike: TypeAlias = "str | os.PathLike[str] | UPath"  # a remote UPath is not an os.PathLike
# No type can express what may be a row, or a part of a table: `columns_of` and `flatten` decide at run time.
Table: TypeAlias = "PathLike | PandasFrame | PolarsFrame | ArrowTable | Iterable[Any]"


def read_rows(table: Table) -> Iterator[Record]:
    """Read the rows of a table as dicts.

    Args:
        table: A path or fsspec URL of a CSV, TSV, JSONL or Parquet file; a frame of pandas, polars, DuckDB or
            pyarrow; an iterable of rows; or an iterable of such parts.

    Yields:
        Each row as a dict by column name. NaN, NA and NaT become None; values of numpy and pyarrow become
        Python's own.

    Raises:
        InputError: A row or file cannot be read; it names the row.
        ConfigurationError: The value is no table.
    """
    for number, row in enumerate(_rows(table), start=1):
        columns = columns_of(row)
        if columns is None:
            where = "" if isinstance(table, list | str) else f" (the table is a {type(table).__name__})"
            raise bad_row(
                number, None, f"is not a mapping of columns but {describe(row)}{where}{advise(row)}"
            )
        yield _record(columns, number)


def _record(columns: list[tuple[Any, Any]], number: int) -> Record:
    record: Record = {}
    for name, value in columns:
        text = name if type(name) is str else column_name(name)
        if text is None:
            raise bad_row(number, None, f"has a column named {name!r}; column names must be text")
        if text in record:  # otherwise one of the two would be lost
            raise bad_row(number, text, "there is more than one column of this name; rename one of them")
        record[text] = _cell(value, number, text)
    return record


def _rows(table: Any) -> Iterable[Any]:
    if (rows := _whole(table, f"the {type(table).__name__}")) is not None:
        return rows
    if (path := as_path(table)) is not None:
        return _file_rows(path)
    if isinstance(table, csv.DictReader):
        _names(table.fieldnames or (), "the DictReader")
    if not is_iterable_of_rows(table):
        raise ConfigurationError(
            f"a table must be a path, a frame or an iterable of rows, not {describe(table)}{advise(table)}"
        )
    return flatten(table, _part, "the table")


def _whole(table: Any, name: str) -> Iterable[Any] | None:
    """Return the rows of a frame, whose column names must be unique; None for anything else."""
    if is_pandas(table):
        return _named(_names(table.columns, name), table.itertuples(index=False, name=None))
    if is_polars(table):
        return _named(_names(table.columns, name), table.iter_rows())
    if is_arrow(table):
        _names(table.schema.names, name)
        return _arrow_rows(table)
    return None


def _part(item: Any, name: str) -> Iterable[Any] | None:
    """Return the rows of an item that is a frame or a file; None for others. A text may be meant as a row."""
    if not isinstance(item, str) and (path := as_path(item)) is not None:
        return _file_rows(path)
    return _whole(item, f"{name}, a {type(item).__name__}")


def _named(names: list[str], rows: Iterable[tuple[Any, ...]]) -> Iterator[Record]:
    return (dict(zip(names, row, strict=True)) for row in rows)


def _arrow_rows(table: ArrowTable) -> Iterator[Any]:
    for start in range(0, table.num_rows, _CHUNK):
        yield from table.slice(start, _CHUNK).to_pylist()


def as_path(value: object) -> Any:
    """Return a path object for a value that names a local or remote file; None for anything else."""
    if isinstance(value, str):
        if "\n" in value:
            raise ConfigurationError(
                "a text of several lines is not the path of a file: write the text to a file and pass its "
                "path, or pass the rows"
            )
        return open_path(value)
    # Look at the type, not the value: a row may have columns of these names, such as stock prices ("open").
    if callable(getattr(type(value), "open", None)) and hasattr(type(value), "suffix"):
        return value
    return Path(value) if isinstance(value, os.PathLike) else None


def _file_rows(path: Any) -> Iterator[Any]:
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise bad_table(
            str(path), f"is none of {', '.join(readers)}; read the file yourself and pass its rows"
        )
    with _opened(path) as file:
        yield from read(file, str(path))


def read_jsonl(path: Any) -> Iterator[Record]:
    """Yield the objects of a JSONL file with any name, their values unchanged."""
    with _opened(path) as file:
        yield from _jsonl(file, str(path))


def _opened(path: Any) -> BinaryIO:
    try:
        file: BinaryIO = path.open("rb")
    except FileNotFoundError:
        raise bad_table(str(path), "there is no such file") from None
    except IsADirectoryError:
        raise bad_table(str(path), "is a folder; pass its files, as in sorted(folder.iterdir())") from None
    return file


def _csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Record]:
    """Yield the rows of a CSV file with a header line; skip a byte order mark, which Excel writes."""
    # This is a setting of the whole process. Documents are often longer than the default of 128 KB.
    csv.field_size_limit(sys.maxsize)
    # Without strict, a quote that is never closed would swallow the rest of the file.
    reader = csv.reader(_text_lines(file, name), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(reader, None)
        if not header:
            raise bad_table(name, "there is no header line")
        columns = _names(header, name)
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) != len(columns):
                raise bad_row(
                    number, None, f"has {len(cells)} cells, but the header has {len(columns)}", name
                )
            yield dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise bad_row(number + 1, None, f"is not CSV near line {reader.line_num}: {error}", name) from None


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, (_, line) in enumerate(iter_lines(file), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as bad:
            where = f"byte 0x{line[bad.start]:02x} at column {bad.start + 1}"
            raise InputError(name, [Problem(number, None, f"is not UTF-8: {where}")]) from None


def _tsv(file: BinaryIO, name: str) -> Iterator[Record]:
    return _csv(file, name, "\t")


def _jsonl(file: BinaryIO, name: str) -> Iterator[Record]:
    for number, (_, line) in enumerate(iter_lines(file), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), object_pairs_hook=_members)
        except (ValueError, RecursionError) as error:
            raise InputError(name, [Problem(number, None, f"is not JSON: {error}")]) from None
        except _RepeatedError as error:
            repeated = f"has more than one member named {str(error)!r}; rename one of them"
            raise InputError(name, [Problem(number, None, repeated)]) from None
        if not isinstance(row, dict):
            wrong = f"is not a JSON object but {describe(row)}; each line must hold one object"
            raise InputError(name, [Problem(number, None, wrong)])
        yield row


class _RepeatedError(Exception):
    """A JSON object has two members of this name."""


def _members(pairs: list[tuple[str, Any]]) -> Record:
    """Build a dict from a JSON object; raise _RepeatedError if two members have one name."""
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedError(next(name for name in names if names.count(name) > 1))
    return members


def _parquet(file: BinaryIO, name: str) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ConfigurationError(f"reading {name} needs pyarrow: pip install pyarrow") from None
    source = parquet.ParquetFile(file)
    _names(source.schema_arrow.names, name)
    for batch in source.iter_batches(batch_size=_CHUNK):
        yield from batch.to_pylist()


def _names(columns: Iterable[Any], name: str) -> list[str]:
    """Return the names of a table's columns; raise InputError unless they are unique and text."""
    names: list[str] = []
    for column in columns:
        if (text := column_name(column)) is None:
            levels = "join its levels: frame.columns = ['_'.join(map(str, name)) for name in frame.columns]"
            advice = levels if isinstance(column, tuple) else "column names must be text"
            raise bad_table(name, f"a column is named {column!r}; {advice}")
        names.append(text)
    if repeated := sorted({column for column in names if names.count(column) > 1}):
        shown = ", ".join(map(repr, repeated))
        raise bad_table(name, f"more than one column is named {shown}; rename one of them")
    return names


_ORDINARY = frozenset({str, int, bool, type(None)})
_BUILTIN = _ORDINARY | {float, list, tuple, dict}


def _cell(value: Any, number: int, column: str) -> Any:
    """Return a cell as an ordinary Python value."""
    kind = type(value)
    if kind in _ORDINARY:
        return value
    if kind not in _BUILTIN and is_column(value):
        message = f"holds {describe(value)}, a whole column and not a cell; make a DataFrame of the columns"
        raise bad_row(number, column, message)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Convert a value to ordinary Python, also inside lists and dicts.

    In a prompt, numpy's values would read like calls: `np.int64(3)`.
    """
    kind = type(value)
    if kind in _ORDINARY:
        return value
    if kind is list or kind is tuple:
        return value if _is_plain(value) else kind(map(_plain, value))
    if kind is dict:
        return {name: _plain(member) for name, member in value.items()}
    if is_missing(value):
        return None
    if isinstance(value, float):  # numpy.float64 is one
        return float(value)
    if hasattr(value, "as_py"):  # a pyarrow scalar
        return _plain(value.as_py())
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # other numpy scalars and arrays
        if value.dtype.name in ("datetime64[ns]", "timedelta64[ns]"):  # tolist() would give nanoseconds
            value = value.astype(value.dtype.name.replace("ns", "us"))
        return _plain(value.tolist())
    return value


def _is_plain(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list certainly needs no conversion; this is fast, since embeddings are long."""
    kinds = set(map(type, values))
    if kinds <= _ORDINARY:
        return True
    if kinds != {float}:
        return False
    total: float = sum(values)  # NaN if one of them is
    return total == total


def bad_table(name: str, message: str) -> InputError:
    return InputError(name, [Problem(None, None, message)])


def bad_row(number: int, column: str | None, message: str, name: str = "the table") -> InputError:
    place = f"row {number}" + (f", column {column!r}" if column is not None else "")
    return InputError(name, [Problem(None, place, message)])
