"""`BatchAssetComponent`: what its YAML comes to, and the `dg` command line."""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTreeException
from dagster.components.testing import DefsFolderSandbox, create_defs_folder_sandbox

from anybatch_dagster import BatchAssetComponent, BatchResource, build_batch_assets
from anybatch_dagster.component import File
from anybatch_dagster.component_schema import BatchResourceModel

from .conftest import Provider

PROJECT = Path(__file__).resolve().parents[2] / "examples" / "dagster" / "component_project"
DAYS = dg.StaticPartitionsDefinition(["mon", "tue"])

pytestmark = [  # what Dagster's loader of components says of itself
    pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated"),
    pytest.mark.filterwarnings("ignore::dagster_shared.utils.warnings.BetaWarning"),
    pytest.mark.filterwarnings("ignore::dagster_shared.utils.warnings.PreviewWarning"),
]


@pytest.fixture
def sandbox() -> Iterator[DefsFolderSandbox]:
    with create_defs_folder_sandbox() as made:
        yield made


def attributes(**more: Any) -> dict[str, Any]:
    """The least that a component needs, and more."""
    return {
        "name": "topics",
        "table": {"file": "texts.csv"},
        "prompt": "About what? {text}",
        "id_column": "id",
        "model": "local:echo?delay=60",
        "resource": {"provider": "local"},
        **more,
    }


def write(sandbox: DefsFolderSandbox, folder_name: str = "topics", /, **more: Any) -> Path:
    """A component in a folder of its own, with a table beside it."""
    folder = sandbox.defs_folder_path / folder_name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.csv").write_text("id,text\n1,hello\n2,world\n")
    document = {"type": "anybatch_dagster.BatchAssetComponent", "attributes": attributes(**more)}
    (folder / "defs.yaml").write_text(yaml.safe_dump(document))
    return folder


def load(sandbox: DefsFolderSandbox, **more: Any) -> dg.Definitions:
    write(sandbox, **more)
    with sandbox.build_all_defs() as defs:
        return defs


def problem(sandbox: DefsFolderSandbox, **more: Any) -> str:
    """What a person reads who writes this into the YAML: the error, and those it was raised from."""
    with pytest.raises(ComponentTreeException) as caught:
        load(sandbox, **more)
    error: BaseException | None = caught.value
    told = []
    while error is not None:
        told.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(told)


def run(
    provider: Provider, instance: dg.DagsterInstance, assets: Any, *names: str, **arguments: Any
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [*assets],
        selection=dg.AssetSelection.assets(*names) if names else None,
        instance=instance,
        resources=provider.resources,
        **arguments,
    )


def lines(provider: Provider, result: dg.ExecuteInProcessResult) -> list[dict[str, Any]]:
    """The request lines of the one submission in a run, as they are in its job folder."""
    (event,) = [
        event
        for event in result.get_asset_materialization_events()
        if event.asset_key.path[-1].endswith("_batch")
    ]
    folder = Path(str(event.materialization.metadata["anybatch/folder"].value))
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def asked(line: Mapping[str, Any]) -> str:
    return str(line["body"]["messages"][-1]["content"])


# --- the schema ----------------------------------------------------------------------------------------


def test_it_takes_what_batch_assets_take_by_the_same_names() -> None:
    fields = {field.alias or name: field for name, field in BatchAssetComponent.model_fields.items()}
    parameters = dict(inspect.signature(build_batch_assets).parameters)
    for name in ("requests", "ins"):  # which `table` is instead
        del parameters[name]
    assert parameters.keys() - fields.keys() == set()
    for name in ("resource_key", "value"):  # the options of a job are compared in tests/test_options.py
        assert fields[name].default == parameters[name].default


def test_the_resource_takes_what_the_resource_takes() -> None:
    assert BatchResourceModel.model_fields.keys() == BatchResource.model_fields.keys()


def test_every_field_is_documented() -> None:
    schema = BatchAssetComponent.model().model_json_schema()
    assert "model" in schema["properties"]
    assert [name for name, field in schema["properties"].items() if not field.get("description")] == []


