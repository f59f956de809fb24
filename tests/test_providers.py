"""The provider interface by itself: settings, options, auth by host, waits, whole shards, saved results."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import anybatch.providers as providers
import anybatch.testing as testing
from anybatch import (
    AsyncClient,
    Batch,
    BatchStatus,
    Client,
    ConfigurationError,
    InputChangedError,
    InputError,
    Job,
    Page,
    Problem,
    ServerError,
    TransportError,
    UnknownOptionError,
    get_provider,
)
from anybatch.flow import Sleep, perform
from anybatch.providers import (
    Account,
    AccountSpec,
    BareCodec,
    Cancel,
    Given,
    HeaderAuth,
    HostAuth,
    Limits,
    Lookup,
    NewBatch,
    OpenAICodec,
    Provider,
    Results,
    Setting,
    Sought,
    Traits,
    download_files,
    get,
    get_without,
    save_member,
    save_pages,
    split_settings,
    wait_until,
)
from anybatch.providers.splitting import split_object
from anybatch.retry import RetryPolicy
from anybatch.rows import downloads
from anybatch.rows.requests import nesting
from anybatch.testing import QUICK

BASE = "https://here.test"


class Plain(Provider):
    """A provider of which each test needs a part."""

    traits = Traits(
        name="plain",
        account=AccountSpec(
            BASE,
            ("PLAIN_API_KEY",),
            settings=(
                Setting("region", env=("PLAIN_REGION",), is_required=True),
                Setting("role", default="reader"),
                Setting("token", secret=True),
            ),
        ),
        create_options=frozenset({"priority"}),
        call_options=frozenset({"tenant"}),
    )
    state = Results.READY

    def upload(self, new: NewBatch) -> Any:
        return "file-1"
        yield

    def create(self, new: NewBatch, file_id: str | None) -> Any:
        return Batch(id="b1", status=BatchStatus.IN_PROGRESS, provider="plain", raw_status="", raw={})
        yield

    def retrieve(self, batch_id: str) -> Any:
        raw = yield from get(self.url("/batches/{}", batch_id), self.options)
        return Batch(id=raw["id"], status=BatchStatus.COMPLETED, provider="plain", raw_status="", raw=raw)

    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Any:
        return (yield from self.retrieve(batch_id))

    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Any:
        self.check_options(options, self.traits.list_options, "list")
        return Page([], next_cursor=None, has_more=False)
        yield

    def results(self, batch: Batch) -> Results:
        return self.state

    def download(self, batch: Batch, folder: Path) -> Any:
        return (yield from download_files(folder, batch.id, [self.url("/results") + "?signature=1"]))


def plain(**settings: str) -> Plain:
    return Plain.open("plain", Given("k", None, {"region": "here", **settings}))


def over(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer))


def as_json(value: Any) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, json=value)


# --- the account -----------------------------------------------------------------------------------------


FOR_AUTHORS = """
    ENTRY_POINT_GROUP Account AccountSpec BareCodec Cancel Codec Content Given HeaderAuth HostAuth
    LLMProvider Limits Lookup NewBatch OpenAICodec Provider Results Setting Sought Traits delete
    download_files get get_provider get_without open_provider post post_lines provider_names result_file
    save_lines save_member save_pages settings_of split_settings wait_until
