"""Ten thousand waiting batches in one event loop: what each costs, and how many calls they make.

`python -m benchmarks.waiting` starts an OpenAI-format server on loopback that takes 100 ms for every answer,
and measures, each in a process of its own:

    shared  the poller of `anybatch.watch` through `AsyncClient`, for two sweeps; the second finds all ended
    traced  the same under tracemalloc, with fewer batches and without measuring time
    naive   the obvious way: one task a batch with its own retrieve loop, all on one AsyncClient. At 200: from
            some hundreds on, httpx's connection pool takes time quadratic in the requests that queue for it
    bare    as many tasks that wait for nothing, and one pass of Python's garbage collector: the floor

The stall is the longest delay of a 1 ms ticker, less the time in which other processes had the CPU. Much of
it is the garbage collector, which walks ten thousand objects of each kind. In all phases, what the imports
loaded is frozen first, since the waits do not cause it. Exits 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Self

from anybatch import AsyncClient, RetryPolicy
from anybatch.polling.watcher import Watcher, get_watcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

WAITING = 10_000
NAIVE = 200
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
        status = "completed" if self.finished or batch_id == WARM else "in_progress"
        created = int(self.born) - self.index.get(batch_id, 0) // 100
        return (
            f'{{"id":"{batch_id}","object":"batch","endpoint":"/v1/chat/completions","errors":null,'
            f'"input_file_id":"file-{batch_id}","completion_window":"24h","status":"{status}",'
            f'"output_file_id":null,"error_file_id":null,"created_at":{created},"in_progress_at":{created},'
            f'"expires_at":{created + 86_400},"finalizing_at":null,"completed_at":null,"failed_at":null,'
            '"expired_at":null,"cancelling_at":null,"cancelled_at":null,"request_counts":{"total":5000,'
            '"completed":0,"failed":0},"metadata":{"anybatch_job":"0123456789abcdef","anybatch_shard":"0"}}'
        )


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
    """Ticks every millisecond, and records its longest delay.

    Also that delay less the wait for a CPU, and the garbage collector's share of it.
    """

    def __init__(self) -> None:
        self.late = self.stall = self.collecting = 0.0
        self._collected = self._began = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()
        gc.callbacks.append(self._on_gc)
        self._task = asyncio.create_task(self._run())
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()
        gc.callbacks.remove(self._on_gc)

    def _on_gc(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self._collected += time.thread_time() - self._began

    async def _run(self) -> None:
        while True:
            self._collected = 0.0
            waited = waiting_for_cpu()  # read first and last, so that no wait for a CPU counts as ours
            last = time.perf_counter()
            await asyncio.sleep(0.001)
            late = time.perf_counter() - last - 0.001
            own = late - (waiting_for_cpu() - waited)
            self.late = max(self.late, late)
            if own > self.stall:
                self.stall, self.collecting = own, self._collected

    def result(self) -> dict[str, float]:
        return {"stall": self.stall, "late": self.late, "collecting": self.collecting}


def waiting_for_cpu() -> float:
    """Seconds this thread has waited for a CPU; 0 if the system does not say."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except OSError:
        return 0.0


def resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def make_watcher(port: int) -> Watcher:
    def make_client() -> AsyncClient:
        base = f"http://127.0.0.1:{port}/v1"
        retry = RetryPolicy(attempts=2)
        return AsyncClient("openai-compatible", api_base=base, api_key="x", retry=retry)

    return get_watcher("benchmark", make_client)


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
    watcher = make_watcher(port)
    await watcher.wait(WARM)
    with Ticker() as ticker:
        before, most = resident(), 0
        deadline = time.time() + 86_400
        tasks = await start(lambda batch_id: watcher.wait(batch_id, deadline=deadline), number)
        while not any(task.done() for task in tasks[:PAGE]):
            most = max(most, resident())
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
    return {"memory": (most - before) / number, **ticker.result()}


async def traced(port: int, number: int) -> dict[str, float]:
    watcher = make_watcher(port)
    await watcher.wait(WARM)
    gc.collect()
    tracemalloc.start()
    deadline = time.time() + 86_400
    tasks = await start(lambda batch_id: watcher.wait(batch_id, deadline=deadline), number)
    listed = 0
    while listed < number / PAGE:
        await asyncio.sleep(0.3)
        listed = (await asyncio.to_thread(control, port, "/stats"))["lists"]
    await asyncio.sleep(1)
    gc.collect()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    await stop(tasks)
    return {"memory": memory / number}


