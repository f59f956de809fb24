"""A batch's result files merged into the order of the input.

Result files come in any order, miss rows, repeat rows and hold broken lines. Merging reads each file once,
keeps only where each row's line lies, and writes the rows in input order: every request exactly once, with
one outcome. What belongs to no request is written elsewhere and counted.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import orjson

from ..models import BatchStatus, Outcome, Row, RowError
from ..providers.reading import mended_json
from .requests import iter_lines
from .results import NEVER_RUN, decode_line, has_openai_shape, landed_line, writable
from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..providers.base import Provider

# A landed line is a provider's own behind one more member, wherever that is in OpenAI's shape already.
_OPENING = {outcome: b'{"outcome":"%s",' % outcome.encode() for outcome in Outcome}


class _Place(NamedTuple):
    """Where the line of a row lies, what became of the row, and whether the line can land as it is."""

    file: int
    offset: int
    size: int
    outcome: Outcome
    kept: bool


class Index:
    """Where the lines of one batch's rows lie, made in one pass over its files.

    `answered` counts the rows that have a line, `ran` those among them whose line does not say expired or
    cancelled, `succeeded` those that were paid for, `torn` the rows whose line breaks off at the end of a
    file, `unclear` the broken lines that are no row's; `breaks_off` says whether any line does, `problem`
    what a file is that is no result file. Without `custom_ids`, every id that a line names is a row's, in the
    order of the files, and `rows` is how many there should be, if the provider tells.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        custom_ids: Sequence[str] | None,
        provider: Provider,
        endpoint: str | None,
        *,
        rows: int = 0,
    ) -> None:
        self.paths = paths
        self._takes_all = custom_ids is None
        custom_ids = custom_ids or ()
        self._provider, self._endpoint = provider, endpoint
        self._decodes_as_openai = provider.codec.decodes_as_openai
        self._expected = dict.fromkeys(custom_ids)
        self._original = provider.codec.original_ids(custom_ids)
        self._strayed: set[str] = set()  # whose line is both in `places` and among the strays
        self._torn: set[str] = set()  # whose line is the end of a file that was cut in the middle of it
        self._unclear = 0
        self.places: dict[str, _Place] = {}
        self.stray: list[tuple[int, int, int]] = []  # file, offset, size
        self.tally = Tally()
        self.breaks_off = False
        self.problem: str | None = None
        alien = []  # the first line of each file of which no line is a result
        for number, path in enumerate(paths):
            first, fits = b"", False
            with path.open("rb", buffering=1 << 20) as file:
                for offset, raw in iter_lines(file):
                    if not raw.isspace():
                        first = first or raw
                        fits |= self._note(number, offset, raw)
            if first and not fits:
                alien.append(first)
        self.answered = len(self.places) - len(self._torn)
        self.ran = sum(
            place.outcome not in NEVER_RUN or custom_id in self._strayed
            for custom_id, place in self.places.items()
            if custom_id not in self._torn
        )
        self.succeeded = sum(
            place.outcome is Outcome.SUCCEEDED or custom_id in self._strayed
            for custom_id, place in self.places.items()
            if custom_id not in self._torn
        )
        self.torn = len(self._torn)
        self.unclear = self._unclear
        self.breaks_off |= bool(self._torn)
        fewest = max(rows, 1) if self._takes_all else len(self._expected)
        if len(self.places) < fewest:
            self._refuse(alien)

    def _refuse(self, alien: Sequence[bytes]) -> None:
        """Note where rows are missing since a file is something else, such as the page of a log-in."""
        for first in alien:
            if not first.lstrip().startswith(b"{") or (not self.places and _is_json(first)):
                # Its first character only: what follows may be somebody's prompt or answer.
                self.problem = (
                    "what was downloaded as a result file is none; it begins with "
                    f"{first.lstrip()[:1].decode(errors='replace')!r}"
                )

    def _is_expected(self, custom_id: str) -> bool:
        if self._takes_all and custom_id:
            self._expected[custom_id] = None
        return custom_id in self._expected

    def _note(self, number: int, offset: int, raw: bytes) -> bool:
        """Take up one line; whether it is a result, of any row, or the remains of one that was asked for."""
        if self._decodes_as_openai and (found := _plain_success(raw)) is not None:
            custom_id, body = found
            if self._is_expected(custom_id) and custom_id not in self.places:
                self.places[custom_id] = _Place(number, offset, len(raw), Outcome.SUCCEEDED, True)
                self.tally.add_body(body)
                return True
        return self._note_any(number, offset, raw)

    def _note_any(self, number: int, offset: int, raw: bytes) -> bool:
        row, record = decode_line(raw, self._provider, self._endpoint)
        custom_id = self._original.get(row.custom_id, row.custom_id)
        known = self.places.get(custom_id)
        place = _Place(number, offset, len(raw), row.outcome, False)
        undecodable = record is None
        if known is None and self._is_expected(custom_id) and not undecodable:
            better = True  # the common case: a line that was asked for, and the first for its row
        else:
            better = self._weigh(custom_id, row, place, known, undecodable)
        if better:
            kept = record is not None and has_openai_shape(record, custom_id, row.outcome)
            self.places[custom_id] = place._replace(kept=kept)
            if row.outcome is Outcome.SUCCEEDED and row.result is not None:
                self.tally.add_body(row.result)
            if undecodable and not raw.endswith(b"\n"):
                self._torn.add(custom_id)
        elif undecodable and custom_id not in self._expected:  # perhaps it breaks off before its id
            self.breaks_off |= not raw.endswith(b"\n")
        return not undecodable or custom_id in self._expected

    def land(self, custom_id: str, raw: bytes) -> tuple[Outcome, bytes, bool]:
        """What lands of a line that cannot land as it is: outcome, line, and whether that says all of it."""
        row = replace(decode_line(raw, self._provider, self._endpoint)[0], custom_id=custom_id)
        written, line = writable(row)
        return written.outcome, line, written is row

    def _weigh(
        self, custom_id: str, row: Row, place: _Place, known: _Place | None, undecodable: bool
    ) -> bool:
        """Whether a line that is strange in some way is its row's; what is not, or is broken, strays."""
        expected = custom_id in self._expected
        better = known is None or (row.outcome is Outcome.SUCCEEDED is not known.outcome)
        if undecodable or not expected or not better:
            self.stray.append(place[:3])
        if known is not None and better and custom_id not in self._strayed:
            self.stray.append(known[:3])
        if undecodable:
            self._strayed.add(custom_id)
            self._unclear += not expected
        elif better:
            self._strayed.discard(custom_id)
            self._torn.discard(custom_id)
        if not expected or known is not None:
            self.tally.unexpected += 1
        return expected and better


