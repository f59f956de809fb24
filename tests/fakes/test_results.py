"""Ends of a batch, and the oddities of result files: one test case each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.dialects import DIALECTS
from tests.fakes.driving import (
    FIVE,
    create,
    results,
    rows,
    serving,
    upload,
)
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import Auto, State
from tests.fakes.rows import SEPARATORS, Failure, Quirks

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT = ("response", "body", "choices", 0, "message", "content")


def at(value: Any, *path: str | int) -> Any:
    for step in path:
        value = value[step]
    return value


def contents(output: bytes) -> dict[str, str]:
    return {row["custom_id"]: at(row, *CONTENT) for row in rows(output)}


ALL = [row["custom_id"] for row in FIVE]


@pytest.mark.parametrize(
    ("quirks", "failed", "check"),
    [
        (Quirks(shuffled=True), 0, lambda out, err: sorted(contents(out)) == ALL != list(contents(out))),
        (Quirks(), 5, lambda out, err: out is None and len(rows(err)) == 5),
        (Quirks(), 0, lambda out, err: err is None and len(rows(out)) == 5),
        (Quirks(files="both"), 0, lambda out, err: err == b"" and len(rows(out)) == 5),
        (Quirks(files="output"), 2, lambda out, err: err is None and len(rows(out)) == 5),
        (Quirks(files="error"), 2, lambda out, err: out is None and len(rows(err)) == 5),
        (Quirks(files="neither"), 2, lambda out, err: out is None and err is None),
        (Quirks(missing=["r1"]), 0, lambda out, err: list(contents(out)) == ["r0", "r2", "r3", "r4"]),
        (Quirks(extra=["ghost"]), 0, lambda out, err: list(contents(out)) == [*ALL, "ghost"]),
        (
            Quirks(duplicated=["r1"]),
            0,
            lambda out, err: (
                [at(row, *CONTENT) for row in rows(out) if row["custom_id"] == "r1"]
                == ["echo: say r1", "echo: say r1 (again)"]
            ),
        ),
        (
            Quirks(separators=["r2"]),
            0,
            lambda out, err: (
                SEPARATORS.encode() in out and contents(out)["r2"] == "echo: say r2" + SEPARATORS
            ),
        ),
        (
            Quirks(bad_utf8=["r2"]),
            0,
            lambda out, err: out.count(b"\xff") == 1 and b"say r2\xff" in out.split(b"\n")[2],
        ),
        (
            Quirks(bad_json=["r4"]),
            0,
            lambda out, err: out.split(b"\n")[4].startswith(b'{"id"') and not out.endswith(b"}\n"),
        ),
        (
            Quirks(body_as_text=True),
            1,
            lambda out, err: json.loads(rows(out)[0]["response"]["body"])["object"] == "chat.completion",
        ),
        (Quirks(blank_lines=True), 0, lambda out, err: out.count(b"\n") == 9 and len(rows(out)) == 5),
        (Quirks(crlf=True), 0, lambda out, err: out.count(b"\r\n") == out.count(b"\n") == 5),
        (Quirks(unterminated=True), 0, lambda out, err: out.endswith(b"}") and len(rows(out)) == 5),
    ],
)
def test_quirks_of_result_files(quirks: Quirks, failed: int, check: Callable[[Any, Any], bool]) -> None:
    fake = OpenAIFake(quirks=quirks)
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        fake.finish(batch_id, failed=failed)
        batch = client.get(f"batches/{batch_id}").json()
        completed = 5 - failed - len(quirks.missing)
        assert batch["request_counts"] == {"total": 5, "completed": completed, "failed": failed}
        assert check(*results(client, batch))


def test_error_as_text_and_failures_of_any_status() -> None:
    fake = OpenAIFake(DIALECTS["deepinfra"])
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        failure = Failure(429, "rate_limit_exceeded", "Slow down.")
        fake.finish(batch_id, failed=1, failure=failure, quirks=Quirks(error_as_text=True))
        _, error = results(client, client.get(f"batches/{batch_id}").json())
        assert error is not None
        assert rows(error)[0] == {
            "id": "batch_req_r0",
            "custom_id": "r0",
            "response": None,
            "error": "Slow down.",
        }


def test_files_named_some_looks_after_completion() -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        fake.finish(batch_id, quirks=Quirks(files_after_looks=2))
        seen = [client.get(f"batches/{batch_id}").json() for _ in range(3)]
        assert [one["status"] for one in seen] == ["completed"] * 3
        assert [one["request_counts"]["completed"] for one in seen] == [5, 5, 5]
        assert [one["output_file_id"] is None for one in seen] == [True, True, False]


def test_expired_and_cancelled_batches_keep_finished_rows() -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        expired, cancelled = (create(client, *FIVE).json()["id"] for _ in range(2))
        fake.expire(expired, done=3, failed=["r1"])
        batch = client.get(f"batches/{expired}").json()
        assert (batch["status"], batch["expired_at"] is None) == ("expired", False)
        output, error = results(client, batch)
        assert output is not None
        assert error is not None
        assert list(contents(output)) == ["r0", "r2"]
        assert [(row["error"] or {}).get("code") for row in rows(error)] == [None, *["batch_expired"] * 2]
        fake.cancel_looks = None
        assert client.post(f"batches/{cancelled}/cancel").json()["status"] == "cancelling"
        assert client.get(f"batches/{cancelled}").json()["status"] == "cancelling"
        fake.cancel_now(cancelled, done=["r4"])
        batch = client.get(f"batches/{cancelled}").json()
        output, error = results(client, batch)
        assert output is not None
        assert (batch["status"], list(contents(output)), error) == ("cancelled", ["r4"], None)
        assert client.post(f"batches/{cancelled}/cancel").status_code == 409
        assert fake.live_batches() == []


def test_cancel_keeps_the_rows_that_progress_has_shown() -> None:
    fake = OpenAIFake()
    fake.cancel_looks = 0
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        fake.set_progress(batch_id, completed=2, failed=1)
        client.post(f"batches/{batch_id}/cancel")
        batch = client.get(f"batches/{batch_id}").json()
        assert (batch["status"], batch["request_counts"]["completed"]) == ("cancelled", 2)


def test_unknown_status_stays_until_told_otherwise() -> None:
    fake = OpenAIFake(auto=Auto(looks=3))
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        fake.start(batch_id)
        fake.set_status(batch_id, "paused_for_maintenance")
        seen = [client.get(f"batches/{batch_id}").json()["status"] for _ in range(3)]
        assert seen == ["paused_for_maintenance", "paused_for_maintenance", "completed"]


def test_batches_end_by_themselves() -> None:
    now = [1_000.0]
    by_looks, by_time = (
        OpenAIFake(auto=Auto(looks=2)),
        OpenAIFake(auto=Auto(seconds=60), clock=lambda: now[0]),
    )
    with serving(by_looks) as (_, client):
        url = f"batches/{create(client, *FIVE).json()['id']}"
        assert [client.get(url).json()["status"] for _ in range(2)] == ["in_progress", "completed"]
    with serving(by_time) as (_, client):
        url = f"batches/{create(client, *FIVE).json()['id']}"
        assert client.get(url).json()["status"] == "in_progress"
        now[0] += 60
        assert client.get("batches").json()["data"][0]["status"] == "completed"  # a list is a look as well
    expiring = OpenAIFake(auto=Auto(looks=1, end=lambda fake, batch_id: fake.expire(batch_id, done=1)))
    with serving(expiring) as (_, client):
        assert client.get(f"batches/{create(client, *FIVE).json()['id']}").json()["status"] == "expired"


def test_commands_guard_against_mistakes_of_the_test() -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        batch_id = create(client, *FIVE).json()["id"]
        with pytest.raises(AssertionError, match="no such rows: \\['r9'\\]"):
            fake.finish(batch_id, failed=["r9"])
        fake.finish(batch_id)
        with pytest.raises(AssertionError, match="is completed already"):
            fake.expire(batch_id)


def test_ledger_of_batches() -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        first, second, third = (
            create(client, *FIVE, metadata={"job": job, "n": "1"}).json()["id"] for job in "aab"
        )
        client.post(f"batches/{first}/cancel")
        assert list(fake.batches) == [first, second, third]
        assert [batch.id for batch in fake.live_batches({"job": "a"})] == [second]
        assert [batch.id for batch in fake.live_batches()] == [second, third]
        assert (fake.last.id, fake.last.state, fake.uploads) == (third, State.VALIDATING, 3)


def test_openai_list_pages() -> None:
    fake = OpenAIFake()
    with serving(fake) as (_, client):
        ids = [create(client, *FIVE).json()["id"] for _ in range(5)][::-1]
        pages = [client.get("batches?limit=2").json()]
        while pages[-1]["has_more"]:
            pages.append(client.get(f"batches?limit=2&after={pages[-1]['last_id']}").json())
        assert [[batch["id"] for batch in page["data"]] for page in pages] == [ids[:2], ids[2:4], ids[4:]]
        assert client.get("batches?after=batch_none").status_code == 400
        fake.endless_list = True
        page = client.get(f"batches?limit=2&after={ids[-1]}").json()
        assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (ids[3:], True)
        files = client.get("files?purpose=batch&order=asc&limit=3").json()
        assert (len(files["data"]), files["has_more"]) == (3, True)


@pytest.mark.parametrize(
    ("ranges", "header", "status", "content"),
    [
        (True, "bytes=3-", 206, b"3456789"),
        (True, "bytes=3-5", 206, b"345"),
        (True, "bytes=3-99", 206, b"3456789"),
        (True, "bytes=10-", 416, b""),
        (False, "bytes=3-", 200, b"0123456789"),
    ],
)
def test_content_ranges(ranges: bool, header: str, status: int, content: bytes) -> None:
    with serving(OpenAIFake(ranges=ranges)) as (_, client):
        file_id = upload(client, data=b"0123456789").json()["id"]
        reply = client.get(f"files/{file_id}/content", headers={"range": header})
        assert (reply.status_code, reply.content) == (status, content)
