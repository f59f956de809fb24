"""`anybatch serve`: the application on a port, as an OpenAI-compatible batch server."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.responses import StreamingResponse
from starlette.routing import Route

from .app import App
from .protocol import Request
from .transport import blocking
from .upstream import Upstream, Worker

THREADS = 32
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def asgi(app: App, upstream: Upstream | None = None) -> Starlette:
    """Return the ASGI application; it runs the upstream worker, and closes `app` when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # An upload occupies its thread for as long as the sender takes.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        worker = asyncio.create_task(Worker(app.store, upstream, now=app.now).run()) if upstream else None
        try:
            yield
        finally:
            if worker:
                worker.cancel()
                await asyncio.gather(worker, return_exceptions=True)
            app.close()

    async def answer(request: HttpRequest) -> HttpResponse:
        body = blocking(request.stream(), asyncio.get_running_loop())
        asked = Request(request.method, request.url.path, request.url.query, dict(request.headers), body)
        try:
            response = await asyncio.to_thread(app.handle, asked)
        except ClientDisconnect:  # an upload broke off; nobody reads this answer
            return HttpResponse(status_code=400)
        if isinstance(response.body, bytes):
            return HttpResponse(response.body, response.status, response.headers)
        return StreamingResponse(response.body, response.status, response.headers)

    return Starlette(routes=[Route("/{path:path}", answer, methods=METHODS)], lifespan=lifespan)


def serve(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    upstream: Upstream | None = None,
) -> None:
    """Serve until interrupted. The first printed line names the address.

    Args:
        path: The database file.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        api_key: The key that every request must send; None accepts all.
        upstream: The endpoint that answers batches whose model is not a stand-in.

    Raises:
        OSError: The database or the port cannot be opened.
    """
    app = App(path, api_key=api_key, upstream=upstream is not None)
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError:
        app.close()
        raise
    name = f"[{host}]" if ":" in host else host
    print(f"anybatch serves http://{name}:{listener.getsockname()[1]}/v1 from {path}", flush=True)
    config: dict[str, Any] = {"log_level": "warning", "lifespan": "on"}
    with listener:
        uvicorn.Server(uvicorn.Config(asgi(app, upstream), **config)).run(sockets=[listener])
