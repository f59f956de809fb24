"""Whose batches they are: provider, base URL and key, and to whom the key is shown."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
from pydantic import SecretStr

from ..errors import ConfigurationError, MissingKeyError
from .keys import Key

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Account:
    """Provider, base URL and credentials: what polling and connection pools are shared by.

    `key` names the account without telling its secret: safe in logs, and equal in every process.
    """

    provider: str
    api_base: str
    api_key: SecretStr | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        secret = self.api_key.get_secret_value() if self.api_key else ""
        digest = hashlib.sha256("\0".join((self.provider, self.api_base, secret)).encode())
        return f"{self.provider}:{digest.hexdigest()[:16]}"


class KeyAuth(httpx.Auth):
    """Puts the key on requests to the account's own host, and on no others.

    Signed URLs, result URLs and redirects elsewhere carry their own permission and must not see the key.
    """

    def __init__(self, account: Account, headers: Mapping[str, str]) -> None:
        self._origin = _origin(httpx.URL(account.api_base))
        self._headers = headers

    def trusts(self, url: httpx.URL) -> bool:
        return _origin(url) == self._origin

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self.trusts(request.url):
            request.headers.update(self._headers)
        yield request


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def resolve_account(
    name: str,
    *,
    api_key: str | None,
    api_base: str | None,
    default_base: str | None,
    key_env: Sequence[str],
    base_env: Sequence[str] = (),
    needs_key: bool = True,
) -> Account:
    """The account from the arguments, else from the provider's environment variables."""
    base = api_base or _from_env(base_env) or default_base
    if not base:
        raise ConfigurationError(
            f"{name}: api_base is missing; give it" + (f", or set {', '.join(base_env)}" if base_env else ""),
            provider=name,
        )
    if not base.startswith(("http://", "https://", "sqlite://")):
        raise ConfigurationError(f"{name}: api_base must be an http(s) URL, not {base!r}", provider=name)
    # Keys that were read from a file often end in its newline.
    key = Key((api_key or _from_env(key_env) or "").strip())
    if not key and needs_key:
        raise MissingKeyError(f"{name}: no API key; give api_key, or set {', '.join(key_env)}", provider=name)
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(f"{name}: the API key holds characters that no key has", provider=name)
    return Account(name, base.rstrip("/"), SecretStr(key) if key else None)


def _from_env(names: Sequence[str]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
