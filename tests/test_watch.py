"""The shared poller, on a loop whose clock jumps: a day of waiting takes milliseconds and is repeatable."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import re
import selectors
import traceback
import weakref
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

from anybatch.errors import (
    APIError,
    AuthenticationError,
    BadRequestError,
    DeadlineExceededError,
    NotFoundError,
    QuotaError,
    RateLimitError,
    ServerError,
    TransportError,
)
from anybatch.models import Batch, BatchStatus, Page, RequestCounts
from anybatch.polling import pace, registry
from anybatch.polling import watcher as watch
from anybatch.polling.pace import Trouble
from anybatch.polling.registry import get_watcher, watcher_key
from anybatch.polling.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

T = TypeVar("T")
EPOCH = 1_800_000_000.0
DAY = 86_400.0


# --- decisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "roll", "expected"),
    [
        (0, 0.5, 15),
        (-40, 0.5, 15),  # the provider's clock is ahead of ours
        (0, 0.0, 13.5),
        (0, 1.0, 16.5),
        (150, 0.5, 15),
        (600, 0.5, 60),
        (3000, 0.5, 300),
        (DAY, 0.5, 300),
        (DAY, 0.0, 270),
    ],
)
def test_interval_grows_with_age(age: float, roll: float, expected: float) -> None:
    assert pace.next_interval(age, 15, 300, roll) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("interval", "left", "expected"),
    [
        (300, math.inf, 300),
        (300, 1000, 300),
        (300, 310, 295),  # the last look comes 15 s before the deadline
        (300, 100, 85),
        (15, 35, 15),
        (15, 20, 15),  # too near for one more look ahead of it
        (15, -5, 15),
    ],
)
def test_last_look_comes_before_the_deadline(interval: float, left: float, expected: float) -> None:
    assert pace.before_deadline(interval, left, 15) == expected


@pytest.mark.parametrize(
    ("soon", "newer", "page_size", "expected"),
    [
        (1, 1, 100, False),
        (8, 8, 100, False),  # few are retrieved
        (9, 9, 100, True),
        (500, 500, 100, True),
        (10_000, 10_000, 100, True),
        (20, 10_000, 100, False),  # 100 pages to save 20 calls
        (200, 10_000, 100, True),
        (199, 10_000, 100, False),
        (500, 500, 0, False),  # no useful listing
        (500, 500, 1, False),
    ],
)
def test_listing_pays_where_it_saves_calls(soon: int, newer: int, page_size: int, expected: bool) -> None:
    assert pace.listing_pays(soon, newer, page_size) is expected


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], 0),
        (list(range(1, 9)), 0),  # few
        (list(range(1, 10)), 9),
        (list(range(1, 10_001)), 10_000),
        ([*range(1, 21), 5_000], 20),  # the one far down is retrieved
        ([*range(1, 21), *range(5_000, 5_200)], 220),  # 52 pages for 220
        ([5_000], 0),
        (list(range(5_000, 5_100)), 0),  # 51 pages for 100: retrieving each is not much worse
        (list(range(5_000, 5_110)), 110),
    ],
    ids=lambda value: f"{len(value)} of {value[-1:]}" if isinstance(value, list) else str(value),
)
def test_plan_reads_off_the_listing_what_is_at_its_top(places: list[int], expected: int) -> None:
    assert pace.plan_sweep(places, 100) == expected
    assert pace.plan_sweep(places, 0) == 0


@pytest.mark.parametrize(
    ("pages", "found", "missing", "page_oldest", "wanted_oldest", "budget", "expected"),
    [
        (1, 100, 50, 500, 400, 150, True),
        (1, 100, 0, 500, 400, 100, False),  # all seen
        (5, 90, 10, 9_099, 10_000, 100, False),  # older than all that is wanted, by more than clocks differ
        (5, 90, 10, 9_101, 10_000, 100, True),
        (5, 90, 10, math.inf, -math.inf, 100, True),  # ages unknown
        (2, 0, 20, 500, 400, 20, True),
        (3, 0, 20, 500, 400, 20, False),  # three pages of foreign batches are enough for twenty
        (999, 0, 10_000, 500, 400, 10_000, True),  # for ten thousand, a thousand calls may be risked
        (1000, 0, 10_000, 500, 400, 10_000, False),
        (19, 1900, 20, 500, 400, 20, True),  # those that are not due come first
        (20, 2000, 20, 500, 400, 20, False),  # retrieving each would have cost as much
    ],
)
def test_listing_goes_on_while_it_can_pay(
    pages: int,
    found: int,
    missing: int,
    page_oldest: float,
    wanted_oldest: float,
    budget: int,
    expected: bool,
) -> None:
    assert pace.keep_listing(pages, found, missing, page_oldest, wanted_oldest, budget=budget) is expected


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (None, 15.0),
        (ServerError("oops"), 15.0),
        (RateLimitError("slow", retry_after=2.0), 15.0),
        (RateLimitError("slow", retry_after=600.0), 600.0),
        (RateLimitError("slow", retry_after=86_400.0), 3600.0),
        (ValueError("malformed"), 15.0),
    ],
)
def test_a_pause_is_as_long_as_it_was_asked_for(failure: Exception | None, expected: float) -> None:
    assert pace.pause_after(failure, 15.0) == expected


WAYS: list[dict[str, Any]] = [
    {},
    {"proxy": "http://one:3128"},
    {"proxy": "http://two:3128"},
    {"headers": {"x-tenant": "a"}},
    {"headers": {"x-tenant": "b"}},
    {"headers": {b"x-tenant": b"c"}},
    {"headers": httpx.Headers({"authorization": "Bearer a"})},
    {"headers": httpx.Headers({"authorization": "Bearer b"})},
    {"headers": [("x-tenant", "a"), ("x-tenant", "b")]},
]


def test_polls_are_shared_by_those_who_ask_in_the_same_way() -> None:
    keys = [watcher_key("openai:1", way) for way in WAYS]
    assert keys[0] == "openai:1"
    assert len(set(keys)) == len(keys)
    assert keys == [watcher_key("openai:1", dict(way)) for way in WAYS]
    assert watcher_key("openai:1", {"proxy": "p", "trust_env": False}) == watcher_key(
        "openai:1", {"trust_env": False, "proxy": "p"}
    )
    assert not any("tenant" in key or "Bearer" in key for key in keys)


@pytest.mark.parametrize(
    ("failures", "lines"),
    [
        ([0], [0]),
        ([0, 15, 30, 299], [0]),
        ([0, 200, 310, 600, 900, 1000, 1500, 2000], [0, 310, 1000]),  # lasts: ever fewer lines
        ([0, 15, 700, 715], [0, 700]),  # quiet for ten minutes: a new series
    ],
)
def test_trouble_is_told_at_first_and_when_it_lasts(failures: list[float], lines: list[float]) -> None:
    trouble = Trouble()
    assert [at for at in failures if trouble.lasts(at, calm=600) is not None] == lines


# --- a loop whose clock jumps, and an account on it --------------------------------------------------


class JumpingSelector(selectors.SelectSelector):
    """Never sleeps: where nothing is ready, the clock moves to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for ever"
            self.now += max(0, timeout)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def simulate(main: Coroutine[Any, Any, T]) -> T:
    random.seed(7)
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Polling:
    poll_seconds: tuple[float, float] = (15.0, 300.0)
    list_limit: int | None = 100


