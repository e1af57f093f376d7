"""The transport without a network: a client and a coordinator in one process, message by message as on the wire.

For tests, and to try a federation out: the very same coordinator, agent and bytes as over HTTP.

Not here: who is let in; the caller is whoever is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from foedus.errors import Code, ProtocolError, StaleEpoch, StorageError
from foedus.protocol import wire
from foedus.protocol.messages import Answer, Blob, Message, Problem, Request, problem, sentence

__all__ = ["MemoryTransport"]


class Core(Protocol):
    """A coordinator, as a transport sees it."""

    uploads: Any

    def handle(self, caller: Any, message: Message, now: float) -> Message: ...

    def blob(self, caller: Any, digest: bytes) -> bytes | memoryview: ...


class MemoryTransport:
    """Calls a coordinator; see :class:`foedus.net.transport.Transport`.

    Args:
        core: gives the coordinator that is there now.
        caller: whom the coordinator takes this client for.
        clock: seconds, as the coordinator counts them.
    """

    def __init__(self, core: Callable[[], Core], caller: Any, clock: Callable[[], float]) -> None:
        self._core, self._caller, self._clock = core, caller, clock

    async def ask(self, message: Request) -> Answer:
        """Through the wire format, both ways."""
        heard = wire.decode(wire.encode(message))
        try:
            said: Message = self._core().handle(self._caller, heard, self._clock())
        except (ProtocolError, StaleEpoch, StorageError) as error:
            said = _problem(error)
        return wire.decode(wire.encode(said))  # type: ignore[return-value]

    async def fetch(self, blob: Blob) -> bytes:
        """The bytes that the coordinator gives out."""
        return bytes(self._core().blob(self._caller, blob.digest))

    async def send(self, upload: bytes, offset: int, content: bytes) -> int | Problem:
        """Into the coordinator's memory for uploads."""
        uploads, owner = self._core().uploads, self._caller.position
        try:
            return int(uploads.write(upload, offset, content, owner=owner, now=self._clock()))
        except ProtocolError as error:
            if error.code is not Code.WRONG_OFFSET:
                return _problem(error)
            return problem(error, offset=uploads.offset(upload, owner=owner))

    async def close(self) -> None:
        """There is nothing to close."""


def _problem(error: ProtocolError | StaleEpoch | StorageError) -> Problem:
    if isinstance(error, ProtocolError):
        return problem(error)
    code = Code.NOT_LEADER if isinstance(error, StaleEpoch) else Code.STORAGE
    return Problem(code=code, told=sentence(str(error)), after_s=1.0)
