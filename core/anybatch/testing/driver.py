"""One interface to both clients, so that a test is written once and runs with each of them."""

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
    """Return one TLS context for all clients: making it is most of the cost of opening a client."""
    return ssl.create_default_context()


class Driver:
    """A client, blocking or asynchronous, whose methods return their results; use it as a context manager.

    Its attributes are those of the client. Iterators come back as lists.

    Args:
        mode: "sync" for `Client`, "async" for `AsyncClient`.
        args: Positional arguments of the client.
        options: Keyword arguments of the client; by default `retry` is `QUICK`.
    """

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
        """Submit a job, wait for its batches, and collect it without another round.

        Args:
            job: The job.
            timeout: Seconds to wait for each batch.

        Returns:
            The report.
        """
        for batch in self.submit(job):
            self.wait(batch.id, timeout=timeout)
        report: Report = self.collect(job)
        return report

    def perform(self, flow: Flow[T]) -> T:
        """Run a flow on a connection of its own, such as a provider's call that the client does not offer.

        Args:
            flow: The flow.

        Returns:
            Its result.
        """
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
    """Return the result of a client's method: awaited, and an iterator as a list."""
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
