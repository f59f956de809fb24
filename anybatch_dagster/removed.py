"""What is waited for by an asset that the code location does not define any more.

It was renamed or removed while its batch runs. A run of it could not be started, so its gate stays closed,
and each tick names it: until the asset is there again, a person terminates the run, or its deadline passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from . import submissions

if TYPE_CHECKING:
    from .pending import Pending

_NAMED = 3  # of those who wait for one asset; a backfill may have left a thousand


def removed_lines(entries: Sequence[Pending]) -> list[str]:
    """Who waits in vain, a line for each asset."""
    waiting: dict[str, list[Pending]] = {}
    for entry in entries:
        name = entry.asset_key.to_user_string() if entry.asset_key else "an asset without a name"
        waiting.setdefault(name, []).append(entry)
    return [_line(name, found) for name, found in waiting.items()]


def _line(name: str, found: Sequence[Pending]) -> str:
    batches = [batch_id for entry in found for batch_id in entry.batch_ids]
    if batches:
        what = f"{naming(batches)} is waited for by {naming([entry.who for entry in found])}"
    else:
        what = f"{naming([entry.who for entry in found])} waits for a turn to submit"
    runs = any(entry.run for entry in found)
    end = "terminate the run, which cancels the batch" if runs else "cancel the batch at the provider"
    return (
        f"asset {name} is not defined here any more, and {what}: define it under that name again to take the "
        f"results, or {end}"
    )


def cancels_when_late(instance: dg.DagsterInstance, entry: Pending) -> bool:
    """Whether the asset wanted its batches cancelled at the deadline, as was written down on submission.

    `on_timeout="land_partial"` comes to the same: without the asset nothing can land.
    """
    submission, run = entry.submission, entry.run
    if submission is None and run is not None and entry.asset_key is not None:
        submitted_by = run.tags.get(submissions.TAG_SUBMISSION, "")
        submission = submissions.submission_of_run(instance, entry.asset_key, submitted_by)
    return submission is not None and submission.facts.on_timeout in ("cancel", "land_partial")


def late_line(entry: Pending, *, cancelled: bool) -> str:
    """What was done at the deadline, and what can be done now."""
    name = entry.asset_key.to_user_string() if entry.asset_key else "an asset without a name"
    what = "they are cancelled" if cancelled else "they are left running"
    return (
        f"asset {name} is not defined here any more, and the deadline of {entry.who} has passed for "
        f"{', '.join(entry.batch_ids)}: {what}. To take their results, define the asset under that name "
        "again and materialize it"
    )


def naming(names: Sequence[str]) -> str:
    """Some names and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
