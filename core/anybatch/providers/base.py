"""What a provider is: an account, its facts (`Traits`), its lines (`Codec`), its calls written as flows."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from ..errors import (
    BadRequestError,
    ConfigurationError,
    UnknownOptionError,
)
from ..flow import Flow
from .account import Account, resolve_account
from .auth import HeaderAuth, HostAuth
from .codec import Codec, OpenAICodec
from .traits import DEFAULT_WINDOW, Cancel, Given, Limits, Lookup, Results, Traits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import httpx

    from ..models import Batch, Page
    from .content import Content

__all__ = ["DEFAULT_WINDOW", "Limits", "NewBatch", "Provider", "Sought"]

log = logging.getLogger(__name__)

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class NewBatch:
    """Everything that an upload and a create say.

    `key` is a handle of our own, of letters, digits and hyphens, at most 63: for names, ids and idempotency
    keys. At the upload it is new each time; at the create it is the same whenever the create of the same
    shard from the same upload is repeated, and no other's.
    """

    content: Content
    endpoint: str
    completion_window: str = DEFAULT_WINDOW
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    key: str = ""

    @property
    def rows(self) -> int:
        return self.content.rows

    def sought(self, file_id: str | None) -> Sought:
        """By what this batch is to be recognised, where its create got no answer."""
        return Sought(file_id, self.metadata, self.key, self.endpoint, self.rows)


@dataclass(frozen=True, slots=True)
class Sought:
    """A batch that a create may have left: what it was made from, by which it can be told in a listing."""

    file_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    endpoint: str | None = None
    rows: int | None = None


class Provider(ABC):
    """One account at one provider. Subclasses are wire formats; their methods are flows.

    A subclass states its `traits` and `codec` and writes the calls; `docs/providers.md` tells how.
    """

    traits: Traits
    codec: Codec = OpenAICodec()

    options: Mapping[str, Any] = _NO_OPTIONS
    """The call options in force (`with_options`): for retrieve, cancel, results and download."""

    def __init__(self, account: Account) -> None:
        self.account = account

    # --- the account -------------------------------------------------------------------------------

    @classmethod
    def traits_of(cls, name: str) -> Traits:
        """The facts about the provider of this name, for a class that serves several."""
        return cls.traits

    @classmethod
    def open(cls, name: str, given: Given) -> Self:
        """An account, from what is given and the environment. Raises ConfigurationError, MissingKeyError."""
        return cls(resolve_account(name, cls.traits_of(name).account, given))

    def auth_headers(self) -> dict[str, str]:
        """The headers that carry the key."""
        key, spec = self.account.api_key, self.traits.account
        return {spec.key_header: spec.key_prefix + key.get_secret_value()} if key else {}

    def auth(self) -> httpx.Auth:
        """What signs requests: to the account's own host by `auth_headers`, and to no other."""
        return HostAuth({self.account.api_base: HeaderAuth(self.auth_headers())})

    def transport(self) -> httpx.BaseTransport | None:
        """The transport of a provider that is not on the network, else None."""
        return None

    def atransport(self) -> httpx.AsyncBaseTransport | None:
        """The same for asynchronous clients."""
        return None

    def console_url(self, batch_ids: Sequence[str], pattern: str | None = None) -> str | None:
        """The page of these batches for a person; None where none is known.

        `pattern` is an account's own, such as `https://gateway.example.com/batches/{batch_id}`. A gateway in
        front of the provider gets no link to pages that do not show its batches.
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
        """Upload the requests; None where they travel inside the create."""

    @abstractmethod
    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        """Create the batch, once. An APIError may leave open whether it exists (`retry.outcome_unknown`)."""

    @abstractmethod
    def retrieve(self, batch_id: str) -> Flow[Batch]:
        """The batch as it stands; `raw` without results, where the answer carries them."""

    @abstractmethod
    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        """Ask the provider to stop; whether a 409 is worth another try is said to `send`."""

    @abstractmethod
    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Flow[Page]:
        """One page of the account's batches, newest first; `after` is the page before's `next_cursor`."""

    @abstractmethod
    def results(self, batch: Batch) -> Results:
        """Whether an ended batch has results; NONE of a failed one says that it was refused as a whole."""

    @abstractmethod
    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        """Write the results that are READY to files in the folder: JSON lines, each with a custom_id.

        What the lines are is for `codec.decode` to say. Called again, it starts anew. The helpers in `saving`
        do most of it.
        """

    def matches(self, batch: Batch, sought: Sought) -> bool:
        """Whether a batch is the one that is sought; by `traits.lookup`."""
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
        """Whether the account has this uploaded file; False where the provider does not tell."""
        return False
        yield

    def delete_files(self, batch: Batch, *, only_input: bool = False) -> Flow[None]:
        """Delete what an ended batch has left: its input, and unless `only_input` its results.

        That something is not there any more is no error.
        """
        return
        yield

    # --- what every wire format shares ---------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.traits.name

    @property
    def limits(self) -> Limits:
        return self.traits.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:  # an account of one's own may have others
        self.traits = replace(self.traits, limits=limits)

    @property
    def poll_seconds(self) -> tuple[float, float]:
        return self.traits.poll_seconds

    @poll_seconds.setter
    def poll_seconds(self, seconds: tuple[float, float]) -> None:
        self.traits = replace(self.traits, poll_seconds=seconds)

    @property
    def list_limit(self) -> int:
        return self.traits.list_limit

    @property
    def base_url(self) -> str:
        return self.account.api_base

    def url(self, path: str, *ids: str) -> str:
        """The address of a path whose `{}` are ids; they are quoted, since some hold a slash."""
        return self.base_url.rstrip("/") + path.format(*(quote(one, safe="") for one in ids))

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same account, with options in force for the calls about a batch, or UnknownOptionError."""
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
        """Refuse what this provider would refuse, before anything is sent."""
        endpoints, windows = self.traits.endpoints, self.traits.windows
        if endpoints is not None and endpoint not in endpoints:
            raise ConfigurationError(
                f"{self.name} runs no batches on endpoint {endpoint!r}; it knows {_names(endpoints)}",
                provider=self.name,
            )
        if windows is not None and window not in windows:
            known = " or ".join(map(repr, windows))
            raise ConfigurationError(
                f"completion_window: {self.name} has {known}, not {window!r}", provider=self.name
            )
        self.check_options(options, self.traits.create_options, "create")
        self._check_metadata(metadata)

    def _check_metadata(self, metadata: Mapping[str, str]) -> None:
        if self.traits.metadata is None:
            if metadata:
                raise ConfigurationError(f"{self.name}: batches carry no metadata", provider=self.name)
            return
        pairs, key_length, value_length = self.traits.metadata
        if len(metadata) > pairs:
            raise ConfigurationError(
                f"metadata: at most {pairs} pairs, not {len(metadata)}", provider=self.name
            )
        for key, value in metadata.items():
            if not isinstance(value, str) or len(value) > value_length or not 0 < len(key) <= key_length:
                raise ConfigurationError(
                    f"metadata {key!r}: keys have 1 to {key_length} characters, "
                    f"values are text of at most {value_length}",
                    provider=self.name,
                )

    def check_options(self, given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
        """Raise UnknownOptionError for options that are not known; the message names those that are."""
        if unknown := sorted(set(given) - known):
            instead = self.traits.not_options
            hints = [f". {name}: {instead[name]}" for name in unknown if name in instead]
            raise UnknownOptionError(
                f"{self.name} has no {what} option {', '.join(unknown)}; it has {_names(known) or 'none'}"
                + "".join(hints),
                provider=self.name,
            )

    def cancel(self, batch_id: str) -> Flow[Batch]:
        """Ask the provider to stop; a batch that has ended already is returned as it is."""
        if self.traits.cancel is Cancel.NONE:
            raise ConfigurationError(
                f"{self.name} cannot cancel a batch; it goes on", provider=self.name, batch_id=batch_id
            )
        if self.traits.cancel is Cancel.DESTRUCTIVE:
            batch = yield from self.retrieve(batch_id)
            if batch.status.is_terminal:  # its results would go, too
                return batch
            log.warning(
                "batch %s: %s throws away the results of a batch that is cancelled: what it has finished was "
                "paid for, and is not to be had any more", batch_id, self.name,
            )  # fmt: skip
        try:
            return (yield from self.request_cancel(batch_id, repeat_conflict=False))
        except BadRequestError:
            batch = yield from self.retrieve(batch_id)
            if batch.status.is_terminal:
                return batch
        return (yield from self.request_cancel(batch_id, repeat_conflict=True))

    # --- a create whose answer was lost --------------------------------------------------------------

    @property
    def can_find(self) -> bool:
        """Whether a batch can be looked up by what it was created from."""
        return self.traits.lookup is not Lookup.NONE

    def can_look(self, sought: Sought) -> bool:
        """Whether this batch can be looked up, by what is known of it."""
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
