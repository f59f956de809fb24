"""What the network and a provider's front door do: retries, breaks, redirects, and who is shown the key."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import (
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    BatchLostError,
    ConfigurationError,
    CreateOutcomeUnknownError,
    QuotaError,
    RateLimitError,
    RetryPolicy,
    ServerError,
    TransportError,
)
from tests.fakes.faults import CutBody, ResetAfter, ResetBefore, Respond
from tests.fakes.files import serve_bytes
from tests.fakes.server import FakeServer, Reply

from .world import FORMATS, REMOTE, Driver, RemoteWorld, landed, row_ids, tls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.server import Request

IDS = row_ids(8)
ANYTHING = (".*", ".*")
CREATE = ("POST", ".*/(batches|batch/jobs)")
UPLOAD = ("POST", ".*/files")
CONTENT = ("GET", ".*/(content|results)")
KEY_HEADERS = {"authorization", "x-api-key", "api-key"}

openai_only = pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")
every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
with_files = pytest.mark.parametrize("shared_world", ["openai", "mistral"], indirect=True, scope="module")
each_key_header = pytest.mark.parametrize(
    "shared_world", ["openai", "azure", "mistral", "anthropic"], indirect=True, scope="module"
)


# --- retries -------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(
    ("headers", "pause"),
    [({"retry-after": "0.06"}, 0.06), ({"retry-after-ms": "50"}, 0.05), ({}, 0.0)],
    ids=["seconds", "milliseconds", "not said"],
)
def test_429_waits_as_long_as_it_is_told(
    world: RemoteWorld, driver: Driver, headers: dict[str, str], pause: float
) -> None:
    world.server.fail("GET", ".*", Respond(429, {"error": {"message": "slow down"}}, headers), times=2)
    assert world.name in driver.check()
    assert [call.status for call in world.calls] == [429, 429, 200]
    gaps = [after.at - before.at for before, after in itertools.pairwise(world.calls)]
    assert all(gap >= pause for gap in gaps)


@every_format
def test_a_pause_too_long_is_not_sat_out(world: RemoteWorld, driver: Driver) -> None:
    world.server.fail(*ANYTHING, Respond(429, {"error": {"message": "later"}}, {"retry-after": "3600"}))
    with pytest.raises(RateLimitError, match="later") as caught:
        driver.check()
    assert caught.value.retry_after == 3600
    assert len(world.calls) == 1


TROUBLE = {
    "408": Respond(408, {"error": {"message": "timeout"}}),
    "409": Respond(409, {"error": {"message": "lock"}}),
    "500": Respond(500, {"error": {"message": "oops"}}),
    "502 as HTML": Respond(502, "<html>Bad Gateway</html>", {"content-type": "text/html"}),
    "503 without a body": Respond(503),
    "529": Respond(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
    "reset": ResetBefore(),
    "reset after it was done": ResetAfter(),
    "answer cut short": CutBody(20),
}


@openai_only
@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE.keys())
def test_trouble_is_ridden_out(world: RemoteWorld, driver: Driver, trouble: Respond) -> None:
    world.server.fail("GET", ".*", trouble, times=3)
    assert world.name in driver.check()
    assert world.server.unused_faults == 0
    assert len(world.calls) == 4


@every_format
def test_trouble_without_end_is_told(world: RemoteWorld, driver: Driver) -> None:
    world.server.fail(
        *ANYTHING, Respond(500, {"error": {"message": "oops"}}, {"request-id": "req_7"}), times=99
    )
    with pytest.raises(ServerError, match="oops") as caught:
        driver.retrieve("batch_7")
    assert (caught.value.status_code, caught.value.request_id) == (500, "req_7")
    assert (caught.value.provider, caught.value.batch_id) == (world.name, "batch_7")
    assert len(world.calls) == driver.retry.attempts
    assert all(fact in str(caught.value) for fact in (world.name, "batch_7", "500", "req_7"))


FINAL = {
    "401": (Respond(401, {"error": {"message": "bad key"}}), AuthenticationError),
    "403": (Respond(403, {"error": {"message": "not yours"}}), AuthenticationError),
    "400": (Respond(400, {"error": {"message": "no"}}), BadRequestError),
    "402": (Respond(402, {"error": {"message": "pay first"}}), QuotaError),
    "422": (Respond(422, {"detail": [{"msg": "no", "loc": ["body"]}]}), BadRequestError),
    "no quota": (
        Respond(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
        QuotaError,
    ),
    "told not to": (
        Respond(500, {"error": {"message": "no"}}, {"x-should-retry": "false"}),
        ServerError,
    ),
    "HTML": (Respond(200, "<html>Log in</html>", {"content-type": "text/html"}), ServerError),
    "a JSON list": (Respond(200, [1, 2]), ServerError),
    "JSON of another kind": (
        Respond(200, {"code": 30001, "message": "wrong place", "data": None}),
        ServerError,
    ),
}


@openai_only
@pytest.mark.parametrize(("answer", "kind"), FINAL.values(), ids=FINAL.keys())
def test_what_waiting_does_not_cure_is_told_at_once(
    world: RemoteWorld, driver: Driver, answer: Respond, kind: type[Exception]
) -> None:
    world.server.fail(*ANYTHING, answer, times=99)
    with pytest.raises(kind) as caught:
        driver.retrieve("batch_7")
    assert type(caught.value) is kind
    malformed = answer.status == 200 and not isinstance(answer.body, dict)
    assert len(world.calls) == (5 if malformed else 1), "what is no JSON is asked for again"
    assert caught.value.batch_id == "batch_7"


@every_format
@pytest.mark.parametrize("answer", ["<html>Log in</html>", {"code": 30001, "message": "wrong place"}])
def test_an_answer_that_is_not_the_api_s(world: RemoteWorld, driver: Driver, answer: object) -> None:
    world.server.fail(*ANYTHING, Respond(200, answer), times=99)
    with pytest.raises(ServerError, match=r"Log in|wrong place"):
        driver.retrieve("batch_7")
    with pytest.raises(ServerError, match=r"Log in|wrong place"):
        driver.cancel("batch_7")
    assert len(world.calls) == (2 if isinstance(answer, dict) else 10)


NO_LISTING: dict[str, object] = {
    "a failure with status 200": {"code": 50505, "message": "overloaded", "data": None},
    "another server": {"hello": "world"},
    "a page of another kind": {"object": "page", "data": {"items": []}},
    "a list of other things": {"object": "list", "data": ["b1"]},
}


@every_format
@pytest.mark.parametrize("answer", NO_LISTING.values(), ids=NO_LISTING.keys())
def test_what_is_no_listing_is_not_an_empty_one(world: RemoteWorld, driver: Driver, answer: object) -> None:
    world.server.fail("GET", ".*", Respond(200, answer), times=2)
    with pytest.raises(ServerError, match="no listing"):
        driver.list()
    with pytest.raises(ServerError, match="no listing") as caught:
        driver.check()
    assert caught.value.status_code in (None, 200), "which a connection test takes for the wrong address"


@every_format
def test_a_listing_without_entries_may_say_null(world: RemoteWorld, driver: Driver) -> None:
    world.server.fail("GET", ".*", Respond(200, {"object": "list", "data": None}))
    assert list(driver.list()) == []


@every_format
def test_nobody_there(world: RemoteWorld, mode: str) -> None:
    with FakeServer(world.fake) as gone:
        address = gone.url
    right = world.api_base
    try:
        world.api_base = right.replace(world.server.url, address)
        driver = world.open(mode)
    finally:
        world.api_base = right
    with pytest.raises(TransportError, match=r"127\.0\.0\.1") as caught:
        driver.check()
    assert not caught.value.sent
    assert caught.value.provider == world.name


# --- what must not happen twice ----------------------------------------------------------------------


@with_files
@pytest.mark.parametrize("trouble", [TROUBLE["500"], TROUBLE["reset after it was done"]])
def test_uploads_are_repeated_whole(
    world: RemoteWorld, driver: Driver, tmp_path: Path, trouble: Respond
) -> None:
    world.server.fail(*UPLOAD, trouble, times=2)
    world.let_batches_end()
    job = world.job(tmp_path)
    landed(job, driver.run(job, timeout=10), IDS)
    assert world.server.count(*UPLOAD) == 3
    sizes = {call.body_size for call in world.server.find(*UPLOAD)}
    assert len(sizes) == 1
    assert len(world.fake.batches) == 1


def not_anthropic(names: tuple[str, ...], lost: str) -> list[Any]:
    return [pytest.param(name, lost, id=f"{name}-{lost}") for name in names if name != "anthropic"]


@pytest.mark.parametrize(
    ("shared_world", "lost"),
    [*not_anthropic(REMOTE, "answer"), *not_anthropic(FORMATS, "request"), *not_anthropic(FORMATS, "500")],
    indirect=["shared_world"],
    scope="module",
)
def test_a_create_without_answer_is_looked_for(
    world: RemoteWorld, driver: Driver, tmp_path: Path, lost: str
) -> None:
    """Not knowing whether a batch exists, it is asked for before it is created again."""
    losses = {"request": ResetBefore(), "answer": ResetAfter(), "500": TROUBLE["500"]}
    world.server.fail(*CREATE, losses[lost])
    world.fake.endless_list = True
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    assert list(world.fake.batches) == [batch.id]
    expected = 1 if lost == "answer" and world.name != "perplexity" else 2
    assert world.server.count(*CREATE) == expected
    world.finish(batch.id)
    landed(job, driver.collect(job), IDS)


@pytest.mark.parametrize("shared_world", ["openai", "siliconflow", "mistral"], indirect=True, scope="module")
def test_a_batch_is_not_created_again_where_the_provider_cannot_tell(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """An overloaded server that answers 200 has not said that there is no such batch."""
    world.server.fail(*CREATE, ResetAfter())
    world.server.fail("GET", ".*", Respond(200, NO_LISTING["a failure with status 200"]), times=1)
    job = world.job(tmp_path)
    with pytest.raises(ServerError, match="overloaded"):
        driver.submit(job)
    (batch,) = driver.submit(job)
    assert list(world.fake.batches) == [batch.id]
    assert world.server.count(*CREATE) == 1


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_create_without_answer_that_cannot_be_looked_for(
    world: RemoteWorld, driver: Driver, tmp_path: Path, lost: str
) -> None:
    world.server.fail(*CREATE, ResetBefore() if lost == "request" else ResetAfter())
    source = world.write(tmp_path / "in.jsonl", IDS)
    with pytest.raises(CreateOutcomeUnknownError, match="look at the provider's list of batches"):
        driver.create(source, world.endpoint)
    assert world.server.count(*CREATE) == 1


@every_format
@pytest.mark.parametrize(
    "refusal", [Respond(429, {"error": {"message": "slow down"}}), TROUBLE["529"]], ids=["429", "529"]
)
def test_a_create_is_repeated_after_a_429(
    world: RemoteWorld, driver: Driver, tmp_path: Path, refusal: Respond
) -> None:
    world.server.fail(*CREATE, refusal, times=2)
    job = world.job(tmp_path)
    driver.submit(job)
    assert world.server.count(*CREATE) == 3
    assert len(world.fake.batches) == 1


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_a_create_that_is_always_turned_away_leaves_nothing_open(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    world.server.fail(*CREATE, TROUBLE["529"], times=driver.retry.attempts)
    job = world.job(tmp_path)
    with pytest.raises(RateLimitError, match="Overloaded"):
        driver.submit(job)
    (batch,) = driver.submit(job)
    assert list(world.fake.batches) == [batch.id], "and nobody had to look for another one"


@pytest.mark.parametrize("shared_world", ["perplexity"], indirect=True, scope="module")
def test_native_idempotency_is_used(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.server.fail(*CREATE, ResetAfter(), times=3)
    driver.submit(world.job(tmp_path))
    keys = {call.headers.get("idempotency-key") for call in world.server.find(*CREATE)}
    assert len(keys) == 1
    assert None not in keys
    assert len(world.fake.batches) == 1
    assert world.server.count("GET", ".*/batches") == 0, "no need to look"


# --- downloads ---------------------------------------------------------------------------------------


@with_files
@pytest.mark.parametrize("after", [0, 700], ids=["at once", "in the middle"])
def test_a_cut_download_goes_on_where_it_broke(
    world: RemoteWorld, driver: Driver, tmp_path: Path, after: int
) -> None:
    world.server.fail(*CONTENT, CutBody(after), times=2)
    world.let_batches_end()
    job = world.job(tmp_path)
    found = landed(job, driver.run(job, timeout=10), IDS)
    assert found.report.ok
    ranges = [call.headers.get("range") for call in world.server.find(*CONTENT)]
    assert ranges == ([None, None, None] if after == 0 else [None, "bytes=700-", "bytes=1400-"])


@every_format
def test_a_cut_download_starts_anew_where_there_are_no_ranges(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    had, world.fake.ranges = getattr(world.fake, "ranges", False), False
    try:
        world.server.fail(*CONTENT, CutBody(700), times=2)
        world.let_batches_end()
        job = world.job(tmp_path)
        assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    finally:
        world.fake.ranges = had
    assert [call.status for call in world.server.find(*CONTENT)] == [200, 200, 200]


@with_files
def test_a_large_download_may_break_more_often_than_a_request(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """As long as bytes come, it goes on: more breaks than a single request has attempts."""
    breaks = driver.retry.attempts + 3
    world.server.fail(*CONTENT, CutBody(100), times=breaks)
    world.let_batches_end()
    job = world.job(tmp_path, count=12)
    assert landed(job, driver.run(job, timeout=10), row_ids(12)).report.ok
    assert world.server.count(*CONTENT) == breaks + 1


@every_format
def test_trouble_at_a_download_is_ridden_out(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.server.fail(*CONTENT, Respond(500, {"error": {"message": "oops"}}), times=1)
    world.server.fail(
        *CONTENT, Respond(429, {"error": {"message": "slow"}}, {"retry-after": "0.01"}), times=1
    )
    world.server.fail(*CONTENT, ResetBefore(), times=1)
    world.let_batches_end()
    job = world.job(tmp_path)
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert world.server.count(*CONTENT) == 4


@every_format
def test_a_download_that_is_refused_lands_nothing(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    world.finish(batch.id)
    world.server.fail(*CONTENT, Respond(404, {"error": {"message": "No such File object"}}), times=999)
    with pytest.raises(BatchLostError, match=r"No such File object.* on_lost='land'") as caught:
        driver.collect(job)
    assert caught.value.batch_id == batch.id
    world.server.clear_faults()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "ids.jsonl", "job.json"]
    assert landed(job, driver.collect(job), IDS).report.ok, "and the next attempt lands them"


@pytest.fixture
def zipping(world: RemoteWorld) -> Iterator[FakeServer]:
    """A front that compresses whatever it is told, as some proxies do."""

    def serve(request: Request) -> Reply:
        reply = world.fake(request)
        if not request.path.endswith("/content"):
            return reply
        plain = replace(
            request, headers={name: value for name, value in request.headers.items() if name != "range"}
        )
        body = gzip.compress(world.fake(plain).body, mtime=0)
        return serve_bytes(body, request, ranges=True, content_type="application/jsonl")

    def compressed(request: Request) -> Reply:
        reply = serve(request)
        if request.path.endswith("/content"):
            return replace(reply, headers={**reply.headers, "content-encoding": "gzip"})
        return reply

    with FakeServer(compressed) as server:
        yield server


@pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")
def test_ranges_are_not_asked_of_a_compressed_body(
    world: RemoteWorld, mode: str, zipping: FakeServer, tmp_path: Path
) -> None:
    """They would count its compressed bytes, and what is in the file is not."""
    right = world.api_base
    try:
        world.api_base = f"{zipping.url}/v1"
        driver = world.open(mode)
    finally:
        world.api_base = right
    zipping.fail(*CONTENT, CutBody(200), times=2)
    world.let_batches_end()
    job = world.job(tmp_path)
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert [call.headers.get("range") for call in zipping.find(*CONTENT)] == [None] * 3


# --- waiting -----------------------------------------------------------------------------------------


@every_format
def test_an_outage_ends_no_wait(world: RemoteWorld, mode: str, tmp_path: Path) -> None:
    """It may last longer than any request is repeated."""
    driver = world.open(mode, retry=RetryPolicy(attempts=1))
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    world.server.fail("GET", f".*/{batch.id}", TROUBLE["502 as HTML"], times=2)
    world.server.fail("GET", f".*/{batch.id}", ResetBefore(), times=2)
    world.server.fail("GET", f".*/{batch.id}", Respond(200, {"code": 50505, "data": None}), times=1)
    world.server.fail("GET", f".*/{batch.id}", Respond(409, {"error": {"message": "lock"}}), times=1)
    world.let_batches_end()
    assert driver.wait(batch.id, timeout=30).status == "completed"
    assert world.server.unused_faults == 0


@every_format
@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_ends_a_wait(world: RemoteWorld, driver: Driver, status: int) -> None:
    """An id in a form that the provider does not know is never going to be one."""
    world.server.fail(*ANYTHING, Respond(status, {"error": {"message": "not a valid id"}}), times=99)
    with pytest.raises(BadRequestError, match="not a valid id") as caught:
        driver.wait("not-an-id", timeout=30)
    assert caught.value.batch_id == "not-an-id"
    assert len(world.calls) == 1


@openai_only
def test_clients_of_one_account_that_ask_in_other_ways_share_no_polls(
    world: RemoteWorld, tmp_path: Path
) -> None:
    """A gateway may tell its tenants apart by a header: the one must not be asked for the other's batch."""

    async def one(tenant: str) -> str:
        client_args = {"headers": {"x-tenant": tenant}, "verify": tls()}
        async with AsyncClient(world.provider(), client_args=client_args) as client:
            batch = await client.create(world.write(tmp_path / tenant, IDS), world.endpoint)
            return (await client.wait(batch.id, timeout=30)).id

    async def both() -> list[str]:
        return await asyncio.gather(one("a"), one("b"))

    world.end_with(lambda fake, batch_id: fake.finish(batch_id))
    for tenant, batch_id in zip("ab", asyncio.run(both()), strict=True):
        asked = world.server.find("GET", f".*/{batch_id}")
        assert {call.headers["x-tenant"] for call in asked} == {tenant}


