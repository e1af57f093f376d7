"""A client's ear for the doorbell: a WebSocket on which the server says that it may be worth while to check in.

The little of Socket.IO that this takes (Engine.IO 4 over WebSocket, one event with bytes) is spoken here directly: the
usual client would bring an HTTP client of its own along. Nothing depends on it. What is heard is believed no more
than to check in a little earlier; where there is no doorbell, or none can be reached, the client comes when it was
told to. Of several servers only the one that leads rings, so the ear goes wherever requests go.

Not here: the doorbell (``doorbell.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from foedus.errors import ProtocolError
from foedus.net import api
from foedus.protocol import wire
from foedus.protocol.messages import Bell, Message

__all__ = ["Line", "listen"]

MOST = 1 << 16  # bytes of anything that is heard
AGAIN_S, LATEST_S = 5.0, 300.0  # seconds until it is tried again, growing
GOOD_BYE_S = 2.0  # until the server has said good-bye, too
SILENT_S = 60.0  # the server asks every 25 seconds whether one is there; a line that is silent for so long is dead


class Line(NamedTuple):
    """Where the doorbell is, and how it is reached.

    Attributes:
        address: gives that of the server which is asked at present.
        moved: waits until it is another than one that is given.
        context: gives what TLS needs, for every connection anew; ``None`` for plain HTTP on loopback.
        ticket: gives the present ticket; empty if there is none yet.
        run: which run's doorbell; empty for all.
    """

    address: Callable[[], str]
    moved: Callable[[str], Awaitable[None]]
    context: Callable[[], ssl.SSLContext | None]
    ticket: Callable[[], str]
    run: str = ""


async def listen(line: Line, ring: Callable[[Bell], None]) -> None:
    """Listen until cancelled, connecting again whenever the connection is lost, or the server is another.

    Args:
        line: to the doorbell.
        ring: called with whatever is heard.
    """
    wait = AGAIN_S
    while True:
        at = line.address()
        once = asyncio.ensure_future(_once(line, at, ring, wait))
        moved = asyncio.ensure_future(line.moved(at))
        try:
            await asyncio.wait((once, moved), return_when=asyncio.FIRST_COMPLETED)
            wait = once.result() if once.done() else AGAIN_S
        finally:
            for each in (once, moved):
                each.cancel()
            await asyncio.gather(once, moved, return_exceptions=True)


async def _once(line: Line, at: str, ring: Callable[[Bell], None], wait: float) -> float:
    """One connection, and the rest after it; how long the next one's is to be."""
    from websockets.exceptions import WebSocketException

    with contextlib.suppress(OSError, TimeoutError, WebSocketException, ProtocolError, ValueError):
        async for bell in _heard(line, at):
            wait = AGAIN_S
            ring(bell)
    await asyncio.sleep(wait)
    return min(LATEST_S, 2 * wait)


async def _heard(line: Line, at: str) -> AsyncIterator[Bell]:
    """What one connection brings."""
    from websockets.asyncio.client import connect

    ticket = line.ticket()
    if not ticket:
        return
    scheme, _, rest = at.partition("://")
    address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/{api.DOORBELL}/?EIO=4&transport=websocket"
    headers = {"Authorization": f"Bearer {ticket}"}
    connection = await connect(
        address, ssl=line.context(), additional_headers=headers, max_size=MOST, compression=None, ping_interval=None,
        close_timeout=GOOD_BYE_S,
    )  # fmt: skip
    try:
        async for message in _messages(connection, line.run):
            if isinstance(message, Bell):
                yield message
    finally:
        try:
            await connection.close()
        finally:  # whoever cancels does not wait for the other side's good-bye
            connection.transport.abort()


async def _messages(connection: Any, run: str) -> AsyncIterator[Message]:
    """What is said on a connection that is open, until the server ends it or the line falls silent."""
    while True:
        async with asyncio.timeout(SILENT_S):
            said = await connection.recv()
            if said == "2":  # are you there?
                await connection.send("3")
            elif isinstance(said, str) and said.startswith("0"):  # it is open
                await connection.send("40" + json.dumps({"run": run}))
        if isinstance(said, bytes):
            yield wire.decode(said)
        elif said.startswith(("41", "44", "1")):  # not, or no longer, let in
            return
