"""AIBrix's batch server, which others wrote: anybatch drives it as `openai-compatible`.

It is installed into an environment of its own, since it brings its own versions of many things, and runs with
`--dry-run`: its own scheduler, storage and HTTP API, with a stand-in where the model would be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from anybatch import BatchStatus, Client, Job, Outcome, build_requests

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".build" / "aibrix"
PINS = Path(__file__).with_name("aibrix-constraints.txt")
ROWS = 2_000

pytestmark = pytest.mark.deployment


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a running AIBrix metadata service."""
    program = VENV / "bin" / "aibrix_metadata"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
        uv = Path(sys.executable).with_name("uv")
        install = [
            uv,
            "pip",
            "install",
            "-q",
            "--system-certs",
            "--python",
            VENV / "bin/python",
            "-c",
            PINS,
            "aibrix",
        ]
        subprocess.run(install, check=True)
    port, folder = free_port(), tmp_path_factory.mktemp("aibrix")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--host", "127.0.0.1", "--port", str(port), "--dry-run"],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            base = f"http://127.0.0.1:{port}/v1"
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"{base}/batches")
                    break
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
            yield base
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


def test_a_foreign_server_runs_a_job_of_two_thousand_rows(server: str, tmp_path: Path) -> None:
    table = [{"id": f"row-{number}", "text": f"sentence number {number}"} for number in range(ROWS)]
    requests = list(build_requests(table, "Repeat: {text}", model="mock", id_column="id"))
    seen: list[BatchStatus] = []
    with Client("openai-compatible", api_base=server) as client:
        client.provider.poll_seconds = (1.0, 2.0)
        report = client.run(
            Job(input=requests, output=tmp_path / "job", metadata={"purpose": "test"}),
            timeout=200,
            on_progress=lambda batch: seen.append(batch.status),
        )
        assert report.counts[Outcome.SUCCEEDED] == ROWS
        assert BatchStatus.UNKNOWN not in seen
        (record,) = report.batches
        batch = client.retrieve(record.id)
        assert (batch.metadata or {})["purpose"] == "test"
        assert record.id in {listed.id for listed in client.list(limit=10)}
        ids = [row.custom_id for row in client.results(record.id)]
    assert sorted(ids) == sorted(row["id"] for row in table)


def test_a_foreign_server_cancels(server: str, tmp_path: Path) -> None:
    requests = list(build_requests([{"n": n} for n in range(500)], "Say {n}", model="mock"))
    with Client("openai-compatible", api_base=server) as client:
        client.provider.poll_seconds = (0.5, 1.0)
        job = Job(input=requests, output=tmp_path / "job")
        (batch,) = client.submit(job)
        client.cancel(batch.id)
        ended = client.wait(batch.id, timeout=120)
        assert ended.status is BatchStatus.CANCELLED
        report = client.collect(job)
    assert sum(report.counts.values()) == 500
    assert report.counts[Outcome.CANCELLED] > 0
