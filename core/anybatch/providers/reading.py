"""Reading what servers send, for every wire format: lenient, since every one of these was seen."""

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
    """Unix seconds from what providers send for a time; 0 and empty text mean none."""
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


def mended_json(text: bytes | str) -> Any:
    """JSON as some servers spoil it: with NaN, which becomes null, or half a surrogate pair, as of an emoji
    that was cut in two, which becomes a question mark. Raises ValueError for what is no JSON at all."""
    value = json.loads(text, parse_constant=lambda _: None)
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


# --- answers -------------------------------------------------------------------------------------------


def id_of(answer: Mapping[str, Any], what: str, member: str = "id") -> str:
    """The id in an answer. Some servers report their failures with status 200: those have none."""
    found = answer.get(member)
    if not isinstance(found, str | int) or found == "":
        raise ServerError(f"the provider's answer is no {what}: {json.dumps(answer)[:200]}")
    return str(found)


def entries_of(answer: Mapping[str, Any], member: str = "data") -> list[dict[str, Any]]:
    """The entries of a listing. Servers written in Go send null where there are none.

    Any other answer without them is no listing, but a failure with status 200, or another server: taken for
    an empty one, it would say that a batch which was paid for does not exist. It is a ServerError.
    """
    entries = answer.get(member)
    if entries is None and answer.get("object") == "list":
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ServerError(f"the provider's answer is no listing: {json.dumps(answer)[:200]}")
    return entries


def page_of(
    batches: Sequence[Batch], *, after: str | None, limit: int | None, said: object, cursor: str | None
) -> Page:
    """One page of a listing that goes on after an id or cursor.

    `said` is what the answer itself says of there being more, None where it says nothing: then there may be
    more behind every page that is not empty, since servers cap what is asked for. `cursor` leads on.
    """
    full = limit is not None and len(batches) >= limit
    if batches and cursor is not None and cursor == after:
        # The same page again: what some servers send at the end for ever. But one that does not go by `after`
        # sends its first page so, and what is behind a full one stays unknown.
        return Page(batches, next_cursor=None, has_more=full and said is not False)
    more = bool(said) if said is not None else bool(batches)
    onward = cursor if more and cursor != after else None
    return Page(batches, next_cursor=onward, has_more=more)


def result_file_ids(batch: Batch) -> list[str]:
    """The files that hold a batch's results, where it names them as OpenAI's do."""
    return list(dict.fromkeys(one for one in (batch.output_file_id, batch.error_file_id) if one))


def results_of_files(batch: Batch) -> Results:
    """Whether a batch has results, where they are files that it names: some servers do so minutes later."""
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
    """One line of an output or error file.

    Accepts `response.body` as JSON text, `error` as text, a `response` that is the body itself (Nebius), and
    failures that are responses with `error` null, as OpenAI's error files hold them.
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
            body = mended_json(body)
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
    return Row(custom_id, Outcome.FAILED, None, RowError(code, message), status)


def text(value: Any) -> str | None:
    """A value that should be text, as text."""
    return None if value is None else str(value)
