"""Every shape that a table or request lines may come in: read rightly, or refused by name (G2 of FAULTS)."""

from __future__ import annotations

import collections
import csv
import dataclasses
import enum
import io
import itertools
import json
import re
import sqlite3
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pandas
import pydantic
import pytest
from upath import UPath

from anybatch import Client, Job, create_batch, run_job
from anybatch.errors import ConfigurationError, InputError
from anybatch.models import BatchResult, Body, Outcome, Row
from anybatch.rows.tables import build_requests, join_results, read_requests, read_rows, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "red"},
    {"id": "b", "text": "green"},
    {"id": "c", "text": "blue"},
]
FRAME = pandas.DataFrame(ROWS)
CSV = "id,text\na,red\nb,green\nc,blue\n"


def request_line(custom_id: str) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


LINES = [request_line(row["id"]) for row in ROWS]


# --- rows and frames that are none of pandas' ------------------------------------------------------------


class Fruit(NamedTuple):
    id: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    id: str
    text: str


class Model(pydantic.BaseModel):
    id: str
    text: str


class OpenModel(pydantic.BaseModel, extra="allow"):
    id: str


class Column(str, enum.Enum):  # noqa: UP042 (a StrEnum would print its value anyway)
    ID = "id"
    TEXT = "text"


class Relation:
    """As a relation of DuckDB 2, or a frame of polars: columns by name, rows as tuples."""

    def __init__(self, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
        self._columns, self._rows = columns, rows

    @property
    def columns(self) -> list[str]:
        return self._columns

    def iter_rows(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)


class Batch:
    """As a table or record batch of pyarrow, by which the last of two columns of one name wins."""

    def __init__(self, rows: list[dict[str, Any]], names: tuple[str, ...] = ("id", "text")) -> None:
        self._rows, self.schema = rows, collections.namedtuple("Schema", "names")(names)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def slice(self, offset: int = 0, length: int | None = None) -> Batch:
        return Batch(self._rows[offset:][:length])

    def to_pylist(self) -> list[dict[str, Any]]:
        return self._rows


class LazyFrame:
    """As a polars LazyFrame: it has columns, and rows only when it is collected."""

    def collect(self) -> Any:
        raise AssertionError("nothing is computed unasked")


class Worksheet:
    """As one of openpyxl: `columns` and `iter_rows`, but of cells, and without names."""

    columns = property(lambda self: iter([("id",)]))

    def iter_rows(self) -> Iterator[tuple[str, ...]]:
        return iter([("id",), ("a",)])

    __iter__ = iter_rows


async def in_time() -> AsyncIterator[dict[str, Any]]:
    for row in ROWS:
        yield row


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


def database_rows(query: str = "SELECT 'a' AS id, 'red' AS text", factory: Any = sqlite3.Row) -> list[Any]:
    database = sqlite3.connect(":memory:")
    database.row_factory = factory
    rows = database.execute(query).fetchall()
    database.close()
    return rows


def objects(*values: Any) -> Any:
    array = numpy.empty(len(values), dtype=object)
    array[:] = values
    return array


# --- what is read ----------------------------------------------------------------------------------------

FLATTENED: dict[str, Callable[[], Any]] = {
    "list of dicts": lambda: ROWS,
    "tuple of dicts": lambda: tuple(ROWS),
    "generator": generated,
    "values of a dict": lambda: {row["id"]: row for row in ROWS}.values(),
    "deque": lambda: collections.deque(ROWS),
    "array of dicts": lambda: objects(*ROWS),
    "lists of dicts": lambda: [ROWS[:2], [], ROWS[2:]],
    "lists of lists of dicts": lambda: [[ROWS[:1], ROWS[1:2]], [ROWS[2:]]],
    "rows and lists of rows": lambda: [ROWS[0], ROWS[1:]],
    "generators": lambda: (iter(part) for part in (ROWS[:1], ROWS[1:])),
    "pandas": lambda: FRAME,
    "pandas in chunks": lambda: pandas.read_csv(io.StringIO(CSV), chunksize=2),
    "list of frames": lambda: [FRAME[:1], FRAME[1:]],
    "generator of frames": lambda: (FRAME[start : start + 1] for start in range(3)),
    "lists of frames": lambda: [[FRAME[:1]], [FRAME[1:2], FRAME[2:]]],
    "frames and rows": lambda: [FRAME[:2], ROWS[2]],
    "frame of index and columns": lambda: FRAME.set_index("id").reset_index(),
    "itertuples": lambda: FRAME.itertuples(index=False),
    "records of a frame": lambda: FRAME.to_records(index=False),
    "Series of dicts": lambda: pandas.Series(ROWS),
    "list of Series": lambda: [row for _, row in FRAME.iterrows()],
    "relation": lambda: Relation(["id", "text"], [tuple(row.values()) for row in ROWS]),
    "relations": lambda: [Relation(["id", "text"], [tuple(row.values())]) for row in ROWS],
    "arrow": lambda: Batch(ROWS),
    "record batches": lambda: [Batch(ROWS[:2]), Batch(ROWS[2:])],
    "reader of record batches": lambda: iter([Batch(ROWS[:2]), Batch(ROWS[2:])]),
    "named tuples": lambda: [Fruit(**row) for row in ROWS],
    "dataclasses": lambda: [Record(**row) for row in ROWS],
    "pydantic objects": lambda: [Model(**row) for row in ROWS],
    "pydantic objects with extra fields": lambda: [OpenModel(**row) for row in ROWS],
    "DictReader": lambda: csv.DictReader(io.StringIO(CSV)),
    "enumerated column names": lambda: [{Column.ID: row["id"], Column.TEXT: row["text"]} for row in ROWS],
}  # fmt: skip


@pytest.mark.parametrize("make", FLATTENED.values(), ids=FLATTENED)
def test_each_row_becomes_one_request(make: Callable[[], Any]) -> None:
    """G2: a list of frames gave one request a frame, of lists of texts."""
    assert list(read_rows(make())) == ROWS
    lines = list(build_requests(make(), "{id}: {text}", model="m", id_column="id"))
    assert [line["body"]["messages"][0]["content"] for line in lines] == ["a: red", "b: green", "c: blue"]
    good = (Row(row["id"], Outcome.SUCCEEDED, Body({}), None, 200) for row in ROWS)
    assert [row["outcome"] for row in join_results(make(), good, id_column="id")] == ["succeeded"] * 3


def test_rows_count_through_all_parts() -> None:
    lines = build_requests([FRAME[:2], FRAME[2:]], "{text}", model="m")
    assert [line["custom_id"] for line in lines] == ["row-1", "row-2", "row-3"]
    with pytest.raises(InputError, match="row 4: is not a mapping of columns but int"):
        list(read_rows([FRAME, 7]))


def test_files_as_parts(tmp_path: Path) -> None:
    paths = [tmp_path / "1.csv", tmp_path / "2.jsonl"]
    paths[0].write_text("id,text\na,red\nb,green\n")
    paths[1].write_text('{"id":"c","text":"blue"}\n')
    for parts in (paths, sorted(tmp_path.iterdir()), [UPath(path) for path in paths]):
        assert list(read_rows(parts)) == ROWS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([0, 1], ["0", "1"]),
        ([pandas.Timestamp("2026-01-02"), numpy.int64(7)], ["2026-01-02 00:00:00", "7"]),
        (["open", "suffix"], ["open", "suffix"]),
        (["keys", "resolve"], ["keys", "resolve"]),
    ],
)
def test_column_names(columns: list[Any], expected: list[str]) -> None:
    """Numbers and dates have a text; names that are attributes elsewhere are columns here."""
    frame = pandas.DataFrame([["x", "y"]], columns=columns)
    assert list(read_rows(frame)) == [dict(zip(expected, "xy", strict=True))]
    if all(isinstance(column, str) for column in columns):
        assert list(read_rows([frame.iloc[0]])) == [dict(zip(expected, "xy", strict=True))]


