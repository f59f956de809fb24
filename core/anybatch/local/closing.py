"""The end of a batch: its output file and error file are written, once."""

import json
from collections.abc import Callable
from hashlib import blake2b
from typing import BinaryIO
from zlib import crc32

from . import faults, standin
from .machine import Json, Record, Stage, finished_rows, stages
from .store import Store, add_file
from .validation import Line, read_lines

SHUFFLE = 64  # shuffle results in groups of so many lines: OpenAI does not keep the order either


class Tally:
    """The two result files while they are written, and the counts of their rows."""

    def __init__(self, output: BinaryIO, errors: BinaryIO) -> None:
        self.output, self.errors = output, errors
        self.completed = self.failed = self.read = self.written = 0
        self._held: list[tuple[int, BinaryIO, bytes]] = []

    def response(self, custom_id: str, identity: str, status: int, body: Json) -> None:
        response = {"status_code": status, "request_id": f"req_{identity}", "body": body}
        try:
            line = result_line(custom_id, identity, response=response)
        except (ValueError, RecursionError) as error:
            # Recording it would make every later attempt to close the batch fail.
            self.response(custom_id, identity, *_unwritable(error))
            return
        if status < 400:
            self.completed += 1
            read, written = standin.usage_of(body)
            self.read, self.written = self.read + read, self.written + written
        else:
            self.failed += 1
        self.add(line, self.output if status < 400 else self.errors)

    def error(self, custom_id: str, identity: str, code: str) -> None:
        """Add the line of a row without an answer."""
        error = {"code": code, "message": _MESSAGES.get(code, code)}
        self.add(result_line(custom_id, identity, error=error), self.errors)

    def add(self, line: bytes, file: BinaryIO) -> None:
        self._held.append((crc32(line), file, line))
        if len(self._held) == SHUFFLE:
            self.flush()

    def flush(self) -> None:
        for _, file, line in sorted(self._held, key=lambda held: held[0]):
            file.write(line)
        self._held.clear()


_MESSAGES = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}


_as_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_as_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _unwritable(error: Exception) -> tuple[int, Json]:
    message = f"The answer cannot be written as JSON ({error})."
    return 500, standin.error_body(message, "server_error", "unwritable_answer")


def identify(batch_id: str, custom_id: str) -> str:
    """Return the text that the ids of a row's answer are made from."""
    return blake2b(f"{batch_id} {custom_id}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def result_line(
    custom_id: str, identity: str, *, response: Json | None = None, error: Json | None = None
) -> bytes:
    """Return one line of a result file, in OpenAI's shape.

    Raises ValueError or RecursionError if the values cannot be written as JSON.
    """
    line = {"id": f"batch_req_{identity}", "custom_id": custom_id, "response": response, "error": error}
    try:
        return _as_text(line).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, UTF-8 cannot encode it
        return _as_ascii(line).encode() + b"\n"


def finalise_standin(store: Store, batch: Record) -> None:
    """Let the stand-in answer the finished rows, and close the batch."""
    past = stages(batch)
    last = past[-1]
    plan = store.one("SELECT outcomes FROM plans WHERE batch_id = ?", batch.id)
    if plan is None and batch.rows:  # another closer was faster
        return
    outcomes: bytes = plan["outcomes"] if plan else b""
    worked = finished_rows(batch, last.at)
    unfinished = "batch_cancelled" if last.status == "cancelled" else "batch_expired"

    def work(tally: Tally) -> None:
        if batch.invalid:
            return
        with store.blob(batch.input_file_id).open("rb") as lines:
            for index, line in enumerate(read_lines(lines)):
                custom_id = line.request["custom_id"]
                identity = identify(batch.id, custom_id)
                if index >= worked or outcomes[index] == faults.EXPIRE:
                    tally.error(custom_id, identity, unfinished)
                elif outcomes[index] != faults.MISS:
                    answer = _answer(batch, line, identity, outcomes[index])
                    tally.response(custom_id, identity, *answer)

    close_batch(store, batch, past, work)


