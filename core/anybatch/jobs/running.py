"""A whole job in one call: what `Client.run` and `AsyncClient.run` decide between two waits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
    from ..models import Batch, Report
    from .job import Job
    from .standing import Standing


@dataclass(frozen=True)
class Run:
    """One call of `run`: `end` is the caller's deadline, in unix seconds; None waits without one."""

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
        """What to do now."""
        end = math.inf if self.end is None else self.end
        if standing.stopped_at is not None:
            end = standing.stopped_at + CANCEL_TIME
        deadlines = {batch.id: end for batch in standing.running}
        return next_move(standing, deadlines, self.on_timeout, time.time())

    def wait_until(self, standing: Standing) -> float | None:
        """When to look at the job as a whole again, whatever its batches do.

        A batch that is lost, or never ends being cancelled, may be done without: that is decided on the way.
        """
        end = self.end if standing.stopped_at is None else standing.stopped_at + CANCEL_TIME
        looks = [one for one in (end, standing.come_back_at) if one is not None]
        if self.job.on_lost != "fail":
            looks.append(time.time() + STUCK_AFTER)
        return min(looks, default=None)

    def may_pass_over(self, error: AnyBatchError) -> bool:
        """Whether the job goes on after a wait that ended so: what is late is for `on_timeout` to decide, and
        what is gone for `on_lost`."""
        if isinstance(error, DeadlineExceededError):
            is_late = self.end is not None and time.time() >= self.end
            return self.on_timeout != "leave" or not is_late
        return isinstance(error, NotFoundError) and self.job.on_lost != "fail"

    def after(self, standing: Standing, ended: Sequence[Batch]) -> Standing | None:
        """The job's standing once these batches have ended; None where the job has to be asked for it.

        It is not, where no rows may be submitted again: that would cost a request for each batch.
        """
        asks = self.job.max_rounds > 1 or self.job.on_lost != "fail" or len(ended) < len(standing)
        if asks or any(batch.status is BatchStatus.CANCELLED for batch in ended):
            return None
        return replace(standing, batches=tuple(ended))

    def late(self, standing: Standing) -> DeadlineExceededError:
        """What to raise where the deadline has passed."""
        done = "it is left running" if self.on_timeout == "leave" else "it was cancelled"
        if standing.stopped_at is not None:
            done = "it was cancelled, and has not ended within an hour"
        running = standing.running
        return DeadlineExceededError(
            f"job {self.job.identity} had not ended at the deadline: {batches_in_words(running)}; {done}",
            batch_id=running[0].id if running else None,
        )

    def judged(self, report: Report) -> Report:
        """The report, if it is good enough; raises RowsLackingError."""
        if problem := rows_problem(report, self.on_partial, self.max_failed_ratio):
            raise RowsLackingError(f"{problem}; results in {report.results}", report=report)
        return report
