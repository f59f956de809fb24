"""Recognise values that should hold rows: a frame, one row, a bundle of rows, or none of these.

Mistaking one shape for another costs money: a list of frames looks like a list of rows, and would make one
request per frame. So a value is recognised by the methods of its type, and a value of no known shape is
described for an error message. pandas, polars, DuckDB, pyarrow and pydantic are never imported.

The type is inspected and not the value, since a column may be named `open`, `keys` or `resolve`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PandasFrame(Protocol):
    """The used part of a pandas DataFrame; its index is not a column, but `reset_index()` makes it one."""

    @property
    def columns(self) -> Any: ...
    def itertuples(self, index: bool = ..., name: str | None = ...) -> Iterable[tuple[Any, ...]]: ...


@runtime_checkable
class PolarsFrame(Protocol):
    """The part of a polars DataFrame or a DuckDB relation that is used."""

    @property
    def columns(self) -> list[str]: ...
    def iter_rows(self) -> Iterable[tuple[Any, ...]]: ...


@runtime_checkable
class ArrowTable(Protocol):
    """The part of a pyarrow Table or RecordBatch that is used."""

    @property
    def num_rows(self) -> int: ...
    @property
    def schema(self) -> Any: ...
    def slice(self, offset: int = ..., length: int | None = ...) -> Any: ...
    def to_pylist(self) -> list[dict[str, Any]]: ...


# --- frames and columns ------------------------------------------------------------------------------------


def _can(value: object, *names: str) -> bool:
    return all(hasattr(type(value), name) for name in names)


def is_pandas(value: object) -> bool:
    return _can(value, "columns", "itertuples")


def is_polars(value: object) -> bool:
    # A worksheet of openpyxl has both as well, and its columns are a generator.
    return _can(value, "columns", "iter_rows") and isinstance(getattr(value, "columns", None), list)


def is_arrow(value: object) -> bool:
    return _can(value, "num_rows", "slice", "to_pylist")


def is_frame(value: object) -> bool:
    return is_pandas(value) or is_polars(value) or is_arrow(value)


def is_column(value: object) -> bool:
    """Whether this is a whole column or frame: a Series, an Index, an Arrow array."""
    return _can(value, "to_frame") or _can(value, "to_pylist") or is_frame(value)


def column_name(name: object) -> str | None:
    """Return a column's name as text, also of a number or date; None for what cannot name a column."""
    if isinstance(name, str):
        return str.__str__(name)  # for a string enumeration this is its value
    if name is None or isinstance(name, tuple | bytes) or is_missing(name):
        return None
    return str(name)


def is_missing(value: object) -> bool:
    """Whether this is NaN, NA or NaT."""
    if isinstance(value, float):
        return value != value
    return type(value).__name__ in ("NAType", "NaTType")


# --- rows ------------------------------------------------------------------------------------------------


def columns_of(row: Any) -> list[tuple[Any, Any]] | None:
    """Return the names and values of one row; None for a value that is no row.

    A row is a mapping, a database row, a named tuple, a dataclass, a pydantic or attrs object, a record of a
    numpy array, or a Series whose labels are column names. Not all of these forbid the same name twice.
    """
    if type(row) is dict:  # the common case
        return list(row.items())
    if _can(row, "as_py"):  # a pyarrow scalar, which may be a struct
        row = row.as_py()
    if isinstance(row, Mapping):
        return list(row.items())
    if is_frame(row) or isinstance(row, type):
        return None
    if is_labelled(row):
        labels = list(row.keys())
        return list(zip(labels, row, strict=True)) if all(isinstance(one, str) for one in labels) else None
    if _can(row, "__getitem__") and callable(getattr(type(row), "keys", None)):
        return [(name, row[name]) for name in row.keys()]  # noqa: SIM118 (a sqlite3.Row iterates over values)
    if _can(row, "_fields", "_asdict"):
        return list(zip(row._fields, row, strict=True))
    if (names := _field_names(row)) is not None:
        return [(name, getattr(row, name)) for name in names]
    if _can(row, "model_fields", "model_dump"):
        return list(row)
    return None


def is_labelled(value: object) -> bool:
    """Whether this is a pandas Series, which may be a row or a column."""
    return _can(value, "to_frame", "keys")