def test_choices_are_in_the_schema() -> None:
    """An editor offers them, and `dg check yaml` refuses any other word."""
    properties = BatchAssetComponent.model().model_json_schema()["properties"]

    def choices(name: str) -> list[str]:
        kinds = properties[name].get("anyOf", [properties[name]])
        return [choice for kind in kinds for choice in kind.get("enum", [])]

    assert choices("on_lost") == ["fail", "land", "resubmit"]
    assert choices("on_timeout") == ["leave", "cancel", "land_partial"]
    assert {kind.get("type") for kind in properties["shard_requests"]["anyOf"]} >= {"integer", "null"}


def test_what_becomes_of_lost_batches_and_how_a_job_is_split_can_be_said_in_yaml(
    sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    defs = load(sandbox, on_lost="land", shard_requests=1)
    run(provider, instance, defs.assets, "topics_batch")
    assert len(provider.ids()) == 2
    assert "on_lost" in problem(sandbox, on_lost="forget")


# --- from YAML to results ------------------------------------------------------------------------------


def test_a_file_becomes_requests_and_results(
    sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    defs = load(sandbox, system="Be short.", body={"max_tokens": 9, "stop": "1"}, value="rows")
    submitted = run(provider, instance, defs.assets, "topics_batch")
    first, _ = lines(provider, submitted)
    assert first["custom_id"] == "1"
    assert first["body"]["messages"][0] == {"role": "system", "content": "Be short."}
    assert asked(first) == "About what? hello"
    assert (first["body"]["max_tokens"], first["body"]["stop"]) == (9, "1")  # "1" stays text
    provider.pass_time(100)
    landed = run(provider, instance, defs.assets, "topics")
    assert [row.custom_id for row in landed.output_for_node("topics", "topics")] == ["1", "2"]
    assert [check.passed for check in landed.get_asset_check_evaluations()] == [True]


def test_an_upstream_asset_is_the_table(
    sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    @dg.asset(key_prefix="raw")
    def texts() -> list[dict[str, Any]]:
        return [{"id": "a", "text": "from upstream"}]

    defs = load(sandbox, table="raw/texts", key_prefix=["llm", "out"])
    result = run(provider, instance, [texts, *defs.assets], "raw/texts", "llm/out/topics_batch")
    assert [asked(line) for line in lines(provider, result)] == ["About what? from upstream"]


@pytest.mark.parametrize("upstream", [True, False])
def test_a_run_over_several_partitions_asks_about_the_table_of_each(
    upstream: bool, sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    @dg.asset(partitions_def=DAYS)
    def texts(context: dg.AssetExecutionContext) -> list[dict[str, Any]]:
        return [{"id": "a", "text": context.partition_key}]

    folder = write(sandbox)
    for day in DAYS.get_partition_keys():
        (folder / f"{day}.csv").write_text(f"id,text\na,{day}\n")
        run(provider, instance, [texts], partition_key=day)
    defs = load(
        sandbox,
        table="texts" if upstream else {"file": "{partition}.csv"},
        partitions_def={"type": "static", "partition_keys": ["mon", "tue"]},
        backfill_policy={"type": "single_run"},
    )
    tags = {"dagster/asset_partition_range_start": "mon", "dagster/asset_partition_range_end": "tue"}
    submitted = dg.materialize(
        [texts, *defs.assets],
        selection=["topics_batch"],
        instance=instance,
        resources=provider.resources,
        tags=tags,
        raise_on_error=False,
    )
    assert submitted.success
    facts = submitted.get_asset_materialization_events()[0].materialization.metadata
    requests = Path(str(facts["anybatch/folder"].value), "requests.jsonl").read_text().splitlines()
    assert [(line["custom_id"], asked(line)) for line in map(json.loads, requests)] == [
        ("mon/a", "About what? mon"),
        ("tue/a", "About what? tue"),
    ]


def test_a_prompt_may_be_a_file_and_its_braces_are_no_templates_of_dagsters(
    sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    folder = write(sandbox)
    (folder / "prompt.md").write_text('Answer {{"about": …}}: {text}')
    defs = load(sandbox, prompt={"file": "prompt.md"}, system="{{ not_defined }}")
    (first, _) = lines(provider, run(provider, instance, defs.assets, "topics_batch"))
    assert asked(first) == 'Answer {"about": …}: hello'
    assert first["body"]["messages"][0]["content"] == "{{ not_defined }}"


def test_objects_come_in_by_templates(sandbox: DefsFolderSandbox) -> None:
    defs = load(
        sandbox,
        automation_condition="{{ dg.AutomationCondition.eager() }}",
        freshness_policy="{{ dg.FreshnessPolicy.time_window(fail_window=datetime.timedelta(hours=30)) }}",
        partitions_def="{{ dg.StaticPartitionsDefinition(['a', 'b']) }}",
        retry_policy={"max_retries": 3, "delay": 5},
        owners=["team:x"],
        kinds=["openai"],
        tags={"a": "b"},
        group_name="llm",
    )
    graph = defs.resolve_asset_graph()
    submit, result = graph.get(dg.AssetKey("topics_batch")), graph.get(dg.AssetKey("topics"))
    assert submit.automation_condition is not None
    assert result.automation_condition is None
    assert result.freshness_policy is not None
    assert result.partitions_def == dg.StaticPartitionsDefinition(["a", "b"])
    assert submit.assets_def.node_def.retry_policy == dg.RetryPolicy(max_retries=3, delay=5)
    for node in (submit, result):
        assert (node.owners, node.kinds, node.group_name, node.tags["a"]) == (
            ["team:x"],
            {"openai"},
            "llm",
            "b",
        )


# --- the account -----------------------------------------------------------------------------------------


def test_a_key_stays_a_variable_until_it_is_used(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    for template in ("{{ env.SOME_KEY }}", "{{ env('SOME_KEY') }}"):
        defs = load(sandbox, resource={"provider": "openai", "api_key": template})
        assert defs.resources is not None
        key = defs.resources["anybatch"].api_key
        assert isinstance(key, dg.EnvVar)
        assert key.env_var_name == "SOME_KEY"


def test_a_key_from_elsewhere_is_in_nothing_that_dagster_shows(
    sandbox: DefsFolderSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-canary")
    defs = load(sandbox, resource={"provider": "openai", "api_key": "{{ env.SOME_KEY }}{{ '' }}"})
    assert defs.resources is not None
    resource = defs.resources["anybatch"]
    assert "sk-canary" not in f"{resource!r} {resource.model_dump()}"
    with resource.client() as client:
        assert client.account.api_key is not None
        assert client.account.api_key.get_secret_value() == "sk-canary"


def test_the_resource_may_be_defined_elsewhere(sandbox: DefsFolderSandbox) -> None:
    write(sandbox, resource=None, resource_key="llm")
    (sandbox.defs_folder_path / "resources.py").write_text(
        "import dagster as dg\n"
        "from anybatch_dagster import BatchResource\n"
        'defs = dg.Definitions(resources={"llm": BatchResource(provider="local")})\n'
    )
    with sandbox.build_all_defs() as defs:
        dg.Definitions.validate_loadable(defs)


# --- several components --------------------------------------------------------------------------------


def sensors_of(sandbox: DefsFolderSandbox) -> list[tuple[str, set[str]]]:
    with sandbox.build_all_defs() as defs:
        dg.Definitions.validate_loadable(defs)
        return [(sensor.name, sensor.required_resource_keys) for sensor in defs.sensors or []]


def test_several_components_have_one_sensor_for_all_their_accounts(sandbox: DefsFolderSandbox) -> None:
    write(sandbox, "a", name="a", polling_sensor=False)
    write(sandbox, "b", name="b")
    write(sandbox, "c", name="c", resource_key="other", resource={"provider": "openai"})
    folder = write(sandbox, "d")
    both = [(folder / "defs.yaml").read_text().replace("topics", name) for name in ("d", "e")]
    (folder / "defs.yaml").write_text("---\n".join(both))
    assert sensors_of(sandbox) == [("anybatch_sensor", {"anybatch", "other"})]


def test_none_brings_a_sensor_where_the_code_location_has_its_own(sandbox: DefsFolderSandbox) -> None:
    write(sandbox, "a", name="a", polling_sensor=False)
    assert sensors_of(sandbox) == []
    (sandbox.defs_folder_path / "sensor.py").write_text(
        "from anybatch_dagster import build_batch_sensor\nwaiting = build_batch_sensor(name='waiting')\n"
    )
    assert [name for name, _ in sensors_of(sandbox)] == ["waiting"]


def test_a_component_in_python_counts_as_one_of_them(sandbox: DefsFolderSandbox) -> None:
    write(sandbox, "z", name="z")
    sandbox.scaffold_component(BatchAssetComponent, "python", scaffold_format="python")
    assert sensors_of(sandbox) == [("anybatch_sensor", {"anybatch", "local"})]


def test_two_accounts_under_one_key_are_an_error_that_names_both(sandbox: DefsFolderSandbox) -> None:
    write(sandbox, "a", name="a")
    told = problem(sandbox, resource={"provider": "openai"})
    assert "define the resource 'anybatch' differently; give one of them another resource_key" in told
    assert "topics and a" in told or "a and topics" in told


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"promt": "x"}, "promt"),
        ({"table": {"path": "x"}}, "table"),
        (
            {"table": {"file": "{partition}.csv"}},
            "table.file: {partition} in the path needs a partitions_def",
        ),
        ({"prompt": "{text"}, "prompt template: "),
        ({"prompt": {"file": "no.md"}}, "Resolver for field 'prompt'"),
        (
            {"endpoint": "/v1/embeddings", "system": "x"},
            "system: requests to /v1/embeddings have no system prompt",
        ),
        ({"max_rounds": "many"}, "max_rounds"),
        ({"max_failed_ratio": "lots"}, "max_failed_ratio"),
        ({"on_partial": "resubmit"}, "on_partial"),
        ({"on_timeout": "wait"}, "on_timeout"),
        ({"value": "panda"}, "value"),
        ({"timeout": "a day"}, "timeout"),
        ({"price": [1]}, "price"),
        ({"partitions_def": {"type": "dayly"}}, "partitions_def"),
        ({"resource": {"provider": "opnai"}}, "unknown provider 'opnai'. Did you mean 'openai'?"),
        (
            {"resource": {"provider": "openai", "api_key": "sk-1"}},
            "api_key: a key does not belong in this file",
        ),
        ({"resource": {"provider": "openai", "api_ky": "x"}}, "api_ky"),
    ],
)
def test_an_error_in_the_yaml_names_the_field(
    given: dict[str, Any], told: str, sandbox: DefsFolderSandbox
) -> None:
    assert told in problem(sandbox, **given)


def test_a_table_that_no_asset_makes_is_named(sandbox: DefsFolderSandbox) -> None:
    defs = load(sandbox, table="raw/texts")
    with pytest.raises(
        dg.DagsterInvalidDefinitionError, match=r'Input asset "\["raw", "texts"\]" is not produced'
    ):
        dg.Definitions.validate_loadable(defs)


# --- in Python -------------------------------------------------------------------------------------------


class Shouting(BatchAssetComponent):
    """Asks about some of the rows only, in its own words."""

    threshold: int = 0

    def load_table(self, context: dg.AssetExecutionContext, table: Any) -> Any:
        return [row for row in super().load_table(context, table) if row["id"] > self.threshold]

    def ask(self, row: Mapping[str, Any]) -> Any:
        body = super().ask(row)
        return {**body, "messages": [{"role": "user", "content": row["text"].upper()}], "seed": row["id"]}

    def get_asset_spec(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.merge_attributes(tags={"loud": "yes"})


def test_a_subclass_says_what_yaml_cannot(provider: Provider, instance: dg.DagsterInstance) -> None:
    @dg.asset
    def texts() -> list[dict[str, Any]]:
        return [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]

    component = Shouting(
        name="loud", table="texts", prompt="{text}", model="local:echo", id_column="id", threshold=1
    )
    defs = dg.components.build_defs_for_component(component)
    result = run(provider, instance, [texts, *(defs.assets or [])])
    (line,) = lines(provider, result)
    assert (asked(line), line["body"]["seed"], line["custom_id"]) == ("B", 2, "2")
    specs = [spec for assets in defs.assets or [] for spec in assets.specs]
    assert [spec.tags["loud"] for spec in specs] == ["yes", "yes"]
    assert [sensor.name for sensor in defs.sensors or []] == ["anybatch_sensor"]


def test_python_takes_objects_and_a_file(tmp_path: Path) -> None:
    component = BatchAssetComponent(
        name="a",
        table=File(file=str(tmp_path / "x.csv")),
        prompt="{text}",
        model="local:echo",
        resource=BatchResource(provider="local"),
        value=lambda report: report.rows,
        partitions_def=DAYS,
    )
    defs = dg.components.build_defs_for_component(component)
    assert {key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()} == {
        "a",
        "a_batch",
    }


# --- scaffolding and the command line --------------------------------------------------------------------


@pytest.mark.parametrize("format", ["yaml", "python"])
def test_what_is_scaffolded_runs_as_it_is(
    format: Any, sandbox: DefsFolderSandbox, provider: Provider, instance: dg.DagsterInstance
) -> None:
    sandbox.scaffold_component(BatchAssetComponent, "first-try", scaffold_format=format)
    with sandbox.build_all_defs() as defs:
        resources = {**provider.resources, "local": provider.resource}
        result = dg.materialize(
            defs.assets, selection=["first_try_batch"], instance=instance, resources=resources
        )
    assert len(lines(provider, result)) == 3


def test_scaffolding_takes_table_and_model(sandbox: DefsFolderSandbox) -> None:
    given = {"table": "raw/texts", "provider": "openai", "model": "gpt-4o-mini", "prompt": "{text}?"}
    path = sandbox.scaffold_component(BatchAssetComponent, "topics", scaffold_params=given)
    assert yaml.safe_load((path / "defs.yaml").read_text())["attributes"] == {
        "name": "topics",
        "table": "raw/texts",
        "prompt": "{text}?",
        "model": "gpt-4o-mini",
        "resource_key": "openai",
        "resource": {"provider": "openai"},
    }
    assert [file.name for file in path.iterdir()] == ["defs.yaml"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example project."""
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


def dg_cli(project: Path, *words: str) -> str:
    """The output of a `dg` command in the project."""
    env = {
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "PYTHONPATH": str(project / "src"),
        "DAGSTER_HOME": str(project),
        "HOME": str(project),
        "COLUMNS": "200",
    }
    (project / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    done = subprocess.run(
        [sys.executable, "-m", "dagster_dg_cli.cli", *words],
        cwd=project, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout
    return done.stdout


@pytest.mark.deployment
def test_dg_lists_the_component_and_its_definitions(project: Path) -> None:
    assert "anybatch_dagster.BatchAssetComponent" in dg_cli(project, "list", "components")
    listed = dg_cli(project, "list", "defs", "--json")
    found = json.loads(listed[listed.index("{") :])
    assert {asset["asset_key"] for asset in found["assets"]} == {
        "support/tickets", "support/ticket_topics", "support/ticket_topics_batch", "replies", "replies_batch",
    }  # fmt: skip
    assert {sensor["name"] for sensor in found["sensors"]} == {
        "anybatch_sensor", "default_automation_condition_sensor",
    }  # fmt: skip


@pytest.mark.deployment
def test_dg_checks_and_scaffolds(project: Path) -> None:
    told = dg_cli(
        project, "scaffold", "defs", "anybatch_dagster.BatchAssetComponent", "more", "--model", "local:echo"
    )
    assert "Creating defs at" in told
    assert "validated successfully" in dg_cli(project, "check", "yaml")
    assert "loaded successfully" in dg_cli(project, "check", "defs")
    path = project / "src" / "ticket_topics" / "defs" / "more" / "defs.yaml"
    path.write_text(path.read_text().replace("prompt:", "promt:"))
    assert "attributes.promt" in dg_cli(project, "check", "yaml")
