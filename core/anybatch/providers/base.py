"""What a provider is: an account, a few facts, and its calls written as flows."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

import httpx

from ..errors import (
    APIError,
    BadRequestError,
    ConfigurationError,
    CreateOutcomeUnknownError,
    IncompleteListingError,
    NotFoundError,
    ServerError,
    UnknownOptionError,
)
from ..flow import Flow, ask, download, sleep
from ..models import BatchStatus, Outcome, Page, Row, RowError
from ..polling.listing import Reading
from ..retry import outcome_unknown, redact
from .account import Account, KeyAuth

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ..models import Batch
    from .content import Content

log = logging.getLogger(__name__)

DEFAULT_WINDOW = "24h"

# Where an answer keeps what it was read as: `ask` reads it twice.
_READ = "anybatch.json"

# The pauses before asking again whether a create that got no answer has left a batch, seconds.
_ASK_AFTER = (1.0, 3.0, 9.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may hold, in requests and in bytes of its uploaded form."""

    requests: int = 50_000
    bytes: int = 200_000_000


@dataclass(frozen=True, slots=True)
class NewBatch:
    """Everything a create says."""

    content: Content
    endpoint: str
    completion_window: str = DEFAULT_WINDOW
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    idempotency_key: str | None = None


class Provider(ABC):
    """One account at one provider. Subclasses are wire formats; their methods are flows."""

    name: ClassVar[str] = ""
    limits: Limits = Limits()
    endpoints: frozenset[str] | None = None
    """The endpoints a batch may address, None for any."""
    single_model: bool = False
    """Whether all requests of a batch must name one model."""
    verbatim: bool = True
    """Whether request lines are uploaded byte for byte."""
    decodes_as_openai: bool = False
    """Whether a result line in OpenAI's shape means what it means there; `decode` takes all others."""
    can_find: bool = True
    """Whether a batch can be looked up by what it was created from."""
    idempotent_create: bool = False
    """Whether a create that is repeated with the same idempotency key makes no second batch."""
    create_options: frozenset[str] = frozenset()
    list_options: frozenset[str] = frozenset()
    not_options: Mapping[str, str] = MappingProxyType({})
    """What looks like an option but cannot be one, and what to do instead."""
    metadata_limits: tuple[int, int, int] | None = (16, 64, 512)
    """Pairs, characters of a key, characters of a value; None where a batch carries no metadata."""
    list_limit: int = 100
    """The largest page of a listing; 0 where a listing is of no use for polling."""
    poll_seconds: tuple[float, float] = (15.0, 300.0)
    """The pause between polls of a young batch, and of an old one."""

    def __init__(self, account: Account) -> None:
        self.account = account

    # --- facts about the account -------------------------------------------------------------------

    @abstractmethod
    def auth_headers(self) -> dict[str, str]:
        """The headers that carry the key."""

    def auth(self) -> httpx.Auth:
        return KeyAuth(self.account, self.auth_headers())

    def transport(self) -> httpx.BaseTransport | None:
        """The transport of a provider that is not on the network, else None."""
        return None

    def atransport(self) -> httpx.AsyncBaseTransport | None:
        """The same for asynchronous clients."""
        return None

    # --- request lines -----------------------------------------------------------------------------

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        """The uploaded form of one request line; called only where `verbatim` is False.

        Raises ValueError (`messages.Untranslatable` names the parameter) for what this provider cannot take.
        """
        return line

    # --- the calls ---------------------------------------------------------------------------------

    @abstractmethod
    def upload(self, content: Content, options: Mapping[str, Any]) -> Flow[str | None]:
        """Upload the requests; None where they travel inside the create."""

    @abstractmethod
    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        """Create the batch, once. An APIError may leave open whether it exists (`retry.outcome_unknown`)."""

    @abstractmethod
    def find(self, file_id: str | None, metadata: Mapping[str, str], *, since: float) -> Flow[list[Batch]]:
        """All batches made from this file, or with this metadata, since then (unix seconds).

        Raises IncompleteListingError where none was found in a listing that could not be read to its end.
        """

    @abstractmethod
    def retrieve(self, batch_id: str) -> Flow[Batch]: ...

    @abstractmethod
    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        """Ask the provider to stop; whether a 409 is worth another try is said to `send`."""

    @abstractmethod
    def list_page(
        self, *, after: str | None, limit: int | None, options: Mapping[str, Any]
    ) -> Flow[Page]: ...

    @abstractmethod
    def result_requests(self, batch: Batch) -> list[httpx.Request]:
        """The GETs whose bodies hold the batch's results, as JSON lines; none where there are no results."""

    @abstractmethod
    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        """One result line as a row; `raw` is filled in by the caller. Raises ValueError for nonsense."""

    def has_file(self, file_id: str) -> Flow[bool]:
        """Whether the account has this uploaded file; False where the provider does not tell."""
        return False
        yield

    def original_ids(self, custom_ids: Sequence[str]) -> dict[str, str]:
        """Uploaded id -> custom_id, for ids that had to be changed to fit the provider."""
        return {}

    # --- what every wire format shares ---------------------------------------------------------------

    @property
    def base_url(self) -> str:
        return self.account.api_base

    def url(self, path: str, *ids: str) -> str:
        """The address of a path whose `{}` are ids; they are quoted, since some hold a slash."""
        return self.base_url.rstrip("/") + path.format(*(quote(one, safe="") for one in ids))

    def check(
        self,
        endpoint: str,
        metadata: Mapping[str, str],
        options: Mapping[str, Any],
        window: str = DEFAULT_WINDOW,
    ) -> None:
        """Refuse what this provider would refuse, before anything is sent."""
        if self.endpoints is not None and endpoint not in self.endpoints:
            raise ConfigurationError(
                f"{self.name} runs no batches on endpoint {endpoint!r}; it knows {_names(self.endpoints)}",
                provider=self.name,
            )
        self.check_options(options, self.create_options, "create")
        if self.metadata_limits is None:
            if metadata:
                raise ConfigurationError(f"{self.name}: batches carry no metadata", provider=self.name)
            return
        pairs, key_length, value_length = self.metadata_limits
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
        unknown = sorted(set(given) - known)
        if unknown:
            instead = [f". {name}: {self.not_options[name]}" for name in unknown if name in self.not_options]
            raise UnknownOptionError(
                f"{self.name} has no {what} option {_names(unknown)}; it has {_names(known) or 'none'}"
                + "".join(instead),
                provider=self.name,
            )

    def download(self, batch: Batch, directory: Path) -> Flow[list[Path]]:
        """Fetch the batch's result files. Raises FileGoneError, with the others, where one answers 404."""
        paths: list[Path] = []
        gone: NotFoundError | None = None
        for number, request in enumerate(self.result_requests(batch)):
            path = directory / f"{_file_name(batch.id)}.{number}.jsonl"
            try:
                yield from download(request, path)
            except NotFoundError as error:  # the other file may be there
                gone = error
                path.unlink(missing_ok=True)
            else:
                paths.append(path)
        if gone is not None:
            raise FileGoneError(gone, paths) from gone
        return paths

    def cancel(self, batch_id: str) -> Flow[Batch]:
        """Ask the provider to stop; a batch that has ended already is returned as it is."""
        try:
            return (yield from self.request_cancel(batch_id, repeat_conflict=False))
        except BadRequestError:
            batch = yield from self.retrieve(batch_id)
            if batch.status.is_terminal:
                return batch
        return (yield from self.request_cancel(batch_id, repeat_conflict=True))

    def create_once(self, new: NewBatch, file_id: str | None, *, since: float) -> Flow[Batch]:
        """Create, and where the answer was lost look for the batch before creating it again.

        Raises CreateOutcomeUnknownError where the provider offers no way to look.
        """
        try:
            return (yield from self.create(new, file_id))
        except APIError as error:
            if not outcome_unknown(error):
                raise
            lost = error
        if not self.can_look(file_id, new.metadata):
            raise CreateOutcomeUnknownError(
                f"the create got no answer ({lost.message}), and {self.name} offers no way to ask whether "
                "the batch exists; look at the provider's list of batches before creating it again",
                provider=self.name,
                status_code=lost.status_code,
                request_id=lost.request_id,
            ) from lost
        try:
            found = yield from self.look(file_id, new.metadata, since=since)
            batch = oldest(found) if found else (yield from self.create(new, file_id))
        except APIError as error:
            raise CreateOutcomeUnknownError(
                f"a create got no answer ({lost.message}), and looking for its batch or creating it again "
                f"failed as well ({error.message}); it was not repeated",
                provider=self.name,
                status_code=error.status_code,
            ) from error
        try:
            # The first create may have been slow rather than lost.
            doubles = found or (yield from self.find(file_id, new.metadata, since=since))
            return (yield from self.keep_one([batch, *(one for one in doubles if one.id != batch.id)]))
        except APIError as error:
            log.warning("batch %s may have a double that could not be cancelled: %s", batch.id, error)
            return batch

    def search(
        self, matches: Callable[[Batch], bool], *, since: float, options: Mapping[str, Any] | None = None
    ) -> Flow[list[Batch]]:
        """The account's batches that match, of all that were created since then (unix seconds).

        That there is none is concluded from a listing alone that was read to its end, or back to batches
        older than that: a batch that goes unnoticed would be bought again. Else IncompleteListingError.
        """
        found: dict[str, Batch] = {}
        reading, limit = Reading(since), self.list_limit or 100
        while not reading.is_over:
            page = yield from self.list_page(after=reading.after, limit=limit, options=options or {})
            found |= {batch.id: batch for batch in reading.take(page) if matches(batch)}
        if found or reading.is_complete:
            return list(found.values())
        raise IncompleteListingError(
            f"{self.name}'s list of batches could not be read to its end ({reading.pages} pages were): a "
            "batch that was not in it may exist all the same",
            provider=self.name,
        )

    def can_look(self, file_id: str | None, metadata: Mapping[str, str]) -> bool:
        """Whether a batch can be looked up by this file and metadata."""
        return self.can_find and (file_id is not None or bool(metadata))

    def look(self, file_id: str | None, metadata: Mapping[str, str], *, since: float) -> Flow[list[Batch]]:
        """`find`, repeated for a while as long as nothing is there: a create may be slow rather than lost."""
        found: list[Batch] = []
        for pause in _ASK_AFTER:
            yield from sleep(pause)
            if found := (yield from self.find(file_id, metadata, since=since)):
                break
        return found

    def keep_one(self, batches: Sequence[Batch]) -> Flow[Batch]:
        """Keep the oldest batch, and cancel its doubles."""
        kept = oldest(batches)
        for double in batches:
            if double.id != kept.id and not double.status.is_terminal:
                yield from self.cancel(double.id)
        return kept


