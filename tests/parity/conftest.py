"""A provider, and each surface in turn."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

# First: it makes the home that Airflow reads when it is imported.
from tests.airflow import conftest as _airflow  # isort: skip
from anybatch.providers.compatible import DIALECTS
from anybatch.testing import shorten_pauses
from tests.dagster.conftest import _gated_memory, gated  # noqa: F401  fixtures
from tests.fakes.openai import OpenAIFake
from tests.fakes.server import FakeServer

from .surfaces import KEY, Airflow, Dagster, Plain, Provider, Surface

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SURFACES = {"plain": Plain, "airflow": Airflow, "dagster": Dagster}


@pytest.fixture
def provider() -> Iterator[Provider]:
    fake = OpenAIFake(key=KEY)
    with FakeServer(fake) as server:
        yield Provider(server, fake)


@pytest.fixture(params=SURFACES)
def surface(
    request: pytest.FixtureRequest, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Surface:
    shorten_pauses(monkeypatch)
    monkeypatch.setitem(DIALECTS, "openai", _airflow.polled_every(DIALECTS["openai"], (0.05, 0.2)))
    account = {
        "conn_type": "anybatch", "password": KEY, "host": provider.server.api_base,
        "extra": {"provider": "openai"},
    }  # fmt: skip
    monkeypatch.setenv("AIRFLOW_CONN_FAKE", json.dumps(account))
    surface: Surface = SURFACES[request.param](provider, tmp_path / "out")
    if isinstance(surface, Dagster):
        surface.instance = request.getfixturevalue("gated")
    return surface
