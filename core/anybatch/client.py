"""Client and AsyncClient: thin shells that drive flows over httpx."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import ssl
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from ._version import __version__
from .errors import AnyBatchError, ConfigurationError, DeadlineExceededError, NotFoundError
from .flow import TIMEOUT, Flow, T, aperform, do, perform, sleep
from .jobs.collect import collect, ended_batch
from .jobs.job import Job
from .jobs.policies import Move, OnPartial, OnTimeout
from .jobs.running import Run
from .jobs.standing import Standing
from .jobs.submit import resume, stop, submit
from .models import Batch, BatchStatus, Page, Report, Row
from .polling.pace import Trouble, Verdict, before_deadline, next_interval, pause_after, verdict
from .polling.watcher import get_watcher, watcher_key
from .providers import get_provider
from .providers.account import Account
from .providers.base import DEFAULT_WINDOW, NewBatch, Provider
from .providers.content import Content
from .providers.keys import hides_key
from .retry import RetryPolicy
from .rows.downloads import count_rows, fetch
from .rows.requests import make_plan
from .rows.results import iter_rows
from .rows.sources import batch_file

if TYPE_CHECKING:
    import os

OnProgress = Callable[[Batch], None]

log = logging.getLogger(__name__)

_CLIENT_ARGS = (
    "timeout", "proxy", "verify", "cert", "headers", "transport", "limits", "http1", "http2", "trust_env",
    "event_hooks", "mounts",
)  # fmt: skip


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Reading the trust store takes some 40 ms, which a pipeline that opens many clients would feel, and an
    # event loop more so. httpx shares nothing between clients by itself.
    return httpx.create_ssl_context()


class _Shell:
    """What the two clients share: the account, and the flows that both drive."""

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
        if isinstance(provider, str):
            provider = get_provider(provider, api_key=api_key, api_base=api_base, **settings)
        elif api_key is not None or api_base is not None or settings:
            raise ConfigurationError(
                "api_key, api_base and settings go with a provider's name; a provider object has its own",
                provider=provider.name,
            )
        self.provider = provider
        self.retry = retry or RetryPolicy()
        if unknown := sorted(set(client_args or {}) - set(_CLIENT_ARGS)):
            raise ConfigurationError(
                f"client_args: no {', '.join(unknown)}; there are {', '.join(_CLIENT_ARGS)}"
            )
        self._given = dict(client_args or {})

    def _http_args(self, transport: object) -> dict[str, Any]:
        """What the httpx client is made with; `transport` is the provider's own, if it has one."""
        args: dict[str, Any] = {"timeout": TIMEOUT, "transport": transport, **self._given}
        args["headers"] = {"user-agent": f"anybatch/{__version__}", **(self._given.get("headers") or {})}
        if args["transport"] is None and not {"verify", "cert", "trust_env"} & set(self._given):
            args["verify"] = _tls_context()
        return args | {"auth": self.provider.auth()}

    @property
    def account(self) -> Account:
        return self.provider.account

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.account.provider!r}, api_base={self.account.api_base!r})"

    def _told(self, flow: Flow[T], batch_id: str | None = None) -> Flow[T]:
        """The flow, with errors that say which provider and batch they speak of."""
        try:
            return (yield from flow)
        except AnyBatchError as error:
            error.provider = error.provider or self.provider.name
            error.batch_id = error.batch_id or batch_id
            raise

    def _create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str,
        completion_window: str,
        metadata: Mapping[str, str] | None,
        options: Mapping[str, Any],
    ) -> Flow[Batch]:
        provider = self.provider
        provider.check(endpoint, metadata or {}, options, completion_window)
        with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
            spooled = Path(scratch) / "content.jsonl"
            content, models = yield from do(
                lambda: _one_batch(provider, batch_file(input_file_path), endpoint, spooled)
            )
            key = f"anybatch-{uuid.uuid4().hex}"
            new = NewBatch(content, endpoint, completion_window, metadata or {}, options, models, key)
            since = time.time()
            file_id = yield from provider.upload(new)
            return (yield from provider.create_once(new, file_id, since=since))

    def _wait(
        self, provider: Provider, batch_id: str, deadline: float | None, on_progress: OnProgress | None
    ) -> Flow[Batch]:
        """Look until the batch has ended; as for the shared poller, failures that may pass end no wait."""
        first, most = provider.poll_seconds
        since, stands, seen = time.time(), "not seen yet", None
        odd: set[str] = set()
        trouble = Trouble()
        while True:
            failure: Exception | None = None
            try:
                batch = yield from provider.retrieve(batch_id)
            except Exception as error:
                if verdict(error) in (Verdict.ENDS_ALL, Verdict.ENDS_ONE):
                    raise
                failure = error
                if trouble.lasts(time.time(), calm=2 * most) is not None:
                    log.warning("batch %s: polling fails, still waiting: %s", batch_id, error)
            else:
                since = batch.created_at or since
                stands = f"still {batch.raw_status or batch.status}"
                if batch.status is BatchStatus.UNKNOWN and batch.raw_status not in odd:
                    odd.add(batch.raw_status)
                    log.warning(
                        "batch %s: status %r is not known; taken as still running", batch_id, batch.raw_status
                    )
                if on_progress is not None and (now := (batch.status, batch.request_counts)) != seen:
                    seen = now
                    on_progress(batch)
                if batch.status.is_terminal:
                    return batch
            left = deadline - time.time() if deadline is not None else math.inf
            if left <= 0:
                raise DeadlineExceededError(
                    f"batch was {stands} at the deadline; it is left running", batch_id=batch_id
                )
            pause = before_deadline(next_interval(time.time() - since, first, most, 0.5), left, first)
            yield from sleep(max(0.05, min(pause_after(failure, pause), left)))

    def _fetch(
        self, provider: Provider, batch: Batch, directory: Path, endpoint: str | None = None
    ) -> Flow[list[Path]]:
        """The result files of an ended batch, complete. Raises where what was paid for is not in them."""
        count = functools.partial(count_rows, provider, endpoint or batch.endpoint)
        fetched = yield from fetch(provider, batch, directory, count)
        if fetched.loss is not None:
            raise fetched.loss
        return fetched.paths

    def _download(self, provider: Provider, batch_id: str, directory: Path) -> Flow[list[Path]]:
        batch = yield from ended_batch(provider, batch_id)
        yield from do(lambda: directory.mkdir(parents=True, exist_ok=True))
        return (yield from self._fetch(provider, batch, directory))

    def _check(self) -> Flow[str]:
        page = yield from self.provider.list_page(after=None, limit=1, options={})
        newest = f"its newest batch is {page[0].id} ({page[0].status})" if page else "it has no batches yet"
        return f"{self.provider.name} at {self.account.api_base} answers with this key; {newest}"


