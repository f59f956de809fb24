"""The endpoints as OpenAI's: shapes, paging, refusals."""

import asyncio
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from anybatch.local import App, LocalTransport, Request, database_path

CREATE = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_a_file_comes_back_as_it_was_sent(desk):
    content = '{"a": "\u2028"}\r\n--x\r\n'.encode() + bytes(range(256)) * 3000
    sent = desk.upload(content, name='we"ird ü.jsonl').json()
    assert sent == desk.client.get(f"/files/{sent['id']}").json()
    assert (sent["object"], sent["bytes"], sent["purpose"], sent["status"]) == (
        "file",
        len(content),
        "batch",
        "processed",
    )
    assert sent["expires_at"] - sent["created_at"] == 30 * 24 * 3600
    response = desk.client.get(f"/files/{sent['id']}/content")
    assert response.content == content
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=90-", 206, 90, 100),
        ("bytes=-5", 206, 95, 100),
        ("bytes=-500", 206, 0, 100),
        ("bytes=99-1000", 206, 99, 100),
        ("bytes=100-", 416, 0, 0),
        ("bytes=9-3", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=0-1,5-6", 200, 0, 100),
        ("lines=1-2", 200, 0, 100),
    ],
)
def test_content_by_range(desk, header, status, start, stop):
    content = bytes(range(100))
    file_id = desk.upload(content).json()["id"]
    response = desk.client.get(f"/files/{file_id}/content", headers={"range": header})
    assert response.status_code == status
    if status == 416:
        assert response.headers["content-range"] == "bytes */100"
    else:
        assert response.content == content[start:stop]
        assert response.headers["content-length"] == str(stop - start)
    if status == 206:
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/100"


def test_files_are_listed_by_purpose_order_and_page(desk):
    ids = [desk.upload(b"{}\n", purpose=purpose).json()["id"] for purpose in ("batch", "user_data", "batch")]

    def listed(**query: object) -> list[str]:
        return [file["id"] for file in desk.client.get("/files", params=query).json()["data"]]

    assert listed() == ids[::-1]
    assert listed(order="asc") == ids
    assert listed(purpose="batch") == [ids[2], ids[0]]
    first = desk.client.get("/files", params={"limit": 2}).json()
    assert (first["has_more"], first["last_id"]) == (True, ids[1])
    assert listed(after=ids[1]) == [ids[0]]


