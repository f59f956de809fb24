"""How long the quick tests of each folder may take: printed at the end of a run, and held to.

Where pytest-xdist spreads the tests over processes, their reports come to the one that prints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pytest

# Seconds on two quiet cores, summed over a folder's tests and what they set up; "." are the tests beside it.
BUDGETS = {
    ".": 20.0,
    "airflow": 90.0,
    "conformance": 90.0,
    "dagster": 90.0,
    "exactly_once": 120.0,
    "fakes": 10.0,
    "foreign": 10.0,
    "golden": 10.0,
    "local": 40.0,
    "packaging": 10.0,
    "parity": 30.0,
}
LENIENCE = 3.0  # this many times its budget fails a run …
# … or so many times more than the other folders take of theirs: another machine is slower, or busy.


class Budgets:
    """Adds up what the tests of each folder take."""

    def __init__(self) -> None:
        self._tests: dict[str, set[str]] = defaultdict(set)
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = folder_of(report.nodeid)
        if folder is not None and "deployment" not in report.keywords:
            self._tests[folder].add(report.nodeid)
            self._seconds[folder] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._faults() and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._seconds:
            return
        terminalreporter.section("seconds by folder, and what each may take")
        for folder, seconds in sorted(self._seconds.items()):
            count = f"{len(self._tests[folder])} tests"
            terminalreporter.line(f"{folder:14}{seconds:8.1f} of {BUDGETS.get(folder, 0.0):4.0f}  {count}")
        for fault in self._faults():
            terminalreporter.line(fault, red=True, bold=True)

    def _faults(self) -> list[str]:
        faults = (fault_of(folder, self._seconds) for folder in sorted(self._seconds))
        return [fault for fault in faults if fault is not None]


def folder_of(nodeid: str) -> str | None:
    """The folder under tests/ that a test is in."""
    parts = PurePath(nodeid.split("::")[0]).parts
    if len(parts) < 2 or parts[0] != "tests":
        return None
    return parts[1] if len(parts) > 2 else "."


def fault_of(folder: str, seconds: Mapping[str, float]) -> str | None:
    """What is wrong with how long the tests of a folder took, beside those of all folders."""
    if folder not in BUDGETS:
        return f"tests/{folder} has no budget: give it one in tests/conftest.py"
    most = LENIENCE * BUDGETS[folder] * slowness({one for one in seconds if one != folder}, seconds)
    if seconds[folder] > most:
        return f"tests/{folder} took {seconds[folder]:.0f} s, more than {most:.0f} s"
    return None


def slowness(folders: Iterable[str], seconds: Mapping[str, float]) -> float:
    """How many times longer folders take than their budgets; at least 1."""
    known = [one for one in folders if one in BUDGETS]
    return max(1.0, sum(seconds[one] for one in known) / (sum(BUDGETS[one] for one in known) or math.inf))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets(), "anybatch-budgets")
