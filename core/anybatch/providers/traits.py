"""The facts about a provider, in frozen values: what its documentation says in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

DEFAULT_WINDOW = "24h"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may hold, of its uploaded form.

    `nesting` is how deep the JSON of one line may go. `min_requests` is what a batch must hold at least: a
    job of fewer is refused, its last two batches share their rows where the last would have fewer, and rows
    that could go again in a later round stay as they are where they are fewer.
    """

    requests: int = 50_000
    bytes: int = 200_000_000
    line_bytes: int | None = None
    min_requests: int = 1
    nesting: int | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing beside key and base URL that an account needs: a region, a project, a bucket, a role.

    It is given by name, else read from the first of the environment variables that is set. A `secret` one is
    hidden from reprs, and may be rotated while a batch runs; the others say whose batches they are.
    """

    name: str
    env: tuple[str, ...] = ()
    default: str | None = None
    is_required: bool = False
    secret: bool = False


@dataclass(frozen=True, slots=True)
class AccountSpec:
    """Where an account's base URL, key and settings come from, and how the key is shown to its host.

    `read_base` makes the base URL of what people give for it, such as the name of a resource.
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
    """What somebody has said about an account; the rest comes from the provider's environment variables."""

    api_key: str | None = field(default=None, repr=False)
    api_base: str | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict, repr=False)


class Lookup(Enum):
    """By what a batch can be found whose create got no answer."""

    NONE = auto()
    FILE = auto()  # the uploaded file it was made from, else its metadata
    METADATA = auto()
    NAME = auto()  # a name that we gave it
    OWN_ID = auto()  # its id, which we chose


class Cancel(Enum):
    """What a cancel does."""

    NORMAL = auto()
    DESTRUCTIVE = auto()  # the batch goes, and with it the results that it had: each cancel is warned of
    NONE = auto()  # there is no such call


class Results(Enum):
    """Whether an ended batch has results to download."""

    NONE = auto()  # and will have none
    NOT_YET = auto()  # they will be named a little later
    READY = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is to be known of a provider before anything is sent.

    endpoints          the endpoints that a batch may address, None for any
    one_model          whether all requests of a batch must name one model
    windows            the completion windows there are, None for any
    metadata           pairs, characters of a key, characters of a value; None where a batch carries none
    lookup             by what a batch is found whose create got no answer
    idempotent_create  whether a create that is repeated with the same key makes no second batch
    list_limit         the largest page of a listing; 0 where a listing is of no use for polling
    poll_seconds       the pause between polls of a young batch, and of an old one
    create_options     what a create takes as keyword arguments; the same for listing, and for the calls
                       about one batch (retrieve, cancel, results, download)
    not_options        what looks like an option but cannot be one, and what to do instead
    console            where a person looks at batches in a browser: the page of all, and that of one, with
                       `{batch_id}` in it, or None where there is no such page
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
