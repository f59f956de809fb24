"""Ten thousand waiting batches in one event loop: what each costs, and what they ask of the provider.

`python -m benchmarks.waiting` starts an OpenAI-format server on loopback that takes 100 ms for every answer,
and measures, each in a process of its own: the shared poller of `anybatch.watch` through `AsyncClient`; the
same under tracemalloc; and as baseline the obvious way, one task a batch with its own retrieve loop, at a
smaller number (its cost in calls is one a batch at any number). Exits 1 where a limit is exceeded. The stall
is how late a ticker of 1 ms comes at worst; the machine's own share of it is the one of the idle loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

from anybatch import AsyncClient, RetryPolicy
from anybatch.watch import Watcher, get_watcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

WAITING = 10_000
NAIVE = 1_000
TRACED = 2_000
LATENCY = 0.1
PAGE = 100
WARM = "batch_warm"  # has ended before anything is measured

MOST_MEMORY = 10 * 1024  # bytes a waiter
MOST_STALL = 0.050
MOST_CALLS = 1 / 80  # calls a batch and sweep


# --- the server --------------------------------------------------------------------------------------


class Server(asyncio.Protocol):
    """GET /v1/batches and /v1/batches/{id}, 100 ms each; /reset?n, /finish and /stats at once."""

    ids: tuple[str, ...] = ()
    index: dict[str, int] = {}  # noqa: RUF012  one state for all connections
    born = 0.0
    finished = False
    lists = sweeps = retrieves = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            path, _, query = head.split(b" ", 2)[1].decode().partition("?")
            if path.startswith("/v1/"):
                asyncio.get_running_loop().call_later(LATENCY, self.answer, self.api(path, query))
            else:
                self.answer(self.control(path, query))

    def answer(self, body: str) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write((head + body).encode())

    def control(self, path: str, query: str) -> str:
        state = Server
        if path == "/reset":
            state.ids = tuple(f"batch_{number:032x}" for number in range(int(query)))  # newest first
            state.index = {each: number for number, each in enumerate(state.ids)}
            state.born, state.finished = time.time(), False
            state.lists = state.sweeps = state.retrieves = 0
        state.finished = state.finished or path == "/finish"
        return json.dumps({"lists": state.lists, "sweeps": state.sweeps, "retrieves": state.retrieves})

    def api(self, path: str, query: str) -> str:
        state = Server
        if path != "/v1/batches":
            state.retrieves += 1
            return self.batch(path.rpartition("/")[2])
        after = dict(pair.split("=") for pair in query.split("&")).get("after")
        state.lists += 1
        state.sweeps += after is None
        start = state.index[after] + 1 if after else 0
        page = state.ids[start : start + PAGE]
        more = str(start + PAGE < len(state.ids)).lower()
        data = ",".join(map(self.batch, page))
        return f'{{"object":"list","data":[{data}],"last_id":"{page[-1]}","has_more":{more}}}'

    def batch(self, batch_id: str) -> str:
        ended = self.finished or batch_id == WARM
        created = int(self.born - Server.index.get(batch_id, 0) / 100)
        return json.dumps({
            "id": batch_id, "object": "batch", "endpoint": "/v1/chat/completions", "errors": None,
            "input_file_id": f"file-{batch_id}", "completion_window": "24h",
            "status": "completed" if ended else "in_progress", "output_file_id": None, "error_file_id": None,
            "created_at": created, "in_progress_at": created + 1, "expires_at": created + 86_400,
            "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None,
            "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": 5000, "completed": 0, "failed": 0},
            "metadata": {"anybatch_job": "0123456789abcdef", "anybatch_shard": "0/1"},
        })  # fmt: skip


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def control(port: int, path: str) -> dict[str, int]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer: dict[str, int] = json.load(connection.getresponse())
        return answer


# --- what is measured, each in its own process -------------------------------------------------------


class Ticker:
    """Comes every millisecond; `worst` is how late it was, `busy` how much of that this thread computed."""

    def __init__(self) -> None:
        self.worst = self.busy = 0.0

    async def run(self) -> None:
        last, cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now, now_cpu = time.perf_counter(), time.thread_time()
            if now - last - 0.001 > self.worst:
                self.worst, self.busy = now - last - 0.001, now_cpu - cpu
            last, cpu = now, now_cpu


def resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def watched(port: int) -> tuple[Watcher, Callable[[], Awaitable[object]]]:
    """The account's watcher, and a wait that has warmed up everything once it returns."""

    def make_client() -> AsyncClient:
        base = f"http://127.0.0.1:{port}/v1"
        retry = RetryPolicy(attempts=2)
        return AsyncClient("openai-compatible", api_base=base, api_key="x", retry=retry)

    watcher = get_watcher("benchmark", make_client)
    return watcher, lambda: watcher.wait(WARM)


async def start(waits: Callable[[str], Awaitable[object]], number: int) -> list[asyncio.Task[None]]:
    """One task a batch, begun a hundred at a time, as an orchestrator does."""

    async def one(batch_id: str) -> None:
        await waits(batch_id)

    tasks = []
    for index in range(number):
        tasks.append(asyncio.create_task(one(f"batch_{index:032x}")))
        if index % 100 == 99:
            await asyncio.sleep(0)
    return tasks