class FileGoneError(NotFoundError):
    """A result file that the batch names is not there; `paths` are those that are."""

    def __init__(self, error: NotFoundError, paths: list[Path]) -> None:
        super().__init__(
            error.message, code=error.code, status_code=error.status_code, request_id=error.request_id
        )
        self.paths = paths


_DEAD = frozenset({BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.CANCELLING})


def oldest(batches: Sequence[Batch]) -> Batch:
    """The oldest batch that is not dead: the same one for everybody who asks."""
    return min(batches, key=lambda batch: (batch.status in _DEAD, batch.created_at or 0, batch.id))


def page_of(
    batches: Sequence[Batch], *, after: str | None, limit: int | None, said: object, cursor: str | None
) -> Page:
    """One page of a listing that goes on after an id or cursor.

    `said` is what the answer itself says of there being more, None where it says nothing: then there may be
    more behind every page that is not empty, since servers cap what is asked for. `cursor` leads on.
    """
    full = limit is not None and len(batches) >= limit
    if batches and cursor is not None and cursor == after:
        # The same page again: what some servers send at the end for ever. But one that does not go by `after`
        # sends its first page so, and what is behind a full one stays unknown.
        return Page(batches, next_cursor=None, has_more=full and said is not False)
    more = bool(said) if said is not None else bool(batches)
    onward = cursor if more and cursor != after else None
    return Page(batches, next_cursor=onward, has_more=more)


