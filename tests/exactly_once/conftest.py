"""Waits that are seconds in life are short here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from anybatch.jobs import shard as shards
from anybatch.providers import base
from tests.exactly_once.forge import Forge
from tests.exactly_once.stage import LOOKS, POLL
from tests.pauses import shorten


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_ASK_AFTER", LOOKS)
    monkeypatch.setattr(shards, "_LEASE_POLL", POLL)
    monkeypatch.setattr(shards, "_WRITE_TIME", POLL)
    shorten(monkeypatch)


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
