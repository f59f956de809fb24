"""OpenAI's wire format: upload a file, create a batch, poll it, download its output and error files.

OpenAI itself speaks it, and so do many others, with the deviations that a `Dialect` holds as data.
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
    "created": BatchStatus.VALIDATING,  # AIBrix, also the next two
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
    """How one provider deviates from OpenAI's API; the defaults are OpenAI's own.

    Attributes:
        traits: The facts about the provider.
        bare_lines: Whether request lines are only `{custom_id, body}`.
        pages_by_cursor: Whether listings use `cursor` and `paging.next_cursor` instead of `after` and
            `has_more`.
        cancel_by_delete: Whether a cancel is a DELETE of the batch.
        file_becomes_ready: Whether an uploaded file must be `processed` before the create.
        expiry_fields: The form field for each member of `input_expires_after`.
        idempotency_header: The header for the key of a create, if the provider has one.
        env_headers: Environment variables that are sent as headers: (variable, header).
    """

    traits: Traits
    bare_lines: bool = False
    pages_by_cursor: bool = False
    cancel_by_delete: bool = False
    file_becomes_ready: bool = False
    expiry_fields: str = "expires_after[{}]"
    idempotency_header: str | None = None
    env_headers: tuple[tuple[str, str], ...] = ()


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
            # OpenAI refuses a batch file whose name does not end in .jsonl.
            files = {"file": ("requests.jsonl", file, "application/jsonl")}
            request = httpx.Request("POST", self.url("/files"), data=fields, files=files)  # type: ignore[arg-type]
            answer = yield from ask(request, json_of, large=True)
        uploaded = answer["data"] if isinstance(answer.get("data"), dict) else answer  # SiliconFlow's wrapper
        file_id = id_of(uploaded, "file")
        if self.dialect.file_becomes_ready:
            # Continue after an "error", too: the batch reports it with its reason.
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
            has_more = cursor is not None if isinstance(paging, dict) else None
        else:
            cursor = answer.get("last_id") or (batches[-1].id if batches else None)
            has_more = answer.get("has_more")
        return page_of(batches, after=after, limit=limit, has_more=has_more, cursor=cursor)

    def results(self, batch: Batch) -> Results:
        return results_of_files(batch)

    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        # Download both files whatever the status: a completed batch may have failed rows, and an expired or
        # cancelled one has rows that were paid for.
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
    """Parse a batch object in OpenAI's shape, or close to it.

    It accepts a status in upper or lower case; times as unix seconds, numeric text or ISO 8601; `errors` as
    an object, a list or a text; counts that are missing, null or not nested; and empty text for "no file".
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
