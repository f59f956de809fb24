"""E1 of FAULTS: a row that nobody foresaw fails alone, once; neighbours, batch and other batches go on."""

import asyncio
import contextlib
import errno
import gzip
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from anybatch.local import App, LocalTransport, standin
from anybatch.local import upstream as module
from anybatch.local.jsontext import MAX_NESTING
from anybatch.local.schema import conform
from anybatch.local.upstream import Upstream, Worker, ask
from anybatch.local.work import load, validate

Reply = tuple[int, dict[str, str], bytes]  # (status, headers, the body as it goes over the wire)


def good(**more: Any) -> Reply:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    body = {"choices": [{"message": {"role": "assistant", "content": "fine"}}], "usage": usage}
    return 200, {}, json.dumps(body | more).encode()


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


class Endpoint:
    """A chat endpoint on loopback: `replies` by prompt, where other prompts get a good answer; it counts."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self.asked: Counter[str] = Counter()
        self.gate = threading.Event()  # answers wait for it
        self.gate.set()
        self.held: set[str] = set()  # prompts that wait; all if empty
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][0]["content"]
                endpoint.asked[prompt] += 1
                if not endpoint.held or prompt in endpoint.held:
                    endpoint.gate.wait(30)
                status, headers, content = endpoint.replies.get(prompt, good())
                with contextlib.suppress(ConnectionError):  # the caller may have been killed
                    self.send_response(status)
                    for name, value in {"content-length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


class _InProcess(LocalTransport):
    def __init__(self, app: App) -> None:
        self._app = app


class Site:
    """A server's application and database without its port; what it calls is real."""

    def __init__(self, path: Path, base_url: str) -> None:
        self.app = App(path, upstream=True)
        self.base_url = base_url
        self.client = httpx.Client(base_url="http://local/v1", transport=_InProcess(self.app))

    @contextlib.asynccontextmanager
    async def working(self, transport: httpx.AsyncBaseTransport | None = None) -> AsyncIterator[None]:
        upstream = Upstream(self.base_url, key="upstream-key", concurrency=4)
        worker = Worker(self.app.store, upstream, now=self.app.now, transport=transport)
        task = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def create(self, content: bytes) -> str:
        return create(self.client, content)

    async def end(self, batch_id: str) -> dict[str, Any]:
        return await until_true(lambda: ended(self.client, batch_id))

    def lines(self, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return result_lines(self.client, batch)


async def until_true(look: Callable[[], Any], seconds: float = 15) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := look()):  # noqa: ASYNC110  as any client
            await asyncio.sleep(0.01)
    return found


def create(client: httpx.Client, content: bytes, url: str = "/v1/chat/completions") -> str:
    file = client.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
    response = client.post("/batches", json=asked)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def ended(client: httpx.Client, batch_id: str) -> dict[str, Any] | None:
    batch: dict[str, Any] = client.get(f"/batches/{batch_id}").json()
    return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None


def no_json(constant: str) -> float:
    raise AssertionError(f"{constant} in a result file, which other readers refuse")


