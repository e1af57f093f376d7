"""The doorbell: Socket.IO rings when it may be worth while to check in (python-socketio).

Nothing depends on it: what it says may be lost, is small, and has to be asked for over HTTP to be believed. Whoever
connects shows the same ticket as everywhere, and hears of the runs that it names. No compression (it doubles the memory
of a connection), WebSocket only, pings every 25 seconds.

Not here: what is rung for (``coordinator``).
"""

from __future__ import annotations

from typing import Any

from foedus.errors import FoedusError
from foedus.net.api import BELL, DOORBELL
from foedus.net.http import Shell
from foedus.protocol import wire
from foedus.protocol.messages import Bell

MOST = 1 << 16  # bytes of what a client may say, which is nothing
EVERYTHING = "everything"  # the room of those that named no run


def with_doorbell(shell: Shell, application: Any) -> Any:
    """The application with a doorbell beside it, which the shell rings."""
    import socketio

    bell = socketio.AsyncServer(
        async_mode="asgi", transports=["websocket"], max_http_buffer_size=MOST, ping_interval=25, ping_timeout=20,
        http_compression=False, logger=False, engineio_logger=False, cors_allowed_origins=[], always_connect=False,
    )  # fmt: skip

    async def connect(sid: str, environ: dict[str, Any], auth: Any = None) -> bool:
        scope = environ.get("asgi.scope", {})
        peer = scope.get("extensions", {}).get("tls", {}).get("client_der")
        shown = environ.get("HTTP_AUTHORIZATION")
        if shown is None and isinstance(auth, dict) and isinstance(auth.get("ticket"), str):
            shown = f"Bearer {auth['ticket']}"
        try:
            shell.door.caller(shown, peer=peer, now=shell.clock())
        except FoedusError:
            return False
        run = auth.get("run") if isinstance(auth, dict) else None
        await bell.enter_room(sid, f"run {run}" if isinstance(run, str) and run else EVERYTHING)
        shell.metrics.doorbells.inc()
        return True

    async def disconnect(sid: str, *_: Any) -> None:
        shell.metrics.doorbells.dec()

    async def ring(message: Bell) -> None:
        content = wire.encode(message)
        for room in (EVERYTHING, f"run {message.run}"):
            await bell.emit(BELL, content, room=room)

    bell.on("connect", connect)
    bell.on("disconnect", disconnect)
    shell.ring = ring
    return socketio.ASGIApp(bell, other_asgi_app=application, socketio_path=DOORBELL)