def test_memory_does_not_grow_with_the_number_of_chunks() -> None:
    def chunks() -> Iterator[Any]:
        for start in range(0, 20_000, 100):
            yield [{"id": str(n), "text": "x" * 1000} for n in range(start, start + 100)]

    tracemalloc.start()
    count = sum(1 for _ in build_requests(chunks(), "{text}", model="m", id_column="id"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000  # of 20 MB


def test_parts_are_read_as_they_are_asked_for() -> None:
    endless = ([{"n": n}, {"n": n}] for n in itertools.count())
    assert [row["n"] for row in itertools.islice(read_rows(endless), 5)] == [0, 0, 1, 1, 2]


# --- cells -----------------------------------------------------------------------------------------------


def test_values_inside_of_cells_are_plain() -> None:
    """Nested arrays printed as `[array([1, 2]), …]` in prompts, and dates of numpy as nanoseconds."""
    moment = numpy.datetime64("2026-01-02T03:04:05", "ns")
    nested = objects(numpy.array([1, 2]), numpy.array([0.5, float("nan")]))
    row = {"nested": nested, "list": [numpy.float64(1), (numpy.str_("x"),)], "dict": {"n": numpy.int8(3)}}
    (read,) = read_rows([row])
    assert read == {"nested": [[1, 2], [0.5, None]], "list": [1.0, ("x",)], "dict": {"n": 3}}
    assert json.dumps(read)
    (lines,) = build_requests([{"list": [numpy.float64(1)], "at": moment}], "{list} {at:%H:%M}", model="m")
    assert lines["body"]["messages"][0]["content"] == "[1.0] 03:04"


@pytest.mark.parametrize("column", [FRAME["text"], FRAME, Batch(ROWS), pandas.Index(["x"])])
def test_columns_that_are_no_cells(column: Any) -> None:
    """A dict of columns inside of a list looks like a row."""
    kind = type(column).__name__
    with pytest.raises(
        InputError, match=f"row 2, column 'text': holds {kind}, a whole column and not a cell"
    ):
        list(read_rows([ROWS[0], {"id": "b", "text": column}]))


# --- what is refused -------------------------------------------------------------------------------------

PAIRS = "pass the rows alone, without what iterrows(), groupby() or enumerate() adds"
NAMES = "give its values names: dict(zip(names, values))"

NO_TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "dict of columns": (lambda: {"id": [1], "text": ["x"]}, "not dict; put one row into a list"),
    "dict of frames": (lambda: {"sheet": FRAME}, "not dict; put one row into a list"),
    "one row": (lambda: ROWS[0], "not dict; put one row into a list, [row]; columns into a DataFrame"),
    "one named tuple": (lambda: Fruit("a", "red"), "not Fruit"),
    "one dataclass": (lambda: Record("a", "red"), "not Record; put one row into a list, [row]"),
    "one pydantic object": (lambda: Model(id="a", text="red"), "not Model; put one row into a list, [row]"),
    "one database row": (lambda: database_rows()[0], "not Row; put one row into a list, [row]"),
    "set": (lambda: {Fruit("a", "red")}, "not set; a set has no order, but rows are numbered"),
    "bytes": (lambda: CSV.encode(), "not bytes; for a file, pass its path"),
    "number": (lambda: 7, "not int"),
    "None": (lambda: None, "not NoneType"),
    "function": (lambda: generated, "not function; call it, and pass what it returns"),
    "class": (lambda: Model, "; call it, and pass what it returns"),
    "async generator": (in_time, "not async_generator; collect it first: [row async for row in …]"),
    "lazy frame": (LazyFrame, "not LazyFrame; pass what its collect() returns"),
    "rolling windows": (lambda: FRAME.rolling(2), "not Rolling; its frames overlap, so that most rows"),
    "text": (lambda: CSV, "a text of several lines is not the path of a file"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NO_TABLES.values(), ids=NO_TABLES)
def test_what_is_no_table(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        list(build_requests(make(), "Hi", model="m"))


def test_a_coroutine_is_no_table() -> None:
    async def load() -> list[dict[str, Any]]:
        return ROWS

    coroutine: Any = load()
    with pytest.raises(ConfigurationError, match="not coroutine; await it first"):
        list(read_rows(coroutine))
    coroutine.close()


WORKSHEET = "row 1: is not a mapping of columns but tuple of str (the table is a Worksheet)"
NO_ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "texts": (lambda: ["red"], "row 1: is not a mapping of columns but str; name its column: {'text': …}"),
    "lists of texts": (lambda: [["a", "red"]], f"is not a mapping of columns but list of str; {NAMES}"),
    "numbers": (lambda: range(3), "row 1: is not a mapping of columns but int (the table is a range)"),
    "tuples": (lambda: [(1, "red")], f"row 1: is not a mapping of columns but tuple of int, str; {NAMES}"),
    "rows of a database without names": (
        lambda: database_rows(factory=None),
        f"row 1: is not a mapping of columns but tuple of str; {NAMES}",
    ),
    "rows of csv": (lambda: csv.reader(io.StringIO(CSV)), "but list of str (the table is a reader)"),
    "an open file": (lambda: io.StringIO(CSV), "but str (the table is a StringIO); name its column"),
    "Series": (lambda: FRAME["text"], "row 1: is not a mapping of columns but str (the table is a Series)"),
    "columns": (lambda: [pandas.Series([1, 2])], "but Series; its labels are not column names"),
    "iterrows": (FRAME.iterrows, f"but tuple of int, Series (the table is a generator); {PAIRS}"),
    "items": (FRAME.items, f"but tuple of str, Series (the table is a generator); {PAIRS}"),
    "enumerate": (lambda: enumerate(ROWS), f"but tuple of int, dict (the table is a enumerate); {PAIRS}"),
    "zip": (lambda: zip(ROWS, ROWS, strict=True), "but tuple of dict (the table is a zip); a tuple may pair"),
    "batched": (lambda: [tuple(ROWS)], "but tuple of dict; a tuple may pair values: pass rows one by one"),
    "groups": (lambda: itertools.groupby(ROWS, key=str), f"(the table is a groupby); {PAIRS}"),
    "GroupBy": (
        lambda: FRAME.groupby("id"),
        f"but tuple of str, DataFrame (the table is a DataFrameGroupBy); {PAIRS}",
    ),
    "array": (
        lambda: numpy.array([[1, 2], [3, 4]]),
        "but ndarray (the table is a ndarray); name its columns: pandas.DataFrame(values, columns=[…])",
    ),
    "sheet": (Worksheet, WORKSHEET),
    "sets": (lambda: [{"a"}], "row 1: is not a mapping of columns but set; a set has no order"),
    "lazy frames": (lambda: [LazyFrame()], "but LazyFrame; pass what its collect() returns"),
    "functions": (lambda: [generated], "but function; call it, and pass what it returns"),
    "something after rows": (lambda: [ROWS[:2], "x"], "row 3: is not a mapping of columns but str"),
    "something in a list of rows": (lambda: [[*ROWS, None]], "row 4: is not a mapping of columns but None"),
    "levels of columns": (
        lambda: pandas.DataFrame([[1]], columns=pandas.MultiIndex.from_tuples([("a", "b")])),
        "the DataFrame: 1 problem (nothing was sent)\n  a column is named ('a', 'b'); join its levels",
    ),
    "columns without a name": (
        lambda: [FRAME, pandas.DataFrame([[1]], columns=[None])],
        "item 2 of the table, a DataFrame: 1 problem (nothing was sent)\n  a column is named ",
    ),
    "a column of bytes": (lambda: [{b"id": 1}], "row 1: has a column named b'id'"),
    "too many cells": (
        lambda: csv.DictReader(io.StringIO("id,text\na,b,c\n")),
        "row 1: has a column named None",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_row(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        list(build_requests(make(), "Hi", model="m"))


TWICE: dict[str, tuple[Callable[[], Any], str]] = {
    "pandas": (lambda: pandas.DataFrame([[1, 2]], columns=["x", "x"]), "the DataFrame"),
    "names of one text": (lambda: pandas.DataFrame([[1, 2]], columns=[7, "7"]), "named '7'"),
    "a later frame": (
        lambda: [FRAME, pandas.DataFrame([[1, 2]], columns=["x", "x"])],
        "item 2 of the table, a DataFrame",
    ),
    "relation": (lambda: Relation(["x", "x"], [(1, 2)]), "the Relation"),
    "arrow": (lambda: Batch([{"x": 2}], ("x", "x")), "the Batch"),
    "a later batch": (lambda: iter([Batch(ROWS), Batch([{"x": 2}], ("x", "x"))]), "item 2 of the table"),
    "DictReader": (lambda: csv.DictReader(io.StringIO("x,x\n1,2\n")), "the DictReader"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "place"), TWICE.values(), ids=TWICE)
def test_two_columns_of_one_name(make: Callable[[], Any], place: str) -> None:
    """G2: the last of them won."""
    with pytest.raises(InputError, match=re.escape(place)) as caught:
        list(read_rows(make()))
    assert "more than one column is named" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (lambda: database_rows("SELECT 1 AS x, 2 AS x")[0], "x"),
        (lambda: {1: "a", "1": "b"}, "1"),
        (lambda: pandas.Series([1, 2], index=["x", "x"]), "x"),
    ],
)
def test_two_columns_of_one_name_in_a_row(row: Callable[[], Any], name: str) -> None:
    with pytest.raises(
        InputError, match=f"row 2, column '{name}': there is more than one column of this name"
    ):
        list(read_rows([{}, row()]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a":1}\n[{"a":2}]\n',
            "line 2: is not a JSON object but list of dict; each line must hold one obj",
        ),
        ('"red"\n', "line 1: is not a JSON object but str; each line must hold one object"),
        ('{"a":1}\n{"a":1,"b":2,"a":3}\n', "line 2: has more than one member named 'a'; rename one of them"),
        ('{"a":{"b":1,"b":2}}\n', "line 1: has more than one member named 'b'"),
        ("[" * 100_000 + "\n", "line 1: is not JSON"),
        ("{\n", "line 1: is not JSON"),
    ],
)
def test_lines_that_are_no_rows(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        list(read_rows(path))
    assert caught.value.source == str(path)


# --- the real ones, where they are installed -------------------------------------------------------------


def test_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parts = [table.slice(0, 1), table.slice(1)]
    batches = table.to_batches(max_chunksize=2)
    structs = pyarrow.array(ROWS)
    for shape in (parts, iter(parts), batches, [batches, []], table.to_reader(1), structs, list(structs)):
        assert list(read_rows(shape)) == ROWS
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["x", "x"])
    parquet.write_table(twice, tmp_path / "t.parquet")
    sources: list[Any] = [
        twice,
        [table, twice],
        twice.to_batches(),
        twice.to_reader(),
        tmp_path / "t.parquet",
    ]
    for source in sources:
        with pytest.raises(InputError, match="more than one column is named 'x'"):
            list(read_rows(source))
    with pytest.raises(InputError, match=r"t\.parquet: 1 problem"):
        list(read_rows(tmp_path / "t.parquet"))
    with pytest.raises(InputError, match="row 1: is not a mapping of columns but StringScalar"):
        list(read_rows(table["text"]))
    with pytest.raises(InputError, match="row 1, column 'text': holds ChunkedArray: a whole column"):
        list(read_rows([{"text": table["text"]}]))


def test_polars() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS)
    for shape in (
        [frame[:1], frame[1:]],
        frame.iter_slices(2),
        frame.iter_rows(named=True),
        frame.to_struct(),
    ):
        assert list(read_rows(shape)) == ROWS
    for shape, kind in (
        (frame.iter_rows(), "tuple of str"),
        (frame["text"], "str"),
        (frame.group_by("id"), "tup"),
    ):
        with pytest.raises(InputError, match=f"row 1: is not a mapping of columns but {kind}"):
            list(read_rows(shape))
    with pytest.raises(ConfigurationError, match=r"not LazyFrame; pass what its collect\(\) returns"):
        list(read_rows(frame.lazy()))


def test_duckdb() -> None:
    duckdb = pytest.importorskip("duckdb")
    relation = duckdb.sql("SELECT * FROM (VALUES ('a', 'red'), ('b', 'green'), ('c', 'blue')) t (id, text)")
    if hasattr(relation, "iter_rows"):
        assert list(read_rows(relation)) == list(read_rows([relation])) == ROWS
        with pytest.raises(InputError, match="more than one column is named 'x'"):
            list(read_rows(duckdb.sql("SELECT 1 AS x, 2 AS x")))
    with pytest.raises(ConfigurationError, match=r"; pass what its \w+\(\) returns"):
        list(read_rows(duckdb.connect()))


def test_sqlalchemy() -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    engine = sqlalchemy.create_engine("sqlite://")
    query, twice = (sqlalchemy.text(f"SELECT 'a' AS id, 'red' AS {name}") for name in ("text", "id"))
    with engine.connect() as connection:
        assert list(read_rows(connection.execute(query))) == ROWS[:1]
        assert list(read_rows(connection.execute(query).mappings())) == ROWS[:1]
        assert list(read_rows(connection.execute(query).partitions(2))) == ROWS[:1]
        for result in (connection.execute(twice), connection.execute(twice).mappings()):
            with pytest.raises(InputError, match="row 1, column 'id': there is more than one column"):
                list(read_rows(result))
    engine.dispose()


def test_attrs() -> None:
    attrs = pytest.importorskip("attrs")
    kind = attrs.make_class("Fruit", ["id", "text"])
    assert list(read_rows([kind(**row) for row in ROWS])) == ROWS


# --- request lines ---------------------------------------------------------------------------------------

BUNDLED: dict[str, Callable[[], Any]] = {
    "list": lambda: LINES,
    "generator": lambda: iter(LINES),
    "lists": lambda: [LINES[:1], [], LINES[1:]],
    "generators": lambda: (iter([line]) for line in LINES),
    "several tables": lambda: [build_requests([row], lambda _: {"messages": LINES[0]["body"]["messages"]},
                                              model="m", id_column="id") for row in ROWS],
    "Series": lambda: pandas.Series(LINES),
    "mappings": lambda: [collections.ChainMap(line) for line in LINES],
}  # fmt: skip


@pytest.mark.parametrize("make", BUNDLED.values(), ids=BUNDLED)
def test_request_lines(make: Callable[[], Any], tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "in.jsonl", make()) == 3
    assert list(read_requests(tmp_path / "in.jsonl")) == LINES
    job = Job(input=make(), output=tmp_path / "out")
    with Client("local", api_base=str(tmp_path / "local.db")) as client:
        client.submit(job)
    ledger = job.ledger()
    assert ledger is not None
    assert ledger.rows == 3


NO_REQUESTS: dict[str, tuple[Callable[[], Any], str]] = {
    "frame": (lambda: FRAME, "DataFrame is a table, not request lines: give `prompt`"),
    "frames": (lambda: [FRAME], "is DataFrame, which is a table and not a mapping: give `prompt`"),
    "chunks": (
        lambda: pandas.read_csv(io.StringIO(CSV), chunksize=2),
        "is DataFrame, which is a table and not a mapping",
    ),
    "arrow": (lambda: Batch(ROWS), "Batch is a table, not request lines: give `prompt`"),
    "one request": (lambda: LINES[0], "not dict; put one row into a list"),
    "texts": (lambda: ["red"], "is str, not a mapping"),
    "pairs": (lambda: [list(LINES[0].items())], "is list of tuple, not a mapping"),
    "two letters": (lambda: ["ab"], "is str, not a mapping"),
    "numbered": (lambda: enumerate(LINES), "is tuple of int, dict, not a mapping; pass the rows alone"),
    "async": (in_time, "not async_generator; collect it first"),
    "function": (lambda: generated, "not function; call it"),
    "bytes": (lambda: b"{}", "not bytes"),
    "set": (lambda: {Fruit("a", "red")}, "not set; a set has no order"),
}


@pytest.mark.parametrize(("make", "message"), NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_what_are_no_requests(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    """G2: dict() made some object of lists of pairs, and a frame gave its columns' names."""
    with pytest.raises((ConfigurationError, InputError), match=re.escape(message)):
        write_jsonl(tmp_path / "in.jsonl", make())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        run_job("local", make(), tmp_path / "out", api_base=str(tmp_path / "local.db"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("table.csv", "table.csv is a table, not request lines: give `prompt`"),
        (Path("table.PARQUET"), "is a table, not request lines: give `prompt`"),
        ("s3://bucket/table.tsv", "is a table, not request lines: give `prompt`"),
        (json.dumps(LINES), "input: must be a path, not a text of"),
    ],
)
def test_paths_of_no_requests(path: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run_job("local", path, tmp_path / "out", api_base=str(tmp_path / "local.db"))
    assert Job(input=path, output=tmp_path).ledger() is None
    with pytest.raises(ConfigurationError, match=message):
        create_batch("local", path, "/v1/chat/completions", api_base=str(tmp_path / "local.db"))


@pytest.mark.parametrize("given", [FRAME, LINES, None])
def test_a_single_batch_is_a_file(given: Any, tmp_path: Path) -> None:
    name = type(given).__name__
    with pytest.raises(
        ConfigurationError, match=f"input_file_path: must be the path of a JSONL file, not {name}"
    ):
        create_batch("local", given, "/v1/chat/completions", api_base=str(tmp_path / "local.db"))


# --- results ---------------------------------------------------------------------------------------------

RESULTS = [Row(row["id"], Outcome.SUCCEEDED, Body({}), None, 200) for row in ROWS]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [RESULTS[:1], RESULTS[1:]],
        lambda: (iter(part) for part in (RESULTS[:1], RESULTS[1:])),
        lambda: [BatchResult(RESULTS[:1]), BatchResult(RESULTS[1:])],
    ],
)
def test_results_of_several_batches(make: Callable[[], Any]) -> None:
    assert [row["outcome"] for row in join_results(ROWS, make(), id_column="id")] == ["succeeded"] * 3


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (FRAME, "an iterable of anybatch.Row, not DataFrame"),
        ({"a": RESULTS[0]}, "an iterable of anybatch.Row, not dict"),
        (None, "an iterable of anybatch.Row, not NoneType"),
        (RESULTS[0], "an iterable of anybatch.Row, not Row; put one row into a list"),
        ([LINES[0]], "result 1 is dict, not an anybatch.Row"),
        (ROWS, "result 1 is dict, not an anybatch.Row"),
        ([FRAME], "result 1 is DataFrame, not an anybatch.Row"),
        ([*RESULTS[:1], Fruit("a", "x")], "result 2 is Fruit, not an anybatch.Row"),
    ],
)
def test_what_are_no_results(results: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        list(join_results(ROWS, results, id_column="id"))


def test_shapes_never_need_their_packages() -> None:
    """What is a frame is told by its type's attributes: an import would make it a dependency."""
    source = Path(__file__).parent.parent / "core" / "anybatch" / "rows" / "shapes.py"
    imported = set(re.findall(r"^(?:import|from) (\w+)", source.read_text(), re.MULTILINE))
    assert imported == {"__future__", "collections", "dataclasses", "inspect", "itertools", "typing"}


def test_a_mapping_is_a_row_whatever_its_class() -> None:
    class Lookup(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return ROWS[0][name]

        def __iter__(self) -> Iterator[str]:
            return iter(ROWS[0])

        def __len__(self) -> int:
            return len(ROWS[0])

    assert list(read_rows([Lookup()])) == ROWS[:1]
