"""How a client reaches a server: three calls, over HTTP or in memory.

The client always calls; the server never does. Everything works by these calls alone; the doorbell only says that it
may be worth while to call now.

Over HTTP every call is one request (``api.py`` has the addresses): messages are posted, blobs are fetched (a download
that breaks is taken up again where it broke), pieces of an upload are put at their offset. Whoever it is that calls is
the business of the HTTP client that is given (``identity/visits.py``).

Not here: what is said (``protocol``), who is let in (``identity``), when to try again (``agent.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from foedus.errors import Code, MalformedMessage, TooLarge, Unreachable
from foedus.net import api
from foedus.protocol import wire
from foedus.protocol.messages import ANSWERS, Answer, Blob, Message, Problem, Request, sentence

__all__ = ["HttpTransport", "Transport"]

TRIES = 5  # to take a download up again where it broke
# The HTTP client gives up a connection on which nothing comes. One that drips is given up as well, after so long and
# what its bytes may take at the slowest.
LONGEST_S = 300.0
SLOWEST = 1000.0  # bytes per second


class Transport(Protocol):
    """A way to a server.

    Laws, held by the conformance suite: the same message may be asked again; bytes that were sent twice are there once;
    what cannot be reached is :class:`~foedus.errors.Unreachable`, and nothing else is.
    """

    async def ask(self, message: Request) -> Answer:
        """Say something, and hear the answer; a problem is an answer."""

    async def fetch(self, blob: Blob) -> bytes:
        """A blob's bytes, as many as were announced; their digest is not checked here."""

    async def send(self, upload: bytes, offset: int, content: bytes) -> int | Problem:
        """Bytes of an upload, to be at an offset; where to go on."""

    async def close(self) -> None:
        """Close connections."""


