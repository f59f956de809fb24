"""Every error that anybatch raises.

AnyBatchError
├── ConfigurationError
│   ├── UnknownProviderError
│   ├── UnknownOptionError
│   └── MissingKeyError
├── InputError                     bad request lines; nothing was sent
├── APIError                       the provider refused, or could not be reached
│   ├── AuthenticationError        401, 403
│   ├── NotFoundError              404
│   │   └── BatchLostError         the provider has lost a job's batch, or its result file
│   ├── BadRequestError            400, 409, 413, 422 and the other 4xx
│   ├── RateLimitError             429, or 529: overloaded
│   ├── QuotaError                 402, or a 429 that waiting does not cure
│   ├── ServerError                408, 5xx, or an answer that is not the provider's API
│   │   └── IncompleteListingError a listing that could not be read to its end
│   └── TransportError             no answer at all
├── CreateOutcomeUnknownError      a create may or may not have happened
├── BatchNotCompleteError          results requested while the batch runs
├── BatchFailedError               the provider refused the batch as a whole
├── DeadlineExceededError          also a TimeoutError
└── JobError
    ├── RowsLackingError           the results have landed, but too many rows have no result
    ├── OrphanError                a batch may be running that cannot be looked up
    ├── InputChangedError          other input than before, and on_changed="fail" or a later round needs it
    └── LedgerConflictError        the folder is another job's, or another attempt has moved the job on

`classify` decides what follows from a failure: for a call, a wait, an attempt and a row alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .models import Report

__all__ = [
    "APIError",
    "AnyBatchError",
    "AuthenticationError",
    "BadRequestError",
    "BatchFailedError",
    "BatchLostError",
    "BatchNotCompleteError",
    "ConfigurationError",
    "CreateOutcomeUnknownError",
    "DeadlineExceededError",
    "IncompleteListingError",
    "InputChangedError",
    "InputError",
    "JobError",
    "Kind",
    "LedgerConflictError",
    "MissingKeyError",
    "NotFoundError",
    "OrphanError",
    "Problem",
    "QuotaError",
    "RateLimitError",
    "Repeat",
    "RowsLackingError",
    "ServerError",
    "TransportError",
    "UnknownOptionError",
    "UnknownProviderError",
    "Wait",
    "classify",
    "error_of",
]


class AnyBatchError(Exception):
    """The base of all errors. Attributes that do not apply are None.

    Attributes:
        message: What happened, where, and what to do next.
        provider: The provider's name.
        batch_id: The batch's id.
        status_code: The HTTP status of the failed request.
        request_id: The provider's id of the failed request, for its support.
    """

    def __init__(
        self,
        message: str,
        *,
        provider: str | None = None,
        batch_id: str | None = None,
        status_code: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.provider = provider
        self.batch_id = batch_id
        self.status_code = status_code
        self.request_id = request_id

    def __str__(self) -> str:
        facts = {
            "provider": self.provider,
            "batch": self.batch_id,
            "HTTP status": self.status_code,
            "request id": self.request_id,
        }
        known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        return f"{self.message} [{known}]" if known else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Orchestrators pickle exceptions between processes; by default keyword-only arguments would be lost.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[AnyBatchError], args: tuple[object, ...], state: dict[str, object]) -> AnyBatchError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(AnyBatchError):
    """A setting is missing, unknown or contradictory."""


class UnknownProviderError(ConfigurationError):
    """No provider of that name is built in or registered."""


class UnknownOptionError(ConfigurationError):
    """The provider has no option or setting of that name."""


class MissingKeyError(ConfigurationError):
    """No API key was passed, and none is in the environment."""


class Problem(NamedTuple):
    """One thing that is wrong with the input.

    Attributes:
        line: The line of the input, from 1; None if it is about the whole input.
        field: The path of the field, such as `body.model`, or the row and column of a table.
        message: What is wrong.
    """

    line: int | None
    field: str | None
    message: str

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line is not None else []
        place += [self.field] if self.field else []
        return f"{', '.join(place)}: {self.message}" if place else self.message


class InputError(AnyBatchError):
    """Request lines are invalid; nothing was uploaded, and nothing was paid.

    Attributes:
        source: The name of the input.
        problems: The first problems, in line order.
        more: The number of problems beyond those.
    """

    def __init__(
        self, source: str, problems: Sequence[Problem], *, more: int = 0, provider: str | None = None
    ) -> None:
        lines = [f"  {problem}" for problem in problems] + ([f"  … and {more} more"] if more else [])
        count = len(problems) + more
        head = f"{source}: {count} problem{'s' if count != 1 else ''} (nothing was sent)"
        super().__init__("\n".join([head, *lines]), provider=provider)
        self.source = source
        self.problems = tuple(problems)
        self.more = more


class APIError(AnyBatchError):
    """A request failed, and anybatch does not repeat it any more.

    Attributes:
        code: The provider's own error code.
        retry_after: The pause that the provider asked for, seconds.
        should_retry: The value of its `x-should-retry` header.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        provider: str | None = None,
        batch_id: str | None = None,
        status_code: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message, provider=provider, batch_id=batch_id, status_code=status_code, request_id=request_id
        )
        self.code = code
        self.retry_after = retry_after
        self.should_retry = should_retry