def _field_names(row: Any) -> Iterable[str] | None:
    if dataclasses.is_dataclass(row):
        return [field.name for field in dataclasses.fields(row)]
    if _can(row, "__attrs_attrs__"):
        return [field.name for field in type(row).__attrs_attrs__]
    names: Iterable[str] | None = getattr(getattr(row, "dtype", None), "names", None)
    return names if getattr(row, "shape", None) == () else None


# --- bundles ---------------------------------------------------------------------------------------------


def is_iterable_of_rows(value: object) -> bool:
    """Whether this yields rows one after another, in the same order each time."""
    if isinstance(value, str | bytes | bytearray | memoryview | Set) or not isinstance(value, Iterable):
        return False
    if is_window(value):
        return False
    return is_labelled(value) or columns_of(value) is None


def is_window(value: object) -> bool:
    """Whether this is a moving window of pandas, which yields overlapping frames."""
    kind = type(value)
    return kind.__name__ in ("Rolling", "Expanding", "Window") and kind.__module__.startswith("pandas")


def flatten(
    items: Iterable[Any], read: Callable[[Any, str], Iterable[Any] | None], name: str
) -> Iterator[Any]:
    """Yield rows one by one from nested bundles, holding one bundle at a time.

    `read` returns the rows of a frame or file, and None for anything else; it also gets a name for the item.
    An item that is neither a row nor a bundle is yielded as it is: the caller numbers the rows, and can say
    where it is.
    """
    for place, item in enumerate(items, start=1):
        if type(item) is dict:  # the common case
            yield item
        elif (rows := read(item, f"item {place} of {name}")) is not None:
            yield from rows
        elif _is_bundle(item):
            yield from flatten(item, read, f"item {place} of {name}")
        else:
            yield item


def _is_bundle(item: object) -> bool:
    """Whether an item of a table is a part of the table rather than a row.

    A tuple is not: it pairs values, as `zip`, `enumerate`, `iterrows` and `groupby` do, and flattening it
    would make a request of each.
    """
    if isinstance(item, list):
        return not item or is_frame(item[0]) or columns_of(item[0]) is not None or _is_bundle(item[0])
    return isinstance(item, Iterator)


# --- words for errors ------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """Describe a value in a few words, without its content."""
    name = type(value).__name__
    if type(value) not in (list, tuple) or not value:
        return name
    kinds = dict.fromkeys(type(item).__name__ for item in itertools.islice(value, 100))
    return f"{name} of {', '.join(itertools.islice(kinds, 4))}"


def advise(value: Any) -> str:
    """Return advice about a value that holds no rows, or is no row, to be appended to an error message."""
    return next((f"; {advice}" for fits, advice in _ADVICE if fits(value)), "")


def _holds_rows(value: Any) -> bool:
    return is_column(value) or columns_of(value) is not None or isinstance(value, Iterator)


def _is_tuple_of_rows(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_holds_rows, value))


def _is_pair_with_rows(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _holds_rows(value[1])


_CONVERTERS = ("to_arrow_table", "toPandas", "collect", "to_batches", "iter_batches", "to_pandas", "df")

# The first one that fits is used.
_ADVICE: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is_tuple_of_rows, "a tuple may pair values: pass rows one by one, or as lists, map(list, …)"),
    (_is_pair_with_rows, "pass the rows alone, without what iterrows(), groupby() or enumerate() adds"),
    (lambda value: isinstance(value, list | tuple), "give its values names: dict(zip(names, values))"),
    (lambda value: isinstance(value, str), "name its column: {'text': …}; for a file, pass its path"),
    (lambda value: isinstance(value, bytes | bytearray | memoryview), "for a file, pass its path"),
    (lambda value: isinstance(value, Set), "a set has no order, but rows are numbered: pass a sorted list"),
    (lambda value: isinstance(value, Mapping), "put one row into a list, [row]; columns into a DataFrame"),
    (lambda value: _can(value, "__aiter__"), "collect it first: [row async for row in …]"),
    (inspect.isawaitable, "await it first"),
    (lambda value: inspect.isroutine(value) or isinstance(value, type), "call it, and pass what it returns"),
    (is_labelled, "its labels are not column names: pass the frame, or series.to_frame(name)"),
    (lambda value: _can(value, "__array__"), "name its columns: pandas.DataFrame(values, columns=[…])"),
    (is_window, "its frames overlap, so that most rows would be submitted several times"),
    (lambda value: columns_of(value) is not None, "put one row into a list, [row]"),
    *(
        (lambda value, name=name: _can(value, name), f"pass what its {name}() returns")
        for name in _CONVERTERS
    ),
)  # fmt: skip
