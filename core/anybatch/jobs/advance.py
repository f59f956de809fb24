"""An attempt at a job: what is done about it between two waits.

    submit the round ──> wait ──> all ended ──> which rows go again?
           ^                                      │           │
           └── keep the rows so far, open the ────┘           └── none: land
               next round with those

Every arrow can be taken by another process than the one before, or by several at once: the ledger decides.
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
from .inputs import InputGoneError, open_input
from .job import fingerprint, job_metadata
from .landing import land
from .lost import AwayError
from .rounds import (
    Chosen,
    budget,
    choose,
    ids_name,
    next_round,
    part_of,
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
    """One process at work on a job; `scratch` is a temporary folder of its own.

    `resubmit_failed_batch`: whether a batch that was refused as a whole is submitted anew, as when an
    attempt begins.
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
        """Bring the job as far as it goes without waiting; the current round's batches as they stand.

        Where they have ended and rows may go again, their results are read, which tells. If none does, the
        results land on the spot, since they are at hand. A job that was stopped before it had any batch in
        this round lands on the spot, too.
        """
        while True:
            batches, away = yield from self._submitted(ledger)
            if not all(batch.status.is_terminal for batch in batches):
                return batches  # what is away may be back, or surely gone, when these have ended
            for record in away:
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
                continue  # another attempt has gone on
            try:
                if (yield from self._close_round(ledger, batches)):
                    return batches
            except (FileNotFoundError, LedgerConflictError):
                now = yield from read_ledger(self.job, ledger.fingerprint)
                if (now.shards, now.landed_at) == (ledger.shards, ledger.landed_at):
                    raise
                log.info("job %s: another attempt has gone on meanwhile", now.job)
                ledger = now
            else:
                ledger = yield from read_ledger(self.job, ledger.fingerprint)

    def stop(self, ledger: Ledger) -> Flow[list[Batch]]:
        """Cancel what runs of a job that is noted as stopped; the current round's batches as they stand.

        First those that are known. What cannot be cancelled keeps none of the others running.
        """
        batches: dict[int, Batch] = {}
        problems: list[AnyBatchError] = []
        away: list[ShardRecord] = []
        records = sorted(ledger.current, key=lambda record: record.batch_id is None)
        for record, patient in chain(((one, False) for one in records), ((one, True) for one in away)):
            try:
                batch = yield from self._submission(ledger, record, patient=patient).run()
            except AwayError:
                away.append(record)  # first the others are cancelled
            except AnyBatchError as error:
                log.warning("job %s: shard %d could not be stopped: %s", ledger.job, record.shard, error)
                problems.append(error)
            else:
                if batch is not None:
                    batches[record.shard] = batch
        if problems:
            raise problems[0]
        return [batches[shard] for shard in sorted(batches)]

    def reopen(self, ledger: Ledger) -> Flow[Ledger | None]:
        """A landed job with one more round, where rows are worth it; else None.

        That takes `max_rounds` that leave one, or answers that the provider has lost and `on_lost` buys
        again. What has landed stays until the next landing replaces it.
        """
        folder = self.job.folder
        report = yield from do(folder.read_report)
        if report is None or report.ok:
            return None
        allowed = budget(self.job, ledger.model_copy(update={"recoveries": 0}), ())
        allowed = allowed._replace(cancelled=allowed.repeat)  # with a round to spend, whatever its rows are
        if not allowed.repeat and not (allowed.lost and report.counts.get(Outcome.MISSING)):
            return None
        try:
            chosen = yield from do(partial(self._choose_landed, ledger, allowed))
            if not self._fill_a_batch(chosen, ledger):
                return None
            plan = yield from self._plan_next(ledger, chosen)
        except (FileNotFoundError, JobError) as error:  # the input may be gone: what has landed stays
            log.warning("job %s has landed; its rows are not submitted again: %s", ledger.job, error)
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
        """What a round submits, read from the input once more where this process has not done so."""
        if (plan := self.plans.get(number)) is None:
            ids = yield from do(partial(self.job.folder.fetch, ids_name(number), self.scratch))
            plan = self.plans[number] = yield from do(partial(self._plan, ledger, number, ids))
        return plan

    def _submitted(self, ledger: Ledger) -> Flow[tuple[list[Batch], list[ShardRecord]]]:
        """The batch of each shard of the current round; of a job that was stopped, of those that have one.

        Also the shards whose batch answers 404, and may yet be back.
        """
        batches, away = [], []
        for record in ledger.current:
            try:
                batch = yield from self._submission(ledger, record, patient=False).run()
            except AwayError:
                away.append(record)
            else:
                if batch is not None:
                    batches.append(batch)
        return batches, away

    def _submission(self, ledger: Ledger, record: ShardRecord, *, patient: bool = True) -> Submission:
        return Submission(
            self.job, self.provider, self.plan_of, record, self.metadata, self.id, ledger.fingerprint,
            self.resubmit_failed_batch, patient,
        )  # fmt: skip

    def _close_round(self, ledger: Ledger, batches: Sequence[Batch]) -> Flow[bool]:
        """Read the results of a round that has ended, and open the next, or land; whether it was that."""
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
                # Nobody has asked for this round, and so nobody can do without it.
                log.warning("job %s lands with cancelled rows: %s", ledger.job, error)
                yield from land(self.job, self.provider, ledger, gathered)
                return True
            accounts, number = gathered.accounts, ledger.round + 1
            after = next_round(ledger, records_of(plan, number), accounts, gathered.tally.unexpected, chosen)
            yield from self._open(ledger, after, plan, gathered.rows, gathered.stray)
            return False

    def _open(self, before: Ledger, after: Ledger, plan: Plan, rows: Path, stray: Path) -> Flow[None]:
        """Open a round, unless another attempt has gone on; `rows` and `stray` are those of all before."""
        folder, number = self.job.folder, after.round
        keep = partial(_keep, folder, number, rows, stray, self._ids(number))
        if (yield from do(partial(folder.commit, before, after, first=keep))) is None:
            return
        self.plans[number] = plan
        log.info("job %s: round %d submits %d rows again", before.job, number, plan.rows)
        if number > 2:  # the file just kept holds all that was in these
            yield from do(partial(folder.discard, rows_name(number - 2), stray_name(number - 2)))

    def _fill_a_batch(self, chosen: Chosen, ledger: Ledger) -> bool:
        """Whether there are rows to submit again, and enough of them for a batch of this provider."""
        least = self.provider.limits.min_requests
        if 0 < chosen.rows < least:
            log.warning(
                "job %s: %d rows could go again, but a batch at %s has at least %d requests; they stay as "
                "they are", ledger.job, chosen.rows, self.provider.name, least,
            )  # fmt: skip
        return chosen.rows >= least

    def _ids(self, number: int) -> Path:
        """Where the ids of a round that is being opened are written."""
        return self.scratch / f"next-{ids_name(number)}"

    def _choose(self, ledger: Ledger, gathered: Gathered) -> Chosen:
        """Decide which rows go again, and write down their ids."""
        ended = gathered.ended
        cancelled = [one for one, batch in ended if batch and batch.status is BatchStatus.CANCELLED]
        allowed = budget(self.job, ledger, {batch.status for _, batch in ended if batch})
        with ExitStack() as files:
            ids = files.enter_context(self._fetched(ids_name(1)).open("rb"))
            theirs = files.enter_context(self._fetched(ids_name(ledger.round)).open("rb"))
            rows = files.enter_context(gathered.rows.open("rb"))
            out = files.enter_context(self._ids(ledger.round + 1).open("wb"))
            return choose(rows, ids, part_of(theirs, cancelled), allowed, out)

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
            raise JobError(f"job {ledger.job}: {ids_name(1)} does not hold the custom_ids of the input")
        return plan

    def _plan(self, ledger: Ledger, number: int, ids: Path) -> Plan:
        """Plan the rows of these ids, for a round after the input was validated.

        The lines are copied: a round may hold single lines from all over the input.
        """
        content = self.scratch / f"content-{number}.jsonl"
        why = f"job {ledger.job}: rows could not be submitted again: the input"
        then = "while the job ran; what was answered so far can be collected"
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
        except InputError as error:  # it was valid when it was first read
            raise InputChangedError(f"{why} {source} was changed {then}") from error
        if fingerprint(self.job, self.provider, plan.digest, ledger.restarts) != ledger.fingerprint:
            raise InputChangedError(f"{why} {source} (or the job's options) was changed {then}")
        return plan


def _copies(folder: JobFolder, scratch: Path) -> tuple[Path, Path]:
    """Copies of what has landed: all rows, and the stray lines."""
    copies = scratch / "rows.copy", scratch / "stray.copy"
    for name, copy in zip(("results.jsonl", "stray.jsonl"), copies, strict=True):
        with copy.open("wb") as target:
            if (folder / name).exists():
                with (folder / name).open("rb") as source:
                    shutil.copyfileobj(source, target)
    return copies


def _keep(folder: JobFolder, number: int, rows: Path, stray: Path, ids: Path) -> None:
    """Write down what round `number` builds on, before the ledger says that there is such a round."""
    folder.put(rows, rows_name(number - 1))
    folder.put(ids, ids_name(number))
    if stray.stat().st_size:
        folder.put(stray, stray_name(number - 1))
    else:
        folder.discard(stray_name(number - 1))
