"""Explains what is wrong with a connection, for a person who tests it."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from anybatch import (
    AnyBatchError,
    AuthenticationError,
    MissingKeyError,
    NotFoundError,
    QuotaError,
    RateLimitError,
    ServerError,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NO_BATCH_API = (
    "no batch API is at {base}: a server answers there, but not as a provider would. Is the API base URL "
    "complete? Many end in /v1"
)


def diagnose(error: AnyBatchError, base: str | None, client_args: Mapping[str, Any]) -> str:
    """Explain a failed connection test.

    Args:
        error: What the client raised.
        base: The account's base URL, None if it is not known.
        client_args: The connection's arguments for httpx.

    Returns:
        One sentence, then the client's own message in brackets.
    """
    host = urlsplit(base or "").netloc.rpartition("@")[2] or "the provider"
    match error:
        case MissingKeyError():
            text = "no API key: fill in the API key of the connection"
        case AuthenticationError(status_code=403):
            text = f"{host} knows the key, but the key may not list batches"
        case AuthenticationError():
            text = f"{host} refuses the API key"
        case NotFoundError():
            text = _NO_BATCH_API.format(base=base)
        case ServerError(status_code=None | 200):  # HTTP 200 whose body is not the API's
            text = _NO_BATCH_API.format(base=base)
        case ServerError():
            text = f"{host} has a fault of its own right now; try again later"
        case QuotaError():
            text = "the key works, but its account has no credit or quota left"
        case RateLimitError(status_code=529):
            text = f"{host} is overloaded right now; try again later"
        case RateLimitError():
            text = "the key works, but its account is over its rate limit right now; try again later"
        case TransportError():
            text = _unreachable(error, host, _proxy_for(base, client_args))
        case _:
            return str(error)
    return f"{text}. ({_short(error)})"


def _unreachable(error: TransportError, host: str, proxy: str | None) -> str:
    via = f" through the proxy {proxy}" if proxy else ""
    causes = list(_causes(error))
    kinds = {type(cause).__name__ for cause in causes}
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return (
            f"the TLS certificate of {host} is not trusted. If a private authority signed it, name that "
            'authority\'s file in the HTTP client arguments: {"verify": "/path/to/ca.pem"}'
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return f"{host} does not speak TLS as expected{via}. Should the API base URL begin with http://?"
    if "ProxyError" in kinds:
        return f"the proxy {proxy or 'of the environment'} refuses to connect to {host}"
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return f"the name of {'the proxy ' + proxy if proxy else host} cannot be resolved"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return f"nothing listens at {'the proxy ' + proxy if proxy else host}"
    if any("Timeout" in kind for kind in kinds):
        return f"{host} does not answer in time{via}"
    return f"{host} cannot be reached{via}"


def _proxy_for(base: str | None, client_args: Mapping[str, Any]) -> str | None:
    """The host of the proxy that requests take, without its credentials."""
    proxy = client_args.get("proxy")
    if proxy is None and client_args.get("trust_env", True):
        from urllib.request import proxy_bypass

        parts = urlsplit(base or "")
        if not proxy_bypass(parts.hostname or ""):
            proxies = getproxies()
            proxy = proxies.get(parts.scheme) or proxies.get("all")
    return urlsplit(str(proxy)).netloc.rpartition("@")[2] or None if proxy else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _short(error: AnyBatchError, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
