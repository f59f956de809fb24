"""The cluster, for as long as its tests run."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import psycopg2
import pytest

from tests.airflow.cluster.scenarios import Scenarios, selected
from tests.airflow.cluster.services import POSTGRES, connect, own_database

from .account import Account
from .cluster import LOCATIONS, Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenarios]:
    """All selected scenarios, under way in a cluster."""
    if problem := _missing():
        (pytest.fail if os.environ.get("ANYBATCH_REQUIRE_SERVICES") == "1" else pytest.skip)(problem)
    with contextlib.ExitStack() as ending:
        ending.enter_context(_ended_by_sigterm())
        database = ending.enter_context(own_database())
        names = [name for names in LOCATIONS.values() for name in names]
        accounts = {name: ending.enter_context(Account(name)) for name in names}
        cluster = Cluster(tmp_path_factory.mktemp("cluster") / "dagster", database, accounts)
        ending.enter_context(cluster)
        scenarios = Scenarios(cluster, selected(request.session.items))
        ending.callback(scenarios.end)
        yield scenarios


def _missing() -> str | None:
    try:
        connect(f"{POSTGRES}/postgres").close()
    except psycopg2.OperationalError as error:
        return f"no PostgreSQL: {error}"
    return None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM as on Control-C: it is how a runner's time limit ends a run."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
