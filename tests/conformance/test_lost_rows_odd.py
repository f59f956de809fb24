"""Stranger ways to lose rows or to pay twice: several faults at once, servers that contradict themselves."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from anybatch import AnyBatchError, NotFoundError, Outcome
from anybatch.jobs import lost as lost_module
from tests.fakes.faults import CutBody, ResetAfter, Respond
from tests.fakes.server import Reply, Request

from .world import Driver, RemoteWorld, landed, row_ids

openai = pytest.mark.parametrize("shared_world", ["openai"], indirect=True, scope="module")
mistral = pytest.mark.parametrize("shared_world", ["mistral"], indirect=True, scope="module")
filed = pytest.mark.parametrize("shared_world", ["openai", "mistral"], indirect=True, scope="module")
every_format = pytest.mark.parametrize(
    "shared_world", ["openai", "mistral", "anthropic"], indirect=True, scope="module"
)
IDS = row_ids(8)
HOUR = 3600.0


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Any:
    yield
    world = request.node.funcargs.get("world")
    if isinstance(world, RemoteWorld):
        world.server.app = world.fake


def is_content(request: Request) -> bool:
    return request.path.endswith(("/content", "/results"))


def is_look(request: Request) -> bool:
    return request.method == "GET" and request.path.split("/")[-2] in ("batches", "jobs")


def set_counts(world: RemoteWorld, shown: dict[str, Any], **counts: int | None) -> dict[str, Any]:
    if world.name == "openai":
        return {**shown, "request_counts": counts or None}
    if world.name == "mistral":
        return {**shown, "total_requests": counts.get("total"), "succeeded_requests": counts.get("completed"),
                "failed_requests": counts.get("failed")}  # fmt: skip
    raise AssertionError(world.name)


# --- one of two files is gone ------------------------------------------------------------------------------


@filed
@pytest.mark.parametrize("on_lost", ["land", "resubmit"])
def test_the_error_file_is_gone_and_the_output_is_there(
    world: RemoteWorld, driver: Driver, tmp_path: Path, on_lost: str
) -> None:
    """Six paid rows lie in the output file, which was downloaded; they must land, and not be bought again."""
    job = world.job(tmp_path, on_lost=on_lost)
    (batch,) = driver.submit(job)
    world.fake.finish(batch.id, failed=2)
    error_file = world.fake.batches[batch.id].error_file_id
    world.server.fail(
        "GET", f".*/{error_file}/content", Respond(404, {"error": {"message": "gone"}}), times=99999
    )
    before = set(world.fake.batches)
    world.end_with(lambda fake, one: None if one in before else fake.finish(one))
    report = driver.run(job, timeout=10)
    assert report.counts[Outcome.SUCCEEDED] >= 6
    bought = [len(one.ids) for one in world.fake.batches.values() if one.id not in before]
    assert sum(bought) <= 2, "only rows without an answer may be bought again"


# --- what the provider says meanwhile ----------------------------------------------------------------------


def spoil_first_download(world: RemoteWorld, later: Any, cuts: int = 1) -> None:
    """The first downloads are cut at half; every look after the first of them is answered by `later`."""
    fake, done = world.fake, [0]

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if reply.status != 200:
            return reply
        if is_content(request) and done[0] < cuts:
            done[0] += 1
            lines = reply.body.splitlines(keepends=True)
            return replace(reply, body=b"".join(lines[:4]))
        if is_look(request) and done[0]:
            return replace(reply, body=json.dumps(later(json.loads(reply.body))).encode())
        return reply

    world.server.app = serve


@filed
@pytest.mark.parametrize("max_rounds", [1, 2])
def test_a_look_while_settling_is_answered_by_a_replica_that_lags(
    world: RemoteWorld, driver: Driver, tmp_path: Path, max_rounds: int
) -> None:
    """The batch was seen completed, its file is short, and the next look says in_progress with no counts."""
    world.let_batches_end()
    job = world.job(tmp_path, max_rounds=max_rounds)
    running = "RUNNING" if world.name == "mistral" else "in_progress"

    def stale(shown: dict[str, Any]) -> dict[str, Any]:
        shown = set_counts(world, shown, total=8, completed=0, failed=0)
        return {**shown, "status": running, "output_file_id": None, "error_file_id": None}

    looks = [0]

    def later(shown: dict[str, Any]) -> dict[str, Any]:
        looks[0] += 1
        return stale(shown) if looks[0] == 1 else shown

    spoil_first_download(world, later)
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert len(world.fake.batches) == 1
    assert [str(one.status) for one in report.batches] == ["completed"]


@filed
def test_counts_that_shrink_while_settling(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """First 8 are counted and 4 are there; then 4 are counted, and 4 rows land as missing and go again."""
    world.let_batches_end()
    job = world.job(tmp_path, max_rounds=2)
    spoil_first_download(
        world, lambda shown: set_counts(world, shown, total=8, completed=4, failed=0), cuts=2
    )
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert len(world.fake.batches) == 1


@filed
def test_counts_that_lag_behind_a_completed_batch(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Completed of 8, counts 4, the file holds 4 and a moment later 8: for as many as were sent it waits."""
    fake, downloads_seen = world.fake, [0]
    world.let_batches_end()
    job = world.job(tmp_path, max_rounds=2)

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if reply.status != 200:
            return reply
        if is_look(request):
            shown = json.loads(reply.body)
            if str(shown["status"]).lower() in ("completed", "success") and downloads_seen[0] < 2:
                return replace(
                    reply, body=json.dumps(set_counts(world, shown, total=8, completed=4, failed=0)).encode()
                )
        if is_content(request):
            downloads_seen[0] += 1
            if downloads_seen[0] < 3:
                return replace(reply, body=b"".join(reply.body.splitlines(keepends=True)[:4]))
        return reply

    world.server.app = serve
    report = driver.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert len(world.fake.batches) == 1