@dataclass
class Call:
    at: float
    verb: str
    what: str | None  # the batch id, or the cursor


@dataclass
class Account:
    """A provider's account and a client for it. `batches` maps ids to (created, ends) on the loop's clock."""

    batches: dict[str, tuple[float, float]] = field(default_factory=dict)
    provider: Polling = field(default_factory=Polling)
    refuse: Callable[[Call], Exception | None] = lambda call: None
    change: Callable[[Batch], Batch] = lambda batch: batch
    latency: float = 0.1
    calls: list[Call] = field(default_factory=list)
    opened: int = 0
    closed: int = 0
    under_way: int = 0
    peak: int = 0
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def watcher(self) -> Watcher:
        return Watcher("fake:1", lambda: self, clock=lambda: EPOCH + now())

    def made(self, verb: str) -> list[Call]:
        return [call for call in self.calls if call.verb == verb]

    async def __aenter__(self) -> Account:
        self.opened += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closing.set()
        await asyncio.sleep(0.01)
        self.closed += 1

    async def _answer(self, verb: str, what: str | None) -> None:
        self.calls.append(call := Call(now(), verb, what))
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            await asyncio.sleep(self.latency)
        finally:
            self.under_way -= 1
        if error := self.refuse(call):
            raise error

    def _batch(self, batch_id: str) -> Batch:
        created, ends = self.batches[batch_id]
        status = BatchStatus.IN_PROGRESS if now() < ends else BatchStatus.COMPLETED
        counts = RequestCounts(total=1, completed=int(now() >= ends))
        return self.change(
            Batch(id=batch_id, status=status, raw_status=status.value, provider="fake", request_counts=counts,
                  created_at=int(EPOCH + created))
        )  # fmt: skip

    async def retrieve(self, batch_id: str) -> Batch:
        await self._answer("retrieve", batch_id)
        if batch_id not in self.batches:
            raise NotFoundError("no such batch", status_code=404)
        return self._batch(batch_id)

    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page:
        await self._answer("list", after)
        newest_first = sorted(self.batches, key=lambda each: -self.batches[each][0])
        start = newest_first.index(after) + 1 if after else 0
        ids = newest_first[start : start + (limit or 20)]
        has_more = start + len(ids) < len(newest_first)
        return Page(
            [self._batch(each) for each in ids], next_cursor=ids[-1] if ids else None, has_more=has_more
        )


