"""To whom an account's credentials are shown: its own hosts, and nobody else.

Signed URLs, result URLs and redirects elsewhere carry their own permission and must not see a key. A
provider's `auth()` returns a HostAuth; the flow asks its `trusts` before it sends the caller's own headers
anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping


class HostAuth(httpx.Auth):
    """Each host's own way of signing: a table of base URL -> auth, and nothing for any other host.

    The ways may be headers, a signature over the body (`requires_request_body`) or tokens that are fetched
    and renewed: whatever an `httpx.Auth` can do.
    """

    def __init__(self, hosts: Mapping[str, httpx.Auth]) -> None:
        self._hosts = {_origin(httpx.URL(base)): auth for base, auth in hosts.items()}

    def trusts(self, url: httpx.URL) -> bool:
        """Whether what identifies the account may be shown there."""
        return _origin(url) in self._hosts

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        auth = self._hosts.get(_origin(request.url), _NOTHING)
        yield from auth.sync_auth_flow(request)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        flow = self._hosts.get(_origin(request.url), _NOTHING).async_auth_flow(request)
        try:
            following = await anext(flow)
            while True:
                following = await flow.asend((yield following))
        except StopAsyncIteration:
            return
        finally:
            await flow.aclose()


class HeaderAuth(httpx.Auth):
    """Headers that carry a key."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(self._headers)
        yield request


_NOTHING = httpx.Auth()


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
