"""Tables to request lines, and results back to tables."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sqlite3
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from anybatch.errors import ConfigurationError, InputError
from anybatch.models import BatchResult, Body, Outcome, Report, Row, RowError
from anybatch.rows.results import landed_line
from anybatch.rows.tables import build_requests, join_results, read_rows, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"id": "a", "name": "Ann", "age": 31},
    {"id": "b", "name": "Bob", "age": 7},
    {"id": "c", "name": "Cid", "age": None},
]


def bodies(table: Any, prompt: Any, **arguments: Any) -> list[dict[str, Any]]:
    return [line["body"] for line in build_requests(table, prompt, **{"model": "m", **arguments})]


def texts(table: Any, prompt: Any) -> list[str]:
    return [body["messages"][0]["content"] for body in bodies(table, prompt)]


def chat(text: str | None, **message: Any) -> Body:
    return Body({"choices": [{"message": {"content": text, **message}}]})


def good(custom_id: str, text: str | None = None) -> Row:
    return Row(custom_id, Outcome.SUCCEEDED, chat(text or f"about {custom_id}"), None, 200)


# --- reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", 'id,text\n1,"a,\nb"\n2,ü\n', [{"id": "1", "text": "a,\nb"}, {"id": "2", "text": "ü"}]),
        ("t.CSV", "\ufeffid,text\r\n1,\r\n\r\n2,x", [{"id": "1", "text": ""}, {"id": "2", "text": "x"}]),
        ("t.csv", "id\n", []),
        ("t.csv", f"id\n{'x' * 200_000}\n", [{"id": "x" * 200_000}]),
        ("t.tsv", "id\ttext\n1\ta,b\n", [{"id": "1", "text": "a,b"}]),
        (
            "t.jsonl",
            '\ufeff{"id":1,"t":"a\u2028b"}\n\n{"id":2,"t":null}',
            [{"id": 1, "t": "a\u2028b"}, {"id": 2, "t": None}],
        ),
        ("t.ndjson", '{"id":NaN}\n', [{"id": None}]),
    ],
)
def test_files(tmp_path: Path, name: str, content: str, expected: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    for table in (path, str(path), UPath(path)):
        assert list(read_rows(table)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "no header line"),
        ("t.csv", b"a,b,a\n", "more than one column is named 'a'"),
        ("t.csv", b"a,b\n1,2\n3\n", "row 2: has 1 cells, but the header has 2"),
        ("t.csv", b"a,b\n1,2\n3,4,5\n", "row 2: has 3 cells, but the header has 2"),
        ("t.csv", b'a,b\n1,2\n3,"4\n5,6\n', "row 2: is not CSV near line 4: unexpected end of data"),
        ("t.csv", b"a,b\n1,2\n3,\xff\n", "line 3: is not UTF-8: byte 0xff at column 3"),
        ("t.jsonl", b'{"a":1}\n{"a":\n', "line 2: is not JSON"),
        (
            "t.jsonl",
            b"[1]\n",
            "line 1: is not a JSON object but list of int; each line must hold one object",
        ),
        ("t.txt", b"", "is none of .csv, .tsv, .jsonl, .ndjson, .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        list(read_rows(path))


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, wrong in (
        ("missing.csv", "there is no such file"),
        ("folder.csv", "is a folder; pass its files"),
    ):
        with pytest.raises(InputError, match=f"{name}: 1 problem.*\n.*{wrong}"):
            list(read_rows(tmp_path / name))


def test_remote_file() -> None:
    path = UPath("memory://tables/t.csv")
    path.write_text("id,text\n1,a\n")
    assert list(read_rows(path)) == list(read_rows("memory://tables/t.csv")) == [{"id": "1", "text": "a"}]


@pytest.mark.parametrize("table", [{"id": [1, 2]}, 7, None])
def test_what_is_no_table(table: Any) -> None:
    with pytest.raises(ConfigurationError, match="a table must be a path, a frame or an iterable of rows"):
        list(read_rows(table))


def test_rows_that_are_no_rows() -> None:
    with pytest.raises(InputError, match="row 2: is not a mapping of columns but tuple"):
        list(read_rows([{"a": 1}, ("b", 2)]))  # type: ignore[list-item]


def test_database_cursor() -> None:
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    cursor: Any = database.execute("SELECT 'a' AS id, 1.5 AS price")
    assert list(read_rows(cursor)) == [{"id": "a", "price": 1.5}]
    database.close()


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "the id": [1, 2],
            "score": [0.5, float("nan")],
            "small": pandas.Series([1, 2], dtype="int8"),
            "maybe": pandas.Series([None, True], dtype="boolean"),
            "day": pandas.to_datetime(["2026-01-02", None]),
            "text": ["ü", None],
            "vector": [[1, 2], None],
        }
    )
    first, second = read_rows(frame)
    assert first == {
        "the id": 1, "score": 0.5, "small": 1, "maybe": None, "day": pandas.Timestamp("2026-01-02"),
        "text": "ü", "vector": [1, 2],
    }  # fmt: skip
    assert second == {
        "the id": 2, "score": None, "small": 2, "maybe": True, "day": None, "text": None, "vector": None,
    }  # fmt: skip
    assert [type(first[name]) for name in ("the id", "score", "small")] == [int, float, int]
    assert texts(frame, "{the id}: {score:.1f} {day:%d %b}") == ["1: 0.5 02 Jan", "2:  "]
    with pytest.raises(InputError, match="more than one column is named 'x'"):
        list(read_rows(pandas.DataFrame([[1, 2]], columns=["x", "x"])))


def test_numpy_cells() -> None:
    numpy = pytest.importorskip("numpy")
    row = {"a": numpy.float32(0.5), "b": numpy.float32("nan"), "c": numpy.array([1, 2]), "d": numpy.str_("x")}
    (read,) = read_rows([row])
    assert read == {"a": 0.5, "b": None, "c": [1, 2], "d": "x"}
    assert [type(read[name]) for name in ("a", "d")] == [float, str]
    json.dumps(read)


def test_polars() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"id": ["a", "b"], "score": [0.5, float("nan")], "text": ["ü", None]})
    assert list(read_rows(frame)) == [
        {"id": "a", "score": 0.5, "text": "ü"},
        {"id": "b", "score": None, "text": None},
    ]


def test_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = [{"id": number, "text": f"t{number}"} for number in range(3000)]
    table = pyarrow.Table.from_pylist(expected)
    parquet.write_table(table, tmp_path / "t.parquet")
    reader = pyarrow.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=7))
    for source in (table, table.to_batches()[0], reader, iter(table.to_batches()), tmp_path / "t.parquet"):
        assert list(read_rows(source)) == expected


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(ConfigurationError, match="needs pyarrow: pip install pyarrow"):
        list(read_rows(tmp_path / "t.parquet"))


# --- table to requests -----------------------------------------------------------------------------------


def test_request_lines() -> None:
    lines = build_requests(
        ROWS[:1], "Who is {name}?", model="m", id_column="id", system="Be brief.", max_tokens=9
    )
    assert list(lines) == [
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "max_tokens": 9,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Who is Ann?"},
                ],
            },
        }
    ]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{name} is {age}", "Ann is 31"),
        ("no column", "no column"),
        ("{{{name}}} {{}}", "{Ann} {}"),
        ("{age:05d}|{name!r:>7}", "00031|  'Ann'"),
        ("{none}|{none:.2f}", "|"),
        ("{a.b} {a[0]} {0}", "dotted indexed positional"),
    ],
)
def test_template(template: str, text: str) -> None:
    row = {"name": "Ann", "age": 31, "none": None, "a.b": "dotted", "a[0]": "indexed", "0": "positional"}
    assert texts([row], template) == [text]


@pytest.mark.parametrize("template", ["{", "}", "{name", "{}", '{"json": 1} {', "{name:{age}}", "{name!x:"])
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"prompt template: .*write \{\{ and \}\} for literal braces"
    ):
        build_requests(ROWS, template, model="m")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{nmae}", "row 1, column 'nmae': there is no such column; there are 'id', 'name', 'age'"),
        ("{name.__class__}", "row 1, column 'name.__class__': there is no such column"),
        ("{name[0]}", "row 1, column 'name[0]': there is no such column"),
        ("{name:.2f}", "row 1, column 'name': 'Ann' cannot be formatted by '.2f'"),
    ],
)
def test_templates_that_do_not_fit(template: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        texts(ROWS, template)


def test_a_row_that_lacks_a_column() -> None:
    with pytest.raises(InputError, match="row 2, column 'name'"):
        texts([{"name": "Ann"}, {"nom": "Bob"}], "{name}")


USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "S"}
DEVELOPER = {"role": "developer", "content": "D"}


@pytest.mark.parametrize(
    ("endpoint", "given", "system", "expected"),
    [
        ("/v1/chat/completions", "Hi", None, {"messages": [USER]}),
        ("/v4/chat/completions", "Hi", "S", {"messages": [SYSTEM, USER]}),
        ("/v1/chat/completions", [USER], "S", {"messages": [SYSTEM, USER]}),
        ("/v1/chat/completions", [DEVELOPER, USER], "S", {"messages": [DEVELOPER, USER]}),
        ("/v1/chat/completions", {"messages": [USER], "n": 2}, "S", {"messages": [SYSTEM, USER], "n": 2}),
        ("/chat/completions", {"messages": [USER], "model": "x"}, None, {"messages": [USER], "model": "x"}),
        ("/v1/responses", "Hi", "S", {"instructions": "S", "input": "Hi"}),
        ("/v1/responses", [USER], None, {"input": [USER]}),
        ("/v1/responses", {"input": "Hi", "instructions": "D"}, "S", {"instructions": "D", "input": "Hi"}),
        ("/v1/embeddings", "Hi", None, {"input": "Hi"}),
        ("/v1/embeddings", ["Hi", "Ho"], None, {"input": ["Hi", "Ho"]}),
        ("/v1/moderations", "Hi", None, {"input": "Hi"}),
        ("/v1/completions", "Hi", None, {"prompt": "Hi"}),
        ("/v1/messages", "Hi", "S", {"max_tokens": 5, "system": "S", "messages": [USER]}),
        ("/v1/ocr", {"document": "d"}, None, {"document": "d"}),
    ],
)  # fmt: skip
def test_shapes(endpoint: str, given: Any, system: str | None, expected: dict[str, Any]) -> None:
    limit: dict[str, Any] = {"max_tokens": 5} if endpoint == "/v1/messages" else {}
    (line,) = build_requests([{}], lambda _: given, model="m", endpoint=endpoint, system=system, **limit)
    assert line["url"] == endpoint
    assert line["body"] == {"model": "m", **expected}


def test_a_function_does_not_get_its_objects_changed() -> None:
    given = {"messages": [USER]}
    bodies(ROWS, lambda _: given, system="S")
    assert given == {"messages": [USER]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 7}, "must be a template or a function, not int"),
        ({"endpoint": "/v1/embeddings", "system": "S"}, "requests to /v1/embeddings have no system prompt"),
        ({"endpoint": "/v1/ocr"}, "where text goes in requests to /v1/ocr"),
    ],
)
def test_arguments_that_cannot_be_right(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_requests(ROWS, **{"prompt": "{name}", "model": "m", **arguments})


@pytest.mark.parametrize(
    ("given", "endpoint", "message"),
    [
        (None, "/v1/messages", "row 1: the prompt function returned NoneType, not text, a list or a dict"),
        (7, "/v1/embeddings", "row 1: the prompt function returned int, not text, a list or a dict"),
        ("Hi", "/v1/ocr", "row 1: the prompt function returned str, not a dict"),
        ({"temperature": 0}, "/v1/chat/completions", "row 1: the body needs messages"),
        ("Hi", "/v1/messages", "row 1: the body needs max_tokens"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(given: Any, endpoint: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        bodies([{}], lambda _: given, endpoint=endpoint)


SOME_ID = uuid.UUID(int=5)


@pytest.mark.parametrize(
    ("id", "row", "expected"),
    [
        (None, {}, "row-1"),
        ("k", {"k": "x"}, "x"),
        ("k", {"k": 7}, "7"),
        ("k", {"k": SOME_ID}, str(SOME_ID)),
        (lambda row: f"{row['k']}/x", {"k": 7}, "7/x"),
    ],
)
def test_ids(id: Any, row: dict[str, Any], expected: str) -> None:
    (line,) = build_requests([row], "Hi", model="m", id_column=id)
    assert line["custom_id"] == expected


@pytest.mark.parametrize("value", ["", None, 1.0, True, ["x"], float("nan")])
def test_ids_that_are_none(value: Any) -> None:
    table = [{"k": "x"}, {"k": value}]
    with pytest.raises(InputError, match="row 2, column 'k': a custom_id must be a non-empty text, not"):
        list(build_requests(table, "Hi", model="m", id_column="k"))
    with pytest.raises(InputError, match="row 2: a custom_id must be a non-empty text"):
        list(build_requests(table, "Hi", model="m", id_column=lambda row: row["k"]))


def test_no_such_id_column() -> None:
    with pytest.raises(
        InputError, match="row 1, column 'key': there is no such column; there are 'id', 'name', 'age'"
    ):
        list(build_requests(ROWS, "Hi", model="m", id_column="key"))


def test_the_old_name_of_the_id_column_is_refused() -> None:
    """`**body` would take it, and send it to the model in every request."""
    with pytest.raises(ConfigurationError, match="use `id_column` instead of `id`"):
        build_requests(ROWS, "Hi", model="m", id="id")
    with pytest.raises(TypeError, match="'id'"):
        join_results(ROWS, [], id="id")  # type: ignore[call-arg]


def test_requests_are_made_one_by_one() -> None:
    endless = ({"n": n} for n in itertools.count())
    lines = build_requests(endless, "{n}", model="m")
    assert [line["custom_id"] for line in itertools.islice(lines, 3)] == ["row-1", "row-2", "row-3"]


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    with path.open("w") as file:
        file.write("id,text\n")
        file.writelines(f"{n},{'x' * 2000}\n" for n in range(5000))
    tracemalloc.start()
    written = write_jsonl(tmp_path / "out.jsonl", build_requests(path, "{text}", model="m", id_column="id"))
    joined = join_results(path, (good(str(n)) for n in reversed(range(5000))), id_column="id")
    matched = sum(row["outcome"] == "succeeded" for row in joined)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written == matched == 5000
    assert path.stat().st_size > 10_000_000
    assert peak < 6_000_000  # a block of the file is 1 MB


# --- writing ---------------------------------------------------------------------------------------------


def test_write_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "new" / "in.jsonl"
    assert write_jsonl(path, build_requests(ROWS, "Wer ist {name}?\u2028", model="m")) == 3
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0])["body"]["messages"][0]["content"] == "Wer ist Ann?\u2028"
    assert (len(lines), lines[-1]) == (4, b"")
    assert write_jsonl(str(path), []) == 0
    assert path.read_bytes() == b""
    assert [file.name for file in path.parent.iterdir()] == ["in.jsonl"]


def test_write_jsonl_to_a_remote_file() -> None:
    for count in (3, 1):
        assert write_jsonl("memory://out/in.jsonl", build_requests(ROWS[:count], "Hi", model="m")) == count
    assert UPath("memory://out/in.jsonl").read_bytes().count(b"\n") == 1
    assert [file.name for file in UPath("memory://out").iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\ud800"])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("old")
    with pytest.raises(InputError, match="line 2: cannot be written as JSON"):
        write_jsonl(path, [{"a": 1}, {"a": value}])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# --- results to table ------------------------------------------------------------------------------------

RESULTS = [
    good("a"),
    Row("b", Outcome.FAILED, None, RowError("bad_request", "Too long."), 400),
    Row("c", Outcome.EXPIRED, None, RowError(None, "Too late.")),
]
JOINED = [
    {**ROWS[0], "outcome": "succeeded", "content": "about a", "error": None},
    {**ROWS[1], "outcome": "failed", "content": None, "error": "bad_request: Too long."},
    {**ROWS[2], "outcome": "expired", "content": None, "error": "Too late."},
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_join_in_any_order(order: tuple[int, ...]) -> None:
    assert list(join_results(ROWS, [RESULTS[n] for n in order], id_column="id")) == JOINED


def test_join_landed_results(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(landed_line(row) for row in RESULTS))
    report = Report(
        job="j", provider="local", endpoint="e", rows=3, counts={}, started_at=0, finished_at=0, duration_s=0,
        results=str(path),
    )  # fmt: skip
    results: list[Any] = [path, str(path), tmp_path, UPath(tmp_path), report, BatchResult(RESULTS)]
    for source in results:
        assert list(join_results(ROWS, source, id_column="id")) == JOINED


def test_join_results_that_have_not_landed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"results\.jsonl: .*it appears once the job has landed"):
        list(join_results(ROWS, tmp_path, id_column="id"))


@pytest.mark.parametrize(
    ("results", "outcomes"),
    [
        ([], ["missing", "missing", "missing"]),
        (["a"], ["succeeded", "missing", "missing"]),
        (["c"], ["missing", "missing", "succeeded"]),
        (["a", "c"], ["succeeded", "missing", "succeeded"]),
        (["b", "zzz"], ["missing", "succeeded", "missing"]),
        (["a", "a", "b", "", "c"], ["succeeded", "succeeded", "succeeded"]),
    ],
)
def test_every_row_comes_out_once(results: list[str], outcomes: list[str]) -> None:
    joined = list(join_results(ROWS, [good(custom_id) for custom_id in results], id_column="id"))
    assert [row["id"] for row in joined] == ["a", "b", "c"]
    assert [row["outcome"] for row in joined] == outcomes
    assert {row["error"] for row in joined if row["outcome"] == "missing"} <= {
        "there is no result for this row"
    }


def test_join_by_row_number_as_built() -> None:
    ids = [line["custom_id"] for line in build_requests(ROWS, "{name}", model="m")]
    joined = join_results(ROWS, [good(custom_id) for custom_id in reversed(ids)])
    assert [row["content"] for row in joined] == ["about row-1", "about row-2", "about row-3"]


@pytest.mark.parametrize(("table", "id"), [(ROWS, None), ([], "id"), (iter(()), "id")])
def test_the_wrong_table(table: Any, id: str | None) -> None:
    for results in (RESULTS, RESULTS[::-1]):
        with pytest.raises(ConfigurationError, match="none of the results belongs to a row of this table"):
            list(join_results(table, results, id_column=id))


def test_join_is_lazy() -> None:
    endless = ({"id": str(n)} for n in itertools.count())
    joined = join_results(endless, (good(str(n)) for n in itertools.count()), id_column="id")
    assert next(joined)["content"] == "about 0"
    assert next(joined)["content"] == "about 1"


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (chat("Hi"), "Hi"),
        (chat(None), None),
        ({"choices": [{"text": "Hi"}]}, "Hi"),
        (
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
                    {"type": "message", "content": [{"type": "output_text", "text": "H"}]},
                    {"type": "message", "content": [{"type": "output_text", "text": "i"}]},
                ],
            },
            "Hi",
        ),
        ({"object": "response", "output": []}, None),
        ({"data": [{"embedding": [0.5, 1]}]}, [0.5, 1]),
        ({"data": [{"embedding": [1]}, {"embedding": [2]}]}, [[1], [2]]),
        (
            {
                "type": "message",
                "content": [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "Hi"}],
            },
            "Hi",
        ),
        ({"pages": [1]}, {"pages": [1]}),
    ],
)
def test_content(body: dict[str, Any], content: Any) -> None:
    rows = [Row("a", Outcome.SUCCEEDED, Body(body), None, 200), good("b")]
    for results in (rows, rows[::-1]):
        first, _ = join_results(ROWS[:2], results, id_column="id")
        assert (first["content"], first["error"]) == (content, None)


@pytest.mark.parametrize(
    "body",
    [
        chat(None, refusal="No."),
        {
            "object": "response",
            "output": [{"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}],
        },
    ],
)
def test_refusal(body: dict[str, Any]) -> None:
    results = [Row("a", Outcome.SUCCEEDED, Body(body), None, 200)]
    (row,) = join_results(ROWS[:1], results, id_column="id", parse="json")
    assert (row["outcome"], row["content"], row["error"]) == ("succeeded", None, "the model refused: No.")


def test_parse_json() -> None:
    answers = ['{"mood": "good", "n": [1]}', "{", '["x"]']
    results = [good(row["id"], answer) for row, answer in zip(ROWS, answers, strict=True)]
    first, second, third = join_results(ROWS, results, id_column="id", parse="json", prefix="llm_")
    assert first == {
        **ROWS[0], "llm_outcome": "succeeded", "llm_content": answers[0], "llm_error": None,
        "llm_mood": "good", "llm_n": [1],
    }  # fmt: skip
    assert second["llm_outcome"] == third["llm_outcome"] == "succeeded"
    assert second["llm_error"].startswith("content is not JSON: ")
    assert third["llm_error"] == "content is not JSON: the result is list, not an object"


def test_parse_with_a_function() -> None:
    def parse(content: str) -> dict[str, Any]:
        return {"word": content.split()[1], "first": {"about a": 1}[content]}

    first, second, _ = join_results(ROWS, [good("a"), good("b"), RESULTS[2]], id_column="id", parse=parse)
    assert (first["word"], first["first"], first["error"]) == ("a", 1, None)
    assert second["error"] == "content could not be parsed: KeyError: 'about b'"
    assert "word" not in second


@pytest.mark.parametrize(
    ("row", "answer", "prefix", "clash"),
    [
        ({"content": "x"}, "{}", "", "'content'"),
        ({"llm_error": "x", "llm_outcome": "y"}, "{}", "llm_", "'llm_error', 'llm_outcome'"),
        ({"mood": "x"}, '{"mood": 1}', "", "'mood'"),
        ({}, '{"error": 1}', "llm_", "'llm_error'"),
    ],
)
def test_no_column_is_overwritten(row: dict[str, Any], answer: str, prefix: str, clash: str) -> None:
    joined = join_results(
        [{"id": "a", **row}], [good("a", answer)], id_column="id", parse="json", prefix=prefix
    )
    with pytest.raises(
        ConfigurationError, match=f"row 1 would get a second column {clash}: pass another prefix"
    ):
        list(joined)


def test_parse_must_be_known() -> None:
    with pytest.raises(ConfigurationError, match="parse: must be 'json' or a function, not 'yaml'"):
        join_results(ROWS, RESULTS, parse="yaml")  # type: ignore[arg-type]


# --- the example's table ---------------------------------------------------------------------------------


def test_the_examples_table() -> None:
    path = Path(__file__).parent.parent / "examples" / "data" / "api_operations.csv"
    rows = list(read_rows(path))
    assert len(rows) == len({row["operation_id"] for row in rows}) == 2400
    assert list(rows[0]) == ["operation_id", "service", "operation", "description"]
    assert all(row[name] for row in rows for name in row)
    assert max(len(row["description"]) for row in rows) <= 400
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