def many(number: int, *, created: float = 0.0, ends: float = math.inf) -> dict[str, tuple[float, float]]:
    """Batches made one a second, the last of them at `created`."""
    return {f"b{index}": (created - number + index, ends) for index in range(number)}


def start(watcher: Watcher, ids: Iterable[str], **options: Any) -> list[asyncio.Task[Batch]]:
    return [asyncio.create_task(watcher.wait(each, **options)) for each in ids]


async def stop(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def sweeps(calls: Iterable[Call], *, gap: float = 2.0) -> list[list[Call]]:
    """Calls in groups between which nothing was asked for `gap` seconds."""
    groups: list[list[Call]] = []
    for call in calls:
        if not groups or call.at - groups[-1][-1].at > gap:
            groups.append([])
        groups[-1].append(call)
    return groups


# --- waiting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ends", "calls"), [(-5.0, 1), (100.0, 9), (3_600.0, 50), (20 * 3_600.0, 280)])
def test_the_end_is_noticed_within_a_tenth_of_the_age(ends: float, calls: int) -> None:
    async def main() -> None:
        account = Account({"b": (-10.0, ends)})
        batch = await account.watcher().wait("b")
        assert batch.status is BatchStatus.COMPLETED
        assert now() - max(ends, 0) <= max(20, min(330, 0.12 * ends))
        assert len(account.calls) <= calls
        assert account.opened == account.closed == 1

    simulate(main())


def test_waiters_on_one_batch_share_its_polls() -> None:
    async def main(others: int) -> int:
        account = Account({"b": (0.0, 600.0)})
        watcher = account.watcher()
        first = start(watcher, ["b"])
        await asyncio.sleep(100)
        batches = await asyncio.gather(*first, *start(watcher, ["b"] * others))
        assert all(batch is batches[0] for batch in batches)
        return len(account.calls)

    assert simulate(main(50)) <= simulate(main(0)) + 3


def test_second_waiter_uses_the_first_ones_client_and_the_last_closes_it() -> None:
    async def main() -> None:
        account, spare = Account({"a": (0, 50), "b": (0, 100), "c": (0, math.inf)}), Account()
        first = asyncio.create_task(get_watcher("k", lambda: account).wait("a"))
        await asyncio.sleep(1)
        second = asyncio.create_task(get_watcher("k", lambda: spare).wait("b"))
        third = asyncio.create_task(get_watcher("k", lambda: spare).wait("c"))
        await asyncio.gather(first, second)
        assert (account.opened, account.closed, spare.opened) == (1, 0, 0)
        await stop([third])
        assert (account.opened, account.closed, spare.opened) == (1, 1, 0)
        calls = len(account.calls)
        await asyncio.sleep(DAY)
        assert len(account.calls) == calls
        assert len(asyncio.all_tasks()) == 1, "a poll task outlived its waiters"
        await get_watcher("k", lambda: account).wait("a")
        assert (account.opened, account.closed) == (2, 2)

    simulate(main())


def test_a_wait_that_begins_while_the_client_closes_gets_a_new_one() -> None:
    async def main() -> None:
        account = Account({"a": (0, 10), "b": (0, 60)})
        watcher = account.watcher()
        first = asyncio.create_task(watcher.wait("a"))
        await account.closing.wait()
        assert not first.done()
        assert (account.opened, account.closed) == (1, 0)
        await asyncio.wait_for(watcher.wait("b"), 300)
        assert (account.opened, account.closed) == (2, 2)
        await first

    simulate(main())


def test_accounts_do_not_share() -> None:
    async def main() -> None:
        one, other = Account({"b": (0, 10)}), Account({"b": (0, 10)})
        await asyncio.gather(
            get_watcher("one", lambda: one).wait("b"), get_watcher("other", lambda: other).wait("b")
        )
        assert (one.opened, other.opened) == (1, 1)

    simulate(main())


def test_each_event_loop_has_its_own_watcher_and_nothing_is_kept() -> None:
    account = Account({"b": (0, 10)})
    kept: list[weakref.ref[Any]] = []

    before = len(registry._watchers)  # of loops that other tests keep alive

    async def main() -> None:
        watcher = get_watcher("k", lambda: account)
        assert get_watcher("k", lambda: account) is watcher
        kept.extend([weakref.ref(watcher), weakref.ref(asyncio.get_running_loop())])
        await watcher.wait("b")

    simulate(main())
    simulate(main())
    gc.collect()
    assert account.opened == account.closed == 2
    assert [reference() for reference in kept] == [None] * 4
    assert len(registry._watchers) <= before


def test_client_is_closed_when_the_loop_ends_under_the_waiters() -> None:
    account = Account({"b": (0, math.inf)})
    waiting: list[asyncio.Task[Batch]] = []

    async def main() -> None:
        waiting.extend(start(account.watcher(), ["b"]))
        await asyncio.sleep(30)

    simulate(main())
    assert waiting[0].cancelled()
    assert account.closed == 1


def test_cancelled_waiter_is_forgotten_and_the_others_go_on() -> None:
    async def main() -> None:
        account = Account({"a": (0, math.inf), "b": (0, 300)})
        watcher = account.watcher()
        one, twin, other = start(watcher, ["a", "a", "b"])
        await asyncio.sleep(40)
        await stop([one])
        await asyncio.sleep(40)
        before = len([call for call in account.calls if call.what == "a"])
        await stop([twin])
        await other
        assert before >= 4
        assert len([call for call in account.calls if call.what == "a"]) == before

    simulate(main())


def test_progress_is_told_when_something_changed() -> None:
    async def main() -> None:
        account = Account({"b": (0.0, 120.0)})
        seen: list[BatchStatus] = []
        await account.watcher().wait("b", on_progress=lambda batch: seen.append(batch.status))
        assert seen == [BatchStatus.IN_PROGRESS, BatchStatus.COMPLETED]
        assert len(account.calls) > 5

    simulate(main())


def test_what_a_progress_callback_raises_ends_its_own_wait_only() -> None:
    def broken(batch: Batch) -> None:
        raise RuntimeError("mine")

    async def main() -> None:
        watcher = Account({"b": (0.0, 120.0)}).watcher()
        mine, other = asyncio.create_task(watcher.wait("b", on_progress=broken)), *start(watcher, ["b"])
        with pytest.raises(RuntimeError, match="mine"):
            await mine
        assert (await other).status is BatchStatus.COMPLETED

    simulate(main())


# --- the deadline ------------------------------------------------------------------------------------


def test_deadline_names_batch_and_status() -> None:
    async def main() -> None:
        account = Account({"b": (0, math.inf)})
        with pytest.raises(DeadlineExceededError, match=r"batch b was in_progress") as caught:
            await account.watcher().wait("b", deadline=EPOCH + 5_000)
        assert (caught.value.batch_id, caught.value.provider) == ("b", "fake")
        assert 5_000 <= now() < 5_001
        assert 4_980 <= account.calls[-1].at <= 4_990  # one look shortly before
        assert account.closed == 1

    simulate(main())


def test_a_batch_that_ended_since_the_last_poll_is_not_late() -> None:
    async def main() -> None:
        account = Account({"b": (-DAY, 4_900.0)})
        assert await account.watcher().wait("b", deadline=EPOCH + 5_000)

    simulate(main())


@pytest.mark.parametrize(("ends", "late"), [(-10.0, False), (math.inf, True)])
def test_wait_that_begins_after_its_deadline_looks_once(ends: float, late: bool) -> None:
    async def main() -> None:
        account = Account({"b": (-DAY, ends)})
        wait = account.watcher().wait("b", deadline=EPOCH - 100)
        if late:
            with pytest.raises(DeadlineExceededError, match="in_progress"):
                await wait
        else:
            await wait
        assert len(account.calls) == 1
        assert now() < 5

    simulate(main())


@pytest.mark.parametrize("deadline", [1, 50, 4_000])
def test_deadline_holds_when_nothing_answers(deadline: float) -> None:
    async def main() -> None:
        account = Account({"b": (0, math.inf)}, latency=1e9)
        with pytest.raises(DeadlineExceededError, match="not seen yet"):
            await account.watcher().wait("b", deadline=EPOCH + deadline)
        assert now() == pytest.approx(deadline, abs=0.1)
        assert len(account.calls) >= 1
        assert account.closed == 1

    simulate(main())


def test_each_waiter_has_its_own_deadline() -> None:
    async def main() -> None:
        watcher = Account({"b": (0, 900.0)}).watcher()
        early, late = (
            *start(watcher, ["b"], deadline=EPOCH + 60),
            *start(watcher, ["b"], deadline=EPOCH + 5_000),
        )
        with pytest.raises(DeadlineExceededError):
            await early
        assert now() < 61
        assert (await late).status is BatchStatus.COMPLETED

    simulate(main())


def test_a_thousand_deadlines_at_once() -> None:
    async def main() -> None:
        account = Account(many(1_000))
        waits = start(account.watcher(), account.batches, deadline=EPOCH + 600)
        ends = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(end, DeadlineExceededError) and "in_progress" in str(end) for end in ends)
        assert {end.batch_id for end in ends if isinstance(end, DeadlineExceededError)} == set(
            account.batches
        )
        assert 600 <= now() < 601

    simulate(main())