# --- other hosts -------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(world: RemoteWorld) -> Iterator[FakeServer]:
    """Another host that holds the result files, as an object store behind signed URLs does."""

    def serve(request: Request) -> Reply:
        if KEY_HEADERS & request.headers.keys():
            return Reply(400, b"Only one auth mechanism allowed")
        return Reply(200, b"".join(result_files(world)))

    with FakeServer(serve) as server:
        yield server


def result_files(world: RemoteWorld) -> list[bytes]:
    if world.name == "anthropic":
        return [world.fake.results[batch_id] for batch_id in world.fake.batches]
    return [world.fake.files[batch.output_file_id].data for batch in world.fake.batches.values()]


def open_with_own_headers(world: RemoteWorld, mode: str) -> Driver:
    """A caller's own headers can hold a key as well, as a gateway asks for it."""
    return world.open(mode, client_args={"headers": {"x-gateway-key": "gateway-secret"}})


@each_key_header
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_host_takes_no_key_along(
    world: RemoteWorld, driver: Driver, mode: str, elsewhere: FakeServer, tmp_path: Path, status: int
) -> None:
    world.server.fail(*CONTENT, Respond(status, b"", {"location": f"{elsewhere.url}/signed?sig=1"}))
    world.let_batches_end()
    job = world.job(tmp_path)
    with open_with_own_headers(world, mode) as client:
        assert landed(job, client.run(job, timeout=10), IDS).report.ok
    (call,) = elsewhere.calls
    assert call.path == "/signed"
    assert call.query == {"sig": ["1"]}
    assert not KEY_HEADERS & call.headers.keys()
    assert "test-key" not in str(call.headers)
    assert "gateway-secret" not in str(call.headers)
    ours = {name for one in world.calls for name in one.headers}
    assert KEY_HEADERS & ours, "the provider itself gets it"
    assert all(one.headers["x-gateway-key"] == "gateway-secret" for one in world.calls)


