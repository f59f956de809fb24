"""A canary for a key: it may stand in requests to its provider, and nowhere else."""

from __future__ import annotations

import inspect
import logging
import pickle
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import anybatch
from anybatch import AnyBatchError, ConfigurationError, Job, RetryPolicy, TransportError, get_provider
from tests.fakes.faults import CutBody, ResetAfter, ResetBefore, Respond
from tests.fakes.rows import Quirks

from .test_transport import CONTENT
from .world import REMOTE, Driver, RemoteWorld, landed, row_ids, tls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from tests.fakes.faults import Fault

CANARY = "sk-canary-4f1d9e"

every_key_header = pytest.mark.parametrize(
    "keyed_world", ["openai", "anthropic"], indirect=True, scope="module"
)


class CanaryWorld(RemoteWorld):
    key = CANARY


@pytest.fixture(scope="module")
def keyed_world(request: pytest.FixtureRequest) -> Iterator[RemoteWorld]:
    with CanaryWorld(request.param) as world:
        yield world


@pytest.fixture
def keyed(keyed_world: RemoteWorld, mode: str) -> Iterator[tuple[RemoteWorld, Driver]]:
    with keyed_world.fresh().open(mode, retry=RetryPolicy(attempts=2, first_delay=0.001)) as driver:
        yield keyed_world, driver


def texts_of(error: BaseException) -> Iterator[str]:
    """All that a log, a debugger or an error tracker shows of an error, its causes and its frames."""
    yield str(error)
    yield repr(error)
    yield "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            # also of causes that were suppressed: an error tracker walks them all
            yield repr(one)
            yield repr(vars(one))
            yield "".join(traceback.TracebackException.from_exception(one, capture_locals=True).format())
            chain += [one.__cause__, one.__context__]
    yield repr(pickle.loads(pickle.dumps(error)).__dict__)


def assert_hidden(texts: Iterator[str] | list[str]) -> None:
    for text in texts:
        where = text.find(CANARY)
        assert where < 0, text[max(0, where - 300) : where + 60]


# Servers repeat keys in their messages: some really do.
ECHO = {"error": {"message": f"Incorrect API key provided: {CANARY}", "code": "invalid_api_key"}}
LATER = {"retry-after": "3600"}


@dataclass(frozen=True)
class Scene:
    """A verb, and what goes wrong meanwhile at requests like these."""

    act: Callable[[Driver, Job, Path], object]
    fault: Fault | None = field(default=None, repr=False)
    place: tuple[str, str] = (".*", ".*")


def check(driver: Driver, job: Job, broken: Path) -> object:
    return driver.check()


def submit(driver: Driver, job: Job, broken: Path) -> object:
    return driver.submit(job)


SCENES = {
    "401": Scene(check, Respond(401, ECHO)),
    "401 as text": Scene(check, Respond(401, f"bad {CANARY}")),
    "400": Scene(submit, Respond(400, ECHO)),
    "429": Scene(check, Respond(429, ECHO, LATER)),
    "500": Scene(check, Respond(500, ECHO)),
    "200 with a page": Scene(check, Respond(200, f"<p>{CANARY}")),
    "200 of another kind": Scene(lambda driver, job, broken: driver.retrieve("b"), Respond(200, {"code": 1})),
    "reset": Scene(check, ResetBefore()),
    "upload lost": Scene(submit, ResetBefore(), ("POST", ".*")),
    "create lost": Scene(submit, ResetAfter(), ("POST|GET", ".*/batches|.*/jobs")),
    "download cut": Scene(lambda driver, job, broken: driver.run(job, timeout=5), CutBody(0), CONTENT),
    "404": Scene(lambda driver, job, broken: driver.retrieve("nobody")),
    "too early": Scene(lambda driver, job, broken: driver.results(driver.submit(job)[0].id)),
    "deadline": Scene(lambda driver, job, broken: driver.run(job, timeout=0)),
    "unknown option": Scene(lambda driver, job, broken: driver.list(colour="red")),
    "metadata": Scene(lambda driver, job, broken: driver.create(broken, job.endpoint, metadata={"k": 1})),
    "bad input": Scene(lambda driver, job, broken: driver.create(broken, job.endpoint)),
    "not submitted": Scene(lambda driver, job, broken: driver.collect(job)),
}


@every_key_header
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_no_error_shows_the_key(
    keyed: tuple[RemoteWorld, Driver], tmp_path: Path, caplog: pytest.LogCaptureFixture, scene: Scene
) -> None:
    world, driver = keyed
    job = world.job(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"custom_id": 7}\n')
    if scene.fault is not None:
        world.server.fail(*scene.place, scene.fault, times=99)
    if scene.place == CONTENT:
        world.let_batches_end()
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AnyBatchError) as caught:
        scene.act(driver, job, broken)
    assert_hidden(list(texts_of(caught.value)))
    assert_hidden([caplog.text, *(str(record.args) for record in caplog.records)])


