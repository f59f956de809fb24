"""BatchResource: the provider account that batches run on."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field, ValidationInfo, field_validator
from upath import UPath

from anybatch import AnyBatchError, AsyncClient, Batch, Client, Page, Report, RetryPolicy, Row
from anybatch.providers import Given, Provider, open_provider, settings_of

_SECRETS: dict[str, str] = {}  # by the references that stand for them in resource config


class BatchResource(dg.ConfigurableResource[Any]):
    """A provider and the credentials for it: batch assets submit to it, and the batch sensor polls it.

    Any asset or op can use it, too. `create`, `retrieve`, `cancel`, `list` and `results` are one call each,
    and `land_batches` lands what another system has created. `with batches.client() as client: …` keeps the
    connection, and has all that a client has. Give the key as `dg.EnvVar("OPENAI_API_KEY")`, or leave it out
    to use the provider's own environment variable.
    """

    provider: str = Field(description="Name of the provider, such as `openai`, `anthropic` or `local`.")
    api_key: str | None = Field(
        default=None, repr=False, description="The key; the provider's own environment variable if left out."
    )
    api_base: str | None = Field(default=None, description="Base URL, where it is not the provider's usual.")
    client_args: dict[str, Any] = Field(
        default={}, repr=False, description="Arguments for the HTTP client: timeout, proxy, verify, headers."
    )
    settings: dict[str, Any] = Field(
        default={},
        repr=False,
        description="What the provider's account has besides key and base URL, by name, such as a region; its"
        " environment variables if left out.",
    )
    output: str | None = Field(
        default=None,
        description="Folder or fsspec URL under which each batch asset keeps its job folders; the instance's"
        " storage directory if left out.",
    )
    max_in_flight: int | None = Field(
        default=None,
        description="How many runs of batch assets may have a batch on this account at a time; others wait in"
        " the queue for their turn, for which the instance needs the gate rule. No limit if left out.",
    )

    @field_validator("api_key", mode="before")
    @classmethod
    def _keep_key_out_of_config(cls, value: Any) -> Any:
        """Replace a key by a reference to it.

        Dagster writes resource config into its database and shows it in the UI. Of an `EnvVar` it stores the
        variable's name, which is fine, but a key given as text could be read there.
        """
        return _reference(value)

    @field_validator("settings", mode="before")
    @classmethod
    def _keep_secrets_out_of_config(cls, value: Any, info: ValidationInfo) -> Any:
        """The same for those settings that the provider declares secret."""
        if not value or not isinstance(value, Mapping):
            return value
        try:
            shown = {one.name for one in settings_of(info.data["provider"]) if not one.secret}
        except (AnyBatchError, KeyError):  # unknown provider: treat every setting as secret
            shown = set()
        return {name: one if name in shown else _reference(one) for name, one in value.items()}

    @classmethod
    def _is_dagster_maintained(cls) -> bool:
        return False

    def client(self) -> Client:
        """A new client for this account; use it as a context manager."""
        return Client(self._account(), client_args=self.client_args or None)

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        """A new async client for this account; use it as an async context manager."""
        return AsyncClient(self._account(), client_args=self.client_args or None, retry=retry)

    def check(self) -> str:
        """Make one cheap call that needs the key.

        Returns:
            A sentence that says the provider answered.

        Raises:
            AnyBatchError: It did not, or refused the key.
        """
        with self.client() as client:
            return client.check()

    def create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str = "/v1/chat/completions",
        **options: Any,
    ) -> Batch:
        """Submit a JSONL file as one batch, at once and outside of any job.

        Args:
            input_file_path: Path or fsspec URL of the file.
            endpoint: As in `anybatch.create_batch`, and so are the other options.
        """
        with self.client() as client:
            return client.create(input_file_path, endpoint, **options)

    def retrieve(self, batch_id: str) -> Batch:
        """A batch, as it is now."""
        with self.client() as client:
            return client.retrieve(batch_id)

    def cancel(self, batch_id: str) -> Batch:
        """Ask the provider to cancel a batch; what it finished can still be read."""
        with self.client() as client:
            return client.cancel(batch_id)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page:
        """One page of the account's batches, newest first."""
        with self.client() as client:
            return client.list(after=after, limit=limit)

    def results(self, batch_id: str) -> Iterator[Row]:
        """The rows of an ended batch, in the provider's order, in constant memory."""
        with self.client() as client:
            yield from client.results(batch_id)

    def land_batches(
        self,
        batch_ids: str | Iterable[str],
        folder: str | os.PathLike[str] | UPath,
        *,
        endpoint: str | None = None,
        id: str | None = None,
        price: tuple[float, float] | None = None,
    ) -> Report:
        """Land ended batches of other systems in a folder; as `anybatch.Client.land_batches`."""
        with self.client() as client:
            return client.land_batches(batch_ids, folder, endpoint=endpoint, id=id, price=price)

    def _account(self) -> Provider:
        settings = {name: _read(value) for name, value in self.settings.items()}
        return open_provider(self.provider, Given(_read(self.api_key), self.api_base, settings))


def _reference(value: Any) -> Any:
    """What stands for a secret in config; an `EnvVar` stands for itself."""
    if not isinstance(value, str) or isinstance(value, dg.EnvVar) or value in _SECRETS:
        return value
    reference = f"key-{hashlib.sha256(value.encode()).hexdigest()[:12]}"
    _SECRETS[reference] = value
    return reference


def _read(value: Any) -> str | None:
    """The secret or setting that a config value stands for.

    Dagster reads the `EnvVar`s of fields, and only inside of runs; one in a mapping stays `{"env": name}`.
    """
    if isinstance(value, Mapping):
        value = dg.EnvVar(value["env"])
    if isinstance(value, dg.EnvVar):
        value = value.get_value()
    return _SECRETS.get(value, str(value)) if value not in (None, "") else None
