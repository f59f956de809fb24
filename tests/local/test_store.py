"""The database under the local provider."""

import sqlite3

import pytest

from anybatch.local.store import Store


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
