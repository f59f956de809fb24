"""Accounts: a provider with base URL, key and settings."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import SecretStr

from ..errors import ConfigurationError, MissingKeyError, UnknownOptionError
from .keys import Key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .traits import AccountSpec, Given


@dataclass(frozen=True, slots=True)
class Account:
    """A provider with base URL, credentials and settings; waits for one account share polls and connections.

    Attributes:
        provider: The provider's name.
        api_base: The base URL.
        api_key: The key, if there is one.
        settings: The other settings by name, such as a region; the values of secret ones hide themselves.
    """

    provider: str
    api_base: str
    api_key: SecretStr | None = field(default=None, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """A name of the account that reveals no secret: safe in logs, and the same in every process."""
        secret = self.api_key.get_secret_value() if self.api_key else ""
        facts = [self.provider, self.api_base, secret]
        facts += [f"{name}={value}" for name, value in sorted(self.settings.items())]
        return f"{self.provider}:{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}"

    @property
    def place(self) -> str:
        """The base URL followed by the settings that are not secret; it does not change with the key."""
        shown = {name: value for name, value in self.settings.items() if not isinstance(value, Key)}
        return " ".join([self.api_base, *(f"{name}={value}" for name, value in sorted(shown.items()))])


def resolve_account(name: str, spec: AccountSpec, given: Given) -> Account:
    """Build an account from what the user passed and, for the rest, from environment variables.

    Raises MissingKeyError if there is no key, UnknownOptionError for unknown settings, and ConfigurationError
    if something else is missing or invalid.
    """
    base = given.api_base or _from_env(spec.base_env)
    base = (spec.read_base(base) if base and spec.read_base else base) or spec.api_base
    if not base:
        hint = f", or set {', '.join(spec.base_env)}" if spec.base_env else ""
        raise ConfigurationError(f"{name}: api_base is missing; pass it{hint}", provider=name)
    if not base.startswith(("http://", "https://", "sqlite://")):
        raise ConfigurationError(f"{name}: api_base must be an http(s) URL, not {base!r}", provider=name)
    # Keys that were read from a file often end with a newline.
    key = Key((given.api_key or _from_env(spec.key_env) or "").strip())
    if not key and spec.needs_key:
        raise MissingKeyError(
            f"{name}: no API key; pass api_key, or set {', '.join(spec.key_env)}", provider=name
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"{name}: the API key contains characters that cannot be part of a key", provider=name
        )
    settings = _settings(name, spec, given.settings)
    return Account(name, base.rstrip("/"), SecretStr(key) if key else None, settings)


def check_settings(name: str, spec: AccountSpec, given: Mapping[str, str | None]) -> None:
    """Raise UnknownOptionError for settings that the provider does not have; it names those that it has."""
    known = [setting.name for setting in spec.settings]
    if unknown := sorted(set(given) - set(known)):
        raise UnknownOptionError(
            f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}", provider=name
        )


def _settings(name: str, spec: AccountSpec, given: Mapping[str, str | None]) -> Mapping[str, str]:
    check_settings(name, spec, given)
    found: dict[str, str] = {}
    for setting in spec.settings:
        value = given.get(setting.name) or _from_env(setting.env) or setting.default
        if value:
            found[setting.name] = Key(value) if setting.secret else value
        elif setting.is_required:
            hint = f", or set {', '.join(setting.env)}" if setting.env else ""
            raise ConfigurationError(f"{name}: {setting.name} is missing; pass it{hint}", provider=name)
    return MappingProxyType(found)


def _from_env(names: Sequence[str]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