"""


def test_names_for_authors_are_there() -> None:
    assert providers.__all__ == FOR_AUTHORS.split()
    assert dir(providers) == sorted(FOR_AUTHORS.split())
    assert testing.__all__ == [
        "MODES",
        "QUICK",
        "Driver",
        "Fake",
        "ProviderSuite",
        "Wire",
        "serve",
        "shorten_pauses",
    ]
    for name in providers.__all__:
        assert getattr(providers, name) is not None


def test_settings_from_arguments_environment_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIN_REGION", "there")
    found = Plain.open("plain", Given("k", None, {})).account.settings
    assert dict(found) == {"region": "there", "role": "reader"}
    assert dict(plain(role="writer").account.settings) == {"region": "here", "role": "writer"}


def test_settings_that_lack_or_are_not_known() -> None:
    with pytest.raises(ConfigurationError, match=r"region is missing; pass it, or set PLAIN_REGION"):
        Plain.open("plain", Given("k"))
    with pytest.raises(UnknownOptionError, match=r"no setting zone; it has region, role, token"):
        plain(zone="a")
    with pytest.raises(UnknownOptionError, match=r"openai has no setting region; it has none"):
        get_provider("openai", api_key="k", region="here")
    with pytest.raises(ConfigurationError, match="a provider object has its own"):
        Client(plain(), region="there")


def test_settings_say_whose_batches_they_are() -> None:
    here, there = plain().account, plain(region="there").account
    assert here.key != there.key
    assert here.place != there.place
    bare = get_provider("openai", api_key="k").account
    assert bare.place == bare.api_base


def test_batches_of_another_region_are_not_given_up_from_here(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in.jsonl", "a")
    job = Job(input=source, output=tmp_path / "out", endpoint="/v1/x")
    args = {"transport": httpx.MockTransport(as_json({}))}
    with Client(plain(), client_args=args) as client:
        client.submit(job)
    with (
        Client(plain(region="there"), client_args=args) as client,
        pytest.raises(InputChangedError, match=r"plain \(https://here.test region=here role=reader\): b1"),
    ):
        client.submit(job)


def test_secret_settings_are_hidden_and_may_change() -> None:
    one, other = plain(token="s3cret-1").account, plain(token="s3cret-2").account
    assert "s3cret" not in repr(one) + one.place + one.key
    assert one.place == other.place
    assert one.key != other.key


def test_a_setting_is_told_from_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_class_of", lambda name: Plain)
    found = split_settings("plain", {"region": "here", "tenant": "t"})
    assert found == ({"region": "here"}, {"tenant": "t"})


# --- options ---------------------------------------------------------------------------------------------


def test_call_options_reach_the_provider() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        body = b'{"custom_id":"a","response":{"status_code":200,"body":{}}}\n'
        return (
            httpx.Response(200, content=body)
            if "results" in asked[-1]
            else httpx.Response(200, json={"id": "b1"})
        )

    args = {"transport": httpx.MockTransport(answer)}
    with Client(plain(), client_args=args) as client:
        client.retrieve("b1", tenant="t")
        client.cancel("b1", tenant="t")
        client.wait("b1", tenant="t")
        assert [row.custom_id for row in client.results("b1", tenant="t")] == ["a"]
        assert all("tenant=t" in one for one in asked if "results" not in one)
        client.retrieve("b1")
        assert "tenant" not in asked[-1]
        with pytest.raises(UnknownOptionError, match=r"no call option priority; it has tenant"):
            client.retrieve("b1", priority=1)

    async def awaited() -> None:
        async with AsyncClient(plain(), client_args=args) as aclient:
            await aclient.wait("b1", tenant="u")
            assert "tenant=u" in asked[-1]

    asyncio.run(awaited())


# --- auth ------------------------------------------------------------------------------------------------


class Renewed(httpx.Auth):
    """A token that is fetched before it is used."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield httpx.Request("POST", f"{BASE}/token")
        request.headers["authorization"] = f"Bearer {answer.headers['token']}"
        yield request


def test_each_host_has_its_own_way() -> None:
    seen: dict[str, str | None] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        seen[str(request.url)] = request.headers.get("authorization") or request.headers.get("x-store")
        return httpx.Response(200, headers={"token": "t1"})

    auth = HostAuth({BASE: Renewed(), "https://store.test": HeaderAuth({"x-store": "s"})})
    urls = (f"{BASE}/a", "https://store.test/b", "https://elsewhere.test/c", "http://here.test/d")
    with httpx.Client(transport=httpx.MockTransport(answer), auth=auth) as http:
        for url in urls:
            http.get(url)

    async def awaited() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth) as http:
            for url in urls:
                await http.get(f"{url}2")

    asyncio.run(awaited())
    for suffix in ("", "2"):
        assert [seen[url + suffix] for url in urls] == ["Bearer t1", "s", None, None]
    assert auth.trusts(httpx.URL(urls[0]))
    assert not auth.trusts(httpx.URL(urls[2]))


# --- waits -----------------------------------------------------------------------------------------------


