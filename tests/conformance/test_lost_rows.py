"""What loses rows or pays twice, over every wire format, with both clients (FAULTS A1, A2, A3, A4b, G1).

Each test is the situation of a fault that was found; the wire formats differ in where it can occur.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anybatch import (
    BadRequestError,
    BatchLostError,
    BatchStatus,
    CreateOutcomeUnknownError,
    IncompleteListingError,
    JobError,
    NotFoundError,
    Outcome,
    ServerError,
)
from anybatch.jobs import lost as lost_module
from tests.fakes.faults import CutBody, ResetAfter, Respond
from tests.fakes.provider import FakeProvider, State
from tests.fakes.server import Reply, Request

from .world import FORMATS, Driver, RemoteWorld, landed, row_ids

every_format = pytest.mark.parametrize("shared_world", FORMATS, indirect=True, scope="module")
findable = pytest.mark.parametrize(
    "shared_world", [name for name in FORMATS if name != "anthropic"], indirect=True, scope="module"
)
CONTENT = ("GET", ".*/(content|results)")
CREATES = ".*/(batches|jobs)"
IDS = row_ids(8)
STUCK_AFTER = 0.02  # seconds that a batch may be in cancelling here


# --- A1: a stop meets a shard that is planned anew ---------------------------------------------------------


@every_format
def test_a_stop_while_a_shard_is_planned_anew(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A1: of three shards the first has no batch any more; the others' results are read from their own."""
    job = world.job(tmp_path, count=3, shard_requests=1)
    first, second, third = driver.submit(job)
    world.finish(second.id)
    world.finish(third.id)
    # As another process leaves it that was about to submit the first one again when the job was stopped.
    path = tmp_path / "out" / "job.json"
    ledger = json.loads(path.read_text())
    fresh = {name: ledger["shards"][0][name] for name in ("shard", "round", "first_row", "rows")}
    ledger["shards"][0] = fresh
    ledger["revision"] += 1
    path.write_text(json.dumps(ledger))
    del world.fake.batches[first.id]
    assert {batch.id for batch in driver.stop(job)} == {second.id, third.id}
    found = landed(job, driver.collect(job), row_ids(3))
    assert found.outcomes == {"row-0": "cancelled", "row-1": "succeeded", "row-2": "succeeded"}
    assert found.text("row-1").endswith("row-1")
    assert found.text("row-2").endswith("row-2")
    assert [record.id for record in found.report.batches] == [second.id, third.id]


# --- A2: a download that is cut short ----------------------------------------------------------------------

Cut = Callable[[Reply], Reply]


