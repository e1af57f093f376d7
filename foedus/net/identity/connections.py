"""Connections that say who is at their other end, and that do not wait for ever.

uvicorn does not hand a client's certificate to the application, and it has no limit on how slowly a request may come.
`guarded` makes a protocol class of uvicorn's that has both: what the handshake has proven is in every request's scope
(``extensions.tls.client_der``), and a connection is closed whose request's head is not whole in ``head_s`` seconds,
whose body has stood still for ``stall_s`` while the server was ready to read (a "slow loris" otherwise holds a
connection, and perhaps a client's seat, with a byte a minute), or whose answer nobody has taken a byte of for
``unread_s``. A connection on which nothing is asked has no timer. `guarded_socket` makes one for WebSockets.

Not here: rate limits (``limits.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Any, cast

AHEAD = 8  # requests that may be sent before the answer to the first has come; ours send none

__all__ = ["guarded", "guarded_socket"]


def guarded(
    protocol: type[asyncio.Protocol], *, head_s: float = 20.0, stall_s: float = 30.0, unread_s: float = 120.0
) -> type[asyncio.Protocol]:
    """A protocol class of uvicorn's with certificates in the scope and limits on how slowly a request may come.

    Args:
        protocol: ``H11Protocol`` or ``HttpToolsProtocol``.
        head_s: seconds within which a request's head must have come.
        stall_s: seconds that a body may stand still.
        unread_s: seconds that an answer may; more, since the system's own buffer takes a slow line a while to empty.
    """

    class Guarded(protocol):  # type: ignore[misc, valid-type]
        """One connection."""

        app: Any
        transport: asyncio.Transport
        _timer: asyncio.TimerHandle | None = None
        _asked = 0  # requests that the application is at

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._loop = asyncio.get_running_loop()
            self._last, self._unsent = self._loop.time(), _Unsent()
            self._since: float | None = self._last  # when the head under way began
            self.app = self._noted(self.app, _proven(transport))
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._last = self._loop.time()
            if not self._asked and self._since is None:
                self._since = self._last
            if self._timer is None:
                self._watch()
            super().data_received(data)
            ahead: Sized = getattr(self, "pipeline", ())  # h11 reads one at a time
            if len(ahead) > AHEAD:  # they are held in memory, and none of them is served sooner
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unsent.stands(self.transport.get_write_buffer_size(), self._loop.time())
            if self._timer is None:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _noted(self, app: Any, peer: bytes | None) -> Any:
            async def noted(scope: dict[str, Any], receive: Any, send: Any) -> None:
                self._asked, self._since = self._asked + 1, None
                _tell(scope, peer)
                try:
                    await app(scope, receive, send)
                finally:
                    self._asked -= 1

            return noted

        def _watch(self) -> None:
            self._timer = self._loop.call_later(min(head_s, stall_s) / 2, self._look)

        def _look(self) -> None:
            self._timer, now = None, self._loop.time()
            if self.transport.get_protocol() is not self:  # a WebSocket now
                return
            slow_head = self._since is not None and now - self._since > head_s
            slow_body = self._reading() and now - self._last > stall_s
            unread = self._unsent.stands(self.transport.get_write_buffer_size(), now) > unread_s
            if slow_head or slow_body or unread:
                self.transport.abort()
            elif self._since is not None or self._reading() or self._unsent.waiting:
                self._watch()

        def _reading(self) -> bool:
            """Whether a body is under way, and the server is ready for more of it."""
            cycle = cast(Any, self).cycle
            return bool(self._asked and cycle is not None and cycle.more_body and not cast(Any, self).flow.read_paused)

    return Guarded


class _Unsent:
    """Bytes of answers that wait to be sent."""

    waiting, _since = 0, 0.0

    def stands(self, waiting: int, now: float) -> float:
        """For how many seconds none of them has been sent."""
        if not waiting or not self.waiting or waiting < self.waiting:
            self._since = now
        self.waiting = waiting
        return now - self._since


def guarded_socket(protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """A WebSocket protocol class of uvicorn's with certificates in the scope, and that a server can end though its
    closing is under way.

    Where a client has said good-bye on a line that is dead, closing takes half a minute; a server that ended in that
    time would fail over the second good-bye, and with it all that it still has to do.
    """

    class Guarded(protocol):  # type: ignore[misc, valid-type]
        """One connection."""

        app: Any
        transport: asyncio.Transport

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            app, peer = self.app, _proven(transport)

            async def noted(scope: dict[str, Any], receive: Any, send: Any) -> None:
                _tell(scope, peer)
                await app(scope, receive, send)

            self.app = noted

        def shutdown(self) -> None:
            if self.transport.is_closing():
                self.transport.abort()
            else:
                super().shutdown()

    return Guarded


def _proven(transport: asyncio.Transport) -> bytes | None:
    tls = transport.get_extra_info("ssl_object")
    return None if tls is None else cast("bytes | None", tls.getpeercert(binary_form=True))


def _tell(scope: dict[str, Any], peer: bytes | None) -> None:
    """Note in a request's scope whose certificate the connection has proven."""
    if peer is not None:
        scope.setdefault("extensions", {})["tls"] = {"client_der": peer}
