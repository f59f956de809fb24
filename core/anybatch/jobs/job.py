"""A job: one input, however large, as one result set, paid for exactly once.

`submit` brings every shard of the input to a batch, `resume` submits rows again that are worth it, `collect`
lands the results. Each can be repeated, by any process, at any time: what was done before is read from the
ledger, what the ledger does not know is asked of the provider. `stop` ends it early, and for good.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ConfigurationError, JobError
from ..paths import open_path
from ..providers.base import DEFAULT_WINDOW
from .folder import JobFolder
from .ledger import Ledger, ShardRecord
from .options import (
    KeepRequests,
    OnChanged,
    OnLost,
    OnOrphan,
    OnUntranslatable,
    Part,
    options_of,
    wrong_choice,
)

if TYPE_CHECKING:
    from upath import UPath

    from ..models import Report
    from ..providers.base import Provider

__all__ = ["Job", "JobInput", "fingerprint", "job_metadata", "never_submitted", "shard_metadata", "short"]

JobInput: TypeAlias = "str | os.PathLike[str] | UPath | Iterable[Mapping[str, Any]]"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, and where its results land.

    `input` is a JSONL file (a path or fsspec URL) or an iterable of request objects; `output` a folder of
    the job's own (a path or fsspec URL). `id` is the job's identity, the output's location if not given: the
    same identity is the same job, which is never paid for twice.

    on_orphan         a create may have left a batch that nobody can look up: "fail", or "resubmit"
    on_changed        submitted before with other input: "cancel_and_resubmit", or "fail"
    on_untranslatable a parameter the provider has no word for: "fail" with its line, or "drop" it
    on_lost           a batch or a result file is gone at the provider, or shorter than the provider counts:
                      "fail", "land" what there is (its other rows are `missing`), or "resubmit", buy those
                      rows again, also after they have landed so
    shard_requests    how many requests one batch may hold at most, below the provider's own limit; in force
                      from the first submission on
    keep_requests     how long requests given as objects stay in the folder: "until_submitted" (a later round
                      needs them given once more), "until_landed", or "always"
    max_rounds        how often a row may be submitted: 1 is once; with 2 and more, rows that expired, are
                      missing, or failed in a way that may pass are submitted again. Rows of a batch that was
                      cancelled are submitted again whatever this says, at most twice in one attempt; after
                      `Client.stop` none is, until the job has landed and this is more than it was
    restart           any text: the same input is submitted once more, whatever was done before, once for each
                      such text; what still runs is cancelled. None keeps to what is on record
    lease             seconds that a create which another attempt has begun is left to it
    price             USD for a million input and output tokens, where the provider does not tell the cost
    """

    input: JobInput = field(repr=False)
    output: str | os.PathLike[str] | UPath | JobFolder
    endpoint: str = "/v1/chat/completions"
    id: str | None = None
    model: str | None = None
    completion_window: str = DEFAULT_WINDOW
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    on_orphan: OnOrphan = "fail"
    on_changed: OnChanged = "cancel_and_resubmit"
    on_untranslatable: OnUntranslatable = "fail"
    on_lost: OnLost = "fail"
    shard_requests: int | None = None
    keep_requests: KeepRequests = "until_landed"
    max_rounds: int = 1
    restart: str | None = None
    lease: float = 90.0
    price: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for one in options_of(Part.JOB):
            if one.choices and (wrong := wrong_choice(one.name, getattr(self, one.name))):
                raise ConfigurationError(wrong)
        if not isinstance(self.max_rounds, int) or self.max_rounds < 1:
            raise ConfigurationError(f"max_rounds: 1 or more, not {self.max_rounds!r}")
        if self.shard_requests is not None and (
            not isinstance(self.shard_requests, int) or self.shard_requests < 1
        ):
            raise ConfigurationError(f"shard_requests: 1 or more, or None, not {self.shard_requests!r}")
        if self.restart is not None and (not isinstance(self.restart, str) or not self.restart):
            raise ConfigurationError(f"restart: a text that is not empty, or None, not {self.restart!r}")

    @cached_property
    def folder(self) -> JobFolder:
        if isinstance(self.output, JobFolder):
            return self.output
        return JobFolder(open_path(self.output).absolute())

    @property
    def identity(self) -> str:
        return self.id or str(self.folder.path)

    def ledger(self) -> Ledger | None:
        """What is on record of the job; None before its first submission."""
        return self.folder.read()

    def report(self) -> Report | None:
        """The account of the job; None until it is done, and while it is being done once more."""
        folder = self.folder
        ledger = folder.read()
        return folder.read_report() if ledger is not None and ledger.landed_at is not None else None


def job_metadata(job: Job, provider: Provider) -> dict[str, str]:
    """The user's metadata, and the marks by which a job's batches are known at the provider."""
    if provider.traits.metadata is None:
        if job.metadata:
            raise ConfigurationError(f"{provider.name}: batches carry no metadata", provider=provider.name)
        return {}
    if reserved := [key for key in job.metadata if key.startswith("anybatch_")]:
        raise ConfigurationError(f"metadata: {reserved[0]!r} is one of anybatch's own keys")
    return {
        **job.metadata,
        "anybatch_job": short(job.identity),
        "anybatch_shard": "0/1",
        "anybatch_round": "1",
    }


def short(identity: str, limit: int = 200) -> str:
    """An identity cut to fit into metadata, still unlike all others."""
    if len(identity) <= limit:
        return identity
    return identity[: limit - 17] + "~" + hashlib.sha256(identity.encode()).hexdigest()[:16]


def fingerprint(job: Job, provider: Provider, digest: str, restarts: Sequence[str] = ()) -> str:
    """sha256 over all that decides what the provider is asked: a change means another job was meant.

    The key is left out, so that it can be rotated while a batch runs.
    """
    facts = [digest, provider.name, provider.account.place, job.endpoint, job.model, job.completion_window,
             job.on_untranslatable, dict(job.options), *restarts[-1:]]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def shard_metadata(metadata: Mapping[str, str], record: ShardRecord, shards: int) -> dict[str, str]:
    """The marks of one shard, of so many in its round."""
    if not metadata:
        return {}
    return {**metadata, "anybatch_shard": f"{record.shard}/{shards}", "anybatch_round": str(record.round)}


def never_submitted(job: Job) -> JobError:
    return JobError(f"job {job.identity} was never submitted to {job.folder.path}")
