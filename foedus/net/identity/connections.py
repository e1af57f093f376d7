"""Connections that say who is at their other end, and that do not wait for ever.

uvicorn does not hand a client's certificate to the application, and it has no limit on how slowly a request's head may
come. `guarded` makes a protocol class of uvicorn's that has both: what the handshake has proven is in every request's
scope (``extensions.tls.client_der``), and a connection whose first request's head is not whole in ``head_s`` seconds is
closed (a "slow loris" otherwise holds a connection with a byte a minute).

How slowly a request's *body* may come is bounded where it is read: `steadily`.

Not here: rate limits (``limits.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from starlette.requests import ClientDisconnect, Request

__all__ = ["guarded", "steadily"]


def guarded(protocol: type[asyncio.Protocol], *, head_s: float = 20.0) -> type[asyncio.Protocol]:
    """A protocol class of uvicorn's with certificates in the scope and a limit on the head's time.

    Args:
        protocol: ``H11Protocol`` or ``HttpToolsProtocol``.
        head_s: seconds until the first request's head must have come.
    """

    class Guarded(protocol):  # type: ignore[misc, valid-type]
        """One connection."""

        app: Any
        transport: asyncio.Transport

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._asked = False
            plain: Any = self.app
            peer = _proven(transport)

            async def noted(scope: dict[str, Any], receive: Any, send: Any) -> None:
                self._asked = True
                if peer is not None:
                    scope.setdefault("extensions", {})["tls"] = {"client_der": peer}
                await plain(scope, receive, send)

            self.app = noted
            self._loris = asyncio.get_running_loop().call_later(head_s, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._loris.cancel()
            super().connection_lost(exc)

        def _too_slow(self) -> None:
            if not self._asked:
                self.transport.abort()

    return Guarded


def _proven(transport: asyncio.Transport) -> bytes | None:
    tls = transport.get_extra_info("ssl_object")
    return None if tls is None else cast("bytes | None", tls.getpeercert(binary_form=True))


async def steadily(request: Request, *, stall_s: float = 30.0) -> AsyncIterator[bytes]:
    """A request's body, piece by piece, as long as pieces keep coming.

    Args:
        request: whose body is read.
        stall_s: the longest between two pieces.

    Errors: `TooFast`'s opposite has no class of its own: a body that stalls ends as `ClientDisconnect`.
    """
    pieces = request.stream().__aiter__()
    while True:
        try:
            piece = await asyncio.wait_for(pieces.__anext__(), stall_s)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ClientDisconnect from error
        if piece:
            yield piece