def half(reply: Reply) -> bytes:
    lines = reply.body.splitlines(keepends=True)
    return b"".join(lines[: len(lines) // 2])


CUTS: dict[str, Cut] = {
    "closed without a length": lambda reply: replace(reply, body=half(reply)),
    "in the middle of a line": lambda reply: replace(reply, body=reply.body[: len(half(reply)) + 20]),
    "an unasked 206": lambda reply: replace(
        reply,
        status=206,
        body=half(reply),
        headers={**reply.headers, "content-range": f"bytes 0-{len(half(reply)) - 1}/{len(reply.body)}"},
    ),
    "a 206 without a range": lambda reply: replace(reply, status=206, body=half(reply)),
    "an unasked 416": lambda reply: Reply(416, b"", {"content-range": "bytes */0"}),
    "an empty 200": lambda reply: replace(reply, body=b""),
    "a page of a log-in": lambda reply: replace(reply, body=b"<html>Log in</html>"),
}


def cutting(world: RemoteWorld, cut: Cut, times: int) -> Callable[[], int]:
    """Spoil so many downloads; returns what counts them."""
    fake, done = world.fake, [0]

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if request.path.endswith(("/content", "/results")) and reply.status == 200 and done[0] < times:
            done[0] += 1
            return cut(reply)
        return reply

    world.server.app = serve
    return lambda: done[0]


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    world = request.node.funcargs.get("world")
    if isinstance(world, RemoteWorld):
        world.server.app = world.fake


@every_format
@pytest.mark.parametrize("verb", ["run", "results", "download"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_download_that_is_cut_short(
    world: RemoteWorld, driver: Driver, tmp_path: Path, cut: Cut, verb: str
) -> None:
    """A2: it is asked for again, whoever asks; no row that was paid for is missing, none bought anew."""
    world.let_batches_end()
    job = world.job(tmp_path, max_rounds=2)
    spoiled = cutting(world, cut, times=2)
    if verb == "run":
        assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    else:
        (batch,) = driver.submit(job)
        driver.wait(batch.id, timeout=10)
        if verb == "results":
            assert sorted(row.custom_id for row in driver.results(batch.id)) == IDS
        else:
            (path,) = driver.download(batch.id, tmp_path / "files")
            assert path.read_bytes().count(b"\n") == 8
    assert spoiled() == 2
    assert len(world.fake.batches) == 1


@every_format
@pytest.mark.parametrize("cut", ["closed without a length", "an empty 200"])
def test_a_download_that_stays_short(world: RemoteWorld, driver: Driver, tmp_path: Path, cut: str) -> None:
    """A2: an error, never `missing`, and nothing is bought again, until `on_lost` says so."""
    world.let_batches_end()
    job = world.job(tmp_path, max_rounds=2)
    cutting(world, CUTS[cut], times=9999)
    with pytest.raises(ServerError, match=r"hold \d of the 8 rows .*on_lost='land'"):
        driver.run(job, timeout=10)
    assert job.report() is None
    assert len(world.fake.batches) == 1
    if cut != "an empty 200":
        with pytest.raises(ServerError, match=r"hold 4 of the 8 rows"):
            driver.results(world.fake.last.id)
    found = landed(job, driver.run(replace(job, on_lost="land"), timeout=10), IDS)
    there = 4 if cut == "closed without a length" else 0
    assert found.report.counts[Outcome.SUCCEEDED] == there
    assert found.report.counts[Outcome.MISSING] == 8 - there
    assert {line["error"]["code"] for line in found.lines if line["error"]} == {"results_lost"}
    assert len(world.fake.batches) == 1, "on_lost='land' buys nothing, whatever max_rounds is"


@every_format
def test_a_partial_answer_from_the_wrong_place(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A2: a Range is answered with another part: taken for what was asked, rows would be mixed up."""
    world.let_batches_end()
    job = world.job(tmp_path)
    fake, calls = world.fake, []

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if not request.path.endswith(("/content", "/results")) or len(calls) >= 2:
            return reply
        calls.append(request.headers.get("range"))
        if len(calls) == 1:  # promises all, sends half, and closes
            return replace(reply, body=reply.body, headers={**reply.headers, "etag": '"a"'})
        start = {"content-range": f"bytes 0-9/{len(reply.body)}"}
        return replace(reply, status=206, body=reply.body[:10], headers={**reply.headers, **start})

    world.server.app = serve
    world.server.fail(*CONTENT, CutBody(100))
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


# --- A3: one row that is nested too deep -------------------------------------------------------------------

DEPTH = 300
NESTED: Any = json.loads("[" * DEPTH + "]" * DEPTH)


def spoiled_row(value: dict[str, Any], case: str, name: str) -> dict[str, Any]:
    """The result line of a row with something deep in it, at a place where the wire format has one."""
    if name == "anthropic":
        message = value["result"]["message"]
        if case == "a deep error":
            return {**value, "result": {"type": "errored", "error": {"type": "error", "error": NESTED}}}
        tool = {"type": "tool_use", "id": "t", "name": "f", "input": {"deep": NESTED}}
        if case == "beside a NaN":
            tool["input"]["number"] = float("nan")
        return {**value, "result": {**value["result"], "message": {**message, "content": [tool]}}}
    body = value["response"]["body"]
    if case == "a deep error":
        return {**value, "response": {"status_code": 500, "body": {"error": NESTED}}, "error": None}
    deep = {**body, "deep": NESTED, "number": float("nan") if case == "beside a NaN" else 1.0}
    shown = json.dumps(deep) if case == "a body that is text" else deep
    return {**value, "response": {**value["response"], "body": shown}}


@every_format
@pytest.mark.parametrize("case", ["a deep error", "a body that is text", "beside a NaN", "a deep answer"])
def test_a_row_that_is_nested_too_deep(world: RemoteWorld, driver: Driver, tmp_path: Path, case: str) -> None:
    """A3: it costs its own row at most, and its bytes are kept; the others land."""
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if not request.path.endswith(("/content", "/results")) or reply.status != 200:
            return reply
        lines = [json.loads(line) for line in reply.body.splitlines()]
        lines = [spoiled_row(one, case, world.name) if one["custom_id"] == "row-3" else one for one in lines]
        return replace(reply, body=b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    world.server.app = serve
    world.let_batches_end()
    job = world.job(tmp_path)
    found = landed(job, driver.run(job, timeout=10), IDS)
    others = {one: outcome for one, outcome in found.outcomes.items() if one != "row-3"}
    assert set(others.values()) == {"succeeded"}
    outcome = found.outcomes["row-3"]
    assert outcome == "failed" or case != "a deep error"
    if outcome == "failed" and found.line("row-3")["error"]["code"] == "undecodable_line":
        assert any(b'"row-3"' in raw and b"[[[[[[[[" in raw for raw in found.stray)
    else:
        raw = (tmp_path / "out" / "results.jsonl").read_bytes()
        assert b"[[[[[[[[" in raw, "what can be kept is kept"
    rows = {row.custom_id: row for row in driver.results(world.fake.last.id)}
    assert sorted(rows) == IDS
    assert b"[[[[[[[[" in rows["row-3"].raw


# --- A4b: one dead batch -----------------------------------------------------------------------------------


def remove_batch(world: RemoteWorld, batch_id: str) -> None:
    del world.fake.batches[batch_id]


def remove_files(world: RemoteWorld, batch_id: str) -> None:
    batch = world.fake.batches[batch_id]
    name = batch.output_file_id or batch_id
    gone = Respond(404, {"error": {"message": "No such File object"}})
    world.server.fail("GET", f".*/{name}/(content|results)", gone, times=99999)


def cancel_for_ever(world: RemoteWorld, batch_id: str) -> None:
    raw = {"mistral": "CANCELLATION_REQUESTED", "anthropic": "canceling"}.get(world.name, "cancelling")
    world.fake.start(batch_id)
    world.fake.set_status(batch_id, raw)


DEAD: dict[str, Callable[[RemoteWorld, str], None]] = {
    "the batch is gone": remove_batch,
    "its file is gone": remove_files,
    "it is cancelling for ever": cancel_for_ever,
}


@pytest.fixture
def soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_module, "STUCK_AFTER", STUCK_AFTER)


def dead_among_three(
    world: RemoteWorld, driver: Driver, tmp_path: Path, die: Callable[[RemoteWorld, str], None], **more: Any
) -> Any:
    job = world.job(tmp_path, count=6, shard_requests=2, **more)
    batches = driver.submit(job)
    for batch in batches:
        if die is not cancel_for_ever or batch is not batches[1]:
            world.finish(batch.id)
    die(world, batches[1].id)
    return job


@every_format
@pytest.mark.parametrize("die", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("on_lost", ["fail", "land", "resubmit"])
@pytest.mark.usefixtures("soon_stuck")
def test_one_dead_batch(
    world: RemoteWorld,
    driver: Driver,
    tmp_path: Path,
    die: Callable[[RemoteWorld, str], None],
    on_lost: str,
) -> None:
    """A4b: it does not lock the rows of the others, and only "resubmit" buys its rows again."""
    job = dead_among_three(world, driver, tmp_path, die, on_lost=on_lost)
    made = len(world.fake.batches)
    if on_lost == "fail":
        for _ in range(2):
            with pytest.raises(BatchLostError, match=r"on_lost='land'.*on_lost='resubmit'") as caught:
                run_again(driver, job)
            assert caught.value.batch_id
        assert job.report() is None
        report = run_again(driver, replace(job, on_lost="land"))
        assert landed(job, report, row_ids(6)).report.counts[Outcome.SUCCEEDED] == 4
        assert len(world.fake.batches) == made
        return
    if on_lost == "resubmit":
        let_new_batches_end(world)
    report = run_again(driver, job)
    found = landed(job, report, row_ids(6))
    if on_lost == "land":
        expected = dict.fromkeys(row_ids(6), "succeeded") | {"row-2": "missing", "row-3": "missing"}
        assert found.outcomes == expected
        assert found.line("row-2")["error"]["code"] == "results_lost"
        assert len(world.fake.batches) == made
        assert run_again(driver, job) == report
        let_new_batches_end(world)
        report = run_again(driver, replace(job, on_lost="resubmit"))  # it is not too late for that
    assert landed(job, report, row_ids(6)).report.ok
    assert (report.rounds, len(report.batches)) == (2, 4)
    assert run_again(driver, replace(job, on_lost="resubmit")) == report
    assert len(world.fake.batches) == made + 1


def died_with_a_round_open(world: RemoteWorld, driver: Driver, tmp_path: Path) -> Any:
    """A job whose attempt has opened a round for lost rows, and has sent nothing of it."""
    job = dead_among_three(world, driver, tmp_path, remove_batch, on_lost="resubmit")
    fake = world.fake

    def refuse(request: Request) -> Reply:
        return Reply.json({"error": {"message": "no"}}, 400) if request.method == "POST" else fake(request)

    world.server.app = refuse
    try:
        with pytest.raises(BadRequestError):
            run_again(driver, job)
    finally:
        world.server.app = fake
    return job


@every_format
def test_a_round_for_lost_rows_that_has_no_batch_yet(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """A4b: what collects the job next does not land the rows as missing."""
    job = died_with_a_round_open(world, driver, tmp_path)
    with pytest.raises(JobError, match="submit the job first"):
        driver.collect(job)
    assert job.report() is None
    let_new_batches_end(world)
    report = run_again(driver, job)
    assert landed(job, report, row_ids(6)).report.ok
    assert len(report.batches) == 4


@every_format
def test_a_round_for_lost_rows_that_is_not_wanted_any_more(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """A4b: on_lost='land' lands what there is."""
    job = died_with_a_round_open(world, driver, tmp_path)
    report = driver.collect(replace(job, on_lost="land"))
    assert landed(job, report, row_ids(6)).report.counts[Outcome.SUCCEEDED] == 4


def let_new_batches_end(world: RemoteWorld) -> None:
    """Those that are made from now on; a batch that is cancelling for ever goes on doing so."""
    before = set(world.fake.batches)
    world.end_with(lambda fake, batch_id: None if batch_id in before else fake.finish(batch_id))


def run_again(driver: Driver, job: Any) -> Any:
    """An attempt; one that meets a batch in cancelling notes it, and another one decides."""
    driver.submit(job)
    time.sleep(2 * STUCK_AFTER)
    return driver.run(job, timeout=10)


@every_format
@pytest.mark.parametrize("die", DEAD.values(), ids=DEAD)
@pytest.mark.usefixtures("soon_stuck")
def test_stop_and_more_rounds_with_a_dead_batch(
    world: RemoteWorld, driver: Driver, tmp_path: Path, die: Callable[[RemoteWorld, str], None]
) -> None:
    """A4b: `stop` and a higher `max_rounds` go on without it as well."""
    job = dead_among_three(world, driver, tmp_path, die, on_lost="land", max_rounds=2)
    driver.stop(job)
    time.sleep(2 * STUCK_AFTER)
    report = driver.run(job, timeout=10)
    assert landed(job, report, row_ids(6)).report.counts[Outcome.SUCCEEDED] == 4
    made = len(world.fake.batches)
    assert driver.run(replace(job, max_rounds=3), timeout=10).counts == report.counts
    assert len(world.fake.batches) == made, "lost rows are bought again by on_lost='resubmit' alone"
    let_new_batches_end(world)
    again = driver.run(replace(job, max_rounds=4, on_lost="resubmit"), timeout=10)
    assert again.ok
    assert len(world.fake.batches) == made + 1


@every_format
def test_a_404_of_the_wrong_account(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A4b: where nothing of the account answers, the key is wrong; no policy takes that for a loss."""
    for on_lost in ("land", "resubmit"):
        (tmp_path / on_lost).mkdir()
        job = world.job(tmp_path / on_lost, on_lost=on_lost)
        (batch,) = driver.submit(job)
        world.fake.batches.clear()
        getattr(world.fake, "files", {}).clear()
        with pytest.raises(NotFoundError, match="another account"):
            driver.run(job, timeout=10)
        assert job.report() is None
        assert not world.fake.batches
        assert batch.status is not BatchStatus.COMPLETED


# --- G1: absence from a listing that was not read to its end -----------------------------------------------


def as_listing(request: Request, reply: Reply) -> dict[str, Any] | None:
    """The JSON of a listing's answer, None for any other call."""
    if request.method != "GET" or not request.path.endswith(("/batches", "/jobs")) or reply.status != 200:
        return None
    answer: dict[str, Any] = json.loads(reply.body)
    return answer


def empty_but_more(answer: dict[str, Any], after: str | None, name: str) -> dict[str, Any]:
    if name == "mistral":
        return {**answer, "data": [], "total": 5}
    return {"object": "list", "data": [], "has_more": True}


@findable
def test_an_empty_page_that_promises_more(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """G1: a create's answer is lost, the listing is empty and has more: no second batch is made."""
    fake = world.fake
    world.server.app = spoiled_listing(world, empty_but_more)
    world.server.fail("POST", CREATES, ResetAfter())
    job = world.job(tmp_path)
    with pytest.raises((IncompleteListingError, CreateOutcomeUnknownError)):
        driver.run(job, timeout=10)
    assert len(fake.batches) == 1
    with pytest.raises(IncompleteListingError, match="on_orphan='resubmit'"):
        driver.run(job, timeout=10)
    assert len(fake.batches) == 1
    world.server.app = fake
    world.let_batches_end()
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert len(fake.batches) == 1


@findable
def test_an_unreadable_listing_is_accepted_by_resubmit(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """G1: `on_orphan="resubmit"` is the way out where a provider's listing can never be read."""
    world.server.app = spoiled_listing(world, empty_but_more)
    world.server.fail("POST", CREATES, ResetAfter())
    world.let_batches_end()
    job = world.job(tmp_path, on_orphan="resubmit")
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert len(world.fake.batches) == 2


def empty_with_cursor(answer: dict[str, Any], after: str | None, name: str) -> dict[str, Any]:
    """The first page is empty and leads on; what follows it is the listing as it is."""
    if after:
        return answer
    if name == "mistral":
        return {**answer, "data": [], "total": 250}
    return {"object": "list", "data": [], "has_more": True, "last_id": "batch_cursor"}


@findable
def test_an_empty_page_with_a_cursor_is_followed(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """G1: the batch is behind it."""
    fake = world.fake
    world.server.app = spoiled_listing(world, empty_with_cursor)
    world.server.fail("POST", CREATES, ResetAfter())
    world.let_batches_end()
    job = world.job(tmp_path)
    if (
        world.name == "mistral"
    ):  # an empty page of a numbered listing says that it was cut, not where to go on
        with pytest.raises((IncompleteListingError, CreateOutcomeUnknownError)):
            driver.run(job, timeout=10)
    else:
        assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert len(fake.batches) == 1


def full_without_more(answer: dict[str, Any], after: str | None, name: str) -> dict[str, Any]:
    answer = dict(answer)
    answer.pop("has_more", None)
    answer.pop("total", None)
    return answer


@findable
def test_a_full_page_without_a_word_of_more(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """G1: 100 of 100 entries and no `has_more`: the batch is on the next page."""
    fake = world.fake
    job = world.job(tmp_path)
    world.server.fail("POST", CREATES, ResetAfter())
    made: list[str] = []

    def crowd(request: Request) -> Reply:
        """Others create a hundred batches right after ours."""
        reply = spoil(request)
        if request.method == "POST" and request.path.endswith(("/batches", "/jobs")) and not made:
            ours = fake.last
            for number in range(100):
                twin = replace(
                    ours,
                    id=f"{ours.id[:-4]}{number:04}x",
                    state=State.CANCELLED,
                    reached={**ours.reached, State.CANCELLED: ours.created_at},
                    input_file_id="file-other",
                    metadata={"anybatch_job": "other"},
                )
                fake.batches[twin.id] = twin
                made.append(twin.id)
        return reply

    spoil = spoiled_listing(world, full_without_more)
    world.server.app = crowd
    world.let_batches_end()
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok
    assert len(fake.batches) == 101


def spoiled_listing(
    world: RemoteWorld, spoil: Callable[[dict[str, Any], str | None, str], dict[str, Any]]
) -> Callable[[Request], Reply]:
    fake, name = world.fake, world.name

    def serve(request: Request) -> Reply:
        reply = fake_reply(fake, request)
        answer = as_listing(request, reply)
        if answer is None:
            return reply
        after = request.first("after") or (request.first("page") if request.first("page") != "0" else None)
        return replace(reply, body=json.dumps(spoil(answer, after, name)).encode())

    return serve


def fake_reply(fake: FakeProvider, request: Request) -> Reply:
    if request.first("after") == "batch_cursor":
        request = replace(request, query={k: v for k, v in request.query.items() if k != "after"})
    return fake(request)
