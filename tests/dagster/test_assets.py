"""`@batch_asset`: what it defines, and what its two assets do."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import inspect
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest

import anybatch_dagster
from anybatch import Client, Job, join_results
from anybatch.errors import AnyBatchError
from anybatch_dagster import BatchAssets, SubmitConfig, batch_asset, build_batch_assets
from anybatch_dagster.steps import final_errors_skip_retries
from tests.test_failures import ERRORS, KINDS

from .conftest import Provider, request

RESULT, SUBMIT = dg.AssetKey("reviews"), dg.AssetKey("reviews_batch")


def make_reviews(
    requests: Any = ("a", "b"), *, model: str = "local:echo?delay=60", **arguments: Any
) -> BatchAssets:
    @batch_asset(**arguments)
    def reviews() -> Iterator[dict[str, Any]]:
        for custom_id in requests() if callable(requests) else requests:
            yield request(custom_id, model=model)

    return reviews


def materialize(
    provider: Provider, instance: dg.DagsterInstance, assets: Any, **arguments: Any
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [*assets],
        instance=instance,
        resources={"anybatch": provider.resource},
        raise_on_error=False,
        **arguments,
    )


def facts(result: dg.ExecuteInProcessResult, key: dg.AssetKey) -> dict[str, Any]:
    """Metadata of the one materialization of an asset."""
    (event,) = [event for event in result.get_asset_materialization_events() if event.asset_key == key]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def materialized(result: dg.ExecuteInProcessResult) -> list[str]:
    return [event.asset_key.to_user_string() for event in result.get_asset_materialization_events()]


def failure(result: dg.ExecuteInProcessResult) -> str:
    """What a person reads of the step that failed."""
    assert not result.success
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    return str(event.step_failure_data.error)


# --- what it defines -----------------------------------------------------------------------------------


def test_the_package_exports_what_it_says() -> None:
    assert anybatch_dagster.__all__ == sorted(anybatch_dagster.__all__)
    assert all(hasattr(anybatch_dagster, name) for name in anybatch_dagster.__all__)
    assert anybatch_dagster.__all__ == [
        "BatchAssetComponent", "BatchAssets", "BatchResource", "SubmitConfig", "__version__", "batch_asset",
        "build_batch_assets", "build_batch_sensor", "build_external_batch_sensor",
    ]  # fmt: skip


def test_the_library_is_registered_with_dagster() -> None:
    from dagster_shared.libraries import DagsterLibraryRegistry

    assert DagsterLibraryRegistry.get()["anybatch-dagster"] == anybatch_dagster.__version__


def test_a_function_becomes_two_assets_and_a_check() -> None:
    reviews = make_reviews(
        key_prefix=["raw", "llm"],
        group_name="texts",
        tags={"team": "x"},
        owners=["team:x"],
        kinds={"openai"},
        code_version="2",
        deps=["upstream"],
        retry_policy=dg.RetryPolicy(max_retries=2),
        automation_condition=dg.AutomationCondition.eager(),
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=30)),
        definition_metadata={"origin": "test"},
    )
    submit_key, key = dg.AssetKey(["raw", "llm", "reviews_batch"]), dg.AssetKey(["raw", "llm", "reviews"])
    assert (reviews.submit.key, reviews.result.key, reviews.key) == (submit_key, key, key)
    submit, result = reviews.submit.get_asset_spec(submit_key), reviews.result.get_asset_spec(key)
    for spec in (submit, result):
        assert spec.group_name == "texts"
        assert spec.tags["team"] == "x"
        assert spec.owners == ["team:x"]
        assert spec.kinds == {"openai"}
        assert spec.code_version == "2"
        assert spec.metadata["origin"] == "test"
    assert [dep.asset_key for dep in submit.deps] == [dg.AssetKey("upstream")]
    assert [dep.asset_key for dep in result.deps] == [submit_key]
    assert submit.automation_condition is not None
    assert result.automation_condition is None
    assert result.freshness_policy is not None
    assert result.skippable
    assert [check.key for check in reviews.result.check_specs] == [dg.AssetCheckKey(key, "error_rate")]
    assert all(assets.node_def.retry_policy.max_retries == 2 for assets in reviews)


def test_the_decorator_is_the_function_with_its_options_first() -> None:
    def texts() -> Iterator[dict[str, Any]]:
        """What texts are about."""
        yield request("a")

    options: dict[str, Any] = {"group_name": "g", "key_prefix": "raw", "tags": {"team": "x"}}
    by_function, by_decorator = build_batch_assets(texts, **options), batch_asset(**options)(texts)
    assert [one.key for one in by_function] == [one.key for one in by_decorator]
    assert [list(one.specs) for one in by_function] == [list(one.specs) for one in by_decorator]
    with pytest.raises(TypeError, match="colour"):
        batch_asset(colour="red")(texts)  # type: ignore[call-arg]
    parameters = list(inspect.signature(build_batch_assets).parameters.values())
    assert list(inspect.signature(batch_asset).parameters.values()) == parameters[1:]


@pytest.mark.parametrize(
    "options",
    [
        {"on_orphan": "resubmit"},
        {"on_changed": "fail"},
        {"on_untranslatable": "drop"},
        {"on_lost": "land"},
        {"on_lost": "resubmit"},
        {"shard_requests": 7},
        {"max_rounds": 3},
        {"price": (1.0, 2.0)},
    ],
)
def test_an_option_reaches_the_job(
    options: dict[str, Any], provider: Provider, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    submit = Client.submit
    monkeypatch.setattr(Client, "submit", lambda self, job: jobs.append(job) or submit(self, job))
    assert materialize(provider, instance, make_reviews(**options), selection=[SUBMIT]).success
    assert {name: getattr(jobs[0], name) for name in options} == options


def test_a_job_is_split_as_asked_and_its_batches_land_together(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews(["a", "b", "c"], shard_requests=2)
    materialize(provider, instance, reviews)
    assert len(provider.ids()) == 2
    provider.pass_time(100)
    result = materialize(provider, instance, reviews, selection=[RESULT])
    assert facts(result, RESULT)["anybatch/succeeded"] == 3
    assert facts(result, RESULT)["anybatch/batches"] == ", ".join(provider.ids())


@pytest.mark.parametrize("policy", [dg.BackfillPolicy.single_run(), dg.BackfillPolicy.multi_run(5)])
def test_partitions_and_backfill_policy_are_those_of_both_assets(policy: dg.BackfillPolicy) -> None:
    reviews = make_reviews(partitions_def=DAILY, backfill_policy=policy, pool="p", op_tags={"x": "1"})
    assert [assets.partitions_def for assets in reviews] == [DAILY, DAILY]
    assert [assets.backfill_policy for assets in reviews] == [policy, policy]
    assert [assets.op.pool for assets in reviews] == ["p", None]
    assert all(assets.op.tags["x"] == "1" for assets in reviews)


def test_an_io_manager_of_its_own(provider: Provider, instance: dg.DagsterInstance) -> None:
    stored = []

    class Storage(dg.IOManager):
        def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
            stored.append((context.asset_key, obj))

        def load_input(self, context: dg.InputContext) -> Any:
            raise NotImplementedError

    reviews = make_reviews(model="local:echo?delay=0", io_manager_key="special", value="none")
    resources = {**provider.resources, "special": Storage()}
    dg.materialize([*reviews], instance=instance, resources=resources)
    assert stored == []
    reviews = make_reviews(model="local:echo?delay=0", io_manager_key="special")
    result = dg.materialize([*reviews], instance=instance, resources=resources)
    assert stored == [(RESULT, facts(result, RESULT)["anybatch/results"])]


def test_module_loaders_find_both_assets_and_a_prefix_changes_both_keys(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    module = ModuleType("texts")
    module.reviews = make_reviews(model="local:echo?delay=0")  # type: ignore[attr-defined]
    loaded = dg.load_assets_from_modules([module], key_prefix="p")
    assert {key.to_user_string() for assets in loaded for key in assets.keys} == {
        "p/reviews",
        "p/reviews_batch",
    }
    assert materialized(materialize(provider, instance, loaded)) == ["p/reviews_batch", "p/reviews"]


class Threshold(SubmitConfig):
    custom_id: str = "from-config"


class Prefix(dg.ConfigurableResource[Any]):
    text: str


def plain() -> Iterator[dict[str, Any]]:
    yield request("plain")


def listed() -> list[dict[str, Any]]:
    return [request("listed")]


def with_context(context: dg.AssetExecutionContext) -> list[dict[str, Any]]:
    return [request(context.asset_key.path[-1])]


def with_config(config: Threshold) -> list[dict[str, Any]]:
    return [request(config.custom_id)]


def with_resource(prefix: Prefix) -> list[dict[str, Any]]:
    return [request(prefix.text)]


def with_table(table: list[str]) -> list[dict[str, Any]]:
    return [request(name) for name in table]


def with_strings(config: "Threshold", prefix: "Prefix", table: "list[str]") -> "list[dict[str, Any]]":
    return [request(f"{config.custom_id}-{prefix.text}-{table[0]}")]


def with_all(context: dg.AssetExecutionContext, config: Threshold, prefix: Prefix, table: list[str]) -> Any:
    yield from (request(f"{prefix.text}-{name}") for name in table)


@pytest.mark.parametrize(
    ("function", "custom_id"),
    [
        (plain, "plain"),
        (listed, "listed"),
        (with_context, "x_batch"),
        (with_config, "from-config"),
        (with_resource, "pre"),
        (with_table, "row"),
        (with_strings, "from-config-pre-row"),
        (with_all, "pre-row"),
    ],
)
def test_the_function_is_written_as_for_an_asset(
    function: Any, custom_id: str, provider: Provider, instance: dg.DagsterInstance
) -> None:
    @dg.asset
    def table() -> list[str]:
        return ["row"]

    assets = [table, *batch_asset(name="x")(function)]
    resources = {**provider.resources, "prefix": Prefix(text="pre")}
    result = dg.materialize(assets, instance=instance, resources=resources)
    folder = Path(facts(result, dg.AssetKey("x_batch"))["anybatch/folder"])
    assert (folder / "ids.jsonl").read_text() == f'"{custom_id}"\n'


# --- submitting and collecting -------------------------------------------------------------------------


def test_a_batch_that_is_over_at_once_is_collected_in_the_same_run(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    @dg.asset
    def joined(reviews: str) -> list[dict[str, Any]]:
        return list(join_results([{"id": "a"}, {"id": "b"}], reviews, id_column="id"))

    reviews = make_reviews(model="local:echo?delay=0")
    result = materialize(provider, instance, [*reviews, joined])
    assert result.success
    assert [row["outcome"] for row in result.output_for_node("joined")] == ["succeeded", "succeeded"]
    told = facts(result, RESULT)
    assert told["anybatch/batches"] == provider.ids()[0]
    assert told["anybatch/requests"] == told["anybatch/succeeded"] == told["dagster/row_count"] == 2
    assert told["anybatch/error_rate"] == 0
    assert told["anybatch/input_tokens"] > 0
    assert "| a | succeeded | hello" in told["preview"]
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]


def test_a_running_batch_yields_nothing_until_it_has_ended(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    @dg.asset
    def joined(reviews: str) -> str:
        return reviews

    reviews = make_reviews()
    result = materialize(provider, instance, [*reviews, joined])
    assert result.success
    assert materialized(result) == ["reviews_batch"]
    provider.pass_time(100)
    again = materialize(provider, instance, [*reviews, joined], selection=["reviews", "joined"])
    assert again.success
    assert materialized(again) == ["reviews", "joined"]


def test_the_same_requests_find_the_same_batch_and_then_the_landed_results(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews()
    first = facts(materialize(provider, instance, reviews), SUBMIT)["anybatch/batches"]
    assert facts(materialize(provider, instance, reviews), SUBMIT)["anybatch/batches"] == first
    provider.pass_time(100)
    landed = materialize(provider, instance, reviews)
    assert materialized(landed) == ["reviews_batch", "reviews"]
    for _ in range(2):
        again = materialize(provider, instance, reviews)
        assert facts(again, SUBMIT)["anybatch/batches"] == first
        assert facts(again, RESULT)["anybatch/batches"] == first
    assert provider.statuses() == ["completed"]


def test_other_requests_replace_the_batch(provider: Provider, instance: dg.DagsterInstance) -> None:
    materialize(provider, instance, make_reviews(["a"]))
    result = materialize(provider, instance, make_reviews(["b"]))
    assert result.success
    provider.pass_time(100)
    assert provider.statuses() == ["cancelled", "completed"]


def test_force_submits_again_and_cancels_what_still_runs(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews()
    force = {"ops": {"reviews_batch": {"config": {"force": True}}}}
    materialize(provider, instance, reviews)
    second = facts(materialize(provider, instance, reviews, run_config=force), SUBMIT)["anybatch/batches"]
    provider.pass_time(100)
    assert provider.statuses() == ["cancelled", "completed"]
    assert provider.ids()[1] == second
    materialize(provider, instance, reviews)  # lands
    third = materialize(provider, instance, reviews, run_config=force)
    assert facts(third, SUBMIT)["anybatch/batches"] == provider.ids()[2]
    assert materialized(third) == ["reviews_batch"]


def test_a_retried_step_does_not_submit_twice_even_when_forced(
    provider: Provider, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anybatch_dagster import steps

    calls = []

    def break_once(*arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the worker lost its network after the batch was created")
        return original(*arguments, **others)

    original = steps.SubmissionMetadata
    reviews = make_reviews(retry_policy=dg.RetryPolicy(max_retries=1))
    materialize(provider, instance, reviews)
    monkeypatch.setattr(steps, "SubmissionMetadata", break_once)
    force = {"ops": {"reviews_batch": {"config": {"force": True}}}}
    result = materialize(provider, instance, reviews, run_config=force)
    assert result.success
    assert "STEP_RESTARTED" in [event.event_type_value for event in result.all_events]
    assert len(provider.ids()) == 2


@pytest.mark.parametrize("by", [SUBMIT, RESULT])
def test_a_cancelled_batch_is_submitted_again_by_either_asset(
    by: dg.AssetKey, provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews()
    materialize(provider, instance, reviews)
    with provider.resource.client() as client:
        client.cancel(provider.ids()[0])
    provider.pass_time(100)
    assert materialize(provider, instance, reviews, selection=[by]).success
    assert len(provider.ids()) == 2
    provider.pass_time(100)
    result = materialize(provider, instance, reviews, selection=[RESULT])
    assert facts(result, RESULT)["anybatch/succeeded"] == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_no_retry_cures_fails_the_step_at_once(error: AnyBatchError) -> None:
    final = KINDS[type(error).__name__].is_final
    with pytest.raises(dg.Failure if final else type(error)) as caught, final_errors_skip_retries():
        raise error
    assert not final or not caught.value.allow_retries


def test_bad_input_fails_without_a_retry_and_sends_nothing(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews(["a", "a"], retry_policy=dg.RetryPolicy(max_retries=3))
    result = materialize(provider, instance, reviews)
    assert "line 2, custom_id" in failure(result)
    assert not [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]
    assert provider.ids() == []


def test_a_refused_batch_fails_with_the_providers_reason(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews(model="local:echo?invalid=token_limit_exceeded")
    materialize(provider, instance, reviews, selection=[SUBMIT])
    provider.pass_time(100)
    result = materialize(provider, instance, reviews, selection=[RESULT])
    assert "token_limit_exceeded" in failure(result)


def test_a_result_without_a_submission_says_what_to_do(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    result = materialize(provider, instance, make_reviews(), selection=[RESULT])
    assert "materialize reviews_batch first" in failure(result)


def test_past_the_deadline_the_result_fails_and_can_be_taken_later(
    provider: Provider, instance: dg.DagsterInstance
) -> None:
    reviews = make_reviews(timeout=0)
    result = materialize(provider, instance, reviews)
    assert "The deadline has passed; it is left running" in failure(result)
    provider.pass_time(100)
    assert materialize(provider, instance, reviews, selection=[RESULT]).success


@pytest.mark.parametrize(
    ("model", "max_failed_ratio", "passes"),
    [
        ("local:echo?delay=0", None, True),
        ("local:echo?delay=0&fail=0.5", None, True),
        ("local:echo?delay=0&fail=1", None, False),
        ("local:echo?delay=0&fail=0.5", 0.9, True),
        ("local:echo?delay=0&fail=0.5", 0.1, False),
        ("local:echo?delay=0", 0.0, True),
    ],
)
def test_the_check_looks_at_the_share_of_rows_without_a_result(
    model: str, max_failed_ratio: float | None, passes: bool, provider: Provider, instance: dg.DagsterInstance
) -> None:
    ids = [str(number) for number in range(20)]
    result = materialize(
        provider, instance, make_reviews(ids, model=model, max_failed_ratio=max_failed_ratio)
    )
    assert result.success
    assert [check.passed for check in result.get_asset_check_evaluations()] == [passes]


# --- partitions ----------------------------------------------------------------------------------------

STATIC = dg.StaticPartitionsDefinition(["north", "a/../b", "..", "x|y"])
DAILY = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-02-01")
MULTI = dg.MultiPartitionsDefinition({"day": DAILY, "place": dg.StaticPartitionsDefinition(["fr", "de"])})
DYNAMIC = dg.DynamicPartitionsDefinition(name="files")


@pytest.mark.parametrize(
    ("definition", "key"),
    [
        (STATIC, "north"),
        (STATIC, "a/../b"),
        (STATIC, ".."),
        (DAILY, "2026-01-03"),
        (MULTI, "2026-01-03|fr"),
        (DYNAMIC, "new.csv"),
    ],
)
def test_each_partition_is_a_job_of_its_own(
    definition: Any, key: str, provider: Provider, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    instance.add_dynamic_partitions("files", ["new.csv"])
    reviews = make_reviews(partitions_def=definition)
    first = materialize(provider, instance, reviews, partition_key=key)
    assert materialized(first) == ["reviews_batch"]
    folder = Path(facts(first, SUBMIT)["anybatch/folder"])
    assert folder.resolve().parent == (tmp_path / "jobs" / "reviews_batch").resolve()
    provider.pass_time(100)
    second = materialize(provider, instance, reviews, partition_key=key, selection=[RESULT])
    (event,) = second.get_asset_materialization_events()
    assert event.partition == key
    assert provider.statuses() == ["completed"]


def test_partitions_do_not_see_each_others_batches(provider: Provider, instance: dg.DagsterInstance) -> None:
    reviews = make_reviews(partitions_def=DAILY)
    materialize(provider, instance, reviews, partition_key="2026-01-01")
    result = materialize(provider, instance, reviews, partition_key="2026-01-02", selection=[RESULT])
    assert "Nothing was submitted yet for 2026-01-02" in failure(result)
    materialize(provider, instance, reviews, partition_key="2026-01-02")
    assert len(provider.ids()) == 2