def test_unknown_status_is_bounded_by_the_deadline_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def odd(batch: Batch) -> Batch:
        return batch.model_copy(update={"status": BatchStatus.UNKNOWN, "raw_status": "Pondering"})

    async def main() -> None:
        account = Account(many(20), change=odd)
        waits = start(account.watcher(), account.batches, deadline=EPOCH + DAY)
        ends = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(end, DeadlineExceededError) and "Pondering" in str(end) for end in ends)

    simulate(main())
    assert len([record for record in caplog.records if "Pondering" in record.message]) == 1


# --- many --------------------------------------------------------------------------------------------


def test_waiters_due_at_about_the_same_time_are_looked_at_together() -> None:
    async def main() -> None:
        account = Account(many(6))
        watcher = account.watcher()
        waits = []
        for each in account.batches:
            waits += start(watcher, [each])
            await asyncio.sleep(0.4)
        await asyncio.sleep(3_000)
        groups = sweeps(account.calls)
        assert len(account.calls) > 4 * len(groups)
        assert min(b[0].at - a[-1].at for a, b in pairwise(groups)) >= 3
        await stop(waits)

    simulate(main())


@pytest.mark.parametrize(("number", "age_known"), [(500, True), (500, False), (4_000, True)])
def test_a_restart_reads_the_listing(number: int, age_known: bool) -> None:
    async def main() -> None:
        account = Account(many(number))
        created = {each: EPOCH + at if age_known else None for each, (at, _) in account.batches.items()}
        watcher = account.watcher()
        waits = [asyncio.create_task(watcher.wait(each, created_at=at)) for each, at in created.items()]
        await asyncio.sleep(number / 1000 + 5)
        assert not account.made("retrieve")
        assert len(account.made("list")) == number / 100
        assert account.peak == 1
        await stop(waits)

    simulate(main())