# --- one broken line ---------------------------------------------------------------------------------------

BROKEN = {
    "garbage": b'{"id": "x", "cust\n',
    "no id": b'{"response": {"status_code": 200, "body": {}}, "error": null}\n',
    "a list": b"[1, 2]\n",
    "an id in bad bytes": b'{"custom_id": "row-\xff3", "response": null}\n',
}


@every_format
@pytest.mark.parametrize("verb", ["run", "results", "download"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_one_line_that_is_broken_beyond_its_id(
    world: RemoteWorld, driver: Driver, tmp_path: Path, broken: bytes, verb: str
) -> None:
    """DESIGN 3: one bad line costs its own row only; asked for again it stays as it is."""
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if is_content(request) and reply.status == 200:
            lines = reply.body.splitlines(keepends=True)
            lines[3] = broken
            return replace(reply, body=b"".join(lines))
        return reply

    world.server.app = serve
    world.let_batches_end()
    job = world.job(tmp_path)
    if verb == "run":
        found = landed(job, driver.run(job, timeout=10), IDS)
        assert found.report.counts[Outcome.SUCCEEDED] == 7
        assert found.stray
        return
    (batch,) = driver.submit(job)
    driver.wait(batch.id, timeout=10)
    if verb == "results":
        rows = list(driver.results(batch.id))
        assert sum(row.outcome is Outcome.SUCCEEDED for row in rows) == 7
    else:
        assert driver.download(batch.id, tmp_path / "files")


# --- stop --------------------------------------------------------------------------------------------------


@filed
@pytest.mark.parametrize("on_lost", ["fail", "land"])
def test_a_stop_cancels_the_others_before_it_waits_for_a_batch_that_is_gone(
    world: RemoteWorld, driver: Driver, tmp_path: Path, on_lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What still runs costs money for a quarter of an hour a gone batch."""
    job = world.job(tmp_path, count=3, shard_requests=1, on_lost=on_lost)
    first, second, third = driver.submit(job)
    for batch in (second, third):
        world.fake.start(batch.id)
    del world.fake.batches[first.id]
    monkeypatch.setattr(lost_module, "GONE_AFTER", HOUR)
    thread = threading.Thread(target=lambda: _quiet(driver, job), daemon=True)
    thread.start()
    try:
        world.server.wait_for("POST", ".*/cancel", count=2)
    finally:
        monkeypatch.setattr(lost_module, "GONE_AFTER", 0.0)
        thread.join()


def _quiet(driver: Driver, job: Any) -> None:
    with suppress(AnyBatchError):
        driver.stop(job)


# --- the wrong account -------------------------------------------------------------------------------------


def forget(world: RemoteWorld, batch: Any) -> None:
    """As in an account that is not that of the batch."""
    del world.fake.batches[batch.id]
    getattr(world.fake, "files", {}).pop(batch.input_file_id, None)


@every_format
@pytest.mark.parametrize("on_lost", ["land", "resubmit"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_wrong_account_has_batches_of_its_own(
    world: RemoteWorld, driver: Driver, tmp_path: Path, on_lost: str, shards: int
) -> None:
    """A key of another project, which has batches: none of ours answers, and its listing proves nothing."""
    other = tmp_path / "other"
    other.mkdir()
    (theirs,) = driver.submit(world.job(other))
    kept = dict(world.fake.batches)
    world.finish(theirs.id)
    job = world.job(tmp_path, shard_requests=8 // shards, on_lost=on_lost)
    ours = driver.submit(job)
    for batch in ours:
        forget(world, batch)
    world.let_batches_end()
    made = set(world.fake.batches)
    assert made == set(kept)
    with pytest.raises(NotFoundError):
        driver.run(job, timeout=10)
    assert set(world.fake.batches) == made, "bought again in another account"
    assert job.report() is None


# --- time --------------------------------------------------------------------------------------------------


@openai
def test_many_gone_batches_are_not_waited_for_one_after_another(
    world: RemoteWorld, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six gone shards of seven: a quarter of an hour, not one and a half hours."""
    monkeypatch.setattr(lost_module, "GONE_AFTER", 0.3)
    job = world.job(tmp_path, count=7, shard_requests=1, on_lost="land")
    batches = driver.submit(job)
    for batch in batches:
        world.finish(batch.id)
    for batch in batches[:6]:
        del world.fake.batches[batch.id]
    world.calls.clear()
    driver.run(job, timeout=30)
    gone = {batch.id for batch in batches[:6]}
    looks = [one for call in world.calls if (one := call.path.rpartition("/")[2]) in gone]
    waits = [length for _, series in groupby(looks) if (length := len(list(series))) > 2]
    assert sum(waits) < 3 * max(waits), "while one is waited for, the time of the others passes as well"


@openai
def test_the_deadline_holds_while_a_batch_is_gone(
    world: RemoteWorld, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_module, "GONE_AFTER", 20.0)
    job = world.job(tmp_path, count=2, shard_requests=1, on_lost="land")
    first, _ = driver.submit(job)
    del world.fake.batches[first.id]
    began = time.monotonic()
    with pytest.raises(AnyBatchError):
        driver.run(job, timeout=0.3)
    assert time.monotonic() - began < 10, "half as long as a batch is waited for that is gone"


# --- a file that is gone, and no counts --------------------------------------------------------------------


@openai
@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_gone_file_of_a_batch_without_counts(
    world: RemoteWorld, driver: Driver, tmp_path: Path, end: str
) -> None:
    """An output file was named: rows were paid for, and only on_lost='resubmit' may buy them again."""
    job = world.job(tmp_path, max_rounds=2)
    (batch,) = driver.submit(job)
    (world.fake.cancel_now if end == "cancelled" else world.fake.expire)(batch.id, done=5)
    output = world.fake.batches[batch.id].output_file_id
    world.server.fail(
        "GET", f".*/{output}/content", Respond(404, {"error": {"message": "gone"}}), times=99999
    )
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if is_look(request) and reply.status == 200:
            return replace(
                reply, body=json.dumps({**json.loads(reply.body), "request_counts": None}).encode()
            )
        return reply

    world.server.app = serve
    world.let_batches_end()
    made = len(fake.batches)
    with suppress(AnyBatchError):
        driver.run(job, timeout=10)
    assert len(fake.batches) == made, "bought again though on_lost='fail'"


# --- listings that hold fewer entries a page than were asked for -------------------------------------------


def crowd_after_create(world: RemoteWorld, page: int, spoil: Any) -> None:
    """Thirty others create a batch right after ours; pages hold `page` entries, whatever is asked for."""
    fake, made = world.fake, []
    from tests.fakes.provider import State

    def serve(request: Request) -> Reply:
        listing = request.method == "GET" and request.path.endswith(("/batches", "/jobs"))
        if listing:
            size = "page_size" if world.name == "mistral" else "limit"
            request = replace(request, query={**request.query, size: [str(page)]})
        reply = fake(request)
        if listing and reply.status == 200:
            return replace(reply, body=json.dumps(spoil(json.loads(reply.body))).encode())
        if request.method == "POST" and request.path.endswith(("/batches", "/jobs")) and not made:
            ours = fake.last
            for number in range(30):
                twin = replace(ours, id=f"{ours.id[:-4]}{number:04}", state=State.CANCELLED,
                               reached={**ours.reached, State.CANCELLED: ours.created_at},
                               input_file_id="file-other", metadata={"anybatch_job": "other"})  # fmt: skip
                fake.batches[twin.id] = twin
                made.append(twin.id)
        return reply

    world.server.app = serve


@filed
def test_a_listing_that_caps_its_pages(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """20 a page though 100 were asked for, no has_more (Mistral: the right total): ours is on the second."""
    crowd_after_create(
        world, 20, lambda answer: {name: value for name, value in answer.items() if name != "has_more"}
    )
    world.server.fail("POST", ".*/(batches|jobs)", ResetAfter())
    job = world.job(tmp_path)
    with suppress(AnyBatchError):
        driver.submit(job)
    assert len(world.fake.batches) == 31, "a second batch was created"


# --- downloads ---------------------------------------------------------------------------------------------


@every_format
def test_a_server_that_always_answers_a_range_from_the_wrong_place(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """One break, and every Range is answered from byte 0 as 206: the whole can still be had without Range."""
    world.let_batches_end()
    job = world.job(tmp_path)
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if is_content(request) and "range" in request.headers:
            start = {"content-range": f"bytes 0-{len(reply.body) - 1}/{len(reply.body)}"}
            return replace(reply, status=206, headers={**reply.headers, **start})
        return reply

    world.server.app = serve
    world.server.fail("GET", ".*/(content|results)", CutBody(100))
    assert landed(job, driver.run(job, timeout=10), IDS).report.ok


@every_format
def test_a_file_that_changed_and_a_server_that_ignores_if_range(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """The 206 has another ETag than the first answer: its bytes do not belong to the first's."""
    world.let_batches_end()
    job = world.job(tmp_path)
    fake, calls = world.fake, [0]

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if not is_content(request) or reply.status not in (200, 206):
            return reply
        calls[0] += 1
        lines = fake(
            replace(request, headers={k: v for k, v in request.headers.items() if k != "range"})
        ).body.splitlines(keepends=True)
        if calls[0] == 1:  # another order of the rows, under another tag; cut by the fault below
            return Reply(200, b"".join(reversed(lines)), {"etag": '"a"'})
        body = b"".join(lines)
        if (asked := request.headers.get("range")) is not None:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            shown = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return Reply(206, body[start:], {"etag": '"b"', "content-range": shown})
        return Reply(200, body, {"etag": '"b"'})

    world.server.app = serve
    world.server.fail("GET", ".*/(content|results)", CutBody(900))
    found = landed(job, driver.run(job, timeout=10), IDS)
    assert found.report.ok
    assert found.report.unexpected == 0
    assert not found.stray


@filed
def test_a_file_that_is_gone_with_410(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """410 says more clearly than 404 that it is gone."""
    job = world.job(tmp_path, count=4, shard_requests=2, on_lost="land")
    first, second = driver.submit(job)
    for batch in (first, second):
        world.finish(batch.id)
    output = world.fake.batches[first.id].output_file_id
    world.server.fail(
        "GET", f".*/{output}/content", Respond(410, {"error": {"message": "gone"}}), times=99999
    )
    report = driver.run(job, timeout=10)
    assert report.counts[Outcome.SUCCEEDED] == 2
    assert report.counts[Outcome.MISSING] == 2


# --- results() of batches that are not ours ----------------------------------------------------------------


@openai
@pytest.mark.parametrize("verb", ["results", "download"])
def test_a_foreign_batch_with_one_id_twice(
    world: RemoteWorld, driver: Driver, tmp_path: Path, verb: str
) -> None:
    """Some servers take an id twice: two requests, two lines, two counted. All is there."""
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if is_content(request) and reply.status == 200:
            return replace(reply, body=reply.body.replace(b'"row-3"', b'"row-4"'))
        return reply

    world.let_batches_end()
    (batch,) = driver.submit(world.job(tmp_path))
    driver.wait(batch.id, timeout=10)
    world.server.app = serve
    if verb == "results":
        assert len(list(driver.results(batch.id))) == 8
    else:
        assert driver.download(batch.id, tmp_path / "files")


# --- what was taken for lost is back -----------------------------------------------------------------------


@every_format
def test_a_batch_that_was_taken_for_lost_is_back_before_the_job_has_landed(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Nothing has landed without it yet, and the next attempt says on_lost='fail': its paid rows land."""
    job = world.job(tmp_path, count=6, shard_requests=2, on_lost="land")
    batches = driver.submit(job)
    kept = world.fake.batches.pop(batches[0].id)
    driver.submit(job)  # notes that the first is lost; the others still run
    world.fake.batches[kept.id] = kept
    for batch in batches:
        world.finish(batch.id)
    report = driver.run(replace(job, on_lost="fail"), timeout=10)
    assert landed(job, report, row_ids(6)).report.ok


@every_format
def test_a_lost_batch_and_on_lost_fail_later(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """An attempt with "land" died before landing; one with "fail" must not land rows as missing."""
    job = world.job(tmp_path, count=6, shard_requests=2, on_lost="land")
    batches = driver.submit(job)
    del world.fake.batches[batches[0].id]
    driver.submit(job)
    for batch in batches[1:]:
        world.finish(batch.id)
    with pytest.raises(AnyBatchError):
        driver.run(replace(job, on_lost="fail"), timeout=10)
    assert job.report() is None


@every_format
@pytest.mark.parametrize("on_lost", ["land", "resubmit"])
@pytest.mark.parametrize("seen_by", ["an attempt", "a poller"])
def test_a_second_short_404_is_no_loss(
    world: RemoteWorld, driver: Driver, tmp_path: Path, seen_by: str, on_lost: str
) -> None:
    """A4b: the batch was unknown for a moment once, was back, and is unknown for a moment an hour later."""
    job = world.job(tmp_path, count=6, shard_requests=2, on_lost=on_lost)
    batches = driver.submit(job)
    fake = world.fake
    kept = fake.batches.pop(batches[0].id)
    driver.submit(job)  # records since when it is gone
    fake.batches[kept.id] = kept
    if seen_by == "an attempt":
        driver.submit(job)
        assert not noted_as_gone(job)
    else:
        path = job.folder.path / "job.json"
        path.write_text(re.sub(r'"gone_at": \d+', '"gone_at": 1', path.read_text()))
        assert noted_as_gone(job)
    for batch in batches:
        world.finish(batch.id)
    looks = [0]

    def serve(request: Request) -> Reply:
        if is_look(request) and request.path.endswith(kept.id):
            looks[0] += 1
            if looks[0] <= 2:
                return Reply.json({"error": {"message": "No batch found"}}, 404)
        return fake(request)

    world.server.app = serve
    report = driver.run(job, timeout=10)
    assert landed(job, report, row_ids(6)).report.ok
    assert len(fake.batches) == 3
    assert looks[0] > 2


def noted_as_gone(job: Any) -> bool:
    ledger = job.ledger()
    return any(record.gone_at is not None for record in ledger.shards)


# --- replicas of which one lags ----------------------------------------------------------------------------


@openai
def test_replicas_that_take_turns_are_not_asked_without_pause(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """A batch that one of two replicas does not know yet: the wait ends with its 404, `resume` finds it."""
    job = world.job(tmp_path, count=4, shard_requests=2, on_lost="land")
    first, second = driver.submit(job)
    world.finish(second.id)
    fake, looks = world.fake, [0]
    began = time.monotonic()

    def serve(request: Request) -> Reply:
        if is_look(request) and request.path.endswith(first.id) and time.monotonic() - began < 1.0:
            looks[0] += 1
            if looks[0] % 2 == 0:
                return Reply.json({"error": {"message": "No batch found"}}, 404)
        return fake(request)

    world.server.app = serve
    driver.client.provider.poll_seconds = (0.2, 0.2)
    try:
        world.let_batches_end()
        world.fake.auto = replace(world.fake.auto, looks=None, seconds=1.2)
        driver.run(job, timeout=10)
    finally:
        driver.client.provider.poll_seconds = (0.0, 0.0)
    assert looks[0] < 30


# --- what held ---------------------------------------------------------------------------------------------


@every_format
def test_two_attempts_at_once_buy_the_rows_of_a_gone_batch_once(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Both see the 404, both open the next round: the ledger decides, and one batch stays."""
    job = world.job(tmp_path, count=6, shard_requests=2, on_lost="resubmit")
    batches = driver.submit(job)
    for batch in batches:
        world.finish(batch.id)
    del world.fake.batches[batches[1].id]
    before = set(world.fake.batches)

    def attempt(_: int) -> Any:
        with world.open(driver.mode) as other:
            try:
                return other.submit(replace(job))
            except AnyBatchError as error:
                return error

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(attempt, range(3)))
    made = [one for one in world.fake.batches.values() if one.id not in before]
    assert len([one for one in made if one.is_live]) == 1
    world.finish(next(one for one in made if one.is_live).id)
    report = driver.run(job, timeout=20)
    assert report.ok
    assert report.counts[Outcome.SUCCEEDED] == 6


@filed
def test_rows_that_stay_lost_are_bought_at_most_twice_more_in_one_attempt(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path, count=4, shard_requests=2, on_lost="resubmit")
    fake = world.fake

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if is_content(request) and reply.status == 200 and b"row-0" in reply.body:
            return Reply(404, b'{"error": {"message": "gone"}}')
        return reply

    world.server.app = serve
    world.let_batches_end()
    report = driver.run(job, timeout=20)
    assert len(fake.batches) == 4
    assert report.counts[Outcome.SUCCEEDED] == 2
    assert report.counts[Outcome.MISSING] == 2


@filed
def test_shard_requests_changed_input_and_restart(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    job = world.job(tmp_path, count=6, shard_requests=4)
    assert len(driver.submit(job)) == 2
    assert len(driver.submit(replace(job, shard_requests=1))) == 2, "the first submission's stays in force"
    assert len(driver.submit(replace(job, shard_requests=3, restart="again"))) == 2
    ledger = job.ledger()
    assert ledger is not None
    assert [one.rows for one in ledger.current] == [3, 3]
    world.write(tmp_path / "in.jsonl", row_ids(5))
    assert [one.rows for one in (driver.submit(replace(job, shard_requests=2)), job.ledger())[1].current] == [
        2,
        2,
        1,
    ]
    report = driver.run(replace(job, shard_requests=2), timeout=10)
    assert landed(job, report, row_ids(5)).report.ok


@filed
@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"error": "busy"}'])
def test_a_create_that_is_answered_with_something_else(
    world: RemoteWorld, driver: Driver, tmp_path: Path, answer: bytes
) -> None:
    """Status 200 and no batch: it is looked for, with one try a request as well."""
    fake, done = world.fake, [0]

    def serve(request: Request) -> Reply:
        reply = fake(request)
        if request.method == "POST" and request.path.endswith(("/batches", "/jobs")) and not done[0]:
            done[0] = 1
            return replace(reply, body=answer)
        return reply

    from anybatch import RetryPolicy

    world.server.app = serve
    world.let_batches_end()
    job = world.job(tmp_path)
    with world.open(driver.mode, retry=RetryPolicy(attempts=1)) as other:
        report = other.run(job, timeout=10)
    assert landed(job, report, IDS).report.ok
    assert len(fake.batches) == 1
