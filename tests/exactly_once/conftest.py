"""Waits that are seconds in life are short here."""

from __future__ import annotations

import os

import pytest

from anybatch import collect, shards
from anybatch.providers import base

LOOKS = (0.01, 0.05, 0.2)
POLL = 0.02


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_ASK_AFTER", LOOKS)
    monkeypatch.setattr(shards, "_LEASE_POLL", POLL)
    monkeypatch.setattr(shards, "_WRITE_TIME", POLL)
    monkeypatch.setattr(collect, "_SETTLING_POLL", 0.01)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of the machine's own reaches a test."""
    for name in os.environ:
        if name.upper().endswith(("_API_KEY", "_BASE_URL", "_API_BASE", "_PROXY")):
            monkeypatch.delenv(name)
