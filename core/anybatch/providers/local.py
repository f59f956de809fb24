"""The embedded provider: OpenAI's wire format, served from an SQLite file instead of a host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..local.transport import BASE_URL, LocalTransport, database_path
from .account import Account, check_settings
from .openai import Dialect, OpenAIFormat
from .traits import AccountSpec, Given, Traits

if TYPE_CHECKING:
    from pathlib import Path

_DIALECT = Dialect(
    Traits(name="local", account=AccountSpec(needs_key=False), one_model=True, poll_seconds=(1.0, 5.0))
)


class Local(OpenAIFormat):
    """Batches on this machine, without a key, a server or a network; see `anybatch.local`."""

    def __init__(self, path: Path) -> None:
        super().__init__(Account("local", f"sqlite://{path}"), _DIALECT)
        self.path = path

    @classmethod
    def traits_of(cls, name: str) -> Traits:
        return _DIALECT.traits

    @classmethod
    def open(cls, name: str, given: Given) -> Local:
        check_settings(name, _DIALECT.traits.account, given.settings)
        try:
            return cls(database_path(given.api_base))
        except ValueError as error:
            raise ConfigurationError(f"api_base: {error}", provider=name) from None

    def transport(self) -> LocalTransport:
        try:
            return LocalTransport(self.path)
        except OSError as error:
            raise ConfigurationError(f"{self.path}: {error}", provider=self.name) from error

    def atransport(self) -> LocalTransport:
        return self.transport()

    def auth_headers(self) -> dict[str, str]:
        return {}

    @property
    def base_url(self) -> str:
        return BASE_URL
