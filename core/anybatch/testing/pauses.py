"""Pauses that are minutes in life, made short for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..jobs import lost
from ..providers import finding
from ..rows import downloads

if TYPE_CHECKING:
    import pytest


def shorten_pauses(patch: pytest.MonkeyPatch) -> None:
    """Let what waits for a provider to settle, or to find what it has lost, give up within a second.

    What is short or gone is asked for seven times more: the pauses count for that, not the time that passes.
    """
    patch.setattr(finding, "ASK_AFTER", (0.01, 0.01, 0.01))
    patch.setattr(downloads, "PAUSES", (0.003,))
    patch.setattr(downloads, "SETTLING", 0.02)
    patch.setattr(downloads, "GONE_AFTER", 0.02)
    patch.setattr(downloads, "DOUBT", 0.006)
    patch.setattr(lost, "GONE_AFTER", 0.05)
    patch.setattr(lost, "LOOK_EVERY", 0.01)
