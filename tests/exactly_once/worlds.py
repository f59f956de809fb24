"""Concurrent attempts at one job, with a provider and a clock, taken one step at a time.

A flow names its effects, so an attempt can be stopped before any of them. What its next steps depend on is
read off its suspended generators: the instruction each stands at, and its local values. Ids, attempts and
times are replaced by their order and age, so that different paths can come to one state.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import httpx
from upath import UPath

from anybatch.errors import AnyBatchError, TransportError
from anybatch.flow import Do, Download, Sleep
from anybatch.jobs.folder import JobFolder
from anybatch.jobs.landing import Gathered
from anybatch.jobs.ledger import Ledger, ShardRecord
from anybatch.jobs.standing import Standing
from anybatch.models import Batch
from anybatch.retry import raise_for_status
from anybatch.rows.downloads import Fetched
from anybatch.rows.merge import Index
from anybatch.rows.tally import Tally
from tests.exactly_once.unreliable import SPOILT, UnreliableFake, ways_to_spoil
from tests.fakes.provider import DEAD, State
from tests.fakes.server import Request

START = 1_800_000_000.0
LEASE = 2.0  # seconds; all ages above it are the same

LEDGER, CLOCK, BATCHES, NEW = "the ledger", "the clock", "all batches", "a batch that is not yet"


class Touch(NamedTuple):
    """What a step has to do with: one of these, or a batch by its id; and whether it changes that."""

    what: str
    writes: bool

    def meets(self, other: Touch) -> bool:
        """Whether one of two steps may notice the other."""
        if CLOCK in (self.what, other.what):
            return True
        if LEDGER in (self.what, other.what) or BATCHES not in (self.what, other.what):
            return self.what == other.what and (self.writes or other.writes)
        return self.writes or other.writes


# Local values that nothing depends on here: where temporary files are, and from when on batches are listed.
OF_NO_ACCOUNT = {"scratch", "since"}

# The states of a batch that make a difference to an attempt.
_KNOWN = DEAD | {State.COMPLETED}

Flow = Generator[Any, Any, Any]
Step = tuple[str, str]  # (attempt, what happens)
Steps = frozenset[Step]
# What happens: "go" is the next effect, undisturbed; "deliver" the arrival of a late request; and these.
FAULTS = {
    "lost": "a create is done, but the answer is lost",
    "never": "a create is lost on its way",
    "late": "a create is given up by the client, but still under way",
    "down": "the provider cannot be reached for longer than the retries last",
    "kill": "the attempt ends here and now",
}
PROVIDER = "provider"  # who does what an `Event` is
# Functions of effects that touch an attempt's own files, and such as nobody changes: nobody notices when.
OF_ITS_OWN = {"Index", "add", "add_lost", "add_stopped", "ids_of", "_choose", "_plan"}
# What an attempt leaves for others, beside the ledger.
LEFT = re.compile(r"results\.jsonl|(round|ids|stray)-\d+\.jsonl")
_ID = re.compile(r"[\w-]+")


class Event(NamedTuple):
    """What the provider may do by itself, once, at any time; and when it can."""

    possible: Callable[[World], bool]
    happen: Callable[[World], object]


class Clock:
    """Unix time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Write:
    """The second half of a commit, in a store where others can write between the comparison and this."""

    folder: JobFolder
    ledger: Ledger


@dataclass
class Attempt:
    """A flow, stopped before `effect`; `returned` or `raised` once it has ended."""

    name: str
    flow: Flow
    effect: Any = None
    wake: float = 0.0
    returned: Any = None
    raised: AnyBatchError | None = None
    ended: bool = False

    def frames(self) -> Iterator[FrameType]:
        """Where the flow stands: its frame, and those of the flows inside it."""
        flow = self.flow
        while flow is not None and getattr(flow, "gi_frame", None) is not None:
            yield flow.gi_frame
            flow = flow.gi_yieldfrom

    @property
    def claim(self) -> Ledger | None:
        """The ledger with its note that it creates, as long as what it has created is not noted."""
        inside = (frame for frame in self.frames() if _name_of(frame) in ("_claim", "_create"))
        return next(filter(None, (frame.f_locals.get("claimed") for frame in inside)), None)

    @property
    def has_claim(self) -> bool:
        """Whether it has a claim, or is about to note one, whose time runs already."""
        return self.claim is not None or any(_name_of(frame) == "_claim" for frame in self.frames())

    @property
    def is_writing(self) -> bool:
        return isinstance(self.effect, Write)


