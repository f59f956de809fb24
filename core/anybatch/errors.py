"""Every error anybatch raises.

AnyBatchError
├── ConfigurationError
│   ├── UnknownProviderError
│   ├── UnknownOptionError
│   └── MissingKeyError
├── InputError                     bad request lines; nothing was sent
├── APIError                       the provider refused, or could not be reached
│   ├── AuthenticationError        401, 403
│   ├── NotFoundError              404
│   │   └── BatchLostError         a batch on record, or its result file, is gone at the provider
│   ├── BadRequestError            400, 409, 413, 422 and the other 4xx
│   ├── RateLimitError             429, or 529: overloaded
│   ├── QuotaError                 429 that waiting does not cure
│   ├── ServerError                408, 5xx, or an answer that makes no sense
│   │   └── IncompleteListingError a listing that could not be read to its end
│   └── TransportError             no answer at all
├── CreateOutcomeUnknownError      a create may or may not have happened
├── BatchNotCompleteError          results asked for too early
├── BatchFailedError               the provider refused the batch as a whole
├── DeadlineExceededError          also a TimeoutError
└── JobError
    ├── RowsLackingError           the results have landed, and too many rows have none
    ├── OrphanError                a batch may be running that nobody can look up
    ├── InputChangedError          same job, other input, and on_changed="fail" or rows to submit again
    └── LedgerConflictError        the folder is another job's, or another attempt took over

What follows from a failure is decided by `classify`, for one call, a wait, an attempt and a row alike.
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
    """Base of all; the attributes that do not apply are None.

    `status_code` is the HTTP status, `request_id` the provider's own id of the failed request: quote it
    when asking the provider's support.
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
        told = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        return f"{self.message} [{told}]" if told else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Orchestrators pickle exceptions between processes; keyword-only arguments would be lost.
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
    """The provider takes no option of that name."""


class MissingKeyError(ConfigurationError):
    """No API key was given and none is in the environment."""


class Problem(NamedTuple):
    """One thing wrong with the input: `line` counts from 1, `field` is a path such as `body.model`."""

    line: int | None
    field: str | None
    message: str

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line is not None else []
        place += [self.field] if self.field else []
        return f"{', '.join(place)}: {self.message}" if place else self.message


class InputError(AnyBatchError):
    """The request lines cannot be sent as they are; nothing was uploaded and nothing was paid.

    `problems` holds them in line order, up to a cap; `more` counts those beyond it.
    """

    def __init__(
        self, source: str, problems: Sequence[Problem], *, more: int = 0, provider: str | None = None
    ) -> None:
        told = [f"  {problem}" for problem in problems] + ([f"  … and {more} more"] if more else [])
        count = len(problems) + more
        head = f"{source}: {count} problem{'s' if count != 1 else ''} (nothing was sent)"
        super().__init__("\n".join([head, *told]), provider=provider)
        self.source = source
        self.problems = tuple(problems)
        self.more = more


class APIError(AnyBatchError):
    """A request failed for good.

    `code` is the provider's own error code, `retry_after` the pause it asked for in seconds, `should_retry`
    what its `x-should-retry` header said; None where it did not say.
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
    """The key is wrong, or may not do this."""


class NotFoundError(APIError):
    """No such batch or file in this account."""


class BatchLostError(NotFoundError):
    """A batch of a job, or its result file, is gone at the provider, and `on_lost` says "fail"."""


class BadRequestError(APIError):
    """The provider refuses the request; sending it again would not help."""


class RateLimitError(APIError):
    """Too many requests, from this account or from all; the provider has not acted on this one."""


class QuotaError(APIError):
    """The account has no credit or quota left; waiting does not cure it."""


class ServerError(APIError):
    """The provider failed, or answered with something that is not its API."""


class IncompleteListingError(ServerError):
    """A listing could not be read to its end, so that what was not found in it may exist all the same."""


class TransportError(APIError):
    """No answer: name resolution, connection, TLS, proxy or time-out.

    `sent` is False where the request certainly never reached the provider.
    """

    def __init__(self, message: str, *, sent: bool = True, provider: str | None = None) -> None:
        super().__init__(message, provider=provider)
        self.sent = sent


class CreateOutcomeUnknownError(AnyBatchError):
    """A create got no answer, so a batch may be running; it was not repeated."""


class BatchNotCompleteError(AnyBatchError):
    """The batch is still running; `status` says how far it is."""

    def __init__(self, batch_id: str, status: str, *, provider: str | None = None) -> None:
        super().__init__(
            f"batch {batch_id} is {status}: its results exist once it has ended",
            provider=provider,
            batch_id=batch_id,
        )
        self.status = status


class BatchFailedError(AnyBatchError):
    """The provider refused the batch as a whole; `problems` are its reasons, by input line."""

    def __init__(
        self,
        message: str,
        *,
        problems: Sequence[Problem] = (),
        provider: str | None = None,
        batch_id: str | None = None,
    ) -> None:
        told = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(message + told, provider=provider, batch_id=batch_id)
        self.problems = tuple(problems)


class DeadlineExceededError(AnyBatchError, TimeoutError):
    """The batch had not ended at the deadline; it is left running."""


class JobError(AnyBatchError):
    """A job cannot go on by itself."""


class RowsLackingError(JobError):
    """The results have landed, and more rows have none than `on_partial` or `max_failed_ratio` accepts.

    `report` tells what there is. To run the job again reads the same report.
    """

    def __init__(self, message: str, *, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class OrphanError(JobError):
    """An earlier attempt may have created a batch, and this provider offers no way to look it up."""


class InputChangedError(JobError):
    """The job was submitted before with other input or options, or a later round lacks its input."""


class LedgerConflictError(JobError):
    """The job's folder belongs to another job, or another attempt of this job took over."""


