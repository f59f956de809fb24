"""The class that starts a whole Dagster, shared with the demonstration: `examples` is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dagster._core.scheduler.instigation import InstigatorType, TickStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

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


class Stack(dagster_stack.DagsterStack):  # type: ignore[misc, name-defined]
    """What tests do and look at besides."""

    def restart(
        self, *, config: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Deploy again over the same storage, with other settings and other variables."""
        self.stop()
        self._config = {**self._config, **(config or {})}
        self._env = {**self._env, **(env or {})}
        self.start()

    def said_in_ticks(self, *, since: float = 0.0) -> list[str]:
        """What sensors gave as their reason for starting nothing."""
        return [
            tick.tick_data.skip_reason or ""
            for state in self.instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
            for tick in self.instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since)
        ]

    def cut_off_ticks(self, location: str | None = None, *, since: float = 0.0) -> int:
        """How many sensor ticks, of a code location or of all, were not waited for to their end."""
        found = 0
        for state in self.instance.all_instigator_state(instigator_type=InstigatorType.SENSOR):
            origin = state.origin.repository_origin.code_location_origin
            if location in (None, origin.location_name):
                ticks = self.instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since)
                errors = (str(tick.error) for tick in ticks if tick.status is TickStatus.FAILURE)
                found += sum("DEADLINE_EXCEEDED" in error for error in errors)
        return found
