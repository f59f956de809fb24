"""The application: OpenAI's files and batches endpoints as one function from request to response.

`LocalTransport` calls it in process, `anybatch serve` over HTTP; both pass the same bytes.
"""

import json
import re
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from hmac import compare_digest
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import faults, machine, multipart, work
from .checks import FILE_LIFETIME, check_create, check_upload, disturbance, first_model, read_lifetime
from .closing import discard_deleted
from .machine import Record
from .protocol import (
    Refusal,
    Request,
    Response,
    json_response,
    page,
    read_file,
    read_json,
    read_limit,
    read_query,
    read_range,
)
from .store import Store, add_file

LIST_BUDGET = 1.0  # seconds that one list call may spend on closing batches whose end has come


class App:
    """An OpenAI-compatible batch server over an SQLite file.

    Args:
        path: The file; it is created if it is missing.
        now: The clock, in unix seconds.
        api_key: The key that every request must send; None accepts all.
        upstream: Whether batches whose model is not a stand-in wait for a worker (`upstream.py`).

    Raises:
        StoreError: The file cannot be opened.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        now: Callable[[], float] = time.time,
        api_key: str | None = None,
        upstream: bool = False,
    ) -> None:
        self.store = Store(Path(path))
        self.now = now
        self._api_key = api_key
        self._upstream = upstream

    def close(self) -> None:
        self.store.close()

    def handle(self, request: Request) -> Response:
        """Answer one request; errors that a client can cause become responses."""
        try:
            response = self._route(request)
        except Refusal as refusal:
            response = refusal.response
        except multipart.MultipartError as error:
            response = Refusal(400, f"Invalid upload: {error}.").response
        except (sqlite3.Error, OSError) as error:
            response = Refusal(503, f"The local database failed: {error}", code="database_error").response
        return replace(response, headers=response.headers | {"x-request-id": f"req_{uuid4().hex}"})

    def _route(self, request: Request) -> Response:
        self._authorize(request)
        path = request.path.rstrip("/")
        matches = [(method, found, action) for method, at, action in _ROUTES if (found := at.fullmatch(path))]
        if not matches:
            raise Refusal(404, f"Invalid URL ({request.method} {request.path})", code="unknown_url")
        for method, found, action in matches:
            if method == request.method:
                self._disturb()
                response = action(self, request, *found.groups())
                self._disturb()  # a create may have started the disturbance that replaces its own answer
                return response
        raise Refusal(405, f"Not allowed: {request.method} {request.path}")

    def _authorize(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").encode()
        if self._api_key is not None and not compare_digest(sent, f"Bearer {self._api_key}".encode()):
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def _disturb(self) -> None:
        """Refuse the request with 503 or 429 while any batch's model asks for that."""
        now = self.now()
        for row in self.store.all("SELECT model, created FROM batches WHERE fault_to > ?", now):
            ask, age = faults.parse(row["model"]), now - row["created"]
            if ask.outage and ask.outage[0] <= age < ask.outage[1]:
                raise Refusal(503, "The server is overloaded or not ready yet.", code="server_is_overloaded")
            if ask.throttle and ask.throttle[0] <= age < ask.throttle[1]:
                wait = str(min(ceil(ask.throttle[1] - age), 10))
                message = "Rate limit reached for batch requests."
                raise Refusal(429, message, code="rate_limit_exceeded", headers={"retry-after": wait})

    # Files

    def create_file(self, request: Request) -> Response:
        values: dict[str, str] = {}
        filename = None
        with self.store.new_blob() as (file_id, blob):
            for part in multipart.parts(request.headers.get("content-type", ""), request.body):
                if part.name == "file":
                    filename = part.filename or ""
                    blob.seek(0)
                    blob.truncate()
                    for chunk in part.data:
                        blob.write(chunk)
                else:
                    values[part.name] = part.text()
            size = blob.tell()
            purpose = check_upload(values, filename)
            lifetime = read_lifetime(values) or (FILE_LIFETIME if purpose == "batch" else None)
        now = self.now()
        with self.store.write() as connection:
            add_file(
                connection,
                file_id,
                created=now,
                size=size,
                filename=filename or "",
                purpose=purpose,
                lifetime=lifetime,
            )
        self._drop_expired_files(now)
        return json_response(self._file(file_id))

    def _drop_expired_files(self, now: float) -> None:
        with self.store.write() as connection:
            gone = connection.execute(
                "UPDATE files SET deleted = 1 WHERE expires < ? AND NOT deleted RETURNING id", (now,)
            )
            expired = [row["id"] for row in gone.fetchall()]
        for file_id in expired:
            discard_deleted(self.store, file_id)

    def _file(self, file_id: str) -> dict[str, Any]:
        row = self.store.one("SELECT * FROM files WHERE id = ? AND NOT deleted", file_id)
        if row is None or (row["expires"] is not None and row["expires"] < self.now()):
            raise Refusal(404, f"No such File object: {file_id}", param="id")
        return _file_object(row)

    def list_files(self, request: Request) -> Response:
        query = read_query(request, "purpose", "limit", "order", "after")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Refusal(400, "'order' must be asc or desc.", param="order")
        limit = read_limit(query, 10_000, 10_000)
        sign, start = (">", 0) if order == "asc" else ("<", 1 << 62)
        if "after" in query:
            start = self._position("files", query["after"])
        rows = self.store.all(
            f"SELECT * FROM files WHERE seq {sign} :start AND NOT deleted AND coalesce(expires, :now) >= :now"
            f" AND coalesce(:purpose, purpose) = purpose ORDER BY seq {order} LIMIT :most",
            start=start,
            now=self.now(),
            purpose=query.get("purpose"),
            most=limit + 1,
        )
        return page([_file_object(row) for row in rows[:limit]], more=len(rows) > limit)

    def _position(self, table: str, after: str) -> int:
        row = self.store.one(f"SELECT seq FROM {table} WHERE id = ?", after)
        if row is None:
            raise Refusal(400, f"No such id to list after: {after}", param="after")
        return int(row["seq"])

    def get_file(self, request: Request, file_id: str) -> Response:
        return json_response(self._file(file_id))

    def delete_file(self, request: Request, file_id: str) -> Response:
        self._file(file_id)
        with self.store.write() as connection:
            connection.execute("UPDATE files SET deleted = 1 WHERE id = ?", (file_id,))
        discard_deleted(self.store, file_id)  # if an open batch still needs the bytes, its end removes them
        return json_response({"id": file_id, "object": "file", "deleted": True})

    def get_content(self, request: Request, file_id: str) -> Response:
        size = self._file(file_id)["bytes"]
        wanted = read_range(request.headers.get("range"), size)
        start, stop = wanted or (0, size)
        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(stop - start),
            "accept-ranges": "bytes",
        }
        if wanted:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        content = read_file(self.store.blob(file_id), start, stop - start)
        return Response(206 if wanted else 200, headers, content)

    # Batches

    def create_batch(self, request: Request) -> Response:
        asked = read_json(request)
        window, metadata, lifetime = check_create(asked, any_endpoint=self._upstream)
        source = self._file(asked["input_file_id"])
        if source["purpose"] != "batch":
            message = f"Invalid file purpose: expected 'batch', found '{source['purpose']}'."
            raise Refusal(400, message, param="input_file_id")
        with self.store.blob(source["id"]).open("rb") as lines:
            model = first_model(lines)
        upstream = self._upstream and not (model or "").startswith(faults.PREFIX)
        now = self.now()
        fault_to = 0.0 if upstream else now + disturbance(model)
        batch_id = f"batch_{uuid4().hex}"
        columns = {
            "id": batch_id,
            "created": now,
            "endpoint": asked["endpoint"],
            "input_file_id": source["id"],
            "completion_window": asked["completion_window"],
            "expires": now + window,
            "metadata": json.dumps(metadata) if metadata is not None else None,
            "output_lifetime": lifetime or FILE_LIFETIME,
            "model": model,
            "upstream": upstream,
            "fault_to": fault_to,
        }
        placeholders = ", ".join("?" * len(columns))
        with self.store.write() as connection:
            connection.execute(
                f"INSERT INTO batches ({', '.join(columns)}) VALUES ({placeholders})",
                tuple(columns.values()),
            )
        return json_response(self._view(self._batch(batch_id), now))

    def _batch(self, batch_id: str) -> Record:
        batch = work.load(self.store, batch_id)
        if batch is None:
            raise Refusal(404, f"No batch found with id '{batch_id}'.", param="batch_id")
        return batch

    def _view(self, batch: Record, now: float) -> dict[str, Any]:
        plan = None
        if batch.final is None:
            plan = self.store.one("SELECT outcomes FROM plans WHERE batch_id = ?", batch.id)
        return machine.view(batch, now, plan["outcomes"] if plan else None)

    def get_batch(self, request: Request, batch_id: str) -> Response:
        now = self.now()
        return json_response(self._view(work.advance(self.store, self._batch(batch_id), now), now))

    def cancel_batch(self, request: Request, batch_id: str) -> Response:
        now = self.now()
        batch = work.advance(self.store, self._batch(batch_id), now)
        status = self._view(batch, now)["status"]
        if status in ("completed", "expired", "failed"):
            headers = {"x-should-retry": "false"}
            raise Refusal(409, f"Cannot cancel a batch with status '{status}'.", headers=headers)
        if status in ("validating", "in_progress"):
            with self.store.write() as connection:
                connection.execute(
                    "UPDATE batches SET cancel_at = ? WHERE id = ? AND cancel_at IS NULL AND final IS NULL",
                    (now, batch_id),
                )
        return json_response(self._view(self._batch(batch_id), now))

    def list_batches(self, request: Request) -> Response:
        query = read_query(request, "limit", "after")
        limit = read_limit(query, 20, 100)
        before = self._position("batches", query["after"]) if "after" in query else 1 << 62
        rows = self.store.all(
            "SELECT * FROM batches WHERE seq < ? ORDER BY seq DESC LIMIT ?", before, limit + 1
        )
        now, began = self.now(), time.monotonic()
        batches = []
        for row in rows[:limit]:
            batch = Record.of(row)
            if time.monotonic() - began < LIST_BUDGET:
                batch = work.advance(self.store, batch, now)
            batches.append(self._view(batch, now))
        return page(batches, more=len(rows) > limit)

    def list_models(self, request: Request) -> Response:
        names = (faults.PREFIX + faults.CHAT, faults.PREFIX + faults.EMBED)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "anybatch"} for name in names]
        return json_response({"object": "list", "data": models})


_ID = r"([\w-]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Response]]] = [
    ("POST", re.compile(r"/v1/files"), App.create_file),
    ("GET", re.compile(r"/v1/files"), App.list_files),
    ("GET", re.compile(rf"/v1/files/{_ID}"), App.get_file),
    ("DELETE", re.compile(rf"/v1/files/{_ID}"), App.delete_file),
    ("GET", re.compile(rf"/v1/files/{_ID}/content"), App.get_content),
    ("POST", re.compile(r"/v1/batches"), App.create_batch),
    ("GET", re.compile(r"/v1/batches"), App.list_batches),
    ("GET", re.compile(rf"/v1/batches/{_ID}"), App.get_batch),
    ("POST", re.compile(rf"/v1/batches/{_ID}/cancel"), App.cancel_batch),
    ("GET", re.compile(r"/v1/models"), App.list_models),
]


def _file_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": int(row["created"]),
        "expires_at": None if row["expires"] is None else int(row["expires"]),
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }
