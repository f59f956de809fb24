"""OpenAI's wire format: upload a file, create a batch, poll it, download its output and error files.

Spoken by OpenAI itself and, with the deviations that a `Dialect` holds as data, by many others.
Sources: OpenAI API reference and Batch guide; each provider's own documentation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from ..flow import Flow, ask, send, sleep
from ..models import (
    Batch,
    BatchErrors,
    BatchProblem,
    BatchStatus,
    Body,
    Outcome,
    Page,
    RequestCounts,
    Row,
    RowError,
)
from .account import Account
from .base import (
    Limits,
    NewBatch,
    Provider,
    answers,
    entries_of,
    failed_row,
    get,
    id_of,
    json_of,
    page_of,
    post,
)
from .reading import mended_json, unix_time

if TYPE_CHECKING:
    from .content import Content

_STATUSES = {status.value: status for status in BatchStatus if status is not BatchStatus.UNKNOWN} | {
    "in_queue": BatchStatus.VALIDATING,  # SiliconFlow
    "queued": BatchStatus.VALIDATING,  # Cerebras
    "progress": BatchStatus.IN_PROGRESS,  # Novita
    "created": BatchStatus.VALIDATING,  # AIBrix, as are the next two
    "scheduling": BatchStatus.VALIDATING,
    "finalized": BatchStatus.FINALIZING,
    "done": BatchStatus.COMPLETED,  # Nebius
    "canceling": BatchStatus.CANCELLING,
    "canceled": BatchStatus.CANCELLED,
}
_TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip

_FILE_READY_TIMEOUT = 600


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one provider deviates from OpenAI; the defaults are OpenAI's own ways."""

    name: str
    api_base: str | None
    key_env: tuple[str, ...]
    base_env: tuple[str, ...] = ()
    endpoints: tuple[str, ...] | None = None
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    needs_key: bool = True
    limits: Limits = field(default_factory=Limits)
    single_model: bool = False
    bare_lines: bool = False  # lines are {custom_id, body}
    metadata: bool = True
    pages_by_cursor: bool = False  # `cursor` and `paging.next_cursor` in place of `after` and `has_more`
    cancel_by_delete: bool = False
    file_becomes_ready: bool = False  # an uploaded file has to be `processed` before the create
    expiry_fields: str = "expires_after[{}]"
    idempotency_header: str | None = None
    create_options: tuple[str, ...] = ()
    list_options: tuple[str, ...] = ()
    not_options: tuple[tuple[str, str], ...] = ()  # (what looks like an option, what to do instead)
    env_headers: tuple[tuple[str, str], ...] = ()  # (environment variable, header it is sent as)
    poll_seconds: tuple[float, float] = (15.0, 300.0)


class OpenAIFormat(Provider):
    """A provider that speaks OpenAI's batch API."""

    decodes_as_openai = True

    def __init__(self, account: Account, dialect: Dialect) -> None:
        super().__init__(account)
        self.dialect = dialect
        self.name = dialect.name  # type: ignore[misc]  # fixed per row of data, not per class
        self.limits = dialect.limits
        self.endpoints = frozenset(dialect.endpoints) if dialect.endpoints else None
        self.single_model = dialect.single_model
        self.verbatim = not dialect.bare_lines
        self.idempotent_create = dialect.idempotency_header is not None
        self.create_options = frozenset(dialect.create_options)
        self.list_options = frozenset(dialect.list_options)
        self.not_options = dict(dialect.not_options)
        self.poll_seconds = dialect.poll_seconds
        if not dialect.metadata:
            self.metadata_limits = None

    def auth_headers(self) -> dict[str, str]:
        headers = {
            header: os.environ[name] for name, header in self.dialect.env_headers if os.environ.get(name)
        }
        if key := self.account.api_key:
            headers[self.dialect.key_header] = self.dialect.key_prefix + key.get_secret_value()
        return headers

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        return {"custom_id": line["custom_id"], "body": line["body"]}

    # --- the calls ---------------------------------------------------------------------------------

    def upload(self, content: Content, options: Mapping[str, Any]) -> Flow[str | None]:
        fields = {"purpose": "batch"}
        for name, value in (options.get("input_expires_after") or {}).items():
            fields[self.dialect.expiry_fields.format(name)] = str(value)
        with content.open() as file:
            # The name matters: OpenAI refuses a batch file that does not end in .jsonl.
            files = {"file": ("requests.jsonl", file, "application/jsonl")}
            request = httpx.Request("POST", self.url("/files"), data=fields, files=files)  # type: ignore[arg-type]
            answer = yield from ask(request, json_of, large=True)
        uploaded = answer["data"] if isinstance(answer.get("data"), dict) else answer  # SiliconFlow wraps it
        file_id = id_of(uploaded, "file")
        if self.dialect.file_becomes_ready:
            yield from self._wait_for_file(file_id)
        return file_id

    def _wait_for_file(self, file_id: str) -> Flow[None]:
        for _ in range(_FILE_READY_TIMEOUT // 2):
            answer = yield from get(self.url("/files/{}", file_id))
            if answer.get("status") in (None, "processed", "error"):  # an error shows in the batch itself
                return
            yield from sleep(2)

    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        body: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": new.endpoint,
            "completion_window": new.completion_window,
        }
        if new.metadata and self.metadata_limits is not None:
            body["metadata"] = dict(new.metadata)
        body |= {name: value for name, value in new.options.items() if name != "input_expires_after"}
        header = self.dialect.idempotency_header
        headers = {header: new.idempotency_key} if header and new.idempotency_key else {}
        raw = yield from post(self.url("/batches"), body, repeatable=bool(headers), headers=headers)
        return self.batch(raw)

    def find(self, file_id: str | None, metadata: Mapping[str, str], *, since: float) -> Flow[list[Batch]]:
        return (yield from self.search(lambda batch: made_from(batch, file_id, metadata), since=since))

    def retrieve(self, batch_id: str) -> Flow[Batch]:
        return self.batch((yield from get(self.url("/batches/{}", batch_id))))

    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        if not self.dialect.cancel_by_delete:
            url = self.url("/batches/{}/cancel", batch_id)
            return self.batch((yield from post(url, repeat_conflict=repeat_conflict)))
        request = httpx.Request("DELETE", self.url("/batches/{}", batch_id))
        yield from send(request, repeat_conflict=repeat_conflict)
        return (yield from self.retrieve(batch_id))

    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Flow[Page]:
        self.check_options(options, self.list_options, "list")
        by_cursor = self.dialect.pages_by_cursor
        query = {"limit": limit, "cursor" if by_cursor else "after": after, **options}
        answer = yield from get(self.url("/batches"), query)
        batches = [self.batch(raw) for raw in entries_of(answer)]
        if by_cursor:
            paging = answer.get("paging")
            cursor = (paging.get("next_cursor") or None) if isinstance(paging, dict) else None
            said = cursor is not None if isinstance(paging, dict) else None
        else:
            cursor = answer.get("last_id") or (batches[-1].id if batches else None)
            said = answer.get("has_more")
        return page_of(batches, after=after, limit=limit, said=said, cursor=cursor)

    def has_file(self, file_id: str) -> Flow[bool]:
        return (yield from answers(self.url("/files/{}", file_id)))

    def result_requests(self, batch: Batch) -> list[httpx.Request]:
        # Both files, on every terminal status: `completed` is not success, and an expired or cancelled
        # batch has rows that were paid for.
        ids = dict.fromkeys(file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id)
        return [httpx.Request("GET", self.url("/files/{}/content", file_id)) for file_id in ids]

    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        return decode_record(record)

    def batch(self, raw: dict[str, Any]) -> Batch:
        return parse_batch(raw, self.name)