def test_batches_are_listed_newest_first_in_pages(desk, requests):
    ids = [desk.create(requests(1))["id"] for _ in range(5)][::-1]
    seen: list[str] = []
    query: dict[str, object] = {"limit": 2}
    while True:
        page = desk.client.get("/batches", params=query).json()
        found = [batch["id"] for batch in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", found[0], found[-1])
        seen += found
        query["after"] = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == ids
    desk.clock.time += 100
    assert {batch["status"] for batch in desk.client.get("/batches").json()["data"]} == {"completed"}
    empty = desk.client.get("/batches", params={"after": ids[-1]}).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_deleted_input_lasts_until_its_batch_has_ended(desk, requests):
    batch = desk.create(requests(2))
    file_id = batch["input_file_id"]
    assert desk.client.delete(f"/files/{file_id}").json() == {
        "id": file_id,
        "object": "file",
        "deleted": True,
    }
    assert desk.client.get(f"/files/{file_id}").status_code == 404
    assert desk.client.delete(f"/files/{file_id}").status_code == 404
    done = desk.look(batch["id"], 100)
    assert done["request_counts"]["completed"] == 2
    kept = {path.name for path in (desk.path.parent / "local.db.files").iterdir()}
    assert kept == {done["output_file_id"], "open.lock"}


def test_files_expire(desk):
    sent = desk.client.post(
        "/files",
        files={"file": ("a.jsonl", b"{}\n")},
        data={"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    ).json()
    assert sent["expires_at"] - sent["created_at"] == 3600
    desk.clock.time += 3601
    assert desk.client.get(f"/files/{sent['id']}/content").status_code == 404
    assert desk.client.get("/files").json()["data"] == []
    desk.upload(b"{}\n")
    assert not (desk.path.parent / "local.db.files" / sent["id"]).exists()


@pytest.mark.parametrize(
    ("data", "files", "expected"),
    [
        ({"purpose": "batch"}, {"file": ("a.json", b"{}")}, "Must be .jsonl"),
        ({"purpose": "fun"}, {"file": ("a.jsonl", b"{}")}, "'fun' is not one of"),
        ({}, {"file": ("a.jsonl", b"{}")}, "'purpose'"),
        ({"purpose": "batch"}, {"other": ("a.jsonl", b"{}")}, "'file'"),
        ({"purpose": "batch", "expires_after[seconds]": "5"}, {"file": ("a.jsonl", b"{}")}, "from 3600"),
    ],
)
def test_a_refused_upload_leaves_nothing(desk, data, files, expected):
    response = desk.client.post("/files", data=data, files=files)
    assert response.status_code == 400
    assert expected in response.json()["error"]["message"]
    assert desk.client.get("/files").json()["data"] == []
    assert {path.name for path in (desk.path.parent / "local.db.files").iterdir()} == {"open.lock"}


def test_an_upload_that_is_not_multipart(desk):
    response = desk.client.post("/files", content=b"{}")
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/videos"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"colour": "red"}, "colour"),
        ({"metadata": ["a"]}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"n": 1}}, "metadata.n"),
        ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 64),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_a_refused_create_names_its_parameter(desk, requests, change, param):
    file_id = desk.upload(requests(1)).json()["id"]
    response = desk.client.post("/batches", json=CREATE | {"input_file_id": file_id} | change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert desk.client.get("/batches").json()["data"] == []


@pytest.mark.parametrize("window", ["24h", "7d", "30m", "90s"])
def test_windows(desk, requests, window):
    batch = desk.create(requests(1), completion_window=window)
    expected = {"24h": 86400, "7d": 604800, "30m": 1800, "90s": 90}[window]
    assert (batch["completion_window"], batch["expires_at"] - batch["created_at"]) == (window, expected)


def test_metadata_at_its_limits_comes_back(desk, requests):
    metadata = {f"{n:064}": "v" * 512 for n in range(16)}
    batch = desk.create(requests(1), metadata=metadata)
    assert desk.look(batch["id"])["metadata"] == metadata


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/files/file-none", 404),
        ("GET", "/files/file-none/content", 404),
        ("GET", "/batches/batch_none", 404),
        ("POST", "/batches/batch_none/cancel", 404),
        ("GET", "/batches?after=batch_none", 400),
        ("GET", "/batches?limit=0", 400),
        ("GET", "/batches?limit=101", 400),
        ("GET", "/batches?limit=x", 400),
        ("GET", "/batches?since=1", 400),
        ("GET", "/files?order=up", 400),
        ("GET", "/files/../../etc/passwd/content", 404),
        ("GET", "/nowhere", 404),
        ("PUT", "/batches", 405),
        ("POST", "/batches", 400),
    ],
)
def test_refusals_are_openais_error_body(desk, method, path, status):
    response = desk.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_an_input_file_must_be_for_batches(desk):
    file_id = desk.upload(b"{}\n", purpose="user_data").json()["id"]
    assert desk.client.post("/batches", json=CREATE | {"input_file_id": file_id}).status_code == 400
    assert desk.client.post("/batches", json=CREATE | {"input_file_id": "file-none"}).status_code == 404


def test_models_are_the_stand_ins(desk):
    assert [model["id"] for model in desk.client.get("/models").json()["data"]] == [
        "local:echo",
        "local:embed",
    ]


@pytest.mark.parametrize(("header", "status"), [(None, 401), ("Bearer no", 401), ("Bearer sesame", 200)])
def test_a_key_is_demanded_if_one_is_set(tmp_path, header, status):
    app = App(tmp_path / "x.db", api_key="sesame")
    headers = {"authorization": header} if header else {}
    response = app.handle(Request("GET", "/v1/batches", headers=headers))
    app.close()
    assert response.status == status
    assert isinstance(response.body, bytes)
    assert "sesame" not in response.body.decode()


