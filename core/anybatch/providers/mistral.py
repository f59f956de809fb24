"""Mistral's batch jobs: OpenAI's file API, a job object of its own, numbered pages.

Sources: Mistral's OpenAPI document (`/v1/batch/jobs`, `/v1/files`), its Python SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from ..errors import ConfigurationError
from ..flow import Flow, ask
from ..models import Batch, BatchErrors, BatchProblem, BatchStatus, Page, RequestCounts
from .base import DEFAULT_WINDOW, NewBatch, Provider
from .calls import answers, delete, get, json_of, post
from .codec import BareCodec
from .reading import entries_of, id_of, result_file_ids, results_of_files, unix_time
from .saving import download_files
from .traits import AccountSpec, Limits, Traits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .traits import Results

_STATUSES = {
    "QUEUED": BatchStatus.VALIDATING,
    "RUNNING": BatchStatus.IN_PROGRESS,
    "SUCCESS": BatchStatus.COMPLETED,
    "FAILED": BatchStatus.FAILED,
    "TIMEOUT_EXCEEDED": BatchStatus.EXPIRED,
    "CANCELLATION_REQUESTED": BatchStatus.CANCELLING,
    "CANCELLED": BatchStatus.CANCELLED,
}
_ENDED_AT = {
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.EXPIRED: "expired_at",
    BatchStatus.CANCELLED: "cancelled_at",
}
_ENDPOINTS = (
    "chat/completions", "embeddings", "fim/completions", "moderations", "chat/moderations", "ocr",
    "classifications", "chat/classifications", "conversations", "audio/transcriptions",
)  # fmt: skip
_MAX_HOURS = 168


class Mistral(Provider):
    """Mistral La Plateforme."""

    traits = Traits(
        name="mistral",
        account=AccountSpec("https://api.mistral.ai", ("MISTRAL_API_KEY",), ("MISTRAL_API_BASE",)),
        limits=Limits(requests=100_000, bytes=512_000_000),
        endpoints=frozenset(f"/v1/{endpoint}" for endpoint in _ENDPOINTS),
        one_model=True,  # the model is a field of the job
        create_options=frozenset({"agent_id", "timeout_hours"}),
        list_options=frozenset(
            {"model", "agent_id", "metadata", "created_after", "created_by_me", "status", "order_by"}
        ),
        metadata=(16, 32, 512),
        console=("https://console.mistral.ai/build/batches", None),
    )
    codec = BareCodec()

    def check(
        self,
        endpoint: str,
        metadata: Mapping[str, str],
        options: Mapping[str, Any],
        window: str = DEFAULT_WINDOW,
    ) -> None:
        super().check(endpoint, metadata, options, window)
        window_hours(window)
        hours = options.get("timeout_hours")
        if hours is not None and (not isinstance(hours, int) or not 1 <= hours <= _MAX_HOURS):
            raise ConfigurationError(
                f"timeout_hours: must be an integer from 1 to {_MAX_HOURS}, not {hours!r}", provider=self.name
            )

    def upload(self, new: NewBatch) -> Flow[str | None]:
        with new.content.open() as file:
            files = {"file": ("requests.jsonl", file, "application/jsonl")}
            request = httpx.Request("POST", self.url("/v1/files"), data={"purpose": "batch"}, files=files)  # type: ignore[arg-type]
            return id_of((yield from ask(request, json_of, large=True)), "file")

    def create(self, new: NewBatch, file_id: str | None) -> Flow[Batch]:
        body: dict[str, Any] = {
            "input_files": [file_id],
            "endpoint": new.endpoint,
            "timeout_hours": window_hours(new.completion_window),
        }
        if new.models:
            body["model"] = new.models[0]
        if new.metadata:
            body["metadata"] = dict(new.metadata)
        body |= dict(new.options)
        return parse_job((yield from post(self.url("/v1/batch/jobs"), body, repeatable=False)))

    def retrieve(self, batch_id: str) -> Flow[Batch]:
        return parse_job((yield from get(self.url("/v1/batch/jobs/{}", batch_id))))

    def request_cancel(self, batch_id: str, *, repeat_conflict: bool) -> Flow[Batch]:
        url = self.url("/v1/batch/jobs/{}/cancel", batch_id)
        return parse_job((yield from post(url, repeat_conflict=repeat_conflict)))

    def list_page(self, *, after: str | None, limit: int | None, options: Mapping[str, Any]) -> Flow[Page]:
        self.check_options(options, self.traits.list_options, "list")
        # Pages are numbered. The cursor also holds the last id, since some listings repeat their last page,
        # and the number of entries read so far, since a page may hold fewer than requested.
        number, _, rest = (after or "0").partition(":")
        before, _, counted = rest.rpartition(":")
        if not number.isdecimal() or not (counted or "0").isdecimal():
            raise ConfigurationError(
                f"after: must be the next_cursor of a page, not {after!r}", provider=self.name
            )
        query = {
            "page": int(number),
            "page_size": limit or self.list_limit,
            "order_by": "-created",
            **options,
        }
        metadata = query.pop("metadata", None) or {}  # the SDK sends the pairs as bare query keys
        answer = yield from get(self.url("/v1/batch/jobs"), query | metadata)
        batches = [parse_job(raw) for raw in entries_of(answer)]
        total, is_repeated = answer.get("total"), bool(batches) and batches[-1].id == before
        read = int(counted or 0) + (0 if is_repeated else len(batches))
        more = read < total if isinstance(total, int) else bool(batches) and not is_repeated
        if not more or not batches or is_repeated:  # no later page would hold what is missing here
            return Page(batches, next_cursor=None, has_more=more)
        return Page(batches, next_cursor=f"{int(number) + 1}:{batches[-1].id}:{read}", has_more=True)

    def has_file(self, file_id: str) -> Flow[bool]:
        return (yield from answers(self.url("/v1/files/{}", file_id)))

    def results(self, batch: Batch) -> Results:
        return results_of_files(batch)

    def download(self, batch: Batch, folder: Path) -> Flow[list[Path]]:
        urls = [self.url("/v1/files/{}/content", file_id) for file_id in result_file_ids(batch)]
        return (yield from download_files(folder, batch.id, urls))

    def delete_files(self, batch: Batch, *, only_input: bool = False) -> Flow[None]:
        ids = [batch.input_file_id, *(() if only_input else result_file_ids(batch))]
        for file_id in filter(None, ids):
            yield from delete(self.url("/v1/files/{}", file_id))


def window_hours(window: str) -> int:
    """Return Mistral's `timeout_hours` for a completion window such as "24h" or "7d"."""
    number, unit = window[:-1], window[-1:]
    if not number.isdigit() or unit not in "hd" or not unit:
        raise ConfigurationError(
            f"completion_window: must be hours or days such as '24h' or '7d', not {window!r}"
        )
    hours = int(number) * (24 if unit == "d" else 1)
    if not 1 <= hours <= _MAX_HOURS:
        raise ConfigurationError(f"completion_window: mistral supports 1h to {_MAX_HOURS}h, not {window!r}")
    return hours


