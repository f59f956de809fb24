"""The four batch operations and the results, as functions that open a client and close it.

`kwargs` are the provider's own options and the account's other settings; an unknown one raises
UnknownOptionError, which names the known ones. All functions share the arguments `api_key` (by default from
the provider's environment variable), `api_base` (by default the provider's own) and `client_args` (arguments
for the httpx client).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .async_client import AsyncClient
from .client import Client
from .models import Batch, BatchResult, Page
from .providers import split_settings
from .providers.base import DEFAULT_WINDOW
from .providers.keys import hides_key

if TYPE_CHECKING:
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
