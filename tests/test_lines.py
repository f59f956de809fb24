"""Reading, validating and splitting request lines."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from anybatch.errors import ConfigurationError, InputError, JobError, Problem
from anybatch.providers import get_provider
from anybatch.providers.base import Limits, Provider
from anybatch.providers.codec import OpenAICodec
from anybatch.providers.content import Content, file_stamp
from anybatch.rows.planning import Plan, make_plan
from anybatch.rows.requests import MAX_PROBLEMS, iter_lines

CHAT = "/v1/chat/completions"


def line(custom_id: str = "a", model: str = "m", **changes: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


def jsonl(*lines: object) -> bytes:
    return b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines)


def provider(name: str = "openai", **changes: Any) -> Provider:
    found = get_provider(name, api_key="k", api_base="http://127.0.0.1:9")
    for attribute, value in changes.items():
        setattr(found, attribute, value)
    return found


def plan(
    data: bytes, tmp_path: Path, at: Provider | None = None, *, endpoint: str = CHAT, **options: Any
) -> Plan:
    at = at or provider()
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    spooled = tmp_path / "spool.jsonl"
    as_it_is = at.codec.verbatim and options.get("model") is None
    content = source if as_it_is else spooled
    with source.open("rb") as file, spooled.open("wb") as spool, (tmp_path / "ids.jsonl").open("wb") as ids:
        return make_plan(
            file,
            "in.jsonl",
            at,
            endpoint,
            content=content,
            ids=ids,
            spool=None if as_it_is else spool,
            **options,
        )


def uploaded(made: Plan) -> list[bytes]:
    contents = []
    for shard in made.shards:
        with made.shard_content(shard).open() as file:
            contents.append(file.read())
    return contents


def problems(data: bytes, tmp_path: Path, at: Provider | None = None, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(InputError) as caught:
        plan(data, tmp_path, at, **options)
    return caught.value.problems


def test_lines_are_cut_at_the_newline_byte_alone() -> None:
    records = ["a\u2028b", "c\x85d", "e\x0bf\x1cg", "", "last"]
    data = "\n".join(records).encode()
    read = list(iter_lines(io.BytesIO(data)))
    assert [raw.rstrip(b"\n").decode() for _, raw in read] == records
    assert all(data[offset : offset + len(raw)] == raw for offset, raw in read)


@pytest.mark.parametrize(
    ("data", "number", "field", "text"),
    [
        (jsonl(line()) + b'{"custom_id":"b\xff"}\n', 2, None, "not UTF-8: byte 0xff at column 16"),
        (b"\xef\xbb\xbf" + jsonl(line()), 1, None, "UTF-8 byte order mark"),
        (json.dumps(line()).encode("utf-16"), 1, None, "UTF-16 byte order mark"),
        (jsonl(*[line(str(n)) for n in range(6)]) + b'{"custom_id":"x",\n', 7, None, "not JSON"),
        (jsonl([1]), 1, None, "not a JSON object but list"),
        (jsonl(line("a"), line("b"), line("a")), 3, "custom_id", "'a' was used before, in line 1"),
        (jsonl(line(custom_id=5)), 1, "custom_id", "must be a non-empty string"),
        (jsonl(line(custom_id="")), 1, "custom_id", "must be a non-empty string"),
        (jsonl(line(method="GET")), 1, "method", "must be 'POST', not 'GET'"),
        (jsonl(line(url="/v1/embeddings")), 1, "url", "the batch's endpoint is '/v1/chat/completions'"),
        (jsonl({"custom_id": "a", "body": {"model": "m"}}), 1, "method", "must be 'POST', not None"),
        (jsonl(line(body="x")), 1, "body", "must be a JSON object"),
        (jsonl(line(body={"messages": []})), 1, "body.model", "must name the model"),
        (jsonl(line(body={"model": "m", "stream": True})), 1, "body.stream", "cannot stream"),
        (jsonl(line(params={})), 1, "params", "unknown member"),
        (jsonl(line("a", "m1"), line("b", "m2")), 2, "body.model", "line 1 has 'm1'"),
        (b"", None, None, "holds no request"),
        (b"\n\n \n", None, None, "holds no request"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","n":NaN}}\n',
         1, None, "not JSON"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(
    data: bytes, number: int | None, field: str | None, text: str, tmp_path: Path
) -> None:
    found = problems(data, tmp_path)
    assert (found[0].line, found[0].field) == (number, field)
    assert text in found[0].message


def test_all_problems_are_told_up_to_a_cap(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan(jsonl(*[line(str(n), method="PUT") for n in range(MAX_PROBLEMS + 5)]), tmp_path)
    assert len(caught.value.problems) == MAX_PROBLEMS
    assert caught.value.more == 5
    assert "in.jsonl: 25 problems (nothing was sent)" in str(caught.value)
    assert "line 3, method: must be 'POST', not 'PUT'" in str(caught.value)
    assert "and 5 more" in str(caught.value)


def test_mixed_models_are_fine_where_the_provider_takes_them(tmp_path: Path) -> None:
    made = plan(jsonl(line("a", "m1"), line("b", "m2")), tmp_path, provider("parasail"))
    assert made.models == ("m1", "m2")


@pytest.mark.parametrize(
    ("second", "text"), [("m2", "mistral runs one model per batch"), (None, "must name")]
)
def test_mistral_takes_one_model_a_job(second: str | None, text: str, tmp_path: Path) -> None:
    found = problems(jsonl(line("a", "m1"), line("b", second)), tmp_path, provider("mistral"))  # type: ignore[arg-type]
    assert found[0].line == 2
    assert found[0].field == "body.model"
    assert text in found[0].message


def test_a_job_model_serves_the_lines_that_name_none(tmp_path: Path) -> None:
    bare = line("a")
    del bare["body"]["model"]
    assert plan(jsonl(bare), tmp_path, provider("mistral"), model="m1").models == ("m1",)
    found = problems(jsonl(line("a", "other")), tmp_path, provider("mistral"), model="m1")
    assert "the job's model is 'm1'" in found[0].message


def test_untranslatable_parameters_name_line_and_parameter(tmp_path: Path) -> None:
    bad = line("b")
    bad["body"]["logit_bias"] = {"50256": -100}
    data = jsonl(line("a"), bad)
    found = problems(data, tmp_path, provider("anthropic"))
    assert (found[0].line, found[0].field) == (2, "body.logit_bias")
    assert plan(data, tmp_path, provider("anthropic"), drop_untranslatable=True).rows == 2


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        (Limits(requests=3), [3, 3, 1]),
        (Limits(requests=7), [7]),
        (Limits(bytes=2 * len(jsonl(line("1")))), [2, 2, 2, 1]),
    ],
)
def test_shards_keep_within_the_limits_and_lose_nothing(
    limits: Limits, rows: list[int], tmp_path: Path
) -> None:
    data = jsonl(*[line(str(n)) for n in range(7)])
    made = plan(data, tmp_path, provider(limits=limits))
    assert [shard.rows for shard in made.shards] == rows
    assert [shard.first_row for shard in made.shards] == [sum(rows[:n]) for n in range(len(rows))]
    assert b"".join(uploaded(made)) == data
    assert all(len(part) <= limits.bytes for part in uploaded(made))
    assert (tmp_path / "ids.jsonl").read_text().split() == [f'"{n}"' for n in range(7)]


def test_a_line_that_fits_no_batch_is_an_error(tmp_path: Path) -> None:
    found = problems(jsonl(line("a")), tmp_path, provider(limits=Limits(bytes=50)))
    assert "a whole batch at openai holds 50" in found[0].message


def test_blank_lines_and_a_missing_last_newline_do_not_matter(tmp_path: Path) -> None:
    first, second, third = jsonl(line("1")), jsonl(line("2")), jsonl(line("3")).rstrip(b"\n")
    made = plan(first + b"\n\r\n" + second + b"\n" + third, tmp_path)
    assert uploaded(made) == [first + second + third]
    assert made.rows == 3


def test_lines_keep_their_numbers_behind_blank_ones(tmp_path: Path) -> None:
    assert problems(jsonl(line("1")) + b"\n\n" + jsonl([]), tmp_path)[0].line == 4


def test_bytes_are_uploaded_as_they_are(tmp_path: Path) -> None:
    odd = (
        b'{ "custom_id" :"\\u00e9\xe2\x80\xa8","method":"POST","url":"%s", "body":{"model":"m"}}\r\n'
        % CHAT.encode()
    )
    assert uploaded(plan(odd, tmp_path)) == [odd]
    assert json.loads((tmp_path / "ids.jsonl").read_text()) == "é\u2028"


@pytest.mark.parametrize(
    ("name", "endpoint", "where"),
    [
        ("openai", CHAT, "body"),
        ("novita", CHAT, "body"),
        ("mistral", CHAT, "body"),
        ("anthropic", CHAT, "params"),
        ("anthropic", "/v1/messages", "params"),
    ],
)
def test_the_job_s_model_goes_into_lines_that_name_none(
    tmp_path: Path, name: str, endpoint: str, where: str
) -> None:
    bare = line("1", url=endpoint)
    del bare["body"]["model"]
    bare["body"]["max_tokens"] = 10**30  # as large as it is
    named = line("2", model="m-1", url=endpoint)
    made = plan(jsonl(bare, named), tmp_path, provider(name), endpoint=endpoint, model="m-1")
    sent = [json.loads(each) for each in b"".join(uploaded(made)).splitlines()]
    assert [each[where]["model"] for each in sent] == ["m-1", "m-1"]
    assert sent[0][where]["max_tokens"] == 10**30
    assert made.models == ("m-1",)


def test_lines_that_name_their_model_are_uploaded_as_they_are(tmp_path: Path) -> None:
    odd = b'{ "custom_id":"1","method":"POST","url":"%s", "body":{"model":"m"}}\r\n' % CHAT.encode()
    assert uploaded(plan(odd, tmp_path, model="m")) == [odd]


@pytest.mark.parametrize("gap", [b"", b"\n", b"\n\n\n"])
def test_an_upload_is_read_in_pieces_of_any_size(tmp_path: Path, gap: bytes) -> None:
    lines = [jsonl(line("i" * number)) for number in range(1, 40)]
    made = plan(gap.join(lines), tmp_path)
    whole = b"".join(lines)
    with made.shard_content(made.shards[0]).open() as file:
        assert file.seek(0, io.SEEK_END) == len(whole)
        for size in (1, 7, 300, 65_536):
            file.seek(0)
            pieces = list(iter(lambda size=size: file.read(size), b""))  # type: ignore[misc]
            assert b"".join(pieces) == whole
            assert {len(piece) for piece in pieces[:-1]} <= {size}
        for at in (0, len(lines[0]) - 1, len(lines[0]), len(whole) // 2, len(whole) - 1, len(whole)):
            assert file.seek(at) == file.tell() == at
            assert file.read(500) == whole[at : at + 500]


def test_many_blank_lines_cost_little(tmp_path: Path) -> None:
    """Every line is then a segment of its own, which must not be searched for from the first one on."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"x\n\n" * 20_000)
    segments = tuple((number * 3, number * 3 + 2) for number in range(20_000))
    content = Content(source, segments, 20_000, file_stamp(source))
    began = time.process_time()
    with content.open() as file:
        assert file.read(40_000) == b"x\n" * 20_000
        assert all(file.seek(at) == at and file.read(2) == b"x\n" for at in range(0, 40_000, 4))
    assert time.process_time() - began < 2, "it takes 0.1 s, and took half a minute"


