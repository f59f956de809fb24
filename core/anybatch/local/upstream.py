"""Batches answered by a real chat endpoint: a worker inside `anybatch serve` sends the rows, a few at a time.

Each answer is committed as it comes, so a restarted server continues where it was. Only one server works on a
batch: it holds the batch's claim until the end.
"""

import asyncio
import json
import logging
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

from .closing import finalise_upstream
from .machine import Json, Record
from .standin import error_body
from .store import Store
from .validation import read_lines
from .work import load, validate

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between looks for new batches, cancels and expiry
BATCHES_AT_ONCE = 8
ROWS_AHEAD = 64  # input lines read at once, in a thread
TRIES = 6  # of a row that the endpoint answers with 5xx, or not within the timeout
LONGEST_PAUSE = 30.0
MAX_RETRY_AFTER = 600.0


@dataclass(frozen=True)
class Upstream:
    """The endpoint that answers: `base_url` ends in /v1; `concurrency` rows are under way at once."""

    base_url: str
    key: str | None = None
    concurrency: int = 8
    timeout: float = 600.0


class Worker:
    """Runs the batches of `store` that wait for a real model; `transport` is for tests."""

    def __init__(
        self,
        store: Store,
        upstream: Upstream,
        *,
        now: Callable[[], float],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._now = now
        self._transport = transport
        self._rows = asyncio.Semaphore(upstream.concurrency)
        self._batches: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Work until cancelled; what is under way then is taken up by the next run."""
        headers = {"authorization": f"Bearer {self._upstream.key}"} if self._upstream.key else {}
        limits = httpx.Limits(max_connections=self._upstream.concurrency)
        async with httpx.AsyncClient(
            headers=headers, timeout=self._upstream.timeout, limits=limits, transport=self._transport
        ) as client:
            try:
                while True:
                    try:
                        await self._start_batches(client)
                    except sqlite3.Error as error:
                        logger.error("cannot read the database, trying again: %s", error)
                    await asyncio.sleep(LOOK_EVERY)
            finally:
                for task in self._batches.values():
                    task.cancel()
                await asyncio.gather(*self._batches.values(), return_exceptions=True)

    async def _start_batches(self, client: httpx.AsyncClient) -> None:
        for batch_id, task in list(self._batches.items()):
            if task.done():
                del self._batches[batch_id]
                if error := task.exception():
                    logger.error("batch %s stopped and is tried again: %s", batch_id, error)
        sql = "SELECT id FROM batches WHERE upstream AND final IS NULL ORDER BY seq LIMIT ?"
        for row in await asyncio.to_thread(self._store.all, sql, BATCHES_AT_ONCE):
            if row["id"] not in self._batches and len(self._batches) < BATCHES_AT_ONCE:
                self._batches[row["id"]] = asyncio.create_task(self._work(client, row["id"]))

    async def _work(self, client: httpx.AsyncClient, batch_id: str) -> None:
        with self._store.claim(batch_id) as mine:
            batch = load(self._store, batch_id)
            if not mine or batch is None or batch.final is not None:
                return
            await asyncio.to_thread(validate, self._store, batch)
            batch = await self._enter(batch, "in_progress")
            if _open(batch):
                await self._answer_rows(client, batch)
                batch = await self._enter(batch, "finalizing")
            await asyncio.to_thread(finalise_upstream, self._store, batch, self._now())

    async def _enter(self, batch: Record, status: str) -> Record:
        return await asyncio.to_thread(enter, self._store, batch.id, status, self._now())

    async def _answer_rows(self, client: httpx.AsyncClient, batch: Record) -> None:
        """Answer every row that has no answer yet; returns early when the batch is cancelled or expires."""
        rows = asyncio.create_task(self._send_rows(client, batch))
        try:
            while not (await asyncio.wait([rows], timeout=LOOK_EVERY))[0]:
                fresh = await asyncio.to_thread(load, self._store, batch.id)
                if fresh is None or not _open(fresh) or fresh.expires <= self._now():
                    return
            rows.result()
        finally:
            rows.cancel()
            await asyncio.wait([rows])

    async def _send_rows(self, client: httpx.AsyncClient, batch: Record) -> None:
        async with asyncio.TaskGroup() as group:
            unanswered = self._unanswered(batch)
            while some := await asyncio.to_thread(lambda: list(islice(unanswered, ROWS_AHEAD))):
                for line, request in some:
                    await self._rows.acquire()
                    task = group.create_task(self._answer_row(client, batch, line, request))
                    task.add_done_callback(lambda _: self._rows.release())

    def _unanswered(self, batch: Record) -> Iterator[tuple[int, Json]]:
        sql = "SELECT line FROM results WHERE batch_id = ?"
        done = {row["line"] for row in self._store.all(sql, batch.id)}
        with self._store.blob(batch.input_file_id).open("rb") as lines:
            for line, request in read_lines(lines):
                if line not in done:
                    yield line, request

    async def _answer_row(self, client: httpx.AsyncClient, batch: Record, line: int, request: Json) -> None:
        url = self._upstream.base_url.rstrip("/") + batch.endpoint.removeprefix("/v1")
        status, body = await ask(client, url, request["body"])
        await asyncio.to_thread(record, self._store, batch.id, line, status, body)


def _open(batch: Record) -> bool:
    return not batch.invalid and batch.cancel_at is None


def enter(store: Store, batch_id: str, status: str, now: float) -> Record:
    """Note that an open batch entered `status`; returns the batch as it is then."""
    batch = _load(store, batch_id)
    events = json.loads(batch.events)
    if _open(batch) and all(known != status for _, known in events):
        with store.write() as connection:
            update = "UPDATE batches SET events = ? WHERE id = ?"
            connection.execute(update, (json.dumps([*events, (now, status)]), batch_id))
    return _load(store, batch_id)


def _load(store: Store, batch_id: str) -> Record:
    batch = load(store, batch_id)
    if batch is None:
        raise LookupError(f"batch {batch_id} is gone from the database")
    return batch


def record(store: Store, batch_id: str, line: int, status: int, body: Json) -> None:
    """Commit one row's answer and count it; a second one, or one after the batch's end, is dropped."""
    good = int(status < 400)
    with store.write() as connection:
        insert = (
            "INSERT OR IGNORE INTO results"
            " SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM batches WHERE id = ?1 AND final IS NULL)"
        )
        if connection.execute(insert, (batch_id, line, good, json.dumps([status, body]))).rowcount:
            update = "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?"
            connection.execute(update, (good, 1 - good, batch_id))


async def ask(client: httpx.AsyncClient, url: str, body: Json) -> tuple[int, Json]:
    """(HTTP status, body) of one request, repeated while that may help.

    429 and a host that cannot be reached are waited out for as long as the batch lasts; 5xx, time-outs and
    broken connections are tried TRIES times.
    """
    attempt = failures = 0
    while True:
        attempt += 1
        wait = None
        try:
            response = await client.post(url, json=body)
        except httpx.ConnectError as error:
            logger.warning("upstream endpoint unreachable, waiting: %r", error)
        except httpx.TransportError as error:
            failures += 1
            if failures >= TRIES:
                message = f"The upstream endpoint did not answer: {error!r}"
                return 504, error_body(message, "server_error", None)
        else:
            failures += response.status_code >= 500
            answer = _read(response)
            if not _worth_repeating(response.status_code, answer) or failures >= TRIES:
                good = isinstance(answer, dict) or response.status_code >= 400
                return response.status_code if good else 502, _as_body(answer, response)
            wait = _retry_after(response)
        pause = min(LONGEST_PAUSE, 0.5 * 2 ** min(attempt, 10)) * random.uniform(0.75, 1)
        await asyncio.sleep(pause if wait is None else wait)


def _worth_repeating(status: int, answer: Any) -> bool:
    error = answer.get("error") if isinstance(answer, dict) else None
    spent = isinstance(error, dict) and error.get("code") == "insufficient_quota"
    return (status in (408, 409, 429) or status >= 500) and not spent


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(max(float(response.headers["retry-after"]), 0.0), MAX_RETRY_AFTER)
    except (KeyError, ValueError):
        return None


def _read(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _as_body(answer: Any, response: httpx.Response) -> Json:
    if isinstance(answer, dict):
        return answer
    message = f"The upstream endpoint answered {response.status_code} without JSON: {response.text[:200]}"
    return error_body(message, "server_error", None)
