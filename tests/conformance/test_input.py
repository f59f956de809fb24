"""Bad input: an error that names line and field, before a provider hears of anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import (
    AnyBatchError,
    Client,
    ConfigurationError,
    InputError,
    Job,
    LLMProvider,
    MissingKeyError,
    Problem,
    UnknownOptionError,
    UnknownProviderError,
    get_provider,
)
from anybatch.providers.compatible import DIALECTS

from .world import FORMATS, PROVIDERS, REMOTE, Driver, RemoteWorld, World, landed, row_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

every_provider = pytest.mark.parametrize("shared_world", PROVIDERS, indirect=True, scope="module")
three_formats = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")


@dataclass(frozen=True)
class Case:
    """A spoilt file of nine lines, and what is to be said of it: (line, field, part of the message)."""

    spoil: Callable[[World, list[dict[str, Any]]], list[bytes]]
    said: tuple[tuple[int | None, str | None, str], ...]


def encoded(lines: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]


def with_line(number: int, raw: bytes) -> Callable[[World, list[dict[str, Any]]], list[bytes]]:
    """The file with one line (from 1) replaced."""

    def spoil(world: World, lines: list[dict[str, Any]]) -> list[bytes]:
        found = encoded(lines)
        found[number - 1] = raw
        return found

    return spoil


def changed(number: int, **members: Any) -> Callable[[World, list[dict[str, Any]]], list[bytes]]:
    """The file with members of one line (from 1) changed, or left out where they are None."""

    def spoil(world: World, lines: list[dict[str, Any]]) -> list[bytes]:
        line = {**lines[number - 1], **members}
        lines[number - 1] = {name: value for name, value in line.items() if value is not None}
        return encoded(lines)

    return spoil


def in_body(number: int, **members: Any) -> Callable[[World, list[dict[str, Any]]], list[bytes]]:
    def spoil(world: World, lines: list[dict[str, Any]]) -> list[bytes]:
        lines[number - 1]["body"].update(members)
        return encoded(lines)

    return spoil


CASES = {
    "not UTF-8": Case(with_line(7, b'{"custom_id": "caf\xe9"}\n'), ((7, None, "not UTF-8: byte 0xe9"),)),
    "Latin-1 throughout": Case(
        lambda world, lines: [b'{"custom_id": "\xe4"}\n'] * 2,
        ((1, None, "not UTF-8"), (2, None, "not UTF-8")),
    ),
    "a BOM": Case(lambda world, lines: [b"\xef\xbb\xbf", *encoded(lines)], ((1, None, "byte order mark"),)),
    "UTF-16": Case(
        lambda world, lines: ["".join(json.dumps(line) + "\n" for line in lines).encode("utf-16")],
        ((1, None, "UTF-16 byte order mark"),),
    ),
    "broken JSON in line 7": Case(with_line(7, b'{"custom_id": "row-6", \n'), ((7, None, "not JSON"),)),
    "not an object": Case(with_line(2, b"[1, 2]\n"), ((2, None, "not a JSON object"),)),
    "NaN": Case(with_line(3, b'{"custom_id": NaN}\n'), ((3, None, "not JSON"),)),
    "duplicate custom_id": Case(
        changed(5, custom_id="row-1"), ((5, "custom_id", "'row-1' was used before, in line 2"),)
    ),
    "no custom_id": Case(changed(4, custom_id=None), ((4, "custom_id", "must be a non-empty string"),)),
    "custom_id is a number": Case(changed(4, custom_id=4), ((4, "custom_id", "must be a non-empty string"),)),
    "empty custom_id": Case(changed(4, custom_id=""), ((4, "custom_id", "non-empty"),)),
    "wrong url": Case(changed(6, url="/v1/elsewhere"), ((6, "url", "is '/v1/elsewhere', but"),)),
    "wrong method": Case(changed(6, method="GET"), ((6, "method", "must be 'POST'"),)),
    "no body": Case(changed(2, body=None), ((2, "body", "must be a JSON object"),)),
    "no model": Case(in_body(8, model=None), ((8, "body.model", "must name the model"),)),
    "stream": Case(in_body(9, stream=True), ((9, "body.stream", "cannot stream"),)),
    "an unknown member": Case(changed(1, priority=1), ((1, "priority", "unknown member"),)),
    "an empty file": Case(lambda world, lines: [], ((None, None, "holds no request"),)),
    "blank lines only": Case(lambda world, lines: [b"\n", b" \n"], ((None, None, "holds no request"),)),
    "several": Case(
        lambda world, lines: [b"{\n", *changed(2, url="/v1/x", method="PUT")(world, lines)],
        ((1, None, "not JSON"), (3, "method", "POST"), (3, "url", "/v1/x")),
    ),
}


def check(world: RemoteWorld, driver: Driver, folder: Path, case: Case) -> None:
    path = folder / "in.jsonl"
    path.write_bytes(b"".join(case.spoil(world, [world.line(one) for one in row_ids(9)])))
    job = Job(input=path, output=folder / "out", endpoint=world.endpoint, completion_window=world.window)
    for act in (
        lambda: driver.create(path, world.endpoint, completion_window=world.window),
        lambda: driver.run(job),
    ):
        with pytest.raises(InputError) as caught:
            act()
        error = caught.value
        assert [(one.line, one.field) for one in error.problems] == [
            (line, field) for line, field, _ in case.said
        ]
        for problem, (line, field, message) in zip(error.problems, case.said, strict=True):
            assert message in problem.message
            assert f"line {line}" in str(error) if line else True
            assert field is None or field in str(error)
        assert str(path) in str(error)
        assert error.provider == world.name
    assert world.calls == [], "nothing was sent"
    assert not (folder / "out").exists() or list((folder / "out").iterdir()) == []


@three_formats
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_lines_are_named(world: RemoteWorld, driver: Driver, tmp_path: Path, case: Case) -> None:
    check(world, driver, tmp_path, case)


@pytest.mark.parametrize(
    "shared_world", ["openai", "azure", "mistral", "novita", "litellm"], indirect=True, scope="module"
)
def test_mixed_models(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    case = Case(in_body(7, model="m-2"), ((7, "body.model", "is 'm-2', but line 1 has 'm-1'"),))
    check(world, driver, tmp_path, case)


@pytest.mark.parametrize("shared_world", ["parasail", "anthropic"], indirect=True, scope="module")
def test_models_may_be_mixed_where_they_may(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    ids = row_ids(4)
    lines = [world.line(one) for one in ids]
    lines[2]["body"]["model"] = "m-2"
    job = Job(input=lines, output=tmp_path / "out")
    assert landed_models(driver, job, ids) == ("m-1", "m-2")


def landed_models(driver: Driver, job: Job, ids: list[str]) -> tuple[str, ...]:
    report = driver.run(job, timeout=10)
    assert report.ok
    assert report.rows == len(ids)
    return tuple(report.models)


UNTRANSLATABLE = {
    "logprobs": ({"logprobs": True}, "body.logprobs"),
    "n": ({"n": 3}, "body.n"),
    "a seed": ({"seed": 7}, "body.seed"),
    "audio": ({"modalities": ["text", "audio"]}, "body.modalities"),
    "too hot": ({"temperature": 1.5}, "body.temperature"),
    "a parameter nobody knows": ({"sparkle": 1}, "body.sparkle"),
    "a malformed one": ({"messages": "hello"}, "body.messages"),
}


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
@pytest.mark.parametrize(("members", "field"), UNTRANSLATABLE.values(), ids=UNTRANSLATABLE.keys())
def test_untranslatable_parameters(
    world: RemoteWorld, driver: Driver, tmp_path: Path, members: dict[str, Any], field: str
) -> None:
    check(world, driver, tmp_path, Case(in_body(7, **members), ((7, field, ""),)))


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_untranslatable_parameters_can_be_dropped(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    lines = [world.line(one, seed=7, logprobs=True) for one in row_ids(3)]
    job = Job(input=lines, output=tmp_path / "out", on_untranslatable="drop")
    report = driver.run(job, timeout=10)
    assert report.ok
    ((sent,),) = [world.server.find("POST", ".*/batches")]
    assert [set(one["params"]) for one in sent.json()["requests"]] == [
        {"model", "max_tokens", "messages"}
    ] * 3


@three_formats
def test_problems_are_capped_and_counted(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"oops\n" * 1000)
    with pytest.raises(InputError) as caught:
        driver.create(path, world.endpoint, completion_window=world.window)
    assert [problem.line for problem in caught.value.problems] == list(range(1, 21))
    assert caught.value.more == 980
    assert "1000 problems" in str(caught.value)
    assert len(str(caught.value)) < 4000


@every_provider
def test_missing_file(world: World, driver: Driver, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        job = Job(input=path, output=tmp_path / "out", endpoint=world.endpoint)
        for act in (lambda: driver.create(path, world.endpoint), lambda: driver.run(job)):  # noqa: B023
            with pytest.raises(ConfigurationError, match=str(path)):
                act()
    nothing_was_sent(world)


@every_provider
def test_unknown_option(world: World, driver: Driver, tmp_path: Path) -> None:
    path = world.write(tmp_path / "in.jsonl", row_ids(1))
    job = Job(input=path, output=tmp_path / "out", endpoint=world.endpoint, options={"priority": 1})
    for act in (
        lambda: driver.create(path, world.endpoint, priority=1),
        lambda: driver.run(job),
        lambda: driver.list(priority=1),
    ):
        with pytest.raises(UnknownOptionError, match="priority") as caught:
            act()
        known = (
            driver.provider.traits.list_options
            if "list option" in str(caught.value)
            else driver.provider.traits.create_options
        )
        assert all(name in str(caught.value) for name in known), "those there are, are named"
    nothing_was_sent(world)


@every_provider
def test_endpoints_and_metadata_that_the_provider_would_refuse(
    world: World, driver: Driver, tmp_path: Path
) -> None:
    path = world.write(tmp_path / "in.jsonl", row_ids(1))
    with_endpoints = driver.provider.traits.endpoints is not None
    acts: list[Callable[[], Any]] = [lambda: driver.create(path, world.endpoint, metadata={"k": 1})]
    acts += [lambda: driver.create(path, "/v1/unheard-of")] if with_endpoints else []
    if driver.provider.traits.metadata is not None:
        acts.append(lambda: driver.create(path, world.endpoint, metadata={"k" * 65: "v"}))
        acts.append(lambda: driver.create(path, world.endpoint, metadata={str(n): "v" for n in range(17)}))
        acts.append(
            lambda: driver.run(Job(input=path, output=tmp_path / "out", metadata={"anybatch_job": "mine"}))
        )
    else:
        acts.append(lambda: driver.create(path, world.endpoint, metadata={"k": "v"}))
        acts.append(lambda: driver.run(Job(input=path, output=tmp_path / "out", metadata={"k": "v"})))
    for act in acts:
        with pytest.raises(ConfigurationError) as caught:
            act()
        assert not isinstance(caught.value, InputError)
    nothing_was_sent(world)


@pytest.mark.parametrize("shared_world", ["mistral", "anthropic"], indirect=True, scope="module")
@pytest.mark.parametrize("window", ["soon", "", "8d", "0h"])
def test_windows_that_the_provider_has_not(
    world: RemoteWorld, driver: Driver, tmp_path: Path, window: str
) -> None:
    path = world.write(tmp_path / "in.jsonl", row_ids(1))
    job = Job(input=path, output=tmp_path / "out", completion_window=window)
    for act in (
        lambda: driver.create(path, world.endpoint, completion_window=window),
        lambda: driver.submit(job),
    ):
        with pytest.raises(ConfigurationError, match="completion_window"):
            act()
    nothing_was_sent(world)


def nothing_was_sent(world: World) -> None:
    if isinstance(world, RemoteWorld):
        assert world.calls == []


def test_a_batch_too_large_is_not_sent(tmp_path: Path) -> None:
    with RemoteWorld("openai") as world, world.open("sync") as driver:
        driver.provider.limits = type(driver.provider.limits)(requests=2)
        path = world.write(tmp_path / "in.jsonl", row_ids(3))
        with pytest.raises(ConfigurationError, match=r"3 requests; .* holds 2 requests.*run_job splits"):
            driver.create(path, world.endpoint)
        assert world.calls == []


@pytest.mark.parametrize("shared_world", ["openai", "mistral", "anthropic"], indirect=True, scope="module")
def test_a_line_too_large_for_any_batch(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    had = driver.provider.limits
    driver.provider.limits = type(had)(bytes=400)
    try:
        check(world, driver, tmp_path, Case(in_body(5, user="u" * 400), ((5, None, "a whole batch at"),)))
    finally:
        driver.provider.limits = had


# --- accounts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opneai", "", "OpenAI", "azure-openai", "together"])
def test_unknown_provider_names_the_known(name: str) -> None:
    with pytest.raises(UnknownProviderError) as caught:
        Client(name, api_key="k")
    assert all(known in str(caught.value) for known in PROVIDERS)
    assert repr(name) in str(caught.value)
    if name in ("opneai", "OpenAI"):
        assert "Did you mean 'openai'?" in str(caught.value)


KEYLESS = {"litellm", "openai-compatible", "local"}


@pytest.mark.parametrize("name", PROVIDERS)
def test_missing_key_names_argument_and_variable(name: str, tmp_path: Path) -> None:
    base = f"sqlite:///{tmp_path}/local.db" if name == "local" else "http://127.0.0.1:9/v1"
    if name in KEYLESS:
        assert get_provider(name, api_base=base).account.api_key is None
        return
    with pytest.raises(MissingKeyError, match=r"give api_key, or set [A-Z_]+_(KEY|TOKEN)"):
        get_provider(name, api_base=base)


@pytest.mark.parametrize("name", [name for name in REMOTE if name not in ("mistral", "anthropic")])
def test_keys_and_addresses_come_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = DIALECTS[name].traits.account
    for variable in row.key_env:
        monkeypatch.setenv(variable, f"key of {variable}")
    for variable in row.base_env:
        monkeypatch.setenv(variable, "https://example.test/openai/v1/")
    account = get_provider(name).account
    assert account.api_key is not None
    assert account.api_key.get_secret_value() == f"key of {row.key_env[0]}"
    assert account.api_base == ("https://example.test/openai/v1" if row.base_env else row.api_base)
    given = get_provider(name, api_key="given", api_base="https://given.test/openai").account
    assert given.api_key is not None
    assert (given.api_key.get_secret_value(), given.api_base) == ("given", "https://given.test/openai")


@pytest.mark.parametrize("name", ["azure", "openai-compatible"])
def test_missing_address(name: str) -> None:
    with pytest.raises(ConfigurationError, match="api_base is missing"):
        get_provider(name, api_key="k")


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("https://r.openai.azure.com", "https://r.openai.azure.com/openai/v1"),
        ("https://r.openai.azure.com/", "https://r.openai.azure.com/openai/v1"),
        ("https://r.openai.azure.com/openai/v1/", "https://r.openai.azure.com/openai/v1"),
    ],
)
def test_azure_addresses(given: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_provider("azure", api_key="k", api_base=given).account.api_base == base
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", given)
    assert get_provider("azure", api_key="k").account.api_base == base


@pytest.mark.parametrize("base", ["example.test/v1", "ftp://example.test", "file:///etc"])
def test_addresses_that_are_none(base: str) -> None:
    with pytest.raises(ConfigurationError, match=r"api_base must be an http\(s\) URL"):
        get_provider("openai", api_key="k", api_base=base)


def test_members_of_the_enum_are_names_too() -> None:
    assert sorted(LLMProvider) == list(PROVIDERS)
    with Client(LLMProvider.OPENAI, api_key="k") as client:
        assert client.provider.name == "openai"


def test_wrong_client_args_are_named() -> None:
    with pytest.raises(ConfigurationError, match="no colour; there are timeout, proxy"):
        Client("openai", api_key="k", client_args={"colour": 1})


def test_timeout_or_deadline(tmp_path: Path) -> None:
    with RemoteWorld("openai") as world, world.open("sync") as driver:
        with pytest.raises(ConfigurationError, match="not both"):
            driver.wait("b", timeout=1, deadline=1)
        with pytest.raises(ConfigurationError, match="not both"):
            driver.run(world.job(tmp_path), timeout=1, deadline=1)
        assert world.calls == []


@pytest.mark.parametrize(
    "wrong",
    [{"on_orphan": "ignore"}, {"on_changed": "shrug"}, {"on_untranslatable": "guess"}, {"max_rounds": 0}],
)
def test_job_policies(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Job(input=[], output=tmp_path, **wrong)


@pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")
def test_requests_given_as_objects(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """An iterable is checked like a file; what does not go into JSON is named by its number."""
    good = [world.line(one) for one in row_ids(3)]
    for bad, message in (
        (7, "request 3 is int"),
        ({"custom_id": {1}}, "request 3 cannot be written as JSON"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            driver.run(Job(input=[*good[:2], bad], output=tmp_path / "out"))  # type: ignore[list-item]
    with pytest.raises(InputError) as caught:
        driver.run(Job(input=[*good, good[0]], output=tmp_path / "out"))
    assert caught.value.problems == (Problem(4, "custom_id", "'row-0' was used before, in line 1"),)
    assert world.calls == []
    world.let_batches_end()
    job = Job(input=(line for line in good), output=tmp_path / "out")
    found = landed_objects(driver, job)
    assert found == row_ids(3)


@pytest.mark.parametrize("shared_world", ["openai", "mistral", "anthropic"], indirect=True, scope="module")
def test_the_job_s_model_is_sent(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Lines may leave it to the job."""
    lines = [world.line(one, max_tokens=9) for one in row_ids(3)]
    for line in lines:
        del line["body"]["model"]
    world.let_batches_end()
    job = Job(input=lines, output=tmp_path / "out", model=world.model)
    assert landed_objects(driver, job) == row_ids(3)
    (sent,) = (call for call in world.calls if b'"max_tokens"' in call.body)
    assert sent.body.count(b'"model":"m-1"') == 3


