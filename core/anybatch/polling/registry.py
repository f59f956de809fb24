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
    """Return the key under which waits share polls: the account (`Account.key`) and the `client_args`.

    Clients of one account with different `client_args` (a tenant's headers, a proxy) do not share polls.
    """
    if not client_args:
        return account_key
    return f"{account_key}+{hashlib.sha256(_distinct_text(client_args).encode()).hexdigest()[:8]}"


def _distinct_text(value: object) -> str:
    """Return a text that differs if the values differ; the repr of httpx's headers would hide some."""
    if isinstance(value, Mapping):
        return repr(sorted((str(name), _distinct_text(one)) for name, one in value.items()))
    return str(value)


def get_watcher(key: str, make_client: MakeClient) -> Watcher:
    """Return the running event loop's watcher for a key (`watcher_key`), and make it if there is none.

    The watcher calls `make_client`, and enters and exits the client, only if it has none open. The client
    must not repeat failed calls for long, since the watcher itself polls again. The registry keeps no watcher
    alive: a watcher lives as long as someone holds it or waits.
    """
    watchers = _watchers.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    watcher = watchers.get(key)
    if watcher is None:
        watcher = watchers[key] = Watcher(key, make_client)
    return watcher
