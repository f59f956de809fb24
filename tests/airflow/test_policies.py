"""What operators and sensors decide, by tables."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import conf

from anybatch import Batch, BatchRecord, BatchStatus, ConfigurationError, Outcome, Report
from anybatch.jobs.ledger import Ledger, ShardRecord
from anybatch_airflow import AnyBatchCancelOperator, AnyBatchOperator, AnyBatchSensor
from anybatch_airflow.account import waits_deferred
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.policies import (
    Move,
    deadline_of,
    deadlines_of,
    manifest_of,
    next_move,
    told,
    too_many_failed,
)
from anybatch_airflow.sensors import can_start_from_trigger
from anybatch_airflow.triggers import conclusion

if TYPE_CHECKING:
    from pathlib import Path

    from anybatch.jobs.options import OnTimeout

HOUR = 3600
NOW = 1_800_000_000
XCOM = AnyBatchOperator(task_id="other", input=[], output="o").output


def batch(status: str, created_at: int | None = None, cancelling_at: int | None = None) -> Batch:
    return Batch(
        id="b", status=BatchStatus(status), created_at=created_at, cancelling_at=cancelling_at,
        provider="p", raw_status=status,
    )  # fmt: skip


def report(rounds: int = 1, **counts: int) -> Report:
    outcomes = {Outcome(name): count for name, count in counts.items()}
    record = BatchRecord(id="b1", shard=0, round=0, rows=3, status=BatchStatus.COMPLETED)
    return Report(
        job="j", provider="p", endpoint="e", rows=sum(counts.values()), counts=outcomes, started_at=0,
        finished_at=1, duration_s=1, results="r", rounds=rounds, batches=(record,),
    )  # fmt: skip


# --- the deadline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "created_at", "cancelling_at", "expected"),
    [
        ("in_progress", NOW, None, NOW + 2 * HOUR),
        ("in_progress", None, None, NOW + HOUR),  # a provider that does not tell: by our own record
        ("in_progress", NOW - 9 * HOUR, None, NOW - 7 * HOUR),  # over: it does not begin anew
        ("cancelling", NOW - 9 * HOUR, None, NOW + HOUR),
        ("cancelling", NOW - 9 * HOUR, NOW - 600, NOW - 600 + HOUR),
        ("cancelling", NOW, NOW, NOW + 2 * HOUR),  # never earlier than without
        ("cancelling", NOW - 9 * HOUR, NOW - 3 * HOUR, NOW - 2 * HOUR),  # nor for ever
    ],
)
def test_the_deadline_of_a_batch(
    status: str, created_at: int | None, cancelling_at: int | None, expected: int
) -> None:
    given = batch(status, created_at, cancelling_at)
    assert deadline_of(given, timedelta(hours=2), NOW - HOUR, NOW) == expected


def ledger(stopped_at: float | None = None, **shards: float | None) -> Ledger:
    """A ledger of these batches, and when their creation began."""
    records = tuple(
        ShardRecord(shard=number, first_row=0, rows=1, batch_id=batch_id, creating_at=creating_at)
        for number, (batch_id, creating_at) in enumerate(shards.items())
    )
    return Ledger(
        job="j", fingerprint="f", provider="p", api_base="a", endpoint="e", rows=1, created_at=NOW - 3 * HOUR,
        shards=records, stopped_at=stopped_at,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "batches", "expected"),
    [
        (ledger(b=None), [], {}),
        (ledger(b=None), [batch("completed", NOW), batch("cancelled", NOW)], {}),
        (ledger(b=NOW - 60), [batch("in_progress", NOW)], {"b": NOW + 2 * HOUR}),
        (ledger(b=NOW - 60), [batch("in_progress")], {"b": NOW - 60 + 2 * HOUR}),
        (ledger(b=None), [batch("in_progress")], {"b": NOW - HOUR}),  # the job's beginning
        (ledger(other=NOW), [batch("in_progress")], {"b": NOW - HOUR}),
        (ledger(NOW - 60, b=NOW), [batch("cancelling", NOW)], {"b": NOW - 60 + HOUR}),
        (ledger(NOW - 9 * HOUR, b=NOW), [batch("in_progress", NOW)], {"b": NOW - 8 * HOUR}),
    ],
)
def test_what_runs_has_a_deadline(record: Ledger, batches: list[Batch], expected: dict[str, float]) -> None:
    assert deadlines_of(batches, record, timedelta(hours=2), NOW) == expected


@pytest.mark.parametrize("record", [ledger(NOW - 60, b=NOW), ledger(b=NOW)])
def test_a_batch_that_may_be_done_without_has_a_little_longer_to_end_being_cancelled(record: Ledger) -> None:
    """FAULTS A4b: the job, which says that it is lost, must be asked when its own hour is over."""
    given, no_time = [batch("cancelling", NOW - 9 * HOUR, NOW - 60)], timedelta(0)
    expected = {"b": NOW - 60 + HOUR + 300}
    assert deadlines_of(given, record, no_time, NOW, outlasts_lost=True) == expected


@pytest.mark.parametrize(
    ("deadlines", "on_timeout", "is_stopped", "expected"),
    [
        ([], "cancel", False, Move.LAND),
        ([], "leave", True, Move.LAND),
        ([NOW + 1, NOW + 9], "cancel", False, Move.WAIT),
        ([NOW + 1], "land_partial", True, Move.WAIT),
        ([NOW], "leave", False, Move.LEAVE),
        ([NOW + 9, NOW - 9], "cancel", False, Move.CANCEL),
        ([NOW - 9], "land_partial", False, Move.STOP),
        ([NOW - 9], "land_partial", True, Move.GIVE_UP),
        ([NOW - 9], "leave", True, Move.GIVE_UP),  # changed since
    ],
)
def test_what_comes_next(
    deadlines: list[float], on_timeout: OnTimeout, is_stopped: bool, expected: Move
) -> None:
    assert next_move(deadlines, on_timeout, is_stopped=is_stopped, now=NOW) is expected


# --- landed, and good enough? ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "ratio", "fails"),
    [
        ({"succeeded": 1, "failed": 99}, None, False),
        ({"failed": 2}, None, True),
        ({"expired": 1, "missing": 1}, None, True),
        ({}, None, False),
        ({}, 0.0, False),
        ({"succeeded": 9, "failed": 1}, 0.1, False),
        ({"succeeded": 9, "expired": 1}, 0.09, True),
        ({"succeeded": 9}, 0.0, False),
        ({"succeeded": 9, "cancelled": 1}, 0.0, True),
        ({"failed": 3}, 1.0, False),
    ],
)
def test_the_share_of_failed_rows_decides(counts: dict[str, int], ratio: float | None, fails: bool) -> None:
    assert bool(too_many_failed(report(**counts), ratio)) is fails


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    ("counts", "fails"),
    [
        ({"succeeded": 99, "missing": 1}, "1 of 100 rows have no result (99 succeeded, 1 missing)"),
        ({"succeeded": 100}, None),
        ({}, None),
    ],
)
def test_on_partial_fail_accepts_no_gap(
    counts: dict[str, int], fails: str | None, ratio: float | None
) -> None:
    problem = too_many_failed(report(**counts), ratio, "fail")
    assert (problem is None) if fails is None else (problem is not None and problem.startswith(fails))


def test_the_log_line_of_a_job() -> None:
    full = report(succeeded=1200, failed=3).model_copy(update={"cost": 1.25})
    full = full.model_copy(update={"usage": full.usage.model_copy(update={"input_tokens": 54321})})
    assert told(full) == "1,203 rows: 1,200 succeeded, 3 failed; 54,321 tokens in, 0 out; $1.2500"
    assert told(report()) == "0 rows: none"


def test_the_manifest_names_rounds_and_batches() -> None:
    manifest = manifest_of(report(rounds=2, succeeded=3))
    assert manifest["rounds"] == 2
    assert manifest["batch_ids"] == ["b1"]
    assert manifest["batches"] == [{"id": "b1", "shard": 0, "round": 0, "rows": 3, "status": "completed"}]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (
            {"a": {"status": "completed"}, "b": {"status": "expired"}},
            ("ended", "a is completed, b is expired"),
        ),
        ({"a": {"status": "completed"}, "b": {"timeout": True}}, ("timeout", "not ended at the deadline: b")),
        ({"a": {"error": "gone"}, "b": {"timeout": True}}, ("error", "a: gone")),
    ],
)
def test_what_the_event_says(batches: dict[str, Any], expected: tuple[str, str]) -> None:
    assert conclusion(batches) == expected


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("batch_1", ["batch_1"]),
        (["batch_1", "batch_2", "batch_1"], ["batch_1", "batch_2"]),
        (("batch_1",), ["batch_1"]),
        ("['batch_1', 'batch_2']", ["batch_1", "batch_2"]),  # a list through a template
        ('["batch_1"]', ["batch_1"]),
    ],
)
def test_batch_ids(given: Any, expected: list[str]) -> None:
    assert batch_ids(given) == expected


@pytest.mark.parametrize("given", ["", " ", [], "[]", None, "[batch_1]", [None], [3]])
def test_what_holds_no_id(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="batch_id"):
        batch_ids(given)


@pytest.mark.parametrize(
    ("fields", "renders", "expected"),
    [
        (["batch_1", None, "openai", None], False, True),
        ([["batch_1", "batch_2"], "my_conn"], False, True),
        (["{{ params.id }}", None], True, True),
        (["{{ params.id }}", None], False, False),
        (["{{ ti.xcom_pull('create') }}", None], True, False),
        ([["batch_1", "{{ params.id }}"]], False, False),
        (["batch_1", "{% if x %}a{% endif %}"], False, False),
        ([XCOM], True, False),
        ([[XCOM]], True, False),
    ],
)
def test_what_can_start_in_the_triggerer(fields: list[Any], renders: bool, expected: bool) -> None:
    assert can_start_from_trigger(fields, renders) is expected


@pytest.mark.parametrize(
    ("given", "environment", "file", "expected"),
    [
        (None, None, None, True),  # Airflow's own default of False is nobody's wish
        (None, "False", None, False),
        (None, "True", None, True),
        (None, None, "False", True),  # Airflow has written it there itself
        (None, None, "True", True),
        (None, "False", "True", False),
        (True, "False", None, True),
        (False, "True", None, False),
    ],
)
def test_deferrable_by_default(
    monkeypatch: pytest.MonkeyPatch, given: bool | None, environment: str | None, file: str | None,
    expected: bool,
) -> None:  # fmt: skip
    monkeypatch.delenv("AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE", raising=False)
    if environment is not None:
        monkeypatch.setenv("AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE", environment)
    if file is not None:
        conf.read_string(f"[operators]\ndefault_deferrable = {file}\n")
    try:
        assert waits_deferred(given) is expected
        made = (
            AnyBatchOperator(task_id="t", input=[], output="o", deferrable=given),
            AnyBatchSensor(task_id="t", batch_id="b", deferrable=given),
            AnyBatchCancelOperator(task_id="t", batch_id="b", deferrable=given),
        )
        assert {operator.deferrable for operator in made} == {expected}
    finally:
        if file is not None:
            conf.remove_option("operators", "default_deferrable", remove_default=False)


@pytest.mark.parametrize("wrong", [{"on_timeout": "land"}, {"on_partial": "resubmit"}])
def test_an_unknown_policy_breaks_the_dag_and_not_the_run(wrong: dict[str, Any], tmp_path: Path) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"^{name}: "):
        AnyBatchOperator(task_id="t", input=[], output=tmp_path, **wrong)