async def naive(port: int, number: int) -> dict[str, float]:
    looked = 0
    all_looked = asyncio.Event()
    client = AsyncClient("openai-compatible", api_base=f"http://127.0.0.1:{port}/v1", api_key="x")

    async def wait(batch_id: str) -> None:
        nonlocal looked
        while not (await client.retrieve(batch_id)).status.is_terminal:
            looked += 1
            if looked == number:
                all_looked.set()
            await asyncio.sleep(15)

    async with client:
        await wait(WARM)
        with Ticker() as ticker:
            before = resident()
            tasks = await start(wait, number)
            await asyncio.wait_for(all_looked.wait(), 30)
            memory = (resident() - before) / number
            await stop(tasks)
    return {"memory": memory, "calls": looked / number, "sweeps": 1, **ticker.result()}


async def bare(port: int, number: int) -> dict[str, float]:
    async def wait(_: str) -> None:
        await asyncio.get_running_loop().create_future()

    with Ticker() as ticker:
        before = resident()
        tasks = await start(wait, number)
        await asyncio.sleep(0.1)
        memory = (resident() - before) / number
        gc.collect()
        await asyncio.sleep(0.1)
        await stop(tasks)
    return {"memory": memory, **ticker.result()}


async def stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


PHASES = {"shared": shared, "traced": traced, "naive": naive, "bare": bare}


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


def measure(port: int) -> dict[str, dict[str, float]]:
    def one_sweep() -> None:
        give_up = time.monotonic() + 40
        while control(port, "/stats")["lists"] < WAITING / PAGE and time.monotonic() < give_up:
            time.sleep(0.1)
        control(port, "/finish")

    found = {"shared": phase(port, "shared", WAITING, one_sweep)}
    stats = control(port, "/stats")
    calls = stats["lists"] + stats["retrieves"] - 1  # one was the warm-up's
    found["shared"] |= {"calls": calls / max(1, stats["sweeps"]) / WAITING, "sweeps": stats["sweeps"]}
    found["traced"] = phase(port, "traced", TRACED)
    found["naive"] = phase(port, "naive", NAIVE)
    found["bare"] = phase(port, "bare", WAITING)
    return found


def table(found: dict[str, dict[str, float]]) -> bool:
    """Print the table; returns whether everything is within the limits."""

    def kilobytes(value: float) -> str:
        return f"{value / 1024:.1f} KB"

    def milliseconds(value: float) -> str:
        return f"{value * 1000:.0f} ms"

    def calls(value: float) -> str:
        return f"{value * WAITING:,.0f} (1 per {1 / value:.0f})"

    shared, naive, bare = found["shared"], found["naive"], found["bare"]

    def of(name: str) -> list[float | None]:
        return [shared.get(name), naive.get(name), bare.get(name)]

    traced = [found["traced"]["memory"], None, None]
    rows: list[tuple[str, Callable[[float], str], list[float | None], float | None]] = [
        ("memory a waiter, resident", kilobytes, of("memory"), MOST_MEMORY),
        (f"memory a waiter, tracemalloc at {TRACED:,}", kilobytes, traced, MOST_MEMORY),
        ("worst loop stall", milliseconds, of("stall"), MOST_STALL),
        ("  of it collecting garbage", milliseconds, of("collecting"), None),
        ("  with the wait for a CPU", milliseconds, of("late"), None),
        ("provider calls a sweep, for 10,000", calls, of("calls"), MOST_CALLS),
        ("sweeps measured", "{:.0f}".format, of("sweeps"), None),
    ]
    lines: list[tuple[str, ...]] = [
        ("", f"anybatch, {WAITING:,}", f"a loop each, {NAIVE}", f"bare tasks, {WAITING:,}", "limit", "")
    ]
    within = True
    for what, form, values, most in rows:
        cells = ("-" if value is None else form(value) for value in values)
        exceeded = most is not None and (values[0] or 0) > most
        within = within and not exceeded
        limit = "" if most is None else f"<= {form(most)}"
        lines.append((what, *cells, limit, "EXCEEDED" if exceeded else ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        padded = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *padded]).rstrip())
    return within


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="10,000 waiting batches in one event loop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(serve())
        return 0
    if options.phase:
        print(json.dumps(asyncio.run(PHASES[options.phase](options.port, options.number))))
        return 0
    with spawn("--serve") as server:
        try:
            assert server.stdout is not None
            within = table(measure(int(server.stdout.readline())))
        finally:
            server.terminate()
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
