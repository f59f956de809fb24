"""Submission: every shard of a job's input gets its batch, once."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .attempt import Attempt
from .errors import ConfigurationError, InputChangedError, LedgerConflictError
from .flow import Flow, do
from .job import fingerprint, job_metadata, never_submitted
from .ledger import JobFolder, Ledger, Step, is_path, local_path, open_path
from .lines import Plan, make_plan
from .rounds import ids_name, records_of, rows_name, stray_name
from .shards import read_ledger, replaced_meanwhile, stop, traces

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .job import Job, JobInput
    from .models import Batch
    from .providers.base import Provider

log = logging.getLogger(__name__)


def submit(job: Job, provider: Provider) -> Flow[list[Batch]]:
    """Begin an attempt: see that every row that is to have one has its batch, and return those of the current
    round as they stand.

    None where the results have landed already: there is nothing left to wait for.

    Raises InputError before anything is sent; OrphanError, InputChangedError and LedgerConflictError where
    it cannot go on safely.
    """
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch))
        plan = yield from do(partial(prepare, job, provider, Path(scratch)))
        ledger = yield from open_ledger(job, provider, plan, Path(scratch))
        attempt.plans[0] = plan
        if ledger.landed_at is None:
            begun: Ledger | None = yield from _begun(job, ledger)
        else:
            begun = yield from attempt.reopen(ledger)
        return (yield from attempt.go_on(begun)) if begun is not None else []


def resume(job: Job, provider: Provider) -> Flow[list[Batch]]:
    """Go on with an attempt: the batches of the current round as they stand, those of the next one where all
    have ended and rows are to be submitted again.

    The input is read for that alone. None where the results have landed already.
    """
    ledger = yield from do(job.folder.read)
    if ledger is None or ledger.job != job.identity:
        raise never_submitted(job)
    if ledger.landed_at is not None:
        return []
    if not ledger.round and all(record.step is Step.PLANNED for record in ledger.shards):
        raise never_submitted(job)  # begun, and what is needed of its input may not have been written down
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), renews=False)
        return (yield from attempt.go_on(ledger))


def _begun(job: Job, ledger: Ledger) -> Flow[Ledger]:
    """The ledger with what the beginning of an attempt changes in it: mostly nothing."""
    while True:
        begun = ledger.model_copy(update={"renewed": 0, "input": input_text(job.input) or ledger.input})
        if begun == ledger or ledger.landed_at is not None:
            return ledger
        if (done := (yield from do(partial(job.folder.commit, ledger, begun)))) is not None:
            return done
        ledger = yield from read_ledger(job, ledger.fingerprint)


def input_text(source: JobInput) -> str | None:
    """Where the input lies, if that is a path, and not an address that may hold a secret."""
    if not is_path(source):
        return None
    path = open_path(source).absolute()
    text = str(path)
    return text if local_path(path) is not None or not set("?@") & set(text) else None


def prepare(job: Job, provider: Provider, scratch: Path) -> Plan | None:
    """Validate and split the input. None where the input is gone but the job was submitted before."""
    source = job.input
    if is_path(source):
        path = open_path(source)
    else:
        path = open_path(_spool_requests(cast("Iterable[Any]", source), scratch / "requests.jsonl"))
    local = local_path(path) if provider.verbatim else None
    content = local or scratch / "content.jsonl"
    try:
        with path.open("rb") as file, (scratch / "ids.jsonl").open("wb") as ids:
            spool = None if local else content.open("wb")
            try:
                return make_plan(
                    file,
                    str(path),
                    provider,
                    job.endpoint,
                    content=content,
                    spool=spool,
                    ids=ids,
                    model=job.model,
                    drop_untranslatable=job.on_untranslatable == "drop",
                )
            finally:
                if spool is not None:
                    spool.close()
    except FileNotFoundError:
        ledger = job.folder.read()
        if ledger is None or any(record.step is not Step.CREATED for record in ledger.of_round(0)):
            raise ConfigurationError(f"no input at {path}") from None
        log.warning("input %s is gone; going on with the batches on record", path)
        return None
    except IsADirectoryError:
        raise ConfigurationError(f"input {path} is a folder, not a JSONL file") from None


def _spool_requests(requests: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write request objects down: they are read again for a later round, and may not come twice."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, request in enumerate(requests, start=1):
            if not isinstance(request, Mapping):
                raise ConfigurationError(f"request {number} is {type(request).__name__}, not a mapping")
            try:
                file.write(json.dumps(dict(request), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise ConfigurationError(f"request {number} does not go into JSON: {error}") from None
    return path


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
        if ledger is not None and ledger.stopping and ledger.landed_at is None:
            ledger = yield from _stop_replaced(job, provider, ledger)
        if ledger is None:
            continue
        if any(record.step is not Step.PLANNED for record in ledger.shards):
            return ledger
        if (yield from do(partial(_keep_input, folder, ledger, scratch, stale))):
            return ledger


def restarts(job: Job, ledger: Ledger | None) -> tuple[str, ...]:
    """All values of `Job.restart` so far: the last one is in force, and none of them restarts once more."""
    before = ledger.restarts if ledger else ()
    return before if job.restart is None or job.restart in before else (*before, job.restart)


def new_ledger(
    job: Job, provider: Provider, plan: Plan, mark: str, *, replaces: Ledger | None = None
) -> Ledger:
    """The ledger of a job of which nothing has been done, but to give up what was begun with other input.

    Raises InputChangedError where that may not be, or cannot be done from here.
    """
    return Ledger(
        job=job.identity,
        fingerprint=mark,
        provider=provider.name,
        api_base=provider.account.api_base,
        endpoint=job.endpoint,
        rows=plan.rows,
        created_at=time.time(),
        shards=records_of(plan),
        stopping=_given_up(job, provider, plan, replaces) if replaces else (),
        input=input_text(job.input),
        restarts=restarts(job, replaces),
    )


def _given_up(job: Job, provider: Provider, plan: Plan, ledger: Ledger) -> tuple[Ledger, ...]:
    changed = ledger.fingerprint != fingerprint(job, provider, plan.digest, ledger.restarts)
    if changed and job.on_changed == "fail":
        raise InputChangedError(
            f"job {job.identity} was submitted before with other input or options (batches: "
            f"{', '.join(ledger.batch_ids) or 'none yet'}); on_changed='cancel_and_resubmit' would replace it"
        )
    begun = tuple(
        old.model_copy(update={"stopping": ()})
        for old in (*ledger.stopping, ledger)
        if old.landed_at is None and any(record.tries for record in old.shards)
    )
    for old in begun:
        if old.provider != provider.name or old.api_base != provider.account.api_base:
            raise InputChangedError(
                f"job {job.identity} has batches at {old.provider} ({old.api_base}): "
                f"{', '.join(old.batch_ids) or 'their ids are not known'}; cancel them there, or give the "
                "job another output folder"
            )
    return begun


def _stop_replaced(job: Job, provider: Provider, ledger: Ledger) -> Flow[Ledger | None]:
    """Cancel what was submitted of earlier input; it is on record until that is done."""
    metadata = job_metadata(job, provider)
    for old in ledger.stopping:
        for record in old.shards:
            if record.ended is not None and record.tries < 2:
                continue
            for batch in (yield from traces(job, provider, old, record, metadata)):
                yield from stop(job, provider, batch)
    # A create that nobody has heard of may come yet: every attempt looks for it again.
    left = tuple(
        old
        for old in ledger.stopping
        if provider.can_find and any(record.tries > bool(record.batch_id) for record in old.shards)
    )
    if left == ledger.stopping:
        return ledger
    done = ledger.model_copy(update={"stopping": left})
    return (yield from do(partial(job.folder.commit, ledger, done)))


def _open(folder: JobFolder, before: Ledger | None, new: Ledger) -> Ledger | None:
    folder.path.mkdir(parents=True, exist_ok=True)
    # Results of another input must not be taken for those of this one.
    discard = partial(folder.discard, "report.json", "results.jsonl", "stray.jsonl")
    return folder.commit(before, new, first=discard)


def _keep_input(folder: JobFolder, ledger: Ledger, scratch: Path, stale: int) -> bool:
    """Write down what later steps need of the input, unless another attempt has moved on meanwhile.

    Before anything is uploaded, so that whoever finds a batch in the ledger also finds its ids here. What the
    rounds of the input before have left, up to round `stale`, goes.
    """
    with folder.locked():
        if folder.read() != ledger:
            return False
        for name in ("ids.jsonl", "requests.jsonl"):
            if (scratch / name).exists():
                copy = scratch / f"{name}.copy"
                shutil.copyfile(scratch / name, copy)
                folder.put(copy, name)
            else:
                folder.discard(name)
        for number in range(stale + 1):
            folder.discard(rows_name(number), stray_name(number), *([ids_name(number)] if number else []))
    return True
