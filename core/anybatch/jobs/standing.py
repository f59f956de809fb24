"""What a job stands at between two steps: the value that `submit`, `resume` and `stop` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from ..models import Batch
    from .ledger import Ledger


@dataclass(frozen=True, eq=False)
class Standing(Sequence["Batch"]):
    """The batches of a job's current round as they stand; as a sequence it is those batches.

    `held` counts the shards that wait for room at the provider. `come_back_at` is when to go on even if no
    batch has ended by then, `stopped_at` when the job was ended for good, `created_at` when it was first
    submitted, all in unix seconds. `submitted` and `cancelling` say for each batch id when that was noted
    here: a provider's own times may be absent, or wrong. `landed`: the results are in place, and nothing is
    left to be done.
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
        """What the ledger and the batches, as they were just seen, come to."""
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
        """Whether there is nothing to wait for: what there is can be collected."""
        return not self.running and not self.held and self.come_back_at is None

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)