def test_many_old_batches_cost_one_call_for_eighty_a_sweep() -> None:
    async def main() -> None:
        # Every one has joined at its own time, so that none are due together at first.
        account = Account()
        watcher = account.watcher()
        waits = []
        for number, (each, times) in enumerate(many(1_000, created=-DAY).items()):
            account.batches[each] = times
            waits += start(watcher, [each])
            if number % 10 == 0:
                await asyncio.sleep(3)
        account.calls.clear()
        await asyncio.sleep(3_600)
        rounds = sweeps(account.calls)
        assert 11 <= len(rounds) <= 15
        assert len(account.calls) <= len(rounds) * 1_000 / 80
        await stop(waits)

    simulate(main())


def test_batches_of_all_ages_are_read_together() -> None:
    async def main() -> None:
        account = Account(many(1_000, created=-600))  # due every 60 to 160 s, growing
        waits = start(account.watcher(), account.batches)
        await asyncio.sleep(30)
        account.calls.clear()
        await asyncio.sleep(1_200)
        assert len(account.calls) <= 200  # retrieving each takes some 8,000
        await stop(waits)

    simulate(main())


def test_young_batches_do_not_read_the_whole_listing() -> None:
    async def main() -> None:
        account = Account(
            many(3_000, created=-DAY) | {f"new{index}": (-1.0, math.inf) for index in range(20)}
        )
        watcher = account.watcher()
        waits = start(watcher, account.batches)
        await asyncio.sleep(60)
        account.calls.clear()
        await asyncio.sleep(150)
        assert 8 <= len(account.calls) <= 16  # a page of the newest every 15 s
        await stop(waits)

    simulate(main())


