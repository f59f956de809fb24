"""The value of a result asset, through an IO manager, for one partition and for several in one run."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from pydantic import BaseModel

from anybatch import Outcome, Report, Row
from anybatch_dagster import BatchAssets, batch_asset, build_batch_assets
from anybatch_dagster.values import split_report

from .conftest import Provider, request

NOW = "local:echo?delay=0"
RESULT = dg.AssetKey("reviews")
DAYS = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-02-01")
PLACES = dg.StaticPartitionsDefinition(["a/b", "..", "x|y"])
MULTI = dg.MultiPartitionsDefinition({"day": DAYS, "place": dg.StaticPartitionsDefinition(["fr", "de"])})
FILES = dg.DynamicPartitionsDefinition(name="files")


class Answer(BaseModel):
    kind: str


def make_reviews(model: str = NOW, **options: Any) -> BatchAssets:
    @batch_asset(**options)
    def reviews() -> Iterator[dict[str, Any]]:
        yield request("a", "hello", model)
        yield request("b", "there", model)

    return reviews


def run(
    provider: Provider, instance: dg.DagsterInstance, assets: Any, **arguments: Any
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [*assets], instance=instance, resources=provider.resources, raise_on_error=False, **arguments
    )


def told(result: dg.ExecuteInProcessResult, partition: str | None = None) -> dict[str, Any]:
    (event,) = [
        event
        for event in result.get_asset_materialization_events()
        if event.asset_key == RESULT and event.partition == partition
    ]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def rows_of(report: Report) -> int:
    return report.rows


def test_a_path(provider: Provider, instance: dg.DagsterInstance) -> None:
    result = run(provider, instance, make_reviews())
    assert result.asset_value(RESULT) == told(result)["anybatch/results"]


def test_rows(provider: Provider, instance: dg.DagsterInstance) -> None:
    got = run(provider, instance, make_reviews(value="rows")).asset_value(RESULT)
    assert [type(row) for row in got] == [Row, Row]
    assert got[0].result.choices[0].message.content.startswith("hello")


def test_a_dataframe(provider: Provider, instance: dg.DagsterInstance) -> None:
    got = run(provider, instance, make_reviews(value="dataframe")).asset_value(RESULT)
    assert isinstance(got, pd.DataFrame)
    assert list(got.columns) == ["custom_id", "outcome", "content", "error"]
    assert list(got["custom_id"]) == ["a", "b"]
    assert got["content"][1].startswith("there")


def test_an_arrow_table(provider: Provider, instance: dg.DagsterInstance) -> None:
    arrow = pytest.importorskip("pyarrow")
    got = run(provider, instance, make_reviews(value="arrow")).asset_value(RESULT)
    assert isinstance(got, arrow.Table)
    assert got.column("outcome").to_pylist() == ["succeeded", "succeeded"]


def test_what_a_function_makes_of_the_report(provider: Provider, instance: dg.DagsterInstance) -> None:
    assert run(provider, instance, make_reviews(value=rows_of)).asset_value(RESULT) == 2


def test_a_run_of_the_check_alone_makes_no_value(provider: Provider, instance: dg.DagsterInstance) -> None:
    reports: list[Report] = []
    assets = make_reviews(value=reports.append)
    assert run(provider, instance, assets).success
    assert len(reports) == 1
    check = dg.AssetSelection.checks(dg.AssetCheckKey(RESULT, "error_rate"))
    result = run(provider, instance, assets, selection=check)
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]
    assert result.get_asset_materialization_events() == []
    assert len(reports) == 1


def test_none_goes_past_the_io_manager(provider: Provider, instance: dg.DagsterInstance) -> None:
    assert "path" not in told(run(provider, instance, make_reviews(value="none")))


@pytest.mark.parametrize("value", ["rows", "dataframe", Answer])
@pytest.mark.parametrize("cut", ["line", "half a line"])
def test_results_that_are_shorter_than_their_report_do_not_pass_for_the_whole(
    cut: str, value: Any, provider: Provider, instance: dg.DagsterInstance
) -> None:
    """Row A2: the asset was materialized with the rows that were left, and the figures of all."""
    results = Path(str(told(run(provider, instance, make_reviews()))["anybatch/results"]))
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(lines[0] + (lines[1][:20] if cut == "half a line" else b""))
    result = run(provider, instance, make_reviews(value=value), selection=[RESULT])
    assert not result.success
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    message = str(event.step_failure_data.error)
    assert "was changed after it landed" in message
    assert "its report counts 2" in message or "in line 2" in message


def test_a_partition_whose_rows_are_cut_off_does_not_pass_for_one_without_any(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    """Row A2: "nothing was asked for these" was concluded of whatever was missing in the file."""

    def by_day(context: dg.AssetExecutionContext) -> Mapping[str, list[dict[str, Any]]]:
        return {day: [request("a", "hello", NOW)] for day in context.partition_keys}

    assets = build_batch_assets(
        by_day, name="reviews", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run()
    )
    tags = {
        "dagster/asset_partition_range_start": "2026-01-01",
        "dagster/asset_partition_range_end": "2026-01-02",
    }
    assert run(provider, instance, assets, tags=tags).success
    found = Path(str(provider.resource.output)).rglob("results.jsonl")
    (results,) = [path for path in found if "partitions" not in path.parts]
    results.write_bytes(results.read_bytes().splitlines(keepends=True)[0])
    assert not run(provider, instance, assets, tags=tags, selection=[RESULT]).success


SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema()}}


def structured(custom_id: str, *, schema: bool) -> dict[str, Any]:
    line = request(custom_id, "hello", NOW)
    return {**line, "body": {**line["body"], **({"response_format": SCHEMA} if schema else {})}}


def make_answers(**options: Any) -> BatchAssets:
    @batch_asset(name="reviews", value=Answer, **options)
    def answers() -> Iterator[dict[str, Any]]:
        yield structured("good", schema=True)
        yield structured("bad", schema=False)  # plain text comes back

    return answers


def test_objects_of_a_model_and_an_account_of_what_is_none(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    result = run(provider, instance, make_answers(max_failed_ratio=0.4))
    got = result.asset_value(RESULT)
    assert list(got) == ["good"]
    assert isinstance(got["good"], Answer)
    assert told(result)["anybatch/invalid"] == 1
    assert told(result)["anybatch/error_rate"] == 0.5
    (check,) = result.get_asset_check_evaluations()
    assert not check.passed
    assert "bad: " in check.metadata["anybatch/invalid_examples"].value[0]


def test_an_answer_that_is_no_such_model_is_a_row_without_a_result(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    result = run(provider, instance, make_answers(on_partial="fail"))
    assert not result.success
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    assert "1 of 2 rows have no result (1 succeeded, 1 invalid)" in str(event.step_failure_data.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "csv"}, "value: path, rows"),
        ({"value": dict}, "value: path, rows"),
        ({"on_partial": "resubmit"}, "on_partial: must be 'keep' or 'fail'"),
        ({"on_lost": "forget"}, "on_lost: must be 'fail' or 'land' or 'resubmit'"),
        ({"on_timeout": "stop"}, "on_timeout: must be 'leave' or 'cancel' or 'land_partial'"),
        ({"system": "Be short."}, "system: only with `prompt`"),
        ({"prompt": "{text}"}, "each request needs a `model`"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_defined(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dg.DagsterInvalidDefinitionError, match=message.replace("(", r"\(")):
        make_reviews(**options)


# --- tables in ---------------------------------------------------------------------------------------


def frame() -> Any:
    return pd.DataFrame({"id": [7, 8], "text": ["red", "blue"]})


def rows() -> list[dict[str, Any]]:
    return [{"id": 7, "text": "red"}, {"id": 8, "text": "blue"}]


def generated() -> Iterator[dict[str, Any]]:
    yield from rows()


def chunks() -> Iterator[Any]:
    yield from (frame()[:1], frame()[1:])


@pytest.mark.parametrize("function", [frame, rows, generated, chunks])
def test_with_a_prompt_the_function_returns_a_table(
    function: Any, provider: Provider, instance: dg.DagsterInstance
) -> None:
    options = {
        "prompt": "Name the colour {text}",
        "id_column": "id",
        "model": NOW,
        "body": {"max_tokens": 50},
    }
    assets = build_batch_assets(function, name="reviews", value="dataframe", system="Be short.", **options)
    got = run(provider, instance, assets).asset_value(RESULT)
    assert list(got["custom_id"]) == ["7", "8"]
    assert "Name the colour blue" in got["content"][1]


def test_a_dataframe_of_an_upstream_asset(provider: Provider, instance: dg.DagsterInstance) -> None:
    @dg.asset
    def colours() -> pd.DataFrame:
        return frame()  # type: ignore[no-any-return]

    @batch_asset(prompt="Name {text}", id_column="id", model=NOW)
    def reviews(colours: pd.DataFrame) -> pd.DataFrame:
        return colours[colours["id"] == 8]

    assert told(run(provider, instance, [colours, *reviews]))["anybatch/requests"] == 1


# --- several partitions ------------------------------------------------------------------------------


def ranged(first: str, last: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


def lines(key: str, number: int) -> Iterator[dict[str, Any]]:
    for row in range(number):
        yield request(f"row-{row}", key, NOW)


def parts(definition: Any, **options: Any) -> BatchAssets:
    """One row for the first partition, two for the second, none for the last."""

    @batch_asset(
        name="reviews", partitions_def=definition, backfill_policy=dg.BackfillPolicy.single_run(), **options
    )
    def make(context: dg.AssetExecutionContext) -> Mapping[str, Any]:
        numbers = {key: min(number + 1, 2) for number, key in enumerate(context.partition_keys)}
        numbers[context.partition_keys[-1]] = 0 if len(numbers) > 1 else 1
        return {key: lines(key, number) for key, number in numbers.items()}

    return make


@pytest.mark.filterwarnings("ignore:Parameter `backfill_policy`")  # Dagster calls it beta
@pytest.mark.parametrize(
    ("definition", "keys"),
    [
        (DAYS, ["2026-01-01", "2026-01-02", "2026-01-03"]),
        (PLACES, ["a/b", "..", "x|y"]),
        (MULTI, ["2026-01-01|de", "2026-01-02|de", "2026-01-03|de"]),
        (FILES, ["one", "two", "three"]),
    ],
)
def test_a_run_over_several_partitions_is_one_batch_with_a_value_for_each(
    definition: Any, keys: list[str], provider: Provider, instance: dg.DagsterInstance
) -> None:
    instance.add_dynamic_partitions("files", ["one", "two", "three"])
    seen: dict[str, Any] = {}

    @dg.asset(partitions_def=definition, backfill_policy=dg.BackfillPolicy.single_run())
    def downstream(reviews: dict[str, Any]) -> None:
        seen.update(reviews)

    assets = [*parts(definition, value="dataframe"), downstream]
    result = run(provider, instance, assets, tags=ranged(keys[0], keys[-1]))
    assert result.success
    assert len(provider.ids()) == 1
    assert set(seen) == set(keys)
    assert [list(seen[key]["custom_id"]) for key in keys] == [["row-0"], ["row-0", "row-1"], []]
    assert all(keys[1] in text for text in seen[keys[1]]["content"])
    first, second = told(result, keys[0]), told(result, keys[1])
    assert (first["anybatch/requests"], second["anybatch/requests"]) == (1, 2)
    assert first["path"] != second["path"]
    assert first["anybatch/batches"] == second["anybatch/batches"] == provider.ids()[0]
    assert first["anybatch/input_tokens"] > 0


def test_a_run_of_one_partition_takes_the_same_function(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    assets = parts(DAYS, value="dataframe")
    result = run(provider, instance, assets, partition_key="2026-01-05")
    assert list(result.asset_value(RESULT)["custom_id"]) == ["row-0"]


def test_each_value_of_a_path_is_of_its_partition_alone(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    result = run(provider, instance, parts(DAYS), tags=ranged("2026-01-01", "2026-01-03"))
    path = told(result, "2026-01-02")["anybatch/results"]
    with open(path, encoding="utf-8") as file:
        assert len(file.readlines()) == 2


def test_a_table_for_each_partition_by_a_prompt(provider: Provider, instance: dg.DagsterInstance) -> None:
    @batch_asset(
        name="reviews",
        partitions_def=DAYS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        value="dataframe",
        prompt="Name {text}",
        model=NOW,
    )
    def make(context: dg.AssetExecutionContext) -> Mapping[str, Any]:
        return {key: rows() for key in context.partition_keys}

    tags = ranged("2026-01-01", "2026-01-02")
    result = run(provider, instance, make, tags=tags)
    assert told(result, "2026-01-02")["anybatch/requests"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([request("a")], "do not say which partition each is for"),
        ({"2026-01-09": [request("a")]}, "not partitions of this run: 2026-01-09"),
        (None, "do not say which partition each is for"),
    ],
)
def test_requests_that_belong_nowhere_are_refused_before_anything_is_sent(
    given: Any, message: str, provider: Provider, instance: dg.DagsterInstance
) -> None:
    assets = build_batch_assets(
        lambda: given, name="reviews", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run()
    )
    result = run(provider, instance, assets, tags=ranged("2026-01-01", "2026-01-02"))
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    assert message in str(event.step_failure_data.error)
    assert provider.ids() == []


def request_file(folder: Path) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(request(name, NOW, NOW)) + "\n" for name in "ab"))
    return path


@pytest.mark.parametrize("shape", ["lists", "file"])
def test_requests_of_a_partition_in_parts(
    shape: str, provider: Provider, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    given: Any = (
        [[request("a", model=NOW)], [request("b", model=NOW)]] if shape == "lists" else request_file(tmp_path)
    )
    assets = build_batch_assets(
        lambda context: dict.fromkeys(context.partition_keys, given),
        name="reviews", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run(),
    )  # fmt: skip
    result = run(provider, instance, assets, tags=ranged("2026-01-01", "2026-01-02"))
    assert told(result, "2026-01-02")["anybatch/requests"] == 2


@pytest.mark.parametrize(
    ("given", "prompt", "message"),
    [
        (frame(), None, "partition 2026-01-02: DataFrame is a table, not request lines: give `prompt`"),
        ("table.csv", None, "partition 2026-01-02: table.csv is a table, not request lines"),
        (
            request("a"),
            None,
            "partition 2026-01-02: request lines must be a path or an iterable of mappings, not d",
        ),
        (
            {"text": ["x"]},
            "{text}",
            "partition 2026-01-02: a table must be a path, a frame or an iterable of rows",
        ),
        ([7], "{text}", "partition 2026-01-02: the table: 1 problem"),
        (None, "{text}", "partition 2026-01-02: the function returned None"),
    ],
)
def test_what_is_no_table_of_a_partition(
    given: Any, prompt: str | None, message: str, provider: Provider, instance: dg.DagsterInstance
) -> None:
    """G2: a table for which there is no prompt, and what is none, are named with their partition."""
    good: Any = rows() if prompt else [request("a")]
    assets = build_batch_assets(
        lambda: {"2026-01-01": good, "2026-01-02": given},
        name="reviews", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run(),
        prompt=prompt, model=NOW,
    )  # fmt: skip
    result = run(provider, instance, assets, tags=ranged("2026-01-01", "2026-01-02"))
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    assert message in str(event.step_failure_data.error)
    assert provider.ids() == []


def test_without_a_value_plain_requests_do_for_several_partitions(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    assets = make_reviews(value="none", partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    tags = ranged("2026-01-01", "2026-01-03")
    result = run(provider, instance, assets, tags=tags)
    events = [event for event in result.get_asset_materialization_events() if event.asset_key == RESULT]
    assert [event.partition for event in events] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    one = run(provider, instance, assets, partition_key="2026-01-02", selection=[RESULT])
    (event,) = [event for event in one.all_events if event.event_type_value == "STEP_FAILURE"]
    assert "one batch for 3 partitions, 2026-01-01 to 2026-01-03" in str(event.step_failure_data.error)


def test_a_partition_costs_what_its_own_rows_cost(tmp_path: Path) -> None:
    """B5: the job's cost was divided by rows."""

    def line(custom_id: str, usage: dict[str, Any]) -> str:
        response = {"status_code": 200, "request_id": None, "body": {"usage": usage}}
        row = {"outcome": "succeeded", "custom_id": custom_id, "response": response, "error": None}
        return json.dumps(row, separators=(",", ":")) + "\n"

    def costs(price: tuple[float, float] | None, *usages: dict[str, Any]) -> list[float | None]:
        ids = ["long/a", "short/a"]
        results = tmp_path / "results.jsonl"
        results.write_text("".join(map(line, ids, usages)))
        report = Report(
            job="j", provider="p", endpoint="e", rows=2, counts={Outcome.SUCCEEDED: 2}, cost=1.0,
            started_at=0, finished_at=1, duration_s=1, results=str(results), batches=(),
        )  # fmt: skip
        return [part.cost for part in split_report(report, ["long", "short"], price).values()]

    assert costs(None, {"cost": 0.9}, {"cost": 0.1}) == [0.9, 0.1]
    tokens = {"prompt_tokens": 900_000}, {"completion_tokens": 50_000, "prompt_tokens": 0}
    assert costs((1.0, 2.0), *tokens) == [0.9, 0.1]
    assert costs(None, *tokens) == [None, None]
