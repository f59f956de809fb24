"""One large JSON object cut into the elements of a list in it, without reading it whole."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO

_BLOCK = 1 << 18
# What one element may come to, in characters; a body that is no JSON must not fill the memory.
_LONGEST = 1 << 28
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder(strict=False)
_TEXT_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}"]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\[\]{}]+")


def split_object(source: Path, member: tuple[str, ...], target: Path | None) -> dict[str, Any]:
    """Write the elements of the list at `member` to `target`, one line each; the object without that list.

    `member` are the names on the way: `("response", "results")`. Without a `target` the elements are passed
    over. Memory stays that of the largest element, and of what is not in the list. Where the text breaks off
    inside the list, what was read before counts. Raises ServerError for what is no JSON object.
    """
    with ExitStack() as files:
        # What is not UTF-8 stays as it is: it costs the row that it is in, and no other.
        text = files.enter_context(source.open(encoding="utf-8", errors="surrogateescape", newline=""))
        name = target or os.devnull
        out = files.enter_context(open(name, "w", encoding="utf-8", errors="surrogateescape", newline=""))
        reader = _Reader(text)
        rest: dict[str, Any] = {}
        try:
            _object(reader, member, out, rest)
        except _CutError:
            if target is None:
                raise ServerError("the provider's answer breaks off in the middle") from None
        except (ValueError, RecursionError) as error:
            raise ServerError(f"what should hold a batch's results is no JSON object: {error}") from None
        return rest


def _object(reader: _Reader, member: tuple[str, ...], out: TextIO, rest: dict[str, Any]) -> None:
    reader.take("{")
    if reader.peek() == "}":
        reader.take("}")
        return
    while True:
        name, _ = reader.value()
        reader.take(":")
        on_the_way = bool(member) and name == member[0]
        if on_the_way and len(member) == 1 and reader.peek() == "[":
            for element in _elements(reader):
                # Outside of texts, which hold none, a line break in JSON is mere space.
                out.write(element.replace("\n", " ").replace("\r", " ") + "\n")
        elif on_the_way and len(member) > 1 and reader.peek() == "{":
            inner = rest[name] = {}
            _object(reader, member[1:], out, inner)
        else:
            rest[name] = reader.value()[0]
        if reader.peek() == "}":
            reader.take("}")
            return
        reader.take(",")


def _elements(reader: _Reader) -> Iterator[str]:
    """The text of each element of a list."""
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        return
    while True:
        yield reader.value()[1]
        if reader.peek() == "]":
            reader.take("]")
            return
        reader.take(",")


class _CutError(Exception):
    """The text ends before the JSON does."""


class _Reader:
    """A text read in blocks, of which only what is still to be parsed is kept."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._buffer, self._at = "", 0
        self._is_ended = False

    def _more(self, size: int = _BLOCK) -> None:
        block = self._text.read(size)
        if not block:
            self._is_ended = True
            return
        self._buffer, self._at = self._buffer[self._at :] + block, 0

    def peek(self) -> str:
        """The next character that is no space."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _SPACE:
                    return self._buffer[self._at]
                self._at += 1
            self._more()
            if self._is_ended:
                raise _CutError

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise ValueError(f"{found!r} where {character!r} should be")
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """The next value, and its text; None for one that is not JSON, but ends where its brackets do.

        One that does not end in what was read is read once more, with as much again behind it: a value is
        gone through twice at most, however large it is.
        """
        self.peek()
        while True:
            value: Any = None
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError):
                end = _end_of(self._buffer, self._at)
            # What is no list, object or text may go on in the next block.
            if end and (end < len(self._buffer) or self._is_ended):
                text = self._buffer[self._at : end]
                self._at = end
                return value, text
            if self._is_ended:
                raise _CutError
            if len(self._buffer) - self._at > _LONGEST:
                raise ValueError(f"one element has more than {_LONGEST} characters")
            self._more(max(_BLOCK, len(self._buffer) - self._at))


def _end_of(buffer: str, at: int) -> int:
    """Where a value ends whose content cannot be read, by its brackets; 0 where that is not in the buffer."""
    if buffer[at] not in '[{"':
        found = _SCALAR.match(buffer, at)
        return found.end() if found else 0
    depth = 0
    for found in _TEXT_OR_BRACKET.finditer(buffer, at):
        match found[0]:
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case '"':  # a text without an end
                return 0
        if depth <= 0:
            return found.end()
    return 0
