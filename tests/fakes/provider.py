"""What all fake providers have in common: a ledger of batches whose progress the test commands."""

from __future__ import annotations

import itertools
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from .rows import Failure, Fate, Json, Line, Quirks, echo, write_lines

if TYPE_CHECKING:
    from .server import Reply, Request

Pick = int | Collection[str]  # that many of the first rows, or these


class State(StrEnum):
    """The states of a batch, in OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.FAILED, State.COMPLETED, State.EXPIRED, State.CANCELLED})
DEAD = frozenset({State.FAILED, State.EXPIRED, State.CANCELLING, State.CANCELLED})


class Refusal(Exception):
    """A request the provider turns down; becomes its error body."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass
class FakeBatch:
    """One batch as the provider knows it; times are unix seconds by the state they were reached in."""

    id: str
    endpoint: str
    created_at: float
    metadata: dict[str, Any] | None = None
    input_file_id: str | None = None
    model: str | None = None
    options: Json = field(default_factory=dict)  # further members of the create call
    state: State = State.VALIDATING
    raw_status: str | None = None  # shown in place of the state
    reached: dict[State, float] = field(default_factory=dict)
    errors: list[Json] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # known once validated
    fates: dict[str, Fate] = field(default_factory=dict)
    progress: tuple[int, int] = (0, 0)  # completed, failed: shown before the end
    quirks: Quirks = field(default_factory=Quirks)
    failure: Failure = field(default_factory=Failure)
    usage: Json | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    looks: int = 0
    looks_in_state: int = 0

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_live(self) -> bool:
        """Whether somebody pays for it in full: neither failed nor expired nor (being) cancelled."""
        return self.state not in DEAD

    @property
    def shows_files(self) -> bool:
        late = self.quirks.files_after_looks
        return self.is_terminal and (late == 0 or self.looks_in_state > late)

    def counted(self, fate: Fate) -> int:
        """Rows of this fate; those without a line are in no count, so that the provider owes none."""
        fates = self.fates.items()
        return sum(one is fate and custom_id not in self.quirks.missing for custom_id, one in fates)


@dataclass(frozen=True)
class Auto:
    """Batches end by themselves, after so many looks (retrieve or list) or seconds, whichever comes first."""

    looks: int | None = None
    seconds: float | None = None
    end: Callable[[FakeProvider, str], object] = lambda fake, batch_id: fake.finish(batch_id)


