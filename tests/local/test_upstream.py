"""Batches that a real chat endpoint answers, here a scripted one."""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from anybatch.local import App, LocalTransport
from anybatch.local import upstream as module
from anybatch.local.upstream import Upstream, Worker, ask

Answer = Callable[[dict[str, Any], int], httpx.Response]  # (body, how often it was asked before)


class Model:
    """A chat endpoint that counts: how often each prompt came, how many were under way at once."""

    def __init__(self, answer: Answer | None = None, pause: float = 0.0, limit: float = math.inf) -> None:
        self.answer = answer or (lambda body, _: good(body))
        self.pause = pause
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0
        self.limit = limit  # so many are answered, the next ones hang

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://model/v1/chat/completions"
        body = json.loads(await request.aread())
        prompt = body["messages"][0]["content"]
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.pause)
            if self.asked.total() >= self.limit:
                await asyncio.Event().wait()
            before = self.asked[prompt]
            self.asked[prompt] += 1
            return self.answer(body, before)
        finally:
            self.now -= 1


def good(body: dict[str, Any]) -> httpx.Response:
    message = {"role": "assistant", "content": body["messages"][0]["content"].upper()}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return httpx.Response(
        200, json={"model": body["model"], "choices": [{"message": message}], "usage": usage}
    )


