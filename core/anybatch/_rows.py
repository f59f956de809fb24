"""Reading a table, whatever it is: a stream of dicts, in constant memory.

pandas, polars and pyarrow are recognised by what they can do and never imported; rows count from 1.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic_core import from_json

from .errors import ConfigurationError, InputError, Problem
from .ledger import open_path
from .lines import iter_lines

if TYPE_CHECKING:
    from upath import UPath

_CHUNK = 1024  # rows that are turned into Python objects at a time


@runtime_checkable
class PandasFrame(Protocol):
    """What is used of a pandas DataFrame; its index is no column, `reset_index()` makes it one."""

    @property
    def columns(self) -> Any: ...
    def itertuples(self, index: bool = ..., name: str | None = ...) -> Iterable[tuple[Any, ...]]: ...


@runtime_checkable
class PolarsFrame(Protocol):
    """What is used of a polars DataFrame."""

    def iter_rows(self, *, named: Literal[True]) -> Iterable[dict[str, Any]]: ...


@runtime_checkable
class ArrowTable(Protocol):
    """What is used of a pyarrow Table or RecordBatch."""

    @property
    def num_rows(self) -> int: ...
    def slice(self, offset: int = ..., length: int | None = ...) -> Any: ...
    def to_pylist(self) -> list[dict[str, Any]]: ...


Record: TypeAlias = dict[str, Any]
PathLike: TypeAlias = "str | os.PathLike[str] | UPath"  # the UPath of a remote file is no os.PathLike
Table: TypeAlias = "PathLike | PandasFrame | PolarsFrame | ArrowTable | Iterable[Mapping[str, Any]]"


def read_rows(table: Table) -> Iterator[Record]:
    """The rows of a table as dicts; NaN, NA and NaT become None, numpy scalars Python's own.

    Raises InputError naming the row that cannot be read.
    """
    for number, row in enumerate(_rows(table), start=1):
        if not hasattr(row, "keys"):  # sqlite3.Row has them and is no Mapping
            raise bad_row(number, None, f"is not a mapping of columns but {type(row).__name__}")
        # Iterating over a sqlite3.Row itself would give its values.
        yield {str(name): _plain(row[name]) for name in row.keys()}  # noqa: SIM118


def _rows(table: Any) -> Iterable[Any]:
    if isinstance(table, PandasFrame):
        names = _distinct([str(name) for name in table.columns], "the frame")
        return (dict(zip(names, row, strict=True)) for row in table.itertuples(index=False, name=None))
    if isinstance(table, PolarsFrame):
        return table.iter_rows(named=True)
    if isinstance(table, ArrowTable):
        return _arrow_rows(table)
    if (path := as_path(table)) is not None:
        return _file_rows(path)
    if isinstance(table, Mapping) or not isinstance(table, Iterable):
        kind = type(table).__name__
        raise ConfigurationError(f"a table is a path, a frame or an iterable of rows, not {kind}")
    # Readers of Arrow data iterate over batches.
    return itertools.chain.from_iterable(
        _arrow_rows(item) if isinstance(item, ArrowTable) else (item,) for item in table
    )


def _arrow_rows(table: ArrowTable) -> Iterator[Any]:
    for start in range(0, table.num_rows, _CHUNK):
        yield from table.slice(start, _CHUNK).to_pylist()


def as_path(value: object) -> Any:
    """A path object for what names a file, local or not; None for anything else."""
    if isinstance(value, str):
        return open_path(value)
    if hasattr(value, "open") and hasattr(value, "suffix"):
        return value
    return Path(value) if isinstance(value, os.PathLike) else None


def _file_rows(path: Any) -> Iterator[Any]:
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise bad_table(str(path), f"is none of {', '.join(readers)}; read it yourself and pass the rows")
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise bad_table(str(path), "there is no such file") from None
    with file:
        yield from read(file, str(path))


def _csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Record]:
    """CSV with a header line; a byte order mark, which Excel writes, is passed over."""
    # A setting of the whole process; many a document is longer than the default of 128 KB.
    csv.field_size_limit(sys.maxsize)
    # strict: otherwise a quote that is never closed would swallow the rest of the file.
    reader = csv.reader(_text_lines(file, name), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = next(reader, None)
        if not header:
            raise bad_table(name, "there is no header line")
        columns = _distinct(header, name)
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) != len(columns):
                raise bad_row(number, None, f"has {len(cells)} cells, the header {len(columns)}", name)
            yield dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise bad_row(number + 1, None, f"is not CSV near line {reader.line_num}: {error}", name) from None


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, (_, line) in enumerate(iter_lines(file), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as bad:
            where = f"byte 0x{line[bad.start]:02x} at column {bad.start + 1}"
            raise InputError(name, [Problem(number, None, f"not UTF-8: {where}")]) from None


def _tsv(file: BinaryIO, name: str) -> Iterator[Record]:
    return _csv(file, name, "\t")


def _jsonl(file: BinaryIO, name: str) -> Iterator[Any]:
    for number, (_, line) in enumerate(iter_lines(file), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            yield from_json(line, cache_strings="keys")
        except ValueError as error:
            raise InputError(name, [Problem(number, None, f"is not JSON: {error}")]) from None


def _parquet(file: BinaryIO, name: str) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ConfigurationError(f"reading {name} needs pyarrow: pip install pyarrow") from None
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=_CHUNK):
        yield from batch.to_pylist()


def _distinct(columns: list[str], name: str) -> list[str]:
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise bad_table(name, f"more than one column is called {', '.join(map(repr, repeated))}")
    return columns


def _plain(value: Any) -> Any:
    """A cell as an ordinary Python value."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):  # numpy.float64 is one
        return None if value != value else float(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # other numpy scalars and arrays
        return _plain(value.tolist())
    return value


def bad_table(name: str, message: str) -> InputError:
    return InputError(name, [Problem(None, None, message)])


def bad_row(number: int, column: str | None, message: str, name: str = "the table") -> InputError:
    place = f"row {number}" + (f", column {column!r}" if column is not None else "")
    return InputError(name, [Problem(None, place, message)])
