"""Rounds, deadlines and what comes after them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    HookLineageCollector,
    TaskDeferred,
)
from airflow.sdk import Asset, AssetAlias
from airflow.sdk.execution_time.context import OutletEventAccessors
from upath import UPath

from anybatch import BatchFailedError, NotFoundError
from anybatch.providers import openai
from anybatch_airflow import AnyBatchHook
from tests.fakes.faults import Respond
from tests.fakes.provider import Auto

from .world import ENDED, HOUR, LATE, requests

if TYPE_CHECKING:
    from pathlib import Path

    from .world import World

# --- rounds ------------------------------------------------------------------------------------------


def test_a_row_that_failed_for_a_while_goes_again_in_the_same_task(world: World) -> None:
    first = world.attempt(max_rounds=2)
    world.fake.expire(world.fake.last.id, done=2)
    second = world.woken(ENDED, max_rounds=2)
    [one, two] = world.created
    assert (list(first.batches), list(second.batches)) == ([one], [two])
    assert world.ti.pushed["batch_ids"] == [one, two]
    world.fake.finish(two)
    assert world.rows_of(two) == ["row-2", "row-3"]
    manifest = world.woken(ENDED, max_rounds=2)
    assert (manifest["rounds"], manifest["counts"]["succeeded"], manifest["rows"]) == (2, 4, 4)
    assert [(batch["id"], batch["rows"], batch["status"]) for batch in manifest["batches"]] == [
        (one, 4, "expired"), (two, 2, "completed"),
    ]  # fmt: skip


def test_without_further_rounds_rows_land_as_they_are(world: World) -> None:
    world.attempt()
    world.fake.expire(world.fake.last.id, done=3)
    manifest = world.woken(ENDED)
    assert (manifest["counts"]["succeeded"], manifest["counts"]["expired"]) == (3, 1)
    assert len(world.created) == 1


def test_a_cancel_at_the_providers_console_costs_only_the_unfinished_rows(world: World) -> None:
    world.attempt()
    world.fake.cancel_now(world.fake.last.id, done=3)
    world.woken(ENDED)
    [_, second] = world.created
    world.fake.finish(second)
    assert world.rows_of(second) == ["row-3"]
    assert world.woken(ENDED)["counts"]["succeeded"] == 4


def test_rounds_on_a_worker_slot(world: World) -> None:
    world.attempt()
    world.fake.expire(world.fake.last.id, done=1)
    world.fake.auto = Auto(looks=1)  # the second round ends while the worker waits
    manifest = world.attempt(max_rounds=2, deferrable=False)
    assert (manifest["rounds"], manifest["counts"]["succeeded"]) == (2, 4)


def test_a_path_that_a_function_returned_is_read_again_for_a_later_round(world: World) -> None:
    place = f"memory://{world.out}/in.jsonl"
    UPath(place).write_text("".join(json.dumps(request) + "\n" for request in requests(2)))
    world.attempt(input=lambda: place, max_rounds=2)
    world.fake.expire(world.fake.last.id, done=1)
    world.woken(ENDED, input=lambda: pytest.fail("called again"), max_rounds=2)
    world.fake.finish(world.fake.last.id)
    assert world.rows_of(world.fake.last.id) == ["row-1"]
    assert world.woken(ENDED, max_rounds=2)["counts"]["succeeded"] == 2


def test_a_batch_refused_as_a_whole_fails_the_attempt_and_not_the_task(world: World) -> None:
    world.attempt()
    world.fake.fail(world.fake.last.id, "token_limit_exceeded", "Enqueued token limit reached")
    with pytest.raises(BatchFailedError, match="token_limit_exceeded") as caught:  # may be retried
        world.woken(ENDED)
    assert not isinstance(caught.value, AirflowFailException)
    trigger = world.attempt()
    assert list(trigger.batches) == [world.created[1]]


def test_two_attempts_at_once_wait_for_one_batch(world: World) -> None:
    with ThreadPoolExecutor(2) as both:
        triggers = list(both.map(lambda _: world.attempt(), range(2)))
    [batch_id] = world.created
    assert [list(trigger.batches) for trigger in triggers] == [[batch_id], [batch_id]]
    world.fake.finish(batch_id)
    with ThreadPoolExecutor(2) as both:
        manifests = list(both.map(lambda _: world.woken(ENDED), range(2)))
    assert manifests[0] == manifests[1]
    assert manifests[0]["counts"]["succeeded"] == 4


# --- the deadline ------------------------------------------------------------------------------------


def test_a_trigger_that_was_early_is_set_again(world: World) -> None:
    first = world.attempt()
    again = world.woken(LATE)  # the triggerer's clock is ahead, or `timeout` was raised meanwhile
    assert again.deadlines == first.deadlines


@pytest.mark.parametrize("policy", ["leave", "cancel", "land_partial"])
def test_a_batch_that_ended_after_all_is_taken(world: World, policy: Any) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR)
    world.fake.finish(world.fake.last.id)
    assert world.woken(LATE, on_timeout=policy)["counts"]["succeeded"] == 4


def test_leave_fails_and_a_retry_takes_what_has_ended(world: World) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR)
    for waking in (lambda: world.woken(LATE), world.attempt):
        with pytest.raises(AirflowException, match="left the batches running") as caught:
            waking()
        assert not isinstance(caught.value, AirflowFailException)
    assert world.server.count("POST", ".*/cancel") == 0
    world.fake.finish(world.fake.last.id)
    assert world.attempt()["counts"]["succeeded"] == 4
    assert len(world.created) == 1


def test_cancel_fails_and_the_next_attempt_submits_the_rest(world: World) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR, on_timeout="cancel")
    world.ago = 0
    with pytest.raises(AirflowException, match="They were cancelled") as caught:
        world.woken(LATE, on_timeout="cancel")
    assert not isinstance(caught.value, AirflowFailException)
    [first] = world.created
    assert world.fake.batches[first].state == "cancelling"
    # The old deadline is over, and the next attempt waits for the end of the cancelling all the same.
    trigger = world.attempt(on_timeout="cancel")
    assert list(trigger.batches) == [first]
    assert trigger.deadlines[first] == pytest.approx(time.time() + HOUR, abs=30)
    world.fake.cancel_now(first, done=3)
    second = world.woken(ENDED, on_timeout="cancel")
    assert list(second.batches) == [world.created[1]]
    world.fake.finish(world.created[1])
    assert world.rows_of(world.created[1]) == ["row-3"]
    manifest = world.woken(ENDED, on_timeout="cancel")
    assert (manifest["counts"]["succeeded"], manifest["rounds"]) == (4, 2)


def timed_out(world: World, **kwargs: Any) -> str:
    """A job whose only batch was cancelled at its deadline, and is ending."""
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR, on_timeout="land_partial")
    world.ago = 0
    trigger = world.woken(LATE, on_timeout="land_partial", **kwargs)
    [batch_id] = world.created
    assert world.fake.batches[batch_id].state == "cancelling"
    assert list(trigger.batches) == [batch_id]
    assert trigger.deadlines[batch_id] == pytest.approx(time.time() + HOUR, abs=30)
    return batch_id


def test_land_partial_lands_what_was_finished(world: World) -> None:
    world.fake.cancel_now(timed_out(world), done=3)
    manifest = world.woken(ENDED, on_timeout="land_partial")
    assert (manifest["counts"]["succeeded"], manifest["counts"]["cancelled"]) == (3, 1)
    assert world.landed() == {
        "row-0": "succeeded", "row-1": "succeeded", "row-2": "succeeded", "row-3": "cancelled",
    }  # fmt: skip
    assert len(world.created) == 1


def test_land_partial_and_no_row_finished(world: World) -> None:
    world.fake.cancel_now(timed_out(world), done=0)
    with pytest.raises(AirflowFailException, match="none of 4 rows succeeded"):
        world.woken(ENDED, on_timeout="land_partial")
    assert set(world.landed().values()) == {"cancelled"}


@pytest.mark.parametrize("ended", [True, False])
def test_land_partial_is_taken_up_by_a_retry(world: World, ended: bool) -> None:
    batch_id = timed_out(world)
    if not ended:  # the worker was killed right after the cancel
        trigger = world.attempt(on_timeout="land_partial")
        assert list(trigger.batches) == [batch_id]
    world.ago = 2 * HOUR - 1  # the provider's record of the batch is as old as its creation
    world.fake.cancel_now(batch_id, done=1)
    manifest = world.attempt(on_timeout="land_partial")
    assert (manifest["counts"]["succeeded"], manifest["counts"]["cancelled"]) == (1, 3)
    assert world.attempt(on_timeout="land_partial") == manifest  # cleared: landed stays landed
    assert len(world.created) == 1


def test_land_partial_fails_where_the_provider_never_ends_the_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = timed_out(world)
    monkeypatch.setattr("anybatch.jobs.policies.CANCEL_TIME", 0.0)  # the hour is over
    for waking in (lambda: world.woken(LATE, on_timeout="land_partial"), world.attempt):
        with pytest.raises(AirflowException, match=f"not ended within an hour: {batch_id} is cancelling"):
            waking()
    world.fake.cancel_now(batch_id, done=2)
    assert world.attempt()["counts"]["cancelled"] == 2  # whatever `on_timeout` is by now


def test_a_foreign_cancel_is_not_taken_for_the_deadlines(world: World) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR, on_timeout="land_partial")
    world.ago = 0
    world.fake.cancel_now(world.fake.last.id, done=1)  # marked failed, long before the deadline
    trigger = world.attempt(on_timeout="land_partial")  # cleared, long after
    [_, second] = world.created
    assert list(trigger.batches) == [second]
    world.fake.finish(second)
    assert world.woken(ENDED, on_timeout="land_partial")["counts"]["succeeded"] == 4


def test_a_provider_that_tells_no_creation_time_has_a_deadline(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_batch = openai.parse_batch
    monkeypatch.setattr(
        openai, "parse_batch", lambda raw, *more: parse_batch({**raw, "created_at": None}, *more)
    )
    first = world.attempt(timeout=2)
    assert world.attempt(timeout=2).deadlines == first.deadlines
    time.sleep(2.1)
    with pytest.raises(AirflowException, match="left the batches running"):
        world.woken(LATE, timeout=2)


def test_a_cancelling_without_a_time_and_an_end_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_batch = openai.parse_batch
    monkeypatch.setattr(
        openai, "parse_batch", lambda raw, *more: parse_batch({**raw, "cancelling_at": None}, *more)
    )
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR)
    with AnyBatchHook(world.conn_id).get_client() as client:
        client.cancel(world.fake.last.id)  # by a person, or on_kill
    trigger = world.attempt()
    assert trigger.deadlines[world.fake.last.id] == pytest.approx(time.time() + HOUR, abs=30)
    monkeypatch.setattr("anybatch.jobs.policies.CANCEL_TIME", 0.0)  # the hour is over
    with pytest.raises(AirflowException, match="not ended at the deadline"):
        world.woken(LATE)


def test_land_partial_on_a_worker_slot(world: World) -> None:
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR)
    world.fake.set_progress(world.fake.last.id, completed=3)
    world.fake.cancel_looks = 0
    manifest = world.attempt(on_timeout="land_partial", deferrable=False)
    assert (manifest["counts"]["succeeded"], manifest["counts"]["cancelled"]) == (3, 1)
    assert len(world.created) == 1


def test_one_that_cannot_be_cancelled_keeps_none_of_the_others(world: World) -> None:
    """FAULTS A4b, its kind: at the deadline, one dead batch left the others running."""
    world.ago = 2 * HOUR
    world.attempt(timeout=3 * HOUR, shard_requests=2)
    world.ago = 0
    first, second = world.created
    world.server.fail("POST", f"/v1/batches/{first}/cancel", Respond(404), times=9)
    with pytest.raises(AirflowException, match=f"cancelled: {second} .*{first} was not cancelled: NotFound"):
        world.woken(LATE, on_timeout="cancel")
    assert world.fake.batches[second].state == "cancelling"


# --- lost batches ------------------------------------------------------------------------------------


def test_shard_requests_splits_the_input_and_a_later_attempt_alike(world: World) -> None:
    """FAULTS A4b, its option: so that one dead batch is a small part."""
    first = world.attempt(shard_requests=3)
    assert [len(world.fake.start(batch_id).ids) for batch_id in world.created] == [3, 1]
    again = world.attempt(shard_requests=1)
    assert list(again.batches) == list(first.batches) == world.created


@pytest.mark.parametrize(("policy", "outlasts"), [("fail", False), ("land", True), ("resubmit", True)])
def test_what_the_trigger_is_told_of_lost_batches(world: World, policy: Any, outlasts: bool) -> None:
    """FAULTS A4b: also in the trigger of a later wait."""
    assert world.attempt(on_lost=policy).outlasts_lost is outlasts
    assert world.woken(LATE, on_lost=policy).outlasts_lost is outlasts


def test_a_lost_batch_that_is_back_is_taken_as_it_stands(world: World) -> None:
    """FAULTS A4b: the event says only that it ended the waiting for itself; the job says what it is."""
    world.attempt(on_lost="land", shard_requests=2)
    first, second = world.created
    world.fake.finish(second)
    event = {**ENDED, "batches": {first: {"lost": "NotFoundError: gone"}, second: {"status": "completed"}}}
    trigger = world.woken(event, on_lost="land", shard_requests=2)
    assert list(trigger.batches) == [first]
    world.fake.finish(first)
    assert world.woken(event, on_lost="land", shard_requests=2)["counts"]["succeeded"] == 4


@pytest.mark.parametrize("policy", ["fail", "land", "resubmit"])
def test_a_lost_batch_is_outlasted_on_a_worker_slot(
    world: World, policy: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """FAULTS A4b: the others were no longer waited for."""
    world.attempt(shard_requests=2)
    first, second = world.created
    operator = world.operator(on_lost=policy, deferrable=False)
    with AnyBatchHook(world.conn_id).get_client() as client:
        running = [client.retrieve(batch_id) for batch_id in world.created]
        world.server.fail("GET", f"/v1/batches/{first}", Respond(404), times=99)
        world.fake.auto = Auto(looks=world.fake.batches[second].looks + 2)
        deadlines = dict.fromkeys(world.created, time.time() + HOUR)
        if policy == "fail":
            with pytest.raises(NotFoundError, match=first):
                operator._wait(client, running, deadlines)
            return
        operator._wait(client, running, deadlines)
    assert world.fake.batches[second].state == "completed"
    assert f"the provider does not know batch {first}" in capfd.readouterr().out


# --- landed ------------------------------------------------------------------------------------------


def test_on_partial_fail_names_rows_and_results(world: World) -> None:
    world.attempt(on_partial="fail")
    world.fake.finish(world.fake.last.id, failed=["row-1"])
    with pytest.raises(AirflowFailException) as caught:
        world.woken(ENDED, on_partial="fail")
    told = str(caught.value)
    assert "1 of 4 rows have no result (3 succeeded, 1 failed)" in told
    assert f"{world.out}/results.jsonl" in told
    assert "'row-1' failed" in told
    assert "hello" not in told
    assert world.landed()["row-1"] == "failed"
    # For tasks that run although this one has failed.
    assert world.ti.pushed["return_value"]["counts"]["failed"] == 1


def test_the_price_makes_a_cost(world: World) -> None:
    world.attempt(price=(10.0, 20.0))
    world.fake.finish(world.fake.last.id)
    manifest = world.woken(ENDED, price=(10.0, 20.0))
    assert manifest["input_tokens"] > 0
    expected = (10 * manifest["input_tokens"] + 20 * manifest["output_tokens"]) / 1e6
    assert manifest["cost"] == pytest.approx(expected)


def test_an_outlet_asset_carries_the_manifest(world: World) -> None:
    asset, events = Asset("answers"), OutletEventAccessors()
    world.attempt()
    world.fake.finish(world.fake.last.id)
    operator = world.operator(outlets=[asset, AssetAlias("others")])
    manifest = operator.execute_complete({**world.context, "outlet_events": events}, ENDED)
    assert events[asset].extra == manifest


def test_links_and_lineage_are_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = HookLineageCollector()
    monkeypatch.setattr("airflow.providers.common.compat.sdk.get_hook_lineage_collector", lambda: collector)
    place = tmp_path / "in.jsonl"
    place.write_text("".join(json.dumps(request) + "\n" for request in requests(1)))
    world.attempt(input=str(place))
    assert world.ti.pushed["batch_url"] == ""  # a server of one's own has no console that we know
    world.fake.finish(world.fake.last.id)
    operator = world.operator(input=str(place))
    manifest = operator.execute_complete(world.context, ENDED)
    told = collector.collected_assets
    assert f"file://{place}" in {found.asset.uri for found in told.inputs}
    assert f"file://{world.out}/results.jsonl" in {found.asset.uri for found in told.outputs}
    assert operator.manifest == manifest


def test_what_only_the_first_stretch_knows_comes_back_in_the_event(world: World, tmp_path: Path) -> None:
    """FAULTS I1, its kind: the file behind a table that a function names, and the name of the task instance,
    also after a second wait."""
    table = tmp_path / "table.csv"
    table.write_text("key,text\na,Hello\nb,World\n")
    context = {**world.context, "map_index_template": "{{ which }}"}

    def named() -> str:
        context["which"] = "the first"
        return str(table)

    options = {"input": named, "prompt": "Sum up: {text}", "id_column": "key", "model": "gpt-x",
               "max_rounds": 2}  # fmt: skip
    with pytest.raises(TaskDeferred) as caught:
        world.operator(**options).execute(context)
    world.fake.expire(world.fake.last.id, done=1)
    again = {**world.context, "map_index_template": "{{ which }}"}
    with pytest.raises(TaskDeferred) as second:
        world.operator(**options).execute_complete(again, {**ENDED, "then": caught.value.trigger.then})
    assert second.value.trigger.then == caught.value.trigger.then
    world.fake.finish(world.fake.last.id)
    last, operator = {**world.context, "map_index_template": "{{ which }}"}, world.operator(**options)
    operator.execute_complete(last, {**ENDED, "then": second.value.trigger.then})
    assert operator.get_template_env().from_string(last["map_index_template"]).render(last) == "the first"
    [read] = operator.get_openlineage_facets_on_complete(None).inputs
    assert (read.namespace, read.name) == ("file", str(table))


def test_a_signed_address_is_not_in_a_trigger(world: World) -> None:
    """FAULTS I1, its kind: what is carried over the wait lies in the metadata database."""
    place = UPath(f"memory://{world.out}/in.jsonl?signature=secret")
    place.write_text("".join(json.dumps(request) + "\n" for request in requests(2)))
    trigger = world.attempt(input=lambda: place)
    assert "secret" not in json.dumps(trigger.serialize())


@pytest.mark.parametrize("timeout", [90, timedelta(seconds=90)])
def test_seconds_or_a_timedelta(world: World, timeout: Any) -> None:
    assert world.operator(timeout=timeout).timeout == timedelta(seconds=90)


# --- a table as input --------------------------------------------------------------------------------


def test_a_table_and_a_prompt(world: World, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("key,text\na,Hello {{ ti }}\nb,World\n")
    options = {
        "input": str(table), "prompt": "Sum up: {text}", "id_column": "key", "model": "gpt-x",
        "system": "Be brief.", "body": {"max_tokens": 9}, "max_rounds": 2,
    }  # fmt: skip
    world.attempt(**options)
    [file] = [file for file in world.fake.files.values() if file.purpose == "batch"]
    lines = [json.loads(line) for line in file.data.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    assert lines[0]["body"] == {
        "model": "gpt-x", "max_tokens": 9,
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sum up: Hello {{ ti }}"},
        ],
    }  # fmt: skip
    # A later round takes the requests that were made, the table is not read again.
    table.unlink()
    world.fake.expire(world.fake.last.id, done=1)
    world.woken(ENDED, **options)
    world.fake.finish(world.fake.last.id)
    assert world.rows_of(world.fake.last.id) == ["b"]
    assert world.woken(ENDED, **options)["counts"]["succeeded"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input": "/in/table.csv"}, "give `prompt`"),
        ({"input": "/in/table.PARQUET"}, "give `prompt`"),
        ({"prompt": "{text}"}, "each request needs a `model`"),
        ({"id_column": "key", "system": "s"}, "id_column and system: only with `prompt`"),
        ({"body": {"max_tokens": 1}}, "body: only with `prompt`"),
        ({"input": [{"text": "a"}], "prompt": "{no_such}", "model": "m"}, "no_such"),
    ],
)
def test_a_table_that_cannot_be_right(world: World, options: dict[str, Any], named: str) -> None:
    with pytest.raises(AirflowFailException, match=named):
        world.attempt(**options)
    assert not world.created
