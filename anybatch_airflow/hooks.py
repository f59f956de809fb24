"""The Airflow connection behind a batch: which provider, where, and with whose key."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from airflow.providers.common.compat.sdk import BaseHook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from airflow.providers.common.compat.sdk import Connection

    from anybatch import AsyncClient, Client
    from anybatch.polling.watcher import Watcher
    from anybatch.providers import Provider

_FIRST_PARTY = "anthropic"  # the only platform of the Anthropic provider that signs in by API key

# Connections of other providers whose extra names the model as "provider:model".
_BY_MODEL = ("pydanticai", "pydantic-ai", "langchain")
# What such a prefix is called here; others are the same.
_PREFIXES = {
    "openai-chat": "openai",  # two APIs of one account
    "openai-responses": "openai",
    "azure-openai": "azure",
    "mistralai": "mistral",
    "moonshotai": "moonshot",
}
_OTHER_SIGN_IN = {"pydanticai-bedrock": "AWS Bedrock", "pydanticai-vertex": "Google Vertex AI"}

# The look-ups under way in each event loop: a triggerer starts hundreds of triggers at once, of few
# connections, and it takes Airflow 15 ms of CPU to tell one.
_Wanted: TypeAlias = tuple[str | None, str | None, str | None]
_lookups: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Wanted, asyncio.Task[Watcher]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The arguments of an `anybatch.Client`; the key is left out of the repr."""

    provider: str
    api_key: str | None = field(default=None, repr=False)
    api_base: str | None = None
    client_args: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold headers
    console_url: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)  # some may be secret

    def open(self) -> Provider:
        """The account at the provider. Raises ConfigurationError; settings that it lacks are named."""
        from anybatch.providers import Given, open_provider

        return open_provider(self.provider, Given(self.api_key, self.api_base, self.settings))

    def as_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `anybatch.Client` and `anybatch.AsyncClient`."""
        return {"provider": self.open(), "client_args": dict(self.client_args) or None}


class AnyBatchHook(BaseHook):
    """Turns an Airflow connection into an anybatch client.

    The connection's `password` is the key, `host` the base URL (empty for the provider's own), `extra` holds
    `provider`, `settings` (what the provider's account has beside key and base URL, by name, such as a
    region), for httpx `client_args`, and for the link to a console that is not the provider's own
    `console_url`. Connections of other types serve as they are: `openai`, `anthropic`, `pydanticai`,
    `pydanticai_azure`, `langchain`, `llamaindex`, and any type whose `extra` names a `provider`. What the
    connection leaves empty comes from the provider's own environment variables, on the worker and on the
    triggerer alike.

    :param conn_id: The connection; None for none, then `provider` is needed.
    :param provider: Overrides the connection's provider.
    :param api_base: Overrides the connection's base URL.
    """

    conn_name_attr = "conn_id"
    default_conn_name = "anybatch_default"
    conn_type = "anybatch"
    hook_name = "anybatch (LLM batches)"

    def __init__(
        self,
        conn_id: str | None = default_conn_name,
        *,
        provider: str | None = None,
        api_base: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """What Airflow 3.1 asks the hook about the standard fields of the connection form."""
        from anybatch_airflow.provider_info import connection_type

        behaviour = connection_type()["ui-field-behaviour"]
        return {name.replace("-", "_"): value for name, value in behaviour.items()}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """What Airflow 3.1 asks the hook about its own fields; objects are text there, in JSON."""
        # The API server puts a stand-in there where wtforms is not installed.
        from wtforms import StringField  # pyright: ignore[reportMissingModuleSource]

        from anybatch_airflow.provider_info import connection_type

        fields = connection_type()["conn-fields"]
        return {
            name: StringField(field["label"], description=field["description"])
            for name, field in fields.items()
        }

    def __repr__(self) -> str:
        return f"AnyBatchHook(conn_id={self.conn_id!r}, provider={self.provider!r})"

    def get_conn(self) -> Client:
        """The same as `get_client`, under the name every hook has."""
        return self.get_client()

    def get_client(self, **kwargs: Any) -> Client:
        """A new client for a worker; close it, or use it as a context manager."""
        from anybatch import Client

        return Client(**self._settings().as_kwargs(), **kwargs)

    async def get_async_client(self, *, attempts: int | None = None) -> AsyncClient:
        """A new client for a trigger, made without blocking the event loop.

        `attempts` is how often it sends a request that fails, for callers that repeat calls by themselves.
        """
        settings = await self._async_settings()
        # Importing the client takes long enough to hold up the other triggers, so not on their event loop.
        return await asyncio.to_thread(_async_client, settings, attempts)

    async def get_watcher(self) -> Watcher:
        """The poller that all triggers of this process share for this account; one client for all."""
        lookups = _lookups.setdefault(asyncio.get_running_loop(), {})
        wanted = (self.conn_id, self.provider, self.api_base)
        if wanted not in lookups:
            # In a context of its own: what it logs is no line of the task whose trigger came first.
            lookups[wanted] = asyncio.create_task(self._find_watcher(), context=Context())
            lookups[wanted].add_done_callback(lambda _: lookups.pop(wanted))
        lookup = lookups[wanted]
        await asyncio.wait([lookup])  # a trigger that is ended ends it for no other
        if error := lookup.exception():
            from anybatch.polling.schedule import copy_of

            raise copy_of(error)
        return lookup.result()

    async def _find_watcher(self) -> Watcher:
        settings = await self._async_settings()
        key, make_client = await asyncio.to_thread(_poller, settings)
        from anybatch.polling.registry import get_watcher

        return get_watcher(key, make_client)

    def console_url(self, client: Client | AsyncClient, batch_ids: Sequence[str]) -> str | None:
        """Where a person looks at these batches; None where no such page is known."""
        return client.provider.console_url(batch_ids, self._settings().console_url)

    def test_connection(self) -> tuple[bool, str]:
        """One cheap authenticated call; the message is for the person in front of the connection form."""
        from anybatch import AnyBatchError, RetryPolicy
        from anybatch_airflow.diagnosis import diagnose

        base = self.api_base
        client_args: dict[str, Any] = {}
        try:
            client_args = dict(self._settings().client_args)
            with self.get_client(retry=RetryPolicy(attempts=1)) as client:
                base = client.account.api_base
                return True, client.check()
        except AnyBatchError as error:
            return False, diagnose(error, base, client_args)
        except (ImportError, TypeError, ValueError) as error:  # client_args that httpx does not take
            return False, f"{type(error).__name__}: {error}"

    def _settings(self) -> ClientSettings:
        if self.conn_id is None:
            return self._without_connection()
        connection = self.get_connection(self.conn_id)
        return self._read(connection, connection.extra_dejson)

    async def _async_settings(self) -> ClientSettings:
        from airflow.providers.common.compat.connection import get_async_connection, get_async_extra_dejson

        if self.conn_id is None:
            return self._without_connection()
        connection = await get_async_connection(self.conn_id)
        return self._read(connection, await get_async_extra_dejson(connection))

    def _read(self, connection: Connection, extra: Mapping[str, Any]) -> ClientSettings:
        return read_connection(connection, extra, provider=self.provider, api_base=self.api_base)

    def _without_connection(self) -> ClientSettings:
        from anybatch import ConfigurationError

        if self.provider is None:
            raise ConfigurationError("give a conn_id or a provider")
        return ClientSettings(provider=self.provider, api_base=self.api_base)


def read_connection(
    connection: Connection,
    extra: Mapping[str, Any],
    *,
    provider: str | None = None,
    api_base: str | None = None,
) -> ClientSettings:
    """What a connection says, whatever its type; the arguments win over the connection.

    Raises ConfigurationError where the connection does not tell the provider, or uses a way to sign in that
    anybatch does not have.
    """
    kind = (connection.conn_type or "").replace("_", "-")
    _refuse_foreign_auth(connection.conn_id, kind, extra)
    foreign = dict(extra.get(f"{kind}_client_kwargs") or {})
    client_args = {**_client_args(foreign), **_object(extra, "client_args")}
    return ClientSettings(
        provider=provider or _provider_of(connection.conn_id, kind, extra),
        api_key=foreign.get("api_key") or connection.password or extra.get("api_key") or None,
        api_base=api_base or foreign.get("base_url") or _base_url(connection, kind) or extra.get("api_base"),
        client_args=client_args,
        console_url=extra.get("console_url") or None,
        settings={name: str(value) for name, value in _object(extra, "settings").items()},
    )


def _provider_of(conn_id: str, kind: str, extra: Mapping[str, Any]) -> str:
    from anybatch import ConfigurationError

    if named := extra.get("provider"):
        return str(named)
    if kind in ("openai", "anthropic"):
        return kind
    if kind == "pydanticai-azure":
        return "azure"
    if kind == "llamaindex":  # which takes OpenAI's API and no other
        return "openai"
    model = str(extra.get("model") or "")
    if kind in _BY_MODEL and ":" in model:
        prefix = model.split(":", 1)[0].replace("_", "-")
        return _PREFIXES.get(prefix, prefix)
    raise ConfigurationError(
        f"connection {conn_id!r} (type {kind or 'unknown'}) does not say which provider it is for: "
        'put {"provider": "openai"} or another name into its extra, or give `provider` to the task'
    )


def _refuse_foreign_auth(conn_id: str, kind: str, extra: Mapping[str, Any]) -> None:
    from anybatch import ConfigurationError

    if kind == "openai" and extra.get("auth_type", "api_key") != "api_key":
        raise ConfigurationError(
            f"connection {conn_id!r} signs in by {extra['auth_type']!r}; anybatch needs an API key"
        )
    if kind == "anthropic" and str(extra.get("platform") or _FIRST_PARTY).lower() != _FIRST_PARTY:
        raise ConfigurationError(
            f"connection {conn_id!r} signs in through platform {extra['platform']!r}; anybatch needs an API "
            "key of Anthropic's own API"
        )
    if kind in _OTHER_SIGN_IN:
        raise ConfigurationError(
            f"connection {conn_id!r} signs in to {_OTHER_SIGN_IN[kind]}, whose batches anybatch does not run"
        )


def _client_args(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """The OpenAI and Anthropic SDKs' client arguments that have a meaning for httpx."""
    headers = {str(name): str(value) for name, value in (foreign.get("default_headers") or {}).items()}
    if organization := foreign.get("organization"):
        headers["OpenAI-Organization"] = str(organization)
    if project := foreign.get("project"):
        headers["OpenAI-Project"] = str(project)
    found: dict[str, Any] = {"headers": headers} if headers else {}
    if timeout := foreign.get("timeout"):
        found["timeout"] = timeout
    return found


