"""Connections: what each type of them says, and what never shows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat import connection
from airflow.sdk import Connection
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from anybatch import (
    AnyBatchError,
    AuthenticationError,
    ConfigurationError,
    QuotaError,
    RateLimitError,
    ServerError,
    TransportError,
)
from anybatch_airflow.diagnosis import diagnose
from anybatch_airflow.hooks import AnyBatchHook, ClientSettings, read_connection
from tests.fakes.server import FakeServer, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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
        (
            {"host": "gate", "schema": "http/v1/"},
            {"provider": "groq"},
            ("groq", KEY, "http://gate/v1", {}),
        ),
        (
            {"host": "http://gate", "port": 81, "schema": "v1"},
            {"provider": "groq"},
            ("groq", KEY, "http://gate:81/v1", {}),
        ),
        (
            {"host": "https://gate:81/v1", "port": 9, "schema": "v2"},
            {"provider": "groq"},
            ("groq", KEY, "https://gate:81/v1", {}),
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
        ({"conn_type": "langchain"}, {"model": "mistralai:mistral-small"}, ("mistral", KEY, None, {})),
        (
            {"conn_type": "langchain", "host": "https://r.openai.azure.com/openai/v1"},
            {"model": "azure_openai:gpt-5"},
            ("azure", KEY, "https://r.openai.azure.com/openai/v1", {}),
        ),
        (
            {"conn_type": "llamaindex", "host": "https://gate/v1"},
            {"llm_model": "gpt-5"},
            ("openai", KEY, "https://gate/v1", {}),
        ),
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
        ({"conn_type": "pydanticai_bedrock"}, {"model": "bedrock:x"}, "AWS Bedrock"),
        ({"conn_type": "pydanticai_vertex"}, {"model": "google:x"}, "Google Vertex AI"),
        ({"conn_type": "aws"}, {}, "does not say which provider"),
        ({}, {"provider": "openai", "client_args": "{"}, "client_args in the connection's extra is not JSON"),
        ({}, {"provider": "openai", "client_args": "[1]"}, "not a JSON object"),
        ({}, {"provider": "openai", "settings": "{"}, "settings in the connection's extra is not JSON"),
    ],
)
def test_connections_that_cannot_serve_say_why(
    facts: dict[str, Any], extra: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        read(extra, **facts)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("anybatch://:k@gw.example.com/v1", "https://gw.example.com/v1"),
        ("anybatch://:k@gw.example.com:8443/openai/v1", "https://gw.example.com:8443/openai/v1"),
        ("anybatch://https://:k@gw.example.com:8443/v1", "https://gw.example.com:8443/v1"),
        ("anybatch://http://:k@gw:8080/v1", "http://gw:8080/v1"),
        ("anybatch://:k@gw:8080/http", "http://gw:8080"),
        ("anybatch://:k@https%3A%2F%2Fgw.example.com%2Fv1/", "https://gw.example.com/v1"),
        ("anybatch://:k@", None),
    ],
)
def test_a_connection_uri_is_read_as_it_looks(
    monkeypatch: pytest.MonkeyPatch, uri: str, expected: str | None
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_BY_URI", f"{uri}?provider=openai")
    settings = AnyBatchHook("by_uri")._settings()
    assert (settings.provider, settings.api_key, settings.api_base) == ("openai", "k", expected)


def test_an_argument_wins_over_the_connection() -> None:
    assert read({"provider": "openai"}, provider="groq").provider == "groq"


def test_no_key_shows(add_connection: Callable[..., str]) -> None:
    conn_id = add_connection("keyed", conn_type="anybatch", password=KEY, extra={"provider": "openai"})
    hook = AnyBatchHook(conn_id)
    with hook.get_client() as client:
        shown = f"{hook!r} {hook.__dict__} {read({'provider': 'openai'})!r} {client!r} {client.account!r}"
    assert KEY not in shown


def test_no_connection_and_no_provider_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="neither conn_id nor provider is given"):
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
        ({"extra": {"provider": "opnai"}}, "Did you mean 'openai'"),
        ({"extra": {"provider": "openai", "client_args": {"tmeout": 3}}}, "tmeout"),
        ({"extra": {"provider": "openai", "client_args": {"proxy": "nonsense"}}}, "proxy"),
        ({"extra": {"provider": "openai", "settings": {"region": "eu"}}}, "no setting region; it has none"),
        ({"extra": {"provider": "local", "settings": {"api_key": "x"}}}, "local has no setting api_key"),
        ({"password": None}, "no API key: fill in the API key of the connection"),
    ],
)
def test_testing_a_bad_connection_says_what_is_wrong(
    add_connection: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    facts = {"conn_type": "anybatch", "password": KEY, "extra": {"provider": "openai"}, **facts}
    ok, sentence = AnyBatchHook(add_connection("bad", **facts)).test_connection()
    assert not ok
    assert named in sentence
    assert KEY not in sentence


@pytest.fixture
def tried(add_connection: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`tried(base, **client_args)`: what is said of a connection that must not work."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def try_it(base: str, **client_args: Any) -> str:
        extra = {"provider": "openai", "client_args": client_args}
        conn_id = add_connection("tried", conn_type="anybatch", password=KEY, host=base, extra=extra)
        ok, sentence = AnyBatchHook(conn_id).test_connection()
        assert not ok
        assert KEY not in sentence
        return sentence

    return try_it


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, and where nothing listens."""
    with socket.socket() as seat:
        seat.bind(("127.0.0.1", 0))
        yield seat.getsockname()[1]


def answer(status: int, body: str) -> FakeServer:
    """A server that gives one answer to everything."""
    return FakeServer(lambda request: Reply(status, body.encode(), {"content-type": "text/html"}))