def result_lines(client: httpx.Client, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of both result files by custom_id, each of them JSON to the letter."""
    found: dict[str, dict[str, Any]] = {}
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        content = client.get(f"/files/{file_id}/content").content if file_id else b""
        for raw in content.splitlines():
            line = json.loads(raw, parse_constant=no_json)
            assert line["custom_id"] not in found
            found[line["custom_id"]] = line
    return found


def outcome(line: dict[str, Any]) -> tuple[int, str | None]:
    response = line["response"]
    error = response["body"].get("error")
    return response["status_code"], error["code"] if error else None


def row(name: str, more: str = "", model: str = "llama") -> bytes:
    """A request line whose prompt is its name; `more` is JSON text of further members of the body."""
    messages = json.dumps([{"role": "user", "content": name}])
    body = f'{{"model": "{model}", "messages": {messages}{", " if more else ""}{more}}}'
    url = "/v1/chat/completions"
    return f'{{"custom_id": "{name}", "method": "POST", "url": "{url}", "body": {body}}}\n'.encode()


@pytest.fixture
def site(tmp_path, endpoint, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY", 0.02)
    site = Site(tmp_path / "x.db", endpoint.base_url)
    yield site
    site.client.close()


NEIGHBOURS = [f"neighbour-{number}" for number in range(6)]

ANSWERS: dict[str, Reply] = {
    "broken gzip": (200, {"content-encoding": "gzip"}, b"this is no gzip"),
    "broken gzip of an error": (400, {"content-encoding": "gzip"}, b"this is no gzip"),
    "half a gzip": (200, {"content-encoding": "gzip"}, gzip.compress(good()[2])[:-20]),
    "compressed without end": (200, {"content-encoding": "gzip"}, gzip.compress(bytes(3 << 20))),
    "nested": (200, {}, b'{"a": %s}' % nested(300).encode()),
    "nested beyond recursion": (200, {}, b'{"a": %s}' % nested(100_000).encode()),
    "never closed": (200, {}, b'{"a": ' + b"[" * 100_000),
    "no JSON in a charset that raises": (200, {"content-type": "text/plain; charset=rot13"}, b"sorry"),
    "no UTF-8": (200, {}, b'{"a": "\xff"}'),
    "a list": (200, {}, b"[1]"),
    "empty": (200, {}, b""),
}


async def test_an_answer_that_cannot_be_read_costs_its_row_once(site, endpoint, monkeypatch):
    """E1 of FAULTS: broken gzip and the like ended the neighbours' calls, and began the batch anew."""
    monkeypatch.setattr(module, "MAX_ANSWER", 1 << 20)
    endpoint.replies = ANSWERS
    names = [*NEIGHBOURS[:3], *ANSWERS, *NEIGHBOURS[3:]]
    batch_id = site.create(b"".join(map(row, names)))
    other = site.create(b"".join(row(f"other-{name}") for name in NEIGHBOURS))
    async with site.working():
        batch, second = await site.end(batch_id), await site.end(other)
    assert batch["status"] == second["status"] == "completed"
    assert batch["request_counts"] == {"total": len(names), "completed": 6, "failed": len(ANSWERS)}
    assert second["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    assert set(endpoint.asked.values()) == {1}
    lines = site.lines(batch)
    assert {name: outcome(lines[name]) for name in NEIGHBOURS} == dict.fromkeys(NEIGHBOURS, (200, None))
    for name, (status, _, _) in ANSWERS.items():
        assert outcome(lines[name]) == (status if status >= 400 else 502, "unreadable_answer"), name
    said = {name: lines[name]["response"]["body"]["error"]["message"] for name in ANSWERS}
    assert "compression is broken" in said["broken gzip"]
    assert "longer than" in said["compressed without end"]
    assert f"more than {MAX_NESTING} levels" in said["nested"]
    assert said["no JSON in a charset that raises"].endswith("sorry")


async def test_an_error_whose_body_is_broken_is_still_asked_again(site, endpoint):
    """E1 of FAULTS: a 503 is one whatever its body is; what is repeated is decided by the status."""
    broken = 503, {"content-encoding": "gzip", "retry-after": "0"}, b"this is no gzip"
    endpoint.replies = {"busy": broken}
    async with site.working():
        batch_id = site.create(row("busy") + row("neighbour"))
        lines = site.lines(await site.end(batch_id))
    assert outcome(lines["busy"]) == (503, "unreadable_answer")
    assert endpoint.asked == {"busy": module.TRIES, "neighbour": 1}


async def test_numbers_that_json_does_not_know_become_null(site, endpoint):
    """E1 of FAULTS: a paid answer is kept, and no result file holds NaN, at which its readers would stop."""
    odd = b'{"choices": [], "a": [NaN, -Infinity, 1e999, %s, 0.5, %s]}' % (b"7" * 5000, b"7" * 4000)
    endpoint.replies = {"odd": (200, {}, odd)}
    async with site.working():
        batch = await site.end(site.create(row("odd") + row("neighbour")))
    assert batch["request_counts"]["completed"] == 2
    assert site.lines(batch)["odd"]["response"]["body"]["a"] == [None] * 4 + [0.5, int("7" * 4000)]
    assert endpoint.asked == {"odd": 1, "neighbour": 1}


async def test_token_counts_of_any_size_do_not_keep_a_batch_from_its_end(site, endpoint):
    """E1 of FAULTS: the sum of two numbers of 4,300 digits has 4,301, which Python writes as no JSON."""
    usage = {"prompt_tokens": int("9" * 4300), "completion_tokens": -5}
    endpoint.replies = {"a": good(usage=usage), "b": good(usage=usage)}
    async with site.working():
        batch = await site.end(site.create(row("a") + row("b") + row("neighbour")))
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert batch["usage"]["total_tokens"] == 5
    assert endpoint.asked == {"a": 1, "b": 1, "neighbour": 1}


NO_JSON = {
    "NaN": '"temperature": NaN',
    "infinity": '"temperature": [-Infinity]',
    "too large": '"temperature": 1e999',
    "digits": f'"seed": {"7" * 5000}',
    "nested": f'"a": {nested(300)}',
    "nested at Python's limit": f'"a": {nested(900)}',
    "nested beyond recursion": f'"a": {nested(100_000)}',
    "objects": '"a": ' + '{"b":' * 300 + "1" + "}" * 300,
}
SURROGATES = {"surrogate": r'"user": "\ud83d"', "surrogate in a name": r'"\ude00": 1'}


async def test_a_request_that_cannot_be_sent_costs_its_row_and_no_call(site, endpoint):
    """E1 of FAULTS: NaN and half a surrogate pair raised in the sender, deep nesting failed the batch."""
    bad = NO_JSON | SURROGATES
    first, *rest = bad  # also the line that tells the batch's model
    content = row(first, bad[first]) + b"".join(map(row, NEIGHBOURS))
    batch_id = site.create(content + b"".join(row(name, bad[name]) for name in rest))
    async with site.working():
        batch = await site.end(batch_id)
    assert (batch["status"], batch["model"]) == ("completed", "llama")
    assert batch["request_counts"] == {"total": 6 + len(bad), "completed": 6, "failed": len(bad)}
    lines = site.lines(batch)
    assert {name: outcome(lines[name]) for name in bad} == dict.fromkeys(bad, (400, "unsendable_request"))
    assert endpoint.asked == dict.fromkeys(NEIGHBOURS, 1)
    said = {name: lines[name]["response"]["body"]["error"]["message"] for name in bad}
    assert said["NaN"] == "This request cannot be sent: it holds NaN, which is not JSON."
    assert "5000 digits" in said["digits"]
    assert "surrogate" in said["surrogate in a name"]


def test_the_stand_in_fails_the_same_rows(desk):
    """E1 and A3 of FAULTS: a rehearsal meets what the real run meets, and every other row is answered."""
    content = b"".join(row(name, more, "gpt-5") for name, more in NO_JSON.items())
    content += b"".join(row(name, more, "gpt-5") for name, more in SURROGATES.items())
    batch = desk.look(desk.create(content + row("neighbour", model="gpt-5"))["id"], 10)
    assert (batch["status"], batch["model"]) == ("completed", "gpt-5")
    lines = result_lines(desk.client, batch)
    assert len(lines) == len(NO_JSON) + 3
    for name in NO_JSON:
        assert outcome(lines[name]) == (400, "unsendable_request")
    for name in (*SURROGATES, "neighbour"):  # it echoes what JSON can carry
        assert outcome(lines[name]) == (200, None)


def test_a_line_means_the_same_however_deep_its_reader_stands(desk):
    """E1 of FAULTS: a line that passed validation was none at the end, where less of the stack was left."""
    batch_id = desk.create(row("a", f'"a": {nested(700)}') + row("b"))["id"]
    desk.look(batch_id, 1)

    def deeper(levels: int) -> dict[str, Any]:
        return deeper(levels - 1) if levels else desk.look(batch_id, 10)

    batch = deeper(250)
    assert {name: outcome(line) for name, line in result_lines(desk.client, batch).items()} == {
        "a": (400, "unsendable_request"),
        "b": (200, None),
    }


def test_a_model_that_cannot_be_stored_costs_rows_and_not_the_create(desk):
    """E1 of FAULTS: SQLite takes no half surrogate pair, and every create of the file raised."""
    batch = desk.look(desk.create(row("a", model=r"gpt\ud83d"))["id"], 10)
    assert (batch["status"], batch["model"]) == ("completed", None)
    assert outcome(result_lines(desk.client, batch)["a"]) == (200, None)


def test_a_stand_in_asked_for_another_endpoint_says_so(site):
    """E1 of FAULTS: `local:echo` at an endpoint only an upstream knows made every look at it a KeyError."""
    content = row("a", model="local:echo?delay=0").replace(b"chat/completions", b"rerank")
    batch_id = create(site.client, content, "/v1/rerank")
    batch = ended(site.client, batch_id)
    assert batch
    assert batch["errors"]["data"][0]["message"] == "The stand-in model does not answer /v1/rerank."
    assert site.client.get("/batches").status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9},
        {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000}},
        {"type": "string", "minLength": 10**12},
        {"properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}, "required": ["l", "r"]},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"type": "number", "minimum": -1.7e308, "maximum": 1.7e308},
    ],
    ids=["items", "items of items", "text", "no finite document", "refers to itself", "infinite range"],
)
def test_a_row_that_asks_the_stand_in_for_too_much_fails_alone(desk, schema):
    """E1 of FAULTS: such a schema took all memory, or years, of whoever looked at the batch."""
    wish = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    more = f'"response_format": {json.dumps(wish)}'
    batch = desk.look(desk.create(row("a", more) + row("b"))["id"], 10)
    lines = result_lines(desk.client, batch)
    assert outcome(lines["a"]) == (400, "invalid_value")
    assert outcome(lines["b"]) == (200, None)


