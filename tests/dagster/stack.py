"""The module that starts a whole Dagster, shared with the demonstration: `examples` is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_FILE = Path(__file__).resolve().parents[2] / "examples" / "dagster_stack.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dagster_stack", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


dagster_stack = _load()
