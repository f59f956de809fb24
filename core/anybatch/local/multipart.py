"""A streaming reader of `multipart/form-data`, for uploads of any size in constant memory.

It lets the embedded provider accept OpenAI's uploads without further dependencies, in process and over HTTP.
Sources: RFC 7578, RFC 2046 5.1.1.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote

MAX_HEADER = 16 * 1024
MAX_FIELD = 64 * 1024

_PARAMETER = re.compile(r';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')


class MultipartError(ValueError):
    """The body is not well-formed multipart/form-data."""


@dataclass(frozen=True)
class Part:
    """One form field; `data` must be read before the next part is requested."""

    name: str
    filename: str | None
    data: Iterator[bytes]

    def text(self) -> str:
        """Read the value of a short field (at most 64 KB)."""
        value = b""
        for chunk in self.data:
            value += chunk
            if len(value) > MAX_FIELD:
                raise MultipartError(f"the field '{self.name}' is longer than {MAX_FIELD} bytes")
        return value.decode("utf-8", "replace")


def parts(content_type: str, chunks: Iterable[bytes]) -> Iterator[Part]:
    """Yield the parts of a body in order; read `chunks` only as far as necessary."""
    kind, _, _ = content_type.partition(";")
    boundary = _parameters(content_type).get("boundary", "")
    if kind.strip().lower() != "multipart/form-data" or not boundary:
        raise MultipartError("expected multipart/form-data with a boundary")
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    source = _Source(chunks)
    for _ in source.until(delimiter):  # text before the first boundary is to be ignored
        pass
    while source.peek(2) != b"--":
        head = source.block(b"\r\n\r\n", MAX_HEADER).partition(b"\r\n")[
            2
        ]  # [0] is padding after the boundary
        disposition = _disposition(head)
        if "name" not in disposition:
            raise MultipartError("a part has no name")
        data = source.until(delimiter)
        yield Part(disposition["name"], disposition.get("filename"), data)
        for _ in data:  # skip what the caller has not read
            pass


class _Source:
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.buffer = b"\r\n"  # so that a boundary at the very beginning is found like any other

    def more(self) -> None:
        chunk = next(self.chunks, None)
        if chunk is None:
            raise MultipartError("the body ends before its closing boundary")
        self.buffer = self.buffer + chunk if self.buffer else chunk

    def peek(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.more()
        return self.buffer[:size]

    def until(self, delimiter: bytes) -> Iterator[bytes]:
        """Yield the bytes up to the delimiter, which is dropped."""
        while (found := self.buffer.find(delimiter)) < 0:
            keep = len(delimiter) - 1  # the delimiter may be split between two chunks
            data, self.buffer = self.buffer[:-keep], self.buffer[-keep:]
            if data:
                yield data
            self.more()
        data, self.buffer = self.buffer[:found], self.buffer[found + len(delimiter) :]
        if data:
            yield data

    def block(self, delimiter: bytes, limit: int) -> bytes:
        value = b""
        for chunk in self.until(delimiter):
            value += chunk
            if len(value) > limit:
                raise MultipartError(f"a part's headers are longer than {limit} bytes")
        return value


def _disposition(head: bytes) -> dict[str, str]:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            return _parameters(value)
    return {}


def _parameters(header: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, raw in _PARAMETER.findall(header):
        value = re.sub(r"\\(.)", r"\1", raw[1:-1]) if raw.startswith('"') else raw
        if name.endswith("*"):  # RFC 5987: charset'language'percent-encoded; wins over the plain form
            found[name[:-1].lower()] = unquote(value.split("'", 2)[-1])
        else:
            found.setdefault(name.lower(), value)
    return found
