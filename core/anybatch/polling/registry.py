"""The watchers of a process: one for each event loop and account."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from .source import MakeClient
from .watcher import Watcher

__all__ = ["get_watcher", "watcher_key"]

_Watchers = WeakValueDictionary[str, Watcher]
_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watchers] = WeakKeyDictionary()


def watcher_key(account_key: str, client_args: Mapping[str, Any]) -> str:
    """What polls are shared by: the account (`Account.key`), and the way its requests go.

    Clients of one account that differ in `client_args` (a tenant's headers, a proxy) are kept apart.
    """
    if not client_args:
        return account_key
    return f"{account_key}+{hashlib.sha256(_distinct_text(client_args).encode()).hexdigest()[:8]}"


def _distinct_text(value: object) -> str:
    """A text that differs where the values differ; the repr of httpx's headers hides some of theirs."""
    if isinstance(value, Mapping):
        return repr(sorted((str(name), _distinct_text(one)) for name, one in value.items()))
    return str(value)


def get_watcher(key: str, make_client: MakeClient) -> Watcher:
    """The running loop's watcher of this key (`watcher_key`), made if there is none.

    `make_client` is called, and the client entered and left, by the watcher and only if it has none open:
    whoever comes second makes no client. The client must not repeat failed calls by itself for long, since
    repeating is what the watcher does. The registry keeps nothing alive: a watcher lives as long as someone
    holds it or waits.
    """
    watchers = _watchers.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    watcher = watchers.get(key)
    if watcher is None:
        watcher = watchers[key] = Watcher(key, make_client)
    return watcher
