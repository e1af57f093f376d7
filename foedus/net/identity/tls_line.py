"""TLS on the server's side of a connection, in little memory.

What event loops bring keeps a quarter of a megabyte a connection to read into, and OpenSSL's memory buffers stay as
large as whatever went through them at once: a thousand clients that have each sent an update hold a gigabyte. Here all
connections of a server read into one buffer, and bytes go through OpenSSL a record at a time, so that a connection
keeps some fifty kilobytes whatever it has carried. The cryptography is OpenSSL's, by Python's ``ssl.SSLObject``.

A handshake has to end in ``handshake_s``; what is no TLS is answered by the alert that OpenSSL writes, and closed. An
end without TLS's own goodbye is told to the protocol above as an end of the connection, as it is without TLS: HTTP says
itself how long things are.

Not here: certificates and versions (``tls.py``), HTTP (``connections.py`` and uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any

from foedus.net.logs import say

__all__ = ["TlsLine", "over_tls"]

RECORD = 1 << 14  # bytes of what one TLS record holds at most
LAST_S = 30.0  # seconds in which what is left has to be taken by the other side
ROOM = 1 << 16  # bytes that are read from the network at once, by one connection after another


def over_tls(
    inner: Callable[..., asyncio.Protocol], context: ssl.SSLContext, *, handshake_s: float = 20.0
) -> Callable[..., asyncio.BaseProtocol]:
    """What makes the protocols of a listening socket's connections, given what makes them without TLS.

    Args:
        inner: makes the protocol that the decrypted bytes are for; called when the handshake is over.
        context: of a server.
        handshake_s: seconds within which a handshake must be over.
    """
    room = memoryview(bytearray(ROOM))  # reads happen one after another in the loop's thread, and are taken at once

    def made(*given: Any, **named: Any) -> asyncio.BaseProtocol:
        return TlsLine(lambda: inner(*given, **named), context, room, handshake_s)

    return made


class TlsLine(asyncio.BufferedProtocol):
    """One connection: encrypted bytes below, the protocol that they are for above."""

    def __init__(
        self, inner: Callable[[], asyncio.Protocol], context: ssl.SSLContext, room: memoryview, handshake_s: float
    ) -> None:  # fmt: skip
        self._make, self._room, self._handshake_s = inner, room, handshake_s
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._raw: Any = None
        self._above: _Above | None = None  # once the handshake is over
        self._timer: asyncio.TimerHandle | None = None
        self._choked = False  # more is to be sent than the client takes

    # --- from below

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._raw = transport
        self._timer = asyncio.get_running_loop().call_later(self._handshake_s, self._raw.abort)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next bytes are to be put."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came: a record's worth at a time goes through OpenSSL, whose buffers never shrink."""
        for at in range(0, nbytes, RECORD):
            self._in.write(self._room[at : min(at + RECORD, nbytes)])
            self._advance()

    def eof_received(self) -> bool:
        """The client sends nothing more; the connection is closed."""
        if self._above is not None and not self._above.closing:
            self._above.protocol.eof_received()
        self.let_go()
        return False

    def pause_writing(self) -> None:
        """The client takes bytes more slowly than they come. It is not heard meanwhile: there are things that have to
        be answered, pings and new keys, whose answers would pile up here."""
        self._choked = True
        self._raw.pause_reading()
        if self._above is not None:
            self._above.protocol.pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._choked = False
        if self._above is not None:
            self._above.protocol.resume_writing()
        if self._above is None or not self._above.paused:
            self.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()
        if self._above is not None:
            self._above.closing = True
            self._above.protocol.connection_lost(exc)

    # --- to above

    def _advance(self) -> None:
        """Shake hands, or read, as far as the bytes go that have come."""
        if self._raw.is_closing():
            return
        try:
            if self._above is None:
                self._tls.do_handshake()
                self._ready()
            assert self._above is not None
            self.read(self._above)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            say("tls failed", level=logging.DEBUG, error=str(error.reason or error)[:200])
            self.flush()  # the alert
            self.let_go()
            return
        self.flush()

    def _ready(self) -> None:
        """The handshake is over."""
        assert self._timer is not None
        self._timer.cancel()
        self.flush()
        protocol = self._make()
        self._above = _Above(self, self._raw, self._tls, protocol)
        protocol.connection_made(self._above)

    def read(self, above: _Above) -> None:
        """Hand on what has been decrypted.

        Raises:
            SSLWantReadError: there is nothing more.
        """
        while not (above.paused or above.closing or self._choked):
            try:
                piece = self._tls.read(RECORD)
            except ssl.SSLZeroReturnError:
                piece = b""
            if not piece:  # the client's goodbye
                if not above.protocol.eof_received():
                    above.close()
                return
            above.protocol.data_received(piece)

    def resume(self) -> None:
        """Go on reading: first what OpenSSL holds already."""
        if not (self._choked or self._raw.is_closing()):
            self._raw.resume_reading()
            asyncio.get_running_loop().call_soon(self._advance)

    def flush(self) -> None:
        """Send what OpenSSL has written."""
        if self._out.pending and not self._raw.is_closing():
            self._raw.write(self._out.read())

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send."""
        view = memoryview(data)
        for at in range(0, len(view), RECORD):
            self._tls.write(view[at : at + RECORD])
            self.flush()

    def let_go(self) -> None:
        """Close once everything is sent, or after a while: whoever takes nothing holds nothing for ever."""
        if self._above is not None:
            self._above.closing = True
        if not self._raw.is_closing():
            self._raw.close()
            self._timer = asyncio.get_running_loop().call_later(LAST_S, self._raw.abort)

    def goodbye(self) -> None:
        """Say that nothing more will come."""
        with contextlib.suppress(ssl.SSLError):  # the client's goodbye is not waited for
            self._tls.unwrap()
        self.flush()


class _Above(asyncio.Transport):
    """What the protocol above writes to."""

    def __init__(self, line: TlsLine, raw: Any, tls: ssl.SSLObject, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._line, self._raw, self._tls = line, raw, tls
        self.protocol = protocol
        self.paused = self.closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection."""
        if name == "ssl_object":
            return self._tls
        return self._tls.context if name == "sslcontext" else self._raw.get_extra_info(name, default)

    def set_protocol(self, protocol: Any) -> None:
        """Another protocol takes over, such as a WebSocket's."""
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who the bytes are for."""
        return self.protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes."""
        if not self.is_closing():
            self._line.send(data)

    def close(self) -> None:
        """Close once everything is sent."""
        if not self.closing:
            self.closing = True
            if not self._raw.is_closing():
                self._line.goodbye()
                self._line.let_go()

    def abort(self) -> None:
        """Close at once."""
        self.closing = True
        self._raw.abort()

    def is_closing(self) -> bool:
        """Whether it is over, or about to be."""
        return self.closing or bool(self._raw.is_closing())

    def is_reading(self) -> bool:
        """Whether bytes are taken from the network."""
        return not self.paused

    def pause_reading(self) -> None:
        """Take no bytes for a while."""
        if not self.paused:
            self.paused = True
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Take bytes again."""
        if self.paused and not self.is_closing():
            self.paused = False
            self._line.resume()

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent."""
        return int(self._raw.get_write_buffer_size())

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """When the protocol above is paused."""
        low, high = self._raw.get_write_buffer_limits()
        return int(low), int(high)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Change that."""
        self._raw.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        """TLS has no half-closed connections here."""
        return False
