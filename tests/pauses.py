"""The pauses that are minutes in life, for tests that do not wait for them."""

from __future__ import annotations

import pytest

from anybatch.jobs import lost
from anybatch.jobs import shard as shards
from anybatch.rows import downloads


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Result files settle, and batches are gone for good, within a fraction of a second.

    What is short or gone is asked for seven times more: the pauses count for that, not the time that passes.
    """
    patch.setattr(downloads, "_PAUSES", (0.003,))
    patch.setattr(downloads, "SETTLING", 0.02)
    patch.setattr(downloads, "GONE_AFTER", 0.02)
    patch.setattr(downloads, "DOUBT", 0.006)
    patch.setattr(lost, "GONE_AFTER", 0.05)
    patch.setattr(lost, "_LOOK_EVERY", 0.01)
    patch.setattr(shards, "_LEASE_POLL", 0.02)
    patch.setattr(shards, "_WRITE_TIME", 0.02)
