"""A real server at a real port of loopback, with nothing behind the door but a page that says who came in."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from foedus.errors import FoedusError
from foedus.net.identity import routes as door
from foedus.net.identity import tls
from foedus.net.identity.access import Access
from foedus.net.identity.authority import Authority
from foedus.net.identity.connections import guarded
from foedus.net.identity.limits import Rate
from foedus.net.identity.tls_line import over_tls
from foedus.net.store import SqlStore, open_store


class Clock:
    """Seconds since 1970, as a test says."""

    def __init__(self) -> None:
        self.now = 1.7e9

    def __call__(self) -> float:
        return self.now


class Door(NamedTuple):
    """A server and what it was made of."""

    url: str
    access: Access
    authority: Authority
    store: SqlStore
    clock: Clock


async def _aside(work: Callable[[], Any]) -> Any:
    return work()


@contextmanager
def opened(
    folder: Path,
    *,
    plain: bool = False,
    behind_proxy: bool = False,
    rate: Rate | None = None,
    stall_s: float = 30.0,
    head_s: float = 20.0,
) -> Iterator[Door]:
    """A server, until the block ends."""
    import time

    clock = Clock()
    clock.now = float(int(time.time()))  # TLS looks at the machine's clock
    authority = Authority.kept(folder / "identity", now=clock.now)
    store = open_store("sqlite://")
    context = None if plain else tls.server_context(authority, ["localhost"], now=clock.now)
    shown = "" if plain else tls.shown(authority)
    access = Access(authority, store, channel=None if behind_proxy else shown)

    async def who(request: Request) -> Response:
        try:
            caller = access.caller(
                request.headers.get("authorization"), peer=door.peer_of(request.scope), now=clock.now
            )
        except FoedusError as error:
            return door.refusal(error)
        size = sum([len(piece) async for piece in request.stream()])
        return JSONResponse({"name": caller.name, "position": caller.position, "size": size})

    served = [*door.routes(access, clock=clock, rate=rate or Rate(per_s=1e6, burst=10**6), aside=_aside)]
    app = Starlette(routes=[*served, Route("/who", who, methods=["GET", "POST", "PUT"])])
    with running(app, context, head_s=head_s, stall_s=stall_s) as port:
        yield Door(f"http{'' if plain else 's'}://localhost:{port}", access, authority, store, clock)
    store.close()


@contextmanager
def running(
    app: Any, context: ssl.SSLContext | None, *, head_s: float = 20.0, stall_s: float = 30.0, unread_s: float = 120.0
) -> Iterator[int]:
    """uvicorn in a thread of its own, at a port that the operating system chose."""
    spoken: Any = guarded(HttpToolsProtocol, head_s=head_s, stall_s=stall_s, unread_s=unread_s)
    if context is not None:
        spoken = over_tls(spoken, context)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", http=spoken)
    server = uvicorn.Server(config)
    up = threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0)
        up.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert up.wait(20)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(20)
