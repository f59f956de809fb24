"""The base of both clients: the account, the arguments of the HTTP client, the flows that both drive."""

from __future__ import annotations

import functools
import logging
import math
import ssl
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from ._version import __version__
from .errors import AnyBatchError, ConfigurationError, DeadlineExceededError, classify
from .flow import TIMEOUT, Flow, T, do, sleep
from .jobs.collect import ended_batch
from .jobs.folder import JobFolder
from .jobs.foreign import land_batches
from .jobs.running import OnProgress
from .models import Batch, BatchStatus
from .paths import open_path
from .polling.listing import Reading
from .polling.pace import Trouble, before_deadline, next_interval, pause_after
from .providers import get_provider
from .providers.base import NewBatch, Provider
from .providers.content import Content
from .providers.finding import create_once
from .providers.keys import hides_key
from .retry import RetryPolicy
from .rows.downloads import count_rows, fetch
from .rows.planning import make_plan
from .rows.sources import batch_file

if TYPE_CHECKING:
    import os

    from upath import UPath

    from .models import Report
    from .providers.account import Account

log = logging.getLogger(__name__)

_CLIENT_ARGS = (
    "timeout", "proxy", "verify", "cert", "headers", "transport", "limits", "http1", "http2", "trust_env",
    "event_hooks", "mounts",
)  # fmt: skip


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Reading the trust store takes about 40 ms, which blocks an event loop and adds up for a pipeline that
    # opens many clients. By itself httpx reads it for each client.
    return httpx.create_ssl_context()


