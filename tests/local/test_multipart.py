"""The streaming form reader."""

import tracemalloc
from collections.abc import Iterator

import httpx
import pytest

from anybatch.local.multipart import MAX_FIELD, MultipartError, parts

TYPE = "multipart/form-data; boundary=XX"


def read(content_type: str, chunks: list[bytes]) -> list[tuple[str, str | None, bytes]]:
    return [(part.name, part.filename, b"".join(part.data)) for part in parts(content_type, chunks)]


BODY = b"\r\n".join(
    (
        b"preamble",
        b"--XX",
        b'Content-Disposition: form-data; name="a"',
        b"",
        b"one",
        b"--XX  ",
        b"content-type: text/plain",
        b"content-disposition: form-data; filename*=UTF-8''%C3%BC.txt; name=b; filename=u.txt",
        b"",
        b"\r\n--X",
        b"--XY\r\n",
        b"--XX",
        b'Content-Disposition: form-data; name="q\\"q"; filename=""',
        b"",
        b"",
        b"--XX--",
        b"epilogue",
    )
)
EXPECTED = [("a", None, b"one"), ("b", "ü.txt", b"\r\n--X\r\n--XY\r\n"), ('q"q', "", b"")]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 64, 10_000])
def test_every_way_to_cut_the_body_reads_the_same(size):
    assert read(TYPE, [BODY[at : at + size] for at in range(0, len(BODY), size)]) == EXPECTED


def test_parts_left_unread_are_skipped():
    assert [part.name for part in parts(TYPE, [BODY])] == ["a", "b", 'q"q']


def test_what_httpx_sends():
    request = httpx.Request(
        "POST",
        "http://x",
        data={"purpose": "batch", "empty": ""},
        files={"file": ('a "b" ü.jsonl', b"\r\n\0\xff")},
    )
    found = read(request.headers["content-type"], list(request.stream))  # type: ignore[arg-type]
    assert found[:2] == [("purpose", None, b"batch"), ("empty", None, b"")]
    assert found[2][::2] == ("file", b"\r\n\0\xff")


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/json", b"{}", "expected multipart/form-data"),
        ("", b"", "expected multipart/form-data"),
        ("multipart/form-data", BODY, "with a boundary"),
        (TYPE, b"", "ends before its closing boundary"),
        (TYPE, BODY[: BODY.index(b"--XX--")], "ends before its closing boundary"),
        (TYPE, BODY[: BODY.index(b"one")], "ends before its closing boundary"),
        (TYPE, b"--XX\r\nx: y\r\n\r\ndata\r\n--XX--", "a part has no name"),
        (TYPE, b"--XX\r\nx: " + b"y" * 20_000 + b"\r\n\r\ndata\r\n--XX--", "headers are longer"),
    ],
)
def test_a_broken_form_is_an_error(content_type, body, expected):
    with pytest.raises(MultipartError, match=expected):
        read(content_type, [body])


def test_a_field_has_a_limit():
    body = (
        b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * (MAX_FIELD + 1) + b"\r\n--XX--"
    )
    with pytest.raises(MultipartError, match="longer than"):
        [part.text() for part in parts(TYPE, [body])]


def test_a_large_part_takes_no_memory():
    def chunks() -> Iterator[bytes]:
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(500):
            yield b"x" * 65_536
        yield b"\r\n--XX--\r\n"

    tracemalloc.start()
    size = sum(len(chunk) for part in parts(TYPE, chunks()) for chunk in part.data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 500 * 65_536
    assert peak < 1_000_000
