"""Client and AsyncClient: thin shells that drive flows over httpx."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from .flow import Flow, T, aperform, perform
from .jobs.collect import collect, ended_batch
from .jobs.job import Job
from .jobs.policies import OnPartial, OnTimeout
from .jobs.running import OnProgress, Run, arun_through, run_through
from .jobs.standing import Standing
from .jobs.submit import resume, stop, submit
from .models import Batch, Page, Report, Row
from .polling.listing import MOST_PAGES, AsyncBatches, Batches
from .polling.registry import get_watcher, watcher_key
from .providers.base import DEFAULT_WINDOW, Provider
from .providers.keys import hides_key
from .retry import RetryPolicy
from .rows.results import iter_rows
from .shell import Shell, deadline_at, for_polling, reading_since

if TYPE_CHECKING:
    import os

    from upath import UPath


class Client(Shell):
    """One account at a provider, its connection pool kept; close it, or use it as a context manager.

    `client_args` go to the httpx client (timeout, proxy, verify, headers, transport, …); `settings` are what
    the provider's account has beside key and base URL, such as a region. The `options` of the calls are the
    provider's own.
    """

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
        transport = None if "transport" in self._given else self.provider.transport()
        try:
            self._http = httpx.Client(**self._http_args(transport))
        except BaseException:  # an argument that httpx refuses
            if transport is not None:
                transport.close()
            raise

    def _run(self, flow: Flow[T], batch_id: str | None = None, retry: RetryPolicy | None = None) -> T:
        return perform(self._told(flow, batch_id), self._http, retry or self.retry)

    def create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str,
        *,
        completion_window: str = DEFAULT_WINDOW,
        metadata: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Batch:
        """Validate a JSONL file, upload it and create one batch of it."""
        return self._run(self._create(input_file_path, endpoint, completion_window, metadata, options))

    def retrieve(self, batch_id: str, **options: Any) -> Batch:
        """The batch as it stands now."""
        return self._run(self.provider.with_options(options).retrieve(batch_id), batch_id)

    def cancel(self, batch_id: str, **options: Any) -> Batch:
        """Ask the provider to stop; rows that are done stay available, where the provider does not throw them
        away with the batch, of which the log warns."""
        return self._run(self.provider.with_options(options).cancel(batch_id), batch_id)

    def list(self, *, after: str | None = None, limit: int | None = None, **options: Any) -> Page:
        """One page of the account's batches, newest first."""
        return self._run(self.provider.list_page(after=after, limit=limit, options=options))

    def iter_batches(
        self, *, since: float | None = None, max_pages: int = MOST_PAGES, **options: Any
    ) -> Batches:
        """The account's batches, newest first, over all pages; the next page is asked for when it is needed.

        It ends where the listing does, after `max_pages`, or at a page that goes back to before `since` (unix
        seconds, with a quarter of an hour for clocks that differ; some of what comes may be older). In the
        end `.reading.is_complete` says whether a batch that did not come does not exist.
        """
        limit = self.provider.list_limit or None
        return Batches(
            lambda after: self.list(after=after, limit=limit, **options), reading_since(since, max_pages)
        )

    def wait(
        self,
        batch_id: str,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Batch:
        """Block until the batch has ended, or raise DeadlineExceededError.

        Failures that may pass (an outage, 429, a lock) are waited out, however long they last; 401, 403, 404
        and other refusals are raised at once. `on_progress` is called with every new status or count.
        """
        provider = self.provider.with_options(options)
        flow = self._wait(provider, batch_id, deadline_at(timeout, deadline), on_progress)
        return self._run(flow, batch_id, for_polling(self.retry))

    def results(self, batch_id: str, *, endpoint: str | None = None, **options: Any) -> Iterator[Row]:
        """The rows of an ended batch, in the provider's order, in constant memory.

        `endpoint` is needed where the batch does not tell it: on Anthropic, "/v1/messages" gives native
        bodies. The files are fetched whole before the first row comes, and again for some minutes where they
        hold fewer rows than the provider counts, so no break can cut the rows short. Raises
        BatchNotCompleteError at once while the batch is running, and ServerError where rows stay lacking.
        """
        provider = self.provider.with_options(options)
        return self._rows(provider, self._run(ended_batch(provider, batch_id), batch_id), endpoint)

    def _rows(self, provider: Provider, batch: Batch, endpoint: str | None) -> Iterator[Row]:
        with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
            paths = self._run(self._fetch(provider, batch, Path(scratch), endpoint), batch.id)
            for path in paths:
                yield from iter_rows(path, provider, endpoint or batch.endpoint)

    def download(self, batch_id: str, directory: str | os.PathLike[str], **options: Any) -> Sequence[Path]:
        """Fetch the results of an ended batch: files of JSON lines that hold what the provider sent."""
        provider = self.provider.with_options(options)
        return self._run(self._download(provider, batch_id, Path(directory)), batch_id)

    def submit(self, job: Job) -> Standing:
        """Begin or re-attach an attempt: see that every row that is to have one has its batch.

        Where the results have landed and nothing is left to submit, there is no batch in what it returns.
        """
        return self._run(submit(job, self.provider))

    def resume(self, job: Job) -> Standing:
        """Go on with a job on record; to be called, by any process, when batches of it have ended.

        Where all have ended and rows are to be submitted again, it submits those in a new round. Once what it
        returns `is_over` there is nothing left to wait for, and `collect` has the results. `Job.input` may be
        `()`.
        """
        return self._run(resume(job, self.provider))

    def stop(self, job: Job) -> Standing:
        """Cancel what runs of a job for good: rows that are not finished are not submitted again.

        Where it has landed already nothing is done. Once its batches have ended `collect` (or `run`) lands
        what was finished, and the other rows as `cancelled`. Can be repeated. To submit those rows after all:
        once it has landed, with a higher `Job.max_rounds`, or at any time the whole input with `Job.restart`.
        `Job.input` may be `()`.
        """
        return self._run(stop(job, self.provider))

    def collect(self, job: Job) -> Report:
        """Land the results of a job whose batches have ended; at no cost if they have landed already."""
        return self._run(collect(job, self.provider))

    def land_batches(
        self,
        batch_ids: str | Iterable[str],
        folder: str | os.PathLike[str] | UPath,
        *,
        endpoint: str | None = None,
        id: str | None = None,
        price: tuple[float, float] | None = None,
        **options: Any,
    ) -> Report:
        """Land the rows of ended batches that no job has made, as results.jsonl and report.json.

        Batch after batch, each in the provider's order; a row that its files do not mention is counted and
        has no line. What an earlier call has landed in the folder is replaced, once every download has come
        to its end. `endpoint` is needed where the batches do not tell it (see `results`), `id` is the name in
        the report, `price` as on `Job`. Raises BatchNotCompleteError while one is running, BatchFailedError
        where one was refused as a whole, ConfigurationError where the folder is a job's.
        """
        provider = self.provider.with_options(options)
        return self._run(self._land_batches(provider, batch_ids, folder, endpoint, id, price))

    def run(
        self,
        job: Job,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        on_timeout: OnTimeout = "leave",
        on_partial: OnPartial = "keep",
        max_failed_ratio: float = 1.0,
        on_progress: OnProgress | None = None,
    ) -> Report:
        """Submit, wait, collect: from requests to landed results, however many rounds that takes.

        `timeout` is in seconds from now, `deadline` in unix seconds. At that time `on_timeout` says what
        becomes of batches that still run: "leave" and "cancel" raise DeadlineExceededError, and the next run
        takes up what there is; "land_partial" stops the job, and what was finished lands. RowsLackingError
        where, once all has landed, rows have no result: any at all with on_partial="fail", or a larger share
        than `max_failed_ratio`.
        """
        run = Run(job, deadline_at(timeout, deadline), on_timeout, on_partial, max_failed_ratio)
        return run_through(self, run, self.provider.poll_seconds[0], on_progress)

    def check(self) -> str:
        """One cheap call that needs the key: a sentence on success, the error otherwise."""
        return self._run(self._check())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(Shell):
    """`Client`, awaited. Nothing in it blocks the event loop."""

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
        transport = None if "transport" in self._given else self.provider.atransport()
        try:
            self._http = httpx.AsyncClient(**self._http_args(transport))
        except BaseException:
            # httpx has no way to close an asynchronous transport without a loop; those that open something
            # when they are made, as that of `local`, can also be closed like a synchronous one.
            if isinstance(transport, httpx.BaseTransport):
                transport.close()
            raise

    async def _run(self, flow: Flow[T], batch_id: str | None = None, retry: RetryPolicy | None = None) -> T:
        return await aperform(self._told(flow, batch_id), self._http, retry or self.retry)

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
        """See `Client.wait`. In one event loop, all waits of an account (and its client_args) share polls."""
        until = deadline_at(timeout, deadline)
        # A transport of the caller's own may close before the others' waits end, and options are one batch's.
        if "transport" in self._given or options:
            flow = self._wait(self.provider.with_options(options), batch_id, until, on_progress)
            return await self._run(flow, batch_id, for_polling(self.retry))
        watcher = get_watcher(watcher_key(self.account.key, self._given), self._poller)
        return await watcher.wait(batch_id, deadline=until, on_progress=on_progress)

    def _poller(self) -> AsyncClient:
        return AsyncClient(self.provider, client_args=self._given, retry=for_polling(RetryPolicy()))

    async def results(
        self, batch_id: str, *, endpoint: str | None = None, **options: Any
    ) -> AsyncIterator[Row]:
        """See `Client.results`; nothing is asked, and nothing raised, before the first row is awaited."""
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
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
