"""What loses rows or pays twice, by exhaustion: two attempts in every order (FAULTS A1, A2, A4b, G1).

As in test_model, on the product's own flows: downloads that are cut, a listing that lags or has no end, a
batch that is gone, and a stop that meets a shard which is being submitted anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from anybatch.jobs.ledger import Step
from anybatch.providers import finding
from tests.exactly_once.models import ModelOfListings, explored, fair, only_a
from tests.exactly_once.models_of_results import ModelOfCuts, ModelOfLoss, ModelOfRepeats, ModelOfStopMidway

# --- A2: downloads that are cut ----------------------------------------------------------------------------


def test_a_download_that_is_cut_once(model: Callable[..., Any]) -> None:
    """Whichever it is, of either attempt: every row lands as it was answered, and none is bought again."""
    explored(model(None, kind=ModelOfCuts, max_rounds=2), "short", budget=1, least=350)


def test_downloads_that_are_cut_for_ever(model: Callable[..., Any]) -> None:
    """Nothing lands, nothing is bought; once they are whole, everything lands."""
    world = model(None, kind=ModelOfCuts, max_rounds=2)
    world.spoils = "short"
    explored(world, least=250)


@pytest.mark.deployment
@pytest.mark.parametrize(("cuts", "times"), [(["short"], 2), (["torn", "empty"], 1)])
def test_downloads_that_are_cut(model: Callable[..., Any], cuts: list[str], times: int) -> None:
    """Each attempt's, or one download two times in a row."""
    explored(model(None, kind=ModelOfCuts, max_rounds=2), *cuts, budget=times, least=350)


@pytest.mark.deployment
def test_a_cut_where_a_row_goes_again(model: Callable[..., Any]) -> None:
    """The row that failed is bought again, and no other, whichever file is cut."""
    world = model(None, kind=ModelOfRepeats, max_rounds=2)
    explored(world, "empty", budget=1, allowed=of_fair_a, least=1600)


# --- G1: a listing that lags, or cannot be read to its end -------------------------------------------------


@pytest.fixture
def slow_listing(model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create that got no answer is looked for twice; at the first look it is not in the listing yet."""
    monkeypatch.setattr(finding, "ASK_AFTER", (1.0, 1.0))
    monkeypatch.setattr(ModelOfListings, "lag", 1.5)


@pytest.mark.usefixtures("slow_listing")
@pytest.mark.parametrize("fault", ["lost", "kill"])
def test_a_listing_that_lags(model: Callable[..., Any], fault: str) -> None:
    """As long as nobody is stopped for a whole lease: never a second batch."""
    world = model(Step.UPLOADED, kind=ModelOfListings)
    world.most = 1
    explored(world, fault, budget=1, allowed=fair, least=100)


@pytest.mark.deployment
@pytest.mark.usefixtures("slow_listing")
def test_a_listing_that_lags_behind_attempts_that_are_stopped(model: Callable[..., Any]) -> None:
    """For any time: of two batches one is called off, once it is listed."""
    world = model(Step.UPLOADED, kind=ModelOfListings)
    world.most = 3
    explored(world, "lost", budget=1, allowed=only_a, least=1500)


def test_a_listing_without_an_end(model: Callable[..., Any]) -> None:
    """Two looks at it fail, after a create that got no answer: nobody takes it that there is no batch."""
    world = model(Step.UPLOADED, kind=ModelOfListings)
    world.most = 1
    explored(world, "lost", "unread", budget=3, allowed=of_fair_a, least=200)


@pytest.mark.parametrize("fault", ["lost", "never"])
def test_a_listing_that_never_has_an_end(model: Callable[..., Any], fault: str) -> None:
    world = model(Step.UPLOADED, kind=ModelOfListings)
    world.most, world.spoils = 1, "unread"
    explored(world, fault, budget=1, allowed=fair, least=100)


def of_fair_a(world: Any, step: tuple[str, str]) -> bool:
    return fair(world, step) and only_a(world, step)


# --- A4b: a batch that is gone -----------------------------------------------------------------------------


def loss(model: Callable[..., Any], what: str, on_lost: str, **more: Any) -> ModelOfLoss:
    found: ModelOfLoss = model(None, kind=ModelOfLoss, on_lost=on_lost, **more)
    found.lost, found.most = what, 1
    return found


@pytest.mark.parametrize(
    ("at_once", "least"), [(True, 100), pytest.param(False, 900, marks=pytest.mark.deployment)]
)
def test_a_batch_that_is_gone_fails_the_job(model: Callable[..., Any], at_once: bool, least: int) -> None:
    """At any time; nothing is bought, with more rounds neither, and the other rows can be landed."""
    world = loss(model, "batch", "fail", max_rounds=2)
    world.ready = at_once
    explored(world, alike=True, least=least)


def test_a_batch_that_is_gone_is_done_without(model: Callable[..., Any]) -> None:
    """Whichever attempt decides, with more rounds neither is a row bought again."""
    world = loss(model, "batch", "land", max_rounds=2)
    world.ready = True
    explored(world, alike=True, least=350)


def test_results_that_are_gone_are_bought_again(model: Callable[..., Any]) -> None:
    """Once, and no other row, whichever attempt decides, as long as nobody is stopped for a whole lease."""
    world = loss(model, "file", "resubmit")
    world.ready = True
    explored(world, allowed=fair, alike=True, least=300)


@pytest.mark.deployment
def test_a_batch_that_is_gone_is_bought_again(model: Callable[..., Any]) -> None:
    world = loss(model, "batch", "resubmit")
    world.ready = True
    explored(world, allowed=fair, alike=True, least=1600)


@pytest.mark.deployment
@pytest.mark.parametrize("on_lost", ["fail", "land"])
def test_a_file_that_is_gone_at_any_time(model: Callable[..., Any], on_lost: str) -> None:
    explored(loss(model, "file", on_lost, max_rounds=2), alike=True, least=300)


# --- A1: a stop that meets a shard which is submitted anew -------------------------------------------------


def test_a_stop_while_a_shard_is_submitted_anew(model: Callable[..., Any]) -> None:
    """Each row is read from its own batch, what was answered lands so, and nothing is created any more."""
    world = model(None, kind=ModelOfStopMidway, max_rounds=2)
    world.ready, world.collects = True, False
    explored(world, allowed=fair, least=900)


@pytest.mark.deployment
def test_a_stop_and_a_collection_while_a_shard_is_submitted_anew(model: Callable[..., Any]) -> None:
    """And the new batch is answered at any time."""
    explored(model(None, kind=ModelOfStopMidway, max_rounds=2), allowed=fair, least=3000)
