"""OpenAI's wire format: upload a file, create a batch, poll it, download its output and error files.

Spoken by OpenAI itself and, with the deviations that a `Dialect` holds as data, by many others.
Sources: OpenAI API reference and Batch guide; each provider's own documentation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from ..flow import Flow, ask, send
from ..models import Batch, BatchErrors, BatchProblem, BatchStatus, Page, RequestCounts
from .account import Account
from .base import NewBatch, Provider
from .calls import answers, delete, get, json_of, post, wait_until
from .codec import BareCodec, OpenAICodec
from .reading import entries_of, id_of, page_of, result_file_ids, results_of_files, text, unix_time
from .saving import download_files

if TYPE_CHECKING:
    from pathlib import Path

    from .traits import Results, Traits

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


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one provider deviates from OpenAI, beside its traits; the defaults are OpenAI's own ways."""

    traits: Traits
    bare_lines: bool = False  # lines are {custom_id, body}
    pages_by_cursor: bool = False  # `cursor` and `paging.next_cursor` in place of `after` and `has_more`
    cancel_by_delete: bool = False
    file_becomes_ready: bool = False  # an uploaded file has to be `processed` before the create
    expiry_fields: str = "expires_after[{}]"
    idempotency_header: str | None = None
    env_headers: tuple[tuple[str, str], ...] = ()  # (environment variable, header it is sent as)


class OpenAIFormat(Provider):
    """A provider that speaks OpenAI's batch API."""

    def __init__(self, account: Account, dialect: Dialect) -> None:
        super().__init__(account)
        self.dialect = dialect
        self.traits = dialect.traits
        self.codec = BareCodec() if dialect.bare_lines else OpenAICodec()

    def auth_headers(self) -> dict[str, str]:
        named = {
            header: os.environ[name] for name, header in self.dialect.env_headers if os.environ.get(name)
        }
        return named | super().auth_headers()

    def upload(self, new: NewBatch) -> Flow[str | None]:
        fields = {"purpose": "batch"}
        for name, value in (new.options.get("input_expires_after") or {}).items():
            fields[self.dialect.expiry_fields.format(name)] = str(value)
        with new.content.open() as file:
            # The name matters: OpenAI refuses a batch file that does not end in .jsonl.
            files = {"file": ("requests.jsonl", file, "application/jsonl")}
            request = httpx.Request("POST", self.url("/files"), data=fields, files=files)  # type: ignore[arg-type]
            answer = yield from ask(request, json_of, large=True)
        uploaded = answer["data"] if isinstance(answer.get("data"), dict) else answer  # SiliconFlow wraps it
        file_id = id_of(uploaded, "file")
        if self.dialect.file_becomes_ready:
            # An error shows in the batch itself.
            yield from wait_until(
                lambda file: file.get("status") in (None, "processed", "error"),
                lambda: get(self.url("/files/{}", file_id)),
            )
        return file_id

    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        body: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": new.endpoint,
            "completion_window": new.completion_window,
        }
        if new.metadata and self.traits.metadata is not None:
            body["metadata"] = dict(new.metadata)
        body |= {name: value for name, value in new.options.items() if name != "input_expires_after"}
        header = self.dialect.idempotency_header
        headers = {header: new.key} if header else {}
        raw = yield from post(self.url("/batches"), body, repeatable=bool(headers), headers=headers)
        return self.batch(raw)

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
        self.check_options(options, self.traits.list_options, "list")
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

    def results(self, batch: Batch) -> Results:
        return results_of_files(batch)

    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        # Both files, on every terminal status: `completed` is not success, and an expired or cancelled
        # batch has rows that were paid for.
        urls = [self.url("/files/{}/content", file_id) for file_id in result_file_ids(batch)]
        return (yield from download_files(folder, batch.id, urls))

    def has_file(self, file_id: str) -> Flow[bool]:
        return (yield from answers(self.url("/files/{}", file_id)))

    def delete_files(self, batch: Batch, *, only_input: bool = False) -> Flow[None]:
        ids = [batch.input_file_id, *(() if only_input else result_file_ids(batch))]
        for file_id in filter(None, ids):
            yield from delete(self.url("/files/{}", file_id))

    def batch(self, raw: dict[str, Any]) -> Batch:
        return parse_batch(raw, self.name)


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
                code=text(item.get("code")),
                message=text(item.get("message")),
                param=text(item.get("param")),
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