class AuthenticationError(APIError):
    """The key is wrong, or has no permission for this."""


class NotFoundError(APIError):
    """There is no such batch or file in this account."""


class BatchLostError(NotFoundError):
    """The provider has lost a batch of a job, or its result file, and `on_lost` is "fail"."""


class BadRequestError(APIError):
    """The provider refused the request; sending it again would not help."""


class RateLimitError(APIError):
    """Too many requests, from this account or from all; the provider has not acted on this one."""


class QuotaError(APIError):
    """The account has no credit or quota left; waiting does not help."""


class ServerError(APIError):
    """The provider failed, or answered with something that is not its API."""


class IncompleteListingError(ServerError):
    """A listing could not be read to its end, so a batch may exist although it was not found there."""


class TransportError(APIError):
    """No answer: name resolution, connection, TLS, proxy or timeout.

    Attributes:
        sent: False if the request certainly never reached the provider.
    """

    def __init__(self, message: str, *, sent: bool = True, provider: str | None = None) -> None:
        super().__init__(message, provider=provider)
        self.sent = sent


class CreateOutcomeUnknownError(AnyBatchError):
    """A create got no answer, so a batch may be running; the create was not repeated."""


class BatchNotCompleteError(AnyBatchError):
    """The batch is still running.

    Attributes:
        status: Its status.
    """

    def __init__(self, batch_id: str, status: str, *, provider: str | None = None) -> None:
        super().__init__(
            f"batch {batch_id} is {status}: its results exist once it has ended",
            provider=provider,
            batch_id=batch_id,
        )
        self.status = status


class BatchFailedError(AnyBatchError):
    """The provider refused the batch as a whole.

    Attributes:
        problems: Its reasons, with the lines of the input if it names them.
    """

    def __init__(
        self,
        message: str,
        *,
        problems: Sequence[Problem] = (),
        provider: str | None = None,
        batch_id: str | None = None,
    ) -> None:
        reasons = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(message + reasons, provider=provider, batch_id=batch_id)
        self.problems = tuple(problems)


class DeadlineExceededError(AnyBatchError, TimeoutError):
    """A batch had not ended at the deadline; the message says whether it is left running."""


class JobError(AnyBatchError):
    """A job cannot continue by itself."""