def test_a_large_answer_is_still_made():
    items = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 100}}
    assert len(conform(items | {"minItems": 100}, "x")) == 100
    assert len(conform({"type": "string", "minLength": 100_000}, "x")) >= 100_000


def test_vectors_without_end_are_refused():
    body = {"model": "local:embed", "input": ["a", "b"], "dimensions": 10**12}
    with pytest.raises(ValueError, match="2 vectors of 1000000000000 numbers"):
        standin.answer("/v1/embeddings", body, identity="x", created=1)


@pytest.mark.parametrize("path", ["/chat\ncompletions", "/chat\x00", "/chat/\ud83d"])
async def test_an_endpoint_that_is_no_address_costs_the_row_and_no_call(endpoint, path):
    """E1 of FAULTS: httpx raised InvalidURL, which is no HTTPError."""
    async with httpx.AsyncClient() as client:
        status, body = await ask(client, endpoint.base_url + path, {"messages": [{"content": "a"}]})
    assert (status, body["error"]["code"]) == (400, "unsendable_request")
    assert not endpoint.asked


def test_a_pause_that_is_no_number_is_none():
    """E1 of FAULTS: asyncio raises for a sleep of NaN seconds from Python 3.13 on."""
    waits = {"nan": None, "inf": module.MAX_RETRY_AFTER, "-inf": 0.0, "2.5": 2.5, "soon": None}
    for text, seconds in waits.items():
        assert module._retry_after(httpx.Response(429, headers={"retry-after": text})) == seconds


