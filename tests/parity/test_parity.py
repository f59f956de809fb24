"""What becomes of a job is the same whoever runs it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.faults import Respond
from tests.fakes.provider import Auto, FakeProvider

from .surfaces import End

if TYPE_CHECKING:
    from .surfaces import Provider, Surface

ALL = {"succeeded": 4}
LATE = 1.2  # seconds; the provider tells times in whole ones
A_LOOK = ("GET", "/v1/batches/.+")


def test_a_job_lands_and_is_paid_once(surface: Surface, provider: Provider) -> None:
    provider.fake.auto = Auto(looks=2)
    for _ in range(2):
        assert surface.attempt() == End("landed", ALL, 1)
    assert provider.statuses == ["completed"]


# --- late ------------------------------------------------------------------------------------------------


def is_half_done(provider: Provider) -> None:
    """The batch of this test has answered two rows when it is looked at first."""
    provider.fake.auto = Auto(looks=1, end=lambda fake, one: fake.set_progress(one, completed=2))


def test_a_late_batch_is_left(surface: Surface, provider: Provider) -> None:
    is_half_done(provider)
    assert surface.attempt(timeout=LATE, on_timeout="leave") == End("again")
    assert provider.statuses == ["in_progress"]
    provider.fake.auto = None
    provider.fake.finish(*provider.ids)
    assert surface.attempt(timeout=LATE, on_timeout="leave") == End("landed", ALL, 1)
    assert provider.statuses == ["completed"]


def test_a_late_batch_is_cancelled_and_the_next_attempt_submits_the_rest(
    surface: Surface, provider: Provider
) -> None:
    is_half_done(provider)
    assert surface.attempt(timeout=LATE, on_timeout="cancel") == End("again")
    assert provider.statuses == ["cancelling"]
    provider.fake.auto = Auto(looks=1)
    assert surface.attempt(timeout=60, on_timeout="cancel") == End("landed", ALL, 2)
    assert provider.statuses == ["cancelled", "completed"]
    assert provider.fake.last.ids == ["row-2", "row-3"]


def test_a_late_batch_lands_in_part(surface: Surface, provider: Provider) -> None:
    is_half_done(provider)
    half = {"succeeded": 2, "cancelled": 2}
    for _ in range(2):  # for good
        assert surface.attempt(timeout=LATE, on_timeout="land_partial") == End("landed", half, 1)
    assert provider.statuses == ["cancelled"]


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_while_it_waits(surface: Surface, provider: Provider, status: int) -> None:
    provider.server.fail(*A_LOOK, Respond(status, {"error": {"message": "no"}}), times=10**6, skip=1)
    assert surface.attempt() == End("final")
    provider.server.clear_faults()
    provider.fake.auto = Auto(looks=1)
    assert surface.attempt() == End("landed", ALL, 1)
    assert provider.statuses == ["completed"]


def test_an_outage_while_it_waits(surface: Surface, provider: Provider) -> None:
    provider.fake.auto = Auto(looks=3)
    provider.server.fail(*A_LOOK, Respond(503), times=2, skip=1)
    assert surface.attempt() == End("landed", ALL, 1)
    assert provider.statuses == ["completed"]


# --- rows without a result -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "landed"),
        ({"on_partial": "keep", "max_failed_ratio": 1.0}, "landed"),
        ({"on_partial": "keep", "max_failed_ratio": 0.25}, "landed"),
        ({"on_partial": "keep", "max_failed_ratio": 0.2}, "lacking"),
        ({"on_partial": "fail", "max_failed_ratio": 1.0}, "lacking"),
        ({"on_partial": "fail", "max_failed_ratio": 0.2}, "lacking"),
    ],
    ids=str,
)
def test_failed_rows(surface: Surface, provider: Provider, options: dict[str, Any], how: str) -> None:
    provider.fake.auto = Auto(looks=1, end=lambda fake, one: fake.finish(one, failed=["row-1"]))
    for _ in range(2):  # what has landed is final
        assert surface.attempt(**options) == End(how, {"succeeded": 3, "failed": 1}, 1)
    assert provider.statuses == ["completed"]


def expire_once(fake: FakeProvider, batch_id: str) -> None:
    if len(fake.batches) == 1:
        fake.expire(batch_id, done=3)
    else:
        fake.finish(batch_id)


@pytest.mark.parametrize(("rounds", "end"), [(1, {"succeeded": 3, "expired": 1}), (2, ALL)])
def test_rounds(surface: Surface, provider: Provider, rounds: int, end: dict[str, int]) -> None:
    provider.fake.auto = Auto(looks=1, end=expire_once)
    assert surface.attempt(max_rounds=rounds) == End("landed", end, rounds)
    assert provider.statuses == ["expired", "completed"][:rounds]
    assert provider.fake.last.ids == (["row-3"] if rounds == 2 else [f"row-{n}" for n in range(4)])


def cancel_once(fake: FakeProvider, batch_id: str) -> None:
    if len(fake.batches) == 1:
        fake.cancel_now(batch_id, done=3)
    else:
        fake.finish(batch_id)


def test_someone_cancels_it_at_the_provider(surface: Surface, provider: Provider) -> None:
    provider.fake.auto = Auto(looks=1, end=cancel_once)
    assert surface.attempt() == End("landed", ALL, 2)
    assert provider.statuses == ["cancelled", "completed"]


# --- changed, lost, refused as a whole -------------------------------------------------------------------


@pytest.mark.parametrize("on_changed", ["cancel_and_resubmit", "fail"])
def test_the_input_has_changed(surface: Surface, provider: Provider, on_changed: str) -> None:
    def end_the_last(fake: FakeProvider, batch_id: str) -> None:
        if len(fake.batches) == 2 and batch_id == fake.last.id:
            fake.finish(batch_id)

    provider.fake.auto = Auto(looks=1, end=end_the_last)
    assert surface.attempt(timeout=LATE) == End("again")  # it is left running
    end = surface.attempt(rows=5, on_changed=on_changed)
    if on_changed == "fail":
        assert end == End("final")
        assert provider.statuses == ["in_progress"]
    else:
        assert end == End("landed", {"succeeded": 5}, 1)
        assert provider.statuses == ["cancelling", "completed"]


def test_the_folder_is_lost_while_it_waits(surface: Surface, provider: Provider) -> None:
    def end(fake: FakeProvider, batch_id: str) -> None:
        shutil.rmtree(surface.job_folder)
        fake.finish(batch_id)

    provider.fake.auto = Auto(looks=2, end=end)
    assert surface.attempt() == End("final")
    assert provider.statuses == ["completed"]


def test_a_batch_that_is_refused_as_a_whole_is_submitted_anew(surface: Surface, provider: Provider) -> None:
    def end(fake: FakeProvider, batch_id: str) -> None:
        fake.fail(batch_id, "token_limit_exceeded", "Too many tokens are in the queue")

    provider.fake.auto = Auto(looks=2, end=end)
    assert surface.attempt() == End("again")
    provider.fake.auto = Auto(looks=1)
    assert surface.attempt() == End("landed", ALL, 1)
    assert provider.statuses == ["failed", "completed"]
