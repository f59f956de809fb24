"""The state of a batch at a given time: pure functions of its record and the time.

`stages` says when a batch enters which status, `finished_rows` how many rows the stand-in has finished,
`view` puts both into OpenAI's batch object. The work that is due at some times is in `work.py`.
"""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import faults

TERMINAL = ("failed", "completed", "expired", "cancelled")
MOMENT = 0.1  # share of the delay that validating, finalizing and cancelling take
LONGEST_MOMENT = 5.0  # seconds

Json = dict[str, Any]


class Stage(NamedTuple):
    at: float
    status: str


@dataclass(frozen=True)
class Record:
    """A batch as stored; times are unix seconds with fractions, lifetimes are seconds."""

    id: str
    created: float
    endpoint: str
    input_file_id: str
    completion_window: str
    expires: float
    metadata: str | None
    output_lifetime: float
    model: str | None
    upstream: int
    rows: int | None
    problems: str | None
    cancel_at: float | None
    events: str
    completed: int
    failed: int
    final: str | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> "Record":
        return cls(*(row[name] for name in cls.__dataclass_fields__))

    @property
    def invalid(self) -> bool:
        """Whether validation has found a problem."""
        return self.problems not in (None, "[]")

    @property
    def faults(self) -> faults.Faults:
        try:
            return faults.parse(self.model)
        except faults.ModelError:  # validation reports it
            return faults.Faults()


def stages(batch: Record) -> list[Stage]:
    """Return when the batch enters which status; the last is terminal, unless a real model still works."""
    if batch.upstream:
        past = [
            Stage(batch.created, "validating"),
            *(Stage(float(at), str(status)) for at, status in json.loads(batch.events)),
        ]
        if batch.cancel_at is not None and past[-1].status not in TERMINAL:
            past.append(Stage(max(batch.cancel_at, past[-1].at), "cancelling"))
        return past
    ask = batch.faults
    start, stop, end = _span(batch)
    moment = end - stop
    last = "expired" if ask.expire else "completed"
    planned = [Stage(batch.created, "validating"), Stage(start, "in_progress")]
    planned += [Stage(stop, "finalizing"), Stage(end, last)]
    if batch.invalid:
        planned = [planned[0], Stage(start, "failed")]
    elif batch.expires < stop:
        close = Stage(batch.expires, "finalizing"), Stage(batch.expires + moment, "expired")
        planned = _cut(planned, batch.expires, *close)
    wishes = [batch.cancel_at, None if ask.cancel is None else batch.created + ask.cancel]
    cancel = min((at for at in wishes if at is not None), default=None)
    if cancel is not None and not any(
        at <= cancel for at, status in planned if status in ("finalizing", *TERMINAL)
    ):
        planned = _cut(planned, cancel, Stage(cancel, "cancelling"), Stage(cancel + moment, "cancelled"))
    return planned


def _cut(planned: list[Stage], at: float, *instead: Stage) -> list[Stage]:
    return [stage for stage in planned if stage.at < at or stage is planned[0]] + list(instead)


def _span(batch: Record) -> tuple[float, float, float]:
    """Return when the rows of an undisturbed batch start and stop, and when it ends."""
    delay = batch.faults.delay
    moment = min(delay * MOMENT, LONGEST_MOMENT)
    return batch.created + moment, batch.created + delay - moment, batch.created + delay


def finished_rows(batch: Record, now: float) -> int:
    """Return how many rows, in input order, the stand-in has finished by `now`."""
    start, stop, _ = _span(batch)
    halt = next(
        (at for at, status in stages(batch) if status in ("cancelling", "finalizing", "failed")), stop
    )
    now = min(now, halt)
    if now < start or not batch.rows:
        return 0
    return batch.rows if now >= stop else int((now - start) / (stop - start) * batch.rows)


def view(batch: Record, now: float, outcomes: bytes | None) -> Json:
    """Return the batch as OpenAI's object at `now`; `outcomes` is its plan while it is open."""
    final: Json = json.loads(batch.final) if batch.final else {}
    past = [Stage(*event) for event in final["events"]] if final else stages(batch)
    past = past if final else [stage for stage in past if stage.at <= now] or past[:1]
    if not final and past[-1].status in TERMINAL:
        past.pop()  # its result files are still being written
    if batch.problems is None and not batch.upstream and past[-1].status != "cancelling":
        past = past[:1]  # its input is still being read
    entered = {stage.status: int(stage.at) for stage in past}
    problems = json.loads(batch.problems or "[]")
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": problems} if problems and past[-1].status == "failed" else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": past[-1].status,
        "output_file_id": final.get("output_file_id"),
        "error_file_id": final.get("error_file_id"),
        "created_at": int(batch.created),
        "in_progress_at": entered.get("in_progress"),
        "expires_at": int(batch.expires),
        "finalizing_at": entered.get("finalizing"),
        "completed_at": entered.get("completed"),
        "failed_at": entered.get("failed"),
        "expired_at": entered.get("expired"),
        "cancelling_at": entered.get("cancelling"),
        "cancelled_at": entered.get("cancelled"),
        "request_counts": final.get("request_counts") or _progress(batch, now, outcomes),
        "usage": final.get("usage"),
        "metadata": json.loads(batch.metadata) if batch.metadata else None,
    }


def _progress(batch: Record, now: float, outcomes: bytes | None) -> dict[str, int]:
    if batch.upstream or outcomes is None:
        return {"total": batch.rows or 0, "completed": batch.completed, "failed": batch.failed}
    done = outcomes[: finished_rows(batch, now)]
    completed, failed = done.count(faults.SUCCEED), done.count(faults.FAIL)
    return {"total": len(outcomes), "completed": completed, "failed": failed}
