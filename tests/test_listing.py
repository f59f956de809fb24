"""How a listing is read on, when it is over, and when what was not in it is not there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from anybatch.models import Batch, Page
from anybatch.polling.listing import CLOCK_SKEW, AsyncBatches, Batches, Reading, reaches

if TYPE_CHECKING:
    from collections.abc import Sequence


def page(*ids: str, more: bool = True, cursor: str | None = None, times: Sequence[int] = ()) -> Page:
    made = times or range(900, 900 - len(ids), -1)
    batches = [
        Batch(id=one, created_at=at, status="completed", provider="p", raw_status="completed")
        for one, at in zip(ids, made, strict=True)
    ]
    return Page(batches, next_cursor=cursor, has_more=more)


@pytest.mark.parametrize(
    ("pages", "expected", "is_cut"),
    [
        ([page("a", more=False)], None, False),
        ([page("a", cursor="a")], "a", False),
        ([page("a")], None, True),  # there is more, and no way to read on
        ([page()], None, True),
        ([page(cursor="x")], "x", False),  # empty, and leads on
        ([page("a", cursor="a"), page("a", cursor="b")], None, True),  # the same entries once more
        ([page("a", cursor="a"), page("a", more=False)], None, False),
        ([page("a", cursor="a"), page("a", "b", cursor="b")], "b", False),
    ],
)
def test_when_a_listing_was_read_to_its_end(pages: list[Page], expected: str | None, is_cut: bool) -> None:
    """FAULTS G1."""
    reading = Reading()
    for one in pages:
        reading.take(one)
    assert (None if reading.is_over else reading.after) == expected
    assert reading.is_cut is is_cut
    assert reading.is_complete is (reading.is_over and not is_cut)


def test_a_listing_without_end_is_given_up() -> None:
    """FAULTS G1."""
    listing = Batches(lambda after: page(f"b{after}", cursor=f"{after}+"), Reading(most_pages=3))
    assert len(list(listing)) == 3
    assert not listing.reading.is_complete
    assert not listing.reading.is_cut


@pytest.mark.parametrize(
    ("times", "expected"), [((), False), ((200, 150), False), ((200, 99), True), ((1, 200), False)]
)
def test_how_far_a_page_goes_back(times: tuple[int, ...], expected: bool) -> None:
    """FAULTS G1: one batch with an odd time does not end a listing."""
    assert reaches(page(*"abc"[: len(times)], times=times), 100) is expected


PAGES = {
    None: page("c", "b", cursor="1", times=(5_000, 4_000)),
    "1": page("a", cursor="2", times=(1_999,)),
    "2": page("z", more=False, times=(0,)),
}


@pytest.mark.parametrize(
    ("since", "expected"), [(0, "cbaz"), (2_000 + CLOCK_SKEW, "cba"), (4_001 + CLOCK_SKEW, "cb")]
)
def test_a_page_is_asked_for_when_it_is_needed(since: float, expected: str) -> None:
    asked: list[str | None] = []

    def ask(after: str | None) -> Page:
        asked.append(after)
        return PAGES[after]

    async def aask(after: str | None) -> Page:
        return ask(after)

    async def collected() -> str:
        return "".join([batch.id async for batch in AsyncBatches(aask, Reading(since))])

    listing = Batches(ask, Reading(since))
    assert next(listing).id == "c"
    assert asked == [None]
    assert "c" + "".join(batch.id for batch in listing) == expected
    assert listing.reading.is_complete
    before, asked[:] = list(asked), []
    assert asyncio.run(collected()) == expected
    assert asked == before
