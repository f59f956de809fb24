"""The facts about a provider as frozen values: what its documentation states in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

DEFAULT_WINDOW = "24h"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may hold, measured in its uploaded form.

    Attributes:
        requests: The most requests.
        bytes: The most bytes.
        line_bytes: The most bytes of one line; None for no such limit.
        min_requests: The fewest requests. A smaller job is refused; if the last batch would be smaller, rows
            of the batch before move into it; and fewer rows than this are not submitted again in a later
            round.
        nesting: How deeply the JSON of one line may be nested; None for no such limit.
    """

    requests: int = 50_000
    bytes: int = 200_000_000
    line_bytes: int | None = None
    min_requests: int = 1
    nesting: int | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of an account beside key and base URL: a region, a project, a bucket, a role.

    The user passes it by name; otherwise it is read from the first of its environment variables that is set.

    Attributes:
        name: The name.
        env: The environment variables.
        default: The value if neither is set.
        is_required: Whether an account without it is refused.
        secret: Whether its value is hidden from reprs and may be rotated while a batch runs. The values of
            other settings are a part of the job's fingerprint.
    """

    name: str
    env: tuple[str, ...] = ()
    default: str | None = None
    is_required: bool = False
    secret: bool = False


@dataclass(frozen=True, slots=True)
class AccountSpec:
    """Where an account's base URL, key and settings come from, and which header carries the key.

    Attributes:
        api_base: The usual base URL; None if there is none.
        key_env: The environment variables of the key; the first that is set counts.
        base_env: The environment variables of the base URL.
        needs_key: Whether an account without a key is refused.
        key_header: The header that carries the key.
        key_prefix: What stands before the key in that header.
        settings: The other settings.
        read_base: Makes the base URL from what the user passed, such as the name of a resource.
    """

    api_base: str | None = None
    key_env: tuple[str, ...] = ()
    base_env: tuple[str, ...] = ()
    needs_key: bool = True
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    settings: tuple[Setting, ...] = ()
    read_base: Callable[[str], str] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has passed for an account; the rest comes from environment variables.

    Attributes:
        api_key: The key.
        api_base: The base URL.
        settings: The other settings by name.
    """

    api_key: str | None = field(default=None, repr=False)
    api_base: str | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict, repr=False)


class Lookup(Enum):
    """How to find a batch whose create got no answer."""

    NONE = auto()  # it cannot be found
    FILE = auto()  # by its uploaded input file, or else by its metadata
    METADATA = auto()  # by its metadata
    NAME = auto()  # by a name that anybatch gave it
    OWN_ID = auto()  # by its id, which anybatch chose


class Cancel(Enum):
    """What a cancel does."""

    NORMAL = auto()  # the batch ends; its finished rows have results
    DESTRUCTIVE = auto()  # the batch is deleted with all its results; each cancel logs a warning
    NONE = auto()  # there is no such call


class Results(Enum):
    """Whether an ended batch has results to download."""

    NONE = auto()  # there are none, and there will be none
    NOT_YET = auto()  # the provider will name them a little later
    READY = auto()  # they can be downloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What must be known about a provider before anything is sent.

    Attributes:
        name: The provider's name.
        account: Where base URL, key and settings come from.
        limits: What one batch may hold.
        endpoints: The endpoints that a batch may address; None for any.
        one_model: Whether all requests of a batch must name the same model.
        windows: The completion windows that the provider offers; None for any.
        metadata: The most pairs, characters of a key and characters of a value; None if batches carry no
            metadata.
        lookup: How to find a batch whose create got no answer.
        idempotent_create: Whether repeating a create with the same key never makes a second batch.
        cancel: What a cancel does.
        list_limit: The most entries in a page of a listing; 0 if a listing is of no use for polling.
        poll_seconds: The seconds between two polls of a young batch, and of an old one.
        create_options: The provider's own options of a create.
        list_options: The provider's own options of a listing.
        call_options: The provider's own options of the calls about one batch: retrieve, cancel, results,
            download.
        not_options: Names that look like options but cannot be, with what to do instead.
        console: The web pages that show all batches, and one batch (with `{batch_id}` in it; None if there is
            no such page).
    """

    name: str
    account: AccountSpec = AccountSpec()
    limits: Limits = Limits()
    endpoints: frozenset[str] | None = None
    one_model: bool = False
    windows: tuple[str, ...] | None = None
    metadata: tuple[int, int, int] | None = (16, 64, 512)
    lookup: Lookup = Lookup.FILE
    idempotent_create: bool = False
    cancel: Cancel = Cancel.NORMAL
    list_limit: int = 100
    poll_seconds: tuple[float, float] = (15.0, 300.0)
    create_options: frozenset[str] = frozenset()
    list_options: frozenset[str] = frozenset()
    call_options: frozenset[str] = frozenset()
    not_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    console: tuple[str, str | None] | None = None
