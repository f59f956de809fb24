"""A fake of Mistral's files and batch jobs; test_documents.py holds it against Mistral's OpenAPI document."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from .files import FakeFile, serve_bytes
from .forms import FormError, Part, parse_form
from .provider import TERMINAL, FakeBatch, FakeProvider, Refusal, State, read_json
from .rows import Fate, Json, Line
from .server import Reply, Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STATUSES: Mapping[State, str] = {
    State.VALIDATING: "QUEUED",
    State.IN_PROGRESS: "RUNNING",
    State.FINALIZING: "RUNNING",
    State.COMPLETED: "SUCCESS",
    State.FAILED: "FAILED",
    State.EXPIRED: "TIMEOUT_EXCEEDED",
    State.CANCELLING: "CANCELLATION_REQUESTED",
    State.CANCELLED: "CANCELLED",
}
ENDPOINTS = frozenset(
    f"/v1/{name}"
    for name in (
        "chat/completions",
        "embeddings",
        "fim/completions",
        "moderations",
        "chat/moderations",
        "ocr",
        "classifications",
        "chat/classifications",
        "conversations",
        "audio/transcriptions",
    )
)
CREATE_MEMBERS = frozenset(
    {"input_files", "requests", "endpoint", "model", "agent_id", "metadata", "timeout_hours"}
)
LIST_PARAMETERS = frozenset(
    {"page", "page_size", "model", "agent_id", "created_after", "created_by_me", "status", "order_by"}
)
MAX_INLINE = 10_000
MAX_BYTES = 512_000_000


class Unprocessable(Refusal):
    """A 422: `{"detail": [{"type", "loc", "msg"}]}`."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(422, message, param=place)


