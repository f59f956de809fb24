"""The pauses that are minutes in life, for tests that do not wait for them."""

from __future__ import annotations

import pytest

from anybatch.jobs import lost
from anybatch.rows import downloads


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Result files settle, and batches are gone for good, within a fraction of a second."""
    patch.setattr(downloads, "_PAUSES", (0.01,))
    patch.setattr(downloads, "SETTLING", 0.1)
    patch.setattr(downloads, "GONE_AFTER", 0.15)
    patch.setattr(downloads, "DOUBT", 0.02)
    patch.setattr(lost, "GONE_AFTER", 0.15)
    patch.setattr(lost, "_LOOK_EVERY", 0.03)
