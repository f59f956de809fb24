"""Anthropic's Message Batches: requests travel inside the create, results come as one stream of lines.

With OpenAI's chat endpoint, lines are translated both ways (`messages.py`); with `/v1/messages` they are
Anthropic's own and stay unchanged. A batch carries neither metadata nor a name, so the batch of a create
without an answer cannot be looked up. Source: Anthropic API reference, "Message Batches".
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..flow import Flow
from ..models import Batch, BatchStatus, Body, Outcome, Page, RequestCounts, Row, RowError
from .base import DEFAULT_WINDOW, NewBatch, Provider
from .calls import delete, get, post, post_lines
from .codec import Codec
from .messages import error_status, from_message, original_id, safe_id, to_messages
from .reading import entries_of, failed_row, id_of, page_of, unix_time
from .saving import download_files
from .traits import AccountSpec, Limits, Lookup, Results, Traits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CHAT, NATIVE = "/v1/chat/completions", "/v1/messages"

# The last API version that accepts sampling parameters inside batches.
_VERSION = "2023-06-01"


class MessagesCodec(Codec):
    """Anthropic's lines: requests are `{"custom_id", "params"}`, results have a type."""

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        body = line["body"]
        params = body if endpoint == NATIVE else to_messages(body, drop=drop)
        return {"custom_id": safe_id(line["custom_id"]), "params": params}

    def original_ids(self, custom_ids: Sequence[str]) -> dict[str, str]:
        return {safe: custom_id for custom_id in custom_ids if (safe := safe_id(custom_id)) != custom_id}

    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        custom_id, result = record.get("custom_id"), record.get("result")
        if not isinstance(custom_id, str) or not isinstance(result, dict):
            raise ValueError("no custom_id or result")
        custom_id = original_id(custom_id)
        match result.get("type"):
            case "succeeded":
                message = result["message"]
                body = message if endpoint == NATIVE else from_message(message, created=int(time.time()))
                return Row(custom_id, Outcome.SUCCEEDED, Body(body), None, 200)
            case "errored":
                envelope = result.get("error") or {}
                error = envelope.get("error") or envelope
                kind = str(error.get("type"))
                return failed_row(custom_id, kind, str(error.get("message")), error_status(kind))
            case "canceled":
                problem = RowError("batch_cancelled", "The batch was cancelled before this request was sent.")
                return Row(custom_id, Outcome.CANCELLED, None, problem)
            case "expired":
                problem = RowError("batch_expired", "The batch expired before this request was sent.")
                return Row(custom_id, Outcome.EXPIRED, None, problem)
            case other:
                raise ValueError(f"unknown result type {other!r}")


class Anthropic(Provider):
    """The Anthropic API."""

    traits = Traits(
        name="anthropic",
        account=AccountSpec(
            "https://api.anthropic.com",
            ("ANTHROPIC_API_KEY",),
            ("ANTHROPIC_BASE_URL",),
            key_header="x-api-key",
            key_prefix="",
        ),
        limits=Limits(requests=100_000, bytes=250_000_000),  # 256 MB minus room for the envelope
        endpoints=frozenset({CHAT, NATIVE}),
        windows=(DEFAULT_WINDOW,),
        metadata=None,
        lookup=Lookup.NONE,
        list_limit=1000,
        poll_seconds=(30.0, 300.0),
        console=("https://platform.claude.com/workspaces/default/batches", None),
    )
    codec = MessagesCodec()

    def auth_headers(self) -> dict[str, str]:
        return {"anthropic-version": _VERSION} | super().auth_headers()

    def upload(self, new: NewBatch) -> Flow[str | None]:
        return None
        yield

    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        url = self.url("/v1/messages/batches")
        return parse_batch((yield from post_lines(url, new.content, head=b'{"requests":[', tail=b"]}")))

    def retrieve(self, batch_id: str) -> Flow[Batch]:
        return parse_batch((yield from get(self.url("/v1/messages/batches/{}", batch_id))))

    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        url = self.url("/v1/messages/batches/{}/cancel", batch_id)
        return parse_batch((yield from post(url, repeat_conflict=repeat_conflict)))

    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Flow[Page]:
        self.check_options(options, self.traits.list_options, "list")
        answer = yield from get(self.url("/v1/messages/batches"), {"limit": limit, "after_id": after})
        batches = [parse_batch(raw) for raw in entries_of(answer)]
        last = answer.get("last_id") or (batches[-1].id if batches else None)
        return page_of(batches, after=after, limit=limit, has_more=answer.get("has_more"), cursor=last)

    def results(self, batch: Batch) -> Results:
        if batch.raw.get("results_url"):
            return Results.READY
        return Results.NOT_YET if batch.status is BatchStatus.COMPLETED else Results.NONE

    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        # Do not use `results_url`: behind a gateway it is Anthropic's own host, which does not know this key.
        url = self.url("/v1/messages/batches/{}/results", batch.id)
        return (yield from download_files(folder, batch.id, [url]))

    def delete_files(self, batch: Batch, *, only_input: bool = False) -> Flow[None]:
        if not only_input:  # deleting the batch deletes its results, which are a part of it
            yield from delete(self.url("/v1/messages/batches/{}", batch.id))


def parse_batch(raw: dict[str, Any]) -> Batch:
    """Parse a message batch. All counts but `processing` are 0 until it has ended."""
    counts = raw.get("request_counts") or {}
    count = {
        name: counts.get(name) or 0 for name in ("processing", "succeeded", "errored", "canceled", "expired")
    }
    status = _status(raw, count)
    ended_at = unix_time(raw.get("ended_at"))
    ended: dict[str, Any] = {f"{status}_at": ended_at} if status.is_terminal else {}
    return Batch(
        id=id_of(raw, "batch"),
        status=status,
        created_at=unix_time(raw.get("created_at")),
        expires_at=unix_time(raw.get("expires_at")),
        cancelling_at=unix_time(raw.get("cancel_initiated_at")),
        **ended,
        request_counts=RequestCounts(
            total=sum(count.values()),
            completed=count["succeeded"],
            failed=count["errored"] + count["canceled"] + count["expired"],
        ),
        provider="anthropic",
        raw_status=str(raw.get("processing_status") or ""),
        raw=raw,
    )


def _status(raw: dict[str, Any], count: dict[str, int]) -> BatchStatus:
    match raw.get("processing_status"):
        case "in_progress":
            return BatchStatus.IN_PROGRESS
        case "canceling":
            return BatchStatus.CANCELLING
        case "ended" if raw.get("cancel_initiated_at") and count["canceled"]:
            return BatchStatus.CANCELLED
        case "ended" if count["expired"]:
            return BatchStatus.EXPIRED
        case "ended":
            return BatchStatus.COMPLETED
        case _:
            return BatchStatus.UNKNOWN
