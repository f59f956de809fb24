"""How long the quick tests of each folder may take: printed at the end of a run, and held to.

Where pytest-xdist spreads the tests over processes, their reports come to the one that prints.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
LENIENCE = 6.0  # another machine is slower, or busy: this many times its budget fails a run


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
        return [fault for one in sorted(self._seconds.items()) if (fault := fault_of(*one)) is not None]


def folder_of(nodeid: str) -> str | None:
    """The folder under tests/ that a test is in."""
    parts = PurePath(nodeid.split("::")[0]).parts
    if len(parts) < 2 or parts[0] != "tests":
        return None
    return parts[1] if len(parts) > 2 else "."


def fault_of(folder: str, seconds: float) -> str | None:
    """What is wrong with a folder whose tests took that long."""
    if folder not in BUDGETS:
        return f"tests/{folder} has no budget: give it one in tests/conftest.py"
    if seconds > LENIENCE * BUDGETS[folder]:
        return f"tests/{folder} took {seconds:.0f} s, more than {LENIENCE:g} times its budget"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets(), "anybatch-budgets")
