"""docs/airflow.md and the README: their code runs, their links lead somewhere, no option is missing."""

from __future__ import annotations

import ast
import inspect
import json
import re
from typing import Any

import pytest

import anybatch_airflow
from anybatch_airflow import AnyBatchOperator, BatchCompletedTrigger
from anybatch_airflow.provider_info import get_provider_info

from .conftest import ROOT
from .versions import DagSerialization

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


@pytest.mark.parametrize("code", [block for block in PYTHON if "DAG(" not in block])
def test_other_code_compiles_and_imports_what_exists(code: str) -> None:
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    exec(compile(ast.Module(imports, []), "docs", "exec"), {})


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
    assert set(re.findall(r"`(\w+)`", templated)) == set(AnyBatchOperator.template_fields)


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