def landed_objects(driver: Driver, job: Job) -> list[str]:
    report = driver.run(job, timeout=10)
    assert report.ok
    lines = (job.folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line)["custom_id"] for line in lines]


@pytest.mark.parametrize("shared_world", ["openai", "mistral", "anthropic"], indirect=True, scope="module")
def test_good_input_of_odd_shape(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """CRLF, blank lines, no last line end, escapes, and U+2028 inside a text are all legal."""
    world.let_batches_end()
    ids = ["a b", "é–\u2028", 'quo"te\\', "row-3", "\U0001f600"]
    lines = encoded([world.line(one) for one in ids])
    raw = (
        lines[0].replace(b"\n", b"\r\n")
        + b"\n  \n"
        + b"".join(lines[1:]).replace(b'"body": ', b'"body"  :\t')
    )
    path = tmp_path / "in.jsonl"
    path.write_bytes(raw.rstrip(b"\n"))
    job = Job(input=path, output=tmp_path / "out")
    found = landed_with_input(driver, job, ids, world)
    assert found == [f"echo: say {one}" for one in ids]


def landed_with_input(driver: Driver, job: Job, ids: list[str], world: World) -> list[str]:
    found = landed(job, driver.run(job, timeout=10), ids)
    return [found.text(one) for one in ids]


def test_errors_are_of_one_tree() -> None:
    assert all(
        issubclass(kind, AnyBatchError)
        for kind in (
            ConfigurationError,
            InputError,
            MissingKeyError,
            UnknownOptionError,
            UnknownProviderError,
        )
    )
