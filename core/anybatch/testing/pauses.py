"""Shorten pauses that last minutes in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..jobs import lost
from ..providers import finding
from ..rows import downloads

if TYPE_CHECKING:
    import pytest


def shorten_pauses(patch: pytest.MonkeyPatch) -> None:
    """Let waits for incomplete or lost results give up within a second.

    Incomplete or missing files are still requested seven more times: the sum of the pauses counts, not the
    time that passes.

    Args:
        patch: The test's `monkeypatch` fixture.
    """
    patch.setattr(finding, "ASK_AFTER", (0.01, 0.01, 0.01))
    patch.setattr(downloads, "PAUSES", (0.003,))
    patch.setattr(downloads, "SETTLING", 0.02)
    patch.setattr(downloads, "GONE_AFTER", 0.02)
    patch.setattr(downloads, "DOUBT", 0.006)
    patch.setattr(lost, "GONE_AFTER", 0.05)
    patch.setattr(lost, "LOOK_EVERY", 0.01)
