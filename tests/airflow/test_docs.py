"""docs/airflow.md and the README: their code runs, their links lead somewhere, no option is missing."""

from __future__ import annotations

import inspect
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

import anybatch_airflow
from anybatch import Client
from anybatch_airflow import AnyBatchOperator, BatchCompletedTrigger
from anybatch_airflow.provider_info import get_provider_info

from .conftest import ROOT
from .versions import DagBag, DagSerialization

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GUIDE = ROOT / "docs" / "airflow.md"
TEXT = GUIDE.read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8").split("## Airflow", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


PYTHON = blocks(TEXT, "python") + blocks(README, "python")


@pytest.mark.parametrize("code", [block for block in PYTHON if "DAG(" in block])
def test_each_dag_can_be_parsed_and_stored(code: str) -> None:
    named, count = re.subn(r"^(with DAG\(.*\)):$", r"\1 as the_dag:", code, flags=re.MULTILINE)
    assert count == 1
    names: dict[str, Any] = {}
    exec(compile(named, "docs", "exec"), names)
    dag = names["the_dag"]
    assert dag.task_ids
    json.dumps(DagSerialization.to_dict(dag))


def block(text: str) -> str:
    """The one Python block of the guide that has this in it."""
    [found] = [one for one in blocks(TEXT, "python") if text in one]
    return found


def run(code: str) -> dict[str, Any]:
    """Run a block; its variables."""
    names: dict[str, Any] = {}
    exec(compile(code, "docs", "exec"), names)
    return names


@pytest.fixture
def run_dag(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`run_dag(code)`: run the DAG of a block to its end, for the first day of the examples."""
    path = "airflow.dag_processing.bundles.local.LocalDagBundle"
    bundle = {"name": "docs", "classpath": path, "kwargs": {"path": str(tmp_path)}}
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", json.dumps([bundle]))

    def run_it(code: str) -> None:
        (tmp_path / "block.py").write_text(here(code, tmp_path), encoding="utf-8")
        bag = DagBag(dag_folder=str(tmp_path / "block.py"))
        assert not bag.import_errors
        [dag] = bag.dags.values()
        assert dag.test(logical_date=datetime(2026, 1, 1, tzinfo=UTC)).state == "success"

    return run_it


def here(code: str, folder: Path) -> str:
    """A block that finds its files in this folder, and asks the stand-in, at once."""
    for theirs, ours in {
        "/data/": f"{folder}/",
        "s3://aws_default@bucket/": f"{folder}/",
        "sqlite:////tmp/": f"sqlite:///{folder}/",
        'conn_id="openai_default"': 'provider="local"',
        "delay=20": "delay=0.3",
    }.items():
        code = code.replace(theirs, ours)
    return code


def test_the_quickstart_runs_and_its_results_are_joined(
    run_dag: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reviews").mkdir()
    table = "review_id,text\nr1,Good\nr2,Bad\n"
    (tmp_path / "reviews" / "2026-01-01.csv").write_text(table, encoding="utf-8")
    run_dag(block('"reviews", schedule'))
    joining = here(block("join_results("), tmp_path)
    capsys.readouterr()
    last = run(joining)["row"]
    assert (last["review_id"], last["text"], last["outcome"]) == ("r2", "Bad", "succeeded")
    assert last["content"].startswith("Sum up in one sentence: Bad")
    assert capsys.readouterr().out == ""  # nothing that did not succeed
    # With another table there is a row that was never asked about.
    (tmp_path / "reviews" / "2026-01-01.csv").write_text(table + "r3,New\n", encoding="utf-8")
    run(joining)
    assert capsys.readouterr().out.startswith("r3 missing")


def test_the_dag_in_three_tasks_runs(
    run_dag: Callable[[str], None], tmp_path: Path, make_requests: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [json.dumps(request) + "\n" for request in make_requests(2, "delay=0.3")]
    (tmp_path / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    run_dag(block('"in_three_tasks"'))
    [results] = tmp_path.glob("results/*/results.jsonl")
    assert len(results.read_text(encoding="utf-8").splitlines()) == 2


def test_a_batch_is_cancelled_by_hand(
    tmp_path: Path, make_requests: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [json.dumps(request) + "\n" for request in make_requests(2, "delay=600")]
    (tmp_path / "in.jsonl").write_text("".join(lines), encoding="utf-8")
    with Client("local", api_base=f"sqlite:///{tmp_path}/example.db") as client:
        batch = client.create(tmp_path / "in.jsonl", "/v1/chat/completions")
        run(here(block("cancel_batch("), tmp_path).replace("batch_0", batch.id))
        assert client.retrieve(batch.id).status in ("cancelling", "cancelled")


RUN = ("join_results(", "cancel_batch(")


@pytest.mark.parametrize("code", [block for block in PYTHON if "DAG(" not in block])
def test_other_code_runs_too(code: str) -> None:
    if not any(text in code for text in RUN):  # those have tests of their own
        assert run(code)


@pytest.mark.parametrize("text", blocks(TEXT, "json"))
def test_json_is_json(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def test_links_lead_somewhere() -> None:
    anchors = {_anchor(title) for title in re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (GUIDE.parent / target).exists(), target


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_option_of_the_operator_is_described() -> None:
    table = TEXT.split("## The operator's options", 1)[1].split("\n## ", 1)[0]
    described = set(re.findall(r"`(\w+)`", table))
    options = set(inspect.signature(AnyBatchOperator.__init__).parameters) - {"self", "kwargs"}
    assert options - described == set()
    templated = table.split("Templated:", 1)[1]
    fields = {"output" if name == "output_folder" else name for name in AnyBatchOperator.template_fields}
    assert set(re.findall(r"`(\w+)`", templated)) == fields


def test_messages_are_quoted_as_they_are() -> None:
    rows = TEXT.split("## Troubleshooting", 1)[1].split("\n## ", 1)[0].splitlines()
    quoted = [
        text for row in rows if row.startswith("| ") for text in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(quoted) > 12
    packages = [ROOT / "core" / "anybatch", ROOT / "anybatch_airflow"]
    # As they read when put together: adjacent pieces of one string, fields left out.
    source = " ".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    source = re.sub(r"\"\s+f?\"", "", source)
    fragments = [part.strip() for text in quoted if "body.model" not in text for part in text.split("…")]
    assert [part for part in fragments if len(part) > 4 and part not in source] == []


def test_what_else_has_to_be_told_is_told() -> None:
    named = [name for name in anybatch_airflow.__all__ if not name.startswith("_")]
    told_elsewhere = {"AnyBatchHook", "AnyBatchTrigger"}  # not for writing DAGs
    assert [name for name in named if name not in TEXT and name not in told_elsewhere] == []
    [kind] = get_provider_info()["connection-types"]
    assert [field["label"] for field in kind["conn-fields"].values() if field["label"] not in TEXT] == []
    options = set(inspect.signature(BatchCompletedTrigger.__init__).parameters) - {"self"}
    section = TEXT.split("## DAGs scheduled by batches", 1)[1].split("\n## ", 1)[0]
    known_from_elsewhere = {"conn_id", "provider", "api_base", "max_age"}
    assert [name for name in options - known_from_elsewhere if name not in section] == []


def test_images_are_small() -> None:
    images = [GUIDE.parent / path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)]
    assert images
    assert all(0 < image.stat().st_size < 200_000 for image in images)
