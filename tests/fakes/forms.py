"""multipart/form-data, read as a server reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass


class FormError(ValueError):
    """The body is not the form its content type says it is."""


@dataclass(frozen=True)
class Part:
    """One field of a form; `filename` is None for plain fields."""

    data: bytes
    filename: str | None = None
    content_type: str | None = None

    @property
    def text(self) -> str:
        return self.data.decode()


def parse_form(content_type: str, body: bytes) -> dict[str, Part]:
    """The parts by field name; a repeated field keeps its last value."""
    found = re.match(r'multipart/form-data;.*boundary="?([^";]+)"?', content_type, re.IGNORECASE)
    if found is None:
        raise FormError(f"not multipart/form-data with a boundary: {content_type!r}")
    fence = b"--" + found[1].encode()
    parts: dict[str, Part] = {}
    if not body.startswith(fence):
        raise FormError("the body does not start with its boundary")
    at = len(fence)
    while body[at : at + 2] == b"\r\n":
        head_end, end = body.find(b"\r\n\r\n", at), body.find(b"\r\n" + fence, at)
        if not at < head_end < end:
            raise FormError("a part has no end")
        name, part = _part(body[at:head_end].decode(), body[head_end + 4 : end])
        parts[name] = part
        at = end + 2 + len(fence)
    if body[at : at + 2] != b"--":
        raise FormError("the closing boundary is missing")
    return parts


def _part(head: str, data: bytes) -> tuple[str, Part]:
    name = re.search(r'content-disposition: form-data;.*?\bname="([^"]*)"', head, re.IGNORECASE)
    filename = re.search(r'\bfilename="([^"]*)"', head, re.IGNORECASE)
    kind = re.search(r"content-type: *([^\r\n]+)", head, re.IGNORECASE)
    if name is None:
        raise FormError("a part has no name")
    return name[1], Part(data, filename[1] if filename else None, kind[1] if kind else None)
