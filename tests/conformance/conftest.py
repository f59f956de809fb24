"""Worlds are opened once a module and mode, and are made as new for every test."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from anybatch.jobs import shard as shards
from anybatch.testing import shorten_pauses

from .world import MODES, Driver, LocalWorld, RemoteWorld, World, open_world


@pytest.fixture(scope="package")
def fast_folder() -> Iterator[Path]:
    """In memory where the machine has such a place: jobs write and sync many small files."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="conformance-", dir=place if os.access(place, os.W_OK) else None
    ) as name:
        yield Path(name)


@pytest.fixture
def tmp_path(fast_folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=fast_folder))


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_world(request: pytest.FixtureRequest, fast_folder: Path) -> Iterator[World]:
    with open_world(request.param, Path(tempfile.mkdtemp(dir=fast_folder))) as world:
        yield world


@pytest.fixture(scope="module")
def shared_driver(shared_world: World, mode: str) -> Driver:
    return shared_world.open(mode)


@pytest.fixture
def world(shared_world: World) -> World:
    assert isinstance(shared_world, RemoteWorld | LocalWorld)
    return shared_world.fresh()


@pytest.fixture
def driver(world: World, shared_driver: Driver) -> Driver:
    return shared_driver


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes a `mode` runs in both."""
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES, indirect=True, scope="module")


NOT_OURS = re.compile(
    r".*_(API_KEY|API_BASE|BASE_URL|TOKEN|ENDPOINT|ORG_ID|PROJECT_ID)|(HTTPS?|ALL)_PROXY", re.I
)


@pytest.fixture(scope="package", autouse=True)
def surroundings(fast_folder: Path) -> Iterator[None]:
    """No key or address of the machine's own, and pauses that are minutes in life are short."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(NOT_OURS.fullmatch, list(os.environ)):
            patch.delenv(name)
        patch.setattr(tempfile, "tempdir", str(fast_folder))
        shorten_pauses(patch)
        for name in ("_LEASE_POLL", "_WRITE_TIME"):  # between two looks at what another attempt does
            patch.setattr(shards, name, 0.02)
        yield
