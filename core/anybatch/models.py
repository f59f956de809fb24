"""The values that all parts of anybatch exchange: frozen, and in OpenAI's shape."""

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
    """Return a count as an integer; servers send numbers, text, or nonsense, which counts as 0."""
    try:
        return int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


Count: TypeAlias = Annotated[int, BeforeValidator(_count)]


class RequestCounts(_Frozen):
    """The counts of a batch's requests.

    Attributes:
        total: All requests.
        completed: Those that succeeded.
        failed: Those that failed; some providers include expired and cancelled ones.
    """

    total: Count = 0
    completed: Count = 0
    failed: Count = 0


class BatchProblem(_Frozen):
    """One reason why a provider refused a batch.

    Attributes:
        code: The provider's error code.
        message: The reason.
        param: The parameter that it is about.
        line: The line of the uploaded file, from 1.
    """

    code: str | None = None
    message: str | None = None
    param: str | None = None
    line: int | None = None


class BatchErrors(_Frozen):
    """OpenAI's list object around the reasons why a batch was refused.

    Attributes:
        object: Always "list".
        data: The reasons.
    """

    object: str = "list"
    data: tuple[BatchProblem, ...] = ()


class Batch(_Frozen):
    """One job at a provider: OpenAI's batch object, and three fields of anybatch's own.

    All times (`…_at`) are unix seconds; a field that the provider does not report is None.
    Source: OpenAI API reference, "The batch object".

    Attributes:
        id: The batch's id at the provider.
        object: Always "batch".
        endpoint: The endpoint of its requests.
        model: The model of its requests, if the provider runs one model per batch.
        errors: The reasons why the provider refused the batch as a whole.
        input_file_id: The uploaded file of request lines.
        completion_window: How long the provider may take, such as `24h`.
        status: Its status, in OpenAI's words.
        output_file_id: The result file of the rows that succeeded.
        error_file_id: The result file of the other rows.
        created_at: When it was created.
        in_progress_at: When the provider started to run it.
        expires_at: When it expires if it has not ended.
        finalizing_at: When the provider started to write the result files.
        completed_at: When it completed.
        failed_at: When it was refused as a whole.
        expired_at: When it expired.
        cancelling_at: When a cancel was requested.
        cancelled_at: When the cancel had taken effect.
        request_counts: How many of its requests succeeded and failed so far.
        usage: Its token usage, as the provider reports it.
        metadata: Its metadata.
        provider: The provider's name.
        raw_status: Its status in the provider's own words.
        raw: The provider's whole answer; the repr leaves it out.
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
        """When it ended in any way, unix seconds; None if it runs, or the provider does not report it."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


class Page(Sequence[Batch]):
    """One page of a listing, newest first; as a sequence, its batches.

    Attributes:
        next_cursor: What to pass as `after` for the next page; None if there is none.
        has_more: Whether there are, or may be, more batches. If there is no `next_cursor` then, the listing
            cannot be read on, and a batch that was not found may exist all the same.
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

    `row.result.choices[0].message.content` works as with the types of the providers' own SDKs.
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
    """Why a request has no result.

    Attributes:
        code: The provider's error code, or anybatch's own, such as `batch_expired`.
        message: The reason.
    """

    code: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One request together with its one outcome.

    Attributes:
        custom_id: The request's id.
        outcome: How the request ended.
        result: The response body, in the format of the batch's endpoint.
        error: Why there is no result; set for every outcome but `succeeded`.
        status_code: The HTTP status of the request inside the batch.
        raw: The provider's own result line, or the landed line; the repr leaves it out.
    """

    custom_id: str
    outcome: Outcome
    result: Body | None = None
    error: RowError | None = None
    status_code: int | None = None
    raw: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """All rows of one batch.

    Attributes:
        results: The rows, in the provider's order.
    """

    results: list[Row]


class TokenUsage(_Frozen):
    """Tokens as the provider counts them, summed over the rows that succeeded.

    Attributes:
        input_tokens: Tokens of the requests, cached ones included.
        output_tokens: Tokens of the answers.
        total_tokens: Both.
        cached_tokens: Tokens of the requests that were read from the provider's cache.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0


class BatchRecord(_Frozen):
    """One batch of a job, as the report describes it.

    Attributes:
        id: The batch's id.
        shard: The number of its shard in the round, from 0.
        round: Its round, from 1.
        rows: The number of its rows.
        status: Its final status; `unknown` if the provider has lost it.
        created_at: When it was created, by the provider's clock, unix seconds.
        ended_at: When it ended, by the provider's clock, unix seconds.
        input_file_id: The uploaded file of request lines.
        output_file_id: The result file of the rows that succeeded.
        error_file_id: The result file of the other rows.
    """

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
    """What a finished job came to.

    Attributes:
        job: The job's identity.
        provider: The provider's name.
        endpoint: The endpoint of the requests.
        models: The models that answered.
        rows: The number of rows.
        counts: The number of rows by outcome, for every outcome; the sum is `rows`.
        unexpected: The number of result lines that match no request or repeat one.
        usage: The tokens of all answers, over all rounds.
        cost: USD for all answers, over all rounds; None if neither the provider nor `Job.price` gives it.
        started_at: When the job was first submitted, unix seconds.
        finished_at: When it landed, unix seconds.
        duration_s: The seconds between these two.
        rounds: The number of rounds; 1 if no row was submitted again.
        batches: The batches of all rounds.
        results: The path or URL of `results.jsonl`.
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
    """Yield the reasons in a batch's `errors`, if there are any."""
    yield from errors.data if errors else ()