@pytest.mark.parametrize(
    ("api_base", "expected"),
    [
        (None, "/state/anybatch/local.db"),
        ("", "/state/anybatch/local.db"),
        ("sqlite:///a/b.db", "/a/b.db"),
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite:///a%20b.db", "/a b.db"),
        ("/a/b.db", "/a/b.db"),
        ("sqlite:///~/b.db", "/home/me/b.db"),
    ],
)
def test_the_database_an_address_names(monkeypatch, api_base, expected):
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(database_path(api_base)) == expected


def test_the_default_database_is_in_the_users_state_folder(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(database_path(None)) == "/home/me/.local/state/anybatch/local.db"


@pytest.mark.parametrize(
    "api_base", ["http://localhost", "sqlite://", "sqlite:///:memory:", "postgresql://x/y"]
)
def test_an_address_that_names_no_database(api_base):
    with pytest.raises(ValueError, match="local provider"):
        database_path(api_base)


def test_a_database_that_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "plain.db").write_text("this is not a database, it is a text of some length\n" * 50)
    for path in (tmp_path / "plain.db", tmp_path / "plain.db" / "below.db"):
        with pytest.raises(OSError, match="Cannot open the local provider's database"):
            LocalTransport(path)


def test_a_newer_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "x.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(OSError, match="its version is 99"):
        LocalTransport(tmp_path / "x.db")


async def test_async_gives_the_same(tmp_path, clock, requests):
    content = requests(20)

    async def stream():  # a body that only an event loop can read
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    prepared = httpx.Request(
        "POST", "http://local", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}
    )
    body = prepared.read()
    async with httpx.AsyncClient(
        base_url="http://local/v1", transport=LocalTransport(tmp_path / "x.db", now=clock)
    ) as client:
        plain = await client.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"})
        headers = {"content-type": prepared.headers["content-type"]}
        streamed = await client.post("/files", content=stream(), headers=headers)
        for response in (plain, streamed):
            assert response.json()["bytes"] == len(content)
        created = await client.post("/batches", json=CREATE | {"input_file_id": streamed.json()["id"]})
        clock.time += 100
        done = (await client.get(f"/batches/{created.json()['id']}")).json()
        async with client.stream("GET", f"/files/{done['output_file_id']}/content") as response:
            lines = [json.loads(line) async for line in response.aiter_lines()]
        async with client.stream("GET", f"/files/{done['output_file_id']}/content"):
            pass  # left unread
    assert len(lines) == 20


async def test_async_uploads_do_not_wait_for_each_others_threads(tmp_path):
    """Each body is read in asyncio's threads; there are more uploads than threads."""
    form = httpx.Request(
        "POST", "http://local", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"}
    )
    body, content_type = form.read(), form.headers["content-type"]

    async def chunks():
        for at in range(0, len(body), 16):
            yield await asyncio.to_thread(lambda at=at: body[at : at + 16])

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    transport = LocalTransport(tmp_path / "x.db")
    async with (
        httpx.AsyncClient(base_url="http://local/v1", transport=transport) as client,
        asyncio.timeout(30),
    ):
        headers = {"content-type": content_type}
        sent = await asyncio.gather(
            *(client.post("/files", content=chunks(), headers=headers) for _ in range(12))
        )
    assert [response.status_code for response in sent] == [200] * 12


async def test_a_cancelled_upload_does_not_hold_up_the_loop(tmp_path):
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def chunks():
        yield b"--XX\r\n"
        started.set()
        await go_on.wait()

    transport = LocalTransport(tmp_path / "x.db")
    async with (
        httpx.AsyncClient(base_url="http://local/v1", transport=transport) as client,
        asyncio.timeout(20),
    ):
        headers = {"content-type": "multipart/form-data; boundary=XX"}
        upload = asyncio.create_task(client.post("/files", content=chunks(), headers=headers))
        await started.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert (await client.get("/files")).json()["data"] == []
        go_on.set()
