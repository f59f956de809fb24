"""The provider interface: an account, its facts (`Traits`), its lines (`Codec`), its calls as flows."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from ..errors import BadRequestError, ConfigurationError, UnknownOptionError
from ..flow import Flow
from .account import Account, resolve_account
from .auth import HeaderAuth, HostAuth
from .codec import Codec, OpenAICodec
from .newbatch import NewBatch, Sought
from .traits import DEFAULT_WINDOW, Cancel, Given, Limits, Lookup, Results, Traits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import httpx

    from ..models import Batch, Page

__all__ = ["DEFAULT_WINDOW", "Limits", "NewBatch", "Provider", "Sought"]

log = logging.getLogger(__name__)

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Provider(ABC):
    """One account at one provider. Subclasses are wire formats; their calls are flows.

    A subclass states its `traits` and its `codec`, and implements the calls; see `docs/providers.md`.

    Attributes:
        traits: The facts about the provider.
        codec: How it writes request lines and result lines.
        options: The call options in force (`with_options`), for retrieve, cancel, results and download.
        account: The account.
    """

    traits: Traits
    codec: Codec = OpenAICodec()

    options: Mapping[str, Any] = _NO_OPTIONS

    def __init__(self, account: Account) -> None:
        self.account = account

    # --- the account -------------------------------------------------------------------------------

    @classmethod
    def traits_of(cls, name: str) -> Traits:
        """Return the facts about the provider called `name`, for a class that serves several."""
        return cls.traits

    @classmethod
    def open(cls, name: str, given: Given) -> Self:
        """Open an account from what the user passed and, for the rest, from environment variables.

        Args:
            name: The provider's name.
            given: What the user passed.

        Returns:
            The account.

        Raises:
            ConfigurationError: Something is missing or invalid; MissingKeyError if it is the key,
                UnknownOptionError if it is an unknown setting.
        """
        return cls(resolve_account(name, cls.traits_of(name).account, given))

    def auth_headers(self) -> dict[str, str]:
        """Return the headers that carry the key, if there is one."""
        key, spec = self.account.api_key, self.traits.account
        return {spec.key_header: spec.key_prefix + key.get_secret_value()} if key else {}

    def auth(self) -> httpx.Auth:
        """Return the auth of requests: `auth_headers` for the account's own host, nothing for other hosts."""
        return HostAuth({self.account.api_base: HeaderAuth(self.auth_headers())})

    def transport(self) -> httpx.BaseTransport | None:
        """Return the transport of a provider that is not on the network; None for HTTP."""
        return None

    def atransport(self) -> httpx.AsyncBaseTransport | None:
        """Return the same for asynchronous clients."""
        return None

    def console_url(self, batch_ids: Sequence[str], pattern: str | None = None) -> str | None:
        """Return the web page that shows batches to a person.

        Args:
            batch_ids: The ids of the batches.
            pattern: The account's own page, such as `https://gateway.example.com/batches/{batch_id}`.

        Returns:
            The address; None if none is known. For another base URL, such as a gateway's, the provider's own
            pages do not count, since they do not show its batches.
        """
        if not batch_ids:
            return None
        every, one = (None, pattern) if pattern else self._console()
        if one is None or (every is not None and len(batch_ids) > 1):
            return every
        return one.replace("{batch_id}", quote(batch_ids[0], safe=""))

    def _console(self) -> tuple[str | None, str | None]:
        usual = urlsplit(self.traits.account.api_base or "").hostname
        host = urlsplit(self.account.api_base).hostname or ""
        # Regional hosts, such as eu.api.openai.com, show their batches on the same pages.
        is_theirs = usual is not None and (host == usual or host.endswith(f".{usual}"))
        return self.traits.console if self.traits.console and is_theirs else (None, None)

    # --- the calls ---------------------------------------------------------------------------------

    @abstractmethod
    def upload(self, new: NewBatch) -> Flow[str | None]:
        """Upload the requests.

        Args:
            new: The batch to upload.

        Returns:
            The id of the uploaded file; None if the requests travel inside the create.

        Raises:
            APIError: The provider refused the upload, or did not answer.
        """

    @abstractmethod
    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        """Create the batch, and send the request only once.

        Args:
            new: The batch to create.
            file_id: The uploaded file.

        Returns:
            The batch.

        Raises:
            APIError: The provider refused the create, or did not answer; `retry.outcome_unknown` says whether
                the batch may exist.
        """

    @abstractmethod
    def retrieve(self, batch_id: str) -> Flow[Batch]:
        """Retrieve a batch.

        Args:
            batch_id: Its id.

        Returns:
            The batch. If the answer carries results, `raw` leaves them out.

        Raises:
            NotFoundError: There is no such batch in this account.
            APIError: The call failed for another reason.
        """

    @abstractmethod
    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        """Ask the provider to cancel a batch.

        Args:
            batch_id: Its id.
            repeat_conflict: Whether to repeat the request after a 409; pass it on to `send` or `post`.

        Returns:
            The batch, which may still be cancelling.

        Raises:
            BadRequestError: The batch has ended.
            APIError: The call failed for another reason.
        """

    @abstractmethod
    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Flow[Page]:
        """List one page of the account's batches, newest first.

        Args:
            after: The `next_cursor` of the page before; None for the first page.
            limit: The most entries; None for the provider's default.
            options: The provider's own options.

        Returns:
            The page.

        Raises:
            UnknownOptionError: There is no such option.
            APIError: The call failed.
        """

    @abstractmethod
    def results(self, batch: Batch) -> Results:
        """Return whether an ended batch has results.

        Args:
            batch: A batch that has ended.

        Returns:
            READY, NOT_YET or NONE. NONE for a failed batch means that it was refused as a whole.
        """

    @abstractmethod
    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        """Download results that are READY to files of JSON lines, which `codec.decode` can decode.

        Called again, it starts from the beginning. The helpers in `saving` do most of the work.

        Args:
            batch: A batch that has results.
            folder: The folder for the files; `saving.result_file` names them.

        Returns:
            The files.

        Raises:
            NotFoundError: A result file is gone.
            APIError: The download failed for another reason.
        """

    def matches(self, batch: Batch, sought: Sought) -> bool:
        """Return whether a batch is the sought one, by `traits.lookup`.

        Args:
            batch: A batch of the account's listing.
            sought: What the batch was created from.

        Returns:
            Whether it matches.
        """
        if self.traits.lookup in (Lookup.NAME, Lookup.OWN_ID):
            raise NotImplementedError(
                f"{self.name} finds batches by {self.traits.lookup}: write its `matches`"
            )
        if self.traits.lookup is Lookup.FILE and sought.file_id and batch.input_file_id:
            return batch.input_file_id == sought.file_id  # exact: every upload has its own
        theirs = batch.metadata or {}
        return bool(sought.metadata) and all(
            theirs.get(name) == value for name, value in sought.metadata.items()
        )

    def has_file(self, file_id: str) -> Flow[bool]:
        """Return whether the account has an uploaded file.

        Args:
            file_id: Its id.

        Returns:
            Whether it exists; False if the provider offers no way to find out.
        """
        return False
        yield

    def delete_files(self, batch: Batch, *, only_input: bool = False) -> Flow[None]:
        """Delete the files of an ended batch; it is no error if some are gone already.

        Args:
            batch: A batch that has ended.
            only_input: Whether to delete only the input file, and keep the results.
        """
        return
        yield

    # --- what every wire format shares ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """The provider's name."""
        return self.traits.name

    @property
    def limits(self) -> Limits:
        """What one batch may hold; an account's own limits can be set."""
        return self.traits.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self.traits = replace(self.traits, limits=limits)

    @property
    def poll_seconds(self) -> tuple[float, float]:
        """The seconds between two polls of a young batch, and of an old one; they can be set."""
        return self.traits.poll_seconds

    @poll_seconds.setter
    def poll_seconds(self, seconds: tuple[float, float]) -> None:
        self.traits = replace(self.traits, poll_seconds=seconds)

    @property
    def list_limit(self) -> int:
        """The most entries in a page of a listing; 0 if a listing is of no use for polling."""
        return self.traits.list_limit

    @property
    def base_url(self) -> str:
        """The address that `url` starts with."""
        return self.account.api_base

    def url(self, path: str, *ids: str) -> str:
        """Build an address.

        Args:
            path: A path such as `/batches/{}/cancel`.
            ids: The ids for its `{}`; they are quoted, since some contain a slash.

        Returns:
            The address below the base URL.
        """
        return self.base_url.rstrip("/") + path.format(*(quote(one, safe="") for one in ids))

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Return the same account with options in force for the calls about one batch.

        Args:
            options: The provider's own options.

        Returns:
            A copy that applies them.

        Raises:
            UnknownOptionError: There is no such option.
        """
        if not options:
            return self
        self.check_options(options, self.traits.call_options, "call")
        other = copy.copy(self)
        other.options = dict(options)
        return other

    def check(
        self,
        endpoint: str,
        metadata: Mapping[str, str],
        options: Mapping[str, Any],
        window: str = DEFAULT_WINDOW,
    ) -> None:
        """Refuse what the provider would refuse, before anything is sent.

        Args:
            endpoint: The endpoint of the requests.
            metadata: The metadata of the batch.
            options: The provider's own options for the create.
            window: The completion window.

        Raises:
            ConfigurationError: The provider does not accept one of them; for an option it is an
                UnknownOptionError.
        """
        endpoints, windows = self.traits.endpoints, self.traits.windows
        if endpoints is not None and endpoint not in endpoints:
            raise ConfigurationError(
                f"{self.name} runs no batches on endpoint {endpoint!r}; it supports {_names(endpoints)}",
                provider=self.name,
            )
        if windows is not None and window not in windows:
            known = " or ".join(map(repr, windows))
            raise ConfigurationError(
                f"completion_window: {self.name} supports {known}, not {window!r}", provider=self.name
            )
        self.check_options(options, self.traits.create_options, "create")
        self._check_metadata(metadata)

    def _check_metadata(self, metadata: Mapping[str, str]) -> None:
        if self.traits.metadata is None:
            if metadata:
                raise ConfigurationError(
                    f"metadata: {self.name} does not support metadata on batches; leave it out",
                    provider=self.name,
                )
            return
        pairs, key_length, value_length = self.traits.metadata
        if len(metadata) > pairs:
            raise ConfigurationError(
                f"metadata: at most {pairs} pairs, not {len(metadata)}", provider=self.name
            )
        for key, value in metadata.items():
            if not isinstance(value, str) or len(value) > value_length or not 0 < len(key) <= key_length:
                raise ConfigurationError(
                    f"metadata {key!r}: a key must have 1 to {key_length} characters, "
                    f"a value must be text of at most {value_length}",
                    provider=self.name,
                )

    def check_options(self, given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
        """Refuse unknown options.

        Args:
            given: The options that the user passed.
            known: The names of the known options.
            what: What they are options of, such as "create", for the message.

        Raises:
            UnknownOptionError: An option is unknown; the message names the known ones.
        """
        if unknown := sorted(set(given) - known):
            instead = self.traits.not_options
            hints = [f". {name}: {instead[name]}" for name in unknown if name in instead]
            raise UnknownOptionError(
                f"{self.name} has no {what} option {', '.join(unknown)}; it has {_names(known) or 'none'}"
                + "".join(hints),
                provider=self.name,
            )

    def cancel(self, batch_id: str) -> Flow[Batch]:
        """Cancel a batch.

        Args:
            batch_id: Its id.

        Returns:
            The batch, which may still be cancelling; a batch that has ended is returned unchanged.

        Raises:
            ConfigurationError: The provider cannot cancel batches.
            APIError: The call failed.
        """
        if self.traits.cancel is Cancel.NONE:
            raise ConfigurationError(
                f"{self.name} cannot cancel batches; the batch runs on", provider=self.name, batch_id=batch_id
            )
        if self.traits.cancel is Cancel.DESTRUCTIVE:
            batch = yield from self.retrieve(batch_id)
            if batch.status.is_terminal:  # a cancel would delete its results
                return batch
            log.warning(
                "batch %s: %s deletes the results of a cancelled batch: the rows that it has finished were "
                "paid for, and their results are lost", batch_id, self.name,
            )  # fmt: skip
        try:
            return (yield from self.request_cancel(batch_id, repeat_conflict=False))
        except BadRequestError:
            batch = yield from self.retrieve(batch_id)
            if batch.status.is_terminal:
                return batch
        return (yield from self.request_cancel(batch_id, repeat_conflict=True))

    # --- a create without an answer ------------------------------------------------------------------

    @property
    def can_find(self) -> bool:
        """Whether a batch can be looked up by what it was created from."""
        return self.traits.lookup is not Lookup.NONE

    def can_look(self, sought: Sought) -> bool:
        """Return whether a batch can be looked up by what is known of it.

        Args:
            sought: What the batch was created from.

        Returns:
            Whether `matches` can recognise it.
        """
        match self.traits.lookup:
            case Lookup.NONE:
                return False
            case Lookup.FILE:
                return sought.file_id is not None or bool(sought.metadata)
            case Lookup.METADATA:
                return bool(sought.metadata)
            case Lookup.NAME | Lookup.OWN_ID:
                return bool(sought.key)


def _names(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
