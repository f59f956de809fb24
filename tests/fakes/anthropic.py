"""A fake of Anthropic's Message Batches; test_documents.py holds it against Anthropic's OpenAPI document."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .anthropic_input import VERSIONS, check_create
from .files import serve_bytes
from .provider import FakeBatch, FakeProvider, Refusal, State, read_json
from .rows import Failure, Fate, Json, Line, last_words
from .server import Reply, Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

WINDOW = 24 * 3600  # seconds until a batch expires
TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def echo_message(endpoint: str, params: Json) -> Json:
    """The stand-in model: an Anthropic message that repeats the request's last words."""
    said = last_words(params)
    tokens = len(said.split())
    usage = {"input_tokens": tokens, "output_tokens": tokens + 1, "cache_creation_input_tokens": 0,
             "cache_read_input_tokens": 0, "cache_creation": None, "server_tool_use": None,
             "service_tier": "batch", "inference_geo": None}  # fmt: skip
    text = {"type": "text", "text": f"echo: {said}", "citations": None}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": params["model"],
            "content": [text], "stop_reason": "end_turn", "stop_sequence": None, "stop_details": None,
            "container": None, "usage": usage}  # fmt: skip


class AnthropicFake(FakeProvider):
    """Anthropic's wire format. Input is checked at create, so a batch never fails; there is one results file.

    `results_base` replaces scheme and host of `results_url`: to see where a client sends its key.
    """

    def __init__(
        self, *, max_bytes: int = 256_000_000, results_base: str | None = None, **common: Any
    ) -> None:
        super().__init__(**{"answer": echo_message, **common})
        self.max_bytes = max_bytes
        self.results_base = results_base
        self.deleted: set[str] = set()  # they stay in `batches`
        self._inputs: dict[str, list[Json]] = {}
        self.results: dict[str, bytes] = {}

    def fail(self, batch_id: str, code: str, message: str, line: int | None = None) -> FakeBatch:
        raise AssertionError("a message batch is refused at create, or it ends: it never fails")

    def cancel_now(self, batch_id: str, **rows: Any) -> FakeBatch:
        batch = super().cancel_now(batch_id, **rows)
        batch.reached.setdefault(State.CANCELLING, self.clock())
        return batch

    # routes

    def _route(self, request: Request) -> Reply:
        headers = request.headers
        if headers.get("x-api-key") != self.key and headers.get("authorization") != f"Bearer {self.key}":
            raise Refusal(401, "invalid x-api-key")
        version = headers.get("anthropic-version")
        if version is None:
            raise Refusal(400, "anthropic-version: header is required")
        if version not in VERSIONS:
            raise Refusal(400, f'anthropic-version: "{version}" is not a valid version')
        match request.method, request.segments:
            case "POST", ["v1", "messages", "batches"]:
                return self._create(request, version)
            case "GET", ["v1", "messages", "batches"]:
                return self._list(request)
            case "GET", ["v1", "messages", "batches", batch_id]:
                batch = self._batch(batch_id)
                self._look(batch)
                return self._reply(batch, request)
            case "DELETE", ["v1", "messages", "batches", batch_id]:
                return self._delete(self._batch(batch_id))
            case "POST", ["v1", "messages", "batches", batch_id, "cancel"]:
                return self._cancel(self._batch(batch_id), request)
            case "GET", ["v1", "messages", "batches", batch_id, "results"]:
                if not self._batch(batch_id).shows_files:
                    raise Refusal(404, f"Batch {batch_id} has no available results.")
                return serve_bytes(
                    self.results[batch_id], request, ranges=False, content_type="application/x-jsonl"
                )
        raise Refusal(404, "Not found")

    def _refuse(self, refusal: Refusal) -> Reply:
        return Reply.json(
            self._error(refusal.status, refusal.message),
            status=refusal.status,
            request_id=f"req_{next(self._numbers)}",
        )

    def _error(self, status: int, message: str) -> Json:
        error = {"type": TYPES.get(status, "api_error"), "message": message}
        return {"type": "error", "error": error, "request_id": f"req_{next(self._numbers)}"}

    def _create(self, request: Request, version: str) -> Reply:
        if len(request.body) > self.max_bytes:
            raise Refusal(413, "Request exceeds the maximum size")
        body = read_json(request)
        check_create(body, version)
        batch = FakeBatch(f"msgbatch_{next(self._numbers):024d}", "/v1/messages", self.clock())
        self.batches[batch.id], self._inputs[batch.id] = batch, body["requests"]
        self._validate(batch)
        return self._reply(batch, request)

    def _batch(self, batch_id: str) -> FakeBatch:
        if batch_id not in self.batches or batch_id in self.deleted:
            raise Refusal(404, f"Batch {batch_id} not found")
        return self.batches[batch_id]

    def _delete(self, batch: FakeBatch) -> Reply:
        if not batch.is_terminal:
            raise Refusal(400, f"Batch {batch.id} has not ended; cancel it first.")
        self.deleted.add(batch.id)
        return Reply.json({"id": batch.id, "type": "message_batch_deleted"})

    def _cancel(self, batch: FakeBatch, request: Request) -> Reply:
        if batch.is_terminal:
            raise Refusal(400, f"Batch {batch.id} has ended and cannot be canceled.")
        if batch.state is not State.CANCELLING:
            self._enter(batch, State.CANCELLING)
        return self._reply(batch, request)

    def _list(self, request: Request) -> Reply:
        found = [batch for batch in reversed(self.batches.values()) if batch.id not in self.deleted]
        limit = request.first("limit") or "20"
        if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
            raise Refusal(400, "limit: Input should be 1 to 1000")
        page, more = self._page(found, request, int(limit))
        for batch in page:
            self._look(batch)
        data = [self._show(batch, request) for batch in page]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return Reply.json({"data": data, "has_more": more, "first_id": first, "last_id": last})

    def _page(
        self, found: Sequence[FakeBatch], request: Request, limit: int
    ) -> tuple[Sequence[FakeBatch], bool]:
        ids = [batch.id for batch in found]
        before, after = request.first("before_id"), request.first("after_id")
        for name, cursor in (("before_id", before), ("after_id", after)):
            if cursor is not None and cursor not in ids:
                raise Refusal(400, f"{name}: no such batch {cursor}")
        if before is not None:
            end = ids.index(before)
            return found[max(0, end - limit) : end], end > limit
        start = 0 if after is None else ids.index(after) + 1
        page = found[start : start + limit]
        if self.endless_list:
            return page or found[-limit:], bool(found)
        return page, start + limit < len(found)

    # the object

    def _reply(self, batch: FakeBatch, request: Request) -> Reply:
        return Reply.json(self._show(batch, request), request_id=f"req_{next(self._numbers)}")

    def _show(self, batch: FakeBatch, request: Request) -> Json:
        base = self.results_base or f"http://{request.headers['host']}"
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": batch.raw_status or self._status(batch),
            "request_counts": self._counts(batch),
            "created_at": _rfc3339(batch.created_at),
            "expires_at": _rfc3339(batch.created_at + WINDOW),
            "ended_at": _rfc3339(batch.reached[batch.state]) if batch.is_terminal else None,
            "cancel_initiated_at": _rfc3339(batch.reached.get(State.CANCELLING)),
            "archived_at": None,
            "results_url": f"{base}/v1/messages/batches/{batch.id}/results" if batch.shows_files else None,
        }

    def _status(self, batch: FakeBatch) -> str:
        if batch.is_terminal:
            return "ended"
        return "canceling" if batch.state is State.CANCELLING else "in_progress"

    def _counts(self, batch: FakeBatch) -> Json:
        """All zero but `processing` until the batch ends: there is no progress to see."""
        return {
            "processing": 0 if batch.is_terminal else len(batch.ids),
            "succeeded": batch.counted(Fate.SUCCEEDED),
            "errored": batch.counted(Fate.FAILED),
            "canceled": batch.counted(Fate.CANCELLED),
            "expired": batch.counted(Fate.EXPIRED),
        }

    # results

    def requests(self, batch: FakeBatch) -> Iterator[tuple[str, Json]]:
        for row in self._inputs[batch.id]:
            yield row["custom_id"], row["params"]

    def _line(self, batch: FakeBatch, custom_id: str, body: Json, fate: Fate) -> Line:
        result: Json
        if fate is Fate.SUCCEEDED:
            result = {"type": "succeeded", "message": self.answer(batch.endpoint, body)}
        elif fate is Fate.FAILED:
            result = {"type": "errored", "error": self._error(batch.failure.status, batch.failure.message)}
        else:
            result = {"type": "canceled" if fate is Fate.CANCELLED else "expired"}
        return Line(custom_id, {"custom_id": custom_id, "result": result}, failed=False)

    def _store(self, batch: FakeBatch, output: bytes | None, error: bytes | None) -> None:
        self.results[batch.id] = output or b""


OVERLOADED = Failure(529, "overloaded_error", "Overloaded", "overloaded_error")


def _rfc3339(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()
