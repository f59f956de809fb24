"""The account that batches run on, as a Dagster resource."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import dagster as dg
from pydantic import Field, field_validator
from upath import UPath

from anybatch import AsyncClient, Batch, Client, Page, Report, RetryPolicy, Row

_KEYS: dict[str, str] = {}


class BatchResource(dg.ConfigurableResource[Any]):
    """A provider and the credentials for it: what batch assets submit to and the batch sensor polls.

    It is also useful alone, inside any asset or op: `create`, `retrieve`, `cancel`, `list` and `results` are
    one call each, and `land_batches` lands what another system has created;
    `with batches.client() as client: …` keeps the connection, and has all that a client has.
    Give the key as `dg.EnvVar("OPENAI_API_KEY")`, or leave it out to have the provider's own variable read.
    """

    provider: str = Field(description="Name of the provider, such as `openai`, `anthropic` or `local`.")
    api_key: str | None = Field(
        default=None, repr=False, description="The key; the provider's own environment variable if left out."
    )
    api_base: str | None = Field(default=None, description="Base URL, where it is not the provider's usual.")
    client_args: dict[str, Any] = Field(
        default={}, repr=False, description="Arguments for the HTTP client: timeout, proxy, verify, headers."
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

        Dagster writes resource config into its database and shows it in the UI. The variable of an
        `EnvVar` is named there, which is right, but a key given as text would be there to read.
        """
        if not isinstance(value, str) or isinstance(value, dg.EnvVar) or value in _KEYS:
            return value
        reference = f"key-{hashlib.sha256(value.encode()).hexdigest()[:12]}"
        _KEYS[reference] = value
        return reference

    @classmethod
    def _is_dagster_maintained(cls) -> bool:
        return False

    def client(self) -> Client:
        """A new client for this account; a context manager."""
        return Client(self.provider, **self._arguments())

    def async_client(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        """A new async client for this account; an async context manager."""
        return AsyncClient(self.provider, **self._arguments(), retry=retry)

    def check(self) -> str:
        """One cheap call that needs the key: a sentence if the provider answers, else an `AnyBatchError`."""
        with self.client() as client:
            return client.check()

    def create(
        self,
        input_file_path: str | os.PathLike[str],
        endpoint: str = "/v1/chat/completions",
        **options: Any,
    ) -> Batch:
        """Submit a JSONL file as one batch, at once and outside of any job; see `anybatch.create_batch`."""
        with self.client() as client:
            return client.create(input_file_path, endpoint, **options)

    def retrieve(self, batch_id: str) -> Batch:
        """A batch as it stands."""
        with self.client() as client:
            return client.retrieve(batch_id)

    def cancel(self, batch_id: str) -> Batch:
        """Ask the provider to stop a batch; what it finished can still be read."""
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
        """Land ended batches of other systems in a folder of their own; as `anybatch.Client` does."""
        with self.client() as client:
            return client.land_batches(batch_ids, folder, endpoint=endpoint, id=id, price=price)

    def _arguments(self) -> dict[str, Any]:
        key = self.api_key
        if isinstance(key, dg.EnvVar):  # used outside of a run, where Dagster has not read the variable
            key = key.get_value()
        key = _KEYS.get(key, key) if key else None
        return {"api_key": key, "api_base": self.api_base, "client_args": self.client_args or None}
