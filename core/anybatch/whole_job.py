"""A whole job in one call, as functions that open a client and close it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .async_client import AsyncClient
from .client import Client
from .jobs.job import Job, JobInput
from .jobs.options import KeepRequests, OnChanged, OnLost, OnOrphan, OnPartial, OnTimeout, OnUntranslatable
from .jobs.running import OnProgress
from .models import Report
from .providers import AccountOptions, open_provider
from .providers.base import DEFAULT_WINDOW
from .providers.keys import hides_key

if TYPE_CHECKING:
    from upath import UPath

    ClientArgs = Mapping[str, Any] | None


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
    account = open_provider(provider, AccountOptions(api_key, api_base, settings or {}))
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
    account = open_provider(provider, AccountOptions(api_key, api_base, settings or {}))
    async with AsyncClient(account, client_args=client_args) as client:
        return await client.run(
            job,
            timeout=timeout,
            on_timeout=on_timeout,
            on_partial=on_partial,
            max_failed_ratio=max_failed_ratio,
            on_progress=on_progress,
        )