@each_key_header
def test_a_redirect_on_the_same_host_keeps_the_key(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path)
    (batch,) = driver.submit(job)
    world.finish(batch.id)
    first = next(driver.provider.download(driver.retrieve(batch.id), tmp_path))
    real = first.request.url.raw_path.decode()
    world.server.fail("GET", ".*/(content|results)", Respond(302, b"", {"location": real}))
    assert landed(job, driver.collect(job), IDS).report.ok


@every_format
def test_a_redirect_in_a_circle_ends(world: RemoteWorld, driver: Driver) -> None:
    world.server.fail("GET", ".*", Respond(302, b"", {"location": f"{world.server.url}/again"}), times=999)
    with pytest.raises(ServerError, match="redirects more than 5 times"):
        driver.check()
    assert len(world.calls) == 6


@pytest.mark.parametrize("shared_world", ["anthropic"], indirect=True, scope="module")
def test_results_behind_a_gateway_come_through_it(
    world: RemoteWorld, driver: Driver, elsewhere: FakeServer, tmp_path: Path
) -> None:
    """A gateway passes on the results_url as it was: on a host that does not know its keys."""
    world.let_batches_end()
    world.fake.results_base = elsewhere.url
    job = world.job(tmp_path)
    try:
        assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    finally:
        world.fake.results_base = None
    assert elsewhere.calls == []
    assert len(world.server.find("GET", ".*/results")) == 1


