"""Waits that are seconds in life are short here."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anybatch.jobs import lost
from anybatch.jobs import shard as shards
from anybatch.providers import finding
from anybatch.rows import downloads
from anybatch.testing import shorten_pauses
from tests.exactly_once.forge import Forge
from tests.exactly_once.models import Model
from tests.exactly_once.stage import LOOKS, POLL
from tests.exactly_once.worlds import LEASE, Clock


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_LEASE_POLL", POLL)
    monkeypatch.setattr(shards, "_WRITE_TIME", POLL)
    shorten_pauses(monkeypatch)
    monkeypatch.setattr(finding, "ASK_AFTER", LOOKS)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of the machine's own reaches a test."""
    for name in os.environ:
        if name.upper().endswith(("_API_KEY", "_BASE_URL", "_API_BASE", "_PROXY")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


@pytest.fixture(scope="session")
def other_forge() -> Iterator[Forge]:
    """For a second process at the same time."""
    with Forge() as forge:
        yield forge


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Model]]:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(finding, "ASK_AFTER", (1.0,))
    monkeypatch.setattr(shards, "_LEASE_POLL", LEASE)
    monkeypatch.setattr(shards, "_WRITE_TIME", 1.0)
    monkeypatch.setattr(downloads, "PAUSES", (1.0,))
    monkeypatch.setattr(downloads, "SETTLING", LEASE)
    monkeypatch.setattr(downloads, "DOUBT", 1.0)
    for module in (downloads, lost):
        monkeypatch.setattr(module, "GONE_AFTER", LEASE)
    monkeypatch.setattr(lost, "LOOK_EVERY", LEASE)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    ram = Path("/dev/shm")
    home = ram / f"anybatch-{os.getpid()}" if ram.is_dir() else tmp_path
    home.mkdir(exist_ok=True)
    yield lambda step, kind=Model, **options: kind(home, clock, step, **options)
    if home != tmp_path:
        shutil.rmtree(home)