def test_without_a_listing_retrieves_are_bounded() -> None:
    async def main() -> None:
        account = Account(many(1_000), provider=Polling(list_limit=0))
        waits = start(account.watcher(), account.batches)
        await asyncio.sleep(60)
        assert account.peak == watch.LANES
        assert len({call.what for call in account.calls}) == 1_000
        assert max(map(len, sweeps(account.calls))) <= watch.ONE_BY_ONE
        assert not account.made("list")
        await stop(waits)

    simulate(main())


def test_a_listing_that_did_not_pay_for_the_first_few_is_read_for_all() -> None:
    """Triggers start one by one, the oldest first: what they wait for is at the end of the listing."""

    async def main() -> None:
        account = Account(many(1_000))
        watcher, names, waits = account.watcher(), list(account.batches), []
        for first in range(0, 1_000, 20):
            waits += start(watcher, names[first : first + 20])
            await asyncio.sleep(1)
        account.calls.clear()
        await asyncio.sleep(60)
        assert len(account.calls) <= 60  # retrieving each takes 4,000
        await stop(waits)

    simulate(main())


def test_all_ends_are_delivered() -> None:
    async def main() -> None:
        account = Account(
            {name: (at, 200.0 + index) for index, (name, (at, _)) in enumerate(many(500).items())}
        )
        batches = await asyncio.gather(*start(account.watcher(), account.batches))
        assert [batch.id for batch in batches] == list(account.batches)
        assert all(batch.status.is_terminal for batch in batches)
        assert now() < 700 * 1.15

    simulate(main())


# --- listings that cannot be trusted -----------------------------------------------------------------


def test_an_account_full_of_foreign_batches_is_not_listed_for_a_while() -> None:
    async def main() -> None:
        foreign = {f"f{index}": (0.0, math.inf) for index in range(5_000)}
        account = Account(many(50, created=-1_000) | foreign)
        waits = start(account.watcher(), many(50))
        await asyncio.sleep(110)
        assert len(account.made("list")) == 5  # a tenth of the fifty calls it might have saved
        assert {call.what for call in account.made("retrieve")} == set(many(50))
        await asyncio.sleep(20_000)
        lists = sweeps(account.made("list"), gap=20)
        assert all(len(group) <= 5 for group in lists)
        assert 8 <= len(lists) <= 18  # tried again after 2, 4, 8, … 30 minutes
        await stop(waits)

    simulate(main())


class Endless(Account):
    """Lists for ever: strangers under ever new cursors, or one page under a cursor that comes again."""

    cursor: Callable[[int], str] = staticmethod(lambda number: f"c{number}")
    own = 0

    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page:
        await self._answer("list", after)
        page = [self._batch(each) for each in list(self.batches)[: self.own]]
        page += [each.model_copy(update={"id": f"x{index}"}) for index, each in enumerate(page or [])]
        if not page:
            stranger = Batch(id="x", status=BatchStatus.COMPLETED, raw_status="completed", provider="fake")
            page = [stranger] * (limit or 20)
        return Page(page, next_cursor=self.cursor(len(self.calls)), has_more=True)


