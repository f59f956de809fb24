"""The behaviour that a stand-in model's name asks for, and the planned outcome of each row.

A model is `local:echo` (chat, responses, completions, moderations) or `local:embed` (embeddings), followed by
any of these parameters; seconds count from the creation of the batch.

| parameter           | default | meaning                                                                    |
|---------------------|---------|----------------------------------------------------------------------------|
| `delay=20`          | 2       | seconds the whole batch takes; rows finish evenly over them                |
| `seed=1`            | 0       | selects other rows for the faults below                                    |
| `fail=0.02`         | 0       | share of rows that get an HTTP error: 400, 429 or 500                      |
| `expire=0.01`       | 0       | share of rows that never finish; the batch ends `expired`                  |
| `missing=0.01`      | 0       | share of rows that are in no count and in neither file                     |
| `invalid=some_code` |         | validation fails the batch with this code, e.g. `token_limit_exceeded`     |
| `cancel=12`         |         | the provider cancels the batch in second 12; finished rows are kept        |
| `throttle=2..5`     |         | every request to this database is answered 429 in seconds 2 to 5           |
| `outage=5..15`      |         | every request to this database is answered 503 in seconds 5 to 15          |

A window that starts at 0 includes the answer to the create itself: the batch exists, but the client is not
informed. A row's planned outcome depends only on `seed`, its `custom_id`, and the round of its job. To
rehearse a real expiry instead of a share of rows, set a `completion_window` shorter than `delay` ("10s",
"5m", "2h", "1d").

A model name without `local:` is accepted and behaves like `local:echo` with the defaults, so that an example
written for a paid provider can be rehearsed unchanged.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl

PREFIX = "local:"
CHAT = "echo"
EMBED = "embed"
SUCCEED, FAIL, EXPIRE, MISS = b"sfem"  # one byte per row in a batch's plan

Window = tuple[float, float]


class ModelError(ValueError):
    """A stand-in model's name is invalid; the message names the known models and parameters."""


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("must be a share between 0 and 1")
    return value


def _window(text: str) -> Window:
    start, dots, end = text.partition("..")
    if not dots or not _number(start) < _number(end):
        raise ValueError("must be start..end in seconds, such as 5..15")
    return float(start), float(end)


def _code(text: str) -> str:
    if not re.fullmatch(r"[a-z_]+", text):
        raise ValueError("must be an error code of lower-case letters and underscores")
    return text


@dataclass(frozen=True)
class Faults:
    """The parameters of a stand-in model; see the table at the top of this module."""

    delay: float = 2.0
    seed: int = 0
    fail: float = 0.0
    expire: float = 0.0
    missing: float = 0.0
    invalid: str | None = None
    cancel: float | None = None
    throttle: Window | None = None
    outage: Window | None = None

    def fate(self, custom_id: str, again: str = "1") -> int:
        """Return the planned outcome of a row, from the seed, its id, and the round that submits it."""
        share = draw(self.seed, custom_id, *([] if again == "1" else [again]))
        for limit, outcome in ((self.fail, FAIL), (self.expire, EXPIRE), (self.missing, MISS)):
            if share < limit:
                return outcome
            share -= limit
        return SUCCEED


_PARSERS: dict[str, Callable[[str], Any]] = {
    "delay": _number,
    "seed": int,
    "fail": _share,
    "expire": _share,
    "missing": _share,
    "invalid": _code,
    "cancel": _number,
    "throttle": _window,
    "outage": _window,
}


def draw(*parts: object) -> float:
    """Return a number in [0, 1) that depends only on the arguments."""
    digest = blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@lru_cache(maxsize=1024)
def parse(model: str | None, endpoint: str | None = None) -> Faults:
    """Parse the parameters in a model name; ModelError says what is wrong and what is known."""
    if model is None or not model.startswith(PREFIX):
        return Faults()
    name, _, query = model.removeprefix(PREFIX).partition("?")
    if name not in (CHAT, EMBED):
        raise ModelError(f"Unknown stand-in model '{PREFIX}{name}'; known are local:echo and local:embed.")
    if endpoint and (name == EMBED) != (endpoint == "/v1/embeddings"):
        raise ModelError(f"The stand-in model '{PREFIX}{name}' does not answer {endpoint}.")
    faults = Faults()
    seen: set[str] = set()
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _PARSERS:
            raise ModelError(
                f"Unknown parameter '{key}' of '{PREFIX}{name}'; known are {', '.join(_PARSERS)}."
            )
        if key in seen:
            raise ModelError(f"Parameter '{key}' of '{PREFIX}{name}' appears twice.")
        seen.add(key)
        try:
            faults = replace(faults, **{key: _PARSERS[key](value)})
        except ValueError as error:
            raise ModelError(f"Parameter '{key}={value}' of '{PREFIX}{name}' is wrong: {error}.") from None
    if faults.fail + faults.expire + faults.missing > 1:
        raise ModelError(f"The shares fail, expire and missing of '{PREFIX}{name}' add up to more than 1.")
    return faults
