"""An attempt at a job: the work between two waits.

    submit the round ──> wait ──> all ended ──> which rows go again?
           ^                                      │           │
           └── keep the rows so far, open the ────┘           └── none: land
               next round with those

Each step may be taken by another process than the one before, or by several at once: the ledger decides.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import orjson

from ..errors import AnyBatchError, InputChangedError, InputError, JobError, LedgerConflictError
from ..flow import Flow, do
from ..models import BatchStatus, Outcome
from ..rows.planning import make_plan
from .collect import ended_round, gather
from .inputs import SPOOL, InputGoneError, open_input
from .job import fingerprint, job_metadata
from .landing import land
from .lost import MaybeLostError
from .rounds import (
    Chosen,
    budget,
    choose,
    fills_batches,
    ids_name,
    ids_of_shards,
    next_round,
    records_of,
    rows_name,
    stray_name,
)
from .shard import Submission, read_ledger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..models import Batch
    from ..providers.base import Provider
    from ..rows.planning import Plan
    from .folder import JobFolder
    from .job import Job
    from .landing import Gathered
    from .ledger import Ledger, ShardRecord
    from .rounds import Budget

log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One process at work on a job.

    Attributes:
        job: The job.
        provider: The account that it runs on.
        scratch: A temporary folder of the attempt's own.
        resubmit_failed_batch: Whether to replace a batch that the provider refused as a whole. Only an
            attempt that begins does so: otherwise a refused batch would be resubmitted in a loop.
        id: The attempt's id, by which the ledger names it.
        plans: The plans of the rounds, as far as they are known.
        metadata: The metadata of the job's batches.
    """

    job: Job
    provider: Provider
    scratch: Path
    resubmit_failed_batch: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    plans: dict[int, Plan | None] = field(default_factory=dict)
    metadata: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        job, self.metadata = self.job, job_metadata(self.job, self.provider)
        self.provider.check(job.endpoint, self.metadata, job.options, job.completion_window)

    def go_on(self, ledger: Ledger) -> Flow[list[Batch]]:
        """Take the job as far as possible without waiting, and return the batches of the current round.

        If all have ended and rows may be submitted again, this reads the results to find out which. If there
        are none to submit, it lands the results right away, since it has already downloaded them. A stopped
        job without any batch in this round lands right away, too.
        """
        while True:
            batches, maybe_lost = yield from self._submitted(ledger)
            if not all(batch.status.is_terminal for batch in batches):
                return batches  # by the time these end, a batch that answers 404 is back or certainly gone
            for record in maybe_lost:
                if (batch := (yield from self._submission(ledger, record).run())) is not None:
                    batches.append(batch)
            if not all(batch.status.is_terminal for batch in batches):
                return batches
            if batches and not any(budget(self.job, ledger, {batch.status for batch in batches})):
                return batches
            ledger = yield from read_ledger(self.job, ledger.fingerprint)
            if ledger.landed_at is not None:
                return []
            known = {record.batch_id for record in ledger.current}
            if not known.issuperset(batch.id for batch in batches):
                continue  # another attempt has moved the job on
            try:
                if (yield from self._close_round(ledger, batches)):
                    return batches
            except (FileNotFoundError, LedgerConflictError):
                now = yield from read_ledger(self.job, ledger.fingerprint)
                if (now.shards, now.landed_at) == (ledger.shards, ledger.landed_at):
                    raise
                log.info("job %s: another attempt has moved the job on; following it", now.job)
                ledger = now
            else:
                ledger = yield from read_ledger(self.job, ledger.fingerprint)

    def stop(self, ledger: Ledger) -> Flow[list[Batch]]:
        """Cancel the running batches of a stopped job, and return the batches of the current round.

        Known batches come first. If one cannot be cancelled, the others are cancelled all the same, and the
        first error is raised at the end.
        """
        batches: dict[int, Batch] = {}
        problems: list[AnyBatchError] = []
        maybe_lost: list[ShardRecord] = []
        records = sorted(ledger.current, key=lambda record: record.batch_id is None)
        # `chain` reads `maybe_lost` last, when the loop has filled it.
        again = ((one, True) for one in maybe_lost)
        for record, patient in chain(((one, False) for one in records), again):
            try:
                batch = yield from self._submission(ledger, record, patient=patient).run()
            except MaybeLostError:
                maybe_lost.append(record)  # wait for it only when the others are cancelled
            except AnyBatchError as error:
                log.warning(
                    "job %s: the batch of shard %d could not be cancelled: %s",
                    ledger.job, record.shard, error,
                )  # fmt: skip
                problems.append(error)
            else:
                if batch is not None:
                    batches[record.shard] = batch
        if problems:
            raise problems[0]
        return [batches[shard] for shard in sorted(batches)]

    def reopen(self, ledger: Ledger) -> Flow[Ledger | None]:
        """Open one more round of a landed job, and return its ledger; None if there are no rows for it.

        That takes a higher `max_rounds`, or results that the provider has lost and `on_lost="resubmit"`. The
        landed results stay until the next landing replaces them.
        """
        folder = self.job.folder
        report = yield from do(folder.read_report)
        if report is None or report.ok:
            return None
        allowed = budget(self.job, ledger.model_copy(update={"recoveries": 0}), ())
        allowed = allowed._replace(cancelled=allowed.repeat)  # such a round takes cancelled rows as well
        if not allowed.repeat and not (allowed.lost and report.counts.get(Outcome.MISSING)):
            return None
        try:
            chosen = yield from do(partial(self._choose_landed, ledger, allowed))
            if not self._fill_a_batch(chosen, ledger):
                return None
            plan = yield from self._plan_next(ledger, chosen)
        except (FileNotFoundError, JobError) as error:  # the input may be gone: keep the landed results
            log.warning("job %s has landed; its failed rows are not submitted again: %s", ledger.job, error)
            return None
        again = ledger.model_copy(update={"max_rounds": self.job.max_rounds, "recoveries": 0})
        after = next_round(
            again, records_of(plan, ledger.round + 1), report.batches, report.unexpected, chosen,
            counts=allowed.repeat,
        )  # fmt: skip
        kept = yield from do(partial(_copies, folder, self.scratch))
        yield from self._open(ledger, after, plan, *kept)
        return (yield from read_ledger(self.job, ledger.fingerprint))

    def plan_of(self, ledger: Ledger, number: int) -> Flow[Plan]:
        """Return the plan of a round; read the input again if this process has not planned that round."""
        if (plan := self.plans.get(number)) is None:
            ids = yield from do(partial(self.job.folder.fetch, ids_name(number), self.scratch))
            plan = self.plans[number] = yield from do(partial(self._plan, ledger, number, ids))
        return plan

    def _submitted(self, ledger: Ledger) -> Flow[tuple[list[Batch], list[ShardRecord]]]:
        """Get the batch of each shard of the current round; in a stopped job, of each that has one.

        Returns the batches, and the shards whose batch answers 404 but may come back.
        """
        batches, maybe_lost = [], []
        for record in ledger.current:
            try:
                batch = yield from self._submission(ledger, record, patient=False).run()
            except MaybeLostError:
                maybe_lost.append(record)
            else:
                if batch is not None:
                    batches.append(batch)
        return batches, maybe_lost

    def _submission(self, ledger: Ledger, record: ShardRecord, *, patient: bool = True) -> Submission:
        return Submission(
            self.job, self.provider, self.plan_of, record, self.metadata, self.id, ledger.fingerprint,
            self.resubmit_failed_batch, patient,
        )  # fmt: skip

    def _close_round(self, ledger: Ledger, batches: Sequence[Batch]) -> Flow[bool]:
        """Read the results of a round that has ended, then open the next round or land; True if it landed."""
        ended = yield from ended_round(self.job, self.provider, ledger, batches)
        with (yield from do(self.job.folder.scratch)) as scratch:
            gathered = yield from gather(self.job, self.provider, ledger, ended, scratch)
            chosen = yield from do(partial(self._choose, ledger, gathered))
            if not self._fill_a_batch(chosen, ledger):
                yield from land(self.job, self.provider, ledger, gathered)
                return True
            try:
                plan = yield from self._plan_next(ledger, chosen)
            except InputGoneError as error:
                if chosen.cancelled < chosen.rows:
                    raise
                # The user did not ask for this round (it only replaces cancelled batches), so do not fail.
                log.warning(
                    "job %s lands with cancelled rows, which cannot be submitted again: %s", ledger.job, error
                )
                yield from land(self.job, self.provider, ledger, gathered)
                return True
            shards, ended_batches = records_of(plan, ledger.round + 1), gathered.batch_records
            after = next_round(ledger, shards, ended_batches, gathered.tally.unexpected, chosen)
            yield from self._open(ledger, after, plan, gathered.rows, gathered.stray)
            return False

    def _open(self, before: Ledger, after: Ledger, plan: Plan, rows: Path, stray: Path) -> Flow[None]:
        """Open a round, unless another attempt has moved the job on.

        `rows` and `stray` are the files of all rows and stray lines so far.
        """
        folder, number = self.job.folder, after.round
        keep = partial(_keep, folder, number, rows, stray, self._ids(number), self.scratch / SPOOL)
        if (yield from do(partial(folder.commit, before, after, first=keep))) is None:
            return
        self.plans[number] = plan
        log.info("job %s: round %d submits %d rows again", before.job, number, plan.rows)
        if number > 2:  # the files just kept replace those of the round before
            yield from do(partial(folder.discard, rows_name(number - 2), stray_name(number - 2)))

    def _fill_a_batch(self, chosen: Chosen, ledger: Ledger) -> bool:
        """Whether there are rows to submit again, and enough of them for this provider's smallest batch."""
        limits = self.provider.limits
        most = min(limits.requests, ledger.shard_requests or limits.requests)
        if not chosen.rows:
            return False
        if not (fills := fills_batches(chosen.rows, limits.min_requests, most)):
            log.warning(
                "job %s: %d rows could be submitted again, but a batch at %s needs at least %d requests and "
                "holds at most %d; they keep their outcomes",
                ledger.job, chosen.rows, self.provider.name, limits.min_requests, most,
            )  # fmt: skip
        return fills

    def _ids(self, number: int) -> Path:
        """The scratch file for the ids of a round that is being opened."""
        return self.scratch / f"next-{ids_name(number)}"

    def _choose(self, ledger: Ledger, gathered: Gathered) -> Chosen:
        """Decide which rows are submitted again, and write their ids to a scratch file."""
        ended = gathered.ended
        cancelled = [one for one, batch in ended if batch and batch.status is BatchStatus.CANCELLED]
        allowed = budget(self.job, ledger, {batch.status for _, batch in ended if batch})
        with ExitStack() as files:
            ids = files.enter_context(self._fetched(ids_name(1)).open("rb"))
            theirs = files.enter_context(self._fetched(ids_name(ledger.round)).open("rb"))
            rows = files.enter_context(gathered.rows.open("rb"))
            out = files.enter_context(self._ids(ledger.round + 1).open("wb"))
            return choose(rows, ids, ids_of_shards(theirs, cancelled), allowed, out)

    def _choose_landed(self, ledger: Ledger, allowed: Budget) -> Chosen:
        with (
            self._fetched("results.jsonl").open("rb") as rows,
            self._fetched(ids_name(1)).open("rb") as ids,
            self._ids(ledger.round + 1).open("wb") as out,
        ):
            return choose(rows, ids, None, allowed, out)

    def _fetched(self, name: str) -> Path:
        return self.job.folder.fetch(name, self.scratch)

    def _plan_next(self, ledger: Ledger, chosen: Chosen) -> Flow[Plan]:
        number = ledger.round + 1
        plan = yield from do(partial(self._plan, ledger, number, self._ids(number)))
        if plan.rows != chosen.rows:
            raise JobError(
                f"job {ledger.job}: {self.job.folder / ids_name(1)} does not hold the custom_ids of the input"
            )
        return plan

    def _plan(self, ledger: Ledger, number: int, ids: Path) -> Plan:
        """Plan a later round, of the rows with these ids.

        Their lines are copied to a scratch file, since they may be scattered all over the input.
        """
        content = self.scratch / f"content-{number}.jsonl"
        why = f"job {ledger.job}: rows could not be submitted again: the input"
        then = "while the job ran; the results so far can still be collected"
        try:
            source, opened = open_input(self.job, ledger, self.scratch)
        except InputChangedError as error:
            raise type(error)(f"{why} {error.message} {then}") from None
        try:
            with opened as file, ids.open("rb") as wanted, content.open("wb") as spool:
                plan = make_plan(
                    file,
                    source,
                    self.provider,
                    self.job.endpoint,
                    content=content,
                    spool=spool,
                    model=self.job.model,
                    drop_untranslatable=self.job.on_untranslatable == "drop",
                    only=map(orjson.loads, wanted),
                    shard_requests=ledger.shard_requests,
                )
        except InputError as error:  # the input was valid when it was first read
            raise InputChangedError(f"{why} {source} was changed {then}") from error
        if fingerprint(self.job, self.provider, plan.digest, ledger.restarts) != ledger.fingerprint:
            raise InputChangedError(f"{why} {source} (or the job's options) was changed {then}")
        return plan


def _copies(folder: JobFolder, scratch: Path) -> tuple[Path, Path]:
    """Copy the landed rows and stray lines into the scratch folder."""
    copies = scratch / "rows.copy", scratch / "stray.copy"
    for name, copy in zip(("results.jsonl", "stray.jsonl"), copies, strict=True):
        with copy.open("wb") as target:
            if (folder / name).exists():
                with (folder / name).open("rb") as source:
                    shutil.copyfileobj(source, target)
    return copies


def _keep(folder: JobFolder, number: int, rows: Path, stray: Path, ids: Path, spool: Path) -> None:
    """Keep the files that round `number` builds on, before the ledger says that there is such a round.

    The request lines are among them if this attempt has them: those of a job that had landed were removed.
    """
    if spool.exists() and not (folder / SPOOL).exists():
        copy = spool.with_suffix(".copy")
        shutil.copyfile(spool, copy)
        folder.put(copy, SPOOL)
    folder.put(rows, rows_name(number - 1))
    folder.put(ids, ids_name(number))
    if stray.stat().st_size:
        folder.put(stray, stray_name(number - 1))
    else:
        folder.discard(stray_name(number - 1))