def _file_name(batch_id: str) -> str:
    """A batch's id as a file name: LiteLLM's ids are longer than one may be, and begin and end alike."""
    name = re.sub(r"[^\w=.-]", "_", batch_id)
    return name if len(name) <= 100 else f"{name[:80]}~{hashlib.sha256(batch_id.encode()).hexdigest()[:16]}"


def _names(names: Sequence[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names) if isinstance(names, frozenset) else names)


def json_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object a provider answered with; anything else is a ServerError."""
    before: dict[str, Any] | None = response.extensions.get(_READ)
    if before is not None:
        return before
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        request = response.request
        raise ServerError(
            f"{request.url.host} answered {request.method} {request.url.path} "
            f"with something that is not a JSON object: {redact(response.text, request)[:200]!r}",
            status_code=response.status_code,
        )
    if body.get("error") and not body.keys() & {"id", "data"}:
        # Some servers, and gateways before them, report their failures with status 200.
        raise ServerError(
            f"{response.request.url.host} answered {response.request.method} {response.request.url.path} "
            f"with an error: {redact(response.text, response.request)[:200]!r}",
            status_code=response.status_code,
        )
    response.extensions[_READ] = body
    return body


def id_of(answer: Mapping[str, Any], what: str) -> str:
    """The id in an answer. Some servers report their failures with status 200: those have none."""
    found = answer.get("id")
    if not isinstance(found, str | int) or found == "":
        raise ServerError(f"the provider's answer is no {what}: {json.dumps(answer)[:200]}")
    return str(found)


def entries_of(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a listing. Servers written in Go send null where there are none.

    Any other answer without them is no listing, but a failure with status 200, or another server: taken for
    an empty one, it would say that a batch which was paid for does not exist. It is a ServerError.
    """
    entries = answer.get("data")
    if entries is None and answer.get("object") == "list":
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ServerError(f"the provider's answer is no listing: {json.dumps(answer)[:200]}")
    return entries


def get(url: str, params: Mapping[str, Any] | None = None) -> Flow[dict[str, Any]]:
    """GET a JSON object; parameters that are None are left out."""
    query = {name: value for name, value in (params or {}).items() if value is not None}
    return (yield from ask(httpx.Request("GET", url, params=query), json_of))


def answers(url: str) -> Flow[bool]:
    """Whether there is something at an address."""
    try:
        yield from get(url)
    except (NotFoundError, BadRequestError):
        return False
    return True


def post(
    url: str,
    body: object = None,
    *,
    repeatable: bool = True,
    repeat_conflict: bool = True,
    headers: Mapping[str, str] | None = None,
) -> Flow[dict[str, Any]]:
    """POST JSON and receive JSON."""
    request = httpx.Request("POST", url, json=body, headers=headers)
    return (yield from ask(request, json_of, repeatable=repeatable, repeat_conflict=repeat_conflict))


def failed_row(custom_id: str, code: str | None, message: str, status: int | None = None) -> Row:
    return Row(custom_id, Outcome.FAILED, None, RowError(code, message), status)
