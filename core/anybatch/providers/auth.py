"""Authentication per host: an account's credentials go to its own hosts, and to no other.

Signed URLs and redirects to other hosts carry their own permission, and must not see a key. A provider's
`auth()` returns a HostAuth; the drivers ask its `trusts` before they send the user's own headers to a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping


class HostAuth(httpx.Auth):
    """Authenticates each request by its host, and requests to other hosts not at all.

    An auth may send headers, sign the body (`requires_request_body`), or fetch and refresh tokens: anything
    that an `httpx.Auth` can do.
    """

    def __init__(self, hosts: Mapping[str, httpx.Auth]) -> None:
        """Set up the hosts.

        Args:
            hosts: The auth for each base URL.
        """
        self._hosts = {_origin(httpx.URL(base)): auth for base, auth in hosts.items()}

    def trusts(self, url: httpx.URL) -> bool:
        """Return whether headers that identify the account may be sent to a URL.

        Args:
            url: The URL of a request.

        Returns:
            Whether its origin is one of the account's own hosts.
        """
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
    """Authenticates by headers that carry a key."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """Set up the headers.

        Args:
            headers: The headers to add to every request.
        """
        self._headers = headers

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(self._headers)
        yield request


_NOTHING = httpx.Auth()


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