def parse_job(raw: dict[str, Any]) -> Batch:
    """Parse a job object as a batch. Its `errors` are counts per message, without line numbers."""
    raw_status = str(raw.get("status") or "")
    status = _STATUSES.get(raw_status.upper(), BatchStatus.UNKNOWN)
    input_files = raw.get("input_files") or [None]
    ended: dict[str, Any] = (
        {_ENDED_AT[status]: unix_time(raw.get("completed_at"))} if status in _ENDED_AT else {}
    )
    problems = tuple(
        BatchProblem(message=f"{item.get('message')} ({item.get('count', 1)} times)")
        for item in raw.get("errors") or []
        if isinstance(item, dict)
    )
    return Batch(
        id=id_of(raw, "batch job"),
        endpoint=raw.get("endpoint"),
        model=raw.get("model"),
        errors=BatchErrors(data=problems) if problems else None,
        input_file_id=input_files[0],
        status=status,
        output_file_id=raw.get("output_file") or None,
        error_file_id=raw.get("error_file") or None,
        created_at=unix_time(raw.get("created_at")),
        in_progress_at=unix_time(raw.get("started_at")),
        **ended,
        request_counts=RequestCounts(
            total=raw.get("total_requests") or 0,
            completed=raw.get("succeeded_requests") or 0,
            failed=raw.get("failed_requests") or 0,
        ),
        metadata=raw.get("metadata") or None,
        provider="mistral",
        raw_status=raw_status,
        raw=raw,
    )
