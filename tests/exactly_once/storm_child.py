"""A process that forks attempts at a job out in the storm, as `child` does for exact points.

An attempt ends by itself within ALARM seconds. Once it has ended its number stays taken until the next order
comes, so that whoever kills it a moment too late kills nobody else.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx

from tests.exactly_once.child import TLS, Points, warm_up
from tests.exactly_once.stage import LOOKS, POLL
from tests.exactly_once.weather import Gust, StormyTransport, Strike, Weather

if TYPE_CHECKING:
    from anybatch.providers.base import Provider

ALARM = 60  # seconds
PATIENCE = 40.0  # seconds that a job is waited for: it ends before the alarm


def attempt(order: dict[str, Any]) -> None:
    """Run the job, as far as `verb` says: submit, or run to the end."""
    from anybatch import AsyncClient, Client, Job, RetryPolicy, get_provider
    from anybatch.jobs import lost
    from anybatch.jobs import shard as shards
    from anybatch.providers import finding
    from anybatch.rows import downloads

    finding.ASK_AFTER, shards._LEASE_POLL, shards._WRITE_TIME = LOOKS, POLL, POLL
    downloads.PAUSES, downloads.SETTLING, downloads.DOUBT = (POLL,), 8.0, 0.5
    lost.LOOK_EVERY, lost.GONE_AFTER = POLL, 2.0
    provider = get_provider(order["provider"], api_key=order["key"], api_base=order["api_base"])
    # Small pages, so that a listing has several.
    provider.traits = replace(provider.traits, poll_seconds=(0.05, 0.05), list_limit=2)
    job = Job(**order["job"])
    args: dict[str, Any] = {
        "client_args": {"verify": TLS, "timeout": 10.0, **_transport(provider, order)},
        "retry": RetryPolicy(attempts=4, first_delay=0.001, longest_delay=0.005),
    }

    async def arun() -> None:
        async with AsyncClient(provider, **args) as client:
            if order["verb"] == "submit":
                await client.submit(job)
            else:
                await client.run(job, timeout=PATIENCE)

    if order.get("at"):
        Points(order["root"], order["at"], signal.SIGKILL, None, sqlite=provider.name == "local")
    if order["driver"] == "async":
        asyncio.run(arun())
        return
    with Client(provider, **args) as client:
        client.submit(job) if order["verb"] == "submit" else client.run(job, timeout=PATIENCE)


def _transport(provider: Provider, order: dict[str, Any]) -> dict[str, Any]:
    """The weather of a provider that is inside this process."""
    if (inside := provider.transport()) is None:
        return {}
    seen = os.open(order["seen"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str) -> None:
        os.write(seen, f"{what}\n".encode())

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    weather = Weather(_nothing, Random(order["seed"]), kill, note, calm=set(order["calm"]))
    weather.strike = Strike(**order["strike"]) if order["strike"] else None
    weather.gust = Gust(**order["gust"]) if order["gust"] else None
    return {"transport": StormyTransport(inside, weather)}


def _nothing(request: object) -> Any:
    raise httpx.UnsupportedProtocol("the transport takes this place")


def serve() -> None:
    warm_up()
    before = 0
    for line in sys.stdin:
        order = json.loads(line)
        if before:
            os.waitpid(before, 0)
        before = os.fork()
        if before == 0:
            signal.alarm(ALARM)
            try:
                attempt(order)
            except BaseException as error:
                traceback.print_exc()
                told = {"type": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
                Path(order["error"]).write_text(json.dumps(told))
                os._exit(1)
            os._exit(0)
        print(json.dumps(before), flush=True)
        ended = os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        is_signal = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        how = signal.Signals(ended.si_status).name if is_signal else str(ended.si_status)
        print(json.dumps(how), flush=True)


if __name__ == "__main__":
    serve()