def _object(extra: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object in an extra, which a connection form may have stored as text."""
    from anybatch import ConfigurationError

    if not (value := extra.get(name)):
        return {}
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigurationError(f"{name} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ConfigurationError(f"{name} is not a JSON object")
    return read


def _async_client(settings: ClientSettings, attempts: int | None) -> AsyncClient:
    from anybatch import AsyncClient, RetryPolicy

    retry = None if attempts is None else RetryPolicy(attempts=attempts)
    return AsyncClient(**settings.as_kwargs(), retry=retry)


def _poller(settings: ClientSettings) -> tuple[str, Callable[[], AsyncClient]]:
    """What a watcher is known by, and how it makes its client. Raises ConfigurationError."""
    from anybatch import AsyncClient, RetryPolicy
    from anybatch.polling.registry import watcher_key

    _freeze_once()
    provider = settings.open()
    client_args = dict(settings.client_args)

    def make_client() -> AsyncClient:
        # The watcher repeats failed calls by itself.
        return AsyncClient(provider, client_args=client_args, retry=RetryPolicy(attempts=2))

    return watcher_key(provider.account.key, client_args), make_client


@functools.cache
def _freeze_once() -> None:
    """Keep Python's garbage collector off what a triggerer has loaded, as Airflow's executors do.

    Its 300,000 objects stay anyhow, and a full collection of them holds up the event loop for 0.2 s, which
    Airflow reports as a badly written trigger.
    """
    gc.freeze()


def _base_url(connection: Connection, kind: str) -> str | None:
    if not connection.host:
        return None
    url = _whole_url(connection.host, connection.schema or "", connection.port)
    if kind == "pydanticai-azure" and "/openai" not in url:
        return url.rstrip("/") + "/openai/v1"  # that type holds the bare endpoint of the resource
    return url


def _whole_url(host: str, schema: str, port: int | None) -> str:
    """The base URL, whole as a form has it, or in the parts to which a connection URI takes it.

    What comes after the host in such a URI is stored as the schema: a path, though some write the scheme
    there, `anybatch://:key@gateway:8080/http`, or both.
    """
    scheme, _, path = schema.strip("/").partition("/")
    if scheme not in ("http", "https"):
        scheme, path = "https", schema.strip("/")
    url = host if "://" in host else f"{scheme}://{host}"
    if urlsplit(url).path:
        return url
    return url + (f":{port}" if port else "") + (f"/{path}" if path else "")
