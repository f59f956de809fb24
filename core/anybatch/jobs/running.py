"""A whole job in one call: the decisions and the loop of `Client.run` and `AsyncClient.run`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ..errors import (
    AnyBatchError,
    ConfigurationError,
    DeadlineExceededError,
    NotFoundError,
    RowsLackingError,
)
from ..models import BatchStatus
from .lost import STUCK_AFTER
from .options import Part, options_of, wrong_choice
from .policies import CANCEL_TIME, Move, OnPartial, OnTimeout, batches_in_words, next_move, rows_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..models import Batch, Report
    from .job import Job
    from .standing import Standing

OnProgress: TypeAlias = "Callable[[Batch], None]"
"""Called with the batch whenever its status or counts change."""


@dataclass(frozen=True)
class Run:
    """One call of `run`.

    Attributes:
        job: The job.
        end: The caller's deadline, in unix seconds; None waits without one.
        on_timeout: What to do with batches that have not ended by then.
        on_partial: What to do if rows have no result after the last round.
        max_failed_ratio: The accepted share of rows without a result.
    """

    job: Job
    end: float | None = None
    on_timeout: OnTimeout = "leave"
    on_partial: OnPartial = "keep"
    max_failed_ratio: float = 1.0

    def __post_init__(self) -> None:
        for one in options_of(Part.RUN):
            if one.choices and (wrong := wrong_choice(one.name, getattr(self, one.name))):
                raise ConfigurationError(wrong)

    def next(self, standing: Standing) -> Move:
        """Decide the next step."""
        end = math.inf if self.end is None else self.end
        if standing.stopped_at is not None:
            end = standing.stopped_at + CANCEL_TIME
        deadlines = {batch.id: end for batch in standing.running}
        return next_move(standing, deadlines, self.on_timeout, time.time())

    def wait_until(self, standing: Standing) -> float | None:
        """Return when to resume the job even if its batches still run, in unix seconds; None means never.

        With `on_lost` other than "fail", resuming is what decides to continue without a lost batch.
        """
        end = self.end if standing.stopped_at is None else standing.stopped_at + CANCEL_TIME
        looks = [one for one in (end, standing.come_back_at) if one is not None]
        if self.job.on_lost != "fail":
            looks.append(time.time() + STUCK_AFTER)
        return min(looks, default=None)

    def may_pass_over(self, error: AnyBatchError) -> bool:
        """Whether the job continues after a wait that failed like this.

        `on_timeout` decides about late batches, and `on_lost` about batches that are gone.
        """
        if isinstance(error, DeadlineExceededError):
            is_late = self.end is not None and time.time() >= self.end
            return self.on_timeout != "leave" or not is_late
        return isinstance(error, NotFoundError) and self.job.on_lost != "fail"

    def after(self, standing: Standing, ended: Sequence[Batch]) -> Standing | None:
        """Return the job's standing once these batches have ended; None if only resuming it can tell.

        If no rows can be submitted again, the job need not be resumed, which saves one request per batch.
        """
        resumes = self.job.max_rounds > 1 or self.job.on_lost != "fail" or len(ended) < len(standing)
        if resumes or any(batch.status is BatchStatus.CANCELLED for batch in ended):
            return None
        return replace(standing, batches=tuple(ended))

    def late(self, standing: Standing) -> DeadlineExceededError:
        """Build the error for a deadline that has passed."""
        done = "it is left running" if self.on_timeout == "leave" else "it was cancelled"
        if standing.stopped_at is not None:
            done = "it was cancelled, and has not ended within an hour"
        running = standing.running
        return DeadlineExceededError(
            f"job {self.job.identity} had not ended at the deadline: {batches_in_words(running)}; {done}. "
            "Run the job again to wait for the same batches",
            batch_id=running[0].id if running else None,
        )

    def judged(self, report: Report) -> Report:
        """Return the report if the results are good enough; otherwise raise RowsLackingError."""
        if problem := rows_problem(report, self.on_partial, self.max_failed_ratio):
            raise RowsLackingError(f"{problem}; results in {report.results}", report=report)
        return report


# --- the loop, once per client: the two differ in how they wait, so it cannot be a flow --------------------


class Verbs(Protocol):
    """The methods of `Client` that a run needs."""

    def submit(self, job: Job) -> Standing: ...
    def resume(self, job: Job) -> Standing: ...
    def stop(self, job: Job) -> Standing: ...
    def collect(self, job: Job) -> Report: ...
    def cancel(self, batch_id: str) -> Batch: ...
    def wait(self, batch_id: str, *, deadline: float | None, on_progress: OnProgress | None) -> Batch: ...


class AsyncVerbs(Protocol):
    """The methods of `AsyncClient` that a run needs."""

    async def submit(self, job: Job) -> Standing: ...
    async def resume(self, job: Job) -> Standing: ...
    async def stop(self, job: Job) -> Standing: ...
    async def collect(self, job: Job) -> Report: ...
    async def cancel(self, batch_id: str) -> Batch: ...
    async def wait(
        self, batch_id: str, *, deadline: float | None, on_progress: OnProgress | None
    ) -> Batch: ...


def run_through(client: Verbs, run: Run, pause: float, on_progress: OnProgress | None) -> Report:
    """Submit a job, wait for it, collect it; wait `pause` seconds before resuming after a 404."""
    standing = client.submit(run.job)
    while True:
        match run.next(standing):
            case Move.LAND:
                return run.judged(client.collect(run.job))
            case Move.WAIT:
                standing = _after_waits(client, run, standing, pause, on_progress)
            case Move.STOP:
                standing = client.stop(run.job)
            case Move.CANCEL:
                for batch in standing.running:
                    client.cancel(batch.id)
                raise run.late(standing)
            case Move.LEAVE | Move.GIVE_UP:
                raise run.late(standing)


async def arun_through(client: AsyncVerbs, run: Run, pause: float, on_progress: OnProgress | None) -> Report:
    """`run_through` for `AsyncClient`; the batches are waited for concurrently."""
    standing = await client.submit(run.job)
    while True:
        match run.next(standing):
            case Move.LAND:
                return run.judged(await client.collect(run.job))
            case Move.WAIT:
                standing = await _after_awaits(client, run, standing, pause, on_progress)
            case Move.STOP:
                standing = await client.stop(run.job)
            case Move.CANCEL:
                for batch in standing.running:
                    await client.cancel(batch.id)
                raise run.late(standing)
            case Move.LEAVE | Move.GIVE_UP:
                raise run.late(standing)


def _after_waits(
    client: Verbs, run: Run, standing: Standing, pause: float, on_progress: OnProgress | None
) -> Standing:
    ended = [batch for batch in standing if batch.status.is_terminal]
    until = run.wait_until(standing)
    for batch in standing.running:
        try:
            ended.append(client.wait(batch.id, deadline=until, on_progress=on_progress))
        except AnyBatchError as error:
            if not run.may_pass_over(error):
                raise
            time.sleep(_pause_after(error, pause))
    after = run.after(standing, ended)
    return client.resume(run.job) if after is None else after


async def _after_awaits(
    client: AsyncVerbs,
    run: Run,
    standing: Standing,
    pause: float,
    on_progress: OnProgress | None,
) -> Standing:
    until = run.wait_until(standing)

    async def wait(batch: Batch) -> Batch | None:
        try:
            return await client.wait(batch.id, deadline=until, on_progress=on_progress)
        except AnyBatchError as error:
            if not run.may_pass_over(error):
                raise
            await asyncio.sleep(_pause_after(error, pause))
            return None

    try:
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(wait(batch)) for batch in standing.running]
    except ExceptionGroup as errors:
        # One failed wait ends the others. Callers expect its error, as from `Client.run`, and not a group.
        raise errors.exceptions[0] from None
    ended = [one for one in (task.result() for task in waits) if one is not None]
    before = [batch for batch in standing if batch.status.is_terminal]
    after = run.after(standing, [*before, *ended])
    return await client.resume(run.job) if after is None else after


def _pause_after(error: AnyBatchError, pause: float) -> float:
    """Return the seconds to wait before resuming a job after a failed wait: a 404 may be temporary."""
    return pause if isinstance(error, NotFoundError) else 0.0
