"""A fake of OpenAI's files and batches, and of the providers that imitate them.

    fake = OpenAIFake(GROQ, auto=Auto(looks=2))
    with FakeServer(fake) as server:
        …                                     # create a batch with a client at server.api_base, key fake.key
    fake.finish(fake.last.id, failed=2, quirks=Quirks(shuffled=True))      # where there is no auto

Checked against the OpenAPI documents of OpenAI and Groq in test_documents.py.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .dialects import OPENAI, Dialect
from .files import FakeFile, serve_bytes
from .forms import FormError, Part, parse_form
from .openai_input import check_create, line_problems, read_lines
from .provider import TERMINAL, Auto, FakeBatch, FakeProvider, Refusal, State, read_json
from .rows import Fate, Json, Line, add_usage
from .server import Reply, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Auto", "FakeFile", "OpenAIFake"]


class OpenAIFake(FakeProvider):
    """The OpenAI wire format in one dialect; `ranges` says whether file content honours Range.

    `files` holds what is stored now, by id; `uploads` counts what was ever uploaded.
    """

    def __init__(self, dialect: Dialect = OPENAI, *, ranges: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.dialect = dialect
        self.base_path = dialect.base_path
        self.ranges = ranges
        self.files: dict[str, FakeFile] = {}
        self.uploads = 0
        self._inputs: dict[str, FakeFile] = {}
        self._by_idempotency_key: dict[str, str] = {}

    # routes

    def _route(self, request: Request) -> Reply:
        self._authenticate(request)
        path = request.path.removeprefix(self.base_path)
        if path == request.path and self.base_path:
            raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
        rest = Request(request.method, path, request.query, request.headers, request.body)
        match request.method, rest.segments:
            case "POST", ["files"]:
                return self._upload(rest)
            case "GET", ["files"]:
                return self._list_files(rest)
            case "GET", ["files", file_id]:
                file = self._file(file_id)
                file.looks += 1
                return Reply.json(self._show_file(file))
            case "DELETE", ["files", file_id]:
                self._file(file_id)
                del self.files[file_id]
                return Reply.json({"id": file_id, "object": "file", "deleted": True})
            case "GET", ["files", file_id, "content"]:
                data = self._file(file_id).data
                return serve_bytes(data, rest, ranges=self.ranges, content_type="application/octet-stream")
            case "POST", ["batches"]:
                return self._create(rest)
            case "GET", ["batches"]:
                return self._list(rest)
            case "GET", ["batches", batch_id]:
                batch = self._batch(batch_id)
                self._look(batch)
                return Reply.json(self._show(batch))
            case "POST", ["batches", batch_id, "cancel"] if self.dialect.cancel == "POST":
                return self._cancel(self._batch(batch_id))
            case "DELETE", ["batches", batch_id] if self.dialect.cancel == "DELETE":
                return self._cancel(self._batch(batch_id))
            case "GET", ["batches", batch_id, "results"] if self.dialect.results_route:
                return self._results(self._batch(batch_id))
        raise Refusal(404, f"Invalid URL ({request.method} {request.path})")

    def _authenticate(self, request: Request) -> None:
        accepted = {"authorization": f"Bearer {self.key}", "api-key": self.key}
        if not any(request.headers.get(name) == accepted[name] for name in self.dialect.key_headers):
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def _refuse(self, refusal: Refusal) -> Reply:
        headers = {"x_request_id": f"req_{next(self._numbers)}"}
        if self.dialect.refusals == "code":
            return Reply.json(
                {"code": 20012, "message": refusal.message, "data": None}, status=refusal.status, **headers
            )
        error = {"message": refusal.message, "type": "invalid_request_error", "param": refusal.param}
        return Reply.json({"error": {**error, "code": refusal.code}}, status=refusal.status, **headers)

    # files

    def _upload(self, request: Request) -> Reply:
        try:
            form = parse_form(request.headers.get("content-type", ""), request.body)
        except FormError as error:
            raise Refusal(400, f"Could not parse multipart form: {error}") from None
        upload = form.get("file", Part(b""))
        if form.get("purpose", Part(b"")).data != b"batch":
            raise Refusal(400, "'purpose' must be 'batch'.", code="invalid_value", param="purpose")
        if not (upload.filename or "").endswith(".jsonl"):
            raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl", param="file")
        if len(upload.data) > self.dialect.max_bytes:
            raise Refusal(413, f"File is too large: {len(upload.data)} bytes.", param="file")
        lifetime = self._lifetime(
            {name: part.text for name, part in form.items() if name.startswith("expires")}
        )
        for name in sorted(form.keys() - {"purpose", "file"} - _expiry_names(self.dialect)):
            raise Refusal(400, f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
        if self.dialect.upload_validated and self.dialect.endpoints is not None:
            problems = line_problems(upload.data, min(self.dialect.endpoints), self.dialect)
            for first in problems[:1]:
                raise Refusal(400, f"line {first['line']}: {first['message']}", code=first["code"])
        file = self.store_file(upload.filename or "", "batch", upload.data)
        file.expires_at = file.created_at + lifetime if lifetime else None
        self.uploads += 1
        shown = self._show_file(file)
        if self.dialect.upload_wrapped:
            return Reply.json({"code": 20000, "message": "Ok", "status": True, "data": shown})
        return Reply.json(shown)

    def _lifetime(self, fields: dict[str, str]) -> int | None:
        if not fields:
            return None
        if self.dialect.expiry_fields == "refused" or fields.keys() != _expiry_names(self.dialect):
            raise Refusal(400, f"Invalid fields: {', '.join(sorted(fields))}.", param="expires_after")
        seconds = int(next(text for name, text in fields.items() if "seconds" in name))
        low = 1209600 if self.dialect.expiry_fields == "dotted" else 3600
        if not low <= seconds <= 2592000:
            raise Refusal(400, "Invalid 'expires_after[seconds]'.", param="expires_after")
        return seconds

    def store_file(self, filename: str, purpose: str, data: bytes) -> FakeFile:
        file_id = self.dialect.make_id("file", next(self._numbers))
        self.files[file_id] = FakeFile(file_id, filename, purpose, data, self.clock())
        return self.files[file_id]

    def _file(self, file_id: str) -> FakeFile:
        if file_id not in self.files:
            raise Refusal(404, f"No such File object: {file_id}", param="id")
        return self.files[file_id]

    def _show_file(self, file: FakeFile) -> Json:
        expires = {} if file.expires_at is None else {"expires_at": int(file.expires_at)}
        status = "processed" if self._is_processed(file) else "pending"
        return {"id": file.id, "object": "file", "bytes": len(file.data), "created_at": int(file.created_at),
                "filename": file.filename, "purpose": file.purpose, "status": status} | expires  # fmt: skip

    def _is_processed(self, file: FakeFile) -> bool:
        return file.purpose != "batch" or file.looks >= self.dialect.upload_looks

    def _list_files(self, request: Request) -> Reply:
        purpose = request.first("purpose")
        found = [file for file in reversed(self.files.values()) if purpose in (None, file.purpose)]
        if request.first("order") == "asc":
            found.reverse()
        page, more = self._page(found, request.first("after"), _limit(request, 10_000, 10_000))
        data = [self._show_file(file) for file in page]
        return Reply.json(_listing(data, more, empty=""))

    # batches

    def _create(self, request: Request) -> Reply:
        body = read_json(request)
        key = request.headers.get("idempotency-key") if self.dialect.idempotency_key else None
        if key in self._by_idempotency_key:
            return Reply.json(self._show(self.batches[self._by_idempotency_key[key]]))
        check_create(body, self.dialect)
        file = self.files.get(body["input_file_id"])
        if file is None or file.purpose != "batch":
            raise Refusal(400, f"Invalid 'input_file_id': {body['input_file_id']}", param="input_file_id")
        if not self._is_processed(file):
            raise Refusal(400, f"The file {file.id} is not processed yet.", param="input_file_id")
        batch = FakeBatch(
            self.dialect.make_id("batch", next(self._numbers)),
            body["endpoint"],
            self.clock(),
            metadata=body.get("metadata"),
            input_file_id=file.id,
            options={name: value for name, value in body.items() if name in self.dialect.create_options}
            | {"completion_window": body["completion_window"]},
        )
        self.batches[batch.id], self._inputs[batch.id] = batch, file
        if key is not None:
            self._by_idempotency_key[key] = batch.id
        return Reply.json(self._show(batch), x_request_id=f"req_{next(self._numbers)}")

    def _batch(self, batch_id: str) -> FakeBatch:
        if batch_id not in self.batches:
            raise Refusal(404, f"No batch found with id '{batch_id}'.")
        return self.batches[batch_id]

    def _cancel(self, batch: FakeBatch) -> Reply:
        if batch.state in TERMINAL:
            raise Refusal(409, f"Cannot cancel a batch with status '{batch.state}'.")
        if batch.state is not State.CANCELLING:
            self._enter(batch, State.CANCELLING)
        return Reply.json(self._show(batch))

    def _list(self, request: Request) -> Reply:
        found = [batch for batch in reversed(self.batches.values()) if self._wanted(batch, request)]
        after = request.first("cursor" if self.dialect.paging == "cursor" else "after")
        limit = 200 if request.query.get("id") else _limit(request, self.dialect.list_limit, 100)
        page, more = self._page(found, after, limit)
        for batch in page:
            self._look(batch)
        data = [self._show(batch) for batch in page]
        if self.dialect.paging == "cursor":
            return Reply.json(
                {"object": "list", "data": data, "paging": {"next_cursor": page[-1].id if more else None}}
            )
        return Reply.json(_listing(data, more, empty=None))

    def _page(self, found: Sequence[Any], after: str | None, limit: int) -> tuple[Sequence[Any], bool]:
        """The items after the one with this id, and whether there are more."""
        ids = [item.id for item in found]
        if after is not None and after not in ids:
            raise Refusal(400, f"Invalid 'after': {after}", code="invalid_value", param="after")
        start = 0 if after is None else ids.index(after) + 1
        page = found[start : start + limit]
        if self.endless_list:
            return page or found[-limit:], bool(found)
        return page, start + limit < len(found)

    def _wanted(self, batch: FakeBatch, request: Request) -> bool:
        if self.dialect.paging == "cursor":
            return batch.id in request.query.get("id", [batch.id])
        return all(
            _FILTERS[name](self, batch, values[0])
            for name, values in request.query.items()
            if name in self.dialect.filters & _FILTERS.keys()
        )

    def _show(self, batch: FakeBatch) -> Json:
        """The batch object as this dialect writes it."""
        dialect, no_file = self.dialect, self.dialect.no_file
        ended = batch.shows_files
        shown: Json = {
            "id": batch.id,
            "object": "batch",
            "endpoint": None if dialect.hides_endpoint else batch.endpoint,
            "errors": self._show_errors(batch),
            "input_file_id": batch.input_file_id,
            "completion_window": batch.options["completion_window"],
            "status": self._show_status(batch),
            "output_file_id": (ended and batch.output_file_id) or no_file,
            "error_file_id": (ended and batch.error_file_id) or no_file,
            "created_at": self._show_time(batch.created_at),
            "expires_at": self._show_time(batch.created_at + _seconds(batch.options["completion_window"])),
            **{f"{state}_at": self._show_time(batch.reached.get(state)) for state in _TIMED},
            "metadata": batch.metadata,
        }
        if dialect.model:
            shown["model"] = batch.model
        if dialect.usage:
            shown["usage"] = batch.usage
        return shown | self._show_counts(batch)

    def _show_status(self, batch: FakeBatch) -> str:
        status = self.dialect.statuses.get(batch.state, str(batch.state))
        return batch.raw_status or (status.capitalize() if self.dialect.capitalised else status)

    def _show_time(self, at: float | None) -> int | str | None:
        if at is None or self.dialect.times == "unix":
            return None if at is None else int(at)
        return datetime.fromtimestamp(int(at), UTC).isoformat().replace("+00:00", "Z")

    def _show_errors(self, batch: FakeBatch) -> Any:
        match self.dialect.errors:
            case "text":
                return "; ".join(error["message"] for error in batch.errors) or self.dialect.no_file
            case "list":
                return batch.errors or None
            case "object":
                return {"object": "list", "data": batch.errors} if batch.errors else None

    def _show_counts(self, batch: FakeBatch) -> Json:
        completed, failed = batch.progress
        if batch.is_terminal:
            completed = batch.counted(Fate.SUCCEEDED)
            failed = batch.counted(Fate.FAILED) + batch.counted(Fate.EXPIRED)
        counts: Json = {"total": len(batch.ids), "completed": completed, "failed": failed}
        match self.dialect.counts:
            case "late" if not batch.is_terminal and not completed + failed:
                return {"request_counts": {}}
            case "null":
                return {"request_counts": None}
            case "null members" if not batch.is_terminal:
                return {"request_counts": dict.fromkeys(counts)}
            case "flat":
                return {**counts, "request_counts": counts}
        return {"request_counts": counts}

    # results

    def requests(self, batch: FakeBatch) -> Iterator[tuple[str, Json]]:
        for line in read_lines(self._inputs[batch.id].data):
            yield line["custom_id"], line["body"]

    def _problems(self, batch: FakeBatch) -> list[Json]:
        return line_problems(self._inputs[batch.id].data, batch.endpoint, self.dialect)

    def _line(self, batch: FakeBatch, custom_id: str, body: Json, fate: Fate) -> Line | None:
        if fate is Fate.CANCELLED:
            return None  # rows that were never run appear in no file
        batch.model = batch.model or body.get("model")
        value: Json = {"id": f"batch_req_{custom_id}"} if self.dialect.line_ids else {}
        value |= {"custom_id": custom_id, "response": None, "error": None}
        if fate is Fate.SUCCEEDED:
            answer = self.answer(batch.endpoint, body)
            batch.usage = add_usage(batch.usage, answer.get("usage") or {})
            value["response"] = answer if self.dialect.unwrapped else self._response(200, custom_id, answer)
        elif fate is Fate.EXPIRED:
            message = "This request could not be executed before the completion window expired."
            value["error"] = {"code": "batch_expired", "message": message}
        elif self.dialect.failures == "error":
            value["error"] = {"code": batch.failure.code, "message": batch.failure.message}
        else:
            failure = batch.failure
            error = {"message": failure.message, "type": failure.kind, "param": None, "code": failure.code}
            value["response"] = self._response(failure.status, custom_id, {"error": error})
        return Line(custom_id, value, failed=fate is not Fate.SUCCEEDED)

    def _response(self, status: int, custom_id: str, body: Json) -> Json:
        request_id = {"request_id": f"req_{custom_id}"} if self.dialect.request_ids else {}
        return {"status_code": status, **request_id, "body": body}

    def _store(self, batch: FakeBatch, output: bytes | None, error: bytes | None) -> None:
        if error is None and self.dialect.empty_error_file and batch.quirks.files == "natural":
            error = b""
        if output is not None:
            batch.output_file_id = self.store_file(f"{batch.id}_output.jsonl", "batch_output", output).id
        if error is not None:
            batch.error_file_id = self.store_file(f"{batch.id}_error.jsonl", "batch_output", error).id

    def _results(self, batch: FakeBatch) -> Reply:
        """Cerebras: one list of all rows."""
        if not batch.is_terminal:
            raise Refusal(409, f"The batch is {batch.state}.")
        kept = [self.files[one].data for one in (batch.output_file_id, batch.error_file_id) if one]
        rows = [_cerebras_row(line, batch) for line in b"".join(kept).splitlines(keepends=True)]
        return Reply(200, b"".join(rows), {"content-type": "application/jsonl"})


_TIMED = (State.IN_PROGRESS, State.FINALIZING, State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLING,
          State.CANCELLED)  # fmt: skip


def _expiry_names(dialect: Dialect) -> set[str]:
    form = {"bracket": "expires_after[{}]", "dotted": "expires_after.{}"}.get(dialect.expiry_fields)
    return {form.format(name) for name in ("anchor", "seconds")} if form else set()


def _limit(request: Request, default: int, most: int) -> int:
    text = request.first("limit") or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise Refusal(
            400, f"Invalid 'limit': {text}, expected 1 to {most}.", code="invalid_value", param="limit"
        )
    return int(text)


def _listing(data: Sequence[Json], more: bool, *, empty: str | None) -> Json:
    """An OpenAI list; `empty` stands for the ids of an empty page."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (empty, empty)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def _seconds(window: str) -> int:
    """The length of a completion window; "background" has a day."""
    found = re.fullmatch(r"(\d+)([hd])", window)
    return int(found[1]) * {"h": 3600, "d": 86400}[found[2]] if found else 86400


