"""AsyncClient, which drives flows over an `httpx.AsyncClient`."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from .flow import Flow, T, aperform
from .jobs.collect import collect, ended_batch
from .jobs.job import Job
from .jobs.policies import OnPartial, OnTimeout
from .jobs.running import OnProgress, Run, arun_through
from .jobs.standing import Standing
from .jobs.submit import resume, stop, submit
from .models import Batch, Page, Report, Row
from .polling.listing import MOST_PAGES, AsyncBatches
from .polling.registry import get_watcher, watcher_key
from .providers.base import DEFAULT_WINDOW, Provider
from .providers.keys import hides_key
from .retry import RetryPolicy
from .rows.results import iter_rows
from .shell import Shell, deadline_at, for_polling, reading_since

if TYPE_CHECKING:
    import os

    from upath import UPath


class AsyncClient(Shell):
    """The asynchronous `Client`, with the same arguments and methods; it never blocks the event loop."""

    @hides_key
    def __init__(
        self,
        provider: str | Provider,
        *,
        api_key: str | None = None,
        api_base: str | None = None,
        client_args: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        **settings: str | None,
    ) -> None:
        super().__init__(
            provider, api_key=api_key, api_base=api_base, client_args=client_args, retry=retry, **settings
        )
        transport = None if "transport" in self._client_args else self.provider.atransport()
        try:
            self._http = httpx.AsyncClient(**self._http_args(transport))
        except BaseException:
            # An asynchronous transport can be closed only in an event loop. Transports that open something
            # when they are created, such as that of `local`, can also be closed synchronously.
            if isinstance(transport, httpx.BaseTransport):
                transport.close()
            raise

    async def _run(self, flow: Flow[T], batch_id: str | None = None, retry: RetryPolicy | None = None) -> T:
        return await aperform(self._with_context(flow, batch_id), self._http, retry or self.retry)

    async def create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str,
        *,
        completion_window: str = DEFAULT_WINDOW,
        metadata: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Batch:
        """See `Client.create`."""
        return await self._run(self._create(input_file_path, endpoint, completion_window, metadata, options))

    async def retrieve(self, batch_id: str, **options: Any) -> Batch:
        """See `Client.retrieve`."""
        return await self._run(self.provider.with_options(options).retrieve(batch_id), batch_id)

    async def cancel(self, batch_id: str, **options: Any) -> Batch:
        """See `Client.cancel`."""
        return await self._run(self.provider.with_options(options).cancel(batch_id), batch_id)

    async def list(self, *, after: str | None = None, limit: int | None = None, **options: Any) -> Page:
        """See `Client.list`."""
        return await self._run(self.provider.list_page(after=after, limit=limit, options=options))

    def iter_batches(
        self, *, since: float | None = None, max_pages: int = MOST_PAGES, **options: Any
    ) -> AsyncBatches:
        """See `Client.iter_batches`; for `async for`."""
        limit = self.provider.list_limit or None
        return AsyncBatches(
            lambda after: self.list(after=after, limit=limit, **options), reading_since(since, max_pages)
        )

    async def wait(
        self,
        batch_id: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  the deadline is the provider's, not the task's
        deadline: float | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Batch:
        """See `Client.wait`; in one event loop, waits with the same account and client_args share polls."""
        until = deadline_at(timeout, deadline)
        # Do not share the polls with a transport of the user's own, which may close before other waits end,
        # or with options, which apply to one batch.
        if "transport" in self._client_args or options:
            flow = self._wait(self.provider.with_options(options), batch_id, until, on_progress)
            return await self._run(flow, batch_id, for_polling(self.retry))
        watcher = get_watcher(watcher_key(self.account.key, self._client_args), self._poller)
        return await watcher.wait(batch_id, deadline=until, on_progress=on_progress)

    def _poller(self) -> AsyncClient:
        return AsyncClient(self.provider, client_args=self._client_args, retry=for_polling(RetryPolicy()))

    async def results(
        self, batch_id: str, *, endpoint: str | None = None, **options: Any
    ) -> AsyncIterator[Row]:
        """See `Client.results`; no request is sent, and no error raised, before the first row is awaited."""
        provider = self.provider.with_options(options)
        batch = await self._run(ended_batch(provider, batch_id), batch_id)
        with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
            paths = await self._run(self._fetch(provider, batch, Path(scratch), endpoint), batch_id)
            for path in paths:
                for row in iter_rows(path, provider, endpoint or batch.endpoint):
                    yield row

    async def download(
        self, batch_id: str, directory: str | os.PathLike[str], **options: Any
    ) -> Sequence[Path]:
        """See `Client.download`."""
        provider = self.provider.with_options(options)
        return await self._run(self._download(provider, batch_id, Path(directory)), batch_id)

    async def submit(self, job: Job) -> Standing:
        """See `Client.submit`."""
        return await self._run(submit(job, self.provider))

    async def resume(self, job: Job) -> Standing:
        """See `Client.resume`."""
        return await self._run(resume(job, self.provider))

    async def stop(self, job: Job) -> Standing:
        """See `Client.stop`."""
        return await self._run(stop(job, self.provider))

    async def collect(self, job: Job) -> Report:
        """See `Client.collect`."""
        return await self._run(collect(job, self.provider))

    async def land_batches(
        self,
        batch_ids: str | Iterable[str],
        folder: str | os.PathLike[str] | UPath,
        *,
        endpoint: str | None = None,
        id: str | None = None,
        price: tuple[float, float] | None = None,
        **options: Any,
    ) -> Report:
        """See `Client.land_batches`."""
        provider = self.provider.with_options(options)
        return await self._run(self._land_batches(provider, batch_ids, folder, endpoint, id, price))

    async def run(
        self,
        job: Job,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  the deadline is the provider's, not the task's
        deadline: float | None = None,
        on_timeout: OnTimeout = "leave",
        on_partial: OnPartial = "keep",
        max_failed_ratio: float = 1.0,
        on_progress: OnProgress | None = None,
    ) -> Report:
        """See `Client.run`."""
        run = Run(job, deadline_at(timeout, deadline), on_timeout, on_partial, max_failed_ratio)
        return await arun_through(self, run, self.provider.poll_seconds[0], on_progress)

    async def check(self) -> str:
        """See `Client.check`."""
        return await self._run(self._check())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