def made_from(batch: Batch, file_id: str | None, metadata: Mapping[str, str]) -> bool:
    """Whether a batch was created from this file, or carries all of this metadata.

    The file id is the exact key: every upload has its own. Metadata serves where there is no file.
    """
    if file_id is not None and batch.input_file_id is not None:
        return batch.input_file_id == file_id
    theirs = batch.metadata or {}
    return bool(metadata) and all(theirs.get(key) == value for key, value in metadata.items())


# --- reading what servers send: lenient, since every one of these was seen -----------------------------


def parse_batch(raw: dict[str, Any], provider: str) -> Batch:
    """A batch object in OpenAI's shape or near it.

    Accepts statuses in any case, times as unix seconds, numeric text or ISO 8601, `errors` as an object, a
    list or a text, counts missing, null or flat, and empty text for "no file".
    """
    raw_status = str(raw.get("status") or "")
    fields = {name: raw.get(name) for name in ("endpoint", "model", "completion_window")}
    files = {name: raw.get(name) or None for name in ("input_file_id", "output_file_id", "error_file_id")}
    texts: dict[str, Any] = {
        name: None if value is None else str(value) for name, value in (fields | files).items()
    }
    times: dict[str, Any] = {name: unix_time(raw.get(name)) for name in _TIMES}
    return Batch(
        id=id_of(raw, "batch"),
        **texts,
        **times,
        errors=_errors(raw.get("errors")),
        status=_STATUSES.get(raw_status.lower(), BatchStatus.UNKNOWN),
        request_counts=_counts(raw),
        usage=raw["usage"] if isinstance(raw.get("usage"), dict) else None,
        metadata=raw["metadata"] if isinstance(raw.get("metadata"), dict) else None,
        provider=provider,
        raw_status=raw_status,
        raw=raw,
    )


def _errors(value: Any) -> BatchErrors | None:
    items = value.get("data") if isinstance(value, dict) else value
    if not items:
        return None
    if not isinstance(items, list):
        items = [items]
    return BatchErrors(
        data=tuple(
            BatchProblem(
                code=_text(item.get("code")),
                message=_text(item.get("message")),
                param=_text(item.get("param")),
                line=item["line"] if isinstance(item.get("line"), int) else None,
            )
            if isinstance(item, dict)
            else BatchProblem(message=str(item))
            for item in items
        )
    )


def _counts(raw: dict[str, Any]) -> RequestCounts | None:
    counts = raw.get("request_counts") or {
        name: raw[name] for name in RequestCounts.model_fields if name in raw
    }
    if not isinstance(counts, dict) or not any(isinstance(value, int) for value in counts.values()):
        return None
    return RequestCounts(**{name: counts.get(name) or 0 for name in RequestCounts.model_fields})


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


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
    return RowError(_text(code), str(error.get("message") or json.dumps(error)))
