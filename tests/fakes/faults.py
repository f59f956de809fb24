"""What can go wrong on purpose, and the rules that say when: for the fake server and the fault proxy."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HOLD_LIMIT = 30.0  # seconds after which a held request goes on, so that a forgotten hold cannot hang a run


@dataclass(frozen=True)
class Respond:
    """Answer in the application's place; `body` is bytes, text, or anything JSON."""

    status: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, str]:
        """The body's bytes and content type."""
        if isinstance(self.body, bytes):
            return self.body, "application/octet-stream"
        if isinstance(self.body, str):
            return self.body.encode(), "text/plain; charset=utf-8"
        return json.dumps(self.body).encode(), "application/json"


@dataclass(frozen=True)
class ResetBefore:
    """Reset the connection; the application never hears of the request."""


@dataclass(frozen=True)
class ResetAfter:
    """Let the application handle the request, then reset the connection before any byte of the answer."""


@dataclass(frozen=True)
class Stall:
    """Wait before handling; a client that gave up meanwhile has still been served."""

    seconds: float


@dataclass(frozen=True)
class CutBody:
    """Let the application answer, send the header and `after` bytes of the body, then close."""

    after: int


@dataclass(frozen=True)
class CutRequest:
    """Proxy only: pass on `after` bytes of the request, head included, then reset both ways."""

    after: int


@dataclass(frozen=True)
class CutResponse:
    """Proxy only: pass on `after` bytes of the response, head included, then close."""

    after: int


class Hold:
    """Stop one request at a known point until the test releases it: to kill a client exactly there.

    `handled=False` stops before the application sees the request, `handled=True` when it has been handled and
    nothing of the answer has been sent. `limit` seconds later it goes on by itself.
    """

    def __init__(self, *, handled: bool, limit: float = HOLD_LIMIT) -> None:
        self.handled = handled
        self.limit = limit
        self.dropped = False
        self._reached = threading.Event()
        self._released = threading.Event()

    def wait(self, timeout: float = HOLD_LIMIT) -> None:
        """Return when the request has arrived at the point; AssertionError when it does not in time."""
        assert self._reached.wait(timeout), f"no request reached the hold within {timeout:g} s"

    def release(self) -> None:
        self._released.set()

    def drop(self) -> None:
        """Reset the connection: the request, or its answer, was lost on the way."""
        self.dropped = True
        self._released.set()

    async def block(self) -> None:
        """The server's side: stop here, at most `limit` seconds."""
        self._reached.set()
        deadline = time.monotonic() + self.limit
        while not self._released.is_set() and time.monotonic() < deadline:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.01)


Fault = Respond | ResetBefore | ResetAfter | Stall | CutBody | CutRequest | CutResponse | Hold


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    skip: int
    times: int


class Rules:
    """An ordered list of fault rules; the first that matches and is not used up applies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []

    def add(self, pattern: str, fault: Fault, *, times: int, skip: int) -> None:
        with self._lock:
            self._rules.append(_Rule(re.compile(pattern), fault, skip, times))

    def take(self, subject: str) -> Fault | None:
        """The fault for this request, if any; a rule's matches are counted whether skipped or used."""
        with self._lock:
            for rule in self._rules:
                if rule.times <= 0 or not rule.pattern.fullmatch(subject):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule.fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    @property
    def unused(self) -> int:
        """How many announced faults have not happened; 0 when a test has exercised them all."""
        with self._lock:
            return sum(rule.times for rule in self._rules)
