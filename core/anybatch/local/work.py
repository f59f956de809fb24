"""The work that becomes due during a batch: read the input once, write the result files once.

The first request after the due time does it. A claim keeps others from repeating it; until it is done, they
see the previous status.
"""

import json
from collections.abc import Callable

from .closing import finalise_standin, finalise_upstream
from .machine import TERMINAL, Record, stages
from .store import Store
from .validation import Plan, problem, read_plan


def advance(store: Store, batch: Record, now: float) -> Record:
    """Do the work that is due, unless another process is doing it."""
    if batch.final is not None:
        return batch
    if batch.upstream:
        return _close_abandoned(store, batch, now)
    due = [stage.status for stage in stages(batch) if stage.at <= now]
    if batch.problems is None and len(due) > 1:
        batch = _claimed(store, batch, validate)
        due = [stage.status for stage in stages(batch) if stage.at <= now]
    if batch.problems is not None and due[-1] in TERMINAL:
        batch = _claimed(store, batch, finalise_standin)
    return batch


def _close_abandoned(store: Store, batch: Record, now: float) -> Record:
    """End a cancelled or expired batch if no worker is left to do so; a running worker holds its claim."""
    if batch.cancel_at is None and now < batch.expires:
        return batch
    if batch.problems is None:
        batch = _claimed(store, batch, validate)
    return _claimed(store, batch, lambda store, batch: finalise_upstream(store, batch, now))


def _claimed(store: Store, batch: Record, work: Callable[[Store, Record], None]) -> Record:
    with store.claim(batch.id) as mine:
        if mine:
            fresh = load(store, batch.id)  # the previous holder may have done the work just now
            if fresh is not None and fresh.final is None:
                work(store, fresh)
    return load(store, batch.id) or batch


def load(store: Store, batch_id: str) -> Record | None:
    row = store.one("SELECT * FROM batches WHERE id = ?", batch_id)
    return Record.of(row) if row else None


def validate(store: Store, batch: Record) -> None:
    """Read the input unless that was done, and record each row's planned outcome or the input's problems."""
    if batch.problems is not None:
        return
    try:
        with store.blob(batch.input_file_id).open("rb") as lines:
            plan = read_plan(lines, batch)
    except FileNotFoundError:
        plan = Plan(b"", [problem("file_not_found", "The input file is gone.", "input_file_id", None)])
    rows = 0 if plan.problems else len(plan.outcomes)
    with store.write() as connection:
        connection.execute(
            "UPDATE batches SET rows = ?, problems = ? WHERE id = ? AND problems IS NULL",
            (rows, json.dumps(plan.problems), batch.id),
        )
        if not plan.problems:
            connection.execute("INSERT OR IGNORE INTO plans VALUES (?, ?)", (batch.id, plan.outcomes))
