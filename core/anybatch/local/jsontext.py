"""Read and write JSON from clients and upstream servers so that a text always means the same.

Python's own reader gives up at a depth that depends on how deep its caller is in the call stack, so a line
that has passed validation could fail when it is read again. It also accepts and writes NaN, which is not
JSON, and refuses numbers of more than 4,300 digits. Here nesting has a fixed limit, and anything beyond these
limits raises `UnfitError`, which fails one row.
"""

import json
import math
import re
from typing import Any

MAX_NESTING = 200  # clients write results with orjson, which ends at 254 levels; a result line adds two

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[]}]', re.DOTALL)  # an unclosed string takes the rest
_ODD = re.compile(
    r"NaN|Infinity|[eE]\+?\d{3}|\d{300}"
)  # in every text with a number that not all readers take
_TOO_DEEP = f"it is nested more than {MAX_NESTING} levels deep"


class UnfitError(ValueError):
    """JSON that cannot be passed on; the message says why, and continues a sentence."""


def read_strict(text: str) -> Any:
    """Parse JSON; raise UnfitError if not every reader would accept it, ValueError if it is not JSON."""
    return _read(_STRICT, text)


def read_repaired(text: str) -> Any:
    """Parse JSON like `read_strict`, but turn NaN, Infinity and numbers out of range into null."""
    return _read(_REPAIRING, text)


def _read(decoder: json.JSONDecoder, text: str) -> Any:
    if is_deeper(text, MAX_NESTING):
        raise UnfitError(_TOO_DEEP)
    try:
        return (
            decoder.decode(text) if _ODD.search(text) else json.loads(text)
        )  # which is several times as fast
    except RecursionError:  # the caller itself is very deep in the call stack
        raise UnfitError(_TOO_DEEP) from None


def is_deeper(text: str, levels: int) -> bool:
    """Whether arrays and objects are nested more than `levels` deep; `text` need not be JSON."""
    if text.count("[") + text.count("{") <= levels:
        return False
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth > levels:
                return True
        elif token[0] in ("]", "}"):
            depth -= 1
    return False


def shallow(text: str, levels: int) -> str:
    """Return `text` with null in place of every array and object deeper than `levels`."""
    kept: list[str] = []
    depth = start = 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == levels + 1:
                kept.append(text[start : token.start()])
        elif token[0] in ("]", "}"):
            if depth == levels + 1:
                kept.append("null")
                start = token.end()
            depth -= 1
    return "".join(kept) if depth > levels else "".join(kept) + text[start:]


def encode(value: Any) -> bytes:
    """Return compact UTF-8 JSON; raise UnfitError for a value that it cannot express."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UnfitError("it holds half a surrogate pair, as of an emoji that was cut in two") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UnfitError(f"it is not JSON ({error})") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UnfitError(f"it holds a number of {len(text)} digits") from None


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnfitError(f"it holds {text[:20]}, which is too large a number")
    return value


def _constant(text: str) -> float:
    raise UnfitError(f"it holds {text}, which is not JSON")


def _whole_or_null(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _fraction_or_null(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_STRICT = json.JSONDecoder(parse_int=_whole, parse_float=_fraction, parse_constant=_constant)
_REPAIRING = json.JSONDecoder(
    parse_int=_whole_or_null, parse_float=_fraction_or_null, parse_constant=lambda _: None
)