class MistralFake(FakeProvider):
    """Mistral's wire format. `metadata_filter`: whether list honours bare metadata keys (not known to)."""

    def __init__(self, *, ranges: bool = True, metadata_filter: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.ranges = ranges
        self.metadata_filter = metadata_filter
        self.files: dict[str, FakeFile] = {}
        self.uploads = 0
        self.deleted: set[str] = set()  # jobs; they stay in `batches`
        self._inputs: dict[str, list[bytes]] = {}
        self._inline: dict[str, list[Json]] = {}

    def _route(self, request: Request) -> Reply:
        if request.segments[0] == "signed":
            return self._signed(request)
        if request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refusal(401, "Unauthorized")
        match request.method, request.segments:
            case "POST", ["v1", "files"]:
                return self._upload(request)
            case "GET", ["v1", "files"]:
                return self._list_files(request)
            case "GET", ["v1", "files", file_id]:
                return Reply.json({**self._show_file(self._file(file_id)), "deleted": False})
            case "DELETE", ["v1", "files", file_id]:
                del self.files[self._file(file_id).id]
                return Reply.json({"id": file_id, "object": "file", "deleted": True})
            case "GET", ["v1", "files", file_id, "content"]:
                return self._content(file_id, request)
            case "GET", ["v1", "files", file_id, "url"]:
                host = request.headers["host"]
                return Reply.json({"url": f"http://{host}/signed/{self._file(file_id).id}?sig=s3cret"})
            case _, ["v1", "batch", "jobs", *rest]:
                return self._route_jobs(request, rest)
        raise Refusal(404, "no Route matched with those values")

    def _route_jobs(self, request: Request, rest: list[str]) -> Reply:
        match request.method, rest:
            case "POST", []:
                return self._create(request)
            case "GET", []:
                return self._list(request)
            case "GET", [job_id]:
                batch = self._batch(job_id)
                self._look(batch)
                return Reply.json(self._show(batch, inline=request.first("inline") in ("true", "True", "1")))
            case "DELETE", [job_id]:
                self.deleted.add(self._batch(job_id).id)
                return Reply.json({"id": job_id, "object": "batch", "deleted": True})
            case "POST", [job_id, "cancel"]:
                return self._cancel(self._batch(job_id))
        raise Refusal(405, "Method Not Allowed")

    def _refuse(self, refusal: Refusal) -> Reply:
        if isinstance(refusal, Unprocessable):
            detail = {"type": "value_error", "loc": ["body", refusal.param], "msg": refusal.message}
            return Reply.json({"detail": [detail]}, status=422)
        error = {"object": "error", "message": refusal.message, "type": "invalid_request_error"}
        return Reply.json({**error, "param": refusal.param, "code": refusal.code}, status=refusal.status)

    # files

    def _upload(self, request: Request) -> Reply:
        try:
            form = parse_form(request.headers.get("content-type", ""), request.body)
        except FormError as error:
            raise Unprocessable("file", str(error)) from None
        for name in sorted(form.keys() - {"file", "purpose", "expiry", "visibility"}):
            raise Unprocessable(name, "Extra inputs are not permitted")
        upload = form.get("file")
        if upload is None or upload.filename is None:
            raise Unprocessable("file", "Field required")
        if form.get("purpose", Part(b"")).data != b"batch":
            raise Unprocessable("purpose", "Input should be 'batch'")
        if len(upload.data) > MAX_BYTES:
            raise Refusal(413, "File too large")
        self.uploads += 1
        file = self.store_file(upload.filename, "batch_request", upload.data)
        if "expiry" in form:
            file.expires_at = file.created_at + 3600 * int(form["expiry"].text)
        return Reply.json(self._show_file(file))

    def store_file(self, filename: str, sample_type: str, data: bytes) -> FakeFile:
        file = FakeFile(self._uuid(), filename, sample_type, data, self.clock())
        self.files[file.id] = file
        return file

    def _uuid(self) -> str:
        return str(UUID(int=next(self._numbers), version=4))

    def _file(self, file_id: str) -> FakeFile:
        if file_id not in self.files:
            raise Refusal(404, f"File with id {file_id} not found.")
        return self.files[file_id]

    def _show_file(self, file: FakeFile) -> Json:
        source = "upload" if file.purpose == "batch_request" else "mistral"
        return {"id": file.id, "object": "file", "bytes": len(file.data), "created_at": int(file.created_at),
                "filename": file.filename, "purpose": "batch", "sample_type": file.purpose, "source": source,
                "num_lines": file.data.count(b"\n"), "mimetype": "application/jsonl", "signature": None,
                "expires_at": None if file.expires_at is None else int(file.expires_at),
                "visibility": "workspace"}  # fmt: skip

    def _list_files(self, request: Request) -> Reply:
        files = list(reversed(self.files.values()))
        page, size = _number(request, "page", 0, 0), _number(request, "page_size", 100, 1)
        data = [self._show_file(file) for file in files[page * size : (page + 1) * size]]
        return Reply.json({"object": "list", "data": data, "total": len(files)})

    def _content(self, file_id: str, request: Request) -> Reply:
        data = self._file(file_id).data
        return serve_bytes(data, request, ranges=self.ranges, content_type="application/octet-stream")

    def _signed(self, request: Request) -> Reply:
        """The object store behind signed URLs, which takes a key in a header for a second way of signing."""
        if "authorization" in request.headers or request.first("sig") != "s3cret":
            raise Refusal(400, "Only one auth mechanism allowed")
        return self._content(request.segments[1], request)

    # jobs

    def _create(self, request: Request) -> Reply:
        body = read_json(request)
        _check_create(body)
        files = [self._file(file_id) for file_id in body.get("input_files") or []]
        batch = FakeBatch(
            self._uuid(),
            body["endpoint"],
            self.clock(),
            metadata=body.get("metadata"),
            input_file_id=files[0].id if files else None,
            model=body.get("model"),
            options={
                "timeout_hours": body.get("timeout_hours", 24),
                "input_files": body.get("input_files") or [],
            },
        )
        self.batches[batch.id] = batch
        self._inputs[batch.id] = [
            line for file in files for line in file.data.removesuffix(b"\n").split(b"\n")
        ]
        self._inline[batch.id] = body.get("requests") or []
        return Reply.json(self._show(batch))

    def _batch(self, job_id: str) -> FakeBatch:
        if job_id not in self.batches or job_id in self.deleted:
            raise Refusal(404, f"Batch job {job_id} not found.")
        return self.batches[job_id]

    def _cancel(self, batch: FakeBatch) -> Reply:
        if batch.state in TERMINAL:
            raise Refusal(400, f"Job is {STATUSES[batch.state]} and cannot be cancelled.")
        if batch.state is not State.CANCELLING:
            self._enter(batch, State.CANCELLING)
        return Reply.json(self._show(batch))

    def _list(self, request: Request) -> Reply:
        found = [batch for batch in self.batches.values() if self._wanted(batch, request)]
        if request.first("order_by", "-created") == "-created":
            found.reverse()
        page, size = _number(request, "page", 0, 0), _number(request, "page_size", 100, 1)
        total = len(found)
        if self.endless_list and found:
            page, total = min(page, max(0, (total - 1) // size)), total + size * (page + 2)
        shown = found[page * size : (page + 1) * size]
        for batch in shown:
            self._look(batch)
        return Reply.json({"object": "list", "data": [self._show(batch) for batch in shown], "total": total})

    def _wanted(self, batch: FakeBatch, request: Request) -> bool:
        after = request.first("created_after")
        if batch.id in self.deleted or STATUSES[batch.state] not in request.query.get(
            "status", [STATUSES[batch.state]]
        ):
            return False
        if request.first("model") not in (None, batch.model):
            return False
        if after is not None and batch.created_at < datetime.fromisoformat(after).timestamp():
            return False
        bare = {name: values[0] for name, values in request.query.items() if name not in LIST_PARAMETERS}
        return not self.metadata_filter or bare.items() <= (batch.metadata or {}).items()

    def _show(self, batch: FakeBatch, *, inline: bool = False) -> Json:
        succeeded, failed = batch.progress
        if batch.is_terminal:
            succeeded, failed = batch.counted(Fate.SUCCEEDED), batch.counted(Fate.FAILED)
        ended = batch.shows_files
        return {
            "id": batch.id,
            "object": "batch",
            "input_files": batch.options["input_files"],
            "metadata": batch.metadata,
            "endpoint": batch.endpoint,
            "model": batch.model,
            "agent_id": None,
            "output_file": batch.output_file_id if ended else None,
            "error_file": batch.error_file_id if ended else None,
            "errors": batch.errors,
            "outputs": self._outputs(batch) if inline and ended else None,
            "status": batch.raw_status or STATUSES[batch.state],
            "created_at": int(batch.created_at),
            "total_requests": len(batch.ids),
            "completed_requests": succeeded + failed,
            "succeeded_requests": succeeded,
            "failed_requests": failed,
            "started_at": _seconds(batch.reached.get(State.IN_PROGRESS)),
            "completed_at": _seconds(batch.reached[batch.state]) if batch.is_terminal else None,
        }

    def _outputs(self, batch: FakeBatch) -> list[Json]:
        return [json.loads(json.dumps(line.value)) for line in self._lines(batch)]

    # results

    def requests(self, batch: FakeBatch) -> Iterator[tuple[str, Json]]:
        for line in self._inline[batch.id] or map(json.loads, self._inputs[batch.id]):
            yield line["custom_id"], line["body"]

    def _problems(self, batch: FakeBatch) -> list[Json]:
        lines: list[Any] = [*self._inline[batch.id], *self._inputs[batch.id]]
        found = [problem for line in lines if (problem := _line_problem(line, batch.model))]
        if not lines or not any(lines):
            found = ["The input is empty"]
        return [{"message": message, "count": found.count(message)} for message in dict.fromkeys(found)]

    def _line(self, batch: FakeBatch, custom_id: str, body: Json, fate: Fate) -> Line | None:
        if fate in (Fate.CANCELLED, Fate.EXPIRED):
            return None
        value: Json = {"id": f"row-{custom_id}", "custom_id": custom_id}
        if fate is Fate.SUCCEEDED:
            answer = self.answer(batch.endpoint, {"model": batch.model, **body})
            value |= {"response": {"status_code": 200, "body": answer}, "error": None}
        else:
            value |= {
                "response": {"status_code": batch.failure.status, "body": None},
                "error": batch.failure.message,
            }
        return Line(custom_id, value, failed=fate is Fate.FAILED)

    def _store(self, batch: FakeBatch, output: bytes | None, error: bytes | None) -> None:
        failed = batch.counted(Fate.FAILED)
        batch.errors = [{"message": batch.failure.message, "count": failed}] if failed else []
        if output is not None:
            batch.output_file_id = self.store_file(f"{batch.id}.jsonl", "batch_result", output).id
        if error is not None:
            batch.error_file_id = self.store_file(f"{batch.id}_error.jsonl", "batch_error", error).id


def _check_create(body: Json) -> None:
    for name in sorted(body.keys() - CREATE_MEMBERS):
        raise Unprocessable(name, "Extra inputs are not permitted")
    if body.get("endpoint") not in ENDPOINTS:
        raise Unprocessable("endpoint", "Input should be one of the supported endpoints")
    if bool(body.get("input_files")) == bool(body.get("requests")):
        raise Unprocessable("input_files", "Exactly one of input_files and requests must be given")
    if len(body.get("requests") or []) > MAX_INLINE:
        raise Unprocessable("requests", f"List should have at most {MAX_INLINE} items")
    hours = body.get("timeout_hours", 24)
    if not isinstance(hours, int) or not 1 <= hours <= 168:
        raise Unprocessable("timeout_hours", "Input should be between 1 and 168")
    for key, value in (body.get("metadata") or {}).items():
        if not 1 <= len(key) <= 32 or not isinstance(value, str) or not 1 <= len(value) <= 512:
            raise Unprocessable(f"metadata.{key}", "Keys have 1 to 32 and values 1 to 512 characters")


def _line_problem(line: Json | bytes, model: str | None) -> str | None:
    """What is wrong with one line: Mistral aggregates equal messages and names no line numbers."""
    try:
        value = line if isinstance(line, dict) else json.loads(line.decode())
    except ValueError:
        return "Invalid JSON"
    if not isinstance(value, dict) or not isinstance(value.get("body"), dict):
        return "Field required: body"
    if value.keys() - {"custom_id", "body"}:
        return "Extra inputs are not permitted"
    if not isinstance(value.get("custom_id"), str):
        return "Field required: custom_id"
    return None if model or value["body"].get("model") else "Field required: model"


def _number(request: Request, name: str, default: int, least: int) -> int:
    text = request.first(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise Unprocessable(name, f"Input should be a valid integer of at least {least}")
    return int(text)


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
