"""The doorbell: Socket.IO rings when it may be worth while to check in (python-socketio).

Nothing depends on it: what it says may be lost, is small, and has to be asked for over HTTP to be believed. Whoever
connects shows the same ticket as everywhere, and hears of the runs that it names. No compression (it doubles the memory
of a connection), WebSocket only, pings every 25 seconds.

It never rings everybody at once: whoever hears it comes, so a server of ten thousand would call upon itself more than
it can answer. Those who are meant (``Ring``) are rung a few at a time.

Not here: whom it rings, and when (``rings.py``).
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Any

from foedus.errors import FoedusError
from foedus.net.api import BELL, DOORBELL
from foedus.net.http import Shell
from foedus.net.rings import Ring
from foedus.protocol import wire

MOST = 1 << 16  # bytes of what a client may say, which is nothing
EVERYTHING = ""  # what those listen to that named no run
AT_ONCE, PAUSE = 64, 0.1  # so many are rung, and then for so many seconds nobody


class Doorbell:
    """Who listens to what, and who is yet to be rung.

    Args:
        shell: of the server, which says who a caller is.
    """

    def __init__(self, shell: Shell) -> None:
        import socketio

        self._shell = shell
        self._listening: dict[str, dict[str, int]] = defaultdict(dict)  # by run, positions by connection
        self._due: asyncio.Queue[tuple[bytes, list[str]]] = asyncio.Queue()
        self._ringing: asyncio.Task[None] | None = None
        self.server = socketio.AsyncServer(
            async_mode="asgi", transports=["websocket"], max_http_buffer_size=MOST, ping_interval=25, ping_timeout=20,
            http_compression=False, logger=False, engineio_logger=False, cors_allowed_origins=[], always_connect=False,
        )  # fmt: skip
        self.server.on("connect", self._connected)
        self.server.on("disconnect", self._disconnected)

    async def ring(self, ring: Ring) -> None:
        """Ring those that are meant, soon."""
        chosen = self._meant(ring)
        content = wire.encode(ring.message)
        for at in range(0, len(chosen), AT_ONCE):
            self._due.put_nowait((content, chosen[at : at + AT_ONCE]))
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._rung())

    def _meant(self, ring: Ring) -> list[str]:
        here = self._listening.get(EVERYTHING, {}) | self._listening.get(ring.message.run, {})
        found = [
            sid for sid, position in here.items()
            if position not in ring.but and (ring.to is None or position in ring.to)
        ]  # fmt: skip
        random.shuffle(found)  # where not all can be rung at once, nobody is always the last
        return found if ring.most is None else found[: ring.most]

    async def _rung(self) -> None:
        """Ring whoever is due, some at a time, until nobody is."""
        while not self._due.empty():
            content, some = self._due.get_nowait()
            await self.server.emit(BELL, content, to=some)
            await asyncio.sleep(PAUSE * len(some) / AT_ONCE)

    async def _connected(self, sid: str, environ: dict[str, Any], auth: Any = None) -> bool:
        scope = environ.get("asgi.scope", {})
        peer = scope.get("extensions", {}).get("tls", {}).get("client_der")
        shown = environ.get("HTTP_AUTHORIZATION")
        if shown is None and isinstance(auth, dict) and isinstance(auth.get("ticket"), str):
            shown = f"Bearer {auth['ticket']}"
        try:
            caller = self._shell.door.caller(shown, peer=peer, now=self._shell.clock())
        except FoedusError:
            return False
        run = auth.get("run") if isinstance(auth, dict) else None
        self._listening[run if isinstance(run, str) else EVERYTHING][sid] = caller.position
        self._shell.metrics.doorbells.inc()
        return True

    async def _disconnected(self, sid: str, *_: Any) -> None:
        for run, listening in list(self._listening.items()):
            if listening.pop(sid, None) is not None:
                self._shell.metrics.doorbells.dec()
            if not listening:
                del self._listening[run]


def with_doorbell(shell: Shell, application: Any) -> Any:
    """The application with a doorbell beside it, which the shell rings."""
    import socketio

    bell = Doorbell(shell)
    shell.ring = bell.ring
    return socketio.ASGIApp(bell.server, other_asgi_app=application, socketio_path=DOORBELL)