class HttpTransport:
    """A server over HTTP.

    Where several servers share a database one of them leads, and the others say which. The transport goes on there.
    All of them say who the others are: where one cannot be reached another is asked, the one at the base address
    first. So any server's address will do, and it may be gone later.

    Args:
        client: an ``httpx.AsyncClient`` whose base address is the server's, and that says who calls.
        follows: whether to go on at an address that the server names.
        others: addresses of servers that were named before.
        remember: is told when other servers are named.
    """

    def __init__(
        self, client: Any, *, follows: Callable[[str], bool] = lambda _: False, others: Sequence[str] = (),
        remember: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._client, self._home, self._follows = client, client.base_url, follows
        self._others, self._remember = tuple(others), remember
        self._former: list[Any] = []
        self._elsewhere = asyncio.Event()

    @property
    def address(self) -> str:
        """Of the server that is asked at present."""
        return str(self._client.base_url).rstrip("/")

    async def moved(self, before: str) -> None:
        """Wait until another server is asked than the one at an address."""
        while self.address == before:
            self._elsewhere.clear()
            await self._elsewhere.wait()

    async def ask(self, message: Request) -> Answer:
        """See :class:`Transport`."""
        headers = {"Content-Type": api.MEDIA}
        found = await self._called("POST", api.PATHS[type(message)], content=wire.encode(message), headers=headers)
        answer = _message(found)
        if not isinstance(answer, (Problem, *ANSWERS[type(message)])):
            raise MalformedMessage(f"the server answered {type(message).__name__} with {type(answer).__name__}")
        return answer  # type: ignore[return-value]

    async def fetch(self, blob: Blob) -> bytes:
        """See :class:`Transport`."""
        content = bytearray()
        for left in reversed(range(TRIES)):
            before = len(content)
            try:
                await self._more(blob, content)
            except Unreachable:
                if not left or len(content) == before:
                    raise
                continue
            break
        return bytes(content)

    async def send(self, upload: bytes, offset: int, content: bytes) -> int | Problem:
        """See :class:`Transport`."""
        headers, where = {"Content-Type": api.BYTES}, {"offset": str(offset)}
        found = await self._called("PUT", api.upload_path(upload), content=content, headers=headers, params=where)
        if found.status == 200 and found.headers.get(api.OFFSET, "").isdecimal():
            return int(found.headers[api.OFFSET])
        answer = _message(found)
        if not isinstance(answer, Problem):
            raise MalformedMessage(f"the server answered bytes with {type(answer).__name__}")
        return answer

    async def close(self) -> None:
        """See :class:`Transport`."""
        for client in (*self._former, self._client):
            await client.aclose()

    async def use(self, client: Any) -> None:
        """Go on with another HTTP client: a certificate is new. What is under way ends with the one before."""
        former, self._former, self._client, self._home = self._former, [self._client], client, client.base_url
        self._elsewhere.set()
        for client_before in former:
            await client_before.aclose()

    async def _called(self, method: str, path: str, **given: Any) -> _Found:
        """One request and its answer, which is small; of the server that leads, if it is another; of any server, where
        the one that was asked is not there."""
        left: list[str] | None = None
        moved = False
        while True:
            try:
                found = await self._once(method, path, **given)
            except Unreachable:
                left = [str(self._home).rstrip("/"), *self._others] if left is None else left
                left = [address for address in left if address != self.address]
                if not left:
                    self._go(self._home)
                    raise
                self._go(left.pop(0))
                continue
            self._hear_of(found)
            if moved or not self._moves(found):
                return found
            moved = True

    def _hear_of(self, found: _Found) -> None:
        """Remember the other servers that an answer names."""
        named = found.headers.get(api.SERVERS, "").split()[: api.MOST_SERVERS]
        others = tuple(address for address in named if self._follows(address))
        if others and others != self._others:
            self._others = others
            self._remember(others)

    async def _once(self, method: str, path: str, **given: Any) -> _Found:
        async with _limited(len(given.get("content", b""))), self._client.stream(method, path, **given) as response:
            return await _bounded(response)

    def _moves(self, found: _Found) -> bool:
        """Go on at the server that leads, if this one says that it does not; whether it is another."""
        to = found.headers.get(api.LEADER, "").rstrip("/")
        if found.status != 503 or api.LEADER not in found.headers:
            return False
        before = self.address
        # Where it is not known yet who leads, the server that one knows will hear of it.
        self._go(to if to and to != before and self._follows(to) else self._home)
        return self.address != before

    def _go(self, to: Any) -> None:
        self._client.base_url = to
        self._elsewhere.set()

    async def _more(self, blob: Blob, content: bytearray) -> None:
        """Fetch a blob from where its content ends."""
        headers = {"Range": f"bytes={len(content)}-"} if content else {}
        path = api.blob_path(blob.digest)
        async with _limited(blob.size), self._client.stream("GET", path, headers=headers) as response:
            if response.status_code not in (200, 206):
                answer = _message(await _bounded(response))
                raise Unreachable(f"the server does not give a blob: {getattr(answer, 'told', answer)}")
            if response.status_code == 200:
                content.clear()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > blob.size:
                    raise TooLarge(f"a blob of {blob.size} bytes was announced, and more came")
        if len(content) < blob.size:
            raise Unreachable(f"a blob of {blob.size} bytes was announced, and {len(content)} came")


@contextlib.asynccontextmanager
async def _limited(size: int) -> AsyncIterator[None]:
    """A request that ends, in so many bytes' time, and what may break in it."""
    import httpx

    try:
        async with asyncio.timeout(LONGEST_S + size / SLOWEST):
            yield
    except (
        httpx.HTTPError,
        ssl.SSLError,
        TimeoutError,
    ) as error:  # what breaks in the middle of TLS comes untranslated
        raise _unreachable(error) from error


class _Found(NamedTuple):
    """A small answer of HTTP's."""

    status: int
    headers: Mapping[str, str]
    content: bytes


async def _bounded(response: Any) -> _Found:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > wire.MOST:
            raise TooLarge(f"the server answered with more than {wire.MOST} bytes")
    return _Found(response.status_code, response.headers, bytes(content))


def _message(found: _Found) -> Message:
    """The message that was answered; what the door says in JSON, or a proxy says, is a problem, too."""
    kind = found.headers.get("Content-Type", "")
    if kind.startswith(api.MEDIA):
        return wire.decode(found.content)
    if found.status < 400:
        raise MalformedMessage(f"this is no foedus server: it answered {kind or 'nothing'}, and no message")
    if found.status in (502, 503, 504):
        raise Unreachable(f"whatever is before the server answered {found.status}; it is tried again by itself")
    told: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(found.content)
    told = told if isinstance(told, dict) else {}
    code = Code.UNAUTHENTICATED if found.status == 401 else Code(str(told.get("code", "other")))
    after = found.headers.get("Retry-After", "")
    return Problem(
        code=code,
        told=sentence(str(told.get("told") or f"the server answered {found.status}")),
        fatal=found.status not in (401, 429) and found.status < 500,
        after_s=float(after) if after.isdecimal() and len(after) < 6 else 0.0,
    )


def _unreachable(error: Exception) -> Unreachable:
    told = str(error) or type(error).__name__
    return Unreachable(f"the server cannot be reached, or the connection broke: {told}. It is tried again by itself")