def _one_batch(
    provider: Provider, path: Path, endpoint: str, spooled: Path
) -> tuple[Content, tuple[str, ...]]:
    """Validate a file that is to be a single batch."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigurationError(f"no input file at {path}") from None
    with file, spooled.open("wb") as spool:
        plan = make_plan(
            file,
            str(path),
            provider,
            endpoint,
            content=path if provider.codec.verbatim else spooled,
            spool=None if provider.codec.verbatim else spool,
        )
    if len(plan.shards) != 1:
        limits = provider.limits
        raise ConfigurationError(
            f"{path} has {plan.rows} requests; a batch at {provider.name} holds {limits.requests} requests "
            f"and {limits.bytes} bytes. run_job splits an input of any size."
        )
    return plan.shard_content(plan.shards[0]), plan.models


def _deadline(timeout: float | None, deadline: float | None) -> float | None:
    if timeout is not None and deadline is not None:
        raise ConfigurationError("give timeout (seconds from now) or deadline (unix seconds), not both")
    return time.time() + timeout if timeout is not None else deadline


def _pause_after(error: AnyBatchError, provider: Provider) -> float:
    """Seconds before the job is asked for after a wait that was passed over: what answered 404 may be there
    at the next look."""
    return provider.poll_seconds[0] if isinstance(error, NotFoundError) else 0.0


def _polling(retry: RetryPolicy) -> RetryPolicy:
    """For a look at a waiting batch: whoever waits looks again anyhow, but has a deadline."""
    return replace(retry, attempts=min(retry.attempts, 2))


class Client(_Shell):
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
        """Ask the provider to stop; rows that are done stay available."""
        return self._run(self.provider.with_options(options).cancel(batch_id), batch_id)

    def list(self, *, after: str | None = None, limit: int | None = None, **options: Any) -> Page:
        """One page of the account's batches, newest first."""
        return self._run(self.provider.list_page(after=after, limit=limit, options=options))

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
        flow = self._wait(provider, batch_id, _deadline(timeout, deadline), on_progress)
        return self._run(flow, batch_id, _polling(self.retry))

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
        run = Run(job, _deadline(timeout, deadline), on_timeout, on_partial, max_failed_ratio)
        standing = self.submit(job)
        while True:
            match run.next(standing):
                case Move.LAND:
                    return run.judged(self.collect(job))
                case Move.WAIT:
                    standing = self._wait_for_all(run, standing, on_progress)
                case Move.STOP:
                    standing = self.stop(job)
                case Move.CANCEL:
                    for batch in standing.running:
                        self.cancel(batch.id)
                    raise run.late(standing)
                case Move.LEAVE | Move.GIVE_UP:
                    raise run.late(standing)

    def _wait_for_all(self, run: Run, standing: Standing, on_progress: OnProgress | None) -> Standing:
        ended = [batch for batch in standing if batch.status.is_terminal]
        until = run.wait_until(standing)
        for batch in standing.running:
            try:
                ended.append(self.wait(batch.id, deadline=until, on_progress=on_progress))
            except AnyBatchError as error:
                if not run.may_pass_over(error):
                    raise
                time.sleep(_pause_after(error, self.provider))
        after = run.after(standing, ended)
        return self.resume(run.job) if after is None else after

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