async def shared(port: int, number: int) -> dict[str, float]:
    idle = Ticker()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(idle.run(), 1.5)
    watcher, warm_up = await watched(port)
    await warm_up()
    gc.collect()
    before, most, ticker = resident(), 0, Ticker()
    ticking = asyncio.create_task(ticker.run())
    tasks = await start(watcher.wait, number)
    while not any(task.done() for task in tasks[:PAGE]):
        most = max(most, resident())
        await asyncio.sleep(0.1)
    began = time.perf_counter()
    await asyncio.gather(*tasks)
    delivered = time.perf_counter() - began
    ticking.cancel()
    return {
        "memory": (most - before) / number,
        "stall": ticker.worst,
        "busy": ticker.busy,
        "idle": idle.worst,
        "delivered": delivered,
    }


async def traced(port: int, number: int) -> dict[str, float]:
    watcher, warm_up = await watched(port)
    await warm_up()
    gc.collect()
    tracemalloc.start()
    tasks = await start(watcher.wait, number)
    while (await asyncio.to_thread(control, port, "/stats"))["lists"] < number / PAGE:
        await asyncio.sleep(0.2)
    await asyncio.sleep(1)
    gc.collect()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"traced": memory / number}


async def naive(port: int, number: int) -> dict[str, float]:
    looked = 0
    all_looked = asyncio.Event()
    async with AsyncClient(
        "openai-compatible", api_base=f"http://127.0.0.1:{port}/v1", api_key="x"
    ) as client:

        async def wait(batch_id: str) -> None:
            nonlocal looked
            while not (await client.retrieve(batch_id)).status.is_terminal:
                looked += 1
                if looked == number:
                    all_looked.set()
                await asyncio.sleep(15)

        await wait(WARM)
        gc.collect()
        before, ticker = resident(), Ticker()
        ticking = asyncio.create_task(ticker.run())
        tasks = await start(wait, number)
        began = time.perf_counter()
        await asyncio.wait_for(all_looked.wait(), 30)
        sweep = time.perf_counter() - began
        memory = (resident() - before) / number
        for task in (*tasks, ticking):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "memory": memory,
        "stall": ticker.worst,
        "busy": ticker.busy,
        "sweep": sweep,
        "calls": looked / number,
    }


PHASES = {"shared": shared, "traced": traced, "naive": naive}


# --- putting it together -----------------------------------------------------------------------------


def spawn(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.waiting", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def phase(
    port: int, name: str, number: int, meanwhile: Callable[[], None] = lambda: None
) -> dict[str, float]:
    control(port, f"/reset?{number}")
    with spawn("--phase", name, "--port", port, "--number", number) as process:
        try:
            meanwhile()
            output, _ = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise SystemExit(f"benchmark phase {name} failed")
    answer: dict[str, float] = json.loads(output)
    return answer


def measure(port: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    stats: dict[str, int] = {}

    def two_sweeps() -> None:
        give_up = time.monotonic() + 60
        while stats.get("lists", 0) < 2 * WAITING / PAGE and time.monotonic() < give_up:
            time.sleep(0.1)
            stats.update(control(port, "/stats"))
        control(port, "/finish")

    ours = phase(port, "shared", WAITING, two_sweeps)
    calls = stats["lists"] + stats["retrieves"] - 1  # one was the warm-up's
    ours |= {"calls": calls / stats["sweeps"] / WAITING, "sweeps": stats["sweeps"]}
    return ours, phase(port, "traced", TRACED), phase(port, "naive", NAIVE)


def table(ours: dict[str, float], live: dict[str, float], baseline: dict[str, float]) -> bool:
    rows: list[tuple[str, str, str, str, bool]] = []

    def row(what: str, form: Callable[[float], str], mine: float, theirs: float | None, most: float) -> None:
        limited = most < float("inf")
        limit = f"<= {form(most)}" if limited else ""
        rows.append((what, form(mine), "" if theirs is None else form(theirs), limit, mine <= most))

    def kilobytes(value: float) -> str:
        return f"{value / 1024:.1f} KB"

    def milliseconds(value: float) -> str:
        return f"{value * 1000:.1f} ms"

    def per_call(value: float) -> str:
        return f"1 per {1 / value:.0f}"

    endless = float("inf")
    row("memory a waiter, resident", kilobytes, ours["memory"], baseline["memory"], MOST_MEMORY)
    row(f"memory a waiter, tracemalloc ({TRACED:,})", kilobytes, live["traced"], None, MOST_MEMORY)
    row("worst loop stall", milliseconds, ours["stall"], baseline["stall"], MOST_STALL)
    row("  of it computing in this thread", milliseconds, ours["busy"], baseline["busy"], endless)
    row("  worst stall of an idle loop here", milliseconds, ours["idle"], None, endless)
    row("provider calls a batch and sweep", per_call, ours["calls"], baseline["calls"], MOST_CALLS)
    row("provider calls a sweep, for 10,000", "{:,.0f}".format, ours["calls"] * WAITING,
        baseline["calls"] * WAITING, MOST_CALLS * WAITING)  # fmt: skip
    row("sweeps measured", "{:.0f}".format, ours["sweeps"], 1, endless)
    heads = ("", f"anybatch, {WAITING:,} waiting", f"a task each, {NAIVE:,} waiting", "limit", "")
    cells = [heads, *((*texts, "" if ok else "EXCEEDED") for *texts, ok in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        padded = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *padded]).rstrip())
    return all(ok for *_, ok in rows)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description="10,000 waiting batches in one event loop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(serve())
    elif options.phase:
        print(json.dumps(asyncio.run(PHASES[options.phase](options.port, options.number))))
    else:
        with spawn("--serve") as server:
            try:
                assert server.stdout is not None
                within_limits = table(*measure(int(server.stdout.readline())))
            finally:
                server.terminate()
        return 0 if within_limits else 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    os._exit(130)
