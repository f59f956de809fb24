"""The servers a cluster needs and does not start: a database and a broker of its own on them."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import psycopg2
import redis

if TYPE_CHECKING:
    from collections.abc import Iterator

POSTGRES = "postgres@127.0.0.1:5432"
REDIS = "redis://127.0.0.1:6379"
_CLAIM = "anybatch-cluster"


def missing() -> str | None:
    """Which of the servers is not there, None if both are."""
    try:
        _administer("SELECT 1")
    except psycopg2.OperationalError as error:
        return f"no PostgreSQL: {error}"
    try:
        with contextlib.closing(redis.Redis.from_url(REDIS)) as client:
            client.ping()
    except redis.ConnectionError as error:
        return f"no Redis: {error}"
    return None


@contextlib.contextmanager
def own_database() -> Iterator[str]:
    """A new database, dropped at the end: `user@host:port/name`."""
    name = f"anybatch_cluster_{uuid.uuid4().hex[:8]}"
    _administer(f"CREATE DATABASE {name}")
    try:
        yield f"{POSTGRES}/{name}"
    finally:
        _administer(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def own_broker() -> Iterator[str]:
    """The URL of a Redis database that nobody uses, emptied at the end."""
    for number in range(1, 16):
        url = f"{REDIS}/{number}"
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            if client.dbsize() or not client.set(_CLAIM, "1", nx=True):
                continue
            try:
                yield url
            finally:
                client.flushdb()
            return
    raise RuntimeError(f"all databases of {REDIS} are in use")


def connect(address: str) -> Any:
    """A connection that commits each statement."""
    connection = psycopg2.connect(f"postgresql://{address}")
    connection.autocommit = True
    return connection


def _administer(statement: str) -> None:
    with contextlib.closing(connect(f"{POSTGRES}/postgres")) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