def test_a_wait_has_a_bound() -> None:
    looks = 0

    def look() -> Any:
        nonlocal looks
        looks += 1
        return looks
        yield

    flow = wait_until(lambda found: found == 3, look, every=2, at_most=600)
    assert list(iter_effects(flow)) == [Sleep(2), Sleep(2)]
    looks = -(10**9)
    assert len(list(iter_effects(wait_until(lambda found: False, look, every=2, at_most=20)))) == 10


def iter_effects(flow: Any) -> Iterator[Any]:
    try:
        effect = next(flow)
        while True:
            yield effect
            effect = flow.send(None)
    except StopIteration:
        return


# --- what only a whole shard shows -----------------------------------------------------------------------


class OneShape(BareCodec):
    def check_shard(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
        first = None
        for number, line in lines:
            assert set(line) == {"custom_id", "body"}, "it is the uploaded form"
            shape = line["body"].get("shape")
            first = first or shape
            if shape != first:
                yield Problem(number, "body.shape", f"is {shape!r}, but the batch began with {first!r}")


class OneShapeVerbatim(OneShape):
    verbatim = True

    def check_shard(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
        bare = ((number, {"custom_id": line["custom_id"], "body": line["body"]}) for number, line in lines)
        return super().check_shard(bare)


def source_of(path: Path, shapes: str) -> Path:
    """A line for each letter, the shape it has; a blank line before each."""
    with path.open("w") as file:
        for number, shape in enumerate(shapes):
            body = {"model": "m", "shape": shape}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/x", "body": body}
            file.write("\n" + json.dumps(line) + "\n")
    return path


def problems_of(
    codec: OpenAICodec, shapes: str, tmp_path: Path, **options: Any
) -> list[tuple[int | None, str | None]]:
    provider = plain()
    provider.codec = codec
    for name, value in options.items():
        setattr(provider, name, value)
    source = source_of(tmp_path / "in.jsonl", shapes)
    job = Job(input=source, output=tmp_path / "out", endpoint="/v1/x")
    args = {"transport": httpx.MockTransport(as_json({}))}
    with Client(provider, client_args=args) as client, pytest.raises(InputError) as caught:
        client.submit(job)
    return [(problem.line, problem.field) for problem in caught.value.problems]


@pytest.mark.parametrize("codec", [OneShape(), OneShapeVerbatim()])
def test_a_shard_is_checked_when_it_is_full(codec: OpenAICodec, tmp_path: Path) -> None:
    limits = Limits(requests=3)
    assert problems_of(codec, "aabbb", tmp_path, limits=limits) == [(6, "body.shape")]
    assert problems_of(codec, "aaabb" + "a", tmp_path, limits=limits) == [(12, "body.shape")]


def test_limits_of_lines_and_batches(tmp_path: Path) -> None:
    codec = OpenAICodec()
    assert problems_of(codec, "a", tmp_path, limits=Limits(min_requests=2)) == [(None, None)]
    assert problems_of(codec, "a", tmp_path, limits=Limits(line_bytes=20)) == [(2, None)]
    assert problems_of(codec, "a", tmp_path, limits=Limits(nesting=1)) == [(2, None)]


def test_nesting() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert [nesting(one) for one in (1, {}, {"a": 1}, {"a": [1, {}]}, deep)] == [0, 1, 1, 3, 5000]


# --- how a batch is recognised ----------------------------------------------------------------------------


def batch(**facts: Any) -> Batch:
    return Batch(id="b", status=BatchStatus.IN_PROGRESS, provider="plain", raw_status="", raw={}, **facts)


def test_a_batch_is_recognised_by_file_else_by_metadata() -> None:
    provider = plain()
    marks = {"job": "j"}
    assert provider.matches(batch(input_file_id="f"), Sought("f"))
    assert not provider.matches(batch(input_file_id="g", metadata=marks), Sought("f", marks))
    assert provider.matches(batch(metadata={**marks, "x": "y"}), Sought("f", marks))
    assert not provider.matches(batch(), Sought())
    assert provider.can_look(Sought("f"))
    assert not provider.can_look(Sought(None, {}, "key"))


def test_a_name_is_for_the_provider_to_match() -> None:
    provider = plain()
    provider.traits = Traits(name="plain", lookup=Lookup.NAME)
    assert provider.can_look(Sought(key="k"))
    with pytest.raises(NotImplementedError, match="matches"):
        provider.matches(batch(), Sought(key="k"))


class Inline(Plain):
    """Requests inside the create, whose batches are refused as a whole; the first create gets no answer."""

    traits = replace(Plain.traits, idempotent_create=True, lookup=Lookup.NONE)
    state = Results.NONE

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self.keys: list[str] = []

    def upload(self, new: NewBatch) -> Any:
        return None
        yield

    def create(self, new: NewBatch, file_id: str | None) -> Any:
        self.keys.append(new.key)
        if len(self.keys) == 1:
            raise TransportError("the connection was reset")
        return self.refused(len(self.keys))
        yield

    def retrieve(self, batch_id: str) -> Any:
        return self.refused(int(batch_id))
        yield

    def refused(self, number: int) -> Batch:
        return Batch(id=str(number), status=BatchStatus.FAILED, provider="plain", raw_status="", raw={})


def test_the_key_of_a_create_is_no_dead_batch_s(tmp_path: Path) -> None:
    """Also where nothing is uploaded, and where the job comes back to an input that it had before."""
    provider = Inline.open("plain", Given("k", None, {"region": "here"}))
    inputs = [source_of(tmp_path / f"{shapes}.jsonl", shapes) for shapes in ("a", "b")]
    with Client(provider, client_args={"transport": httpx.MockTransport(as_json({}))}) as client:
        for source in (inputs[0], inputs[0], inputs[1], inputs[0]):
            client.submit(Job(input=source, output=tmp_path / "out", endpoint="/v1/x", id="j"))
    first, again, *others = provider.keys
    assert first == again, "a repeated create is the same"
    assert len({first, *others}) == 1 + len(others) == 4


# --- a cancel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [BatchStatus.IN_PROGRESS, BatchStatus.COMPLETED])
def test_a_cancel_that_throws_results_away_is_warned_of(
    status: BatchStatus, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    class Deleting(Plain):
        traits = replace(Plain.traits, cancel=Cancel.DESTRUCTIVE)

        def retrieve(self, batch_id: str) -> Any:
            return batch().model_copy(update={"status": status})
            yield

        def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Any:
            asked.append(batch_id)
            return batch()
            yield

    with Client(Deleting.open("plain", Given("k", None, {"region": "here"}))) as client:
        client.cancel("b1")
    is_running = status is BatchStatus.IN_PROGRESS
    assert asked == (["b1"] if is_running else []), "the results of one that has ended stay"
    assert ("batch b1: plain deletes the results" in caplog.text) is is_running


def test_a_provider_that_cannot_cancel_says_so() -> None:
    provider = plain()
    provider.traits = replace(provider.traits, cancel=Cancel.NONE)
    with Client(provider) as client, pytest.raises(ConfigurationError, match="plain cannot cancel a batch"):
        client.cancel("b1")


# --- results ---------------------------------------------------------------------------------------------


def run(flow: Any, answer: Callable[[httpx.Request], httpx.Response]) -> Any:
    with over(answer) as http:
        return perform(flow, http, RetryPolicy(attempts=1))


def test_pages_are_saved_to_their_end(tmp_path: Path) -> None:
    pages: dict[str | None, Any] = {
        None: ([{"n": 1}], "a"),
        "a": ([], "b"),
        "b": ([{"n": 2}, {"n": 3}], None),
    }

    def next_page(cursor: str | None) -> Any:
        return pages[cursor]
        yield

    path = tmp_path / "rows.jsonl"
    path.write_text("of an earlier try\n")
    run(save_pages(path, next_page), as_json({}))
    assert path.read_bytes() == b'{"n":1}\n{"n":2}\n{"n":3}\n'
    pages["b"] = ([{"n": 2}], "a")  # in a circle: what is short shows in the counts
    run(save_pages(path, next_page), as_json({}))
    assert path.read_bytes() == b'{"n":1}\n{"n":2}\n'


def test_a_list_in_one_object_is_cut_into_lines(tmp_path: Path) -> None:
    elements = ['{"custom_id":"a","x":1.50}', '{\n "custom_id" : "b"\n}', '{"custom_id":"c","x":NaN}', "7"]
    results = ", ".join(elements)
    text = '{"id": "b1", "out": {"n": 2, "results": [' + results + '], "after": [1]}, "end": {}}'
    path = tmp_path / "rows.jsonl"
    rest = run(
        save_member(path, httpx.Request("GET", f"{BASE}/x"), "out", "results"),
        lambda request: httpx.Response(200, text=text),
    )
    assert path.read_text().splitlines() == [one.replace("\n", " ") for one in elements]
    assert rest == {"id": "b1", "out": {"n": 2, "after": [1]}, "end": {}}
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]
    found = run(get_without(f"{BASE}/x", "out", "results"), lambda request: httpx.Response(200, text=text))
    assert found == rest


DEEP = "[" * 100_000 + "]" * 100_000
ODD: list[tuple[str, list[str]]] = [
    ('{"results": []}', []),
    ('{"results": null}', []),
    ("{}", []),
    ('{"results": [{"a": "\\"]}"}, {"b": "\\\\"}]}', ['{"a": "\\"]}"}', '{"b": "\\\\"}']),
    ('{"results": [1, 2.5e3, true, null, "x"]}', ["1", "2.5e3", "true", "null", '"x"']),
    ('{"results": [' + DEEP + ', {"ok": 1}]}', [DEEP, '{"ok": 1}']),
    (
        '{"results": [{"broken": nonsense [1, "]"]}, {"ok": 1}]}',
        ['{"broken": nonsense [1, "]"]}', '{"ok": 1}'],
    ),
    ('{"results": [{"a": "\x01"}, {"ok": 1}]}', ['{"a": "\x01"}', '{"ok": 1}']),
    ('{"a": [1, 2], "results": [{"ü\u2028": "\ud83d"}]}', ['{"ü\u2028": "\ud83d"}']),
]


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize(("text", "lines"), ODD, ids=range(len(ODD)))
def test_odd_objects(
    text: str, lines: list[str], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element is a line, whatever is wrong with it, and however the text comes."""
    monkeypatch.setattr("anybatch.providers.splitting._BLOCK", block)
    source, target = tmp_path / "body", tmp_path / "rows"
    source.write_bytes(text.encode("utf-8", "surrogatepass"))
    split_object(source, ("results",), target)
    with target.open("rb") as file:
        assert [one.decode("utf-8", "surrogatepass").rstrip("\n") for one in file] == lines


@pytest.mark.parametrize("text", ["", "<html>", "[1]", "null", "{nonsense", '{"a": 1 "b": 2}'])
def test_what_is_no_object(text: str, tmp_path: Path) -> None:
    source = tmp_path / "body"
    source.write_text(text)
    with pytest.raises(ServerError):
        split_object(source, ("results",), None)


def test_a_body_that_breaks_off_gives_what_it_has(tmp_path: Path) -> None:
    source, target = tmp_path / "body", tmp_path / "rows"
    source.write_text('{"id": 1, "results": [{"a": 1}, {"b": "tor')
    assert split_object(source, ("results",), target) == {"id": 1}
    assert target.read_text() == '{"a": 1}\n'
    with pytest.raises(ServerError, match="breaks off"):
        split_object(source, ("results",), None)


def test_an_object_of_any_size_is_not_in_memory(tmp_path: Path) -> None:
    source, target = tmp_path / "body", tmp_path / "rows"
    element = json.dumps({"custom_id": "a", "text": "x" * 20_000})
    with source.open("w") as file:
        file.write('{"results": [' + ",".join([element] * 1000) + "]}")
    tracemalloc.start()
    split_object(source, ("results",), target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target.stat().st_size == 1000 * (len(element) + 1)
    assert peak < 4_000_000


def test_results_that_are_named_later_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSES", (0.01,))
    monkeypatch.setattr(downloads, "SETTLING", 0.05)
    provider = plain()
    provider.state = Results.NOT_YET
    looks: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        looks.append(request.url.path)
        if len(looks) == 3:
            provider.state = Results.READY
        body = b'{"custom_id":"a","response":{"status_code":200,"body":{}}}\n'
        return (
            httpx.Response(200, content=body)
            if "results" in looks[-1]
            else httpx.Response(200, json={"id": "b1"})
        )

    with Client(provider, retry=QUICK, client_args={"transport": httpx.MockTransport(answer)}) as client:
        assert len(list(client.results("b1"))) == 1
        provider.state = Results.NOT_YET
        with pytest.raises(ServerError, match="not complete"):
            list(client.results("b1"))
