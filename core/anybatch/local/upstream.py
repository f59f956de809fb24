"""Batches answered by a real chat endpoint: a worker inside `anybatch serve` sends the rows, a few at a time.

Each answer is committed when it arrives, so a restarted server continues where it was. Only one server works
on a batch: it holds the batch's claim until the end.

Calls cost money. A row that cannot be sent, an answer that cannot be read, and any unforeseen error are
recorded as that row's failure, and the row is not sent again. Only rows without a recorded end are sent.
"""

import asyncio
import json
import logging
import math
import random
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import httpx

from .closing import finalise_upstream
from .jsontext import UnfitError, encode, read_repaired
from .machine import Json, Record
from .standin import error_body, unsendable
from .store import Store
from .validation import Line, read_lines
from .work import load, validate

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between two checks for new batches, cancels and expiry
BATCHES_AT_ONCE = 8
ROWS_AHEAD = 64  # input lines read at once, in a thread
TRIES = 6  # for a row that the endpoint answers with 5xx, or not within the timeout
LONGEST_PAUSE = 30.0
MAX_RETRY_AFTER = 600.0
MAX_ANSWER = 128 << 20  # decoded bytes; a server killed by one huge answer would request it again


@dataclass(frozen=True)
class Upstream:
    """The endpoint that answers.

    Attributes:
        base_url: Its base URL, which ends in /v1.
        key: Its API key, if it needs one.
        concurrency: How many rows to send at the same time.
        timeout: Seconds to wait for one answer.
    """

    base_url: str
    key: str | None = None
    concurrency: int = 8
    timeout: float = 600.0


class Rest(NamedTuple):
    """A batch that has failed `failures` times in a row, and rests `until` then (the loop's clock)."""

    failures: int
    until: float


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
        self._resting: dict[str, Rest] = {}

    async def run(self) -> None:
        """Work until cancelled; the next run continues unfinished batches."""
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
                    except Exception:  # otherwise the worker would end unnoticed and answer no more batches
                        logger.exception("cannot look for batches, trying again")
                    await asyncio.sleep(LOOK_EVERY)
            finally:
                for task in self._batches.values():
                    task.cancel()
                await asyncio.gather(*self._batches.values(), return_exceptions=True)

    async def _start_batches(self, client: httpx.AsyncClient) -> None:
        now = asyncio.get_running_loop().time()
        self._collect(now)
        sql = "SELECT id FROM batches WHERE upstream AND final IS NULL ORDER BY seq LIMIT ?"
        rows = await asyncio.to_thread(self._store.all, sql, BATCHES_AT_ONCE + len(self._resting))
        waiting = [row["id"] for row in rows]
        self._resting = {name: rest for name, rest in self._resting.items() if name in waiting}
        for batch_id in waiting:
            rests = batch_id in self._resting and now < self._resting[batch_id].until
            if batch_id not in self._batches and not rests and len(self._batches) < BATCHES_AT_ONCE:
                self._batches[batch_id] = asyncio.create_task(self._work(client, batch_id))

    def _collect(self, now: float) -> None:
        """Forget batches that are done. A batch that has failed rests, and leaves its place to others."""
        for batch_id, task in list(self._batches.items()):
            if not task.done():
                continue
            del self._batches[batch_id]
            rest = self._resting.pop(batch_id, Rest(0, now))
            if error := task.exception():
                failures = rest.failures + 1
                self._resting[batch_id] = Rest(failures, now + _pause(failures))
                logger.error("batch %s stopped and is tried again later", batch_id, exc_info=error)

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
        """Answer every row that has no answer yet; return early if the batch is cancelled or expires."""
        rows = asyncio.create_task(self._send_rows(client, batch))
        try:
            while not (await asyncio.wait([rows], timeout=LOOK_EVERY))[0]:
                if await self._is_over(batch.id):
                    return
            rows.result()
        finally:
            rows.cancel()
            await asyncio.wait([rows])

    async def _is_over(self, batch_id: str) -> bool:
        try:
            fresh = await asyncio.to_thread(load, self._store, batch_id)
        except sqlite3.Error as error:  # stopping here would discard answers that are being paid for
            logger.error("cannot read batch %s, trying again: %s", batch_id, error)
            return False
        return fresh is None or not _open(fresh) or fresh.expires <= self._now()

    async def _send_rows(self, client: httpx.AsyncClient, batch: Record) -> None:
        trouble: Exception | None = None
        async with asyncio.TaskGroup() as group:
            unanswered = self._unanswered(batch)
            try:
                while some := await asyncio.to_thread(lambda: list(islice(unanswered, ROWS_AHEAD))):
                    for line in some:
                        await self._rows.acquire()
                        task = group.create_task(self._answer_row(client, batch, line))
                        task.add_done_callback(lambda _: self._rows.release())
            except Exception as error:  # raised inside the group, it would cancel the rows being sent
                trouble = error
        if trouble:
            raise trouble

    def _unanswered(self, batch: Record) -> Iterator[Line]:
        sql = "SELECT line FROM results WHERE batch_id = ?"
        done = {row["line"] for row in self._store.all(sql, batch.id)}
        with self._store.blob(batch.input_file_id).open("rb") as lines:
            for line in read_lines(lines):
                if line.number not in done:
                    yield line

    async def _answer_row(self, client: httpx.AsyncClient, batch: Record, line: Line) -> None:
        """Answer one row and record the result; nothing in a row or its answer makes this raise."""
        try:
            status, body = await self._ask(client, batch, line)
        except Exception as error:  # raised from this task, it would cancel the calls of other rows too
            logger.exception("row %d of batch %s fails", line.number, batch.id)
            # Show only its type: the text may quote a header with the upstream's key.
            message = f"The server failed at this row ({type(error).__name__}); its log says more."
            status, body = 500, error_body(message, "server_error", "internal_error")
        await self._keep(batch.id, line.number, status, body)

    async def _ask(self, client: httpx.AsyncClient, batch: Record, line: Line) -> tuple[int, Json]:
        if line.unfit:
            return unsendable(line.unfit)
        url = self._upstream.base_url.rstrip("/") + batch.endpoint.removeprefix("/v1")
        return await ask(client, url, line.request["body"])

    async def _keep(self, batch_id: str, line: int, status: int, body: Json) -> None:
        """Commit a row's answer, however long the database takes: sending the row again would cost again."""
        failures = 0
        while True:
            try:
                return await asyncio.to_thread(record, self._store, batch_id, line, status, body)
            except sqlite3.Error as error:
                failures += 1
                logger.error("cannot record row %d of batch %s, trying again: %s", line, batch_id, error)
                await asyncio.sleep(_pause(failures))


