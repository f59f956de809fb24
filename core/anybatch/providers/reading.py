"""Reading what servers send: lenient, since every one of these was seen."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import orjson


def unix_time(value: Any) -> int | None:
    """Unix seconds from what providers send for a time; 0 and empty text mean none."""
    if not value:
        return None
    try:
        return int(float(value))
    except (TypeError, ValueError):
        pass
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


def mended_json(text: bytes | str) -> Any:
    """JSON as some servers spoil it: with NaN, which becomes null, or half a surrogate pair, as of an emoji
    that was cut in two, which becomes a question mark. Raises ValueError for what is no JSON at all."""
    value = json.loads(text, parse_constant=lambda _: None)
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
