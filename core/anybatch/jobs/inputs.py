"""The input of a job: where it lies, validated and split, and opened once more for a later round."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from ..errors import ConfigurationError, InputChangedError
from ..paths import is_path, local_path, open_path
from ..rows.planning import Plan, make_plan
from ..rows.sources import check_path, iter_requests, no_request
from .job import fingerprint
from .ledger import Ledger, Step

if TYPE_CHECKING:
    from typing import BinaryIO

    from ..providers.base import Provider
    from .job import Job, JobInput

log = logging.getLogger(__name__)

SPOOL = "requests.jsonl"
"""The file of request lines that were given as objects, in a scratch folder and in the job's own."""


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
        path = open_path(_spool_requests(source, scratch / SPOOL))
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


def _is_settled(ledger: Ledger) -> bool:
    """Whether the input is needed no more: every row has had its batch, or is to have none."""
    all_created = all(record.step is Step.CREATED for record in ledger.of_round(1))
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


def restarts(job: Job, ledger: Ledger | None) -> tuple[str, ...]:
    """All values of `Job.restart` so far: the last one is in force, and none of them restarts once more."""
    before = ledger.restarts if ledger else ()
    return before if job.restart is None or job.restart in before else (*before, job.restart)


class InputGoneError(InputChangedError):
    """The input is not where it was; not raised where nobody has said where that is."""


def open_input(job: Job, ledger: Ledger, scratch: Path) -> tuple[str, BinaryIO]:
    """The input, opened once more, and where it was found; `scratch` is where `prepare` may have put it.

    Raises InputChangedError where it is nowhere, InputGoneError where it is not in the place that is known.
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
            # A connection of Airflow's, perhaps, which only the job's own path object knows how to use.
            log.warning("job %s: %s cannot be opened here: %s", ledger.job, ledger.input, error)
    for path in (UPath(scratch / SPOOL), job.folder / SPOOL):
        with suppress(FileNotFoundError):
            return _opened(path)
    raise kind("was removed")


def _opened(path: UPath) -> tuple[str, BinaryIO]:
    return str(path), path.open("rb")
