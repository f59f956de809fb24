"""Which failures are repeated, after how long."""

from __future__ import annotations

import asyncio
import pickle
from email.utils import formatdate

import httpx
import pytest

from anybatch import errors
from anybatch.flow import aperform, perform, send
from anybatch.retry import (
    RetryPolicy,
    may_repeat,
    outcome_unknown,
    problem_of,
    raise_for_status,
    retry_after,
)

FAST = RetryPolicy(attempts=4, first_delay=0.001, longest_delay=0.002)


def answer(status: int, *, headers: dict[str, str] | None = None, **kwargs: object) -> httpx.Response:
    request = httpx.Request(
        "GET", "https://api.example/v1/batches", headers={"authorization": "Bearer sk-secret"}
    )
    return httpx.Response(status, headers=headers, request=request, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "text"),
    [
        (401, {"error": {"message": "bad key", "code": "invalid_api_key"}}, errors.AuthenticationError,
         "invalid_api_key", "bad key"),
        (403, {"error": "forbidden"}, errors.AuthenticationError, None, "forbidden"),
        (404, {"message": "no such batch", "code": 404}, errors.NotFoundError, "404", "no such batch"),
        (400, {"error": {"message": "bad", "type": "invalid_request_error", "param": "endpoint"}},
         errors.BadRequestError, "invalid_request_error", "bad (parameter endpoint)"),
        (422, {"detail": [{"loc": ["body"], "msg": "missing"}]}, errors.BadRequestError, None, "missing"),
        (429, {"error": {"message": "slow", "code": "rate_limit_exceeded"}}, errors.RateLimitError,
         "rate_limit_exceeded", "slow"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, errors.QuotaError,
         "insufficient_quota", "pay"),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
         errors.RateLimitError, "overloaded_error", "busy"),
        (503, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
         errors.RateLimitError, "overloaded_error", "busy"),
        (529, "busy", errors.RateLimitError, None, "busy"),
        (500, "<html>oops</html>", errors.ServerError, None, "<html>oops</html>"),
        (503, "", errors.ServerError, None, "Service Unavailable"),
    ],
)  # fmt: skip
def test_an_answer_becomes_the_right_error(
    status: int, body: object, kind: type[errors.APIError], code: str | None, text: str
) -> None:
    response = answer(status, text=body) if isinstance(body, str) else answer(status, json=body)
    with pytest.raises(kind) as caught:
        raise_for_status(response)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert text in caught.value.message
    assert caught.value.status_code == status


def test_a_server_that_echoes_the_key_does_not_get_it_into_the_error() -> None:
    with pytest.raises(errors.AuthenticationError) as caught:
        raise_for_status(answer(401, json={"error": {"message": "Incorrect API key provided: sk-secret."}}))
    assert "sk-secret" not in repr(caught.value) + str(caught.value)
    assert "[redacted]" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "repeatable", "expected"),
    [
        (errors.ServerError("x", status_code=500), True, True),
        (errors.ServerError("x", status_code=500), False, False),
        (errors.ServerError("x", status_code=500, should_retry=False), True, False),
        (errors.BadRequestError("x", status_code=409), True, True),
        (errors.BadRequestError("x", status_code=409), False, False),
        (errors.BadRequestError("x", status_code=400), True, False),
        (errors.BadRequestError("x", status_code=400, should_retry=True), True, True),
        (errors.RateLimitError("x", status_code=429), False, True),
        (errors.QuotaError("x", status_code=429), True, False),
        (errors.AuthenticationError("x", status_code=401), True, False),
        (errors.NotFoundError("x", status_code=404), True, False),
        (errors.TransportError("x", sent=True), True, True),
        (errors.TransportError("x", sent=True), False, False),
        (errors.TransportError("x", sent=False), False, True),
        (ValueError("x"), True, False),
    ],
)
def test_what_may_be_repeated(error: Exception, repeatable: bool, expected: bool) -> None:
    assert may_repeat(error, repeatable=repeatable) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.ServerError("x", status_code=502), True),
        (errors.TransportError("x", sent=True), True),
        (errors.TransportError("x", sent=False), False),
        (errors.BadRequestError("x", status_code=400), False),
        (errors.RateLimitError("x", status_code=429), False),
    ],
)
def test_when_a_create_may_have_happened(error: errors.APIError, expected: bool) -> None:
    assert outcome_unknown(error) is expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": formatdate(1_000_030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-4"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after(headers, 1_000_000.0) == expected


