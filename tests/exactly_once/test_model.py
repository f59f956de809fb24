"""Proof by exhaustion: two attempts in every order, each dying at any step, then a third that is left alone.

Here an attempt is the product's own flow, taken effect by effect, on a clock that moves only when somebody
sleeps; so a process that is stopped for any length of time is among the orders. After every state that two
attempts can reach, a third attempt must come to exactly one live batch, the one in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anybatch.jobs.ledger import Step
from anybatch.providers import finding
from tests.exactly_once.models import Model, ModelOfRounds, ModelOfStop, explored, fair, only_a


def test_two_attempts_in_any_order(model: Callable[..., Model]) -> None:
    """Stopped for any time and killed anywhere: two batches at the most, and one in the end."""
    world = model(Step.PLANNED)
    world.most = 2
    assert explored(world, alike=True).states > 200


def test_two_attempts_that_are_not_stopped_for_long(model: Callable[..., Model]) -> None:
    """Killed anywhere, in every order, but nobody is stopped for a whole lease: never a second batch."""
    world = model(Step.PLANNED)
    world.most = 1
    assert explored(world, "kill", budget=1, allowed=fair, alike=True).states > 100


def test_a_create_that_is_lost(model: Callable[..., Model]) -> None:
    world = model(Step.UPLOADED)
    world.most = 2
    assert explored(world, "lost", budget=1, allowed=only_a).states > 1000


@pytest.mark.deployment
@pytest.mark.parametrize(
    ("faults", "budget", "most"),
    [(("lost", "never"), 1, 2), (("down", "lost"), 2, 2), (("kill", "lost"), 2, 2)],
)
def test_more_faults(model: Callable[..., Model], faults: tuple[str, ...], budget: int, most: int) -> None:
    world = model(Step.UPLOADED)
    world.most = most
    explored(world, *faults, budget=budget, allowed=only_a)


@pytest.mark.deployment
def test_a_create_that_arrives_late(model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time, or never; on top of the two batches that attempts can make which were stopped."""
    # To look takes no time here: a claim is either valid or not, which the waiting for it decides alone.
    monkeypatch.setattr(finding, "ASK_AFTER", (0.0,))
    world = model(Step.UPLOADED)
    world.most = 3
    explored(world, "late", budget=1, allowed=only_a)


@pytest.mark.deployment
def test_two_submissions_from_nothing(model: Callable[..., Model]) -> None:
    """The opening of the ledger is among the steps."""
    world = model(None)
    world.most = 2
    explored(world, alike=True)


@pytest.mark.deployment
@pytest.mark.parametrize("last", [0, 1])
def test_two_inputs(model: Callable[..., Model], last: int) -> None:
    """B has other input than A, and the third either: one live batch, of its own."""
    world = model(None)
    world.most, world.same = 4, False
    explored(
        world,
        open_world=lambda: world.open(second=1),
        check=lambda found: world.check(found, last),
    )


def test_a_store_where_writes_can_overwrite_each_other(model: Callable[..., Model]) -> None:
    """Comparing and writing are two steps there; as long as no write takes long, never a second batch."""
    world = model(Step.UPLOADED, store=True)
    world.most = 1
    explored(world, "kill", budget=1, allowed=fair, alike=True)


@pytest.mark.deployment
def test_two_attempts_open_a_round(model: Callable[..., Model]) -> None:
    """Of which one creates its batch, in any order, each dying anywhere."""
    world = model(None, kind=ModelOfRounds)
    world.most = 1 + 2
    found = explored(world, alike=True)
    assert found.states > 200


def test_a_job_that_is_stopped_while_it_is_submitted(model: Callable[..., Model]) -> None:
    """In any order, each dying anywhere: never a second batch, and none that goes on."""
    world = model(Step.PLANNED, kind=ModelOfStop)
    world.most = 1
    assert explored(world).states > 100


@pytest.mark.deployment
@pytest.mark.parametrize("fault", ["lost", "kill"])
def test_a_job_that_is_stopped_while_a_create_is_lost(model: Callable[..., Model], fault: str) -> None:
    world = model(Step.UPLOADED, kind=ModelOfStop)
    world.most = 1
    explored(world, fault, budget=1)


@pytest.mark.deployment
def test_a_job_that_is_stopped_in_a_store(model: Callable[..., Model]) -> None:
    """As long as no write takes long."""
    world = model(Step.UPLOADED, kind=ModelOfStop, store=True)
    world.most = 1
    explored(world, "kill", budget=1, allowed=fair)
