"""The page `docs/dagster.md` and the examples: what they show loads and runs, what they quote is said."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
import yaml

import anybatch_dagster
from anybatch import create_batch, write_jsonl

from .conftest import Provider, request

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "dagster"
PAGE = ROOT / "docs" / "dagster.md"

pytestmark = [  # what Dagster's loader of components says of itself
    pytest.mark.filterwarnings("ignore:`parse_obj_as` is deprecated"),
    pytest.mark.filterwarnings("ignore::dagster_shared.utils.warnings.BetaWarning"),
    pytest.mark.filterwarnings("ignore::dagster_shared.utils.warnings.PreviewWarning"),
]


# --- the examples ----------------------------------------------------------------------------------------


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example, by the name of its file; IO managers find its classes again under its name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    dg.Definitions.validate_loadable(module.defs)
    return module


class Stage:
    """Runs the assets of an example on a provider whose time the test moves on."""

    def __init__(self, defs: dg.Definitions, provider: Provider, instance: dg.DagsterInstance) -> None:
        self.defs, self.provider, self.instance = defs, provider, instance

    def run(self, *names: str, **arguments: Any) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [asset for asset in self.defs.assets or [] if not isinstance(asset, dg.AssetSpec)],
            selection=dg.AssetSelection.assets(*names),
            instance=self.instance,
            resources=self.provider.resources,
            **arguments,
        )

    def is_there(self, name: str) -> bool:
        key = dg.AssetKey.from_user_string(name)
        return self.instance.get_latest_materialization_event(key) is not None


def range_tags(first: str, last: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


def test_every_example_is_tested() -> None:
    tested = {"backfill", "definitions", "external_batches", "resource_alone", "typed_answers"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    assert not (EXAMPLES / "__init__.py").exists()  # `examples` on the path would shadow the real package


def test_the_demo_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    load("definitions", monkeypatch)


def test_backfill(monkeypatch: pytest.MonkeyPatch, provider: Provider, instance: dg.DagsterInstance) -> None:
    stage = Stage(load("backfill", monkeypatch).defs, provider, instance)
    days = ["2026-01-01", "2026-01-02"]
    for day in days:
        stage.run("tickets", partition_key=day)
    tags = range_tags(days[0], days[-1])
    stage.run("ticket_kinds_batch", tags=tags)
    assert len(provider.ids()) == 1
    provider.pass_time(100)
    stage.run("ticket_kinds", tags=tags)
    for day in days:
        counts = stage.run("daily_kinds", partition_key=day).output_for_node("daily_kinds")
        assert counts.total() == 20


def test_typed_answers(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, instance: dg.DagsterInstance
) -> None:
    module = load("typed_answers", monkeypatch)
    stage = Stage(module.defs, provider, instance)
    stage.run("reviews", "verdicts_batch")
    runs = 0
    while not stage.is_there("verdicts"):
        provider.pass_time(100)
        stage.run("verdicts")
        runs += 1
    assert 1 < runs <= 3
    assert len(provider.ids()) == runs  # each run found rows worth another round, and submitted just those
    bad = stage.run("bad_reviews")
    verdicts = bad.asset_value("bad_reviews")
    assert set(verdicts) <= {f"r{number}" for number in range(200)}


def test_external_batches(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    module = load("external_batches", monkeypatch)
    lines = tmp_path / "requests.jsonl"
    write_jsonl(lines, [request("a", model="local:echo?fail=1")])
    batch = create_batch(
        "local",
        str(lines),
        "/v1/chat/completions",
        metadata={"origin": "nightly"},
        client_args={"transport": provider.resource._transport()},
    )
    provider.pass_time(100)
    (sensor,) = module.defs.sensors
    context = dg.build_sensor_context(instance, definitions=module.defs, resources=provider.resources)
    with context:
        (event,) = sensor.evaluate_tick(context).asset_events
    assert event.metadata["anybatch/batch"].value == batch.id
    instance.report_runless_asset_event(event)
    told = Stage(module.defs, provider, instance).run("nightly_results")
    (materialization,) = told.asset_materializations_for_node("nightly_results")
    assert materialization.metadata["batch"].value == batch.id
    assert materialization.metadata["failed"].value == 1
    (line,) = Path(str(materialization.metadata["results"].value)).read_text().splitlines()
    assert json.loads(line)["custom_id"] == "a"


def test_resource_alone(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, instance: dg.DagsterInstance
) -> None:
    module = load("resource_alone", monkeypatch)
    stage = Stage(module.defs, provider, instance)
    stage.run("embeddings_batch")
    assert not stage.run("embeddings").get_asset_materialization_events()
    provider.pass_time(100)
    assert set(stage.run("embeddings").asset_value("embeddings")) == {"sea", "lake", "river", "rain"}
    (told,) = stage.run("account").asset_materializations_for_node("account")
    assert told.metadata["completed"].value == 1
    stage.run("embeddings_batch")
    newest = provider.ids()[-1]
    config = {"ops": {"cancel_batch": {"config": {"batch": newest}}}}
    module.cancel_one.execute_in_process(
        run_config=config, resources={"anybatch": provider.resource}, instance=instance
    )
    assert provider.statuses()[-1] in ("cancelling", "cancelled")


def test_the_component_project(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, instance: dg.DagsterInstance
) -> None:
    source = EXAMPLES / "component_project" / "src"
    monkeypatch.syspath_prepend(str(source))
    try:
        defs = dg.load_from_defs_folder(path_within_project=source / "ticket_topics")
        dg.Definitions.validate_loadable(defs)
        stage = Stage(defs, provider, instance)
        stage.run("support/tickets", partition_key="2026-01-05")
        stage.run("support/ticket_topics_batch", partition_key="2026-01-05")
        stage.run("replies_batch")
        provider.pass_time(100)
        for _ in range(3):  # some rows are asked about again
            topics = stage.run("support/ticket_topics", partition_key="2026-01-05")
            provider.pass_time(100)
        assert topics.asset_value(dg.AssetKey(["support", "ticket_topics"])).endswith("results.jsonl")
        assert len(stage.run("replies").asset_value("replies")) == 3
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "ticket_topics"]:
            del sys.modules[name]


# --- the page --------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_python_of_the_page_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block continues those before it; wherever `defs` is defined, Dagster loads it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    page: dict[str, Any] = {"__name__": "page"}
    found = blocks("python")
    assert len(found) >= 8
    for block in found:
        page.pop("defs", None)
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), page)
        if "defs" in page:
            dg.Definitions.validate_loadable(page["defs"])


def test_the_yaml_of_the_page_is_right() -> None:
    rule = yaml.safe_load((EXAMPLES / "dagster.yaml").read_text())
    kinds = []
    for block in blocks("yaml"):
        for document in yaml.safe_load_all(block):
            if "type" in document:
                kinds.append("component")
                anybatch_dagster.BatchAssetComponent.resolve_from_dict(document["attributes"])
            else:
                kinds.append("rule")
                assert document["concurrency"] == rule["concurrency"]
    assert kinds == ["rule", "component"]


def test_what_the_page_names_is_public() -> None:
    named = set(re.findall(r"from anybatch_dagster import ([^\n(]+)", PAGE.read_text(encoding="utf-8")))
    names = {name.strip() for line in named for name in line.split(",")}
    assert names <= set(anybatch_dagster.__all__)
    assert set(anybatch_dagster.__all__) - {"__version__", "BatchAssets"} <= names | {"BatchAssetComponent"}


def test_messages_that_the_page_explains_are_said() -> None:
    """The first column of the table of messages, piece by piece between its …, is text of the package's."""
    files = [*(ROOT / "anybatch_dagster").glob("*.py"), *(ROOT / "core" / "anybatch").rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    said = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    table = (
        PAGE.read_text(encoding="utf-8").partition("## When something goes wrong")[2].partition("\n## ")[0]
    )
    messages = re.findall(r"^\| `([^|]+)` \|", table, re.MULTILINE)
    assert len(messages) >= 10
    pieces = [piece.strip() for message in messages for piece in message.split("…") if piece.strip()]
    assert [piece for piece in pieces if not any(piece in text for text in said)] == []


def test_links_and_pictures_of_the_page_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []
    pictures = [target for target in targets if target.endswith(".png")]
    assert len(pictures) >= 2
    for picture in pictures:
        data = (PAGE.parent / picture).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20])[0] >= 800  # wide enough to read
        assert len(data) < 200_000
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in anchors] == []
