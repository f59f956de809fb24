"""The state of a job between two steps: what `submit`, `resume` and `stop` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from ..models import Batch
    from .ledger import Ledger


@dataclass(frozen=True, eq=False)
class Standing(Sequence["Batch"]):
    """The state of a job's current round; as a sequence, the batches of that round.

    All times are unix seconds.

    Attributes:
        batches: The batches of the current round, as last seen.
        held: The number of shards that are not submitted yet because the provider has no room for them.
        come_back_at: When to resume the job even if no batch has ended by then.
        landed: Whether the results are in place and nothing is left to do.
        stopped_at: When a person stopped the job.
        created_at: When the job was first submitted.
        submitted: For each batch id, when the ledger recorded its create. The provider's own time may be
            absent or wrong.
        cancelling: For each batch id, when the ledger first recorded that it was being cancelled.
    """

    batches: tuple[Batch, ...] = ()
    held: int = 0
    come_back_at: float | None = None
    landed: bool = False
    stopped_at: float | None = None
    created_at: float | None = None
    submitted: Mapping[str, float] = field(default_factory=dict)
    cancelling: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, ledger: Ledger, batches: Sequence[Batch]) -> Standing:
        """Build the standing from the ledger and the batches as last seen.

        Args:
            ledger: The job's ledger.
            batches: The batches of its current round.

        Returns:
            The standing of the job.
        """
        noted = [(record.batch_id, record) for record in ledger.current if record.batch_id is not None]
        return cls(
            batches=tuple(batches),
            landed=ledger.landed_at is not None,
            stopped_at=ledger.stopped_at,
            created_at=ledger.created_at,
            submitted={one: record.creating_at or ledger.created_at for one, record in noted},
            cancelling={one: record.cancelling_at for one, record in noted if record.cancelling_at},
        )

    @property
    def running(self) -> list[Batch]:
        """The batches that have not ended."""
        return [batch for batch in self.batches if not batch.status.is_terminal]

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for, so that the results can be collected."""
        return not self.running and not self.held and self.come_back_at is None

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)
