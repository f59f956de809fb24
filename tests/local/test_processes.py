"""Several processes on one database: one truth, nothing written twice, nothing lost to a kill."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from anybatch.local import LocalTransport
from anybatch.local.store import Store

POLL = """
import json, sys, time, httpx
from anybatch.local import LocalTransport
path, batch_id, deadline = sys.argv[1], sys.argv[2], time.monotonic() + 60
with httpx.Client(base_url="http://local/v1", transport=LocalTransport(path)) as client:
    seen = []
    while time.monotonic() < deadline:
        batch = client.get(f"/batches/{batch_id}").json()
        if not seen or seen[-1] != batch["status"]:
            seen.append(batch["status"])
        if batch["status"] == "completed":
            break
    print(json.dumps([seen, batch]))
"""

FINALISE = """
import sys, httpx
from pathlib import Path
from anybatch.local import LocalTransport, closing
real, count = closing._answer, 0
def slow(*args):
    global count
    count += 1
    if count == 30:
        Path(sys.argv[3]).touch()
        Path(sys.argv[4]).read_bytes()  # a pipe no one writes to: blocks here until killed
    return real(*args)
closing._answer = slow
with httpx.Client(base_url="http://local/v1", transport=LocalTransport(sys.argv[1])) as client:
    client.get(f"/batches/{sys.argv[2]}")
"""


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def client(tmp_path):
    with httpx.Client(base_url="http://local/v1", transport=LocalTransport(tmp_path / "x.db")) as client:
        yield client


def create(client: httpx.Client, content: bytes) -> str:
    file = client.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return str(client.post("/batches", json=asked).json()["id"])


def lines(client: httpx.Client, batch: dict[str, Any]) -> list[dict[str, Any]]:
    files = [batch["output_file_id"], batch["error_file_id"]]
    texts = [client.get(f"/files/{file_id}/content").content for file_id in files if file_id]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_many_processes_poll_one_batch_and_one_writes_its_results(client, tmp_path, requests):
    batch_id = create(client, requests(1500, "local:echo?delay=3&fail=0.1"))
    command = [sys.executable, "-c", POLL, str(tmp_path / "x.db"), batch_id]
    pollers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    seen = [json.loads(poller.communicate(timeout=90)[0]) for poller in pollers]
    assert [poller.returncode for poller in pollers] == [0] * 6
    for statuses, batch in seen:
        assert batch == seen[0][1]
        order = ["validating", "in_progress", "finalizing", "completed"]
        assert statuses == sorted(statuses, key=order.index)
    rows = lines(client, seen[0][1])
    assert len(rows) == len({row["custom_id"] for row in rows}) == 1500
    assert {file["purpose"] for file in client.get("/files").json()["data"]} == {"batch", "batch_output"}
    assert len(client.get("/files").json()["data"]) == 3
    assert len(list((tmp_path / "x.db.files").glob("file-*"))) == 3


def test_many_threads_create_and_poll(client, requests):
    content = requests(20, "local:echo?delay=0.2")

    def job(_: int) -> dict[str, Any]:
        batch_id = create(client, content)
        batch: dict[str, Any] = {}
        until(
            lambda: (
                bool(batch.update(client.get(f"/batches/{batch_id}").json()))
                or batch["status"] == "completed"
            )
        )
        return batch

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(job, range(24)))
    assert all(len(lines(client, batch)) == 20 for batch in done)
    assert len(client.get("/batches", params={"limit": 100}).json()["data"]) == 24


def test_a_process_killed_while_finalising_loses_nothing(client, tmp_path, requests):
    batch_id = create(client, requests(200, "local:echo?delay=0"))
    mark, pipe = tmp_path / "reached", tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", FINALISE, str(tmp_path / "x.db"), batch_id, str(mark), str(pipe)]
    victim = subprocess.Popen(command)
    until(mark.exists)
    assert client.get(f"/batches/{batch_id}").json()["status"] == "finalizing"  # claimed by the victim
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    batch = client.get(f"/batches/{batch_id}").json()
    assert batch["status"] == "completed"
    rows = lines(client, batch)
    assert len(rows) == len({row["custom_id"] for row in rows}) == 200


def test_what_a_killed_process_left_is_swept_a_day_later(tmp_path, requests):
    path = tmp_path / "x.db"
    with httpx.Client(base_url="http://local/v1", transport=LocalTransport(path)) as client:
        kept = client.post("/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "batch"}).json()[
            "id"
        ]
    folder = tmp_path / "x.db.files"
    for name, age in (("file-old", 2), ("file-new", 0), (kept, 2), ("batch_x.lock", 2)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age * 86400,) * 2)
    LocalTransport(path).close()
    assert {entry.name for entry in folder.iterdir()} == {"file-new", kept, "batch_x.lock", "open.lock"}


def test_a_forked_child_uses_a_connection_of_its_own(tmp_path, requests):
    transport = LocalTransport(tmp_path / "x.db")
    client = httpx.Client(base_url="http://local/v1", transport=transport)
    store = transport._app.store
    content = requests(3, "local:echo?delay=0")

    def own() -> tuple[str, bool]:
        status = client.get(f"/batches/{create(client, content)}").json()["status"]
        return status, store._owner == os.getpid()

    assert own() == ("completed", True)  # the parent's connection is open by now
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=lambda: results.put(own())) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=30) for _ in children] == [("completed", True)] * 3
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert own() == ("completed", True)
    assert len(client.get("/batches").json()["data"]) == 5
    client.close()


def test_two_finalisers_that_both_got_through_write_once(client, tmp_path, requests, monkeypatch):
    """The claim is the first guard; the transaction alone must hold as well."""
    batch_id = create(client, requests(300, "local:echo?delay=0"))
    gate = threading.Barrier(4)

    @contextlib.contextmanager
    def everyone(self: Store, name: str):
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(10)
        yield True

    monkeypatch.setattr(Store, "claim", everyone)

    def look(_: int) -> dict[str, Any]:
        with httpx.Client(base_url="http://local/v1", transport=LocalTransport(tmp_path / "x.db")) as own:
            return dict(own.get(f"/batches/{batch_id}").json())

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(look, range(4)))
    assert all(batch == seen[0] for batch in seen)
    assert len(lines(client, seen[0])) == 300
    assert len(list(Path(tmp_path / "x.db.files").glob("file-*"))) == 2