class FakeProvider(ABC):
    """Base of the fakes: an application for `FakeServer`, and the test's hand on the provider's side.

    A batch is validated at its first look and then stays in progress until a command (`finish`, `expire`,
    `cancel_now`, `fail`) or `auto` ends it; a cancelled one shows cancelling for `cancel_looks` looks (None:
    until `cancel_now`). `answer(endpoint, body)` makes response bodies. State lives here, in the test's
    process: a client process that is killed changes nothing.
    """

    base_path = ""

    def __init__(
        self,
        *,
        key: str = "test-key",
        auto: Auto | None = None,
        quirks: Quirks | None = None,
        answer: Callable[[str, Json], Json] = echo,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.key = key
        self.auto = auto
        self.quirks = quirks or Quirks()
        self.answer = answer
        self.clock = clock
        self.cancel_looks: int | None = 1
        self.endless_list = False  # list never admits to its end and repeats its last page
        self.batches: dict[str, FakeBatch] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    def __call__(self, request: Request) -> Reply:
        with self._lock:
            try:
                return self._route(request)
            except Refusal as refusal:
                return self._refuse(refusal)

    # the test's view

    @property
    def last(self) -> FakeBatch:
        """The batch created last."""
        return next(reversed(self.batches.values()))

    def live_batches(self, metadata: Mapping[str, Any] | None = None) -> list[FakeBatch]:
        """The batches somebody pays for whose metadata has all these members."""
        wanted = (metadata or {}).items()
        with self._lock:
            live = [batch for batch in self.batches.values() if batch.is_live]
            return [batch for batch in live if wanted <= (batch.metadata or {}).items()]

    # the test's commands

    def start(self, batch_id: str) -> FakeBatch:
        """Validate now: the batch goes to in_progress, or fails."""
        with self._lock:
            batch = self._open(batch_id)
            if batch.state is State.VALIDATING:
                self._validate(batch)
            return batch

    def finish(
        self, batch_id: str, *, failed: Pick = 0, failure: Failure | None = None, quirks: Quirks | None = None
    ) -> FakeBatch:
        """Complete a batch; the rows in `failed` fail, the others succeed. Invalid input fails it instead."""
        return self._end(batch_id, State.COMPLETED, None, failed, failure, quirks)

    def expire(
        self, batch_id: str, *, done: Pick = 0, failed: Pick = 0, quirks: Quirks | None = None
    ) -> FakeBatch:
        """Let the window of a batch close: rows in `done` were answered (those also in `failed` badly)."""
        return self._end(batch_id, State.EXPIRED, done, failed, None, quirks)

    def cancel_now(
        self, batch_id: str, *, done: Pick = 0, failed: Pick = 0, quirks: Quirks | None = None
    ) -> FakeBatch:
        """Cancel a batch on the provider's side, or end its cancelling: rows in `done` have an answer."""
        return self._end(batch_id, State.CANCELLED, done, failed, None, quirks)

    def fail(self, batch_id: str, code: str, message: str, line: int | None = None) -> FakeBatch:
        """Fail a whole batch, as for a limit that validation found exceeded."""
        with self._lock:
            batch = self._open(batch_id)
            batch.errors = [{"code": code, "message": message, "param": None, "line": line}]
            self._enter(batch, State.FAILED)
            return batch

    def set_status(self, batch_id: str, raw: str | None) -> FakeBatch:
        """Show this status, known or not, until told otherwise (None: the truth again)."""
        with self._lock:
            self.batches[batch_id].raw_status = raw
            return self.batches[batch_id]

    def set_progress(self, batch_id: str, *, completed: int, failed: int = 0) -> FakeBatch:
        """Show these counts while the batch is in progress."""
        with self._lock:
            self.start(batch_id).progress = (completed, failed)
            return self.batches[batch_id]

    # the provider's side

    @abstractmethod
    def _route(self, request: Request) -> Reply: ...

    @abstractmethod
    def _refuse(self, refusal: Refusal) -> Reply: ...

    @abstractmethod
    def requests(self, batch: FakeBatch) -> Iterator[tuple[str, Json]]:
        """The id and body of each row of the input."""

    @abstractmethod
    def _line(self, batch: FakeBatch, custom_id: str, body: Json, fate: Fate) -> Line | None:
        """The result line of a row, or None where the provider writes none."""

    @abstractmethod
    def _store(self, batch: FakeBatch, output: bytes | None, error: bytes | None) -> None:
        """Keep the results."""

    def _problems(self, batch: FakeBatch) -> list[Json]:
        """What the provider finds wrong with the input, after it has accepted the batch."""
        return []

    def _open(self, batch_id: str) -> FakeBatch:
        batch = self.batches[batch_id]
        assert not batch.is_terminal, f"{batch_id} is {batch.state} already"
        return batch

    def _enter(self, batch: FakeBatch, state: State) -> None:
        batch.state, batch.raw_status, batch.looks_in_state = state, None, 0
        batch.reached[state] = self.clock()

    def _validate(self, batch: FakeBatch) -> None:
        batch.errors = self._problems(batch)
        if not batch.errors:
            batch.ids = [custom_id for custom_id, _ in self.requests(batch)]
        self._enter(batch, State.FAILED if batch.errors else State.IN_PROGRESS)

    def _look(self, batch: FakeBatch) -> None:
        """Somebody retrieves or lists the batch: time passes."""
        batch.looks += 1
        if batch.state is State.VALIDATING:
            self._validate(batch)
        batch.looks_in_state += 1
        if batch.state is State.CANCELLING and self.cancel_looks is not None:
            if batch.looks_in_state > self.cancel_looks:
                completed, bad = batch.progress
                self.cancel_now(batch.id, done=completed + bad, failed=bad)
                batch.looks_in_state = 1
        elif batch.state is State.IN_PROGRESS and self.auto is not None and self._due(batch, self.auto):
            self.auto.end(self, batch.id)
            batch.looks_in_state = 1

    def _due(self, batch: FakeBatch, auto: Auto) -> bool:
        by_looks = auto.looks is not None and batch.looks >= auto.looks
        return by_looks or (auto.seconds is not None and self.clock() - batch.created_at >= auto.seconds)

    def _end(
        self,
        batch_id: str,
        state: State,
        done: Pick | None,
        failed: Pick,
        failure: Failure | None,
        quirks: Quirks | None,
    ) -> FakeBatch:
        with self._lock:
            batch = self._open(batch_id)
            if State.IN_PROGRESS not in batch.reached:  # perhaps it was cancelled before it was validated
                self._validate(batch)
            if batch.state is State.FAILED:
                return batch
            batch.failure, batch.quirks = failure or batch.failure, quirks or self.quirks
            rest = Fate.CANCELLED if state is State.CANCELLED else Fate.EXPIRED
            answered, broken = _pick(batch.ids, done), _pick(batch.ids, failed)
            batch.fates = {
                one: (Fate.FAILED if one in broken else Fate.SUCCEEDED) if one in answered else rest
                for one in batch.ids
            }
            batch.usage = None
            self._store(batch, *write_lines(self._lines(batch), batch.quirks))
            if state is not State.CANCELLED:
                batch.reached.setdefault(State.FINALIZING, self.clock())
            self._enter(batch, state)
            return batch

    def _lines(self, batch: FakeBatch) -> Iterator[Line]:
        for custom_id, body in self.requests(batch):
            line = self._line(batch, custom_id, body, batch.fates[custom_id])
            if line is not None:
                yield line


def _pick(ids: list[str], pick: Pick | None) -> Collection[str]:
    if pick is None:
        return set(ids)
    chosen = set(ids[:pick]) if isinstance(pick, int) else set(pick)
    assert chosen <= set(ids), f"no such rows: {sorted(chosen - set(ids))}"
    return chosen


def read_json(request: Request) -> Json:
    """The request's JSON object; a Refusal where there is none."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refusal(415, "Unsupported content-type; expected application/json")
    try:
        value = json.loads(request.body)
    except ValueError as error:
        raise Refusal(400, f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body of your request is not a JSON object")
    return value
