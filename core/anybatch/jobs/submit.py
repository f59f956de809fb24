"""Submission: every shard of a job's input gets its batch, once."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, InputChangedError, LedgerConflictError, NotFoundError
from ..flow import Flow, do
from ..rows.planning import Plan
from .advance import Attempt
from .folder import JobFolder
from .inputs import SPOOL, input_text, prepare, restarts
from .job import fingerprint, job_metadata, never_submitted
from .landing import remove_leftovers
from .ledger import Ledger, Step
from .lookup import call_off, unnoted
from .rounds import ids_name, records_of, rows_name, stray_name
from .shard import let_writes_show, read_ledger, replaced_meanwhile
from .standing import Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models import Batch
    from ..providers.base import Provider
    from .job import Job

log = logging.getLogger(__name__)


def submit(job: Job, provider: Provider) -> Flow[Standing]:
    """Begin an attempt: see that every row that is to have one has its batch.

    Raises InputError before anything is sent; OrphanError, InputChangedError and LedgerConflictError where
    it cannot go on safely.
    """
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch))
        plan = yield from do(partial(prepare, job, provider, Path(scratch)))
        ledger = yield from open_ledger(job, provider, plan, Path(scratch))
        attempt.plans[1] = plan
        if ledger.landed_at is None:
            begun: Ledger | None = yield from _begun(job, ledger)
        else:
            begun = yield from attempt.reopen(ledger)
            if begun is None and job.folder.local is not None:
                # whoever has landed it may have been killed
                yield from do(partial(remove_leftovers, job, ledger))
        batches = (yield from attempt.go_on(begun)) if begun is not None else []
        yield from _forget_requests(job, ledger)
    return (yield from _standing(job, ledger, batches))


def resume(job: Job, provider: Provider) -> Flow[Standing]:
    """Go on with an attempt: where all batches have ended and rows are to be submitted again, submit those.

    The input is read for that alone.
    """
    ledger = yield from do(job.folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted(job)
    if ledger.landed_at is not None:
        return Standing.of(ledger, [])
    if ledger.is_untouched:
        raise never_submitted(job)
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), resubmit_failed_batch=False)
        batches = yield from attempt.go_on(ledger)
        yield from _forget_requests(job, ledger)
    return (yield from _standing(job, ledger, batches))


def stop(job: Job, provider: Provider) -> Flow[Standing]:
    """Cancel what runs of a job for good, unless its results have landed already.

    It may take the lease of an attempt that is creating a batch right now: that one is cancelled, too.
    """
    ledger = yield from _note_stop(job)
    if ledger.landed_at is not None:
        return Standing.of(ledger, [])
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), resubmit_failed_batch=False)
        batches = yield from attempt.stop(ledger)
    if ledger.replaced:
        yield from _stop_replaced(job, provider, (yield from read_ledger(job, ledger.fingerprint)))
    return (yield from _standing(job, ledger, batches))


def _standing(job: Job, before: Ledger, batches: Sequence[Batch]) -> Flow[Standing]:
    """What the job stands at now that this was done about it."""
    now = yield from do(job.folder.read)
    return Standing.of(before if now is None else now, batches)


def _forget_requests(job: Job, before: Ledger) -> Flow[None]:
    """Remove the request lines from the folder where they are only to stay until each has its batch."""
    if job.keep_requests != "until_submitted" or not (yield from do((job.folder / SPOOL).exists)):
        return

    def remove() -> None:
        with job.folder.locked():
            now = job.folder.read()
            if now is not None and now.fingerprint == before.fingerprint and now.is_submitted:
                job.folder.discard(SPOOL)

    yield from do(remove)


def _note_stop(job: Job) -> Flow[Ledger]:
    """Write down that the job is stopped, before anything is cancelled: else it would be submitted again."""
    while True:
        ledger = yield from do(job.folder.read)
        if ledger is None or ledger.job != job.identity:
            raise never_submitted(job)
        if ledger.landed_at is not None or ledger.stopped_at is not None:
            return ledger
        stopped = ledger.model_copy(update={"stopped_at": time.time()})
        if (yield from do(partial(job.folder.commit, ledger, stopped))) is not None:
            log.warning("job %s: stopped; rows that are not finished are not submitted again", ledger.job)
        if job.folder.local is None:
            yield from let_writes_show()  # and look whether this one is still there


def _begun(job: Job, ledger: Ledger) -> Flow[Ledger]:
    """The ledger with what the beginning of an attempt changes in it: mostly nothing."""
    while True:
        update = {
            "recoveries": 0, "input": input_text(job.input) or ledger.input, "max_rounds": job.max_rounds
        }  # fmt: skip
        begun = ledger.model_copy(update=update)
        if begun == ledger or ledger.landed_at is not None or ledger.stopped_at is not None:
            return ledger
        if (done := (yield from do(partial(job.folder.commit, ledger, begun)))) is not None:
            return done
        ledger = yield from read_ledger(job, ledger.fingerprint)


def open_ledger(job: Job, provider: Provider, plan: Plan | None, scratch: Path) -> Flow[Ledger]:
    """The ledger of this job and this input, made if there is none."""
    folder, opened, stale = job.folder, False, 0
    while True:
        ledger = yield from do(folder.read)
        if ledger is not None and ledger.job != job.identity:
            raise LedgerConflictError(
                f"{folder.path} holds job {ledger.job!r}; job {job.identity!r} needs a folder of its own"
            )
        if plan is None:
            assert ledger is not None  # prepare() saw to it
            if restarts(job, ledger) != ledger.restarts:
                raise ConfigurationError(f"restart={job.restart!r}: there is no input at {job.input}")
            return ledger
        mark = fingerprint(job, provider, plan.digest, restarts(job, ledger))
        if ledger is None or ledger.fingerprint != mark:
            if ledger is not None and opened:  # two live attempts must not replace each other for ever
                raise replaced_meanwhile(job)
            new = new_ledger(job, provider, plan, mark, replaces=ledger)
            stale = ledger.round if ledger is not None else 0
            ledger = yield from do(partial(_open, folder, ledger, new))
            opened = ledger is not None
        if ledger is not None and ledger.replaced and ledger.landed_at is None:
            ledger = yield from _stop_replaced(job, provider, ledger)
        if ledger is None:
            continue
        if any(record.step is not Step.PLANNED for record in ledger.shards):
            return ledger
        if (yield from do(partial(_keep_input, folder, ledger, scratch, stale))):
            return ledger


def new_ledger(
    job: Job, provider: Provider, plan: Plan, mark: str, *, replaces: Ledger | None = None
) -> Ledger:
    """The ledger of a job of which nothing has been done, but to give up what was begun with other input.

    Raises InputChangedError where that may not be, or cannot be done from here.
    """
    return Ledger(
        submission=replaces.submission + 1 if replaces else 1,
        job=job.identity,
        fingerprint=mark,
        provider=provider.name,
        api_base=provider.account.place,
        endpoint=job.endpoint,
        rows=plan.rows,
        created_at=time.time(),
        shards=records_of(plan),
        replaced=_given_up(job, provider, plan, replaces) if replaces else (),
        input=input_text(job.input),
        restarts=restarts(job, replaces),
        max_rounds=job.max_rounds,
        shard_requests=plan.shard_requests,
    )


def _given_up(job: Job, provider: Provider, plan: Plan, ledger: Ledger) -> tuple[Ledger, ...]:
    changed = ledger.fingerprint != fingerprint(job, provider, plan.digest, ledger.restarts)
    if changed and job.on_changed == "fail":
        raise InputChangedError(
            f"job {job.identity} was submitted before with other input or options (batches: "
            f"{', '.join(ledger.batch_ids) or 'none yet'}); on_changed='cancel_and_resubmit' would replace it"
        )
    begun = tuple(
        old.model_copy(update={"replaced": ()})
        for old in (*ledger.replaced, ledger)
        if old.landed_at is None and any(record.tries for record in old.shards)
    )
    for old in begun:
        if old.provider != provider.name or old.api_base != provider.account.place:
            raise InputChangedError(
                f"job {job.identity} has batches at {old.provider} ({old.api_base}): "
                f"{', '.join(old.batch_ids) or 'their ids are not known'}; cancel them there, or give the "
                "job another output folder"
            )
    return begun


def _stop_replaced(job: Job, provider: Provider, ledger: Ledger) -> Flow[Ledger | None]:
    """Cancel what was submitted of earlier input; it is on record until that is done."""
    metadata = job_metadata(job, provider)
    for old in ledger.replaced:
        for record in old.shards:
            if record.ended is None and record.batch_id is not None:
                try:
                    yield from call_off(job, provider, (yield from provider.retrieve(record.batch_id)))
                except NotFoundError as error:  # nobody can cancel it, and the job must go on
                    log.warning("job %s: batch %s of earlier input: %s", old.job, record.batch_id, error)
            for batch in (yield from unnoted(job, provider, old, record, metadata)):
                yield from call_off(job, provider, batch)
    # A create that nobody has heard of may come yet: every attempt looks for it again.
    left = tuple(
        old
        for old in ledger.replaced
        if provider.can_find and any(record.tries > bool(record.batch_id) for record in old.shards)
    )
    if left == ledger.replaced:
        return ledger
    done = ledger.model_copy(update={"replaced": left})
    return (yield from do(partial(job.folder.commit, ledger, done)))


def _open(folder: JobFolder, before: Ledger | None, new: Ledger) -> Ledger | None:
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder.commit(before, new, first=partial(_give_up_results, folder, new))


def _give_up_results(folder: JobFolder, new: Ledger) -> None:
    """Results of another input must not be taken for those of this one."""
    if (folder / "results.jsonl").exists():
        log.warning(
            "job %s: its input or options are not what they were, or it is restarted: removing %s, which was "
            "paid for. To keep results, copy them before, give each input a folder of its own, or set "
            "on_changed='fail'", new.job, folder / "results.jsonl",
        )  # fmt: skip
    folder.discard("report.json", "results.jsonl", "stray.jsonl")


def _keep_input(folder: JobFolder, ledger: Ledger, scratch: Path, stale: int) -> bool:
    """Write down what later steps need of the input, unless another attempt has moved on meanwhile.

    Before anything is uploaded, so that whoever finds a batch in the ledger also finds its ids here. What the
    rounds of the input before have left, up to round `stale`, goes.
    """
    with folder.locked():
        if folder.read() != ledger:
            return False
        for name in ("ids.jsonl", SPOOL):
            if (scratch / name).exists():
                copy = scratch / f"{name}.copy"
                shutil.copyfile(scratch / name, copy)
                folder.put(copy, name)
            else:
                folder.discard(name)
        for number in range(1, stale + 1):
            folder.discard(rows_name(number), stray_name(number), *([ids_name(number)] if number > 1 else []))
    return True