@dataclass(eq=False)
class World:
    """Attempts at jobs in `folder`, the provider they talk to, and the time."""

    fake: UnreliableFake
    clock: Clock
    folder: Path | UPath
    key_header: tuple[str, str]
    is_create: Callable[[httpx.Request], bool]
    torn_commits: bool = False  # others may write between a commit's comparison and its write
    events: dict[str, Event] = field(default_factory=dict)
    spoils: str | None = None  # each answer of a kind is spoilt like this
    before_create: Callable[[Attempt], object] = lambda attempt: None  # is called with whoever sends one
    folder_counts: bool = False  # whether what attempts leave in the folder is a part of the state
    attempts: dict[str, Attempt] = field(default_factory=dict)
    pending: dict[str, httpx.Request] = field(default_factory=dict)
    faults: int = 0
    happened: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    marks: dict[str, None] = field(default_factory=dict)  # how attempts sign the ledger
    _known: dict[int, Any] = field(default_factory=dict)
    closed: bool = False

    def begin(self, name: str, flow: Flow) -> Attempt:
        attempt = self.attempts[name] = Attempt(name, flow)
        self._resume(attempt, lambda: next(flow))
        return attempt

    def close(self) -> None:
        self.closed = True
        for attempt in self.attempts.values():
            attempt.flow.close()
        if isinstance(self.folder, Path):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.folder.fs.rm(self.folder.path, recursive=True)

    # steps

    def steps(self, faults: frozenset[str], budget: int) -> Iterator[Step]:
        """What can happen next."""
        for attempt in self.attempts.values():
            if attempt.ended:
                continue
            yield attempt.name, "go"
            if self.faults < budget:
                kinds = {"kill"}
                if isinstance(attempt.effect, httpx.Request):
                    kinds |= {"lost", "never", "late"} if self.is_create(attempt.effect) else {"down"}
                kinds |= ways_to_spoil(attempt.effect)
                yield from ((attempt.name, kind) for kind in sorted(kinds & faults))
        yield from ((name, "deliver") for name in sorted(self.pending))
        for name, event in self.events.items():
            if name not in self.happened and event.possible(self):
                yield PROVIDER, name

    def apart(self, one: Step, other: Step) -> bool:
        """Whether two steps come to the same in either order."""
        if _who(one) == _who(other) or (is_fault(one[1]) and is_fault(other[1])):  # faults are counted
            return False
        return not self._touches(one).meets(self._touches(other))

    def _touches(self, step: Step) -> Touch:
        name, kind = step
        if name == PROVIDER:
            return Touch(BATCHES, writes=True)
        effect = self.attempts[name].effect
        if kind == "deliver":
            return Touch(NEW, writes=True)
        if kind == "kill":
            return Touch(LEDGER, writes=True)
        match effect:
            case Sleep():
                return Touch(CLOCK, writes=True)
            case httpx.Request() if self.is_create(effect):
                return Touch(NEW, writes=True)
            case httpx.Request():
                batch_id = next((known for known in self.fake.batches if known in effect.url.path), BATCHES)
                return Touch(batch_id, writes=effect.method != "GET")
            case Download():
                return Touch(BATCHES, writes=False)
            case Do(function):
                return Touch(LEDGER, writes=getattr(function, "__name__", "") != "read")
            case _:
                return Touch(LEDGER, writes=True)

    def step(self, step: Step) -> None:
        name, kind = step
        told = "" if kind == "deliver" or name == PROVIDER else _told(self.attempts[name].effect)
        self.trace.append(f"{name} {kind}: {told}")
        if name == PROVIDER:
            self.happened.append(kind)
            self.events[kind].happen(self)
            return
        if kind == "deliver":
            self._ask_provider(self.pending.pop(name))
            return
        attempt = self.attempts[name]
        self.faults += kind != "go"
        if kind == "go" or kind in SPOILT:
            self._carry_out(attempt, kind if kind in SPOILT else None)
            return
        match kind:
            case "lost":
                self._ask_provider(attempt.effect)
            case "late":
                self.pending[name] = attempt.effect
            case "kill":
                attempt.flow.close()
                attempt.ended, attempt.effect = True, None
                return
        broken = TransportError("the connection was reset", sent=True)
        self._resume(attempt, lambda: attempt.flow.throw(broken))

    def run(self, attempt: Attempt, limit: int = 500) -> Attempt:
        """Let one attempt go on to its end, undisturbed."""
        for _ in range(limit):
            if attempt.ended:
                return attempt
            self.step((attempt.name, "go"))
        raise AssertionError(f"{attempt.name} does not end")

    def _carry_out(self, attempt: Attempt, spoilt: str | None = None) -> None:
        effect = attempt.effect
        try:
            match effect:
                case httpx.Request():
                    if self.is_create(effect):
                        self.before_create(attempt)
                    result: Any = raise_for_status(answer := self._ask_provider(effect, spoilt)) or answer
                case Download(request, path):
                    raise_for_status(answer := self._ask_provider(request, spoilt or self._spoils(effect)))
                    result = path.write_bytes(answer.content) and None
                case Sleep(_):
                    result = None
                    self.clock.now = max(self.clock.now, attempt.wake)
                case Do(function) if self.torn_commits and (halves := _halves(function)):
                    folder, before, after = halves
                    if folder.read() == before:
                        attempt.effect = Write(folder, after)
                        return
                    result = None
                case Do(function):
                    result = function()
                case Write(folder, result):
                    folder.replace("job.json", result.model_dump_json().encode())
        except (AnyBatchError, OSError) as error:
            thrown = error
            self._resume(attempt, lambda: attempt.flow.throw(thrown))
        else:
            self.answer(attempt, result)

    def answer(self, attempt: Attempt, result: Any) -> None:
        """Let an attempt go on with what its effect came to."""
        self._resume(attempt, lambda: attempt.flow.send(result))

    def _resume(self, attempt: Attempt, go_on: Callable[[], Any]) -> None:
        try:
            attempt.effect = go_on()
        except StopIteration as stop:
            attempt.ended, attempt.effect, attempt.returned = True, None, stop.value
        except AnyBatchError as error:
            attempt.ended, attempt.effect, attempt.raised = True, None, error
        except Exception as error:
            raise AssertionError("\n  ".join([f"{attempt.name} raised {error!r}", *self.trace])) from error
        if isinstance(attempt.effect, Sleep):
            attempt.wake = self.clock.now + attempt.effect.seconds
        if not attempt.ended:
            for frame in attempt.frames():
                owner = frame.f_locals.get("attempt", frame.f_locals.get("self"))
                if mark := getattr(owner, "mark", None) or getattr(owner, "attempt", None):
                    self.marks.setdefault(mark)
                    break
        if isinstance(attempt.effect, Do) and _function_name(attempt.effect) in OF_ITS_OWN:
            self._carry_out(attempt)

    def _spoils(self, effect: Any) -> str | None:
        return self.spoils if self.spoils in ways_to_spoil(effect) else None

    def _ask_provider(self, request: httpx.Request, spoilt: str | None = None) -> httpx.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        headers |= dict([self.key_header])
        query = parse_qs(request.url.query.decode(), keep_blank_values=True)
        reply = self.fake(Request(request.method, request.url.path, query, headers, request.read()))
        if reply.status == 200 and (spoilt := spoilt or self._spoils(request)):
            reply = replace(reply, body=SPOILT[spoilt](reply.body))
        return httpx.Response(reply.status, headers=dict(reply.headers), content=reply.body, request=request)

    # what a state is

    def shared(self, ledger: Ledger | None) -> Any:
        """What a later attempt can find: the ledger, and the provider's batches."""
        happened = tuple(sorted(self.happened))
        return self._plain_value(ledger), self._batches(), tuple(sorted(self.pending)), happened, self._left()

    def state(self, ledger: Ledger | None) -> Any:
        """All that the future can depend on."""
        self._known.clear()
        return self.shared(ledger), self.faults, tuple(map(self._position, self.attempts.values()))

    def mirrored(self, ledger: Ledger | None) -> Any:
        """The state as it would be had the attempts changed their parts."""
        attempts, marks = self.attempts, self.marks
        self.attempts, self.marks = dict(reversed(attempts.items())), dict(reversed(marks.items()))
        try:
            return self.state(ledger)
        finally:
            self.attempts, self.marks = attempts, marks

    def _batches(self) -> Any:
        times = sorted({int(batch.created_at) for batch in self.fake.batches.values()})
        now = bool(times) and int(self.clock.now) == times[-1]  # else the next batch is younger than all
        return now, tuple(
            (times.index(int(batch.created_at)), str(batch.state) if batch.state in _KNOWN else "live",
             self._name(batch.input_file_id or ""), self.fake.unlisted_for(batch))
            for batch in self.fake.batches.values()
        )  # fmt: skip

    def _left(self) -> Any:
        """What attempts have left in the folder for others to build on."""
        if not self.folder_counts or not isinstance(self.folder, Path) or not self.folder.is_dir():
            return None
        paths = sorted(path for path in self.folder.iterdir() if LEFT.fullmatch(path.name))
        return tuple((path.name, path.read_bytes()) for path in paths)

    def _position(self, attempt: Attempt) -> Any:
        if attempt.ended:
            return type(attempt.raised), self._value(attempt.returned)
        frames = []
        for frame in attempt.frames():
            variables = (
                frame.f_locals.items()
            )  # a dict, or from 3.13 on a proxy of one without set operations
            local = {name: self._value(value) for name, value in variables if name not in OF_NO_ACCOUNT}
            frames.append((_name_of(frame), frame.f_lasti, tuple(sorted(local.items(), key=str))))
        return tuple(frames), self._age(attempt.wake), attempt.is_writing

    def _age(self, at: float) -> float:
        return max(min(self.clock.now - at, LEASE), -LEASE)

    def _name(self, text: str) -> str:
        """Attempts, batches and files by their order."""
        for number, known in enumerate((self.marks, self.fake.batches, self.fake.files)):  # type: ignore[attr-defined]
            if text in known:
                return f"{number}.{list(known).index(text)}"
        return text

    def _patience(self, record: ShardRecord) -> bool | None:
        """Whether a batch that answers 404 has done so for long enough; None where it does not."""
        return None if record.gone_at is None else self.clock.now - record.gone_at >= LEASE

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Ledger):
            return self._plain_value(value)
        # Every frame of an attempt knows the same ledger.
        if (known := self._known.get(id(value))) is None:
            known = self._known[id(value)] = self._plain_value(value)
        return known

    def _plain_value(self, value: Any) -> Any:
        match value:
            case None | bool() | int():
                return value
            case float():
                return self._age(value)
            case str():
                return _ID.sub(lambda found: self._name(found[0]), value)  # addresses and messages hold ids
            case Batch():
                return self._name(value.id), str(value.status)
            case Ledger():
                ends = value.landed_at is not None, value.stopped_at is not None
                counts = value.recovery_rounds, value.recoveries, value.max_rounds, value.unexpected
                fixed = value.revision, value.fingerprint, *ends, *counts
                return fixed, self._value(value.shards), self._value(value.replaced)
            case ShardRecord():
                names = tuple(
                    self._name(name or "") for name in (value.file_id, value.batch_id, value.attempt)
                )
                where = value.round, value.shard, value.ended is not None, self._patience(value)
                return where, value.step, value.tries, names, self._age(value.creating_at or 0.0)
            case list() | tuple() | Standing():
                return tuple(map(self._value, value))
            case Mapping():
                return tuple((self._value(name), self._value(item)) for name, item in value.items())
            case BaseException():
                return type(value).__name__
            case Gathered():
                return self._value(value.ended), self._value(value.tally)
            case Fetched():
                return self._value(value.found), self._value(value.loss)
            case Index():
                return value.answered, value.succeeded, value.torn, value.problem
            case Tally():
                return tuple(sorted(value.counts.items())), value.unexpected
            case _ if type(value).__name__ == "Submission":
                return value.unanswered
            case _:
                return type(value).__name__


def _who(step: Step) -> str:
    """Who takes a step: a late request is on its own."""
    name, kind = step
    return f"{name}, late" if kind == "deliver" else name


def is_fault(kind: str) -> bool:
    return kind in FAULTS or kind in SPOILT


def _function_name(effect: Do) -> str:
    return str(getattr(getattr(effect.function, "func", effect.function), "__name__", ""))


def _name_of(frame: FrameType) -> str:
    return frame.f_code.co_name


def _halves(function: Any) -> tuple[JobFolder, Ledger, Ledger] | None:
    """What a commit compares and writes."""
    call = getattr(function, "func", None)
    if call is None or call.__name__ != "commit":
        return None
    before, after = function.args
    return call.__self__, before, after.model_copy(update={"revision": before.revision + 1})


def _told(effect: Any) -> str:
    match effect:
        case httpx.Request():
            return f"{effect.method} {effect.url.path}"
        case Do(function):
            return getattr(function, "func", function).__qualname__
        case _:
            return str(effect)
