"""A job: one input of any size, one result set, paid for exactly once.

`submit` creates a batch for every shard of the input, `resume` submits failed rows again, `collect` lands the
results. Any process can repeat each of them at any time: it reads from the ledger what was done before, and
asks the provider about anything the ledger does not know. `stop` ends the job early and permanently.
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

__all__ = [
    "Job",
    "JobInput",
    "fingerprint",
    "job_metadata",
    "never_submitted_error",
    "shard_metadata",
    "short",
]

JobInput: TypeAlias = "str | os.PathLike[str] | UPath | Iterable[Mapping[str, Any]]"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to submit, and where its results land.

    Attributes:
        input: The request lines: a JSONL file (a path or fsspec URL), or an iterable of request objects.
        output: The job's own folder (a path or fsspec URL), for its ledger, results and report.
        endpoint: The endpoint of every request, such as `/v1/chat/completions`.
        id: The job's identity; by default the location of `output`. The same identity is the same job, and a
            job is never paid for twice.
        model: The model of every request whose body names none.
        completion_window: How long the provider may take, such as `24h`.
        metadata: Strings put on every batch at the provider, beside anybatch's own.
        options: The provider's own options for creating a batch.
        on_orphan: What to do if a create got no answer and the provider offers no way to look for its batch:
            "fail", or "resubmit" and risk paying for both.
        on_changed: What to do if the job was submitted before with other input or options:
            "cancel_and_resubmit", or "fail".
        on_untranslatable: What to do with a parameter that has no counterpart in the provider's API: "fail"
            and name its line, or "drop" it.
        on_lost: What to do if the provider has lost a batch or a result file, or a result file holds fewer
            rows than the provider counts: "fail"; "land" the other rows and report these as `missing`; or
            "resubmit", which pays for the lost rows again, even if they have already landed as `missing`.
        shard_requests: The most requests in one batch, if lower than the provider's own limit. The value of
            the job's first submission applies to all later ones.
        keep_requests: How long requests that were passed as objects stay in the folder: "until_submitted" (a
            later round then needs them passed again), "until_landed", or "always".
        max_rounds: How often a row may be submitted. 1 means once; with 2 or more, rows that expired, are
            missing, or failed with an error that may be temporary are submitted again. Rows of a cancelled
            batch are submitted again regardless of this, at most twice in one attempt. After `Client.stop` no
            row is submitted again until the job has landed and is run with a higher `max_rounds`.
        restart: Any text. Each new text submits the same input once more and cancels what still runs; None
            continues the job as it is.
        lease: Seconds for which a create that another attempt has begun is left to that attempt.
        price: USD per million input tokens and per million output tokens, for providers that do not report
            the cost.
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
            raise ConfigurationError(f"max_rounds: must be an integer of 1 or more, not {self.max_rounds!r}")
        if self.shard_requests is not None and (
            not isinstance(self.shard_requests, int) or self.shard_requests < 1
        ):
            raise ConfigurationError(
                f"shard_requests: must be an integer of 1 or more, or None, not {self.shard_requests!r}"
            )
        if self.restart is not None and (not isinstance(self.restart, str) or not self.restart):
            raise ConfigurationError(f"restart: must be a non-empty text or None, not {self.restart!r}")

    @cached_property
    def folder(self) -> JobFolder:
        """The job's folder, opened from `output`."""
        if isinstance(self.output, JobFolder):
            return self.output
        return JobFolder(open_path(self.output).absolute())

    @property
    def identity(self) -> str:
        """`id`, or the location of `output` if there is none."""
        return self.id or str(self.folder.path)

    def ledger(self) -> Ledger | None:
        """Read the job's ledger.

        Returns:
            The ledger, or None before the first submission.

        Raises:
            LedgerConflictError: `job.json` cannot be read, or another version of anybatch wrote it.
        """
        return self.folder.read()

    def report(self) -> Report | None:
        """Read the report of the landed job.

        Returns:
            The report, or None if the job has not landed yet or is being run again.

        Raises:
            LedgerConflictError: `job.json` or `report.json` cannot be read, or another version of anybatch
                wrote the ledger.
        """
        folder = self.folder
        ledger = folder.read()
        return folder.read_report() if ledger is not None and ledger.landed_at is not None else None


def job_metadata(job: Job, provider: Provider) -> dict[str, str]:
    """Return the user's metadata and anybatch's own, by which a job's batches are recognised."""
    if provider.traits.metadata is None:
        if job.metadata:
            raise ConfigurationError(
                f"metadata: {provider.name} does not support metadata on batches; leave it out",
                provider=provider.name,
            )
        return {}
    if reserved := [key for key in job.metadata if key.startswith("anybatch_")]:
        raise ConfigurationError(f"metadata: {reserved[0]!r} is reserved for anybatch; rename the key")
    return {
        **job.metadata,
        "anybatch_job": short(job.identity),
        "anybatch_shard": "0/1",
        "anybatch_round": "1",
    }


def short(identity: str, limit: int = 200) -> str:
    """Shorten an identity to fit into metadata; a hash keeps it unique."""
    if len(identity) <= limit:
        return identity
    return identity[: limit - 17] + "~" + hashlib.sha256(identity.encode()).hexdigest()[:16]


def fingerprint(job: Job, provider: Provider, digest: str, restarts: Sequence[str] = ()) -> str:
    """Return the sha256 of everything that decides what is sent; a different one means a different job.

    It leaves out the API key, so that the key can be rotated while a batch runs.
    """
    facts = [digest, provider.name, provider.account.place, job.endpoint, job.model, job.completion_window,
             job.on_untranslatable, dict(job.options), *restarts[-1:]]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def shard_metadata(metadata: Mapping[str, str], record: ShardRecord, shards: int) -> dict[str, str]:
    """Return the metadata of one shard's batch; `shards` is the number of shards in its round."""
    if not metadata:
        return {}
    return {**metadata, "anybatch_shard": f"{record.shard}/{shards}", "anybatch_round": str(record.round)}


def never_submitted_error(job: Job) -> JobError:
    return JobError(
        f"job {job.identity} was never submitted: {job.folder.path} holds no ledger of it; submit it first"
    )
