"""The database under the local provider."""

import asyncio
import gc
import os
import sqlite3
import weakref
from typing import Any

import httpx
import pytest

from anybatch import AsyncClient, Client, InputError, Outcome, arun_job, join_results, list_batches, run_job
from anybatch.local.store import Store, StoreError, add_file

CHAT = {"role": "user", "content": "x"}


def test_a_commit_that_fails_leaves_the_database_usable(tmp_path):
    """E1 of FAULTS: after one failed commit every later write was refused, so no answer could be recorded."""
    store = Store(tmp_path / "x.db")
    store.all("PRAGMA foreign_keys = ON")
    with store.write() as connection:
        connection.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
        connection.execute("CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), store.write() as connection:
        connection.execute("INSERT INTO b VALUES (1)")
    with store.write() as connection:
        connection.execute("INSERT INTO a VALUES (1)")
    assert [len(store.all(f"SELECT * FROM {name}")) for name in ("a", "b")] == [1, 0]
    store.close()


class Recorded(sqlite3.Connection):
    """A connection that knows whether it is open."""

    @property
    def is_open(self) -> bool:
        try:
            self.cursor().close()
        except sqlite3.ProgrammingError:
            return False
        return True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """All connections, as they are opened."""
    connect, opened = sqlite3.connect, []

    def recorded(*args: Any, **options: Any) -> Recorded:
        opened.append(connect(*args, factory=Recorded, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    return opened


def still_open(opened: list[Recorded]) -> int:
    assert opened
    return sum(connection.is_open for connection in opened)


LINES = [
    {"custom_id": f"row-{number}", "body": {"model": "local:echo?delay=0", "messages": [CHAT]}}
    for number in range(3)
]


def test_a_job_closes_what_it_opens(tmp_path, opened):
    """J1 of FAULTS: from 3.13 on Python says so itself ("unclosed database")."""
    base = f"sqlite://{tmp_path}/x.db"
    lines = [{"method": "POST", "url": "/v1/chat/completions", **line} for line in LINES]
    report = run_job("local", lines, tmp_path / "out", api_base=base)
    assert report.counts[Outcome.SUCCEEDED] == 3
    asyncio.run(arun_job("local", lines, tmp_path / "async", api_base=base))
    with pytest.raises(InputError):
        run_job("local", [*lines, *lines], tmp_path / "again", api_base=base)
    table = [{"id": "row-2"}, {"id": "row-0"}, {"id": "row-1"}]
    assert len(list(join_results(table, report, id_column="id"))) == 3
    next(join_results(table, report, id_column="id"))  # and no further
    list_batches("local", api_base=base)
    assert still_open(opened) == 0


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("wrong", [{"proxy": "ftp://nowhere"}, {"event_hooks": 1}])
def test_a_client_that_cannot_be_made_leaves_nothing_open(tmp_path, opened, client, wrong):
    with pytest.raises((ValueError, AttributeError)):
        client("local", api_base=f"sqlite://{tmp_path}/x.db", client_args=wrong)
    assert still_open(opened) == 0


def test_a_client_with_a_transport_of_its_own_opens_no_database(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", None)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"data": [], "has_more": False}))
    path = tmp_path / "x.db"
    with Client("local", api_base=f"sqlite://{path}", client_args={"transport": transport}) as client:
        assert list(client.list()) == []
    assert not path.exists()


def test_a_file_that_is_no_database_is_closed(tmp_path, opened):
    (tmp_path / "x.db").write_text("this is not a database, it is a text of some length\n" * 50)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path / "x.db")
    assert still_open(opened) == 0


def test_what_is_under_way_at_the_close_is_recorded_and_closed(tmp_path, opened):
    store = Store(tmp_path / "x.db")
    store.close()
    with store.write() as connection:  # a thread that cannot be cancelled, with an answer that was paid for
        add_file(connection, "file-1", created=0, size=1, filename="a", purpose="batch", lifetime=None)
        assert len(store.all("SELECT * FROM files")) == 1
    assert [row["id"] for row in store.all("SELECT id FROM files")] == ["file-1"]
    assert still_open(opened) == 0
    store.close()


def test_a_forked_child_does_not_close_its_parents_connection(tmp_path, opened, monkeypatch):
    store = Store(tmp_path / "x.db")
    connection = weakref.ref(opened.pop())
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        store.close()
    gc.collect()  # a connection that nothing holds any more closes itself
    inherited = connection()
    assert inherited is not None
    assert inherited.is_open
    inherited.close()