class Bug(httpx.AsyncHTTPTransport):
    """Loopback, but for one row at which something breaks that no one thought of."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if b"bug" in await request.aread():
            raise ZeroDivisionError("with upstream-key in its text")
        return await super().handle_async_request(request)


async def test_what_nobody_foresaw_costs_its_row(site, endpoint, caplog):
    """E1 of FAULTS: any exception in one row's task ended the calls of all others."""
    batch_id = site.create(b"".join(map(row, [*NEIGHBOURS, "bug"])))
    async with site.working(Bug()):
        lines = site.lines(await site.end(batch_id))
    assert outcome(lines.pop("bug")) == (500, "internal_error")
    assert {outcome(line) for line in lines.values()} == {(200, None)}
    assert endpoint.asked == dict.fromkeys(NEIGHBOURS, 1)
    assert "upstream-key" not in json.dumps(lines)
    assert ["ZeroDivisionError" in str(record.exc_info) for record in caplog.records] == [True]


async def test_batches_that_cannot_go_on_leave_their_places_to_others(site, endpoint):
    """E1 of FAULTS: eight batches that stopped were begun again at once, and no ninth ever."""
    for name in range(module.BATCHES_AT_ONCE):
        batch = load(site.app.store, site.create(row(f"lost-{name}")))
        assert batch
        validate(site.app.store, batch)
        site.app.store.blob(batch.input_file_id).unlink()
    batch_id = site.create(row("neighbour"))
    async with site.working():
        assert (await site.end(batch_id))["status"] == "completed"
    assert endpoint.asked == {"neighbour": 1}


async def test_answers_outlast_a_database_that_fails(site, endpoint, caplog):
    """E1 of FAULTS: rows whose answers could not be recorded at once were asked, and paid for, again."""
    endpoint.gate.clear()
    batch_id = site.create(b"".join(map(row, NEIGHBOURS[:4])))
    async with site.working():
        await until_true(lambda: endpoint.asked.total() == 4)
        with contextlib.closing(sqlite3.connect(site.app.store.path, isolation_level=None)) as database:
            database.execute("ALTER TABLE batches RENAME TO away")
            endpoint.gate.set()
            for said in ("cannot record row", "cannot read batch", "cannot read the database"):
                await until_true(lambda said=said: said in caplog.text)
            database.execute("ALTER TABLE away RENAME TO batches")
        batch = await site.end(batch_id)
    assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert endpoint.asked == dict.fromkeys(NEIGHBOURS[:4], 1)