class AsyncClient(_Shell):
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
        until = _deadline(timeout, deadline)
        # A transport of the caller's own may close before the others' waits end, and options are one batch's.
        if "transport" in self._given or options:
            flow = self._wait(self.provider.with_options(options), batch_id, until, on_progress)
            return await self._run(flow, batch_id, _polling(self.retry))
        watcher = get_watcher(watcher_key(self.account.key, self._given), self._poller)
        return await watcher.wait(batch_id, deadline=until, on_progress=on_progress)

    def _poller(self) -> AsyncClient:
        return AsyncClient(self.provider, client_args=self._given, retry=_polling(RetryPolicy()))

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
        run = Run(job, _deadline(timeout, deadline), on_timeout, on_partial, max_failed_ratio)
        standing = await self.submit(job)
        while True:
            match run.next(standing):
                case Move.LAND:
                    return run.judged(await self.collect(job))
                case Move.WAIT:
                    standing = await self._wait_for_all(run, standing, on_progress)
                case Move.STOP:
                    standing = await self.stop(job)
                case Move.CANCEL:
                    for batch in standing.running:
                        await self.cancel(batch.id)
                    raise run.late(standing)
                case Move.LEAVE | Move.GIVE_UP:
                    raise run.late(standing)

    async def _wait_for_all(self, run: Run, standing: Standing, on_progress: OnProgress | None) -> Standing:
        until = run.wait_until(standing)

        async def wait(batch: Batch) -> Batch | None:
            try:
                return await self.wait(batch.id, deadline=until, on_progress=on_progress)
            except AnyBatchError as error:
                if not run.may_pass_over(error):
                    raise
                await asyncio.sleep(_pause_after(error, self.provider))
                return None

        try:
            async with asyncio.TaskGroup() as group:
                waits = [group.create_task(wait(batch)) for batch in standing.running]
        except ExceptionGroup as errors:
            # One wait that fails ends the others; callers expect the error itself, as from `Client.run`.
            raise errors.exceptions[0] from None
        ended = [one for one in (task.result() for task in waits) if one is not None]
        before = [batch for batch in standing if batch.status.is_terminal]
        after = run.after(standing, [*before, *ended])
        return await self.resume(run.job) if after is None else after

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
