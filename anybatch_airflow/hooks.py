"""From an Airflow connection to a client: which provider, at which address, with whose key."""

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

_KEY_PLATFORM = "anthropic"  # the only platform of Airflow's Anthropic provider that signs in by API key

# Connections of other providers whose extra names the model as "provider:model".
_TYPES_WITH_MODEL = ("pydanticai", "pydantic-ai", "langchain")
# The provider that such a prefix means, where anybatch calls it otherwise.
_PROVIDER_OF_PREFIX = {
    "openai-chat": "openai",  # another API of the same account
    "openai-responses": "openai",
    "azure-openai": "azure",
    "mistralai": "mistral",
    "moonshotai": "moonshot",
}
_OTHER_SIGN_IN = {"pydanticai-bedrock": "AWS Bedrock", "pydanticai-vertex": "Google Vertex AI"}

# The look-ups of connections under way, by event loop. A triggerer starts hundreds of triggers of a few
# connections at once, and each look-up takes Airflow 15 ms of CPU, so they share one.
_HookArguments: TypeAlias = tuple[str | None, str | None, str | None]
_lookups: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_HookArguments, asyncio.Task[Watcher]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The arguments of an `anybatch.Client`; its repr hides what may be secret."""

    provider: str
    api_key: str | None = field(default=None, repr=False)
    api_base: str | None = None
    client_args: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold headers
    console_url: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)  # some may be secret

    def open(self) -> Provider:
        """The account at the provider.

        Raises:
            ConfigurationError: The provider is unknown, or the account lacks a setting, which the message
                names.
        """
        from anybatch.providers import Given, open_provider

        return open_provider(self.provider, Given(self.api_key, self.api_base, self.settings))

    def as_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `anybatch.Client` and `anybatch.AsyncClient`."""
        return {"provider": self.open(), "client_args": dict(self.client_args) or None}


