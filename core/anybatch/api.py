"""The four operations, the results, and a whole job, as functions: each opens a client and closes it.

Their `kwargs` are the provider's own options, and the settings of its account beside key and base URL; what
it does not have is an UnknownOptionError that names what it has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .client import AsyncClient, Client
from .jobs.job import Job, JobInput
from .jobs.options import KeepRequests, OnChanged, OnLost, OnOrphan, OnPartial, OnTimeout, OnUntranslatable
from .jobs.running import OnProgress
from .models import Batch, BatchResult, Page, Report
from .providers import Given, open_provider, split_settings
from .providers.base import DEFAULT_WINDOW
from .providers.keys import hides_key

if TYPE_CHECKING:
    from upath import UPath

    ClientArgs = Mapping[str, Any] | None


@hides_key
def create_batch(
    provider: str,
    input_file_path: str | os.PathLike[str],
    endpoint: str,
    *,
    completion_window: str = DEFAULT_WINDOW,
    metadata: Mapping[str, str] | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """Validate a JSONL file of request lines, upload it, and create one batch of it.

    Raises InputError (with line numbers) and ConfigurationError before anything is sent, APIError for what
    the provider refuses, and CreateOutcomeUnknownError where a batch may exist that cannot be looked up.
    """
    settings, options = split_settings(provider, kwargs)
    with Client(provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings) as client:
        return client.create(
            input_file_path, endpoint, completion_window=completion_window, metadata=metadata, **options
        )


@hides_key
async def acreate_batch(
    provider: str,
    input_file_path: str | os.PathLike[str],
    endpoint: str,
    *,
    completion_window: str = DEFAULT_WINDOW,
    metadata: Mapping[str, str] | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """`create_batch`, awaited."""
    settings, options = split_settings(provider, kwargs)
    async with AsyncClient(
        provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings
    ) as client:
        return await client.create(
            input_file_path, endpoint, completion_window=completion_window, metadata=metadata, **options
        )


@hides_key
def retrieve_batch(
    provider: str,
    batch_id: str,
    *,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """The batch as it stands now."""
    settings, options = split_settings(provider, kwargs)
    with Client(provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings) as client:
        return client.retrieve(batch_id, **options)


@hides_key
async def aretrieve_batch(
    provider: str,
    batch_id: str,
    *,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """`retrieve_batch`, awaited."""
    settings, options = split_settings(provider, kwargs)
    async with AsyncClient(
        provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings
    ) as client:
        return await client.retrieve(batch_id, **options)


@hides_key
def cancel_batch(
    provider: str,
    batch_id: str,
    *,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """Ask the provider to stop a batch; it ends some minutes later, and its finished rows stay available."""
    settings, options = split_settings(provider, kwargs)
    with Client(provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings) as client:
        return client.cancel(batch_id, **options)


@hides_key
async def acancel_batch(
    provider: str,
    batch_id: str,
    *,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Batch:
    """`cancel_batch`, awaited."""
    settings, options = split_settings(provider, kwargs)
    async with AsyncClient(
        provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings
    ) as client:
        return await client.cancel(batch_id, **options)


@hides_key
def list_batches(
    provider: str,
    *,
    after: str | None = None,
    limit: int | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Page:
    """One page of the account's batches, newest first; `after` takes the page before's `next_cursor`."""
    settings, options = split_settings(provider, kwargs)
    with Client(provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings) as client:
        return client.list(after=after, limit=limit, **options)


@hides_key
async def alist_batches(
    provider: str,
    *,
    after: str | None = None,
    limit: int | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> Page:
    """`list_batches`, awaited."""
    settings, options = split_settings(provider, kwargs)
    async with AsyncClient(
        provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings
    ) as client:
        return await client.list(after=after, limit=limit, **options)


@hides_key
def retrieve_batch_results(
    provider: str,
    batch_id: str,
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> BatchResult:
    """All rows of an ended batch: good, failed, expired, cancelled. `Client.results` streams them instead.

    Raises BatchNotCompleteError while the batch is running.
    """
    settings, options = split_settings(provider, kwargs)
    with Client(provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings) as client:
        return BatchResult(list(client.results(batch_id, endpoint=endpoint, **options)))


@hides_key
async def aretrieve_batch_results(
    provider: str,
    batch_id: str,
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    **kwargs: Any,
) -> BatchResult:
    """`retrieve_batch_results`, awaited."""
    settings, options = split_settings(provider, kwargs)
    async with AsyncClient(
        provider, api_key=api_key, api_base=api_base, client_args=client_args, **settings
    ) as client:
        return BatchResult([row async for row in client.results(batch_id, endpoint=endpoint, **options)])


@hides_key
def run_job(
    provider: str,
    input: JobInput,
    output: str | os.PathLike[str] | UPath,
    *,
    endpoint: str = "/v1/chat/completions",
    id: str | None = None,
    model: str | None = None,
    completion_window: str = DEFAULT_WINDOW,
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    on_orphan: OnOrphan = "fail",
    on_changed: OnChanged = "cancel_and_resubmit",
    on_untranslatable: OnUntranslatable = "fail",
    on_lost: OnLost = "fail",
    shard_requests: int | None = None,
    keep_requests: KeepRequests = "until_landed",
    max_rounds: int = 1,
    restart: str | None = None,
    lease: float = 90.0,
    price: tuple[float, float] | None = None,
    timeout: float | None = None,
    on_timeout: OnTimeout = "leave",
    on_partial: OnPartial = "keep",
    max_failed_ratio: float = 1.0,
    on_progress: OnProgress | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    settings: Mapping[str, str] | None = None,
) -> Report:
    """From requests to landed results: submit (once, however often this is called), wait, collect.

    The options are the fields of `Job`, the keywords of `Client.run` and the arguments of `Client`. Raises
    what these raise: ConfigurationError and InputError before anything is sent, DeadlineExceededError when
    `timeout` is over, after which the same call goes on with the same batches, RowsLackingError where results
    have landed that `on_partial` or `max_failed_ratio` does not accept.
    """
    job = Job(
        input=input,
        output=output,
        endpoint=endpoint,
        id=id,
        model=model,
        completion_window=completion_window,
        metadata=metadata or {},
        options=options or {},
        on_orphan=on_orphan,
        on_changed=on_changed,
        on_untranslatable=on_untranslatable,
        on_lost=on_lost,
        shard_requests=shard_requests,
        keep_requests=keep_requests,
        max_rounds=max_rounds,
        restart=restart,
        lease=lease,
        price=price,
    )
    account = open_provider(provider, Given(api_key, api_base, settings or {}))
    with Client(account, client_args=client_args) as client:
        return client.run(
            job,
            timeout=timeout,
            on_timeout=on_timeout,
            on_partial=on_partial,
            max_failed_ratio=max_failed_ratio,
            on_progress=on_progress,
        )


@hides_key
async def arun_job(
    provider: str,
    input: JobInput,
    output: str | os.PathLike[str] | UPath,
    *,
    endpoint: str = "/v1/chat/completions",
    id: str | None = None,
    model: str | None = None,
    completion_window: str = DEFAULT_WINDOW,
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    on_orphan: OnOrphan = "fail",
    on_changed: OnChanged = "cancel_and_resubmit",
    on_untranslatable: OnUntranslatable = "fail",
    on_lost: OnLost = "fail",
    shard_requests: int | None = None,
    keep_requests: KeepRequests = "until_landed",
    max_rounds: int = 1,
    restart: str | None = None,
    lease: float = 90.0,
    price: tuple[float, float] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109  the deadline is the provider's, not the task's
    on_timeout: OnTimeout = "leave",
    on_partial: OnPartial = "keep",
    max_failed_ratio: float = 1.0,
    on_progress: OnProgress | None = None,
    api_key: str | None = None,
    api_base: str | None = None,
    client_args: ClientArgs = None,
    settings: Mapping[str, str] | None = None,
) -> Report:
    """`run_job`, awaited."""
    job = Job(
        input=input,
        output=output,
        endpoint=endpoint,
        id=id,
        model=model,
        completion_window=completion_window,
        metadata=metadata or {},
        options=options or {},
        on_orphan=on_orphan,
        on_changed=on_changed,
        on_untranslatable=on_untranslatable,
        on_lost=on_lost,
        shard_requests=shard_requests,
        keep_requests=keep_requests,
        max_rounds=max_rounds,
        restart=restart,
        lease=lease,
        price=price,
    )
    account = open_provider(provider, Given(api_key, api_base, settings or {}))
    async with AsyncClient(account, client_args=client_args) as client:
        return await client.run(
            job,
            timeout=timeout,
            on_timeout=on_timeout,
            on_partial=on_partial,
            max_failed_ratio=max_failed_ratio,
            on_progress=on_progress,
        )
