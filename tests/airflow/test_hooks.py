"""Connections: what each type of them says, and what never shows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import Connection

from anybatch import ConfigurationError
from anybatch_airflow.hooks import AnyBatchHook, ClientSettings, read_connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.server import FakeServer

KEY = "sk-canary-7c1f2a"


def read(extra: dict[str, Any], provider: str | None = None, **facts: Any) -> ClientSettings:
    connection = Connection(conn_id="c", **{"conn_type": "anybatch", "password": KEY, **facts})
    return read_connection(connection, extra, provider=provider)


@pytest.mark.parametrize(
    ("facts", "extra", "expected"),
    [
        ({}, {"provider": "mistral"}, ("mistral", KEY, None, {})),
        ({"host": "https://gate/v1"}, {"provider": "openai"}, ("openai", KEY, "https://gate/v1", {})),
        (
            {"host": "gate", "port": 81, "schema": "http"},
            {"provider": "groq"},
            ("groq", KEY, "http://gate:81", {}),
        ),
        ({"host": "sqlite:////tmp/x.db"}, {"provider": "local"}, ("local", KEY, "sqlite:////tmp/x.db", {})),
        ({}, {"provider": "openai", "client_args": '{"timeout": 9}'}, ("openai", KEY, None, {"timeout": 9})),
        ({"password": None}, {"provider": "openai"}, ("openai", None, None, {})),
        ({"conn_type": "http"}, {"provider": "openai"}, ("openai", KEY, None, {})),
        ({"conn_type": "openai"}, {}, ("openai", KEY, None, {})),
        (
            {"conn_type": "openai", "host": "https://a/v1"},
            {"openai_client_kwargs": {"base_url": "https://b/v1", "organization": "o", "timeout": 5}},
            ("openai", KEY, "https://b/v1", {"headers": {"OpenAI-Organization": "o"}, "timeout": 5}),
        ),
        (
            {"conn_type": "openai", "password": None},
            {"openai_client_kwargs": {"api_key": KEY, "default_headers": {"x-team": "t"}}},
            ("openai", KEY, None, {"headers": {"x-team": "t"}}),
        ),
        ({"conn_type": "anthropic"}, {"platform": "anthropic"}, ("anthropic", KEY, None, {})),
        ({"conn_type": "pydanticai"}, {"model": "openai-responses:gpt-5"}, ("openai", KEY, None, {})),
        ({"conn_type": "pydanticai"}, {"model": "groq:llama"}, ("groq", KEY, None, {})),
        (
            {"conn_type": "pydanticai-azure", "host": "https://r.openai.azure.com/"},
            {},
            ("azure", KEY, "https://r.openai.azure.com/openai/v1", {}),
        ),
        # A connection URI turns "-" into "_".
        ({"conn_type": "pydanticai_azure"}, {}, ("azure", KEY, None, {})),
    ],
)
def test_connections_of_every_type_are_understood(
    facts: dict[str, Any], extra: dict[str, Any], expected: tuple[object, ...]
) -> None:
    settings = read(extra, **facts)
    assert (settings.provider, settings.api_key, settings.api_base, dict(settings.client_args)) == expected


@pytest.mark.parametrize(
    ("facts", "extra", "named"),
    [
        ({}, {}, "does not say which provider"),
        ({"conn_type": "pydanticai"}, {"model": "gpt-5"}, "does not say which provider"),
        ({"conn_type": "openai"}, {"auth_type": "workload_identity"}, "workload_identity"),
        ({"conn_type": "anthropic"}, {"platform": "bedrock"}, "bedrock"),
        ({}, {"provider": "openai", "client_args": "{"}, "client_args is not JSON"),
        ({}, {"provider": "openai", "client_args": "[1]"}, "not a JSON object"),
    ],
)
def test_connections_that_cannot_serve_say_why(
    facts: dict[str, Any], extra: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        read(extra, **facts)
    assert KEY not in str(caught.value)


def test_an_argument_wins_over_the_connection() -> None:
    assert read({"provider": "openai"}, provider="groq").provider == "groq"


def test_no_key_shows(add_connection: Callable[..., str]) -> None:
    conn_id = add_connection("keyed", conn_type="anybatch", password=KEY, extra={"provider": "openai"})
    hook = AnyBatchHook(conn_id)
    with hook.get_client() as client:
        shown = f"{hook!r} {hook.__dict__} {read({'provider': 'openai'})!r} {client!r} {client.account!r}"
    assert KEY not in shown


def test_no_connection_and_no_provider_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="conn_id or a provider"):
        AnyBatchHook(None).get_client()


@pytest.mark.parametrize(
    ("key", "good", "named"), [("sk-right", True, "answers with this key"), ("sk-wrong", False, "401")]
)
def test_testing_a_connection_gives_a_sentence(
    add_connection: Callable[..., str], keyed_server: FakeServer, key: str, good: bool, named: str
) -> None:
    conn_id = add_connection(
        "tried", conn_type="anybatch", password=key, host=keyed_server.api_base, extra={"provider": "openai"}
    )
    ok, sentence = AnyBatchHook(conn_id).test_connection()
    assert ok is good
    assert named in sentence
    assert key not in sentence


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"host": "http://127.0.0.1:9"}, "no answer from 127.0.0.1"),
        ({"extra": {"provider": "opnai"}}, "Did you mean 'openai'"),
        ({"extra": {"provider": "openai", "client_args": {"tmeout": 3}}}, "tmeout"),
        ({"extra": {"provider": "openai", "client_args": {"proxy": "nonsense"}}}, "proxy"),
    ],
)
def test_testing_a_bad_connection_says_what_is_wrong(
    add_connection: Callable[..., str], facts: dict[str, Any], named: str
) -> None:
    facts = {"conn_type": "anybatch", "password": KEY, "extra": {"provider": "openai"}, **facts}
    ok, sentence = AnyBatchHook(add_connection("bad", **facts)).test_connection()
    assert not ok
    assert named in sentence
    assert KEY not in sentence


def test_triggers_of_one_account_share_one_poller(add_connection: Callable[..., str]) -> None:
    same = {"conn_type": "anybatch", "password": KEY}
    first = add_connection("first", **same, extra={"provider": "openai"})
    second = add_connection("second", **same, extra={"provider": "openai"})
    proxied = add_connection(
        "proxied", **same, extra={"provider": "openai", "client_args": {"proxy": "http://p:1"}}
    )
    other = add_connection("other", **{**same, "password": "sk-other"}, extra={"provider": "openai"})

    async def watchers() -> list[Any]:
        return [await AnyBatchHook(conn_id).get_watcher() for conn_id in (first, second, proxied, other)]

    one, two, three, four = asyncio.run(watchers())
    assert one is two
    assert len({id(watcher) for watcher in (one, three, four)}) == 3
    assert KEY not in f"{one.key}{three.key}"
