"""A process that forks others, each of which runs one job and may be killed at an exact point of it.

Started once for many attempts, since importing takes longer than a job does; each is a process of its own,
with a client of its own. Speaks JSON lines: an order comes in, the process id goes out, then how it ended.

Points are counted from 1. Each lies before something that may change what others see: a file under `root` is
opened for writing, renamed, removed or made (audit events), or the local provider gives SQLite a statement (a
profiler's event). Nothing of the product is touched. With `report` the points are written down there.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import ssl
import sys
import tempfile
import traceback
from types import BuiltinFunctionType, FrameType
from typing import Any

TLS = ssl.create_default_context()  # making it is most of what opening a client costs
FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Points:
    """Counts events under `root`, and stops or kills this very process before number `at`."""

    def __init__(self, root: str, at: int, how: signal.Signals, report: str | None, *, sqlite: bool) -> None:
        self.root, self.at, self.how = root, at, how
        self.count = 0
        self.out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if report else None
        sys.addaudithook(self.audited)
        if sqlite:
            sys.setprofile(self.profiled)  # makes all code slow

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILES or not (path := str(arguments[0])).startswith(self.root):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.passed(f"{event} {path.removeprefix(self.root)}")

    def profiled(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "c_call" or not isinstance(argument, BuiltinFunctionType):
            return
        if isinstance(argument.__self__, sqlite3.Connection) and "/local/" in frame.f_code.co_filename:
            self.passed(f"{argument.__name__} in {frame.f_code.co_name}, line {frame.f_lineno}")

    def passed(self, what: str) -> None:
        self.count += 1
        if self.out is not None:
            os.write(self.out, f"{what}\n".encode())
        if self.count == self.at:
            os.kill(os.getpid(), self.how)


def attempt(order: dict[str, Any]) -> None:
    """Run the job, as far as `verb` says: submit, or run to the end."""
    from anybatch import Client, Job, RetryPolicy, get_provider
    from anybatch.jobs import shard as shards
    from anybatch.providers import base, finding

    finding.ASK_AFTER, shards._LEASE_POLL = tuple(order["looks"]), order["poll"]
    provider = get_provider(order["provider"], api_key=order["key"], api_base=order["api_base"])
    provider.poll_seconds, provider.limits = (0.05, 0.05), base.Limits(requests=order["rows"])
    job = Job(**order["job"])
    root, at = order["root"], order.get("at", 0)
    how = signal.Signals[order.get("how", "SIGKILL")]
    if order.get("at_create"):
        before_create(provider, how)
    Points(root, at, how, order.get("report"), sqlite=provider.name == "local")
    retry = RetryPolicy(attempts=4, first_delay=0.001, longest_delay=0.005)
    with Client(provider, retry=retry, client_args={"verify": TLS}) as client:
        client.submit(job) if order["verb"] == "submit" else client.run(job, timeout=60)


def before_create(provider: Any, how: signal.Signals) -> None:
    """Have the process stopped or killed when it is about to send a create: the ledger says so already."""
    creates = type(provider).create.__code__

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is creates:
            sys.setprofile(None)
            os.kill(os.getpid(), how)

    sys.setprofile(called)


def warm_up() -> None:
    """Import and build all that a job needs, by running one."""
    from anybatch import Client, Job, get_provider

    body = {"model": "local:echo?delay=0", "messages": [{"role": "user", "content": "hello"}]}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    with (
        tempfile.TemporaryDirectory() as home,
        Client("local", api_base=f"sqlite://{home}/warm.db") as client,
    ):
        client.run(Job(input=[request], output=f"{home}/out"))
    for name in ("openai", "mistral", "anthropic"):
        get_provider(name, api_key="none")


def serve() -> None:
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            try:
                attempt(order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(json.dumps(process), flush=True)
        while True:
            _, status = os.waitpid(process, os.WUNTRACED)
            print(json.dumps(_how_it_ended(status)), flush=True)
            if not os.WIFSTOPPED(status):
                break


def _how_it_ended(status: int) -> str:
    if os.WIFSTOPPED(status):
        return "stopped"
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(os.WEXITSTATUS(status))


if __name__ == "__main__":
    serve()
