"""The entry points of the engine: submit a job, resume it, stop it."""

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
from ..paths import is_path
from ..rows.planning import Plan
from .advance import Attempt
from .folder import JobFolder
from .inputs import SPOOL, input_text, prepare, restarts
from .job import fingerprint, job_metadata, never_submitted_error
from .landing import remove_leftovers
from .ledger import Ledger, Step
from .lookup import cancel_unwanted, unrecorded_batches
from .rounds import ids_name, records_of, rows_name, stray_name
from .shard import read_ledger, replaced_error, wait_for_writes
from .standing import Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models import Batch
    from ..providers.base import Provider
    from .job import Job

log = logging.getLogger(__name__)


def submit(job: Job, provider: Provider) -> Flow[Standing]:
    """Begin an attempt: make sure that every shard of the current round has a batch.

    Raises InputError before anything is sent, and OrphanError, InputChangedError or LedgerConflictError if
    the attempt cannot continue without the risk of paying twice.
    """
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch))
        plan = yield from do(partial(prepare, job, provider, Path(scratch)))
        ledger = yield from open_ledger(job, provider, plan, Path(scratch))
        attempt.plans[1] = plan
        if ledger.landed_at is None:
            begun: Ledger | None = yield from _note_attempt(job, ledger)
        else:
            begun = yield from attempt.reopen(ledger)
            if begun is None:
                # The attempt that landed the job may have been killed before it removed these.
                yield from do(partial(remove_leftovers, job, ledger))
        batches = (yield from attempt.go_on(begun)) if begun is not None else []
        yield from _remove_requests(job, ledger)
    return (yield from _standing(job, ledger, batches))


def resume(job: Job, provider: Provider) -> Flow[Standing]:
    """Continue an attempt: once all batches have ended, submit the rows of the next round, if there are any.

    The input is read only if there are.
    """
    ledger = yield from do(job.folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted_error(job)
    if ledger.landed_at is not None:
        return Standing.of(ledger, [])
    if ledger.is_untouched:
        raise never_submitted_error(job)
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), resubmit_failed_batch=False)
        batches = yield from attempt.go_on(ledger)
        yield from _remove_requests(job, ledger)
    return (yield from _standing(job, ledger, batches))


def stop(job: Job, provider: Provider) -> Flow[Standing]:
    """Stop a job permanently and cancel its running batches, unless its results have landed.

    If another attempt is creating a batch right now, this waits up to that attempt's lease, and then cancels
    that batch as well.
    """
    ledger = yield from _record_stop(job)
    if ledger.landed_at is not None:
        return Standing.of(ledger, [])
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), resubmit_failed_batch=False)
        batches = yield from attempt.stop(ledger)
    if ledger.replaced:
        yield from _stop_replaced(job, provider, (yield from read_ledger(job, ledger.fingerprint)))
    return (yield from _standing(job, ledger, batches))


def _standing(job: Job, before: Ledger, batches: Sequence[Batch]) -> Flow[Standing]:
    """Return the job's standing, from the ledger as it is now."""
    now = yield from do(job.folder.read)
    return Standing.of(before if now is None else now, batches)


def _remove_requests(job: Job, before: Ledger) -> Flow[None]:
    """Remove the request lines from the folder, if they were to be kept until submitted and now are."""
    if (
        not before.is_spooled
        or job.keep_requests != "until_submitted"
        or not (yield from do((job.folder / SPOOL).exists))
    ):
        return

    def remove() -> None:
        with job.folder.locked():
            now = job.folder.read()
            if now is not None and now.fingerprint == before.fingerprint and now.is_submitted:
                job.folder.discard(SPOOL)

    yield from do(remove)


def _record_stop(job: Job) -> Flow[Ledger]:
    """Record the stop before cancelling; otherwise a concurrent attempt would resubmit the cancelled rows."""
    while True:
        ledger = yield from do(job.folder.read)
        if ledger is None or ledger.job != job.identity:
            raise never_submitted_error(job)
        if ledger.landed_at is not None or ledger.stopped_at is not None:
            return ledger
        stopped = ledger.model_copy(update={"stopped_at": time.time()})
        if (yield from do(partial(job.folder.commit, ledger, stopped))) is not None:
            log.warning("job %s: stopped; unfinished rows are not submitted again", ledger.job)
        if job.folder.local is None:
            # Another attempt's write may have overwritten this one: read the ledger again.
            yield from wait_for_writes()


