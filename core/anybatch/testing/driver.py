"""One set of verbs for both clients: a test is written once, and runs on the blocking one and the other."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import cache, wraps
from typing import Any, Self

import httpx

from ..client import AsyncClient, Client
from ..flow import Flow, T, aperform, perform
from ..jobs.job import Job
from ..models import Report
from ..retry import RetryPolicy

MODES = ("sync", "async")

QUICK = RetryPolicy(first_delay=0.0001, longest_delay=0.001)


@cache
def tls() -> ssl.SSLContext:
    """One context for all clients: making it is most of what opening a client costs."""
    return ssl.create_default_context()


class Driver:
    """A client whose verbs return their results, whether it is the blocking or the asynchronous one."""

    def __init__(self, mode: str, *args: Any, **options: Any) -> None:
        self.mode = mode
        options = {"retry": QUICK, **options}
        self._client_args = {"verify": tls(), **options.get("client_args", {})}
        options["client_args"] = self._client_args
        if mode == "sync":
            self._runner = None
            self.client: Client | AsyncClient = Client(*args, **options)
        else:
            self.client = AsyncClient(*args, **options)
            self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not inspect.ismethod(found):
            return found

        @wraps(found)
        def call(*args: Any, **options: Any) -> Any:
            return finished(found(*args, **options), self._runner)

        return call

    def run_once(self, job: Job, timeout: float) -> Report:
        """A job of one round, whatever becomes of its rows."""
        for batch in self.submit(job):
            self.wait(batch.id, timeout=timeout)
        report: Report = self.collect(job)
        return report

    def perform(self, flow: Flow[T]) -> T:
        """Run a call of the provider that no verb stands for, over a connection of its own."""
        args = {"auth": self.client.provider.auth(), **self._client_args}
        if self._runner is None:
            with httpx.Client(**args) as http:
                return perform(flow, http, QUICK)
        return self._runner.run(_performed(flow, args))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.client, Client):
            self.client.close()
        elif self._runner is not None:
            self._runner.run(self.client.aclose())
            self._runner.close()
            self._runner = None


def finished(value: Any, runner: asyncio.Runner | None) -> Any:
    """The result of a verb: awaited, and as a list where it is an iterator."""
    if isinstance(value, AsyncIterator):
        return _of(runner).run(_collected(value))
    if inspect.iscoroutine(value):
        return _of(runner).run(value)
    return list(value) if isinstance(value, Iterator) else value


def _of(runner: asyncio.Runner | None) -> asyncio.Runner:
    assert runner is not None, "a blocking client returned something to await"
    return runner


async def _performed(flow: Flow[T], args: dict[str, Any]) -> T:
    async with httpx.AsyncClient(**args) as http:
        return await aperform(flow, http, QUICK)


async def _collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]