def _cerebras_row(raw: bytes, batch: FakeBatch) -> bytes:
    """`{custom_id, status, response}`, the completion itself, or `{…, error}`; broken lines stay."""
    try:
        line = json.loads(raw)
    except ValueError:
        return raw
    row: Json = {"custom_id": line["custom_id"], "status": batch.fates.get(line["custom_id"], Fate.SUCCEEDED)}
    if row["status"] == Fate.SUCCEEDED:
        row["response"] = line["response"]["body"]
    else:
        row["error"] = line["error"] or line["response"]["body"]["error"]
    return json.dumps(row).encode() + b"\n"


def _searched(fake: OpenAIFake, batch: FakeBatch, text: str) -> bool:
    """Doubleword: in the metadata, the file's name or the id."""
    name = fake._inputs[batch.id].filename
    return any(text in str(place) for place in (batch.id, name, *(batch.metadata or {}).values()))


_FILTERS: dict[str, Callable[[OpenAIFake, FakeBatch, str], bool]] = {
    "ds_name": lambda fake, batch, text: text in (batch.metadata or {}).get("ds_name", ""),
    "input_file_ids": lambda fake, batch, text: batch.input_file_id in text.split(","),
    "status": lambda fake, batch, text: fake._show_status(batch) in text.split(","),
    "search": _searched,
}