class RowsLackingError(JobError):
    """The results have landed, but more rows have no result than `on_partial` or `max_failed_ratio` accept.

    Running the job again returns the same report, at no cost.

    Attributes:
        report: The report of the landed results.
    """

    def __init__(self, message: str, *, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class OrphanError(JobError):
    """An earlier attempt may have created a batch, and the provider offers no way to look it up."""


class InputChangedError(JobError):
    """The job was submitted before with other input or options, or a later round does not find its input."""


class LedgerConflictError(JobError):
    """The job's folder belongs to another job, or another attempt has moved this job on."""


# --- what a failure means --------------------------------------------------------------------------------


class Repeat(Enum):
    """Whether the call that failed may be sent again unchanged."""

    NEVER = auto()
    LOCKED = auto()  # if a repetition is harmless, and the caller regards a conflict as a temporary lock
    HARMLESS = auto()  # if a repetition is harmless
    ALWAYS = auto()  # the provider has certainly not acted on it


class Wait(Enum):
    """What a failed poll means for the waits of an account."""

    ENDS_ALL = auto()  # it ends every wait of the account
    ENDS_ONE = auto()  # it ends the wait for this batch
    SLOWS = auto()  # the account is polled less often
    BLIP = auto()  # it is temporary: waiting continues
    UNEXPECTED = auto()  # it is a bug, and ends the wait for this batch with its own traceback

    @property
    def ends(self) -> bool:
        """Whether it ends the wait for the batch."""
        return self in (Wait.ENDS_ALL, Wait.ENDS_ONE, Wait.UNEXPECTED)


@dataclass(frozen=True, slots=True)
class Kind:
    """What follows from a failure.

    Attributes:
        repeat: Whether the same call may be sent again.
        may_exist: Whether a create that failed like this may have left a batch.
        wait: What it means for the waits of the account.
        is_final: Whether retrying the task or run is pointless until a person has changed something.
        row_again: Whether a row that failed like this may succeed if it is submitted again.
    """

    repeat: Repeat = Repeat.NEVER
    may_exist: bool = False
    wait: Wait = Wait.ENDS_ONE
    is_final: bool = False
    row_again: bool = False


_FINAL = Kind(is_final=True)
_KINDS: dict[type[BaseException], Kind] = {
    BaseException: Kind(wait=Wait.UNEXPECTED),
    OSError: Kind(wait=Wait.BLIP),  # includes TimeoutError
    AnyBatchError: Kind(),
    ConfigurationError: Kind(wait=Wait.ENDS_ALL, is_final=True),
    InputError: _FINAL,
    APIError: Kind(wait=Wait.BLIP),
    AuthenticationError: Kind(wait=Wait.ENDS_ALL, is_final=True),
    NotFoundError: _FINAL,
    BadRequestError: _FINAL,
    RateLimitError: Kind(Repeat.ALWAYS, wait=Wait.SLOWS, row_again=True),
    QuotaError: Kind(wait=Wait.SLOWS, is_final=True, row_again=True),
    ServerError: Kind(Repeat.HARMLESS, may_exist=True, wait=Wait.BLIP, row_again=True),
    TransportError: Kind(Repeat.HARMLESS, may_exist=True, wait=Wait.BLIP, row_again=True),
    CreateOutcomeUnknownError: Kind(may_exist=True),
    JobError: _FINAL,
    LedgerConflictError: Kind(),
}

# Refusals that may be temporary: a lock, early data, a connection that a proxy has closed.
_PASSING = frozenset({409, 423, 425, 499})


def classify(error: BaseException) -> Kind:
    """Decide what follows from a failure, by its class and by what the provider sent with it.

    To classify the failure of a row, build the error of an answer with the same status and code (`error_of`).
    """
    kind = next(_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS)
    match error:
        case TransportError(sent=sent):
            return kind if sent else replace(kind, repeat=Repeat.ALWAYS, may_exist=False)
        case RateLimitError(should_retry=again):
            return replace(kind, repeat=Repeat.NEVER) if again is False else kind
        case BadRequestError(status_code=status, should_retry=again) if status in _PASSING or again:
            lock = Repeat.LOCKED if status == 409 else kind.repeat
            kind = replace(kind, repeat=lock, wait=Wait.BLIP, is_final=False)
        case AuthenticationError(status_code=403):  # the key may have permission for other batches
            kind = replace(kind, wait=Wait.ENDS_ONE)
    if isinstance(error, APIError) and error.should_retry is not None:
        return replace(kind, repeat=Repeat.HARMLESS if error.should_retry else Repeat.NEVER)
    return kind


_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
# Anthropic's code for a request that was turned away unread: a create that gets it has left no batch.
_OVERLOADED = "overloaded_error"
# Parts of codes for requests that are refused every time they are sent.
_REFUSED = re.compile(
    r"invalid|unsupported|not_supported|not_found|too_large|too_long|exceeds|max_length|max_tokens|"
    r"context_length|content_filter|content_policy|moderation|safety|authentication|permission|billing"
)


def error_of(status: int | None, code: str | None) -> type[APIError]:
    """Return the error class of an answer or of a row's failure, by its HTTP status or else by its code."""
    if code in _QUOTA_CODES or status == 402:
        return QuotaError
    if status in (429, 529) or code == _OVERLOADED:
        return RateLimitError
    if status in (401, 403):
        return AuthenticationError
    if status in (404, 410):
        return NotFoundError
    if status is None or status < 400:
        return BadRequestError if code is not None and _REFUSED.search(code.lower()) else ServerError
    return ServerError if status == 408 or status >= 500 else BadRequestError
