"""The connection breaks at each request of a job, in each way, alone and in pairs, shortly and for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path

import pytest

from anybatch import Report, RetryPolicy
from anybatch.errors import AnyBatchError, CreateOutcomeUnknownError, TransportError
from tests.exactly_once.stage import FINDABLE, QUICK, Stage
from tests.fakes.faults import (
    CutBody,
    CutRequest,
    CutResponse,
    Fault,
    ResetAfter,
    ResetBefore,
    Respond,
    Stall,
)

STEPS = ("upload", "create", "retrieve", "download", "download errors")
SHORT = 0.2  # seconds that a client waits for an answer where one stalls …
AT_LEAST = 10  # … or so many times what one takes here, if that is longer
STALLED = "stalled"
BRIEF: dict[str, Fault] = {
    "reset before": ResetBefore(),
    "reset after": ResetAfter(),
    "cut in the body": CutBody(20),
    STALLED: Stall(SHORT + 0.1),
    "500": Respond(500, {"error": {"message": "oops"}}),
    "502": Respond(502, "<html>bad gateway</html>"),
    "429": Respond(429, {"error": {"message": "slow down"}}, {"retry-after": "0"}),
    "not JSON": Respond(200, "<html>maintenance</html>"),
}
CUTS: dict[str, Fault] = {
    "request cut in the head": CutRequest(30),
    "request cut in the body": CutRequest(400),
    "answer cut in the head": CutResponse(10),
}
GIVES_UP = RetryPolicy(attempts=2, first_delay=0.001)


def request_of(stage: Stage, step: str) -> tuple[str, str, int]:
    """Method, path and how many to skip, as `FakeServer.fail` takes them."""
    return {
        "upload": ("POST", "/v1/files", 0),
        "create": ("POST", stage.jobs, 0),
        "find": ("GET", stage.jobs, 0),
        "retrieve": ("GET", f"{stage.jobs}/[^/]+", 0),
        "download": ("GET", "/v1/files/[^/]+/content", 0),
        "download errors": ("GET", "/v1/files/[^/]+/content", 1),
    }[step]


def fail(stage: Stage, step: str, fault: Fault, times: int = 1) -> None:
    method, path, skip = request_of(stage, step)
    stage.server.fail(method, path, fault, times=times, skip=skip)


def lengthened(stage: Stage, fault: Fault) -> tuple[Fault, float]:
    """A fault, and how long a client is to wait for answers: less than for one that stalls, but long enough
    for the others, on a machine that is busy, too."""
    if not isinstance(fault, Stall):
        return fault, 10.0
    began = time.monotonic()
    with stage.client() as client:
        client.check()
    timeout = max(SHORT, AT_LEAST * (time.monotonic() - began))
    return Stall(timeout + 0.1), timeout


@pytest.fixture(params=FINDABLE)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    with Stage(request.param, tmp_path, failed=1) as stage:
        yield stage


def attempt(
    stage: Stage, mode: str, retry: RetryPolicy = QUICK, *, deadline: float = 30, timeout: float = 10
) -> Report:
    """One attempt at the stage's job in so many seconds, by a client that waits so long for an answer."""
    if mode == "sync":
        with stage.client(retry=retry, timeout=timeout) as client:
            return client.run(stage.job(), timeout=deadline)

    async def run() -> Report:
        async with stage.aclient(retry=retry, timeout=timeout) as client:
            return await client.run(stage.job(), timeout=deadline)

    return asyncio.run(run())


# An answer that makes no sense is not asked for again within an attempt, except a create's.
ALONE = [
    pytest.param(
        *(name, mode, step, fault),
        # Where no create is lost there is nothing that differs between the formats.
        marks=[pytest.mark.deployment] if name == "mistral" and step != "create" else [],
    )
    for name, mode in (("openai", "sync"), ("openai", "async"), ("mistral", "sync"))
    for step, fault in product(STEPS, BRIEF)
    if fault != "not JSON" or step == "create"
]


@pytest.mark.parametrize(("name", "mode", "step", "fault"), ALONE)
def test_one_break_is_ridden_out(name: str, mode: str, step: str, fault: str, tmp_path: Path) -> None:
    with Stage(name, tmp_path, failed=1) as stage:
        broken, timeout = lengthened(stage, BRIEF[fault])
        fail(stage, step, broken)
        report = attempt(stage, mode, timeout=timeout)
        assert stage.server.unused_faults == 0
        stage.check(report)


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", FINDABLE)
def test_one_cut_on_the_wire_is_ridden_out(name: str, step: str, fault: str, tmp_path: Path) -> None:
    with Stage(name, tmp_path, failed=1, proxy=True) as stage:
        method, path, skip = request_of(stage, step)
        stage.proxy.fail(f"{method} {path}", CUTS[fault], skip=skip)
        report = attempt(stage, "sync")
        assert stage.proxy.unused_faults == 0
        stage.check(report)


