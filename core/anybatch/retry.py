"""Which failed requests are repeated, and after how long.

Sources: the retry rules of OpenAI's and Anthropic's own SDKs (408, 409, 429, 5xx; `x-should-retry`;
`retry-after-ms`, then `retry-after` as seconds or HTTP date); Anthropic's list of errors (529).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import tenacity

from .errors import APIError, Repeat, ServerError, TransportError, classify, error_of

T = TypeVar("T")

_REQUEST_ID_HEADERS = ("x-request-id", "request-id", "apim-request-id", "cf-ray")
_KEY_HEADERS = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
_MESSAGE_LIMIT = 500
# How often to try if the answer has status 200 but is malformed: it may have been truncated, but a server
# that answers everything with a login page should be reported within seconds.
_MALFORMED = 5


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is repeated, and after how long. The defaults bridge about a minute of failures.

    Attributes:
        attempts: The most tries, the first one included.
        first_delay: Seconds before the first repetition; each further delay is twice as long.
        longest_delay: The longest delay, seconds.
        longest_retry_after: The longest pause that a provider may ask for, seconds. If it asks for more, the
            request fails at once, and the error says how long (`retry_after`).
    """

    attempts: int = 9
    first_delay: float = 0.5
    longest_delay: float = 20.0
    longest_retry_after: float = 120.0

    def call(self, function: Callable[[], T], request: httpx.Request) -> T:
        """Call a function until it succeeds, or its error may not be repeated.

        Args:
            function: Sends the request.
            request: The request; `flow.send` marks it as repeatable or not.

        Returns:
            What the function returns.

        Raises:
            APIError: The last error of the function.
        """
        return tenacity.Retrying(**self._tenacity(request))(function)

    async def acall(self, function: Callable[[], Awaitable[T]], request: httpx.Request) -> T:
        """Do the same as `call` with an asynchronous function.

        Args:
            function: Sends the request.
            request: The request.

        Returns:
            What the function returns.

        Raises:
            APIError: The last error of the function.
        """

        async def attempt() -> T:  # tenacity awaits only coroutine functions
            return await function()

        return await tenacity.AsyncRetrying(**self._tenacity(request))(attempt)

    def _tenacity(self, request: httpx.Request) -> dict[str, Any]:
        repeatable = request.extensions.get("anybatch.repeatable", True)
        conflict = request.extensions.get("anybatch.repeat_conflict", True)
        return {
            "retry": tenacity.retry_if_exception(
                lambda error: (
                    may_repeat(error, repeatable=repeatable, conflict=conflict)
                    and (getattr(error, "retry_after", None) or 0) <= self.longest_retry_after
                )
            ),
            "wait": self._wait,
            "stop": lambda state: state.attempt_number >= self._most_attempts(state),
            "reraise": True,
        }

    def _most_attempts(self, state: tenacity.RetryCallState) -> int:
        error = state.outcome.exception() if state.outcome else None
        malformed = isinstance(error, ServerError) and 200 <= (error.status_code or 0) < 300
        return min(self.attempts, _MALFORMED) if malformed else self.attempts

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return self.delay(state.attempt_number, getattr(error, "retry_after", None), random.random())

    def delay(self, attempt: int, retry_after: float | None, chance: float) -> float:
        """Return how long to wait after a failed attempt.

        Args:
            attempt: The number of the failed attempt, from 1.
            retry_after: The pause that the provider asks for, seconds.
            chance: A random number in [0, 1), for jitter.

        Returns:
            Seconds.
        """
        if retry_after is not None:
            return retry_after + chance * min(1.0, retry_after)
        return min(self.first_delay * 2.0 ** (attempt - 1), self.longest_delay) * (1 - chance / 4)


def may_repeat(error: BaseException, *, repeatable: bool, conflict: bool = True) -> bool:
    """Whether a request may be repeated after this error; `conflict` says whether that includes a 409."""
    match classify(error).repeat:
        case Repeat.ALWAYS:
            return True
        case Repeat.HARMLESS:
            return repeatable
        case Repeat.LOCKED:
            return repeatable and conflict
        case Repeat.NEVER:
            return False


def outcome_unknown(error: APIError) -> bool:
    """Whether the provider may have acted on a request that failed with this error."""
    return classify(error).may_exist


@contextmanager
def transport_errors(request: httpx.Request) -> Iterator[None]:
    """Turn httpx's errors into TransportError, which says whether the request may have been sent."""
    try:
        yield
    except httpx.TransportError as error:
        never_left = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError,
                      httpx.UnsupportedProtocol)  # fmt: skip
        reason = redact(str(error), request) or type(error).__name__
        raise TransportError(
            f"no answer from {request.url.host}: {reason}", sent=not isinstance(error, never_left)
        ) from _without_frames(error)
    except httpx.DecodingError as error:
        raise ServerError(f"{request.url.host} sent a body that cannot be decoded: {error}") from error
    except httpx.InvalidURL as error:
        raise TransportError(f"invalid URL: {error}", sent=False) from error


def _without_frames(error: BaseException) -> BaseException:
    """Remove the frames of an error and its causes: those of the HTTP stack hold the key in a header."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


def raise_for_status(response: httpx.Response) -> None:
    """Raise the APIError of an unsuccessful answer."""
    if response.is_success:
        return
    status, headers = response.status_code, response.headers
    code, message = problem_of(response)
    message = redact(message, response.request)[
        :_MESSAGE_LIMIT
    ]  # cut last: otherwise half a key might remain
    raise error_of(status, code)(
        message,
        code=code,
        retry_after=retry_after(headers, time.time()),
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
        status_code=status,
        request_id=next((headers[name] for name in _REQUEST_ID_HEADERS if name in headers), None),
    )


def problem_of(response: httpx.Response) -> tuple[str | None, str]:
    """Return the provider's error code and message, from any of the shapes that occur.

    These are: `{"error": {"message", "type", "param", "code"}}`, `{"error": "…"}`, `{"message", "code"}`,
    `{"detail": […]}`, `{"type": "error", "error": {"type", "message"}}`, plain text, HTML.
    """
    try:
        body = response.json()
    except ValueError:
        text = " ".join(response.text.split())
        return None, text or response.reason_phrase or "no message"
    if not isinstance(body, dict):
        return None, json.dumps(body)
    error = body.get("error", body)
    if not isinstance(error, dict):
        return None, str(error)
    message = error.get("message") or error.get("detail") or error
    param = error.get("param")
    text = message if isinstance(message, str) else json.dumps(message)
    code = error.get("code") or error.get("type")
    return (
        str(code) if code is not None else None,
        text + (f" (parameter {param})" if param else ""),
    )


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that the provider asks to wait; None if its headers say nothing, or nonsense."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
    except ValueError:
        pass
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def redact(text: str, request: httpx.Request) -> str:
    """Remove the request's own credentials from a text that a server has sent."""
    for name in _KEY_HEADERS:
        secret = request.headers.get(name, "").removeprefix("Bearer ").strip()
        if secret:
            text = text.replace(secret, "[redacted]")
    return text