@pytest.mark.parametrize(
    ("own", "cursor", "most"),
    [
        (0, lambda number: f"c{number}", 5),
        (0, lambda number: "same", 2),
        (10, lambda number: f"c{number}", 14),
    ],
    ids=["strangers", "same cursor", "same page"],
)
def test_a_listing_without_end_is_left(own: int, cursor: Callable[[int], str], most: int) -> None:
    async def main() -> None:
        account = Endless(many(40, ends=60.0))
        account.own, account.cursor = own, cursor
        waits = start(account.watcher(), account.batches)
        await asyncio.gather(*waits)
        assert max(map(len, sweeps(account.made("list"), gap=5))) <= most
        assert now() < 120

    simulate(main())


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("no listing here", status_code=404),
        AuthenticationError("this key may not list", status_code=403),
        ServerError("listing is broken", status_code=500),
        ValueError("malformed entry"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_listing_fails_each_is_retrieved(error: Exception) -> None:
    async def main() -> None:
        account = Account(many(100, ends=60.0), refuse=lambda call: error if call.verb == "list" else None)
        await asyncio.gather(*start(account.watcher(), account.batches))
        assert len(account.made("list")) == 1
        assert now() < 120

    simulate(main())


def test_what_the_listing_does_not_show_is_retrieved() -> None:
    class Forgetful(Account):
        async def list(self, *, after: str | None = None, limit: int | None = None) -> Page:
            page = await super().list(after=after, limit=limit)
            shown = [batch for batch in page if batch.id not in ("b3", "b4")]
            return Page(shown, next_cursor=page.next_cursor, has_more=page.has_more)

    async def main() -> None:
        account = Forgetful(many(100, ends=20.0))
        await asyncio.gather(*start(account.watcher(), account.batches))
        assert {call.what for call in account.made("retrieve")} == {"b3", "b4"}

    simulate(main())


# --- failures ----------------------------------------------------------------------------------------


def test_retry_after_slows_the_whole_account() -> None:
    asked: list[float] = []

    def refuse(call: Call) -> Exception | None:
        if 40 < call.at < 60:
            asked.append(now())
            return RateLimitError("slow down", status_code=429, retry_after=100)
        return None

    async def main() -> None:
        account = Account(many(8, ends=400.0), refuse=refuse)
        watcher = account.watcher()
        waits = start(watcher, account.batches)
        await asyncio.sleep(70)
        waits += start(watcher, ["b0", "late"])  # those who come meanwhile wait as well
        account.batches["late"] = (60.0, 400.0)
        await asyncio.gather(*waits)
        assert 1 <= len(asked) <= watch.LANES
        assert not [call for call in account.calls if asked[-1] < call.at < asked[0] + 100]

    simulate(main())


def test_rate_limits_without_a_time_slow_ever_more() -> None:
    async def main() -> None:
        account = Account(many(1), refuse=lambda call: RateLimitError("slow down", status_code=429))
        waits = start(account.watcher(), account.batches)
        await asyncio.sleep(4_000)
        gaps = [b.at - a.at for a, b in pairwise(account.calls)]
        assert gaps[0] < 20
        assert gaps == pytest.approx(sorted(gaps), rel=0.12)
        assert gaps[-1] > 290
        await stop(waits)

    simulate(main())


def test_a_listing_goes_on_where_the_rate_limit_struck() -> None:
    struck: list[Call] = []

    def refuse(call: Call) -> Exception | None:
        if len(struck) < 3 and call.what is not None:
            struck.append(call)
            return RateLimitError("slow down", status_code=429, retry_after=7)
        return None

    async def main() -> None:
        account = Account(many(1_000, ends=1.0), refuse=refuse)
        await asyncio.gather(*start(account.watcher(), account.batches))
        assert [call.what for call in struck] == [struck[0].what] * 3
        assert len([call for call in account.calls if call.what is None]) == 1
        assert len(account.calls) == 13

    simulate(main())


def test_401_ends_every_wait_of_the_account_each_with_its_own_error() -> None:
    async def main() -> None:
        error = AuthenticationError("key revoked", status_code=401, request_id="r")
        account = Account(many(1_000), refuse=lambda call: error if now() > 100 else None)
        ends = await asyncio.gather(*start(account.watcher(), account.batches), return_exceptions=True)
        assert all(isinstance(end, AuthenticationError) and end.request_id == "r" for end in ends)
        assert len(set(map(id, ends))) == 1_000
        assert now() < 130
        assert len([call for call in account.calls if call.at > 100]) <= 1 + watch.LANES
        assert account.closed == 1

    simulate(main())


@pytest.mark.parametrize(
    ("status", "kind"), [(403, AuthenticationError), (404, NotFoundError), (422, BadRequestError)]
)
def test_a_refusal_ends_one_wait(status: int, kind: type[APIError]) -> None:

    def refuse(call: Call) -> Exception | None:
        return kind("not this", status_code=status) if call.what == "b1" else None

    async def main() -> None:
        account = Account(many(3, ends=60.0), refuse=refuse)
        good, bad, fine = await asyncio.gather(
            *start(account.watcher(), account.batches), return_exceptions=True
        )
        assert isinstance(bad, kind)
        assert isinstance(good, Batch)
        assert isinstance(fine, Batch)
        assert len([call for call in account.calls if call.what == "b1"]) == 1

    simulate(main())


BLIPS: list[Exception] = [
    RateLimitError("slow", status_code=429),
    QuotaError("empty", status_code=429),
    ServerError("oops", status_code=503),
    TransportError("no answer"),
    BadRequestError("locked", status_code=409),
    TimeoutError(),
]


@pytest.mark.parametrize("error", BLIPS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("number", [1, 300])
def test_blips_end_no_wait(error: Exception, number: int) -> None:
    async def main() -> None:
        account = Account(many(number, ends=3_000.0), refuse=lambda call: error if now() < 2_500 else None)
        await asyncio.gather(*start(account.watcher(), account.batches))
        assert now() < 3_700
        assert len(account.calls) < 400 + 5 * number  # an outage is not answered with a storm

    simulate(main())


def test_one_batch_that_never_answers_sense_does_not_slow_the_others() -> None:
    def refuse(call: Call) -> Exception | None:
        return ServerError("no status") if call.what == "b0" else None

    async def main() -> None:
        account = Account(many(3, ends=300.0) | {"b0": (0.0, 300.0)}, refuse=refuse)
        bad, *good = start(account.watcher(), account.batches, deadline=EPOCH + 900)
        await asyncio.gather(*good)
        assert now() < 350
        with pytest.raises(DeadlineExceededError):
            await bad

    simulate(main())


def test_a_bug_ends_the_wait_that_met_it_with_its_own_traceback() -> None:
    def refuse(call: Call) -> Exception | None:
        return TypeError("a parser's") if call.what == "b1" else None

    async def main() -> None:
        account = Account(many(3, ends=60.0), refuse=refuse)
        good, bad, fine = await asyncio.gather(
            *start(account.watcher(), account.batches, deadline=EPOCH + 3_600), return_exceptions=True
        )
        assert isinstance(good, Batch)
        assert isinstance(fine, Batch)
        assert isinstance(bad, TypeError)
        assert "retrieve" in [frame.name for frame in traceback.extract_tb(bad.__traceback__)]

    simulate(main())


def test_a_listing_that_meets_a_bug_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        account = Account(
            many(300, ends=300.0), refuse=lambda call: TypeError("no page") if call.verb == "list" else None
        )
        await asyncio.gather(*start(account.watcher(), account.batches))

    simulate(main())
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("deadline", [-1e14, 1e17, 4e9])
def test_a_deadline_that_is_no_date_ends_its_own_wait_alone(deadline: float) -> None:
    async def main() -> None:
        account = Account(many(2, ends=60.0))
        watcher = account.watcher()
        odd = asyncio.create_task(watcher.wait("b0", deadline=deadline))
        [good] = start(watcher, ["b1"])
        assert isinstance(await good, Batch)
        if deadline > 0:
            assert isinstance(await odd, Batch)
        else:
            with pytest.raises(DeadlineExceededError, match="in unix seconds"):
                await odd

    simulate(main())


@pytest.mark.parametrize("when", ["made", "opened"])
def test_a_client_that_cannot_be_made_ends_the_waits(when: str) -> None:
    class Closed(Account):
        async def __aenter__(self) -> Account:
            raise OSError("no certificates")

    def make() -> Account:
        if when == "made":
            raise OSError("no certificates")
        return Closed()

    async def main() -> None:
        watcher = Watcher("k", make)
        for _ in range(2):
            ends = await asyncio.gather(*start(watcher, ["a", "b", "b"]), return_exceptions=True)
            assert [str(end) for end in ends] == ["no certificates"] * 3

    simulate(main())


def test_log_tells_changes_and_first_trouble_but_no_polls(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "anybatch.polling.watcher")

    async def main() -> None:
        trouble = Account(
            many(20, ends=3_000.0),
            refuse=lambda call: TransportError("no answer from host") if 600 < now() < 1_700 else None,
        )
        await asyncio.gather(*start(trouble.watcher(), trouble.batches))

    simulate(main())
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if re.fullmatch(r"batch b\d+: completed, was in_progress", line)]) == 20
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(warnings) <= 3
    assert "no answer from host" in warnings[0]
    assert re.search(r"for \d+ min", warnings[1])
    assert len(told) == 20 + len(warnings)
