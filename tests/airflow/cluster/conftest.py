"""The cluster, for as long as its tests run."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from . import services
from .cluster import Cluster
from .scenarios import Scenarios, selected

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenarios]:
    """All selected scenarios, under way in a cluster."""
    if problem := services.missing():
        (pytest.fail if os.environ.get("ANYBATCH_REQUIRE_SERVICES") == "1" else pytest.skip)(problem)
    root = tmp_path_factory.mktemp("cluster")
    with contextlib.ExitStack() as ending:
        ending.enter_context(_ended_by_sigterm())
        database = ending.enter_context(services.own_database())
        broker = ending.enter_context(services.own_broker())
        cluster = Cluster(root / "airflow", root / "out", database, broker)
        ending.callback(cluster.close)
        ending.enter_context(cluster)
        scenarios = Scenarios(cluster, selected(request.session.items))
        ending.callback(scenarios.end)
        yield scenarios


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM as on Control-C: it is how a runner's time limit ends a run."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
