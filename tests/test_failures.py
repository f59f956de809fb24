"""What follows from each failure: one table for calls, waits, attempts and rows."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import pytest

import anybatch
from anybatch import errors
from anybatch.errors import Kind, Problem, Repeat, Wait, classify, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = Kind(is_final=True)
SETTING = Kind(wait=Wait.ENDS_ALL, is_final=True)
FAILED = Kind(Repeat.HARMLESS, may_exist=True, wait=Wait.BLIP, row_again=True)
PASSING = Kind(wait=Wait.BLIP)

KINDS: dict[str, Kind] = {
    "AnyBatchError": Kind(),
    "ConfigurationError": SETTING,
    "UnknownProviderError": SETTING,
    "UnknownOptionError": SETTING,
    "MissingKeyError": SETTING,
    "InputError": REFUSED,
    "APIError": Kind(wait=Wait.BLIP),
    "AuthenticationError": SETTING,
    "NotFoundError": REFUSED,
    "MaybeLostError": REFUSED,
    "FileGoneError": REFUSED,
    "BatchLostError": REFUSED,
    "BadRequestError": REFUSED,
    "RateLimitError": Kind(Repeat.ALWAYS, wait=Wait.SLOWS, row_again=True),
    "QuotaError": Kind(wait=Wait.SLOWS, is_final=True, row_again=True),
    "ServerError": FAILED,
    "IncompleteListingError": FAILED,
    "TransportError": FAILED,
    "CreateOutcomeUnknownError": Kind(may_exist=True),
    "BatchNotCompleteError": Kind(),
    "BatchFailedError": Kind(),
    "DeadlineExceededError": Kind(),
    "JobError": REFUSED,
    "RowsLackingError": REFUSED,
    "OrphanError": REFUSED,
    "InputChangedError": REFUSED,
    "InputGoneError": REFUSED,
    "LedgerConflictError": Kind(),
}


ERRORS = [
    errors.ConfigurationError("x"),
    errors.InputError("in.jsonl", [Problem(1, None, "x")]),
    errors.AuthenticationError("x", status_code=401),
    errors.NotFoundError("x", status_code=404),
    errors.BatchLostError("x"),
    errors.BadRequestError("x", status_code=400),
    errors.RateLimitError("x", status_code=429),
    errors.QuotaError("x", status_code=429),
    errors.ServerError("x", status_code=500),
    errors.TransportError("x"),
    errors.CreateOutcomeUnknownError("x"),
    errors.BatchNotCompleteError("b", "in_progress"),
    errors.BatchFailedError("x"),
    errors.DeadlineExceededError("x"),
    errors.RowsLackingError("x"),
    errors.OrphanError("x"),
    errors.InputChangedError("x"),
    errors.LedgerConflictError("x"),
]
"""One of each that may end an attempt."""


def subclasses(cls: type[BaseException]) -> Iterator[type[BaseException]]:
    yield cls
    for one in cls.__subclasses__():
        yield from subclasses(one)


def test_every_error_has_its_row_in_the_table() -> None:
    for module in pkgutil.walk_packages(anybatch.__path__, "anybatch."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {one for one in subclasses(errors.AnyBatchError) if one.__module__.startswith("anybatch")}
    assert {one.__name__ for one in ours} == KINDS.keys()
    for one in ours:
        error = one.__new__(one)  # as most are: the provider has said nothing more of it
        error.__dict__.update(status_code=None, should_retry=None, sent=True)
        assert classify(error) == KINDS[one.__name__], one


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.TransportError("x", sent=False), Kind(Repeat.ALWAYS, wait=Wait.BLIP, row_again=True)),
        (errors.AuthenticationError("x", status_code=401), SETTING),
        (errors.AuthenticationError("x", status_code=403), REFUSED),
        (errors.BadRequestError("x", status_code=400), REFUSED),
        (errors.BadRequestError("x", status_code=422), REFUSED),
        (
            errors.BadRequestError("x", status_code=400, should_retry=True),
            Kind(Repeat.HARMLESS, wait=Wait.BLIP),
        ),
        (errors.BadRequestError("x", status_code=409), Kind(Repeat.LOCKED, wait=Wait.BLIP)),
        (errors.BadRequestError("x", status_code=409, should_retry=False), PASSING),
        (errors.BadRequestError("x", status_code=425), PASSING),
        (errors.RateLimitError("x", should_retry=True), KINDS["RateLimitError"]),
        (errors.RateLimitError("x", should_retry=False), Kind(wait=Wait.SLOWS, row_again=True)),
        (errors.ServerError("x", should_retry=False), Kind(may_exist=True, wait=Wait.BLIP, row_again=True)),
        (TimeoutError(), PASSING),
        (ConnectionResetError(), PASSING),
        (TypeError("a bug"), Kind(wait=Wait.UNEXPECTED)),
        (ValueError("malformed"), Kind(wait=Wait.UNEXPECTED)),
        (KeyboardInterrupt(), Kind(wait=Wait.UNEXPECTED)),
    ],
    ids=repr,
)
def test_what_the_provider_said_of_it_counts(error: BaseException, expected: Kind) -> None:
    assert classify(error) == expected


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (408, None, True),
        (429, None, True),
        (429, "insufficient_quota", True),
        (402, None, True),
        (500, "invalid_request_error", True),
        (529, None, True),
        (400, None, False),
        (401, None, False),
        (404, None, False),
        (409, None, False),
        (200, "server_error", True),
        (None, None, True),
        (None, "overloaded_error", True),
        (None, "billing_hard_limit_reached", True),
        (None, "billing_error", False),
        (None, "invalid_request_error", False),
        (None, "context_length_exceeded", False),
    ],
)
def test_which_rows_may_be_answered_if_they_are_sent_again(
    status: int | None, code: str | None, again: bool
) -> None:
    assert classify(error_of(status, code)("", code=code, status_code=status)).row_again is again