class AnyBatchHook(BaseHook):
    """Turns an Airflow connection into an anybatch client.

    The connection's `password` is the key and its `host` the base URL (empty: the provider's own). Its
    `extra` holds `provider`; `settings`, what the provider's account has besides key and base URL, by name,
    such as a region; `client_args` for httpx; and `console_url`, for links to a console that is not the
    provider's own.

    Connections of other types serve as they are: `openai`, `anthropic`, `pydanticai`, `pydanticai_azure`,
    `langchain`, `llamaindex`, and any type whose `extra` names a `provider`. What a connection leaves empty
    comes from the provider's environment variables, on the worker and on the triggerer.

    Args:
        conn_id: The connection; None to use none, and then `provider` is needed.
        provider: Overrides the connection's provider.
        api_base: Overrides the connection's base URL.
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
        """For Airflow 3.1, which asks the hook about the standard fields of the connection form."""
        from anybatch_airflow.provider_info import connection_type

        behaviour = connection_type()["ui-field-behaviour"]
        return {name.replace("-", "_"): value for name, value in behaviour.items()}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """For Airflow 3.1, which asks the hook about its own form fields; objects are JSON text there."""
        # Where wtforms is not installed, Airflow's API server puts a stand-in in its place.
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
        """The same as `get_client`, under the name that every Airflow hook has."""
        return self.get_client()

    def get_client(self, **kwargs: Any) -> Client:
        """A new client for a worker; close it, or use it as a context manager."""
        from anybatch import Client

        return Client(**self._settings().as_kwargs(), **kwargs)

    async def get_async_client(self, *, attempts: int | None = None) -> AsyncClient:
        """A new client for a trigger; making it does not block the event loop.

        Args:
            attempts: How often the client sends a request that fails; 2 or so for a caller that repeats calls
                itself.
        """
        settings = await self._async_settings()
        # In a thread: importing the client takes long enough to delay the other triggers of this event loop.
        return await asyncio.to_thread(_async_client, settings, attempts)

    async def get_watcher(self) -> Watcher:
        """The poller and client that all triggers of this process share for this account."""
        lookups = _lookups.setdefault(asyncio.get_running_loop(), {})
        wanted = (self.conn_id, self.provider, self.api_base)
        if wanted not in lookups:
            # In an empty context: else its log lines would go to the task whose trigger came first.
            lookups[wanted] = asyncio.create_task(self._find_watcher(), context=Context())
            lookups[wanted].add_done_callback(lambda _: lookups.pop(wanted))
        lookup = lookups[wanted]
        await asyncio.wait(
            [lookup]
        )  # unlike `await lookup`, a cancelled trigger does not cancel the look-up of the others
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
        """The page on which a person sees these batches; None if no such page is known."""
        return client.provider.console_url(batch_ids, self._settings().console_url)

    def test_connection(self) -> tuple[bool, str]:
        """Make one cheap call that needs the key.

        Returns:
            Whether it worked, and a sentence for the person in front of the connection form.
        """
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
        except (ImportError, TypeError, ValueError) as error:  # httpx refuses the client_args
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
            raise ConfigurationError("neither conn_id nor provider is given: name a connection or a provider")
        return ClientSettings(provider=self.provider, api_base=self.api_base)


def read_connection(
    connection: Connection,
    extra: Mapping[str, Any],
    *,
    provider: str | None = None,
    api_base: str | None = None,
) -> ClientSettings:
    """What a connection of any type says.

    Args:
        connection: The connection.
        extra: Its `extra`, as an object.
        provider: Overrides the connection's provider.
        api_base: Overrides the connection's base URL.

    Raises:
        ConfigurationError: The connection does not name the provider, or signs in by something else than an
            API key.
    """
    kind = (connection.conn_type or "").replace("_", "-")
    _refuse_other_sign_in(connection.conn_id, kind, extra)
    sdk_args = dict(extra.get(f"{kind}_client_kwargs") or {})
    client_args = {**_client_args(sdk_args), **_json_object(extra, "client_args")}
    return ClientSettings(
        provider=provider or _provider_of(connection.conn_id, kind, extra),
        api_key=sdk_args.get("api_key") or connection.password or extra.get("api_key") or None,
        api_base=api_base or sdk_args.get("base_url") or _base_url(connection, kind) or extra.get("api_base"),
        client_args=client_args,
        console_url=extra.get("console_url") or None,
        settings={name: str(value) for name, value in _json_object(extra, "settings").items()},
    )


def _provider_of(conn_id: str, kind: str, extra: Mapping[str, Any]) -> str:
    from anybatch import ConfigurationError

    if named := extra.get("provider"):
        return str(named)
    if kind in ("openai", "anthropic"):
        return kind
    if kind == "pydanticai-azure":
        return "azure"
    if kind == "llamaindex":  # its connections are for OpenAI's API only
        return "openai"
    model = str(extra.get("model") or "")
    if kind in _TYPES_WITH_MODEL and ":" in model:
        prefix = model.split(":", 1)[0].replace("_", "-")
        return _PROVIDER_OF_PREFIX.get(prefix, prefix)
    raise ConfigurationError(
        f"connection {conn_id!r} (type {kind or 'unknown'}) does not say which provider it is for: "
        'put {"provider": "openai"} or another name into its extra, or give `provider` to the task'
    )


def _refuse_other_sign_in(conn_id: str, kind: str, extra: Mapping[str, Any]) -> None:
    from anybatch import ConfigurationError

    if kind == "openai" and extra.get("auth_type", "api_key") != "api_key":
        raise ConfigurationError(
            f"connection {conn_id!r} signs in by {extra['auth_type']!r}; anybatch needs an API key in it"
        )
    if kind == "anthropic" and str(extra.get("platform") or _KEY_PLATFORM).lower() != _KEY_PLATFORM:
        raise ConfigurationError(
            f"connection {conn_id!r} signs in through platform {extra['platform']!r}; anybatch needs a "
            "connection with a key of Anthropic's own API"
        )
    if kind in _OTHER_SIGN_IN:
        raise ConfigurationError(
            f"connection {conn_id!r} signs in to {_OTHER_SIGN_IN[kind]}, which anybatch does not support"
        )


def _client_args(sdk_args: Mapping[str, Any]) -> dict[str, Any]:
    """Client arguments of the OpenAI and Anthropic SDKs, as far as httpx has the like."""
    headers = {str(name): str(value) for name, value in (sdk_args.get("default_headers") or {}).items()}
    if organization := sdk_args.get("organization"):
        headers["OpenAI-Organization"] = str(organization)
    if project := sdk_args.get("project"):
        headers["OpenAI-Project"] = str(project)
    found: dict[str, Any] = {"headers": headers} if headers else {}
    if timeout := sdk_args.get("timeout"):
        found["timeout"] = timeout
    return found


def _json_object(extra: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object in a connection's extra; a connection form may have stored it as text."""
    from anybatch import ConfigurationError

    if not (value := extra.get(name)):
        return {}
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigurationError(f"{name} in the connection's extra is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ConfigurationError(f"{name} in the connection's extra is not a JSON object, such as {{}}")
    return read


def _async_client(settings: ClientSettings, attempts: int | None) -> AsyncClient:
    from anybatch import AsyncClient, RetryPolicy

    retry = None if attempts is None else RetryPolicy(attempts=attempts)
    return AsyncClient(**settings.as_kwargs(), retry=retry)


def _poller(settings: ClientSettings) -> tuple[str, Callable[[], AsyncClient]]:
    """The key by which pollers are shared, and a function that makes the client of a new one."""
    from anybatch import AsyncClient, RetryPolicy
    from anybatch.polling.registry import watcher_key

    _freeze_loaded_objects()
    provider = settings.open()
    client_args = dict(settings.client_args)

    def make_client() -> AsyncClient:
        # Two attempts are enough: the watcher repeats failed calls itself.
        return AsyncClient(provider, client_args=client_args, retry=RetryPolicy(attempts=2))

    return watcher_key(provider.account.key, client_args), make_client


@functools.cache
def _freeze_loaded_objects() -> None:
    """Exclude what the triggerer has loaded by now from Python's garbage collection, as Airflow's executors
    do.

    These 300,000 objects live as long as the process. A full collection that walks them blocks the event loop
    for 0.2 s, and Airflow would log that a trigger is badly written.
    """
    gc.freeze()


def _base_url(connection: Connection, kind: str) -> str | None:
    if not connection.host:
        return None
    url = _join_url(connection.host, connection.schema or "", connection.port)
    if kind == "pydanticai-azure" and "/openai" not in url:
        return (
            url.rstrip("/") + "/openai/v1"
        )  # connections of that type hold the resource's endpoint without a path
    return url


def _join_url(host: str, schema: str, port: int | None) -> str:
    """The base URL, given whole as in a form, or in parts as Airflow splits a connection URI.

    Airflow stores what follows the host of a URI as the schema. That is the path, but some write the scheme
    there, or both: `anybatch://:key@gateway:8080/http`.
    """
    scheme, _, path = schema.strip("/").partition("/")
    if scheme not in ("http", "https"):
        scheme, path = "https", schema.strip("/")
    url = host if "://" in host else f"{scheme}://{host}"
    if urlsplit(url).path:
        return url
    return url + (f":{port}" if port else "") + (f"/{path}" if path else "")
