"""Split one large JSON object into the elements of a list in it, without reading it as a whole."""

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
# The most characters of one element: a body that is not JSON must not fill the memory.
_LONGEST = 1 << 28
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder(strict=False)
_TEXT_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}"]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\[\]{}]+")


def split_object(source: Path, member: tuple[str, ...], target: Path | None) -> dict[str, Any]:
    """Write the elements of the list at `member` to `target`, one per line; return the rest of the object.

    `member` is the path to the list: `("response", "results")`. Without a `target` the elements are skipped.
    Memory holds the largest element, and everything outside the list. If the text breaks off inside the list,
    the elements before that point count. Raises ServerError if the text is not a JSON object.
    """
    with ExitStack() as files:
        # Keep bytes that are not UTF-8: they break only the row that they are in.
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
            raise ServerError(f"the answer that should hold results is not a JSON object: {error}") from None
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
                # JSON strings hold no line breaks; outside of strings a line break is white space.
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
    """Yield the text of each element of a list."""
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
    """Reads a text in blocks, and keeps only what is not parsed yet."""

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
        """Return the next character that is not white space, without consuming it."""
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
            raise ValueError(f"{found!r} instead of {character!r}")
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """Return the next value and its text; None for a value that is not JSON but whose brackets match.

        If the value does not end in the buffer, the buffer is doubled and the value is parsed again, so that
        the total work stays proportional to its size.
        """
        self.peek()
        while True:
            value: Any = None
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError):
                end = _end_of(self._buffer, self._at)
            # A number or a literal at the end of the buffer may continue in the next block.
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
    """Return where an unreadable value ends, by its brackets; 0 if it does not end in the buffer."""
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
            case '"':  # a string without an end
                return 0
        if depth <= 0:
            return found.end()
    return 0