def _is_json(raw: bytes) -> bool:
    try:
        mended_json(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _plain_success(raw: bytes) -> tuple[str, dict[str, Any]] | None:
    """custom_id and body of the line that nearly all are: a success in OpenAI's shape to the letter.

    The same as `decode_line` and `has_openai_shape` would find, at half the price; None for all others.
    """
    try:
        record = orjson.loads(raw)
        custom_id, response = record["custom_id"], record["response"]
        body, status = response["body"], response["status_code"]
    except (ValueError, LookupError, TypeError):
        return None
    if (
        type(status) is int
        and 200 <= status < 400
        and type(body) is dict
        and type(custom_id) is str
        and record.get("error") is None
        and "outcome" not in record
    ):
        return custom_id, body
    return None


def merge(
    index: Index,
    custom_ids: Sequence[str],
    status: BatchStatus,
    out: BinaryIO,
    stray: BinaryIO,
    tally: Tally,
    *,
    lost: RowError | None = None,
) -> None:
    """Write one batch's rows to `out` in the order of `custom_ids`, each exactly once.

    A row that no line speaks of is `missing` for the reason `lost`, where there is one; else it shares the
    fate of its batch: expired, cancelled, else missing. Of two lines for one row a success wins, else the
    first. Lines that no request asked for go to `stray`, as do the losers and the undecodable ones. A row
    that cannot be written down is failed, and its line strays.
    """
    tally.add(index.tally)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in index.paths]

        def read(number: int, offset: int, size: int) -> bytes:
            return os.pread(files[number].fileno(), size, offset).strip()

        for one in index.stray:
            stray.write(read(*one) + b"\n")
        for custom_id in custom_ids:
            place = index.places.get(custom_id)
            if place is None:
                row = unanswered(custom_id, status, lost)
                tally.counts[row.outcome] += 1
                out.write(landed_line(row))
                continue
            raw = read(*place[:3])
            if place.kept:
                tally.counts[place.outcome] += 1
                out.writelines((_OPENING[place.outcome], memoryview(raw)[1:], b"\n"))
                continue
            outcome, line, is_whole = index.land(custom_id, raw)
            tally.counts[outcome] += 1
            out.write(line)
            if not is_whole:
                stray.write(raw + b"\n")


_FATES = {
    BatchStatus.EXPIRED: (Outcome.EXPIRED, "batch_expired", "The batch expired before it came to this."),
    BatchStatus.CANCELLED: (Outcome.CANCELLED, "batch_cancelled", "The batch was cancelled before this."),
}


def unanswered(custom_id: str, status: BatchStatus, lost: RowError | None = None) -> Row:
    """The row of a request that the result files do not mention; `lost` is why, where they should."""
    if lost is not None:
        return Row(custom_id, Outcome.MISSING, None, lost)
    missing = (Outcome.MISSING, "missing", "The provider's result files do not mention this request.")
    outcome, code, message = _FATES.get(status, missing)
    return Row(custom_id, outcome, None, RowError(code, message))
