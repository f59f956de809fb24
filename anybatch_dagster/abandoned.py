"""Batches that no run is going to collect.

Either a person terminated the run that waited for them, or the code location no longer defines their asset:
it was renamed or removed while the batch ran. In the second case no run of the asset could start, so its gate
stays closed, and each tick names it, until the asset is defined again, a person terminates the run, or the
deadline passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg

from anybatch import AnyBatchError, AsyncClient, BatchStatus, NotFoundError

from . import submissions
from .polling import ONCE

if TYPE_CHECKING:
    import logging

    from .pending import Pending
    from .resource import BatchResource


_MAX_NAMED = 3  # names in one message; a backfill may have left a thousand


@dataclass(frozen=True)
class Abandoned:
    """Batches that no run is going to collect.

    Attributes:
        entry: The run or submission that waited for them.
        why: The reason, for messages.
        done: To be called when all is done, with whether the batches were cancelled.
        cancels: Whether to cancel them.
    """

    entry: Pending
    why: str
    done: Callable[[bool], None]
    cancels: bool = True


async def cancel_abandoned(
    abandoned: Abandoned,
    resources: Mapping[str, BatchResource],
    wanted: Mapping[str, Collection[str]],
    seconds: float,
    log: logging.Logger,
    problems: list[str],
    done: list[tuple[Abandoned, bool]],
) -> None:
    """Cancel the batches, except those that something else waits for.

    Args:
        abandoned: The batches.
        resources: The accounts, by resource key.
        wanted: The batches that something waits for, by resource key.
        seconds: How long this may take; the next tick goes on.
        log: Gets a line for each cancelled batch.
        problems: Gets what went wrong, at once: the tick does not wait for the end of this.
        done: Gets `abandoned`, and whether its batches were cancelled, once nothing is left to do.
    """
    entry = abandoned.entry
    batch_ids = [one for one in entry.batch_ids if one not in wanted.get(entry.resource, ())]
    if not abandoned.cancels or not batch_ids:
        done.append((abandoned, False))
        return
    if entry.resource not in resources:
        problems.append(
            f"{naming(batch_ids)} of {entry.waiter} cannot be cancelled from here, though {abandoned.why}: "
            f"build_batch_sensor was not given the resource {entry.resource!r}; add it to resource_keys"
        )
        if (
            entry.is_late
        ):  # stop trying: each tick has said so until the deadline, and a cancel would save little now
            done.append((abandoned, False))
        return
    try:
        with suppress(TimeoutError):  # the next tick tries again
            async with asyncio.timeout(seconds), resources[entry.resource].async_client(retry=ONCE) as client:
                refused = [await _cancel(client, batch_id, abandoned.why, log) for batch_id in batch_ids]
                problems += filter(None, refused)
                if not any(refused):
                    done.append((abandoned, True))
    except AnyBatchError as error:
        problems.append(f"cancelling {naming(batch_ids)}: {error}")


async def _cancel(client: AsyncClient, batch_id: str, why: str, log: logging.Logger) -> str | None:
    """Cancel one batch; what goes wrong is returned, so that the others are cancelled as well."""
    try:
        batch = await client.retrieve(batch_id)
        if not batch.status.is_terminal and batch.status is not BatchStatus.CANCELLING:
            await client.cancel(batch_id)
            log.info(f"cancelled {batch_id}: {why}")
    except NotFoundError as error:
        log.warning(f"{batch_id} was to be cancelled, since {why}: {error}")
    except AnyBatchError as error:
        return f"cancelling {batch_id}: {error}"
    return None


# --- an asset that is no longer defined --------------------------------------------------------------------


def removed_lines(entries: Sequence[Pending]) -> list[str]:
    """For each asset that is no longer defined, a line that says who waits in vain."""
    waiting: dict[str, list[Pending]] = {}
    for entry in entries:
        name = entry.asset_key.to_user_string() if entry.asset_key else "an asset without a name"
        waiting.setdefault(name, []).append(entry)
    return [_line(name, found) for name, found in waiting.items()]


def _line(name: str, found: Sequence[Pending]) -> str:
    batches = [batch_id for entry in found for batch_id in entry.batch_ids]
    if batches:
        what = f"{naming(batches)} is waited for by {naming([entry.waiter for entry in found])}"
    else:
        what = f"{naming([entry.waiter for entry in found])} waits for a turn to submit"
    runs = any(entry.run for entry in found)
    end = "terminate the run, which cancels the batch" if runs else "cancel the batch at the provider"
    return (
        f"asset {name} is not defined here any more, and {what}: define it under that name again to take the "
        f"results, or {end}"
    )


def cancels_when_late(instance: dg.DagsterInstance, entry: Pending) -> bool:
    """Whether to cancel the batches at the deadline, as the asset's `on_timeout` was recorded at submission.

    "land_partial" is treated as "cancel": without the asset nothing can land.
    """
    submission, run = entry.submission, entry.run
    if submission is None and run is not None and entry.asset_key is not None:
        submitted_by = run.tags.get(submissions.TAG_SUBMISSION, "")
        submission = submissions.submission_of_run(instance, entry.asset_key, submitted_by)
    return submission is not None and submission.facts.on_timeout in ("cancel", "land_partial")


def late_line(entry: Pending, *, cancelled: bool) -> str:
    """What was done at the deadline, and what a person can do now."""
    name = entry.asset_key.to_user_string() if entry.asset_key else "an asset without a name"
    what = "they are cancelled" if cancelled else "they are left running"
    return (
        f"asset {name} is not defined here any more, and the deadline of {entry.waiter} has passed for "
        f"{', '.join(entry.batch_ids)}: {what}. To take their results, define the asset under that name "
        "again and materialize it"
    )


def naming(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