class TornFile:
    """An input whose first line is read, and then the disk fails, once that row is at the endpoint."""

    def __init__(self, first: bytes, endpoint: Endpoint) -> None:
        self.first, self.endpoint = first, endpoint
        self.failed = threading.Event()

    def open(self, _: str) -> "TornFile":
        return self

    def __enter__(self) -> Iterator[bytes]:
        yield self.first
        while not self.endpoint.asked:
            time.sleep(0.01)
        self.failed.set()
        raise OSError(errno.EIO, "Input/output error")

    def __exit__(self, *_: object) -> None: ...


async def test_input_that_cannot_be_read_further_leaves_the_calls_under_way(site, endpoint, monkeypatch):
    """E1 of FAULTS: an error of the disk in mid-batch ended calls that were being paid for."""
    monkeypatch.setattr(module, "ROWS_AHEAD", 1)
    endpoint.gate.clear()
    batch_id = site.create(row("a") + row("b"))
    batch = load(site.app.store, batch_id)
    assert batch
    validate(site.app.store, batch)
    torn = TornFile(row("a"), endpoint)
    blob = site.app.store.blob
    monkeypatch.setattr(site.app.store, "blob", lambda name: blob(name) if torn.failed.is_set() else torn)
    async with site.working():
        await until_true(torn.failed.is_set)
        endpoint.gate.set()
        done = await site.end(batch_id)
    assert endpoint.asked == {"a": 1, "b": 1}
    assert done["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


def test_answers_of_an_earlier_release_cost_at_most_their_rows(site, caplog):
    """E1 of FAULTS: no answer in the database, NaN or deep, keeps its batch from ending."""
    batch_id = site.create(row("NaN") + row("deep") + row("fine"))
    batch = load(site.app.store, batch_id)
    assert batch
    validate(site.app.store, batch)
    for number, body in enumerate(['{"a": NaN}', nested(100_000), '{"a": 1}'], 1):
        with site.app.store.write() as connection:
            insert = "INSERT INTO results VALUES (?, ?, 1, ?)"
            connection.execute(insert, (batch_id, number, f"[200, {body}]"))
    site.client.post(f"/batches/{batch_id}/cancel")
    done = ended(site.client, batch_id)
    assert done
    lines = site.lines(done)
    assert {name: outcome(line) for name, line in lines.items()} == {
        "NaN": (500, "unwritable_answer"),
        "deep": (500, "unwritable_answer"),
        "fine": (200, None),
    }
    assert done["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@contextlib.contextmanager
def served(path: Path, base_url: str) -> Iterator[tuple["subprocess.Popen[str]", httpx.Client]]:
    command = [sys.executable, "-m", "anybatch.cli", "serve", "--port", "0", "--db", str(path)]
    command += ["--upstream", base_url, "--concurrency", "4"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        with httpx.Client(base_url=server.stdout.readline().split()[2]) as client:
            yield server, client
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_a_killed_server_pays_for_nothing_twice(tmp_path, endpoint):
    """E1 of FAULTS: after a crash the rows that were answered, or failed for good, are not asked again."""
    endpoint.replies = ANSWERS
    endpoint.gate.clear()
    endpoint.held = {"held"}
    names = [*NEIGHBOURS, *ANSWERS]
    content = b"".join(map(row, [*names, "held"])) + row("NaN", NO_JSON["NaN"])
    deadline = time.monotonic() + 60
    with served(tmp_path / "x.db", endpoint.base_url) as (server, client):
        batch_id = create(client, content)
        counts = {"total": len(names) + 2, "completed": 6, "failed": len(ANSWERS) + 1}
        while client.get(f"/batches/{batch_id}").json()["request_counts"] != counts:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.send_signal(signal.SIGKILL)
        server.wait()
    endpoint.gate.set()
    with served(tmp_path / "x.db", endpoint.base_url) as (_, client):
        while not (batch := ended(client, batch_id)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = result_lines(client, batch)
    assert batch["status"] == "completed"
    assert len(lines) == len(names) + 2
    assert endpoint.asked == dict.fromkeys(names, 1) | {"held": 2}  # its answer was lost with the server