def _open(batch: Record) -> bool:
    return not batch.invalid and batch.cancel_at is None


def enter(store: Store, batch_id: str, status: str, now: float) -> Record:
    """Record that an open batch enters `status`; return the batch as it is then."""
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
    """Commit one row's answer and count it; drop a second answer, and one after the batch's end."""
    good = int(status < 400)
    with store.write() as connection:
        insert = (
            "INSERT OR IGNORE INTO results"
            " SELECT :id, :line, :good, :answer"
            " WHERE EXISTS (SELECT 1 FROM batches WHERE id = :id AND final IS NULL)"
        )
        answer = {"id": batch_id, "line": line, "good": good, "answer": json.dumps([status, body])}
        if connection.execute(insert, answer).rowcount:
            update = "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?"
            connection.execute(update, (good, 1 - good, batch_id))


async def ask(client: httpx.AsyncClient, url: str, body: Json) -> tuple[int, Json]:
    """Send one request, repeat it while that may help, and return its HTTP status and body.

    A 429 or an unreachable host is waited out for as long as the batch lasts; 5xx, timeouts and broken
    connections are tried TRIES times. An answer that cannot be read is not requested again.
    """
    try:
        headers = {"content-type": "application/json"}
        request = client.build_request("POST", url, content=encode(body), headers=headers)
    except UnfitError as error:
        return unsendable(str(error))
    except (httpx.InvalidURL, UnicodeError):  # do not pass on the message: the URL may hold a password
        return unsendable("its endpoint cannot be part of an address")
    attempt = failures = 0
    while True:
        attempt += 1
        wait = None
        try:
            response, answer = await _exchange(client, request)
        except httpx.ConnectError as error:
            logger.warning("upstream endpoint unreachable, waiting: %r", error)
        except httpx.TransportError as error:
            failures += 1
            if failures >= TRIES:
                message = f"The upstream endpoint did not answer: {error!r}"
                return 504, error_body(message, "server_error", None)
        else:
            status = response.status_code
            failures += status >= 500
            if not _worth_repeating(status, answer) or failures >= TRIES:
                return (status, answer) if isinstance(answer, dict) else _unreadable(status, answer)
            wait = _retry_after(response)
        await asyncio.sleep(_pause(attempt) if wait is None else wait)


def _pause(attempt: int) -> float:
    """Return the seconds to wait after the `attempt`-th failure in a row, with jitter."""
    return min(LONGEST_PAUSE, 0.5 * 2.0 ** min(attempt, 10)) * random.uniform(0.75, 1)


def _worth_repeating(status: int, answer: Json | UnfitError) -> bool:
    error = answer.get("error") if isinstance(answer, dict) else None
    spent = isinstance(error, dict) and error.get("code") == "insufficient_quota"
    return (status in (408, 409, 429) or status >= 500) and not spent


def _retry_after(response: httpx.Response) -> float | None:
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER)


async def _exchange(
    client: httpx.AsyncClient, request: httpx.Request
) -> tuple[httpx.Response, Json | UnfitError]:
    """Return the response to `request` and its JSON object, or why that cannot be read."""
    response = await client.send(request, stream=True)
    try:
        return response, _read(await _receive(response))
    except httpx.DecodingError as error:
        return response, UnfitError(f"its compression is broken ({error})")
    except UnfitError as error:
        return response, error
    finally:
        await response.aclose()


async def _receive(response: httpx.Response) -> bytes:
    content = bytearray()
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_bytes())) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) > MAX_ANSWER:
                raise UnfitError(f"it is longer than {MAX_ANSWER} bytes")
    return bytes(content)


def _read(content: bytes) -> Json:
    """Return the JSON object in `content`, with null for numbers such as NaN; UnfitError if there is none."""
    try:
        answer: Any = read_repaired(content.decode(json.detect_encoding(content), "surrogatepass"))
    except UnfitError:
        raise
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    # Decode as UTF-8 whatever the headers say: they can name a charset that raises.
    raise UnfitError(f"it is not a JSON object: {content[:800].decode('utf-8', 'replace')[:200]}")


def _unreadable(status: int, why: UnfitError) -> tuple[int, Json]:
    """Return the HTTP status and body of a row whose answer cannot be used."""
    message = f"The upstream endpoint's answer ({status}) cannot be read: {why}"
    return status if status >= 400 else 502, error_body(message, "server_error", "unreadable_answer")