def test_a_wrong_host_is_told_by_what_is_wrong_with_it(tried: Callable[..., str], closed_port: int) -> None:
    assert "the name of no-such-host.invalid cannot be resolved" in tried("https://no-such-host.invalid/v1")
    assert f"nothing listens at 127.0.0.1:{closed_port}" in tried(f"http://127.0.0.1:{closed_port}/v1")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "<!doctype html><html>Not here</html>"),
        (200, "<html>Welcome</html>"),
    ],
)
def test_a_server_that_is_no_batch_api_is_told_so(tried: Callable[..., str], status: int, body: str) -> None:
    with answer(status, body) as server:
        sentence = tried(server.url + "/v2")
    assert sentence.startswith(f"no batch API is at {server.url}/v2")
    assert "Many end in /v1" in sentence


def test_a_proxy_is_named_where_it_fails(tried: Callable[..., str], closed_port: int) -> None:
    gone = f"http://user:{KEY}@127.0.0.1:{closed_port}"
    assert f"nothing listens at the proxy 127.0.0.1:{closed_port}" in tried(
        "http://gate.invalid/v1", proxy=gone
    )
    with answer(403, "no") as server:
        sentence = tried("https://gate.invalid/v1", proxy=server.url)
    assert f"the proxy {server.url.removeprefix('http://')} refuses to connect to gate.invalid" in sentence


def test_a_proxy_of_the_environment_is_named_too(
    tried: Callable[..., str], closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    assert f"the proxy 127.0.0.1:{closed_port}" in tried("http://gate.invalid/v1")


def test_tls_trouble_is_told(tried: Callable[..., str], tmp_path: Path) -> None:
    certificate = tmp_path / "self-signed.pem"
    certificate.write_bytes(self_signed())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with listening(lambda connection: context.wrap_socket(connection, server_side=True)) as port:
        sentence = tried(f"https://127.0.0.1:{port}/v1")
    assert f"certificate of 127.0.0.1:{port} is not trusted" in sentence
    assert '{"verify": "/path/to/ca.pem"}' in sentence

    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        sentence = tried(f"https://127.0.0.1:{port}/v1")
    assert "Should the API base URL begin with http://?" in sentence


@contextlib.contextmanager
def listening(greet: Callable[[socket.socket], object]) -> Iterator[int]:
    """A port where `greet` is called with each connection, which is closed then."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):  # the client hangs up, which is the point
                    greet(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def self_signed() -> bytes:
    """A key and a certificate for 127.0.0.1, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + certificate.public_bytes(encoding)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AuthenticationError("m", status_code=403), "gate knows the key, but the key may not list batches"),
        (QuotaError("m", status_code=429), "no credit or quota left"),
        (RateLimitError("m", status_code=429), "over its rate limit right now; try again later"),
        (RateLimitError("m", status_code=529), "gate is overloaded right now; try again later"),
        (
            ServerError("m", status_code=503),
            "gate has a fault of its own right now; try again later. (m [HTTP status 503])",
        ),
        (TransportError("m"), "gate cannot be reached"),
    ],
)
def test_other_errors_are_told_too(error: AnyBatchError, expected: str) -> None:
    assert expected in diagnose(error, "https://gate/v1", {"trust_env": False})


def test_the_page_of_a_batch(add_connection: Callable[..., str]) -> None:
    plain = add_connection("plain", conn_type="anybatch", password=KEY, extra={"provider": "openai"})
    pattern = {"provider": "openai", "console_url": "https://gate/b/{batch_id}"}
    other = add_connection("other_console", conn_type="anybatch", password=KEY, extra=pattern)
    for conn_id, expected in (
        (plain, "https://platform.openai.com/batches/b1"),
        (other, "https://gate/b/b1"),
    ):
        hook = AnyBatchHook(conn_id)
        with hook.get_client() as client:
            assert hook.console_url(client, ["b1"]) == expected


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


def test_an_error_of_a_shared_look_up_is_each_triggers_own(add_connection: Callable[..., str]) -> None:
    conn_id = add_connection("unfinished", conn_type="anybatch")

    async def look_ups() -> list[Any]:
        waits = [AnyBatchHook(conn_id).get_watcher() for _ in range(20)]
        return await asyncio.gather(*waits, return_exceptions=True)

    errors = asyncio.run(look_ups())
    assert {type(error) for error in errors} == {ConfigurationError}
    assert len({str(error) for error in errors}) == 1
    assert len({id(error) for error in errors}) == 20


def test_a_look_up_outlives_the_trigger_that_began_it(add_connection: Callable[..., str]) -> None:
    conn_id = add_connection("shared", conn_type="anybatch", password=KEY, extra={"provider": "openai"})

    async def first_is_ended() -> Any:
        first, second = (asyncio.create_task(AnyBatchHook(conn_id).get_watcher()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(first_is_ended()) is not None


def test_a_shared_look_up_logs_nothing_as_one_triggers_own(
    add_connection: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow knows by the context which task a log line belongs to."""
    conn_id = add_connection("shared", conn_type="anybatch", password=KEY, extra={"provider": "openai"})
    belongs_to: ContextVar[str | None] = ContextVar("belongs_to", default=None)
    seen = []
    get_async_connection = connection.get_async_connection

    async def look_up(conn_id: str) -> Any:
        seen.append(belongs_to.get())
        return await get_async_connection(conn_id)

    monkeypatch.setattr(connection, "get_async_connection", look_up)

    async def first_trigger() -> None:
        belongs_to.set("the first task")
        await AnyBatchHook(conn_id).get_watcher()

    asyncio.run(first_trigger())
    assert seen == [None]
