"""Submission: every shard of a job's input gets its batch, once."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ._requests import check_path, iter_requests, no_request
from .attempt import Attempt
from .collect import tidy
from .errors import ConfigurationError, InputChangedError, LedgerConflictError, NotFoundError
from .flow import Flow, do
from .job import fingerprint, job_metadata, never_submitted
from .ledger import JobFolder, Ledger, Step, is_path, local_path, open_path
from .lines import Plan, make_plan
from .rounds import ids_name, records_of, rows_name, stray_name
from .shards import call_off, let_writes_show, read_ledger, replaced_meanwhile, unnoted

if TYPE_CHECKING:
    from upath import UPath

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
            if begun is None and ledger.round and job.folder.local is not None:
                yield from do(partial(tidy, job.folder, ledger))  # whoever has landed it may have been killed
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
    if ledger.is_untouched:
        raise never_submitted(job)
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), renews=False)
        return (yield from attempt.go_on(ledger))


def stop(job: Job, provider: Provider) -> Flow[list[Batch]]:
    """Cancel what runs of a job for good; the batches of the current round as they stand then, [] where the
    results have landed already.

    It may take the lease of an attempt that is creating a batch right now: that one is cancelled, too.
    """
    ledger = yield from _note_stop(job)
    if ledger.landed_at is not None:
        return []
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        attempt = Attempt(job, provider, Path(scratch), renews=False)
        batches = yield from attempt.stop(ledger)
    if ledger.stopping:
        yield from _stop_replaced(job, provider, (yield from read_ledger(job, ledger.fingerprint)))
    return batches


def _note_stop(job: Job) -> Flow[Ledger]:
    """Write down that the job is stopped, before anything is cancelled: what is cancelled is else renewed."""
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
            "renewed": 0, "input": input_text(job.input) or ledger.input, "max_rounds": job.max_rounds
        }  # fmt: skip
        begun = ledger.model_copy(update=update)
        if begun == ledger or ledger.landed_at is not None or ledger.stopped_at is not None:
            return ledger
        if (done := (yield from do(partial(job.folder.commit, ledger, begun)))) is not None:
            return done
        ledger = yield from read_ledger(job, ledger.fingerprint)


def input_text(source: JobInput) -> str | None:
    """Where the input lies, if that is a path, and not an address that may hold a secret."""
    if not is_path(source):
        return None
    path = open_path(source).absolute()
    # A path object leaves out what is not of its path: of a URL of FTP, the host.
    text = source if isinstance(source, str) and "://" in source else str(path)
    if local_path(path) is None and any(may_hold_secret(part) for part in text.split("::")):
        return None
    return text


def may_hold_secret(url: str) -> bool:
    """Whether a URL may name a password, or be signed; before an @ Airflow writes a connection's id."""
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.rpartition("@")
    if scheme.lower() in ("http", "https"):
        return bool(at) or "?" in rest
    return ":" in user


def prepare(job: Job, provider: Provider, scratch: Path) -> Plan | None:
    """Validate and split the input. None where the input is gone but the job was submitted before."""
    source = job.input
    if is_path(source):
        path = open_path(source)
        check_path(path)
    else:
        path = open_path(_spool_requests(source, scratch / "requests.jsonl"))
    ledger = job.folder.read()
    try:
        before = ledger if ledger is not None and ledger.job == job.identity else None
        plan = _planned(job, provider, path, scratch, before.shard_requests if before else job.shard_requests)
        if before is not None and before.shard_requests != job.shard_requests:
            mark = fingerprint(job, provider, plan.digest, restarts(job, before))
            if mark != before.fingerprint:  # another submission, which is split as it says now
                plan = _planned(job, provider, path, scratch, job.shard_requests)
        return plan
    except FileNotFoundError:
        if ledger is None or not _is_settled(ledger):
            raise ConfigurationError(f"no input at {path}") from None
        log.warning("input %s is gone; going on with the batches on record", path)
        return None
    except IsADirectoryError:
        raise ConfigurationError(f"input {path} is a folder, not a JSONL file") from None


def _planned(job: Job, provider: Provider, path: UPath, scratch: Path, shard_requests: int | None) -> Plan:
    local = local_path(path) if provider.verbatim and job.model is None else None
    content = local or scratch / "content.jsonl"
    with ExitStack() as files:
        file = files.enter_context(path.open("rb"))
        ids = files.enter_context((scratch / "ids.jsonl").open("wb"))
        spool = None if local else files.enter_context(content.open("wb"))
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
            shard_requests=shard_requests,
        )


def _is_settled(ledger: Ledger) -> bool:
    """Whether the input is needed no more: every row has had its batch, or is to have none."""
    all_created = all(record.step is Step.CREATED for record in ledger.of_round(0))
    return all_created or (ledger.stopped_at is not None and not ledger.is_untouched)


def _spool_requests(requests: object, path: Path) -> Path:
    """Write request objects down: they are read again for a later round, and may not come twice."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, request in enumerate(iter_requests(requests), start=1):
            if (wrong := no_request(request)) is not None:
                raise ConfigurationError(f"request {number} {wrong}")
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
        for old in ledger.stopping
        if provider.can_find and any(record.tries > bool(record.batch_id) for record in old.shards)
    )
    if left == ledger.stopping:
        return ledger
    done = ledger.model_copy(update={"stopping": left})
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