def test_an_input_that_changes_after_validation_is_not_uploaded(tmp_path: Path) -> None:
    made = plan(jsonl(line("1")), tmp_path)
    (tmp_path / "in.jsonl").write_bytes(jsonl(line("2"), line("3")))
    with pytest.raises(JobError, match="changed after it was validated"):
        made.shard_content(made.shards[0]).open()


def test_many_ids_are_compared_across_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybatch.rows.requests.SeenIds._BATCH", 4)
    data = jsonl(*[line(str(n)) for n in range(30)], line("3"), line("29"))
    assert [(p.line, p.message) for p in problems(data, tmp_path)] == [
        (31, "'3' was used before, in line 4"),
        (32, "'29' was used before, in line 30"),
    ]


# --- batches that must hold some requests -----------------------------------------------------------------


def numbered(count: int) -> bytes:
    return jsonl(*[line(f"r{number}") for number in range(count)])


@pytest.mark.parametrize(
    ("rows", "limits", "given", "sizes"),
    [
        (10, Limits(requests=4, min_requests=3), None, [4, 3, 3]),
        (9, Limits(requests=4, min_requests=3), None, None),  # only the last two are balanced
        (8, Limits(requests=4, min_requests=4), None, [4, 4]),
        (7, Limits(requests=5, min_requests=3), None, [4, 3]),
        (7, Limits(requests=9, min_requests=3), 6, [4, 3]),
        (3, Limits(requests=9, min_requests=3), None, [3]),
    ],
)
@pytest.mark.parametrize("model", [None, "given"])
def test_the_last_batch_is_not_too_short(
    tmp_path: Path, rows: int, limits: Limits, given: int | None, sizes: list[int] | None, model: str | None
) -> None:
    at = provider(limits=limits)
    data = numbered(rows).replace(b'"model": "m", ', b"") if model else numbered(rows)
    if sizes is None:
        [problem] = problems(data, tmp_path, at, model=model)
        assert (
            "a batch of 1 requests, from request 9 on; a batch at openai needs at least 3" in problem.message
        )
        return
    blank = data.replace(b"\n", b"\n\n")  # its batches are of many segments
    for text in (data, blank):
        made = plan(text, tmp_path, at, shard_requests=given, model=model)
        assert [shard.rows for shard in made.shards] == sizes
        assert [shard.first_row for shard in made.shards] == [sum(sizes[:n]) for n in range(len(sizes))]
        sent = uploaded(made)
        assert [len(one) for one in sent] == [shard.size for shard in made.shards]
        ids = [[json.loads(raw)["custom_id"] for raw in one.split(b"\n") if raw] for one in sent]
        assert [len(one) for one in ids] == sizes
        assert [one for batch in ids for one in batch] == [f"r{number}" for number in range(rows)]