def _note_attempt(job: Job, ledger: Ledger) -> Flow[Ledger]:
    """Record that a new attempt begins: where its input lies, its `max_rounds`, no recoveries yet.

    Returns the ledger, which is usually unchanged.
    """
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
    """Return the ledger of this job and this input, and create it if there is none."""
    folder, opened, stale = job.folder, False, 0
    while True:
        ledger = yield from do(folder.read)
        if ledger is not None and ledger.job != job.identity:
            raise LedgerConflictError(
                f"{folder.path} holds job {ledger.job!r}; job {job.identity!r} needs a folder of its own"
            )
        if plan is None:
            assert ledger is not None  # prepare() raises if input and ledger are both missing
            if restarts(job, ledger) != ledger.restarts:
                raise ConfigurationError(f"restart={job.restart!r}: there is no input at {job.input}")
            return ledger
        wanted = fingerprint(job, provider, plan.digest, restarts(job, ledger))
        if ledger is None or ledger.fingerprint != wanted:
            if ledger is not None and opened:  # otherwise two live attempts would replace each other forever
                raise replaced_error(job)
            new = new_ledger(job, provider, plan, wanted, replaces=ledger)
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
    job: Job, provider: Provider, plan: Plan, fingerprint: str, *, replaces: Ledger | None = None
) -> Ledger:
    """Return the ledger of a job that was not submitted yet; it may replace one with other input.

    Raises InputChangedError if `on_changed` forbids that, or if the batches to cancel are in another account.
    """
    return Ledger(
        submission=replaces.submission + 1 if replaces else 1,
        job=job.identity,
        fingerprint=fingerprint,
        provider=provider.name,
        api_base=provider.account.place,
        endpoint=job.endpoint,
        rows=plan.rows,
        created_at=time.time(),
        shards=records_of(plan),
        replaced=_ledgers_to_replace(job, provider, plan, replaces) if replaces else (),
        input=input_text(job.input),
        is_spooled=not is_path(job.input),
        restarts=restarts(job, replaces),
        max_rounds=job.max_rounds,
        shard_requests=plan.shard_requests,
    )


def _ledgers_to_replace(job: Job, provider: Provider, plan: Plan, ledger: Ledger) -> tuple[Ledger, ...]:
    """Return the earlier submissions whose batches have to be cancelled."""
    changed = ledger.fingerprint != fingerprint(job, provider, plan.digest, ledger.restarts)
    if changed and job.on_changed == "fail":
        raise InputChangedError(
            f"job {job.identity} was submitted before with other input or options (batches: "
            f"{', '.join(ledger.batch_ids) or 'none yet'}); on_changed='cancel_and_resubmit' would cancel "
            "those and submit the job again"
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
                f"{', '.join(old.batch_ids) or 'their ids are not known'}; this account cannot cancel them: "
                "cancel them there, or give the job another output folder"
            )
    return begun


def _stop_replaced(job: Job, provider: Provider, ledger: Ledger) -> Flow[Ledger | None]:
    """Cancel the batches of earlier input; the ledger keeps them until that is done."""
    metadata = job_metadata(job, provider)
    for old in ledger.replaced:
        for record in old.shards:
            if record.ended is None and record.batch_id is not None:
                try:
                    yield from cancel_unwanted(job, provider, (yield from provider.retrieve(record.batch_id)))
                except NotFoundError as error:  # it cannot be cancelled, and must not block the job
                    log.warning(
                        "job %s: batch %s of earlier input cannot be cancelled: %s",
                        old.job, record.batch_id, error,
                    )  # fmt: skip
            for batch in (yield from unrecorded_batches(job, provider, old, record, metadata)):
                yield from cancel_unwanted(job, provider, batch)
    # A create without an answer may still take effect: every later attempt looks for its batch again.
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
    return folder.commit(before, new, first=partial(_remove_old_results, folder, new))


def _remove_old_results(folder: JobFolder, new: Ledger) -> None:
    """Remove the results of another input, so that nobody takes them for those of this one."""
    if (folder / "results.jsonl").exists():
        log.warning(
            "job %s: its input or options have changed, or it is restarted: removing the paid results in %s. "
            "To keep results, copy them first, give each input its own folder, or set on_changed='fail'",
            new.job, folder / "results.jsonl",
        )  # fmt: skip
    folder.discard("report.json", "results.jsonl", "stray.jsonl")


def _keep_input(folder: JobFolder, ledger: Ledger, scratch: Path, stale: int) -> bool:
    """Keep what later steps need of the input; return False if another attempt has changed the ledger.

    This happens before any upload, so that a process that finds a batch in the ledger also finds its ids
    here. It also removes the files of the previous input's rounds, up to round `stale`.
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
