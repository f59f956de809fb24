"""How the modules lean on each other."""

from __future__ import annotations

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / "core" / "anybatch", ROOT / "anybatch_airflow", ROOT / "anybatch_dagster"]


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports: at once, when it is used, or for its types alone."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            full = [f"{base}.{one.name}" for one in node.names]
            found |= {one if one in known else base for one in full}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {one for one in found if one in known and one != name}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_modules_import_each_other_in_a_circle(package: Path) -> None:
    known = modules(package)
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


INTEGRATIONS = [path for package in PACKAGES[1:] for path in sorted(package.rglob("*.py"))]


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_integrations_use_what_the_core_declares(path: Path) -> None:
    """Names of its `__all__`s, and modules by names of their own: nothing that the core may change unseen."""
    undeclared = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "anybatch":
            continue
        home = importlib.import_module(str(node.module))
        declared = getattr(home, "__all__", ())
        undeclared += [
            f"{node.module}.{one.name}"
            for one in node.names
            if one.name not in declared and not isinstance(getattr(home, one.name, None), ModuleType)
        ]
    assert not undeclared
