"""The ledger: the durable record of a job, and the files beside it.

An attempt records every step in the ledger before it takes the next one, so a later attempt re-attaches to
the batches instead of paying for them again. The ledger holds ids, hashes and counts, but no prompt and no
key.

A job's folder holds:

    job.json        the ledger
    ids.jsonl       the custom_ids in input order, one JSON string per line
    requests.jsonl  the request lines, if they were passed as objects; `Job.keep_requests` says how long
    results.jsonl   the rows in input order
    stray.jsonl     result lines that match no request, if there are any
    report.json     the report; final once the ledger says that the job has landed

and, if rows were submitted again in later rounds:

    ids-<n>.jsonl    the custom_ids of round n (n >= 2), in input order
    round-<n>.jsonl  all rows as of the end of round n; kept while a later round builds on it
    stray-<n>.jsonl  the stray lines as of the end of round n, if there are any

On a local disk the folder also holds an empty file `.lock`.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from ..models import BatchRecord, BatchStatus

__all__ = ["VERSION", "Ledger", "ShardRecord", "Step"]

VERSION = 2
"""The ledger's format version. Only a version of anybatch that writes the same format continues a job."""


class Step(StrEnum):
    """How far a shard has come. Each step is recorded in the ledger before the next one begins."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"  # a create was sent, or is about to be: the batch may exist
    CREATED = "created"


class ShardRecord(BaseModel):
    """One shard of a round, and how far it has come. Times are unix seconds.

    Attributes:
        shard: The shard's number in its round, from 0.
        round: The round, from 1.
        first_row: The number of its first row among the rows of the round, from 0.
        rows: The number of its rows.
        step: How far it has come.
        tries: The number of creates from this file that may have left a batch. If it is above 0 while
            `batch_id` is None, or above 1 otherwise, there may be a batch that no attempt knows of.
        file_id: The uploaded input file.
        batch_id: The shard's batch.
        attempt: The attempt that is creating the batch, or has created it.
        creating_at: When that attempt claimed the create.
        status: The batch's status when it was recorded.
        ended: The batch as the report describes it, recorded when a later round is opened.
        cancelling_at: When an attempt first saw the batch being cancelled.
        gone_at: When the provider first answered 404 for the batch.
        dead: The number of its batches that the provider refused as a whole; each was replaced.
    """

    # Keep the members that a later version has added.
    model_config = ConfigDict(frozen=True, defer_build=True, extra="allow")

    shard: int
    round: int = 1
    first_row: int
    rows: int
    step: Step = Step.PLANNED
    tries: int = 0
    file_id: str | None = None
    batch_id: str | None = None
    attempt: str | None = None
    creating_at: float | None = None
    status: BatchStatus | None = None
    ended: BatchRecord | None = None
    cancelling_at: float | None = None
    gone_at: float | None = None
    dead: int = 0

    def without_batch(self) -> ShardRecord:
        """Return the shard as planned again, after the provider refused its batch as a whole."""
        return ShardRecord(
            shard=self.shard, round=self.round, first_row=self.first_row, rows=self.rows, dead=self.dead + 1
        )


class Ledger(BaseModel):
    """Everything recorded about a job. Times are unix seconds.

    Attributes:
        version: The ledger's format version.
        revision: A number that grows with every write.
        submission: Which submission to this folder this is, from 1; other input or options make a new one.
        job: The job's identity.
        fingerprint: The sha256 of everything that decides what is sent.
        provider: The provider's name.
        api_base: The account's base URL, and its settings that are not secret.
        endpoint: The endpoint of the requests.
        rows: The number of rows.
        created_at: When the job was first submitted.
        shards: The shards of all rounds.
        landed_at: When the results landed.
        replaced: The ledgers of earlier submissions with other input, until all their batches are known and
            cancelled.
        input: The path of the input, if it was passed as a path.
        is_spooled: Whether the input was request objects, so that `requests.jsonl` is the job's own file.
        restarts: The values of `Job.restart` so far.
        stopped_at: When a person stopped the job.
        max_rounds: The value the job was last submitted with. After a stop, rows are submitted again only
            with a higher one.
        recovery_rounds: The number of rounds that only resubmitted rows of cancelled batches or lost results.
        recoveries: How often the current attempt has resubmitted such rows.
        unexpected: The number of stray lines in earlier rounds.
        lost_round: The last round that resubmitted lost results, perhaps among other rows.
        shard_requests: The value of the first submission. Later attempts use it, so that they split the input
            the same way.
    """

    # Keep the members that a later version has added.
    model_config = ConfigDict(frozen=True, defer_build=True, extra="allow")

    version: int = VERSION
    revision: int = 0
    submission: int = 1
    job: str
    fingerprint: str
    provider: str
    api_base: str
    endpoint: str
    rows: int
    created_at: float
    shards: tuple[ShardRecord, ...]
    landed_at: float | None = None
    replaced: tuple[Ledger, ...] = ()
    input: str | None = None
    is_spooled: bool = False
    restarts: tuple[str, ...] = ()
    stopped_at: float | None = None
    max_rounds: int = 1
    recovery_rounds: int = 0
    recoveries: int = 0
    unexpected: int = 0
    lost_round: int | None = None
    shard_requests: int | None = None

    @property
    def batch_ids(self) -> list[str]:
        """The ids of all batches that are known."""
        return [record.batch_id for record in self.shards if record.batch_id]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was uploaded yet; the files that later steps need may not be written either."""
        return self.round == 1 and all(record.step is Step.PLANNED for record in self.shards)

    @property
    def is_submitted(self) -> bool:
        """Whether every shard of the current round has a batch."""
        return all(record.step is Step.CREATED for record in self.current)

    @property
    def round(self) -> int:
        """The current round, from 1; later ones resubmit rows."""
        return max((record.round for record in self.shards), default=1)

    @property
    def current(self) -> tuple[ShardRecord, ...]:
        """The shards of the current round."""
        return self.of_round(self.round)

    def of_round(self, number: int) -> tuple[ShardRecord, ...]:
        """Return the shards of one round."""
        return tuple(record for record in self.shards if record.round == number)

    def latest(self, record: ShardRecord) -> ShardRecord | None:
        """Return this ledger's record of the same shard, or None if it has none."""
        same = (new for new in self.shards if (new.shard, new.round) == (record.shard, record.round))
        return next(same, None)

    def with_shard(self, record: ShardRecord) -> Ledger:
        """Return the ledger with this record in place of the same shard's old one."""
        shards = tuple(
            record if (old.shard, old.round) == (record.shard, record.round) else old for old in self.shards
        )
        return self.model_copy(update={"shards": shards})