RESETS = ("reset before", "reset after")
PAIRS = [
    pytest.param(
        name,
        {first: one, second: two},
        id=f"{name}-{first} {one}, {second} {two}",
        # Where no create is lost there is nothing that differs between the formats.
        marks=[pytest.mark.deployment] if name == "mistral" and "create" not in (first, second) else [],
    )
    for name in FINDABLE
    for first, second in combinations([*STEPS, "find"], 2)
    for one, two in product(RESETS, RESETS)
    if "find" not in (first, second) or "create" in (first, second)  # else nothing is looked for
]


@pytest.mark.parametrize(("name", "breaks"), PAIRS)
def test_two_breaks_are_ridden_out(name: str, breaks: Mapping[str, str], tmp_path: Path) -> None:
    with Stage(name, tmp_path, failed=1) as stage:
        for step, fault in breaks.items():
            fail(stage, step, BRIEF[fault])
        report = attempt(stage, "sync")
        assert stage.server.unused_faults == 0
        stage.check(report)


LONG = [
    pytest.param(
        name,
        step,
        fault,
        marks=[pytest.mark.deployment] if name == "mistral" and step not in ("create", "find") else [],
    )
    for name, step, fault in product(FINDABLE, [*STEPS, "find"], BRIEF)
    if fault != "cut in the body" and (fault != "not JSON" or not step.startswith("download"))
]


@pytest.mark.parametrize(("name", "step", "fault"), LONG)
def test_an_outage_longer_than_the_retries_is_made_good_by_the_next_attempt(
    name: str, step: str, fault: str, tmp_path: Path
) -> None:
    """Of one request only, the others work; for `find` the create is lost first, so that it is asked for.

    A wait goes on through an outage, until its deadline.
    """
    with Stage(name, tmp_path, failed=1) as stage:
        broken, timeout = lengthened(stage, BRIEF[fault])
        if step == "find":
            fail(stage, "create", ResetAfter())
        fail(stage, step, broken, times=1000)
        if step == "create" and fault in ("reset after", STALLED):  # the batch exists, and is found
            attempt(stage, "sync", GIVES_UP, timeout=timeout)
        else:
            deadline = 0.5 if step == "retrieve" else 30
            with pytest.raises(AnyBatchError):
                attempt(stage, "sync", GIVES_UP, deadline=deadline, timeout=timeout)
        stage.server.clear_faults()
        stage.check(attempt(stage, "sync"))


def test_a_create_that_is_never_answered_is_tried_twice_and_then_left(stage: Stage) -> None:
    fail(stage, "create", ResetBefore(), times=1000)
    with pytest.raises(CreateOutcomeUnknownError, match="two creates got no answer"):
        attempt(stage, "sync")
    assert stage.server.count("POST", stage.jobs) == 2
    stage.server.clear_faults()
    stage.check(attempt(stage, "sync"))


def test_nothing_is_created_while_nobody_can_be_asked(stage: Stage) -> None:
    """A create is lost and then the listing is down, for two attempts: both stop, and the third finds it."""
    fail(stage, "create", ResetAfter())
    fail(stage, "find", Respond(503), times=1000)
    for _ in range(2):
        with pytest.raises(AnyBatchError):
            attempt(stage, "sync", GIVES_UP)
    assert stage.server.count("POST", stage.jobs) == 1
    stage.server.clear_faults()
    stage.check(attempt(stage, "sync"))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", [*FINDABLE, "anthropic"])
def test_refused_connections_leave_nothing_open(name: str, mode: str, tmp_path: Path) -> None:
    with Stage(name, tmp_path, proxy=True) as stage:
        with stage.proxy.refusing(), pytest.raises(TransportError, match="no answer"):
            attempt(stage, mode, GIVES_UP)
        stage.check(attempt(stage, mode))


# --- a single batch, without a job and so without a ledger ---------------------------------------------


@pytest.mark.parametrize("fault", ["reset before", "reset after", STALLED, "500", "not JSON"])
def test_a_lost_create_of_a_single_batch(stage: Stage, fault: str) -> None:
    broken, timeout = lengthened(stage, BRIEF[fault])
    fail(stage, "create", broken)
    with stage.client(timeout=timeout) as client:
        batch = client.create(stage.input, "/v1/chat/completions")
    assert [*stage.batches()] == stage.live() == [batch.id]


def test_a_create_that_was_slow_and_not_lost(tmp_path: Path) -> None:
    """It comes through while the second one is answered: the older batch is kept, the other cancelled."""
    with Stage("openai", tmp_path, ends=False) as stage, ThreadPoolExecutor(1) as threads:
        first = stage.server.hold("POST", stage.jobs, handled=False)
        second = stage.server.hold("POST", stage.jobs, handled=False)
        with stage.client(timeout=1.0) as client:
            creating = threads.submit(client.create, stage.input, "/v1/chat/completions")
            second.wait()
            first.release()
            stage.server.wait_for("POST", stage.jobs)
            second.release()
            batch = creating.result(20)
        assert len(stage.batches()) == 2
        assert stage.live() == [batch.id] == [next(iter(stage.batches()))]