@pytest.mark.parametrize(
    ("attempt", "asked", "chance", "expected"),
    [
        (1, None, 0.0, 0.5),
        (3, None, 0.0, 2.0),
        (20, None, 0.0, 20.0),
        (1, None, 0.8, 0.4),
        (1, 5.0, 0.5, 5.5),
    ],
)
def test_delays(attempt: int, asked: float | None, chance: float, expected: float) -> None:
    assert RetryPolicy().delay(attempt, asked, chance) == pytest.approx(expected)


def drive(handler: httpx.MockTransport, *, repeatable: bool, is_async: bool) -> httpx.Response:
    flow = send(httpx.Request("POST", "https://api.example/v1/batches"), repeatable=repeatable)
    if not is_async:
        with httpx.Client(transport=handler, headers={"x-mine": "1"}) as http:
            return perform(flow, http, FAST)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=handler, headers={"x-mine": "1"}) as http:
            return await aperform(flow, http, FAST)

    return asyncio.run(run())


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("script", "repeatable", "sends", "error"),
    [
        ([500, 502, 200], True, 3, None),
        ([500], False, 1, errors.ServerError),
        ([429, 200], False, 2, None),
        ([503, 503, 503, 503], True, 4, errors.ServerError),
        ([httpx.ReadTimeout("slow"), 200], True, 2, None),
        ([httpx.ReadTimeout("slow")], False, 1, errors.TransportError),
        ([httpx.ConnectError("down"), 200], False, 2, None),
        ([400], True, 1, errors.BadRequestError),
    ],
)
def test_a_request_is_sent_as_often_as_it_may_be(
    script: list[int | Exception], repeatable: bool, sends: int, error: type[Exception] | None, is_async: bool
) -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        step = script[len(seen) - 1]
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step, json={})

    if error is None:
        assert drive(httpx.MockTransport(handle), repeatable=repeatable, is_async=is_async).status_code == 200
    else:
        with pytest.raises(error):
            drive(httpx.MockTransport(handle), repeatable=repeatable, is_async=is_async)
    assert len(seen) == sends
    assert seen[0].headers["x-mine"] == "1"  # the client's own headers reach hand-built requests


def test_a_long_retry_after_is_not_slept_through() -> None:
    calls = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(429, headers={"retry-after": "86400"}, json={})

    with pytest.raises(errors.RateLimitError) as caught:
        drive(httpx.MockTransport(handle), repeatable=True, is_async=False)
    assert calls == 1
    assert caught.value.retry_after == 86400


def test_error_bodies_that_are_not_objects() -> None:
    assert problem_of(answer(500, json=["a"])) == (None, '["a"]')


def test_a_deadline_is_a_timeout_like_any_other() -> None:
    with pytest.raises(TimeoutError, match=r"still running \[provider openai, batch b1\]"):
        raise errors.DeadlineExceededError("still running", provider="openai", batch_id="b1")


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("in.jsonl", [errors.Problem(7, "body", "x")], more=2),
        errors.BatchNotCompleteError("b1", "in_progress", provider="openai"),
        errors.TransportError("x", sent=False),
        errors.RateLimitError("x", retry_after=3.0, status_code=429),
        errors.DeadlineExceededError("x", provider="openai", batch_id="b1"),
        errors.BatchFailedError("x", problems=[errors.Problem(1, None, "y")], batch_id="b"),
    ],
)
def test_errors_survive_pickling(error: errors.AnyBatchError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__
