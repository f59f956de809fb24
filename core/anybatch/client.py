"""Client and AsyncClient, which drive flows over httpx."""

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
    """A client for one account, with a connection pool; close it, or use it as a context manager.

    Keyword arguments `options` of its methods are the provider's own; an unknown one raises
    UnknownOptionError. Every call may raise APIError.

    Args:
        provider: The provider's name, or an account from `get_provider`.
        api_key: The API key; by default from the provider's environment variable.
        api_base: The base URL; by default the provider's own.
        client_args: Arguments for the httpx client: timeout, proxy, verify, headers, transport and others.
        retry: How often requests are repeated.
        settings: The account's other settings by name, such as a region.

    Raises:
        ConfigurationError: An argument is invalid; MissingKeyError if there is no key, UnknownProviderError
            or UnknownOptionError if a name is unknown.
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
        transport = None if "transport" in self._client_args else self.provider.transport()
        try:
            self._http = httpx.Client(**self._http_args(transport))
        except BaseException:  # httpx has refused an argument: release the provider's transport
            if transport is not None:
                transport.close()
            raise

    def _run(self, flow: Flow[T], batch_id: str | None = None, retry: RetryPolicy | None = None) -> T:
        return perform(self._with_context(flow, batch_id), self._http, retry or self.retry)

    def create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str,
        *,
        completion_window: str = DEFAULT_WINDOW,
        metadata: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Batch:
        """Validate a JSONL file of request lines, upload it, and create one batch of it.

        Args:
            input_file_path: The local file.
            endpoint: The endpoint of every request.
            completion_window: How long the provider may take.
            metadata: Strings to put on the batch.
            options: The provider's own options for the create.

        Returns:
            The batch.

        Raises:
            InputError: Lines are invalid (with their numbers); nothing was sent.
            ConfigurationError: An argument is invalid; nothing was sent.
            CreateOutcomeUnknownError: A batch may exist that cannot be looked up.
        """
        return self._run(self._create(input_file_path, endpoint, completion_window, metadata, options))

    def retrieve(self, batch_id: str, **options: Any) -> Batch:
        """Retrieve a batch.

        Args:
            batch_id: The batch's id.
            options: The provider's own options.

        Returns:
            The batch as it is now.

        Raises:
            NotFoundError: There is no such batch in this account.
        """
        return self._run(self.provider.with_options(options).retrieve(batch_id), batch_id)

    def cancel(self, batch_id: str, **options: Any) -> Batch:
        """Cancel a batch. It ends some minutes later, and its finished rows keep their results.

        With a few providers a cancel deletes those results; the log warns of that.

        Args:
            batch_id: The batch's id.
            options: The provider's own options.

        Returns:
            The batch, which may still be cancelling; a batch that has ended is returned unchanged.

        Raises:
            ConfigurationError: The provider cannot cancel batches.
            NotFoundError: There is no such batch in this account.
        """
        return self._run(self.provider.with_options(options).cancel(batch_id), batch_id)

    def list(self, *, after: str | None = None, limit: int | None = None, **options: Any) -> Page:
        """List one page of the account's batches, newest first.

        Args:
            after: The `next_cursor` of the page before; None for the first page.
            limit: The most batches in the page; None for the provider's default.
            options: The provider's own options.

        Returns:
            The page.
        """
        return self._run(self.provider.list_page(after=after, limit=limit, options=options))

    def iter_batches(
        self, *, since: float | None = None, max_pages: int = MOST_PAGES, **options: Any
    ) -> Batches:
        """Iterate over the account's batches, newest first; each page is requested when it is needed.

        Args:
            since: Stop at the first page with batches created before this time, unix seconds, less 15 minutes
                for clocks that differ. Some of the batches may be older.
            max_pages: Stop after this many pages.
            options: The provider's own options for listings.

        Returns:
            An iterator of batches. At its end, `.reading.is_complete` says whether the listing was complete,
            so that a batch that it did not yield does not exist.
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
        """Wait until a batch has ended. Temporary failures (an outage, 429, a lock) do not end the wait.

        Args:
            batch_id: The batch's id.
            timeout: Seconds to wait, from now; None waits without a limit.
            deadline: When to stop waiting, unix seconds; used instead of `timeout`.
            on_progress: Called with the batch whenever its status or counts change.
            options: The provider's own options.

        Returns:
            The batch, with a terminal status.

        Raises:
            DeadlineExceededError: The batch had not ended in time; it is left running.
            APIError: The provider refused to return the batch (401, 403, 404 and others).
        """
        provider = self.provider.with_options(options)
        flow = self._wait(provider, batch_id, deadline_at(timeout, deadline), on_progress)
        return self._run(flow, batch_id, for_polling(self.retry))

    def results(self, batch_id: str, *, endpoint: str | None = None, **options: Any) -> Iterator[Row]:
        """Stream the rows of an ended batch, in the provider's order and in constant memory.

        Before it yields the first row it downloads the complete files, and repeats that for some minutes
        while they hold fewer rows than the provider counts; so a broken connection never loses rows.

        Args:
            batch_id: The batch's id.
            endpoint: The batch's endpoint, if the provider does not report it: with Anthropic,
                "/v1/messages" yields native bodies.
            options: The provider's own options.

        Returns:
            An iterator of the rows.

        Raises:
            BatchNotCompleteError: The batch is still running.
            BatchFailedError: The provider refused the batch as a whole.
            ServerError: The result files stayed incomplete.
        """
        provider = self.provider.with_options(options)
        return self._rows(provider, self._run(ended_batch(provider, batch_id), batch_id), endpoint)

    def _rows(self, provider: Provider, batch: Batch, endpoint: str | None) -> Iterator[Row]:
        with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
            paths = self._run(self._fetch(provider, batch, Path(scratch), endpoint), batch.id)
            for path in paths:
                yield from iter_rows(path, provider, endpoint or batch.endpoint)

    def download(self, batch_id: str, directory: str | os.PathLike[str], **options: Any) -> Sequence[Path]:
        """Download the results of an ended batch, as the provider sends them.

        Args:
            batch_id: The batch's id.
            directory: The local folder for the files; it is created if necessary.
            options: The provider's own options.

        Returns:
            The files of JSON lines.

        Raises:
            BatchNotCompleteError: The batch is still running.
            BatchFailedError: The provider refused the batch as a whole.
            ServerError: The result files stayed incomplete.
        """
        provider = self.provider.with_options(options)
        return self._run(self._download(provider, batch_id, Path(directory)), batch_id)

    def submit(self, job: Job) -> Standing:
        """Submit a job, or re-attach to its batches if it was submitted before.

        Args:
            job: The job.

        Returns:
            The job's standing: a batch for every shard of the current round, or no batch if the job has
            landed and nothing is left to submit.

        Raises:
            InputError: Request lines are invalid; nothing was sent.
            ConfigurationError: An option is invalid; nothing was sent.
            OrphanError: A batch may exist that cannot be looked up.
            InputChangedError: The job was submitted before with other input, and `on_changed` is "fail".
            LedgerConflictError: The folder belongs to another job, or another attempt has moved the job on.
        """
        return self._run(submit(job, self.provider))

    def resume(self, job: Job) -> Standing:
        """Continue a submitted job; any process may call this when batches of it have ended.

        If all have ended and rows are to be submitted again, it submits those in a new round.

        Args:
            job: The job; its `input` may be `()`.

        Returns:
            The job's standing. Once it `is_over`, there is nothing left to wait for, and `collect` returns
            the report.

        Raises:
            JobError: The job was never submitted, or cannot continue by itself.
        """
        return self._run(resume(job, self.provider))

    def stop(self, job: Job) -> Standing:
        """Stop a job permanently: cancel its running batches, and do not submit unfinished rows again.

        Once the batches have ended, `collect` or `run` lands the finished rows, and the others as
        `cancelled`. To submit those after all, run the landed job with a higher `Job.max_rounds`, or submit
        the whole input again with `Job.restart`. Calling this again is harmless; a job that has landed is
        left as it is.

        Args:
            job: The job; its `input` may be `()`.

        Returns:
            The job's standing.

        Raises:
            JobError: The job was never submitted.
        """
        return self._run(stop(job, self.provider))

    def collect(self, job: Job) -> Report:
        """Land the results of a job whose batches have ended.

        Args:
            job: The job; its `input` may be `()`.

        Returns:
            The report; the existing one if the job has landed before.

        Raises:
            BatchNotCompleteError: A batch is still running.
            BatchFailedError: The provider refused a batch as a whole.
            BatchLostError: The provider has lost results, and `Job.on_lost` is "fail".
            JobError: The job was never submitted, or not completely.
        """
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
        """Land the rows of ended batches that no job has created, as `results.jsonl` and `report.json`.

        The rows come batch after batch, each in the provider's order. A row that is not in the result files
        is counted, but has no line.

        Args:
            batch_ids: One id or several.
            folder: The folder to land in, a path or fsspec URL. What an earlier call has landed there is
                replaced once all downloads are complete.
            endpoint: The batches' endpoint, if the provider does not report it (see `results`).
            id: The name of the job in the report; by default the folder's path.
            price: USD per million input tokens and per million output tokens, if the provider reports no
                cost.
            options: The provider's own options.

        Returns:
            The report.

        Raises:
            BatchNotCompleteError: A batch is still running.
            BatchFailedError: The provider refused a batch as a whole.
            ServerError: Result files stayed incomplete.
            ConfigurationError: There is no batch id, or the folder belongs to a job.
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
        """Run a whole job: submit it, wait for it, land its results, in as many rounds as it takes.

        Args:
            job: The job.
            timeout: Seconds to wait, from now; None waits without a limit.
            deadline: When to stop waiting, unix seconds; used instead of `timeout`.
            on_timeout: What to do then with batches that still run. "leave" leaves them running, and "cancel"
                cancels them; both raise DeadlineExceededError, and the next run continues from there.
                "land_partial" stops the job and lands what was finished.
            on_partial: "fail" accepts no row without a result; "keep" accepts the share of
                `max_failed_ratio`.
            max_failed_ratio: The accepted share of rows without a result, 0 to 1.
            on_progress: Called with the batch whenever its status or counts change.

        Returns:
            The report of the landed results.

        Raises:
            DeadlineExceededError: The job had not ended in time.
            RowsLackingError: The results have landed, but too many rows have no result.
            InputError: Request lines are invalid; nothing was sent.
            JobError: The job cannot continue by itself; the message says what to do.
        """
        run = Run(job, deadline_at(timeout, deadline), on_timeout, on_partial, max_failed_ratio)
        return run_through(self, run, self.provider.poll_seconds[0], on_progress)

    def check(self) -> str:
        """Check base URL and key with one cheap call.

        Returns:
            A sentence for a person that says what was found.

        Raises:
            AuthenticationError: The key is wrong.
        """
        return self._run(self._check())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
