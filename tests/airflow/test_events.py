"""Watching an account for batches that end: what is told, how often, and what a restart changes."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import Asset, AssetWatcher

from anybatch import Batch, Client, Page
from anybatch.polling.listing import Batches, Reading
from anybatch_airflow import BatchCompletedTrigger, events
from anybatch_airflow.events import OVERLAP, Listing, Record
from tests.fakes.faults import Respond
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer, Reply, Request

from .versions import deserialize, needs, serialize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    MakeRequests = Callable[..., list[dict[str, Any]]]

CHAT = "/v1/chat/completions"
LOOK = 0.02  # seconds between listings


class Store:
    """A state store such as Airflow 3.3 gives to watchers."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    async def aget(self, key: str, default: Any = None) -> Any:
        return json.loads(self.kept[key]) if key in self.kept else default

    async def aset(self, key: str, value: Any) -> None:
        self.kept[key] = json.dumps(value)


@pytest.fixture
def create(tmp_path: Path, api_base: str, make_requests: MakeRequests) -> Callable[..., Batch]:
    """`create("delay=0", team="a")`: a batch of three rows at the local provider, with metadata."""

    def make(wish: str = "delay=0", **metadata: str) -> Batch:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in make_requests(3, wish)))
        with Client("local", api_base=api_base) as client:
            return client.create(path, CHAT, metadata=metadata)

    return make


@pytest.fixture
def make_watcher(api_base: str) -> Callable[..., BatchCompletedTrigger]:
    def make(**kwargs: Any) -> BatchCompletedTrigger:
        return BatchCompletedTrigger(
            **{"provider": "local", "api_base": api_base, "poll_interval": LOOK, **kwargs}
        )

    return make


async def told(trigger: BatchCompletedTrigger, count: int, *, more: float = 6 * LOOK) -> list[dict[str, Any]]:
    """The first events of a watcher, and what comes within a few more looks, to notice what is too much."""
    found: list[dict[str, Any]] = []

    async def collect() -> None:
        async with aclosing(trigger.run()) as running:  # type: ignore[type-var]
            async for event in running:
                found.append(event.payload)  # noqa: PERF401  looked at while it grows

    task = asyncio.create_task(collect())
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, found
        assert not task.done(), task.result()
        await asyncio.sleep(0.05)
    await asyncio.sleep(more)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return found


# --- what is told ------------------------------------------------------------------------------------


def test_each_ended_batch_is_told_once(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    quick, slow, _ = create("delay=0", team="a"), create("delay=0.7", team="b"), create("delay=600")
    found = asyncio.run(told(make_watcher(), 2))
    assert [event["batch_id"] for event in found] == [quick.id, slow.id]
    first = found[0]
    assert first["ended_at"] >= first["created_at"] == quick.created_at
    assert {name: first[name] for name in first if name not in ("created_at", "ended_at", "batch_id")} == {
        "status": "completed", "provider": "local", "conn_id": None, "endpoint": CHAT,
        "model": "local:echo?delay=0",
        "metadata": {"team": "a"}, "total": 3, "completed": 3, "failed": 0,
    }  # fmt: skip
    json.dumps(found)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"metadata": {"team": "a"}}, {"a"}),
        ({"metadata": {"team": None}}, {"a", "b"}),
        ({"metadata": {"team": "a", "stage": "x"}}, set()),
        ({"endpoint": CHAT}, {"a", "b", "none"}),
        ({"endpoint": "/v1/embeddings"}, set()),
        ({"model": "gpt"}, set()),
        ({"statuses": ["expired"]}, {"late"}),
        ({"statuses": ["completed", "expired"]}, {"a", "b", "none", "late"}),
    ],
)
def test_only_what_is_wanted_is_told(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger], wish: dict[str, Any],
    expected: set[str],
) -> None:  # fmt: skip
    names = {create(team="a").id: "a", create(team="b").id: "b", create().id: "none"}
    names[create("delay=0.1&expire=1").id] = "late"
    found = asyncio.run(told(make_watcher(**wish), len(expected)))
    assert {names[event["batch_id"]] for event in found} == expected
    assert len(found) == len(expected)