class Site:
    """A server's application and database without its port."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.app = App(path, now=clock, upstream=True)
        self.client = httpx.Client(base_url="http://local/v1", transport=_InProcess(self.app))

    @contextlib.asynccontextmanager
    async def working(self, model: Model, concurrency: int = 4) -> AsyncIterator[None]:
        worker = Worker(
            self.app.store,
            Upstream("http://model/v1", key="upstream-key", concurrency=concurrency),
            now=self.app.now,
            transport=httpx.MockTransport(model),
        )
        task = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def create(self, content: bytes, **more: str) -> str:
        file = self.client.post(
            "/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}
        ).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str(self.client.post("/batches", json=asked | more).json()["id"])

    async def reach(self, batch_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while not condition(batch := self.client.get(f"/batches/{batch_id}").json()):  # noqa: ASYNC110  as any client
                await asyncio.sleep(0.01)
        return dict(batch)

    def lines(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        text = self.client.get(f"/files/{file_id}/content").text if file_id else ""
        return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


class _InProcess(LocalTransport):
    def __init__(self, app: App) -> None:
        self._app = app


def ended(batch: dict[str, Any]) -> bool:
    return batch["status"] in ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def site(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY", 0.02)
    site = Site(tmp_path / "x.db", clock)
    yield site
    site.client.close()


async def test_rows_are_answered_by_the_endpoint(site, requests):
    batch_id = site.create(requests(25, "llama"))
    model = Model(pause=0.01)
    async with site.working(model, concurrency=4):
        batch = await site.reach(batch_id, ended)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 25, "completed": 25, "failed": 0}
    assert batch["usage"]["total_tokens"] == 125
    assert model.most == 4
    output = site.lines(batch["output_file_id"])
    said = output["row-3"]["response"]["body"]
    assert (said["model"], said["choices"][0]["message"]["content"]) == ("llama", "PLEASE JUDGE NUMBER 3")
    assert len(output) == 25


async def test_what_may_pass_is_repeated_and_what_will_not_is_not(site, requests):
    def answer(body: dict[str, Any], before: int) -> httpx.Response:
        number = int(body["messages"][0]["content"].split()[-1])
        if number == 1 and before < 3:
            return httpx.Response(429, json={"error": {"message": "slow"}}, headers={"retry-after": "0.01"})
        if number == 2 and before < 2:
            return httpx.Response(503, text="starting", headers={"retry-after": "0"})
        if number == 3:
            return httpx.Response(
                400, json={"error": {"message": "too long", "code": "context_length_exceeded"}}
            )
        if number == 4:
            return httpx.Response(500, text="<html>", headers={"retry-after": "0"})
        if number == 5:
            return httpx.Response(429, json={"error": {"message": "pay", "code": "insufficient_quota"}})
        if number == 6:
            return httpx.Response(200, text="not json")
        return good(body)

    batch_id = site.create(requests(8, "llama"))
    model = Model(answer)
    async with site.working(model):
        batch = await site.reach(batch_id, ended)
    assert batch["request_counts"] == {"total": 8, "completed": 4, "failed": 4}
    errors = site.lines(batch["error_file_id"])
    statuses = {name: line["response"]["status_code"] for name, line in errors.items()}
    assert statuses == {"row-3": 400, "row-4": 500, "row-5": 429, "row-6": 502}
    assert errors["row-3"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert errors["row-4"]["response"]["body"]["error"]["message"]
    times = {name.split()[-1]: count for name, count in model.asked.items()}
    assert times == {"0": 1, "1": 4, "2": 3, "3": 1, "4": module.TRIES, "5": 1, "6": 1, "7": 1}


async def test_a_host_that_is_away_is_waited_for(monkeypatch):
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)

    def host(request: httpx.Request) -> httpx.Response:
        if len(pauses) < 20:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"good": True})

    async with httpx.AsyncClient(transport=httpx.MockTransport(host)) as client:
        assert await ask(client, "http://model/v1/x", {}) == (200, {"good": True})
    assert pauses[0] < 1.1
    assert 20 < max(pauses) <= module.LONGEST_PAUSE


async def test_a_host_that_breaks_off_is_given_up(monkeypatch):
    async def sleep(_: float) -> None: ...

    monkeypatch.setattr(module.asyncio, "sleep", sleep)

    def host(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("too slow")

    async with httpx.AsyncClient(transport=httpx.MockTransport(host)) as client:
        status, body = await ask(client, "http://model/v1/x", {})
    assert status == 504
    assert "too slow" in body["error"]["message"]


async def test_a_restart_continues_where_it_was(site, requests):
    batch_id = site.create(requests(30, "llama"))
    first = Model(pause=0.02)
    async with site.working(first, concurrency=3):
        await site.reach(batch_id, lambda batch: batch["request_counts"]["completed"] >= 9)
    partly = site.client.get(f"/batches/{batch_id}").json()
    assert partly["status"] == "in_progress"
    answered = partly["request_counts"]["completed"]
    second = Model()
    async with site.working(second):
        batch = await site.reach(batch_id, ended)
    assert batch["in_progress_at"] == partly["in_progress_at"]
    assert sum(second.asked.values()) <= 30 - answered
    assert len(site.lines(batch["output_file_id"])) == 30


async def test_cancel_stops_and_keeps_what_is_done(site, requests):
    batch_id = site.create(requests(40, "llama"))
    model = Model(limit=4)
    async with site.working(model, concurrency=2):
        await site.reach(batch_id, lambda batch: batch["request_counts"]["completed"] == 4)
        assert site.client.post(f"/batches/{batch_id}/cancel").json()["status"] == "cancelling"
        batch = await site.reach(batch_id, ended)
        assert model.now == 0
    assert batch["status"] == "cancelled"
    output, errors = site.lines(batch["output_file_id"]), site.lines(batch["error_file_id"])
    assert batch["request_counts"] == {"total": 40, "completed": 4, "failed": 0}
    assert (len(output), len(errors)) == (4, 36)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}


async def test_the_window_is_honoured(site, clock, requests):
    batch_id = site.create(requests(10, "llama"), completion_window="1h")
    async with site.working(Model(limit=2)):
        await site.reach(batch_id, lambda batch: batch["request_counts"]["completed"] == 2)
        clock.time += 3601
        batch = await site.reach(batch_id, ended)
    assert batch["status"] == "expired"
    output, errors = site.lines(batch["output_file_id"]), site.lines(batch["error_file_id"])
    assert (len(output), len(errors)) == (2, 8)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_batch_whose_server_is_gone_still_ends(site, clock, requests, end):
    batch_id = site.create(requests(3, "llama"))
    assert site.client.get(f"/batches/{batch_id}").json()["status"] == "validating"
    if end == "cancelled":
        site.client.post(f"/batches/{batch_id}/cancel")
    else:
        clock.time += 25 * 3600
    batch = site.client.get(f"/batches/{batch_id}").json()
    assert (batch["status"], batch["request_counts"]["total"]) == (end, 3)
    assert len(site.lines(batch["error_file_id"])) == 3


async def test_bad_input_fails_validation_here_too(site, requests):
    batch_id = site.create(requests(2, "llama") + b"{broken\n")
    model = Model()
    async with site.working(model):
        batch = await site.reach(batch_id, ended)
    assert (batch["status"], batch["errors"]["data"][0]["line"]) == ("failed", 3)
    assert not model.asked


async def test_the_stand_in_stays_the_stand_in(site, clock, requests):
    batch_id = site.create(requests(2, "local:echo?delay=1"))
    model = Model()
    async with site.working(model):
        clock.time += 5
        batch = await site.reach(batch_id, ended)
    assert batch["status"] == "completed"
    assert not model.asked


def test_a_served_upstream_end_to_end(tmp_path, requests):
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keys.append(self.headers["authorization"])
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            content = good(body).content
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        command = [
            sys.executable,
            "-m",
            "anybatch.cli",
            "serve",
            "--port",
            "0",
            "--db",
            str(tmp_path / "x.db"),
        ]
        command += [
            "--upstream",
            f"http://127.0.0.1:{endpoint.server_port}/v1",
            "--upstream-key-env",
            "UP_KEY",
        ]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"UP_KEY": "secret"}
        )
        try:
            assert server.stdout is not None
            with openai.OpenAI(base_url=server.stdout.readline().split()[2], api_key="unused") as client:
                file = client.files.create(file=("in.jsonl", requests(20, "llama")), purpose="batch")
                batch = client.batches.create(
                    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
                deadline = time.monotonic() + 30
                while batch.status not in ("completed", "failed", "expired") and time.monotonic() < deadline:
                    time.sleep(0.05)
                    batch = client.batches.retrieve(batch.id)
                assert batch.status == "completed"
                assert batch.output_file_id is not None
                assert len(client.files.content(batch.output_file_id).text.splitlines()) == 20
        finally:
            server.terminate()
            server.communicate(timeout=20)
            endpoint.shutdown()
    assert keys == ["Bearer secret"] * 20
