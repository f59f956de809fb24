"""Faults and records of the fake server and of the fault proxy."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest

from tests.fakes.driving import (
    FIVE,
    broken_download,
    get,
    http,
    serving,
    upload,
)
from tests.fakes.faults import (
    CutBody,
    CutRequest,
    CutResponse,
    Fault,
    ResetAfter,
    ResetBefore,
    Respond,
    Stall,
)
from tests.fakes.forms import FormError, parse_form
from tests.fakes.openai import OpenAIFake
from tests.fakes.proxy import FaultProxy
from tests.fakes.server import CRASHED, FakeServer, Reply, Request

# a reset may be met while reading, or while writing: then what is read is an end without an answer
RESET = (httpx.ReadError, httpx.RemoteProtocolError)


def echo_app(request: Request) -> Reply:
    return Reply.json(
        {"method": request.method, "path": request.path, "size": len(request.body)}, x_seen="yes"
    )


def test_server_records_and_keeps_connections() -> None:
    with FakeServer(echo_app) as server, http(server.url) as client:
        assert client.get("/a%2Fb?x=1&x=2&y=").json() == {"method": "GET", "path": "/a%2Fb", "size": 0}
        chunked = client.post("/b", content=iter([b"one", b"two"]))
        client.post("/b", json={"n": 1}, headers={"X-Mine": "m"})
        assert (chunked.json()["size"], chunked.headers["x-seen"]) == (6, "yes")
        assert server.connections == 1
        assert [str(call) for call in server.calls] == [
            "GET /a%2Fb -> 200",
            "POST /b -> 200",
            "POST /b -> 200",
        ]
        first, last = server.calls[0], server.calls[-1]
        assert first.query == {"x": ["1", "2"], "y": [""]}
        assert first.request.segments == ["a/b"]
        assert (last.json(), last.headers["x-mine"], last.body_size) == ({"n": 1}, "m", 7)
        assert (server.count("POST"), server.count("POST", "/b"), server.count(path="/")) == (2, 2, 0)
        with pytest.raises(AssertionError, match="2 of 3 requests POST /b within 0"):
            server.wait_for("POST", "/b", count=3, timeout=0.01)


@pytest.mark.parametrize(
    ("fault", "error", "handled"),
    [
        (ResetBefore(), RESET, False),
        (ResetAfter(), RESET, True),
        (CutBody(10), httpx.RemoteProtocolError, True),
        (Stall(0.4), httpx.ReadTimeout, True),
    ],
)
def test_server_faults(
    fault: Fault, error: type[Exception] | tuple[type[Exception], ...], handled: bool
) -> None:
    with FakeServer(echo_app) as server, http(server.url, timeout=0.2) as client:
        server.fail("GET|POST", "/b", fault, skip=1)
        client.get("/b")
        client.get("/b/c")
        with pytest.raises(error):
            client.get("/b")
        assert client.get("/b").status_code == 200
        assert server.wait_for("GET", "/b", count=3)[1].handled is handled
        assert server.unused_faults == 0


def test_server_responds_in_the_applications_place() -> None:
    busy = Respond(429, {"error": "slow down"}, {"retry-after": "7"})
    with FakeServer(echo_app) as server:
        server.fail("GET", ".*", busy, times=2)
        replies = [get(server.url) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [429, 429, 200]
        assert (replies[0].json(), replies[0].headers["retry-after"]) == ({"error": "slow down"}, "7")
        assert [call.handled for call in server.calls] == [False, False, True]
        server.fail("GET", ".*", busy)
        server.clear_faults()
        assert get(server.url).status_code == 200


def test_server_cuts_at_the_byte() -> None:
    with FakeServer(lambda _: Reply(200, b"0123456789")) as server:
        server.fail("GET", ".*", CutBody(4))
        assert broken_download(server.url) == b"0123"


def test_server_shows_a_crash_of_the_application() -> None:
    def broken(request: Request) -> Reply:
        raise KeyError("oops")

    server = FakeServer(broken)
    server.__enter__()
    reply = get(server.url)
    assert (reply.status_code, "KeyError: 'oops'" in reply.text) == (CRASHED, True)
    with pytest.raises(ExceptionGroup, match="the fake application crashed"):
        server.__exit__(None, None, None)


def test_server_closes_with_connections_open_and_requests_held() -> None:
    with FakeServer(echo_app) as server:
        server.fail("GET", "/stalled", Stall(60))
        idle, stalled = http(server.url), http(server.url, timeout=0.05)
        with idle, stalled:
            idle.get("/")
            with pytest.raises(httpx.ReadTimeout):
                stalled.get("/stalled")
            server.__exit__(None, None, None)
            with pytest.raises(httpx.TransportError):
                idle.get("/")
        server.__enter__()  # for the end of the with block
        assert get(server.url).status_code == 200


KILLED = """
import json, sys, urllib.request
body = {"input_file_id": sys.argv[3], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
headers = {"authorization": "Bearer " + sys.argv[2], "content-type": "application/json"}
urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/batches", json.dumps(body).encode(), headers))
"""


@pytest.mark.parametrize(("handled", "batches"), [(False, 0), (True, 1)])
def test_hold_lets_a_client_be_killed_exactly_there(handled: bool, batches: int) -> None:
    fake = OpenAIFake()
    with serving(fake) as (server, client):
        file_id = upload(client, *FIVE).json()["id"]
        hold = server.hold("POST", "/v1/batches", handled=handled)
        command = [sys.executable, "-I", "-S", "-c", KILLED, server.api_base, fake.key, file_id]
        with subprocess.Popen(command) as process:
            hold.wait()
            assert len(fake.batches) == batches
            process.send_signal(signal.SIGKILL)
        hold.release()
        assert process.returncode == -signal.SIGKILL
        server.wait_for("POST", "/v1/batches")
        assert len(fake.batches) == 1  # the request had arrived as a whole


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data; boundary=x", b"--y\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb'),
        ("multipart/form-data; boundary=x", b"--x\r\na: b\r\n\r\nc\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x',
        ),
    ],
)
def test_broken_forms_are_refused(kind: str, body: bytes) -> None:
    with pytest.raises(FormError):
        parse_form(kind, body)


@pytest.mark.parametrize(
    ("fault", "error", "forwarded"),
    [
        (ResetBefore(), RESET, 0),
        (ResetAfter(), RESET, 1),
        (CutRequest(40), RESET, 0),
        (CutResponse(0), httpx.RemoteProtocolError, 1),
        (CutResponse(90), httpx.RemoteProtocolError, 1),
        (Stall(0.4), httpx.ReadTimeout, 1),
    ],
)
def test_proxy_faults(
    fault: Fault, error: type[Exception] | tuple[type[Exception], ...], forwarded: int
) -> None:
    with (
        FakeServer(echo_app) as server,
        FaultProxy(server.url + "/v1") as proxy,
        http(proxy.url, timeout=0.2) as client,
    ):
        proxy.fail(r"POST /v1/b\?n=1", fault)
        assert client.get("b").json()["path"] == "/v1/b"
        with pytest.raises(error):
            client.post("b?n=1", content=b"x" * 100_000)
        if forwarded:
            assert server.wait_for("POST", "/v1/b")[0].handled
        assert server.count("POST") == forwarded
        assert client.post("b?n=1", content=iter([b"xy", b"z"])).json()["size"] == 3
        assert (proxy.count(r"POST .*"), proxy.unused_faults) == (2, 0)


def test_proxy_cuts_a_response_in_its_body() -> None:
    with FakeServer(lambda _: Reply(200, b"a" * 300_000)) as server, FaultProxy(server.url) as proxy:
        proxy.fail("GET /", CutResponse(200_000))
        assert 199_000 < len(broken_download(proxy.url)) < 200_000  # less the head
        assert get(proxy.url).content == b"a" * 300_000


def test_proxy_refuses_and_accepts_again() -> None:
    with (
        FakeServer(echo_app) as server,
        FaultProxy(server.url) as proxy,
        http(proxy.url) as client,
    ):
        client.get("/")
        with proxy.refusing():
            for _ in range(2):
                with pytest.raises(httpx.ConnectError):
                    client.get("/")
        assert client.get("/").status_code == 200
        assert server.count() == 2


def test_proxy_holds() -> None:
    fake = OpenAIFake()
    with serving(fake) as (server, client), FaultProxy(server.api_base) as proxy:
        file_id = upload(client, *FIVE).json()["id"]
        hold = proxy.hold("POST /v1/batches", handled=True)
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", KILLED, proxy.url, fake.key, file_id]
        ) as process:
            hold.wait()
            process.kill()
        hold.release()
        assert len(fake.batches) == 1


def test_proxy_passes_chunked_and_unframed_responses() -> None:
    chunked = Reply(200, b"3\r\nabc\r\n0\r\n\r\n", {"transfer-encoding": "chunked"})
    with FakeServer(lambda _: chunked) as server, FaultProxy(server.url) as proxy:
        _without_length(server)
        assert [get(proxy.url).content for _ in range(2)] == [b"abc", b"abc"]


def _without_length(server: FakeServer) -> None:
    """httpx prefers transfer-encoding to the content-length that the server always sends."""
    assert "transfer-encoding" in get(server.url).headers