def test_named_batches_are_watched_without_a_listing(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    quick, slow, _other = create("delay=0"), create("delay=0.5"), create("delay=0")
    trigger = make_watcher(batch_ids=[slow.id, quick.id, "batch_gone"])
    assert trigger.shared_stream_key() is None
    found = asyncio.run(told(trigger, 2))
    assert {event["batch_id"] for event in found} == {quick.id, slow.id}


def test_named_batches_that_were_told_are_not_told_again(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(events, "SETTLING", 0.05)
    ids, store = [create().id, create().id], Store()
    for expected in (2, 0):
        trigger = make_watcher(batch_ids=ids)
        trigger.asset_state_store = store  # type: ignore[assignment]
        assert len({event["batch_id"] for event in asyncio.run(told(trigger, expected))}) == expected


@pytest.mark.parametrize("is_named", [False, True])
def test_the_last_of_several_is_told_again(
    create: Callable[..., Batch],
    make_watcher: Callable[..., BatchCompletedTrigger],
    monkeypatch: pytest.MonkeyPatch,
    is_named: bool,
) -> None:
    """Airflow gives the others to the run after the next event."""
    monkeypatch.setattr(events, "SETTLING", 0.5)
    ids = [create().id, create().id, create().id]
    trigger = make_watcher(batch_ids=ids) if is_named else make_watcher(lookback=3600)
    heard = [event["batch_id"] for event in asyncio.run(told(trigger, 4))]
    assert set(heard[:3]) == set(ids)
    assert heard[3] == heard[2]


def test_one_alone_is_told_once(
    create: Callable[..., Batch],
    make_watcher: Callable[..., BatchCompletedTrigger],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "SETTLING", 0.1)
    create()
    assert len(asyncio.run(told(make_watcher(lookback=3600), 1))) == 1


@pytest.mark.parametrize("statuses", [["done"], ["completed", "cancelling"]])
def test_an_end_that_does_not_exist_is_refused_at_parse_time(statuses: list[str]) -> None:
    with pytest.raises(ValueError, match="is not a way to end; use completed, failed, expired, cancelled"):
        BatchCompletedTrigger(conn_id="c", statuses=statuses)


# --- over a restart ----------------------------------------------------------------------------------


def test_a_restart_tells_what_ended_meanwhile_and_nothing_again(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    store = Store()

    def watch(count: int) -> set[str]:
        trigger = make_watcher(lookback=3600)
        trigger.asset_state_store = store  # type: ignore[assignment]
        return {event["batch_id"] for event in asyncio.run(told(trigger, count))}

    first = create()
    assert watch(1) == {first.id}
    second, third = create(), create()
    assert watch(2) == {second.id, third.id}
    assert watch(0) == set()


def test_an_event_that_may_not_have_been_stored_is_told_again(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    """A triggerer that dies right after an event: its record does not have the batch yet."""
    batch, store = create(), Store()

    async def first_event() -> dict[str, Any]:
        trigger = make_watcher(poll_interval=60)
        trigger.asset_state_store = store  # type: ignore[assignment]
        async with aclosing(trigger.run()) as running:  # type: ignore[type-var]
            return dict((await anext(running)).payload)

    for _ in range(2):
        assert asyncio.run(first_event())["batch_id"] == batch.id
    assert not store.kept


def test_without_a_record_the_watch_begins_with_what_ended_of_late(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    """A new watcher; and on Airflow 3.1 and 3.2, where there is no store, any after a restart."""
    create()
    time.sleep(1.1)  # ends are told in whole seconds
    running = create("delay=1.5")
    trigger = make_watcher(lookback=0.5)
    vars(trigger).pop("asset_state_store", None)
    assert [event["batch_id"] for event in asyncio.run(told(trigger, 1))] == [running.id]


class Shared(Store):
    """What Airflow gives to a trigger that two assets share."""

    async def aget(self, key: str, default: Any = None) -> Any:
        raise ValueError("Task has 2 concrete inlets and outlets")


def test_a_trigger_of_two_assets_watches_without_a_record(
    create: Callable[..., Batch], make_watcher: Callable[..., BatchCompletedTrigger]
) -> None:
    batch, trigger = create(), make_watcher()
    trigger.asset_state_store = Shared()  # type: ignore[assignment]
    assert [event["batch_id"] for event in asyncio.run(told(trigger, 1))] == [batch.id]


def ended(batch_id: str, ended_at: float) -> dict[str, Any]:
    return {"batch_id": batch_id, "ended_at": ended_at}


def test_a_record_stays_small() -> None:
    """Ids are kept for as long as a batch that ended earlier may still come up."""
    now, store = time.time(), Store()
    record = Record(store, "key", now - 7200)
    snapshot = tuple(ended(f"b{age}", now - age) for age in range(0, 7000, 10))
    for facts in record.unreported(snapshot):
        record.add(facts)
    assert len(record.reported) == 700
    asyncio.run(record.save())
    assert len(record.reported) == OVERLAP / 10
    assert list(record.unreported(snapshot)) == []
    late = ended("late", now - OVERLAP / 2)
    assert list(record.unreported((ended("b0", now), late))) == [late]
    assert list(record.unreported((ended("old", now - OVERLAP - 1),))) == []


def test_an_end_in_the_future_does_not_hide_the_present() -> None:
    record = Record(None, "key", 0)
    record.add(ended("wrong clock", time.time() + 86_400))
    asyncio.run(record.save())
    assert record.floor < time.time()


# --- the listing -------------------------------------------------------------------------------------


def batch(name: str, created_at: int, status: str = "completed", **facts: Any) -> Batch:
    return Batch(id=name, created_at=created_at, status=status, provider="p", raw_status=status, **facts)


def look(listing: Listing, now: float, *pages: list[Batch]) -> tuple[list[str], int]:
    """One look at these pages: who has ended, and how many pages it took."""
    rest = iter(pages)
    batches = Batches(
        lambda after: Page(next(rest), next_cursor="on", has_more=True),
        Reading(listing.begin(now), len(pages)),
    )
    for one in batches:
        listing.take(one)
    return [facts["batch_id"] for facts in listing.finish()], batches.reading.pages


def test_the_first_listing_goes_back_for_max_age_and_later_ones_to_the_oldest_that_runs() -> None:
    listing = Listing(10_000)
    old = [batch("old", 1_000, completed_at=1_500)]
    pages = ([batch("c", 29_000)], [batch("b", 25_000, "in_progress")], [batch("a", 21_000)], old, old)
    assert look(listing, 30_000, *pages) == (["c", "a", "old"], 4)
    # The oldest that runs is on the second page; what was there before is still known.
    assert look(listing, 30_100, *pages) == (["c", "a"], 3)
    done = ([batch("c", 29_000)], [batch("b", 25_000, completed_at=30_150)], [batch("a", 21_000)])
    assert look(listing, 30_200, *done) == (["b", "c", "a"], 3)
    # Now nothing runs: one page, unless it is full of new batches.
    assert look(listing, 30_300, *done)[1] == 1
    new = ([batch("e", 30_290, completed_at=30_300)], [batch("d", 30_280, completed_at=30_299)], *done)
    assert look(listing, 30_310, *new) == (["e", "d", "b", "c", "a"], 3)


def test_a_batch_that_is_gone_does_not_make_every_listing_long() -> None:
    listing = Listing(10_000)
    assert look(listing, 30_000, [batch("gone", 21_000, "in_progress")]) == ([], 1)
    assert look(listing, 31_000, [batch("b", 30_050)], [batch("a", 20_000)])[1] == 2
    assert look(listing, 31_100, [batch("b", 30_050)], [batch("a", 20_000)])[1] == 1


def test_the_end_of_a_batch_whose_provider_does_not_tell_it() -> None:
    listing = Listing(10_000)
    listing.begin(30_000)
    listing.take(batch("seen running", 25_000, "in_progress"))
    listing.take(batch("never seen running", 24_000))
    listing.finish()
    listing.begin(30_100)
    listing.take(batch("seen running", 25_000))
    listing.take(batch("never seen running", 24_000))
    assert {facts["batch_id"]: facts["ended_at"] for facts in listing.finish()} == {
        "seen running": 30_100,
        "never seen running": 24_000,
    }


def test_a_listing_that_broke_off_has_hidden_nothing() -> None:
    """FAULTS G1: a batch that was not on the pages that could be read runs on, and its end is told; nor is
    what ended meanwhile passed over."""
    listing = Listing(10_000)
    old = batch("old", 25_000, "in_progress")
    look(listing, 30_000, [batch("c", 29_000, "in_progress"), old])
    listing.begin(30_500)
    listing.take(batch("d", 30_400))
    assert [facts["batch_id"] for facts in listing.finish(is_whole=False)] == ["d"]
    pages = ([batch("e", 30_990)], [batch("d", 30_400)], [batch("c", 29_000)], [batch("old", 25_000)])
    ended, read = look(listing, 31_000, *pages)
    assert (sorted(ended), read) == (["c", "d", "e", "old"], 4)


def test_an_empty_page_that_leads_on_is_read_on(
    add_connection: Callable[..., str], tmp_path: Path, make_requests: MakeRequests
) -> None:
    """FAULTS G1: what came after it was never told."""
    fake = OpenAIFake(key="k")

    def begins_empty(request: Request) -> Reply:
        if (request.method, request.path) != ("GET", "/v1/batches") or "after" in request.query:
            return fake(request)
        return Reply.json({"object": "list", "data": [], "has_more": True, "last_id": fake.last.id})

    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(make_requests(1)[0]) + "\n")
    with FakeServer(begins_empty) as server:
        facts = {"password": "k", "host": server.url + "/v1", "extra": {"provider": "openai"}}
        conn_id = add_connection("gaps", conn_type="anybatch", **facts)
        with Client("openai", api_key="k", api_base=server.url + "/v1") as client:
            ended = client.create(path, CHAT)
            client.create(path, CHAT)
        fake.finish(ended.id)
        [event] = asyncio.run(told(BatchCompletedTrigger(conn_id=conn_id, poll_interval=LOOK), 1))
    assert event["batch_id"] == ended.id


def test_a_listing_that_cannot_be_read_to_its_end_is_a_line_in_the_log(
    keyed_server: FakeServer, add_connection: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS G1: what ended beyond it nobody is told of, and somebody has to know."""
    facts = {"password": "sk-right", "host": keyed_server.api_base, "extra": {"provider": "openai"}}
    conn_id = add_connection("cut", conn_type="anybatch", **facts)
    foreign = {"id": "batch_1", "object": "batch", "status": "in_progress", "created_at": int(time.time())}
    for number in range(99):
        body = {"object": "list", "data": [foreign], "has_more": True, "last_id": f"x{number}"}
        keyed_server.fail("GET", "/v1/batches", Respond(200, body))
    # As one look in the life of a watcher, it takes less than the interval.
    asyncio.run(told(BatchCompletedTrigger(conn_id=conn_id, poll_interval=0.3), 0, more=0.9))
    assert caplog.text.count("cannot be read to its end") == 1


@needs(3, "shared streams of triggers")
def test_watchers_of_one_connection_share_its_listing(
    keyed_server: FakeServer, add_connection: Callable[..., str]
) -> None:
    conn_id = add_connection(
        "shared", conn_type="anybatch", password="sk-right", host=keyed_server.api_base,
        extra={"provider": "openai"},
    )  # fmt: skip
    from airflow.triggers.shared_stream import SharedStreamManager

    triggers = [
        BatchCompletedTrigger(conn_id=conn_id, metadata={"team": str(number)}, poll_interval=0.2)
        for number in range(20)
    ]
    keys = {trigger.shared_stream_key() for trigger in triggers}
    assert len(keys) == 1
    [key] = keys

    async def watch() -> None:
        manager = SharedStreamManager(
            log=None, max_subscriber_queue=100, ack_timeout=60, cohort_grace_period=0
        )

        async def one(number: int, trigger: BatchCompletedTrigger) -> None:
            stream = manager.subscribe(trigger_id=number, trigger=trigger, key=key)
            async for _ in trigger.filter_shared_stream(stream):
                pass

        tasks = [asyncio.create_task(one(*pair)) for pair in enumerate(triggers)]
        await until(lambda: keyed_server.count("GET", "/v1/batches") >= 3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await manager.stop_all()

    asyncio.run(watch())
    assert 3 <= keyed_server.count("GET", "/v1/batches") <= 8  # not one for each of twenty


# --- trouble -----------------------------------------------------------------------------------------


def test_trouble_never_ends_a_watch(
    keyed_server: FakeServer, add_connection: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(events, "RETRY_SECONDS", 0.2)
    facts = {"conn_type": "anybatch", "host": keyed_server.api_base, "extra": {"provider": "openai"}}
    conn_id = add_connection("mended", **facts, password="sk-wrong")

    async def watch() -> int:
        trigger = BatchCompletedTrigger(conn_id=conn_id, poll_interval=0.1)
        looks = trigger.open_shared_stream(trigger.serialize()[1])
        seen = 0

        async def count() -> None:
            nonlocal seen
            async for _ in looks:
                seen += 1

        task = asyncio.create_task(count())
        await until(lambda: "the batches cannot be listed" in caplog.text)
        assert seen == 0
        add_connection("mended", **facts, password="sk-right")  # a person mends it
        await until(lambda: seen >= 1)
        keyed_server.fail("GET", "/v1/batches", Respond(500), times=4)
        await until(lambda: "the watch goes on" in caplog.text)
        before = seen
        await until(lambda: seen > before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return seen

    assert asyncio.run(watch()) >= 2
    assert "sk-" not in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


# --- as Airflow keeps it -----------------------------------------------------------------------------


def test_it_survives_serialization_and_keeps_its_identity() -> None:
    trigger = BatchCompletedTrigger(
        provider="openai", api_base="https://x/v1", metadata={"team": None},
        statuses=("completed", "expired"), lookback=60, model="m", endpoint=CHAT,
    )  # fmt: skip
    path, kwargs = trigger.serialize()
    assert path == "anybatch_airflow.events.BatchCompletedTrigger"
    again = BatchCompletedTrigger(**deserialize(json.loads(json.dumps(serialize(kwargs)))))
    assert again.serialize() == (path, kwargs)
    assert again.metadata == {"team": None}
    assert not [name for name, value in kwargs.items() if isinstance(value, dict)]  # for Airflow 3.1
    assert BatchCompletedTrigger.hash(path, kwargs) == BatchCompletedTrigger.hash(*again.serialize())


def test_it_is_what_an_asset_watcher_takes() -> None:
    watcher = AssetWatcher(name="w", trigger=BatchCompletedTrigger(conn_id="c"))
    assert Asset("a", watchers=[watcher]).watchers == [watcher]
    assert BatchCompletedTrigger().conn_id == "anybatch_default"
