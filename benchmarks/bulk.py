"""Large inputs: validate, split and upload; download, decode and merge; each next to its floor.

`bulk` is 50,000 rows of 4,000 bytes in 5 shards, `scale` 2,000,000 rows of 400 bytes in 40.

The floor is the least that any implementation has to do, measured in the same run: read the same bytes from
disk, parse each line once with the fastest parser there is (orjson), and move the bytes once over loopback to
the same server with plain sockets. Each runs in a process of its own, so that its peak memory is its own;
memory is counted above what the imports take.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson

CHAT = "/v1/chat/completions"
MEMORY_LIMIT = 80.0  # MB above import


@dataclass(frozen=True)
class Size:
    """How large an input is: rows, bytes of a line, shards; what counts as too slow, times the floor."""

    rows: int
    line: int
    shards: int
    runs: int
    up_limit: float
    down_limit: float

    @property
    def shard_rows(self) -> int:
        return self.rows // self.shards


SIZES = {
    "bulk": Size(50_000, 4_000, 5, runs=3, up_limit=2.0, down_limit=2.0),
    # With short lines the work on each line weighs more than its bytes.
    "scale": Size(2_000_000, 400, 40, runs=1, up_limit=4.2, down_limit=5.2),
}


# --- the server: takes uploads, gives the output files, does nothing else ------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    wbufsize = 1 << 16
    outputs: list[Path]
    size: Size

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        left = int(self.headers["content-length"])
        body = b""
        while left:
            block = self.rfile.read(min(left, 1 << 20))
            left -= len(block)
            body = block if self.path == "/v1/batches" else b""
        if self.path == "/v1/files":
            # Shards are uploaded in order, so the n-th upload is answered by the n-th output file.
            number = next(self.server.numbers)  # type: ignore[attr-defined]
            return self._answer({"id": f"file-{number}", "object": "file"})
        if self.path == "/v1/discard":
            return self._answer({})
        return self._answer(self._batch(json.loads(body)["input_file_id"].removeprefix("file-")))

    def do_GET(self) -> None:
        if self.path.startswith("/v1/batches/"):
            return self._answer(self._batch(self.path.rpartition("-")[2]))
        path = self.outputs[int(self.path.split("/")[3].rpartition("-")[2])]
        self.send_response(200)
        self.send_header("content-length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.sendfile(file)
        return None

    def _batch(self, number: str) -> dict[str, Any]:
        rows = self.size.shard_rows
        return {
            "id": f"batch-{number}",
            "object": "batch",
            "endpoint": CHAT,
            "status": "completed",
            "created_at": int(time.time()),
            "input_file_id": f"file-{number}",
            "output_file_id": f"out-{number}",
            "request_counts": {"total": rows, "completed": rows, "failed": 0},
        }


def serve(size: Size, folder: Path) -> None:
    Handler.size = size
    Handler.outputs = [folder / f"out-{number}.jsonl" for number in range(size.shards)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.numbers = (number % size.shards for number in range(10**6))  # type: ignore[attr-defined]
    print(server.server_port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever(poll_interval=0.05)


# --- the data ------------------------------------------------------------------------------------------


def make_data(size: Size, folder: Path) -> None:
    """Requests of the same length; answers of that length at least, shuffled within their shard."""
    chance = random.Random(7)
    words = ["batch", "größe", "zéro", "data", "naïve", "row", '"quoted"', "line\nbreak", "tab\t", "𝛼"]
    text = " ".join(chance.choice(words) for _ in range(2_000))
    answers: list[bytes] = []

    def fill(line: dict[str, Any], into: dict[str, Any]) -> bytes:
        into["content"] = ""
        room = max(0, size.line - 1 - len(orjson.dumps(line)))
        start = chance.randrange(5000)
        into["content"] = text[start : start + room // 2]
        into["content"] += "." * max(0, size.line - 1 - len(orjson.dumps(line)))
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    with (folder / "in.jsonl").open("wb") as requests:
        for number in range(size.rows):
            custom_id = f"row-{number:07d}"
            message = {"role": "user"}
            body = {"model": "m", "messages": [message]}
            requests.write(
                fill({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}, message)
            )
            reply = {"role": "assistant"}
            usage = {"prompt_tokens": 900, "completion_tokens": 900, "total_tokens": 1800}
            done = {
                "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}], "usage": usage,
            }  # fmt: skip
            response = {"status_code": 200, "request_id": f"req-{number}", "body": done}
            line = {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": None}
            answers.append(fill(line, reply))
            if (number + 1) % size.shard_rows == 0:
                chance.shuffle(answers)
                (folder / f"out-{number // size.shard_rows}.jsonl").write_bytes(b"".join(answers))
                answers.clear()


# --- what is measured, each in a process of its own ----------------------------------------------------


def measured(action: Callable[[], object]) -> None:
    """Print seconds and peak MB above what was there before."""
    before = _memory("VmRSS")
    began = time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    peak = _memory("VmHWM")  # unlike ru_maxrss it does not begin with the parent's
    print(json.dumps({"seconds": seconds, "peak": max(0.0, peak - before)}))


def _memory(what: str) -> float:
    """MB of this process, from /proc."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what))) / 1024


