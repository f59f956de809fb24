"""JSON that strangers wrote, read and written so that the same text means the same everywhere.

Python's own reader gives up at a depth that depends on how deep its caller stands, so a line that passed
validation could break the batch when it is read again. It also takes and writes NaN, which is no JSON, and
refuses numbers of more than 4,300 digits. Here nesting has a fixed bound, and whatever is beyond these limits
is an `UnfitError`, which costs one row.
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
    """JSON that cannot be passed on; the message says why and continues a sentence."""


def read_strict(text: str) -> Any:
    """The value of `text`. UnfitError for what not every JSON reader takes; ValueError if it is no JSON."""
    return _read(_STRICT, text)


def read_mended(text: str) -> Any:
    """As `read_strict`, but NaN, Infinity and numbers beyond any reader's range become null."""
    return _read(_MENDING, text)


def _read(decoder: json.JSONDecoder, text: str) -> Any:
    if is_deeper(text, MAX_NESTING):
        raise UnfitError(_TOO_DEEP)
    try:
        return (
            decoder.decode(text) if _ODD.search(text) else json.loads(text)
        )  # which is several times as fast
    except RecursionError:  # the caller stands very deep itself
        raise UnfitError(_TOO_DEEP) from None


def is_deeper(text: str, levels: int) -> bool:
    """Whether arrays and objects lie more than `levels` deep in each other; `text` need not be JSON."""
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
    """`text` with null for every array and object that lies deeper than `levels`."""
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
    """Compact UTF-8 JSON. UnfitError for what it cannot carry."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UnfitError("it holds half a surrogate pair, as of an emoji that was cut in two") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UnfitError(f"it is no JSON ({error})") from None


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
    raise UnfitError(f"it holds {text}, which is no JSON")


def _whole_or_null(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _fraction_or_null(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_STRICT = json.JSONDecoder(parse_int=_whole, parse_float=_fraction, parse_constant=_constant)
_MENDING = json.JSONDecoder(
    parse_int=_whole_or_null, parse_float=_fraction_or_null, parse_constant=lambda _: None
)