# --- what a failure means --------------------------------------------------------------------------------


class Repeat(Enum):
    """Whether the call that failed may be sent again as it is."""

    NEVER = auto()
    LOCKED = auto()  # if it does no harm twice, and the caller takes a conflict for a lock that passes
    HARMLESS = auto()  # if it does no harm twice
    ALWAYS = auto()  # the provider has certainly not acted on it


class Wait(Enum):
    """What a failed look at a batch means for those who wait for it."""

    ENDS_ALL = auto()  # every wait of the account
    ENDS_ONE = auto()
    SLOWS = auto()  # the account is asked less often
    BLIP = auto()
    UNEXPECTED = auto()  # a bug: it ends this wait, with its own traceback

    @property
    def ends(self) -> bool:
        """Whether the wait that met it is over."""
        return self in (Wait.ENDS_ALL, Wait.ENDS_ONE, Wait.UNEXPECTED)


@dataclass(frozen=True, slots=True)
class Kind:
    """What follows from a failure.

    `repeat` whether the same call may be sent again, `may_exist` whether a create that ended so may have left
    a batch, `wait` what it means for those who wait, `is_final` that no retry of a task or run helps before a
    person has changed something, `row_again` whether a row that failed so may be answered if sent again.
    """

    repeat: Repeat = Repeat.NEVER
    may_exist: bool = False
    wait: Wait = Wait.ENDS_ONE
    is_final: bool = False
    row_again: bool = False


_FINAL = Kind(is_final=True)
_KINDS: dict[type[BaseException], Kind] = {
    BaseException: Kind(wait=Wait.UNEXPECTED),
    OSError: Kind(wait=Wait.BLIP),  # time-outs are among them
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

# Refusals that may be none the next time: a lock, early data, a connection that a proxy has closed.
_PASSING = frozenset({409, 423, 425, 499})


def classify(error: BaseException) -> Kind:
    """What follows from a failure, by its class and what the provider said of it.

    The failure of a row counts as the error that an answer would be: `error_of`.
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
        case AuthenticationError(status_code=403):  # not of this batch; others may be the key's to see
            kind = replace(kind, wait=Wait.ENDS_ONE)
    if isinstance(error, APIError) and error.should_retry is not None:
        return replace(kind, repeat=Repeat.HARMLESS if error.should_retry else Repeat.NEVER)
    return kind


_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "insufficient_balance"})
# Anthropic's word for a request that was turned away unread: a create that gets it has left no batch.
_OVERLOADED = "overloaded_error"
# What providers call a request that is refused whenever it is sent.
_REFUSED = re.compile(
    r"invalid|unsupported|not_supported|not_found|too_large|too_long|exceeds|max_length|max_tokens|"
    r"context_length|content_filter|content_policy|moderation|safety|authentication|permission|billing"
)


def error_of(status: int | None, code: str | None) -> type[APIError]:
    """The error that an answer, or a row's failure, stands for: by its HTTP status, else by its code."""
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
