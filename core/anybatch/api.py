"""The four batch operations, the results, and a whole job, as functions that open a client and close it.

`kwargs` are the provider's own options and the account's other settings; an unknown one raises
UnknownOptionError, which names the known ones. All functions share the arguments `api_key` (by default from
the provider's environment variable), `api_base` (by default the provider's own) and `client_args` (arguments
for the httpx client).
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

    Args:
        provider: The provider's name.
        input_file_path: The local file of request lines.
        endpoint: The endpoint of every request.
        completion_window: How long the provider may take.
        metadata: Strings to put on the batch.
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        kwargs: The provider's own options for the create, and the account's other settings.

    Returns:
        The batch.

    Raises:
        InputError: Lines are invalid (with their numbers); nothing was sent.
        ConfigurationError: An argument is invalid; nothing was sent.
        APIError: The provider refused the upload or the create, or did not answer.
        CreateOutcomeUnknownError: A batch may exist that cannot be looked up.
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
    """The asynchronous `create_batch`, with the same arguments."""
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
    """Retrieve a batch.

    Args:
        provider: The provider's name.
        batch_id: The batch's id.
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        kwargs: The provider's own options, and the account's other settings.

    Returns:
        The batch as it is now.

    Raises:
        NotFoundError: There is no such batch in this account.
        APIError: The call failed for another reason.
    """
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
    """The asynchronous `retrieve_batch`, with the same arguments."""
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
    """Cancel a batch. It ends some minutes later, and its finished rows keep their results.

    With a few providers a cancel deletes those results; the log warns of that.

    Args:
        provider: The provider's name.
        batch_id: The batch's id.
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        kwargs: The provider's own options, and the account's other settings.

    Returns:
        The batch, which may still be cancelling; a batch that has ended is returned unchanged.

    Raises:
        ConfigurationError: The provider cannot cancel batches.
        NotFoundError: There is no such batch in this account.
        APIError: The call failed for another reason.
    """
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
    """The asynchronous `cancel_batch`, with the same arguments."""
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
    """List one page of the account's batches, newest first.

    Args:
        provider: The provider's name.
        after: The `next_cursor` of the page before; None for the first page.
        limit: The most batches in the page; None for the provider's default.
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        kwargs: The provider's own options, and the account's other settings.

    Returns:
        The page.

    Raises:
        APIError: The call failed.
    """
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
    """The asynchronous `list_batches`, with the same arguments."""
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
    """Download all rows of an ended batch, whatever their outcome; `Client.results` streams them instead.

    Args:
        provider: The provider's name.
        batch_id: The batch's id.
        endpoint: The batch's endpoint, if the provider does not report it (Anthropic).
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        kwargs: The provider's own options, and the account's other settings.

    Returns:
        The rows, in the provider's order.

    Raises:
        BatchNotCompleteError: The batch is still running.
        BatchFailedError: The provider refused the batch as a whole.
        ServerError: The result files stayed incomplete.
        APIError: The call failed for another reason.
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
    """The asynchronous `retrieve_batch_results`, with the same arguments."""
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
    """Run a whole job: submit it, wait for it, land its results.

    However often this is called, it pays for each row only once: a later call continues with the same
    batches, or returns the report of the landed results.

    Args:
        provider: The provider's name.
        input: The request lines; see `Job`, also for all options down to `price`.
        output: The job's own folder, for its ledger, results and report.
        endpoint: The endpoint of every request.
        id: The job's identity; by default the location of `output`.
        model: The model of every request whose body names none.
        completion_window: How long the provider may take.
        metadata: Strings to put on every batch.
        options: The provider's own options for creating a batch.
        on_orphan: What to do if a batch may exist that cannot be looked up.
        on_changed: What to do if the job was submitted before with other input or options.
        on_untranslatable: What to do with a parameter that the provider's API does not have.
        on_lost: What to do if the provider has lost results.
        shard_requests: The most requests in one batch.
        keep_requests: How long requests that were passed as objects stay in the folder.
        max_rounds: How often a row may be submitted.
        restart: Any text; each new text submits the input once more.
        lease: Seconds for which a create that another attempt has begun is left to that attempt.
        price: USD per million input tokens and per million output tokens.
        timeout: Seconds to wait, from now; None waits without a limit.
        on_timeout: What to do then with batches that still run; see `Client.run`.
        on_partial: What to do if rows have no result after the last round.
        max_failed_ratio: The accepted share of rows without a result.
        on_progress: Called with the batch whenever its status or counts change.
        api_key: The API key.
        api_base: The base URL.
        client_args: Arguments for the httpx client.
        settings: The account's other settings, such as a region.

    Returns:
        The report of the landed results.

    Raises:
        ConfigurationError: An argument is invalid; nothing was sent.
        InputError: Request lines are invalid; nothing was sent.
        DeadlineExceededError: `timeout` is over; call this again to continue with the same batches.
        RowsLackingError: The results have landed, but too many rows have no result.
        JobError: The job cannot continue by itself; the message says what to do.
        APIError: The provider refused a call, or did not answer.
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
    """The asynchronous `run_job`, with the same arguments."""
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
