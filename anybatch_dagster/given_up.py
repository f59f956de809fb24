"""What is waited for no more: its run was terminated, or its asset is gone and the deadline has passed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybatch import AnyBatchError, AsyncClient, BatchStatus, NotFoundError

from .polling import ONCE
from .removed import naming

if TYPE_CHECKING:
    import logging

    from .pending import Pending
    from .resource import BatchResource


@dataclass(frozen=True)
class GivenUp:
    """`cancels`: its batches are to be cancelled. `done` is to be called when this is seen to, with whether
    they were."""

    entry: Pending
    why: str
    done: Callable[[bool], None]
    cancels: bool = True


async def call_off(
    given_up: GivenUp,
    resources: Mapping[str, BatchResource],
    wanted: Mapping[str, Collection[str]],
    seconds: float,
    log: logging.Logger,
    troubles: list[str],
    done: list[tuple[GivenUp, bool]],
) -> None:
    """Cancel its batches in so many seconds, but for those that something else waits for.

    `wanted` are those by their resource. `troubles` and `done` are added to as soon as there is something to
    add, since a tick may not wait for the end of this.
    """
    entry = given_up.entry
    batch_ids = [one for one in entry.batch_ids if one not in wanted.get(entry.resource, ())]
    if not given_up.cancels or not batch_ids:
        done.append((given_up, False))
        return
    if entry.resource not in resources:
        troubles.append(
            f"{naming(batch_ids)} of {entry.who} cannot be cancelled from here, though {given_up.why}: "
            f"build_batch_sensor was not given the resource {entry.resource!r}"
        )
        if entry.is_late:  # by now a cancel would save little, and the line has been there long enough
            done.append((given_up, False))
        return
    try:
        with suppress(TimeoutError):  # the next tick tries again
            async with asyncio.timeout(seconds), resources[entry.resource].async_client(retry=ONCE) as client:
                refused = [await _cancel(client, batch_id, given_up.why, log) for batch_id in batch_ids]
                troubles += filter(None, refused)
                if not any(refused):
                    done.append((given_up, True))
    except AnyBatchError as error:
        troubles.append(f"cancelling {naming(batch_ids)}: {error}")


async def _cancel(client: AsyncClient, batch_id: str, why: str, log: logging.Logger) -> str | None:
    """What keeps a batch from being cancelled: it must not keep the others of its job running."""
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
