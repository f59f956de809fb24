"""Merge a batch's result files into the order of the input.

Result files come in any order, miss rows, repeat rows and hold broken lines. Merging reads each file once,
keeps in memory only the place of each row's line, and writes the rows in input order: every request exactly
once, with one outcome. Lines that belong to no request are written to a file of their own and counted.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import orjson

from ..models import BatchStatus, Outcome, Row, RowError
from ..providers.reading import repaired_json
from .requests import iter_lines
from .results import NEVER_RUN, decode_line, has_openai_shape, landed_line, writable
from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..providers.base import Provider

# A line that is in OpenAI's shape already lands as it is, behind one more member.
_OPENING = {outcome: b'{"outcome":"%s",' % outcome.encode() for outcome in Outcome}


class _Place(NamedTuple):
    """The place of a row's line, the row's outcome, and whether the line can land as it is (`kept`)."""

    file: int
    offset: int
    size: int
    outcome: Outcome
    kept: bool


class Index:
    """The places of the lines of one batch's rows, found in one pass over its files: a `Measured`.

    Without `custom_ids`, every id in the files is a row's, in the order of the files, and `rows` is how many
    there should be, if the provider reports that.

    Attributes:
        places: The place of each row's line, by custom_id.
        stray: The lines that do not land: file, offset and size in bytes.
        tally: The tokens of the rows, and the number of unexpected lines.
        answered: The number of rows that have a line.
        ran: Those of them whose line does not say expired or cancelled.
        succeeded: Those of them that were paid for.
        torn: The number of rows whose line breaks off at the end of a file.
        unclear: The number of broken lines that cannot be attributed to a row.
        breaks_off: Whether any line breaks off at the end of a file.
        problem: What is wrong with a file that is no result file.
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
        self._strayed: set[str] = set()  # rows whose line is both in `places` and in `stray`
        self._torn: set[str] = set()  # rows whose line breaks off at the end of its file
        self._unclear = 0
        self.places: dict[str, _Place] = {}
        self.stray: list[tuple[int, int, int]] = []
        self.tally = Tally()
        self.breaks_off = False
        self.problem: str | None = None
        alien = []  # the first line of each file that holds no result line
        for number, path in enumerate(paths):
            first, fits = b"", False
            with path.open("rb", buffering=1 << 20) as file:
                for offset, raw in iter_lines(file):
                    if not raw.isspace():
                        first = first or raw
                        fits |= self._take(number, offset, raw)
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
        """Set `problem` if rows are missing since a file is something else, such as a login page."""
        for first in alien:
            if not first.lstrip().startswith(b"{") or (not self.places and _is_json(first)):
                # Show the first character only: what follows may be a prompt or an answer.
                self.problem = (
                    "what was downloaded is not a result file; it begins with "
                    f"{first.lstrip()[:1].decode(errors='replace')!r}"
                )

    def _is_expected(self, custom_id: str) -> bool:
        if self._takes_all and custom_id:
            self._expected[custom_id] = None
        return custom_id in self._expected

    def _take(self, number: int, offset: int, raw: bytes) -> bool:
        """Record one line; return whether it is any row's result, or the remains of an expected row's."""
        if self._decodes_as_openai and (found := _plain_success(raw)) is not None:
            custom_id, body = found
            if self._is_expected(custom_id) and custom_id not in self.places:
                self.places[custom_id] = _Place(number, offset, len(raw), Outcome.SUCCEEDED, True)
                self.tally.add_body(body)
                return True
        return self._take_any(number, offset, raw)

    def _take_any(self, number: int, offset: int, raw: bytes) -> bool:
        """`_take` for lines that are not a plain success."""
        row, record = decode_line(raw, self._provider, self._endpoint)
        custom_id = self._original.get(row.custom_id, row.custom_id)
        known = self.places.get(custom_id)
        place = _Place(number, offset, len(raw), row.outcome, False)
        undecodable = record is None
        if known is None and self._is_expected(custom_id) and not undecodable:
            better = True  # the common case: the first line of an expected row
        else:
            better = self._resolve(custom_id, row, place, known, undecodable)
        if better:
            kept = record is not None and has_openai_shape(record, custom_id, row.outcome)
            self.places[custom_id] = place._replace(kept=kept)
            if row.outcome is Outcome.SUCCEEDED and row.result is not None:
                self.tally.add_body(row.result)
            if undecodable and not raw.endswith(b"\n"):
                self._torn.add(custom_id)
        elif undecodable and custom_id not in self._expected:  # it may break off before its id
            self.breaks_off |= not raw.endswith(b"\n")
        return not undecodable or custom_id in self._expected

    def land(self, custom_id: str, raw: bytes) -> tuple[Outcome, bytes, bool]:
        """Convert a line that cannot land as it is.

        Returns the row's outcome, its landed line, and whether that line holds all of the original's content.
        """
        row = replace(decode_line(raw, self._provider, self._endpoint)[0], custom_id=custom_id)
        written, line = writable(row)
        return written.outcome, line, written is row

    def _resolve(
        self, custom_id: str, row: Row, place: _Place, known: _Place | None, undecodable: bool
    ) -> bool:
        """Decide whether an unexpected, repeated or broken line becomes its row's line.

        A line that does not, and every broken line, goes to the stray lines.
        """
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
        repaired_json(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _plain_success(raw: bytes) -> tuple[str, dict[str, Any]] | None:
    """Return the custom_id and body of a success in exactly OpenAI's shape; None for any other line.

    Nearly all lines are of this kind. `decode_line` and `has_openai_shape` find the same in twice the time.
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

    If a row has two lines, a success wins, otherwise the first. A row without a line is `missing` for the
    reason `lost`, if there is one; otherwise it is expired or cancelled like its batch, or else missing.
    Lines of no request, losing lines and undecodable lines go to `stray`. A row that cannot be written as
    JSON is failed, and its original line goes to `stray`.
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
    BatchStatus.EXPIRED: (Outcome.EXPIRED, "batch_expired", "The batch expired before this request ran."),
    BatchStatus.CANCELLED: (
        Outcome.CANCELLED,
        "batch_cancelled",
        "The batch was cancelled before this request ran.",
    ),
}


def unanswered(custom_id: str, status: BatchStatus, lost: RowError | None = None) -> Row:
    """Return the row of a request without a result line; `lost` is the reason if there should be one."""
    if lost is not None:
        return Row(custom_id, Outcome.MISSING, None, lost)
    missing = (Outcome.MISSING, "missing", "The provider's result files do not mention this request.")
    outcome, code, message = _FATES.get(status, missing)
    return Row(custom_id, outcome, None, RowError(code, message))