def _client_and_job(size: Size, folder: Path, port: int) -> tuple[Any, Any]:
    import anybatch.jobs.collect
    import anybatch.jobs.submit  # noqa: F401
    from anybatch import Client, Job
    from anybatch.providers.base import Limits

    client = Client("openai-compatible", api_base=f"http://127.0.0.1:{port}/v1", api_key="k")
    client.provider.limits = Limits(requests=size.shard_rows)
    job = Job(input=folder / "in.jsonl", output=folder / "job")
    job.ledger()  # imports what paths need
    return client, job


def up(size: Size, folder: Path, port: int) -> None:
    client, job = _client_and_job(size, folder, port)
    with client:
        measured(lambda: client.submit(job))


def down(size: Size, folder: Path, port: int) -> None:
    client, job = _client_and_job(size, folder, port)
    with client:
        measured(lambda: client.collect(job))
    assert job.report().ok, job.report()


def floor_up(size: Size, folder: Path, port: int) -> None:
    source = folder / "in.jsonl"

    def run() -> None:
        with source.open("rb") as file:
            for line in file:
                orjson.loads(line)
        with socket.create_connection(("127.0.0.1", port)) as peer, source.open("rb") as file:
            head = f"POST /v1/discard HTTP/1.1\r\nhost: x\r\ncontent-length: {source.stat().st_size}\r\n\r\n"
            peer.sendall(head.encode())
            while block := file.read(1 << 16):
                peer.sendall(block)
            peer.recv(1 << 16)

    measured(run)


def floor_down(size: Size, folder: Path, port: int) -> None:
    def run() -> None:
        for number in range(size.shards):
            with socket.create_connection(("127.0.0.1", port)) as peer, tempfile.TemporaryFile() as file:
                peer.sendall(f"GET /v1/files/out-{number}/content HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                left, buffer = -1, b""
                while left:
                    block = peer.recv(1 << 16)
                    if left < 0:
                        buffer += block
                        head, gap, block = buffer.partition(b"\r\n\r\n")
                        if not gap:
                            continue
                        left = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
                    left -= len(block)
                    file.write(block)
                file.seek(0)
                for line in file:
                    orjson.loads(line)

    measured(run)


# --- the run -------------------------------------------------------------------------------------------


def run(name: str = "bulk") -> bool:
    """Measure both ways, print a table, and return whether the limits hold."""
    size = SIZES[name]
    megabytes = size.rows * size.line / 1e6
    best_of = f"; best of {size.runs} runs" if size.runs > 1 else ""
    print(f"{name}: {size.rows:,} rows, {megabytes:,.0f} MB, {size.shards} shards{best_of}", flush=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="anybatch-bench-") as place:
        folder = Path(place)
        make_data(size, folder)
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bulk", name, "serve", place],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            print(f"  {'':30}{'seconds':>10}{'floor':>10}{'ratio':>8}{'peak MB':>10}")
            for label, ours, limit in (
                ("validate + split + upload", "up", size.up_limit),
                ("download + decode + merge", "down", size.down_limit),
            ):
                base = best(name, f"floor_{ours}", place, port)
                found = best(name, ours, place, port)
                ratio = found["seconds"] / base["seconds"]
                ok = ratio <= limit and found["peak"] <= MEMORY_LIMIT
                good &= ok
                print(
                    f"  {label:30}{found['seconds']:10.2f}{base['seconds']:10.2f}{ratio:7.2f}x"
                    f"{found['peak']:10.1f}{'' if ok else '   ABOVE THE LIMIT'}",
                    flush=True,
                )
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(10)
    print(
        f"  limits: {size.up_limit:g}x and {size.down_limit:g}x the floor, {MEMORY_LIMIT:g} MB above import"
    )
    return good


def best(name: str, what: str, folder: str, port: str) -> dict[str, float]:
    """The fastest of some runs, with the highest peak of them all."""
    found = []
    for _ in range(SIZES[name].runs):
        if what == "up":
            subprocess.run(["rm", "-rf", f"{folder}/job"], check=True)
        if what == "down":
            for landed in ("report.json", "results.jsonl"):
                (Path(folder) / "job" / landed).unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.bulk", name, what, folder, port]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {"seconds": min(run["seconds"] for run in found), "peak": max(run["peak"] for run in found)}


if __name__ == "__main__":
    match sys.argv[1:]:
        case [name, "serve", folder]:
            serve(SIZES[name], Path(folder))
        case [name, ("up" | "down" | "floor_up" | "floor_down") as what, folder, port]:
            globals()[what](SIZES[name], Path(folder), int(port))
        case [name]:
            sys.exit(0 if run(name) else 1)
        case _:
            sys.exit(0 if run() else 1)