@pytest.mark.parametrize(
    ("shared_world", "call"),
    [
        *(pytest.param(name, CREATE, id=f"{name}-create") for name in FORMATS),
        *(pytest.param(name, UPLOAD, id=f"{name}-upload") for name in ("openai", "mistral")),
    ],
    indirect=["shared_world"],
    scope="module",
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_what_is_not_a_get_is_not_sent_elsewhere(
    world: RemoteWorld, driver: Driver, tmp_path: Path, status: int, call: tuple[str, str]
) -> None:
    """As where http:// was given for https://: telling so beats asking again for a minute."""
    there = Respond(status, b"", {"location": "https://api.example:8443/v1/files?token=s3cret"})
    world.server.fail(*call, there, times=99)
    job = world.job(tmp_path)
    with pytest.raises(ConfigurationError, match=r"redirects to https://api\.example:8443;") as caught:
        driver.submit(job)
    assert world.server.count(*call) == 1
    assert "s3cret" not in str(caught.value)
    assert (caught.value.status_code, caught.value.provider) == (status, world.name)
    world.server.clear_faults()
    driver.submit(job)
    assert len(world.fake.batches) == 1, "nothing was left open"


def test_every_provider_sends_its_key_in_its_own_header() -> None:
    """What the redirect tests look for is all there is."""
    from anybatch import get_provider

    for name in REMOTE:
        headers = get_provider(name, api_key="k-1", api_base="http://127.0.0.1:9").auth_headers()
        assert {header.lower() for header, value in headers.items() if "k-1" in value} <= KEY_HEADERS