def _answer(batch: Record, line: Line, identity: str, outcome: int) -> tuple[int, Json]:
    """Return the HTTP status and body of the stand-in's answer."""
    if line.unfit:
        return standin.unsendable(line.unfit)
    body: Json = line.request["body"]
    wrong = standin.check(batch.endpoint, body)
    if wrong:
        return 400, standin.error_body(wrong[1], "invalid_request_error", "invalid_value", wrong[0])
    if outcome == faults.FAIL:
        return standin.failure(line.request["custom_id"])
    try:
        return 200, standin.answer(batch.endpoint, body, identity=identity, created=int(batch.created))
    except Exception as error:  # an unforeseen body fails its own row, never the batch
        message = f"The stand-in model cannot read this request ({type(error).__name__}: {error})."
        return 400, standin.error_body(message, "invalid_request_error", "invalid_value")


def finalise_upstream(store: Store, batch: Record, now: float) -> None:
    """Write the recorded answers of a real model to the result files, and close the batch."""
    past = stages(batch)
    answered = store.one("SELECT count(*) AS rows FROM results WHERE batch_id = ?", batch.id)
    if batch.invalid:
        last = "failed"
    elif batch.cancel_at is not None:
        last = "cancelled"
    else:
        last = "completed" if answered and answered["rows"] == batch.rows else "expired"
    unfinished = "batch_cancelled" if last == "cancelled" else "batch_expired"

    def work(tally: Tally) -> None:
        if batch.invalid:
            return
        with store.blob(batch.input_file_id).open("rb") as lines:
            for number, request, _ in read_lines(lines):
                custom_id, identity = request["custom_id"], identify(batch.id, request["custom_id"])
                sql = "SELECT record FROM results WHERE batch_id = ? AND line = ?"
                row = store.one(sql, batch.id, number)
                if row is None:
                    tally.error(custom_id, identity, unfinished)
                else:
                    tally.response(custom_id, identity, *_recorded(row["record"]))

    close_batch(store, batch, [*past, Stage(max(now, past[-1].at), last)], work)


def _recorded(record: str) -> tuple[int, Json]:
    """Return the HTTP status and body of an answer in the database."""
    try:
        status, body = json.loads(record)
    except (ValueError, RecursionError) as error:  # recorded by an earlier release, which set no limits
        return _unwritable(error)
    return status, body


def close_batch(store: Store, batch: Record, past: list[Stage], work: Callable[[Tally], None]) -> None:
    """Write the result files with `work(tally)`, then record them and the end in one transaction.

    A process that is killed before the commit leaves only bytes that no record names, and the next request
    starts over. A second closer, if there ever is one, finds the batch closed, and its bytes are removed.
    """
    with store.new_blob() as (output_id, output), store.new_blob() as (error_id, errors):
        tally = Tally(output, errors)
        work(tally)
        tally.flush()
        sizes = {output_id: output.tell(), error_id: errors.tell()}
    kept = [file_id for file_id, size in sizes.items() if size]
    final = {
        "output_file_id": output_id if output_id in kept else None,
        "error_file_id": error_id if error_id in kept else None,
        "request_counts": {"total": batch.rows or 0, "completed": tally.completed, "failed": tally.failed},
        "usage": standin.token_usage(tally.read, tally.written),
        "events": past,
    }
    with store.write() as connection:
        update = "UPDATE batches SET final = ? WHERE id = ? AND final IS NULL"
        if connection.execute(update, (json.dumps(final), batch.id)).rowcount == 1:
            for file_id, kind in ((output_id, "output"), (error_id, "error")):
                if file_id in kept:
                    add_file(
                        connection,
                        file_id,
                        created=past[-1].at,
                        size=sizes[file_id],
                        filename=f"{batch.id}_{kind}.jsonl",
                        purpose="batch_output",
                        lifetime=batch.output_lifetime,
                    )
            connection.execute("DELETE FROM plans WHERE batch_id = ?", (batch.id,))
            connection.execute("DELETE FROM results WHERE batch_id = ?", (batch.id,))
        else:
            kept = []
    store.discard(sizes.keys() - kept)
    discard_deleted(store, batch.input_file_id)


def discard_deleted(store: Store, file_id: str) -> None:
    """Remove the bytes of a deleted file, unless an open batch still reads them."""
    gone = store.one(
        "SELECT 1 FROM files WHERE id = :id AND deleted AND NOT EXISTS"
        " (SELECT 1 FROM batches WHERE input_file_id = :id AND final IS NULL)",
        id=file_id,
    )
    if gone:
        store.discard([file_id])
