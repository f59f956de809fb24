"""Read what servers send, for every wire format; each leniency is for something that a server has sent."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from ..errors import ServerError
from ..models import BatchStatus, Body, Outcome, Page, Row, RowError
from .traits import Results

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..models import Batch


def unix_time(value: Any) -> int | None:
    """Return unix seconds from a time as providers send it; None for 0, empty text and nonsense."""
    if not value:
        return None
    try:
        return int(float(value))
    except (TypeError, ValueError):
        pass
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())


def repaired_json(text: bytes | str) -> Any:
    """Parse JSON with errors that some servers make; raise ValueError for text that is no JSON at all.

    NaN becomes null. Half a surrogate pair, left over when an emoji is cut in two, becomes a question mark.
    """
    value = json.loads(text, parse_constant=lambda _: None)
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


# --- answers -------------------------------------------------------------------------------------------


def id_of(answer: Mapping[str, Any], what: str, member: str = "id") -> str:
    """Return the id in an answer; raise ServerError if there is none, as in failures with status 200."""
    found = answer.get(member)
    if not isinstance(found, str | int) or found == "":
        raise ServerError(f"the provider's answer is not a {what}: {json.dumps(answer)[:200]}")
    return str(found)


def entries_of(answer: Mapping[str, Any], member: str = "data") -> list[dict[str, Any]]:
    """Return the entries of a listing; servers written in Go send null for none.

    Any other answer without entries raises ServerError: it is a failure with status 200, or another server.
    If it counted as an empty listing, a batch that was paid for would seem not to exist.
    """
    entries = answer.get(member)
    if entries is None and answer.get("object") == "list":
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ServerError(f"the provider's answer is not a listing: {json.dumps(answer)[:200]}")
    return entries


def page_of(
    batches: Sequence[Batch], *, after: str | None, limit: int | None, has_more: object, cursor: str | None
) -> Page:
    """Build one page of a listing that continues after an id or cursor.

    `has_more` is the answer's own statement; None if it makes none, and then every page that is not empty may
    be followed by another, since servers cap the page size. `cursor` leads to the next page.
    """
    full = limit is not None and len(batches) >= limit
    if batches and cursor is not None and cursor == after:
        # The same page again. Some servers repeat their last page forever; others ignore `after` and always
        # send the first page: then there may be more behind a full one.
        return Page(batches, next_cursor=None, has_more=full and has_more is not False)
    more = bool(has_more) if has_more is not None else bool(batches)
    next_cursor = cursor if more and cursor != after else None
    return Page(batches, next_cursor=next_cursor, has_more=more)


def result_file_ids(batch: Batch) -> list[str]:
    """Return the ids of the output and error files that a batch names, as OpenAI's batches do."""
    return list(dict.fromkeys(one for one in (batch.output_file_id, batch.error_file_id) if one))


def results_of_files(batch: Batch) -> Results:
    """Return whether a batch has results, if those are files that it names; some servers name them late."""
    if result_file_ids(batch):
        return Results.READY
    counts = batch.request_counts
    promised = counts is None or counts.total > 0
    return Results.NOT_YET if batch.status is BatchStatus.COMPLETED and promised else Results.NONE


# --- result lines in OpenAI's shape, or near it --------------------------------------------------------


_ERROR_OUTCOMES = {
    "batch_expired": Outcome.EXPIRED,
    "batch_cancelled": Outcome.CANCELLED,
    "batch_canceled": Outcome.CANCELLED,
}


def decode_record(record: dict[str, Any]) -> Row:
    """Decode one line of an output or error file; raise ValueError if it has no custom_id.

    It accepts `response.body` as JSON text, `error` as text, a `response` that is the body itself (Nebius),
    and failures that are responses with a null `error`, as in OpenAI's error files.
    """
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str):
        raise ValueError("no custom_id")
    response, error = record.get("response"), record.get("error")
    status, body = _response(response)
    if error:
        problem = _row_error(error)
        outcome = _ERROR_OUTCOMES.get(problem.code or f"batch_{record.get('status')}", Outcome.FAILED)
        return Row(custom_id, outcome, body, problem, status)
    if response is None:
        return failed_row(custom_id, None, "the provider sent neither a response nor an error")
    if status is not None and not 200 <= status < 400:
        return Row(custom_id, Outcome.FAILED, body, _row_error(_error_in(body)), status)
    if body is None:
        return failed_row(custom_id, None, "the response has no body", status)
    return Row(custom_id, Outcome.SUCCEEDED, body, None, status or 200)


def _response(response: Any) -> tuple[int | None, Body | None]:
    if not isinstance(response, dict):
        return None, None
    if "body" not in response and "status_code" not in response:
        return 200, Body(response)
    status = response.get("status_code")
    body = response.get("body")
    if isinstance(body, str):
        try:
            body = repaired_json(body)
        except ValueError:
            body = {"error": {"message": body}} if isinstance(status, int) and status >= 400 else None
    return status if isinstance(status, int) else None, Body(body) if isinstance(body, dict) else None


def _error_in(body: Body | None) -> Any:
    return body.get("error", body) if body is not None else "the request failed"


def _row_error(error: Any) -> RowError:
    if not isinstance(error, dict):
        return RowError(None, str(error))
    code = error.get("code") or error.get("type")
    return RowError(text(code), str(error.get("message") or json.dumps(error)))


def failed_row(custom_id: str, code: str | None, message: str, status: int | None = None) -> Row:
    """Return a failed row without a body."""
    return Row(custom_id, Outcome.FAILED, None, RowError(code, message), status)


def text(value: Any) -> str | None:
    """Return a value that should be text as text, or None."""
    return None if value is None else str(value)
