"""Result files spoiled in ways that the storm came upon: no answer is lost, and none is bought again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from anybatch import Client, Job, Outcome, Report
from anybatch.local.transport import LocalTransport
from anybatch.rows.downloads import Counted, Owed, is_loss, lacking
from tests.exactly_once.stage import QUICK, Stage, requests
from tests.exactly_once.weather import CutStream
from tests.fakes.faults import CutBody, Respond
from tests.fakes.server import Reply, Request

ROWS = 8
PAGE = b"<html><body>Please log in to this gateway</body></html>"


class Spoiling(LocalTransport):
    """The embedded provider, whose first result file comes spoiled."""

    def __init__(self, path: Path, spoil: Callable[[bytes], httpx.Response]) -> None:
        super().__init__(path)
        self.spoil, self.spoiled = spoil, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        if not request.url.path.endswith("/content") or self.spoiled:
            return answer
        self.spoiled += 1
        return self.spoil(answer.read())


def run_local(home: Path, model: str, spoil: Callable[[bytes], httpx.Response]) -> Report:
    transport = Spoiling(home / "local.db", spoil)
    with Client("local", client_args={"transport": transport}, retry=QUICK) as client:
        report = client.run(Job(input=requests(model, ROWS), output=home / "out", max_rounds=2), timeout=20)
    assert transport.spoiled == 1
    return report


# --- rows that expired, whose lines are in no count ---------------------------------------------------------


def test_lines_of_expired_rows_make_up_for_no_answer(tmp_path: Path) -> None:
    """Of 8 rows 2 are answered and 6 expire, twice: files of 6 lines do not hold the 2 that are counted."""
    report = run_local(tmp_path, "local:echo?delay=0&expire=0.5&seed=2052", lambda _: httpx.Response(200))
    first, second = report.batches
    assert (first.rows, second.rows) == (ROWS, ROWS - 2), "what was answered is not bought again"
    assert report.counts[Outcome.SUCCEEDED] == 2


def test_a_file_that_breaks_off_before_the_id_of_a_row(tmp_path: Path) -> None:
    """All rows have expired, so that no count speaks of them; half a line is not a stray one."""
    model = "local:echo?delay=0&expire=1"
    report = run_local(tmp_path, model, lambda body: httpx.Response(200, content=body[:30]))
    assert (report.counts[Outcome.EXPIRED], report.unexpected) == (ROWS, 0)
    assert not (tmp_path / "out" / "stray.jsonl").exists()


COUNTS = {
    # rows promised, succeeded, in no count; rows with a line, run, succeeded -> short, and lost
    "all there": (Owed(4, 3, 0), Counted(4, 4, 3, 0), False, False),
    "expired rows in the count": (Owed(4, 2, 0), Counted(4, 2, 2, 0), False, False),
    "expired rows in no count": (Owed(2, 2, 2), Counted(4, 2, 2, 0), False, False),
    "some in the count, one without a line": (Owed(3, 2, 1), Counted(3, 3, 2, 0), False, False),
    "an answer lost beside two that expired": (Owed(2, 2, 2), Counted(3, 1, 1, 0), True, True),
    "both answers lost": (Owed(2, 2, 2), Counted(2, 0, 0, 0), True, True),
    "a failure lost": (Owed(2, 1, 2), Counted(3, 1, 1, 0), True, False),
    "an answer lost, its failure there": (Owed(3, 2, 1), Counted(3, 2, 1, 0), True, True),
    "counted when cancelling, then cancelled": (Owed(3, 3, 1), Counted(4, 2, 2, 0), False, False),
    "nothing is promised": (Owed(0, 0, 4), Counted(2, 0, 0, 0), False, False),
}


@pytest.mark.parametrize(("promised", "found", "short", "lost"), COUNTS.values(), ids=COUNTS)
def test_what_is_lacking(promised: Owed, found: Counted, short: bool, lost: bool) -> None:
    assert (lacking(found, promised) is not None) == short
    assert is_loss(found, promised) == lost


# --- a page in place of a file ------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["sync", "async"])
@pytest.mark.parametrize("after", [5, 10, 20, 40])
def test_a_page_that_is_cut_is_not_joined_to_the_file(tmp_path: Path, after: int, driver: str) -> None:
    """A gateway's page breaks off, and the provider goes on from there: the first line would be spoiled, its
    row failed, and bought again."""
    with Stage("openai", tmp_path) as stage:
        fake, pages = stage.fake, [PAGE]

        def serve(request: Request) -> Reply:
            reply = fake(request)
            if request.path.endswith("/content") and pages:
                return Reply(200, pages.pop(), {"content-type": "text/html"})
            return reply

        stage.server.app = serve
        stage.server.fail("GET", ".*/content", CutBody(after))
        job = stage.job(max_rounds=2)

        async def arun() -> Report:
            async with stage.aclient() as client:
                return await client.run(job, timeout=20)

        report = asyncio.run(arun()) if driver == "async" else stage.run(job)
        assert not pages
        stage.check_rounds(report, [6], job)


@pytest.mark.parametrize("after", [5, 10, 20, 40])
def test_nor_is_one_that_did_not_say_how_long_it_is(tmp_path: Path, after: int) -> None:
    page = httpx.Response(200, headers={"content-type": "text/html"}, stream=CutStream(PAGE[:after]))
    report = run_local(tmp_path, "local:echo?delay=0", lambda _: page)
    assert [batch.rows for batch in report.batches] == [ROWS]
    assert report.ok


# --- a failure with status 200 ------------------------------------------------------------------------------

FAILED = Respond(200, {"error": {"message": "oops"}})
CALLS = {"upload": ("POST", ".*/files", 0), "retrieve": ("GET", ".*/batches/[^/]+", 0)}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_with_status_200_is_asked_again(tmp_path: Path, call: str) -> None:
    with Stage("openai", tmp_path) as stage:
        method, path, skip = CALLS[call]
        stage.server.fail(method, path, FAILED, times=2, skip=skip)
        stage.check(stage.run())
        assert stage.server.unused_faults == 0


def test_a_listing_that_fails_with_status_200_is_asked_again(tmp_path: Path) -> None:
    """And the create, which failed so as well, is not repeated before it was read."""
    with Stage("openai", tmp_path) as stage:
        stage.server.fail("POST", stage.jobs, FAILED)
        stage.server.fail("GET", stage.jobs, FAILED, times=2)
        stage.check(stage.run())
        assert stage.server.unused_faults == 0
