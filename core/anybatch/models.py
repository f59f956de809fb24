"""The values that every part of anybatch speaks in: frozen, and in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .states import BatchStatus as BatchStatus
from .states import Outcome as Outcome


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


def _count(value: object) -> int:
    """A count as servers send it: a number, text, or what is none, which says nothing."""
    try:
        return int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


Count: TypeAlias = Annotated[int, BeforeValidator(_count)]


class RequestCounts(_Frozen):
    """How many requests of a batch there are, succeeded and failed."""

    total: Count = 0
    completed: Count = 0
    failed: Count = 0


class BatchProblem(_Frozen):
    """One reason why a provider refused a batch; `line` counts from 1 in the uploaded file."""

    code: str | None = None
    message: str | None = None
    param: str | None = None
    line: int | None = None


class BatchErrors(_Frozen):
    """OpenAI's list object around the reasons."""

    object: str = "list"
    data: tuple[BatchProblem, ...] = ()


class Batch(_Frozen):
    """One job at a provider: OpenAI's batch object field for field, times in unix seconds.

    `provider`, `raw_status` (the provider's own word) and `raw` (its whole answer, not printed) are ours.
    Source: OpenAI API reference, "The batch object".
    """

    id: str
    object: str = "batch"
    endpoint: str | None = None
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str | None = None
    completion_window: str | None = None
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int | None = None
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts | None = None
    usage: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    provider: str
    raw_status: str
    raw: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def ended_at(self) -> int | None:
        """When it ended, in whatever way; None where it has not, or the provider does not say."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


class Page(Sequence[Batch]):
    """One page of a listing, newest first; pass `next_cursor` as `after` to get the next one.

    `has_more` without a `next_cursor` means that there is more, or may be, and no way to read on: what was
    not found until here may exist all the same.
    """

    def __init__(self, batches: Sequence[Batch], *, next_cursor: str | None, has_more: bool) -> None:
        self._batches = tuple(batches)
        self.next_cursor = next_cursor
        self.has_more = has_more

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self._batches[index]

    def __len__(self) -> int:
        return len(self._batches)

    def __repr__(self) -> str:
        return f"Page({list(self._batches)!r}, next_cursor={self.next_cursor!r}, has_more={self.has_more})"


class Body(dict[str, Any]):
    """A JSON object whose members can also be read as attributes, at any depth.

    `row.result.choices[0].message.content` works as on the providers' own SDK types, for every endpoint.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return _attributes(self[name])
        except KeyError:
            raise AttributeError(f"no member {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)


def _attributes(value: Any) -> Any:
    if isinstance(value, dict) and not isinstance(value, Body):
        return Body(value)
    if isinstance(value, list):
        return [_attributes(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a request has no result; `code` is the provider's, e.g. `batch_expired`."""

    code: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One request together with its one outcome.

    `result` is the response body in the dialect of the batch's endpoint, `error` is set on every outcome
    but `succeeded`, `status_code` is the HTTP status inside the batch, `raw` the provider's own bytes.
    """

    custom_id: str
    outcome: Outcome
    result: Body | None = None
    error: RowError | None = None
    status_code: int | None = None
    raw: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """All rows of one batch."""

    results: list[Row]


class TokenUsage(_Frozen):
    """Tokens as the provider counted them, summed over the rows that succeeded."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0


class BatchRecord(_Frozen):
    """What the report says of one batch of a job; times are the provider's, in unix seconds."""

    id: str
    shard: int
    round: int
    rows: int
    status: BatchStatus
    created_at: int | None = None
    ended_at: int | None = None
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None


class Report(_Frozen):
    """The account of a finished job.

    `counts` holds every outcome and sums to `rows`; `unexpected` counts result lines that no request asked
    for or that repeat one; `cost` is in USD, None where neither the provider nor `Job.price` tells it;
    times are unix seconds, `duration_s` runs from first submission to landing. `rounds` is 1 where no row was
    submitted again; `batches` are those of all rounds, and usage and cost count what any of them answered.
    """

    job: str
    provider: str
    endpoint: str
    models: tuple[str, ...] = ()
    rows: int
    counts: dict[Outcome, int]
    unexpected: int = 0
    usage: TokenUsage = TokenUsage()
    cost: float | None = None
    started_at: float
    finished_at: float
    duration_s: float
    rounds: int = 1
    batches: tuple[BatchRecord, ...] = ()
    results: str

    @property
    def ok(self) -> bool:
        """Whether every row succeeded."""
        return self.counts.get(Outcome.SUCCEEDED, 0) == self.rows


def iter_problems(errors: BatchErrors | None) -> Iterator[BatchProblem]:
    """The reasons inside a batch's `errors`, none where it has none."""
    yield from errors.data if errors else ()
