"""Anthropic: nothing on a batch says where it came from; a create without an answer needs a person."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anybatch.errors import (
    BadRequestError,
    CreateOutcomeUnknownError,
    OrphanError,
    QuotaError,
    RateLimitError,
    TransportError,
)
from anybatch.jobs.ledger import Step
from tests.exactly_once.forge import Forge, fresh
from tests.exactly_once.stage import ROWS, Stage, requests, write
from tests.fakes.faults import CutRequest, Fault, ResetAfter, ResetBefore, Respond, Stall

UNANSWERED: dict[str, tuple[Fault, bool]] = {  # fault, and whether there is a batch all the same
    "reset before": (ResetBefore(), False),
    "reset after": (ResetAfter(), True),
    "time-out": (Stall(0.4), True),
    "500": (Respond(500, {"type": "error", "error": {"type": "api_error", "message": "oops"}}), False),
}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage("anthropic", tmp_path) as stage:
        yield stage


def attempt(stage: Stage, **more: Any) -> Any:
    with stage.client(timeout=0.2) as client:
        return client.run(stage.job(**more), timeout=30)


@pytest.mark.parametrize("fault", UNANSWERED)
def test_an_unanswered_create_stops_and_says_what_to_check(stage: Stage, fault: str) -> None:
    happens, done = UNANSWERED[fault]
    stage.server.fail("POST", stage.jobs, happens)
    for _ in range(2):  # the next attempt may not go on either
        with pytest.raises(OrphanError) as caught:
            attempt(stage)
        said = str(caught.value)
        stage.server.wait_for("POST", stage.jobs)
        assert f"a batch of {ROWS} requests may be running at anthropic" in said
        assert stage.job().identity in said
        assert re.search(r"created since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", said)
        assert "anybatch.list_batches('anthropic')" in said
        assert "on_orphan='resubmit'" in said
    assert stage.server.count("POST", stage.jobs) == 1
    candidates = [f"{batch_id} ({ROWS} requests)" for batch_id in stage.batches()]
    assert len(candidates) == done
    assert all(one in said for one in candidates), said  # by the second attempt at the latest
    assert ("none is listed now" in said) == (not done)


def test_the_message_names_no_batch_of_the_jobs_own(tmp_path: Path) -> None:
    """Two shards; the first is on record, and must not be offered for cancelling."""
    with Stage("anthropic", tmp_path, shards=2) as stage:
        stage.server.fail("POST", stage.jobs, ResetAfter(), skip=1)
        with pytest.raises(OrphanError) as caught:
            attempt(stage)
        first, second = stage.batches()
        assert first not in str(caught.value)
        assert f"{second} ({ROWS // 2} requests)" in str(caught.value)


@pytest.mark.parametrize("fault", UNANSWERED)
def test_resubmit_goes_on_by_itself(stage: Stage, fault: str) -> None:
    """The lost batch, if there is one, is paid for as well: that is what the policy means."""
    happens, done = UNANSWERED[fault]
    stage.server.fail("POST", stage.jobs, happens)
    report = attempt(stage, on_orphan="resubmit")
    assert report.ok
    stage.server.wait_for("POST", stage.jobs, count=2)
    assert stage.server.count("POST", stage.jobs) == 2
    assert len(stage.batches()) == 1 + done


def resubmit(stage: Stage) -> None:
    """What the message tells a person to do: cancel the orphan, then run the job again."""
    (orphan,) = stage.batches()
    stage.fake.cancel_now(orphan)
    job = stage.job(on_orphan="resubmit")
    with stage.client() as client:
        client.submit(job)
    stage.finish()
    stage.check(stage.run(job), job, created=2)


def test_resubmit_after_a_person_has_looked(tmp_path: Path) -> None:
    with Stage("anthropic", tmp_path, ends=False) as stage:
        stage.server.fail("POST", stage.jobs, ResetAfter())
        with pytest.raises(OrphanError):
            attempt(stage)
        resubmit(stage)


def test_resubmit_does_not_hammer_a_provider_that_never_answers(stage: Stage) -> None:
    stage.server.fail("POST", stage.jobs, Respond(500), times=1000)
    with pytest.raises(CreateOutcomeUnknownError, match="two creates got no answer"):
        attempt(stage, on_orphan="resubmit")
    assert stage.server.count("POST", stage.jobs) == 2
    stage.server.clear_faults()
    assert attempt(stage, on_orphan="resubmit").ok


REFUSALS: dict[str, tuple[Respond, type[Exception]]] = {
    "invalid_request_error": (Respond(400), BadRequestError),
    "billing_error": (Respond(402), QuotaError),
    "rate_limit_error": (Respond(429, headers={"retry-after": "0"}), RateLimitError),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_leaves_nothing_open(stage: Stage, kind: str) -> None:
    answer, error = REFUSALS[kind]
    answer = replace(answer, body={"type": "error", "error": {"type": kind, "message": "no"}})
    stage.server.fail("POST", stage.jobs, answer, times=1000)
    with pytest.raises(error):
        attempt(stage)
    stage.server.clear_faults()
    stage.check(stage.run())


def test_a_throttled_create_is_repeated_within_the_attempt(stage: Stage) -> None:
    stage.server.fail("POST", stage.jobs, Respond(429, b"", {"retry-after": "0"}), times=2)
    stage.check(stage.run())


def test_a_refused_connection_leaves_nothing_open(tmp_path: Path) -> None:
    with Stage("anthropic", tmp_path, proxy=True) as stage:
        with stage.proxy.refusing(), pytest.raises(TransportError):
            attempt(stage)
        ledger = stage.job().ledger()
        assert ledger is not None
        assert (ledger.shards[0].step, ledger.shards[0].tries) == (Step.UPLOADED, 0)
        stage.check(stage.run())


def test_a_create_cut_in_its_body_is_taken_for_unanswered(tmp_path: Path) -> None:
    """The client cannot know how much has arrived: it stops rather than pay twice."""
    with Stage("anthropic", tmp_path, proxy=True) as stage:
        stage.proxy.fail(f"POST {stage.jobs}", CutRequest(700))
        with pytest.raises(OrphanError, match="none is listed now"):
            attempt(stage)
        stage.check(stage.run(stage.job(on_orphan="resubmit")))


def test_a_changed_input_does_not_forget_an_orphan(stage: Stage) -> None:
    stage.server.fail("POST", stage.jobs, ResetAfter())
    with pytest.raises(OrphanError):
        attempt(stage)
    other = write(stage.home / "other.jsonl", requests(stage.model, rows=3, say="other"))
    with pytest.raises(OrphanError, match=f"a batch of {ROWS} requests"):
        attempt(stage, input=other)
    assert stage.server.count("POST", stage.jobs) == 1
    assert attempt(stage, input=other, on_orphan="resubmit").rows == 3


@pytest.mark.parametrize("handled", [False, True], ids=["before", "after"])
def test_killed_during_the_create(tmp_path: Path, handled: bool, forge: Forge) -> None:
    with Stage("anthropic", tmp_path, ends=False) as stage:
        hold = stage.server.hold("POST", stage.jobs, handled=handled)
        process = forge.start(stage, stage.job())
        hold.wait()
        forge.kill(process)
        hold.release()
        stage.server.wait_for("POST", stage.jobs)
        with pytest.raises(OrphanError, match="an attempt ended while it was creating the batch") as caught:
            stage.run()
        (batch_id,) = stage.batches()
        assert f"{batch_id} ({ROWS} requests)" in str(caught.value)
        resubmit(stage)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.deployment)])
def test_killed_between_writes_it_is_in_doubt_only_about_the_create(
    tmp_path: Path, stride: int, forge: Forge
) -> None:
    """At all other points the next attempt needs no policy, and there is one batch."""
    doubts: list[str] = []
    with Stage("anthropic", fresh(tmp_path, "undisturbed")) as stage:
        points = forge.points(stage, stage.job())
    for number in range(1, len(points) + 1, stride):
        with Stage("anthropic", fresh(tmp_path, str(number))) as stage:
            assert forge.run(stage, stage.job(), at=number) == "SIGKILL"
            try:
                stage.check(stage.run())
            except OrphanError:
                doubts.append(points[number - 1])
                assert len(stage.batches()) == 1, "killed after the create"
    # Between the create and the note of it the folder is made if it is missing and locked, and the ledger
    # written beside and renamed: four points.
    assert 4 // stride <= len(doubts) <= -(-4 // stride), doubts