def test_too_few_for_a_batch(tmp_path: Path) -> None:
    at = provider(limits=Limits(min_requests=3))
    [problem] = problems(numbered(2), tmp_path, at)
    assert problem == Problem(None, None, "holds 2 requests; a batch at openai needs at least 3")
    [problem] = problems(numbered(2) + b"{", tmp_path, at)
    assert problem.line == 3, "what is wrong with lines comes first: they may be enough once they are mended"
    with pytest.raises(
        ConfigurationError, match="shard_requests: a batch at openai needs at least 3 requests"
    ):
        plan(numbered(9), tmp_path, at, shard_requests=2)


def test_what_is_too_large_does_not_move(tmp_path: Path) -> None:
    size = len(jsonl(line("r0")))
    at = provider(limits=Limits(min_requests=2, bytes=3 * size))
    large = line("r3")
    large["body"]["messages"][0]["content"] = "x" * 2 * size
    [problem] = problems(numbered(3) + jsonl(large), tmp_path, at)
    assert "a batch of 1 requests, from request 4 on" in problem.message


def test_a_batch_that_was_filled_up_is_checked_as_a_whole(tmp_path: Path) -> None:
    seen: list[list[tuple[int, str]]] = []

    class Seeing(OpenAICodec):
        def check_shard(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
            seen.append([(number, one["custom_id"]) for number, one in lines])
            return iter(())

    plan(numbered(5), tmp_path, provider(limits=Limits(requests=4, min_requests=2), codec=Seeing()))
    assert seen[-1] == [(4, "r3"), (5, "r4")]
