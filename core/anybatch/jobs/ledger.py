"""The durable record of a job, and the folder that holds it.

The ledger is what makes a second attempt re-attach instead of paying again: every step is written down before
the next one is taken. It holds ids, hashes and counts; never a prompt, never a key.

    job.json        the ledger
    ids.jsonl       the custom_ids in input order, one JSON string a line
    requests.jsonl  the request lines, where they were given as objects and not as a file; how long they stay
                    is for `Job.keep_requests` to say
    results.jsonl   the rows in input order
    stray.jsonl     result lines that no request asked for, if there were any
    report.json     the account; it is the last word once the ledger says that the job has landed

and where rows were submitted again, in rounds:

    ids-<n>.jsonl    the custom_ids of round n, from the second on, in input order
    round-<n>.jsonl  all rows as they stood when round n had ended; kept while a later round builds on it
    stray-<n>.jsonl  the stray lines up to then, if there were any

On a local disk an empty `.lock` lies beside them.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from ..models import BatchRecord, BatchStatus

__all__ = ["VERSION", "Ledger", "ShardRecord", "Step"]

VERSION = 2
"""The form of the ledger: a job is gone on with by a version of anybatch that writes the same."""


class Step(StrEnum):
    """How far a shard has come; each is written to the ledger before the next begins."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"  # a create is about to be sent, or was; the batch may exist
    CREATED = "created"


class ShardRecord(BaseModel):
    """One shard of a round: the rows from `first_row` on of what that round submits.

    `round` counts from 1, `tries` the creates from this file that may have left a batch: above 0
    before the batch is known, or above 1 after, there may be one that no attempt has heard of. `ended` is the
    batch as the report tells of it, noted when a later round is opened. `cancelling_at` is when we first saw
    the batch being cancelled, `gone_at` when the provider first knew no such batch, in unix seconds. `dead`
    counts the batches of it that were refused as a whole, after each of which it gets another.
    """

    model_config = ConfigDict(frozen=True, defer_build=True, extra="allow")  # a later version's stay

    shard: int
    round: int = 1
    first_row: int
    rows: int
    step: Step = Step.PLANNED
    tries: int = 0
    file_id: str | None = None
    batch_id: str | None = None
    attempt: str | None = None  # who is creating …
    creating_at: float | None = None  # … since when, unix seconds
    status: BatchStatus | None = None
    ended: BatchRecord | None = None
    cancelling_at: float | None = None
    gone_at: float | None = None
    dead: int = 0

    def anew(self) -> ShardRecord:
        """The same shard without its batch, which is dead."""
        return ShardRecord(
            shard=self.shard, round=self.round, first_row=self.first_row, rows=self.rows, dead=self.dead + 1
        )


class Ledger(BaseModel):
    """What is known of a job.

    `revision` grows with every write. `submission` counts those with other input or options in this folder,
    from 1. `shards` are those of all rounds. `replaced` holds what was begun with earlier input, until all of
    its batches are known and cancelled. `input` is where the input lies, if that was a path; `restarts` are
    the values of `Job.restart` so far; `shard_requests` is that of the first submission, by which every later
    attempt splits the input alike. `stopped_at` is when the job was stopped, `max_rounds` what it was last
    submitted with: only with more of them do its rows go again after that.

    Of rounds: `recoveries` is how often this attempt has submitted rows of cancelled batches or lost answers
    again, `recovery_rounds` counts the rounds that were opened for nothing else, `lost_round` is the last one
    that was opened for lost answers, too, and `unexpected` counts the stray lines of the rounds before.
    """

    model_config = ConfigDict(frozen=True, defer_build=True, extra="allow")  # a later version's stay

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
        return [record.batch_id for record in self.shards if record.batch_id]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was uploaded yet: what is needed of the input may not have been written down."""
        return self.round == 1 and all(record.step is Step.PLANNED for record in self.shards)

    @property
    def is_submitted(self) -> bool:
        """Whether every row of the current round has had its batch."""
        return all(record.step is Step.CREATED for record in self.current)

    @property
    def round(self) -> int:
        """The current round: 1, or more where rows were submitted again."""
        return max((record.round for record in self.shards), default=1)

    @property
    def current(self) -> tuple[ShardRecord, ...]:
        """The shards of the current round."""
        return self.of_round(self.round)

    def of_round(self, number: int) -> tuple[ShardRecord, ...]:
        return tuple(record for record in self.shards if record.round == number)

    def latest(self, record: ShardRecord) -> ShardRecord | None:
        """What this ledger says of the shard that another one spoke of."""
        same = (new for new in self.shards if (new.shard, new.round) == (record.shard, record.round))
        return next(same, None)

    def with_shard(self, record: ShardRecord) -> Ledger:
        shards = tuple(
            record if (old.shard, old.round) == (record.shard, record.round) else old for old in self.shards
        )
        return self.model_copy(update={"shards": shards})