class Shell:
    """The base of both clients.

    Attributes:
        provider: The account at the provider, with its calls.
        retry: How often requests are repeated.
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
        if isinstance(provider, str):
            provider = get_provider(provider, api_key=api_key, api_base=api_base, **settings)
        elif api_key is not None or api_base is not None or settings:
            raise ConfigurationError(
                "api_key, api_base and settings can be passed only with a provider's name; a provider object "
                "has its own",
                provider=provider.name,
            )
        self.provider = provider
        self.retry = retry or RetryPolicy()
        if unknown := sorted(set(client_args or {}) - set(_CLIENT_ARGS)):
            raise ConfigurationError(
                f"client_args: unknown argument {', '.join(unknown)}; known are {', '.join(_CLIENT_ARGS)}"
            )
        self._client_args = dict(client_args or {})

    def _http_args(self, transport: object) -> dict[str, Any]:
        """Return the arguments of the httpx client; `transport` is the provider's own, if it has one."""
        args: dict[str, Any] = {"timeout": TIMEOUT, "transport": transport, **self._client_args}
        args["headers"] = {
            "user-agent": f"anybatch/{__version__}",
            **(self._client_args.get("headers") or {}),
        }
        if args["transport"] is None and not {"verify", "cert", "trust_env"} & set(self._client_args):
            args["verify"] = _tls_context()
        return args | {"auth": self.provider.auth()}

    @property
    def account(self) -> Account:
        """The account."""
        return self.provider.account

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.account.provider!r}, api_base={self.account.api_base!r})"

    def _with_context(self, flow: Flow[T], batch_id: str | None = None) -> Flow[T]:
        """Run a flow, and add the provider and the batch id to its errors."""
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
            return (yield from create_once(provider, new, file_id, since=since))

    def _wait(
        self, provider: Provider, batch_id: str, deadline: float | None, on_progress: OnProgress | None
    ) -> Flow[Batch]:
        """Poll one batch until it has ended; like the shared poller, continue after temporary failures."""
        first, most = provider.poll_seconds
        since, state, seen = time.time(), "not seen yet", None
        odd: set[str] = set()
        trouble = Trouble()
        while True:
            failure: Exception | None = None
            try:
                batch = yield from provider.retrieve(batch_id)
            except Exception as error:
                if classify(error).wait.ends:
                    raise
                failure = error
                if trouble.lasts(time.time(), calm=2 * most) is not None:
                    log.warning("batch %s: polling fails, still waiting: %s", batch_id, error)
            else:
                since = batch.created_at or since
                state = f"still {batch.raw_status or batch.status}"
                if batch.status is BatchStatus.UNKNOWN and batch.raw_status not in odd:
                    odd.add(batch.raw_status)
                    log.warning(
                        "batch %s: status %r is unknown; it counts as still running",
                        batch_id,
                        batch.raw_status,
                    )
                if on_progress is not None and (now := (batch.status, batch.request_counts)) != seen:
                    seen = now
                    on_progress(batch)
                if batch.status.is_terminal:
                    return batch
            left = deadline - time.time() if deadline is not None else math.inf
            if left <= 0:
                raise DeadlineExceededError(
                    f"batch was {state} at the deadline; it is left running", batch_id=batch_id
                )
            pause = before_deadline(next_interval(time.time() - since, first, most, 0.5), left, first)
            yield from sleep(max(0.05, min(pause_after(failure, pause), left)))

    def _fetch(
        self, provider: Provider, batch: Batch, directory: Path, endpoint: str | None = None
    ) -> Flow[list[Path]]:
        """Download the complete result files of an ended batch; raise if paid results are missing."""
        count = functools.partial(count_rows, provider, endpoint or batch.endpoint)
        fetched = yield from fetch(provider, batch, directory, count)
        if fetched.loss is not None:
            raise fetched.loss
        return fetched.paths

    def _download(self, provider: Provider, batch_id: str, directory: Path) -> Flow[list[Path]]:
        batch = yield from ended_batch(provider, batch_id)
        yield from do(lambda: directory.mkdir(parents=True, exist_ok=True))
        return (yield from self._fetch(provider, batch, directory))

    def _land_batches(
        self,
        provider: Provider,
        batch_ids: str | Iterable[str],
        folder: str | os.PathLike[str] | UPath,
        endpoint: str | None,
        identity: str | None,
        price: tuple[float, float] | None,
    ) -> Flow[Report]:
        ids = [batch_ids] if isinstance(batch_ids, str) else list(batch_ids)
        place = JobFolder(open_path(folder).absolute())
        return (
            yield from land_batches(provider, ids, place, endpoint=endpoint, identity=identity, price=price)
        )

    def _check(self) -> Flow[str]:
        page = yield from self.provider.list_page(after=None, limit=1, options={})
        newest = f"its newest batch is {page[0].id} ({page[0].status})" if page else "it has no batches yet"
        return f"{self.provider.name} at {self.account.api_base} answers with this key; {newest}"


def _one_batch(
    provider: Provider, path: Path, endpoint: str, spooled: Path
) -> tuple[Content, tuple[str, ...]]:
    """Validate the input file of a single batch; return its content and models."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigurationError(f"input_file_path: there is no file {path}") from None
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
            f"{path} has {plan.rows} requests, which do not fit into one batch: at {provider.name} it holds "
            f"{limits.requests} requests and {limits.bytes} bytes. run_job splits an input of any size"
        )
    return plan.shard_content(plan.shards[0]), plan.models


def deadline_at(timeout: float | None, deadline: float | None) -> float | None:
    """Return the deadline in unix seconds, from a timeout or a deadline; None if there is neither."""
    if timeout is not None and deadline is not None:
        raise ConfigurationError("pass timeout (seconds from now) or deadline (unix seconds), not both")
    return time.time() + timeout if timeout is not None else deadline


def reading_since(since: float | None, max_pages: int) -> Reading:
    """Return the reading of a listing back to `since` (unix seconds), or to its end."""
    return Reading(-math.inf if since is None else since, max_pages)


def for_polling(retry: RetryPolicy) -> RetryPolicy:
    """Return a policy with fewer repetitions: a wait polls again anyway, and has a deadline to keep."""
    return replace(retry, attempts=min(retry.attempts, 2))
