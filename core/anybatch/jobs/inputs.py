"""The input of a job: validated and split into shards, and opened again for a later round."""

from __future__ import annotations

import json
import logging
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from ..errors import ConfigurationError, InputChangedError
from ..paths import is_path, local_path, open_path
from ..rows.planning import Plan, make_plan
from ..rows.sources import check_path, iter_requests, why_no_request
from .job import fingerprint
from .ledger import Ledger, Step

if TYPE_CHECKING:
    from typing import BinaryIO

    from ..providers.base import Provider
    from .job import Job, JobInput

log = logging.getLogger(__name__)

# The files that a job keeps in its folder.
_OWN_NAMES = re.compile(
    r"(job|report)\.json|(requests|results|stray|ids)\.jsonl|(ids|round|stray)-\d+\.jsonl"
)
SPOOL = "requests.jsonl"
"""The file of request lines that were passed as objects, in a scratch folder and in the job's folder."""


def input_text(source: JobInput) -> str | None:
    """Return the path or URL of the input, to be kept in the ledger; None if it may hold a secret."""
    if not is_path(source):
        return None
    path = open_path(source).absolute()
    # A path object may drop parts of a URL, such as the host of an FTP URL: keep the user's text.
    text = source if isinstance(source, str) and "://" in source else str(path)
    if local_path(path) is None and any(may_hold_secret(part) for part in text.split("::")):
        return None
    return text


def may_hold_secret(url: str) -> bool:
    """Whether a URL may hold a password or a signature. Airflow's URLs name a connection before the @."""
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.rpartition("@")
    if scheme.lower() in ("http", "https"):
        return bool(at) or "?" in rest
    return ":" in user


def prepare(job: Job, provider: Provider, scratch: Path) -> Plan | None:
    """Validate the input and split it; return None if it is gone, but no longer needed."""
    source = job.input
    if is_path(source):
        path = open_path(source)
        check_path(path)
        if path.absolute().parent == job.folder.path and _OWN_NAMES.fullmatch(path.name):
            raise ConfigurationError(
                f"input {path} lies in the job's own folder under a name of its files, which it replaces and "
                "removes; move it, or give the job another output"
            )
    else:
        path = open_path(_spool_requests(source, scratch / SPOOL))
    ledger = job.folder.read()
    try:
        before = ledger if ledger is not None and ledger.job == job.identity else None
        plan = _planned(job, provider, path, scratch, before.shard_requests if before else job.shard_requests)
        if before is not None and before.shard_requests != job.shard_requests:
            wanted = fingerprint(job, provider, plan.digest, restarts(job, before))
            if wanted != before.fingerprint:  # a new submission takes the new shard_requests
                plan = _planned(job, provider, path, scratch, job.shard_requests)
        return plan
    except FileNotFoundError:
        if ledger is None or not _input_no_longer_needed(ledger):
            raise ConfigurationError(f"input: there is no file {path}") from None
        log.warning("input %s is gone; continuing with the batches that were submitted before", path)
        return None
    except IsADirectoryError:
        raise ConfigurationError(f"input: {path} is a folder, not a JSONL file") from None


def _planned(job: Job, provider: Provider, path: UPath, scratch: Path, shard_requests: int | None) -> Plan:
    local = local_path(path) if provider.codec.verbatim and job.model is None else None
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


def _input_no_longer_needed(ledger: Ledger) -> bool:
    """Whether every row of the input has a batch, or the job was stopped so that it needs none."""
    all_created = all(record.step is Step.CREATED for record in ledger.of_round(1))
    return all_created or (ledger.stopped_at is not None and not ledger.is_untouched)


def _spool_requests(requests: object, path: Path) -> Path:
    """Write request objects to a file: an iterator yields them once, and later rounds need them again."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, request in enumerate(iter_requests(requests), start=1):
            if (wrong := why_no_request(request)) is not None:
                raise ConfigurationError(f"input: request {number} {wrong}")
            try:
                file.write(json.dumps(dict(request), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"input: request {number} cannot be written as JSON: {error}"
                ) from None
    return path


def restarts(job: Job, ledger: Ledger | None) -> tuple[str, ...]:
    """Return all values of `Job.restart` so far; only a new one restarts the job."""
    before = ledger.restarts if ledger else ()
    return before if job.restart is None or job.restart in before else (*before, job.restart)


class InputGoneError(InputChangedError):
    """The input's path is known, but there is no file any more."""


def open_input(job: Job, ledger: Ledger, scratch: Path) -> tuple[str, BinaryIO]:
    """Open the input again; return its path and the open file. `scratch` is where `prepare` may have put it.

    Raises InputGoneError if its path is known but holds no file, InputChangedError if its path is not known.
    """
    kind: type[InputChangedError] = InputChangedError
    if is_path(job.input):
        with suppress(FileNotFoundError):
            return _opened(open_path(job.input))
        kind = InputGoneError
    if ledger.input is not None:
        try:
            return _opened(open_path(ledger.input))
        except FileNotFoundError:
            kind = InputGoneError
        except Exception as error:
            if "@" not in ledger.input:
                raise
            # It may name a connection of Airflow's, which only the operator's own path object can use.
            log.warning("job %s: input %s cannot be opened here: %s", ledger.job, ledger.input, error)
    if ledger.is_spooled:
        kind = InputGoneError  # its only copy was in the folder
    for path in (UPath(scratch / SPOOL), job.folder / SPOOL):
        with suppress(FileNotFoundError):
            return _opened(path)
    raise kind("was removed")


def _opened(path: UPath) -> tuple[str, BinaryIO]:
    return str(path), path.open("rb")