@every_key_header
def test_a_job_leaves_no_key_behind(
    keyed: tuple[RemoteWorld, Driver], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, driver = keyed
    caplog.set_level(logging.DEBUG)
    world.end_with(lambda fake, batch_id: fake.finish(batch_id, failed=1, quirks=Quirks(extra=["ghost"])))
    job = world.job(tmp_path)
    report = driver.run(job, timeout=10)
    landed(job, report, row_ids(8))
    client = driver.client
    shown = [client, vars(client), client.account, client.account.api_key, client.provider]
    shown += [client.provider.auth(), job, report, driver.list(), driver.retrieve(report.batches[0].id)]
    for one in shown:
        assert_hidden([repr(one), str(one)])
    assert_hidden([report.model_dump_json(), driver.check(), client.account.key])
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    assert len(caplog.records) > 10, "httpx and httpcore did log"
    assert_hidden([caplog.text, *(str(record.args) for record in caplog.records)])
    for batch in world.fake.batches.values():
        assert_hidden([str(batch.metadata), str(batch.options)])
    for call in world.calls:
        named = [name for name, value in call.headers.items() if CANARY in value]
        assert len(named) == 1, "in one header"
        assert CANARY not in call.path + str(call.query)
        assert CANARY.encode() not in call.body


class Breaking(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Fails while it writes the head of a request, as httpcore does on a connection that has just closed."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            head = [(name, request.headers[name]) for name in request.headers]
            raise OSError(f"broken pipe after {len(head)} headers")
        except OSError as error:
            raise httpx.WriteError("broken pipe") from error

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


@every_key_header
def test_no_frame_of_the_http_stack_is_kept(keyed_world: RemoteWorld, mode: str) -> None:
    with keyed_world.open(mode, client_args={"transport": Breaking()}) as driver:
        with pytest.raises(TransportError, match="broken pipe") as caught:
            driver.check()
        assert_hidden(list(texts_of(caught.value)))
        assert isinstance(caught.value.__cause__, httpx.WriteError), "the reasons are"


@pytest.mark.parametrize("name", REMOTE)
def test_accounts_are_told_apart_without_their_keys(name: str) -> None:
    def account(key: str, base: str = "http://127.0.0.1:9/v1") -> Any:
        return get_provider(name, api_key=key, api_base=base).account

    assert account(CANARY).key == account(CANARY).key
    others = [account("another"), account(CANARY, "http://127.0.0.1:8/v1")]
    assert len({account(CANARY).key, *(other.key for other in others)}) == 3
    assert_hidden([repr(account(CANARY)), account(CANARY).key, repr(account(CANARY).api_key)])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "create_batch": lambda name, path, **more: anybatch.create_batch(name, path, "/v1/x", **more),
    "retrieve_batch": lambda name, path, **more: anybatch.retrieve_batch(name, "b", **more),
    "cancel_batch": lambda name, path, **more: anybatch.cancel_batch(name, "b", **more),
    "list_batches": lambda name, path, **more: anybatch.list_batches(name, **more),
    "retrieve_batch_results": lambda name, path, **more: anybatch.retrieve_batch_results(name, "b", **more),
    "run_job": lambda name, path, **more: anybatch.run_job(name, path, path.parent / "out", **more),
    "acreate_batch": lambda name, path, **more: anybatch.acreate_batch(name, path, "/v1/x", **more),
    "aretrieve_batch": lambda name, path, **more: anybatch.aretrieve_batch(name, "b", **more),
    "acancel_batch": lambda name, path, **more: anybatch.acancel_batch(name, "b", **more),
    "alist_batches": lambda name, path, **more: anybatch.alist_batches(name, **more),
    "aretrieve_batch_results": lambda name, path, **more: anybatch.aretrieve_batch_results(name, "b", **more),
    "arun_job": lambda name, path, **more: anybatch.arun_job(name, path, path.parent / "out", **more),
    "Client": lambda name, path, **more: anybatch.Client(name, **more | {"client_args": {"colour": 1}}),
    "AsyncClient": lambda name, path, **more: anybatch.AsyncClient(
        name, **more | {"client_args": {"colour": 1}}
    ),
    "get_provider": lambda name, path, api_key, api_base, client_args: get_provider(
        "no-such", api_key=api_key, api_base=api_base
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
async def test_no_frame_of_ours_holds_the_key_in_the_open(
    keyed_at: RemoteWorld, function: Callable[..., Any], tmp_path: Path
) -> None:
    """Error trackers show the locals of every frame: the caller's own are his, the rest is ours."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"custom_id": 7}\n')
    account = {
        "api_key": CANARY,
        "api_base": f"{keyed_at.api_base}/nowhere",
        "client_args": {"verify": tls()},
    }

    async def act() -> None:
        found = function("openai", path, **account)
        if inspect.isawaitable(found):
            await found

    with pytest.raises(AnyBatchError) as caught:
        await act()
    ours = own_frames(caught.value)
    assert ours
    assert_hidden([repr(frame.f_locals) for frame in ours])


def own_frames(error: BaseException) -> list[FrameType]:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [frame for frame in frames if frame.f_globals["__name__"].startswith("anybatch")]


@pytest.fixture(scope="module")
def keyed_at() -> Iterator[RemoteWorld]:
    with CanaryWorld("openai") as world:
        yield world


@pytest.mark.parametrize("odd", ["–", "\n-", "\x7f"])
def test_a_key_with_odd_characters_is_not_shown(odd: str) -> None:
    with pytest.raises(ConfigurationError, match="characters that cannot be part of a key") as caught:
        get_provider("openai", api_key=CANARY + odd)
    assert_hidden([str(caught.value), *(repr(frame.f_locals) for frame in own_frames(caught.value))])


def test_a_key_read_from_a_file_may_end_in_its_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\n")
    headers = get_provider("openai").auth_headers()
    assert headers == {"Authorization": f"Bearer {CANARY}"}
