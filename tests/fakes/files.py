"""Stored files and their download."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .server import Reply, Request


@dataclass
class FakeFile:
    """One stored file."""

    id: str
    filename: str
    purpose: str
    data: bytes
    created_at: float
    expires_at: float | None = None
    looks: int = 0


def serve_bytes(data: bytes, request: Request, *, ranges: bool, content_type: str) -> Reply:
    """The answer to a download: all of it, or with `ranges` the one range that is asked for."""
    headers = {"content-type": content_type} | ({"accept-ranges": "bytes"} if ranges else {})
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if span is None or not ranges:
        return Reply(200, data, headers)
    size, start = len(data), int(span[1])
    if start >= size:
        return Reply(416, b"", headers | {"content-range": f"bytes */{size}"})
    end = min(int(span[2] or size - 1), size - 1)
    return Reply(206, data[start : end + 1], headers | {"content-range": f"bytes {start}-{end}/{size}"})
