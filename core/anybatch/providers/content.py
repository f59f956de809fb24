"""The uploaded form of a shard: byte ranges of a local file, read as one file."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import httpx

from ..errors import JobError
from ..flow import CHUNK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Content:
    """The uploaded form of one shard: byte ranges of a local file, which must not change after validation.

    Attributes:
        path: The file.
        segments: The byte ranges: (start, end).
        rows: The number of request lines.
        stamp: The size and modification time of the file when it was validated.
    """

    path: Path
    segments: tuple[tuple[int, int], ...]
    rows: int
    stamp: tuple[int, int]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return sum(end - start for start, end in self.segments)

    def open(self) -> SegmentReader:
        """Open the content as one binary file.

        Returns:
            A seekable file; close it, or use it as a context manager.

        Raises:
            JobError: The file was changed since it was validated.
        """
        if file_stamp(self.path) != self.stamp:
            raise JobError(
                f"{self.path} was changed after it was validated; it was not submitted. Run the job again"
            )
        return SegmentReader(self.path.open("rb", buffering=0), self.segments)


class LinesBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A request body with a shard's lines as the elements of a JSON list, streamed; it can be sent again."""

    def __init__(self, content: Content, head: bytes, tail: bytes) -> None:
        self._content, self._head, self._tail = content, head, tail
        # Every line ends in a newline. It becomes a comma between two lines, and is dropped after the last.
        self.size = content.size - 1 + len(head) + len(tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        left = self._content.size - 1
        with self._content.open() as file:
            while left and (block := file.read(min(CHUNK, left))):
                left -= len(block)
                yield block.replace(b"\n", b",")  # a JSON line holds no newline inside
        yield self._tail

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for block in self:
            yield block


def file_stamp(path: Path) -> tuple[int, int]:
    """Return a file's size and modification time (ns), which change when it is written to."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class SegmentReader(io.RawIOBase):
    """A read-only file made of byte ranges of another file."""

    def __init__(self, file: io.FileIO, segments: tuple[tuple[int, int], ...]) -> None:
        self._file = file
        self._segments = segments
        # The position at which each segment begins, and at which the last one ends.
        self._begins = (0, *accumulate(end - start for start, end in segments))
        self._size = self._begins[-1]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = min(max(base + offset, 0), self._size)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, from several segments if necessary: many are as short as one line."""
        if size is None or size < 0:
            return self.readall()
        parts: list[bytes] = []
        left = min(size, self._size - self._position)
        number = bisect_right(self._begins, self._position) - 1
        while left:
            start, end = self._segments[number]
            start += self._position - self._begins[number]
            part = os.pread(self._file.fileno(), min(left, end - start), start)
            if not part:
                raise OSError("the input file was truncated while it was being read")
            parts.append(part)
            self._position += len(part)
            left -= len(part)
            number += self._position == self._begins[number + 1]
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()
