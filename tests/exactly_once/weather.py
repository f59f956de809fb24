"""Bad weather: answers that are lost, cut or malformed at random, and when a process is killed.

What is spoiled here a client can see through: a network, a proxy or a gateway does it, and the provider's own
record stays right. A listing that leaves a batch out, or a refusal of what was done, is no weather but a lie.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from urllib.parse import parse_qs, urlencode

import httpx

from tests.fakes.faults import CutBody, Fault, ResetAfter, ResetBefore, Respond, Rules
from tests.fakes.server import App, FakeServer, Reply, Request

KINDS = {
    "upload": re.compile(r"POST .*/files"),
    "create": re.compile(r"POST .*/(batches|jobs)"),
    "cancel": re.compile(r"POST .*/cancel"),
    "list": re.compile(r"GET .*/(batches|jobs)"),
    "download": re.compile(r"GET .*/(content|results)"),
    "retrieve": re.compile(r"GET .*"),
}
FAILURES = (500, 502, 503, 504)
PAGE = b"<html><head><title>Log in</title></head><body>Please log in to the gateway.</body></html>"


def kind_of(subject: str) -> str:
    """Which call "METHOD path" is."""
    return next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(subject))


# --- what is spoiled ----------------------------------------------------------------------------------------

Change = Callable[[Reply, Random], Reply]


RESET_AFTER: tuple[str, Fault] = ("reset after", ResetAfter())


def _lost(random: Random) -> tuple[str, Fault]:
    """A connection that breaks, or a gateway that answers in the provider's place."""
    error = {"error": {"message": "oops", "type": "server_error", "code": None}}
    busy = {"error": {"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    return random.choice(
        (
            ("reset before", ResetBefore()),
            RESET_AFTER,
            RESET_AFTER,
            ("cut, wrong length", CutBody(random.randrange(600))),
            ("5xx before", Respond(random.choice(FAILURES), error)),
            ("429", Respond(429, busy, {"retry-after": "0"})),
        )
    )


def _page(reply: Reply, random: Random) -> Reply:
    return Reply(200, PAGE, {"content-type": "text/html"})


def _failure(reply: Reply, random: Random) -> Reply:
    return Reply.json({"error": {"message": "late oops"}}, random.choice(FAILURES))


def _cut(reply: Reply, random: Random) -> Reply:
    return replace(reply, body=reply.body[: random.randrange(max(1, len(reply.body)))])


def _cut_at_a_line(reply: Reply, random: Random) -> Reply:
    lines = reply.body.splitlines(keepends=True)
    return replace(reply, body=b"".join(lines[: random.randrange(max(1, len(lines)))]))


def _empty(reply: Reply, random: Random) -> Reply:
    return replace(reply, body=b"")


def _no_object(reply: Reply, random: Random) -> Reply:
    return replace(reply, body=random.choice((b"[]", b"null", b'"ok"')))


def _error_with_200(reply: Reply, random: Random) -> Reply:
    return Reply.json({"error": {"message": "oops, with status 200"}})


def _unasked_part(reply: Reply, random: Random) -> Reply:
    cut = _cut_at_a_line(reply, random)
    part = {"content-range": f"bytes 0-{max(0, len(cut.body) - 1)}/{len(reply.body)}"}
    return replace(cut, status=206, headers={**reply.headers, **random.choice(({}, part))})


def _no_such_range(reply: Reply, random: Random) -> Reply:
    return Reply(416, b"", {"content-range": "bytes */0"})


def _endless(reply: Reply, random: Random) -> Reply:
    """A page without entries that promises more, and no way on."""
    listing = json.loads(reply.body)
    more = {"total": 10_000} if "total" in listing else {"has_more": True, "first_id": None, "last_id": None}
    return Reply.json({**listing, "data": [], **more})


JSON: dict[str, Change] = {
    "HTML": _page,
    "half JSON": _cut,
    "no object": _no_object,
    "5xx after": _failure,
    "error with 200": _error_with_200,
}
ENDLESS = "empty page, more promised"
LISTING: dict[str, Change] = {**JSON, ENDLESS: _endless}
CONTENT: dict[str, Change] = {
    "HTML": _page,
    "cut, right length": _cut,
    "cut at a line": _cut_at_a_line,
    "empty result file": _empty,
    "unasked 206": _unasked_part,
    "unasked 416": _no_such_range,
    "5xx after": _failure,
}
CHANGES = {"list": LISTING, "download": CONTENT}


# --- when it strikes ----------------------------------------------------------------------------------------


@dataclass
class Strike:
    """When to kill: at request number `number` of this kind (None: of any), so many seconds after.

    `where`: once it has "arrived", and then with `drop` it is lost; or once it was "handled".
    """

    where: str
    kind: str | None
    number: int
    delay: float = 0.0
    drop: bool = False


@dataclass
class Gust:
    """The next `left` answers of this kind are all spoiled in the same way."""

    kind: str
    name: str
    left: int


GUSTS = (("list", 8), ("list", 8), ("download", 6), ("upload", 3), ("retrieve", 3))


def gust_of(random: Random) -> Gust | None:
    """A gust in one attempt of four."""
    if random.random() > 0.25:
        return None
    kind, most = random.choice(GUSTS)
    name = random.choice(list(CHANGES.get(kind, JSON)))
    if kind == "list" and random.random() < 0.7:  # a batch must not be taken for none
        name = ENDLESS
    return Gust(kind, name, random.randrange(1, most + 1))


@dataclass
class Weather(Rules):
    """An application with bad weather around it, and the faults of the connection to it.

    `calm` are the kinds of requests that are spared; `note` is told of what was spoiled. A gust over the
    listing begins with a create whose answer is lost.
    """

    app: App
    random: Random
    kill: Callable[[], None]
    note: Callable[[str], None]
    rate: float = 0.13  # of connections, and again of answers
    calm: set[str] = field(default_factory=set)
    strike: Strike | None = None
    gust: Gust | None = None
    asked: Request | None = None  # what is being handled now

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def base_path(self) -> str:
        return str(getattr(self.app, "base_path", ""))

    def take(self, subject: str) -> Fault | None:
        kind = kind_of(subject)
        if (strike := self._struck("arrived", kind)) is not None and strike.drop:
            return ResetBefore()
        if kind in self.calm:
            return None
        if kind == "create" and self.gust is not None and self.gust.kind == "list" and self.gust.left:
            name, fault = RESET_AFTER
        elif self.random.random() < self.rate:
            name, fault = _lost(self.random)
        else:
            return None
        self.note(f"{kind}: {name}")
        return fault

    def __call__(self, request: Request) -> Reply:
        kind = kind_of(f"{request.method} {request.path}")
        self.asked = request
        reply = self.app(request)
        if reply.status in (200, 206) and (name := self._spoils(kind)) is not None:
            self.note(f"{kind}: {name}")
            reply = CHANGES.get(kind, JSON)[name](reply, self.random)
        self._struck("handled", kind)
        return reply

    def _spoils(self, kind: str) -> str | None:
        """How to spoil this answer, if at all."""
        if kind in self.calm:
            return None
        if self.gust is not None and self.gust.kind == kind and self.gust.left:
            self.gust.left -= 1
            return self.gust.name
        return self.random.choice(list(CHANGES.get(kind, JSON))) if self.random.random() < self.rate else None

    def _struck(self, where: str, kind: str) -> Strike | None:
        strike = self.strike
        if strike is None or strike.where != where or strike.kind not in (None, kind):
            return None
        strike.number -= 1
        if strike.number:
            return None
        if strike.delay:
            timer = threading.Timer(strike.delay, self.kill)
            timer.daemon = True
            timer.start()
        else:
            self.kill()
        return strike


class StormServer(FakeServer):
    """A fake server out in the weather."""

    def __init__(self, weather: Weather) -> None:
        super().__init__(weather)
        self._rules = weather

    def settle(self) -> None:
        """Wait until all that has arrived was dealt with."""
        self.wait_for(".*", ".*", count=len(self.calls))


# --- the same inside a client's process, where there is no connection that could break ----------------------


class StormyTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport with the weather around it."""

    def __init__(self, inside: httpx.BaseTransport, weather: Weather) -> None:
        self._inside, self._weather = inside, weather
        weather.app = self._serve

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fault = self._weather.take(f"{request.method} {request.url.path}")
        if isinstance(fault, Respond):
            body, content_type = fault.encode()
            headers = {"content-type": content_type, **fault.headers}
            return _response(request, Reply(fault.status, body, headers))
        if isinstance(fault, ResetBefore):
            raise httpx.WriteError("reset", request=request)
        query = parse_qs(request.url.query.decode(), keep_blank_values=True)
        reply = self._weather(
            Request(request.method, request.url.path, query, dict(request.headers), request.read())
        )
        if isinstance(fault, ResetAfter):
            raise httpx.ReadError("reset", request=request)
        return _response(request, reply, fault.after if isinstance(fault, CutBody) else None)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)

    def close(self) -> None:
        self._inside.close()

    async def aclose(self) -> None:
        self._inside.close()

    def _serve(self, request: Request) -> Reply:
        url = httpx.URL("http://local" + request.path, query=urlencode(request.query, doseq=True).encode())
        asked = httpx.Request(request.method, url, headers=dict(request.headers), content=request.body)
        answer = self._inside.handle_request(asked)
        headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
        return Reply(answer.status_code, answer.read(), headers)


def _response(request: httpx.Request, reply: Reply, after: int | None = None) -> httpx.Response:
    if after is None or after >= len(reply.body):
        return httpx.Response(reply.status, headers=reply.headers, content=reply.body, request=request)
    body = CutStream(reply.body[:after])
    return httpx.Response(reply.status, headers=reply.headers, stream=body, request=request)


class CutStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off, and was never said to be longer."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk
