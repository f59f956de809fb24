"""The wait of a blocking client, step by step: what it asks, how long it pauses, and what ends it."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from anybatch.client import AsyncClient, Client
from anybatch.errors import (
    AnyBatchError,
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    DeadlineExceededError,
    NotFoundError,
    QuotaError,
    RateLimitError,
    ServerError,
    TransportError,
)
from anybatch.flow import Sleep
from anybatch.providers import get_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anybatch.models import Batch

EPOCH = 1_800_000_000.0
Answer = str | Exception  # a status, or what the call raises


class Clock:
    now = EPOCH

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock.time)
    return clock


def answer(status: str, request: httpx.Request) -> httpx.Response:
    batch = {"id": "b", "object": "batch", "status": status, "created_at": int(EPOCH)}
    return httpx.Response(200, json=batch, request=request)


def drive(
    clock: Clock,
    answers: Callable[[float], Answer],
    *,
    deadline: float | None = None,
    on_progress: Callable[[Batch], None] | None = None,
) -> tuple[Batch, list[float]]:
    """Wait for a batch whose answers depend on the seconds since the beginning; its pauses beside it."""
    pauses: list[float] = []
    until = None if deadline is None else EPOCH + deadline
    with Client("openai", api_key="k") as client:
        flow = client._wait(client.provider, "b", until, on_progress)
        try:
            effect = next(flow)
            while True:
                if isinstance(effect, Sleep):
                    pauses.append(effect.seconds)
                    clock.now += effect.seconds
                    effect = flow.send(None)
                    continue
                assert isinstance(effect, httpx.Request)
                step = answers(clock.now - EPOCH)
                effect = flow.throw(step) if isinstance(step, Exception) else flow.send(answer(step, effect))
        except StopIteration as stop:
            return stop.value, pauses


PASSING = [
    TransportError("no answer"),
    TransportError("never left", sent=False),
    ServerError("oops", status_code=503),
    ServerError("the provider's answer is no batch", status_code=None),
    RateLimitError("slow", status_code=429),
    RateLimitError("overloaded", status_code=529),
    QuotaError("empty", status_code=429),
    BadRequestError("lock", status_code=409),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: f"{type(error).__name__}: {error}")
def test_an_outage_of_hours_ends_no_wait(clock: Clock, error: Exception) -> None:
    batch, pauses = drive(clock, lambda at: error if at < 10_000 else "completed")
    assert batch.id == "b"
    assert 10_000 <= sum(pauses) < 10_400
    assert len(pauses) < 80


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("no", status_code=401),
        AuthenticationError("not yours", status_code=403),
        NotFoundError("gone", status_code=404),
        BadRequestError("not an id", status_code=400),
        BadRequestError("not an id", status_code=422),
        ConfigurationError("no"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}",
)
@pytest.mark.parametrize("after", [0, 100])
def test_a_refusal_ends_it_at_once(clock: Clock, error: Exception, after: float) -> None:
    with pytest.raises(type(error)) as caught:
        drive(clock, lambda at: error if at >= after else "in_progress")
    assert caught.value is error
    assert clock.now - EPOCH < after + 20


def test_a_bug_ends_it_with_its_own_traceback(clock: Clock) -> None:
    def answers(at: float) -> Answer:
        return TypeError("a parser's") if at > 60 else "in_progress"

    with pytest.raises(TypeError, match="a parser's") as caught:
        drive(clock, answers, deadline=1_000.0)
    assert "_wait" in [frame.name for frame in caught.traceback]
    assert clock.now - EPOCH < 100


def test_a_pause_that_was_asked_for_is_kept(clock: Clock) -> None:
    steps: list[Answer] = [RateLimitError("slow", retry_after=900.0), "in_progress", "completed"]
    _, pauses = drive(clock, lambda at: steps.pop(0))
    assert pauses == [900.0, pytest.approx(90.0)]


@pytest.mark.parametrize(
    ("seen", "error", "told"),
    [
        ("in_progress", ServerError("oops"), "still in_progress at the deadline"),
        ("in_progress", RateLimitError("slow", retry_after=86_400.0), "still in_progress at the deadline"),
        (None, TransportError("no answer"), "not seen yet at the deadline"),
    ],
)
def test_the_deadline_ends_an_outage_too(clock: Clock, seen: str | None, error: Exception, told: str) -> None:
    with pytest.raises(DeadlineExceededError, match=told):
        drive(clock, lambda at: seen if seen and at < 60 else error, deadline=1_000.0)
    assert clock.now - EPOCH == pytest.approx(1_000.0)


def test_an_outage_is_told_at_first_and_when_it_lasts(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def answers(at: float) -> Answer:
        return ServerError("oops", status_code=503) if at < 1_200 else "completed"

    with caplog.at_level(logging.WARNING, "anybatch"):
        drive(clock, answers)
    assert 2 <= len(caplog.records) <= 4
    assert "batch b: polling fails, still waiting: oops [HTTP status 503]" in caplog.text


def test_progress_is_told_once_a_change_whatever_happens_between(clock: Clock) -> None:
    steps: Iterable[Answer] = iter(
        ["validating", ServerError("oops"), "validating", "in_progress", ServerError("oops"), "completed"]
    )
    seen: list[str] = []
    drive(clock, lambda at: next(iter(steps)), on_progress=lambda batch: seen.append(batch.status))
    assert seen == ["validating", "in_progress", "completed"]


def test_what_the_callback_raises_ends_the_wait(clock: Clock) -> None:
    def fail(batch: Batch) -> None:
        raise ServerError("not the provider's")

    with pytest.raises(ServerError, match="not the provider's"):
        drive(clock, lambda at: "in_progress", on_progress=fail)


# --- how long one request may take -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "upload", "create"),
    [
        ("openai", {}, 600.0, 60.0),
        ("mistral", {}, 600.0, 60.0),
        ("anthropic", {}, None, 600.0),
        ("openai", {"timeout": 7.0}, 7.0, 7.0),
        ("anthropic", {"timeout": 7.0}, None, 7.0),
    ],
)
def test_answers_to_a_whole_shard_may_take_ten_minutes(
    tmp_path: Any, name: str, given: dict[str, float], upload: float | None, create: float
) -> None:
    """What a caller gives is kept."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source = tmp_path / "in.jsonl"
    source.write_bytes(httpx.Response(200, json=line).content + b"\n")
    reads: dict[str, float] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        reads[request.url.path.rpartition("/")[2]] = request.extensions["timeout"]["read"]
        assert request.extensions["timeout"]["connect"] <= 15.0
        status = {"status": "validating", "processing_status": "in_progress"}
        return httpx.Response(200, json={"id": "x", **status})

    with Client(name, api_key="k", client_args={"transport": httpx.MockTransport(handle), **given}) as client:
        client.create(source, "/v1/chat/completions")
        client.retrieve("x")
    asked = [reads.get("files"), reads.get("batches", reads.get("jobs"))]
    assert asked == [upload, create]
    assert reads["x"] == given.get("timeout", 60.0)


# --- what a client is made of ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("given", [{"api_key": "k2"}, {"api_base": "http://other"}])
def test_a_provider_object_brings_its_own_account(
    kind: type[Client] | type[AsyncClient], given: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match="can be passed only with a provider's name"):
        kind(get_provider("openai", api_key="k"), **given)  # type: ignore[arg-type]


def test_a_batch_that_runs_has_no_results_and_says_so_at_the_call() -> None:
    transport = httpx.MockTransport(lambda request: answer("in_progress", request))
    client = Client("openai", api_key="k", client_args={"transport": transport})
    with client, pytest.raises(AnyBatchError, match="batch b is in_progress"):
        client.results("b")  # not iterated


def test_pauses_are_never_none_at_all(clock: Clock) -> None:
    _, pauses = drive(clock, lambda at: "in_progress" if at < 40 else "completed", deadline=math.inf)
    assert min(pauses) >= 0.05
