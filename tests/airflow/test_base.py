"""What operators and sensors decide, by tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, conf

from anybatch import BatchRecord, BatchStatus, ConfigurationError, Outcome, Report, errors
from anybatch.jobs import policies
from anybatch_airflow import AnyBatchCancelOperator, AnyBatchOperator, AnyBatchSensor
from anybatch_airflow.base import check_event, final_errors_skip_retries, waits_deferred
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.reporting import CANCEL_TIME, manifest_of, report_text
from anybatch_airflow.sensors import can_start_from_trigger
from anybatch_airflow.triggers import status_and_message
from tests.test_failures import ERRORS, KINDS

if TYPE_CHECKING:
    from pathlib import Path

HOUR = 3600
NOW = 1_800_000_000
XCOM = AnyBatchOperator(task_id="other", input=[], output="o").output


def report(rounds: int = 1, **counts: int) -> Report:
    outcomes = {Outcome(name): count for name, count in counts.items()}
    record = BatchRecord(id="b1", shard=0, round=1, rows=3, status=BatchStatus.COMPLETED)
    return Report(
        job="j", provider="p", endpoint="e", rows=sum(counts.values()), counts=outcomes, started_at=0,
        finished_at=1, duration_s=1, results="r", rounds=rounds, batches=(record,),
    )  # fmt: skip


def test_the_log_line_of_a_job() -> None:
    full = report(succeeded=1200, failed=3).model_copy(update={"cost": 1.25})
    full = full.model_copy(update={"usage": full.usage.model_copy(update={"input_tokens": 54321})})
    assert report_text(full) == "1,203 rows: 1,200 succeeded, 3 failed; 54,321 tokens in, 0 out; $1.2500"
    assert report_text(report()) == "0 rows: none"


def test_the_manifest_names_rounds_and_batches() -> None:
    manifest = manifest_of(report(rounds=2, succeeded=3))
    assert manifest["rounds"] == 2
    assert manifest["batch_ids"] == ["b1"]
    assert manifest["batches"] == [{"id": "b1", "shard": 0, "round": 1, "rows": 3, "status": "completed"}]


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
    assert status_and_message(batches) == expected


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


def test_the_defaults_are_the_core_s() -> None:
    assert policies.CANCEL_TIME == CANCEL_TIME


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_no_retry_cures_fails_the_task_at_once(error: errors.AnyBatchError) -> None:
    final = KINDS[type(error).__name__].is_final
    with pytest.raises(AirflowFailException if final else type(error)), final_errors_skip_retries():
        raise error


@pytest.mark.parametrize("final", [True, False])
def test_what_no_retry_cures_fails_the_task_after_a_wait_too(final: bool) -> None:
    with pytest.raises(AirflowException, match="no") as caught:
        check_event({"status": "error", "batches": {}, "message": "no", "final": final})
    assert isinstance(caught.value, AirflowFailException) is final
