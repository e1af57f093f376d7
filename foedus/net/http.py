"""The HTTP shell around a coordinator: bytes in, bytes out (Starlette).

Everything that the coordinator does takes place in one thread of its own, message after message, so that neither the
database nor the merging of updates holds up the event loop. The loop's own work is to move bytes: uploads go piece by
piece into bounded memory (``uploads.py``), and are digested in a thread beside it; blobs go out in pieces, as fast as
the other side takes them, and are copied for nobody.

Not here: what is answered (``coordinator``), who somebody is (``identity``), the doorbell (``doorbell.py``).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Send
from starlette.types import Scope as Asked

from foedus.errors import (
    Code,
    FoedusError,
    MalformedMessage,
    NotNow,
    ProtocolError,
    StaleEpoch,
    StorageError,
    TooLarge,
)  # fmt: skip
from foedus.net import openapi
from foedus.net.api import AT_ONCE, BYTES, LEADER, MEDIA, MOST_SERVERS, OFFSET, PATHS, SERVERS, status_of
from foedus.net.identity.callers import Caller, Scope
from foedus.net.logs import say
from foedus.net.metrics import Metrics
from foedus.net.rings import Ring
from foedus.net.troubles import Troubles
from foedus.net.turnstile import Line, Turnstile
from foedus.net.uploads import Uploads
from foedus.protocol import wire
from foedus.protocol.messages import KINDS, Ask, CheckIn, Message, Problem, StartUpload
from foedus.protocol.messages import problem as problem_of

T = TypeVar("T")
PIECE = 1 << 16  # bytes of a blob that go out at once
LARGE = 1 << 18  # bytes of a blob that is given to one after the other
DIGESTED = 1 << 20  # bytes of an upload that are digested at once
HELD = 15.0  # seconds that somebody who asks for a place waits in line for it
TICK = 0.1  # seconds between two looks at the clock
SLOWEST = 1.0  # and at most, where every look fails
LEASE = 1.0  # seconds between two renewals of the lease
_NAMES = {kind: name for name, kind in KINDS.items()}
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Core(Protocol):
    """What is behind the shell: a coordinator. All but ``uploads`` is called in one thread, one call at a time."""

    uploads: Uploads

    def load(self, now: float) -> None: ...

    def handle(self, caller: Caller, message: Message, now: float) -> Message: ...

    def tick(self, now: float) -> Sequence[Ring]: ...

    def blob(self, caller: Caller, digest: bytes) -> bytes: ...

    def runs(self) -> list[dict[str, Any]]: ...

    def lines(self, run: str, file: str, after: int) -> bytes: ...


class Door(Protocol):
    """Who a request comes from."""

    def caller(self, authorization: str | None, *, peer: bytes | None = None, now: float) -> Caller: ...


class Leading(Protocol):
    """Whether this process leads, and who does if not."""

    def renew(self, now: float) -> bool:
        """Renew or take the lease; whether this process leads from now on, and did not before."""

    def address(self) -> str | None:
        """Where the leader is; ``None`` if it is here."""

    def servers(self) -> tuple[str, ...]:
        """Where all processes are that serve together."""

    def resign(self, now: float) -> None:
        """Let another process take over."""


class Shell:
    """One server process.

    Args:
        core: what is behind it.
        door: who is let in.
        clock: seconds since 1970.
        metrics: counts what happens.
        leading: where several processes serve together; ``None`` for one alone.
        more: further routes, such as the door's own.
        troubles: where it is told what fails again and again.
    """

    def __init__(
        self, core: Core, door: Door, *, clock: Callable[[], float], metrics: Metrics | None = None,
        leading: Leading | None = None, more: Sequence[BaseRoute] = (), troubles: Troubles | None = None,
    ) -> None:  # fmt: skip
        self.core, self.door, self.clock = core, door, clock
        self.metrics = metrics or Metrics()
        self.leading, self._more = leading, more
        self.troubles = troubles or Troubles(clock)
        self.ring: Callable[[Ring], Awaitable[None]] | None = None  # the doorbell, where there is one
        self._thread = ThreadPoolExecutor(1, "coordinator")
        self._lease = ThreadPoolExecutor(1, "lease")
        self._digests = ThreadPoolExecutor(1, "digests")
        self._line = Line()
        self._ways = _Ways(Turnstile(), self.metrics.bytes_out.inc)
        self._ready = leading is None  # whether this process leads, and has read what is written
        self.closing = False
        self.after: Callable[[], None] | None = None  # done in the coordinator's thread after every tick

    async def aside(self, act: Callable[..., T], *given: Any) -> T:
        """Something that the coordinator's thread is to do."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, act, *given)

    def application(self) -> Starlette:
        """The ASGI application."""
        routes: list[BaseRoute] = [Route(path, self._message(kind), methods=["POST"]) for kind, path in PATHS.items()]
        routes += [
            Route("/v1/blobs/{digest}", self._guarded(self._blob), methods=["GET"]),
            Route("/v1/uploads/{upload}", self._guarded(self._upload), methods=["PUT"]),
            Route("/v1/uploads/{upload}", self._guarded(self._offset), methods=["HEAD"]),
            Route("/v1/runs", self._guarded(self._runs), methods=["GET"]),
            Route("/v1/runs/{run}", self._guarded(self._run), methods=["GET"]),
            Route("/v1/runs/{run}/{file}", self._guarded(self._lines), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/leading", self._leads, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            *self._more,
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    # --- time

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._again(TICK, self._tick))]
        if self.leading is not None:
            tasks.append(asyncio.create_task(self._again(LEASE, self._renew)))
        try:
            yield
        finally:
            self.closing = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        with suppress(FoedusError):
            await self.aside(self._ticked)  # what was received a moment ago is written, if it may be
        if self.leading is not None:
            with suppress(FoedusError):
                await self.aside(self.leading.resign, self.clock())
        self.shut()

    def shut(self) -> None:
        """End the threads."""
        self._thread.shutdown()
        self._lease.shutdown()
        self._digests.shutdown(cancel_futures=True)

    async def _again(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        """Do something again and again; what fails is told, and tried again, a little later each time."""
        pause = seconds
        while True:
            try:
                await act()
                pause = seconds
            except Exception as error:
                self.troubles.failed("tick failed", error)
                pause = min(2 * pause, max(seconds, SLOWEST))  # other runs' deadlines are looked at all the same
            self.troubles.lasting()
            await asyncio.sleep(pause)

    async def _tick(self) -> None:
        try:
            rings = await self.aside(self._ticked)
        finally:
            self._line.go_on()  # places that nobody wrote to were given up
        for ring in rings:
            if self.ring is not None:
                await self.ring(ring)

    async def _renew(self) -> None:
        """Renew the lease in a thread of its own: a long commit must not let it run out."""
        assert self.leading is not None
        loop, now = asyncio.get_running_loop(), self.clock()
        gained = await loop.run_in_executor(self._lease, self.leading.renew, now)
        leads = self.leading.address() is None
        self._ready = self._ready and leads
        if gained or (leads and not self._ready):
            await self.aside(self.core.load, self.clock())
            self._ready = True
            say("leading", seconds=round(self.clock() - now, 3))
        self.metrics.leading.set(self._ready)

    def _ticked(self) -> Sequence[Ring]:
        if not self._ready:
            return ()
        self.metrics.waiting.set(self.core.uploads.taken)
        rings = self.core.tick(self.clock())
        if self.after is not None:
            self.after()
        return rings

    # --- requests

    def caller(self, request: Request) -> Caller:
        """Who asks.

        Raises:
            NotAllowed: nobody that is known.
        """
        peer = request.scope.get("extensions", {}).get("tls", {}).get("client_der")
        return self.door.caller(request.headers.get("authorization"), peer=peer, now=self.clock())

    def _message(self, kind: type[Message]) -> Callable[[Request], Awaitable[Response]]:
        name = _NAMES[kind]

        async def answer(request: Request) -> Response:
            with self.metrics.seconds.labels(name).time():
                try:
                    heard = wire.hear(await _whole(request, wire.MOST))
                    if type(heard.message) is not kind:
                        other = _NAMES[type(heard.message)]
                        raise MalformedMessage(f"messages of the kind {name} are sent here, not {other}")
                    caller = self.caller(request)
                    caller.may(Scope.TRAIN)
                    self._check_leads()
                    held = 0.0 if AT_ONCE in request.headers else HELD
                    reply = await self._handled(caller, heard.message, held)
                except ClientDisconnect:
                    return Response(status_code=400)
                except Exception as error:
                    reply = self._problem(error)
            self.metrics.answers.labels(name, _NAMES[type(reply)]).inc()
            return self._said(reply)

        return answer

    async def _handled(self, caller: Caller, message: Message, held: float) -> Message:
        """What the coordinator answers. Whoever asks for a place that there is no room for waits in line for a while:
        asked to come back, all would come too early or too late, and room would stand empty."""
        if isinstance(message, StartUpload):
            return await self._placed(caller, message, held)
        try:
            return await self.aside(self.core.handle, caller, message, self.clock())
        finally:
            if not isinstance(message, CheckIn | Ask):
                self._line.go_on()  # there may be room that was not there before

    async def _placed(self, caller: Caller, message: StartUpload, held: float) -> Message:
        until, again = self.clock() + held, False
        while True:
            try:
                reply = await self.aside(self.core.handle, caller, message, self.clock())
            except NotNow as error:
                left = until - self.clock()
                if error.code is not Code.OVERLOADED or left <= 0:
                    if again:
                        self._line.go_on()  # another may be content with less
                    raise
                await self._line.wait(left, front=again)
                again = True
            except BaseException:
                self._line.go_on()  # another may have more luck
                raise
            else:
                self._line.go_on()
                return reply

    def _said(self, reply: Message) -> Response:
        status, headers = 200, {}
        if self.leading is not None and len(there := self.leading.servers()) > 1:
            headers[SERVERS] = " ".join(there[:MOST_SERVERS])
        if isinstance(reply, Problem):
            self.metrics.problems.labels(str(reply.code)).inc()
            status = status_of(reply.code)
            if reply.after_s:
                headers["Retry-After"] = str(max(1, round(reply.after_s)))
            if reply.code is Code.NOT_LEADER and self.leading is not None:
                headers[LEADER] = self.leading.address() or ""
        return Response(wire.encode(reply), status, headers, MEDIA)

    def _problem(self, error: Exception) -> Problem:
        """What is answered instead, whatever went wrong."""
        match error:
            case ProtocolError():
                return problem_of(error)
            case StaleEpoch():
                return Problem(code=Code.NOT_LEADER, told="another server leads now; ask again", after_s=1.0)
            case StorageError():
                self.troubles.failed("storage failed", error)
                return Problem(code=Code.STORAGE, told="the server cannot write at the moment; ask again", after_s=5.0)
        self.troubles.failed("request failed", error)
        return Problem(code=Code.OTHER, told="the server failed at this request; it is in its log", after_s=30.0)

    def _check_leads(self) -> None:
        if not self._ready:
            address = "" if self.leading is None else self.leading.address()
            raise NotNow(f"another server leads: {address or 'it is not known yet which'}", code=Code.NOT_LEADER)

    def _guarded(self, act: Callable[[Request, Caller], Awaitable[Response]]) -> Any:
        """A request whose answer is no message; what goes wrong is answered by a Problem all the same."""

        async def answer(request: Request) -> Response:
            try:
                caller = self.caller(request)
                self._check_leads()
                return await act(request, caller)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception as error:
                return self._said(self._problem(error))

        return answer

    # --- bytes

    async def _blob(self, request: Request, caller: Caller) -> Response:
        digest = _hex(request.path_params["digest"], 32)
        tag = f'"{digest.hex()}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": tag})
        content = memoryview(await self.aside(self.core.blob, caller, digest))
        begin, end, status = 0, len(content), 200
        headers = {"ETag": tag, "Accept-Ranges": "bytes", "Cache-Control": "private, immutable"}
        asked = request.headers.get("range", "")
        if asked and request.headers.get("if-range", tag) == tag:
            if (found := _range(asked, end)) is None:
                return Response(status_code=416, headers={"Content-Range": f"bytes */{end}"})
            (begin, end), status = found, 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"

        return Bytes(content[begin:end], status, headers, self._ways)

    async def _upload(self, request: Request, caller: Caller) -> Response:
        caller.may(Scope.TRAIN)
        upload, offset = _hex(request.path_params["upload"], 16), _number(request.query_params.get("offset", "0"))
        uploads, now, digested = self.core.uploads, self.clock(), offset
        try:
            async for piece in request.stream():
                if piece:
                    offset = uploads.write(upload, offset, piece, owner=caller.position, now=now)
                    self.metrics.bytes_in.inc(len(piece))
                    if offset - digested >= DIGESTED:  # while more is on its way
                        self._digests.submit(uploads.digested, upload)
                        digested = offset
        except ProtocolError as error:
            problem = self._problem(error)
            if error.code is Code.WRONG_OFFSET:
                problem = problem_of(error, offset=uploads.offset(upload, owner=caller.position))
            response = self._said(problem)
            response.headers["Connection"] = "close"  # what else is on its way is not read
            return response
        return Response(status_code=200, headers={OFFSET: str(uploads.offset(upload, owner=caller.position))})

    async def _offset(self, request: Request, caller: Caller) -> Response:
        caller.may(Scope.TRAIN)
        offset = self.core.uploads.offset(_hex(request.path_params["upload"], 16), owner=caller.position)
        return Response(status_code=200, headers={OFFSET: str(offset)})

    # --- figures

    async def _runs(self, _: Request, caller: Caller) -> Response:
        caller.may(Scope.READ)
        return JSONResponse({"runs": await self.aside(self.core.runs)})

    async def _run(self, request: Request, caller: Caller) -> Response:
        caller.may(Scope.READ)
        name = request.path_params["run"]
        for run in await self.aside(self.core.runs):
            if run["run"] == name:
                return JSONResponse(run)
        raise ProtocolError(f"there is no run {name[:80]!r} here", code=Code.UNKNOWN_RUN)

    async def _lines(self, request: Request, caller: Caller) -> Response:
        caller.may(Scope.READ)
        after = _number(request.query_params.get("after", "0"))
        run, file = request.path_params["run"], request.path_params["file"]
        return Response(await self.aside(self.core.lines, run, file, after), media_type="application/x-ndjson")

    async def _health(self, _: Request) -> Response:
        found = self.troubles.lasting()  # why is in the log: anybody may ask here
        told = {"status": "closing" if self.closing else "failing" if found else "ok", "leading": self._ready}
        failing = [{"what": each.what, "since": round(each.since), "times": each.times} for each in found]
        return JSONResponse(told | ({"failing": failing} if failing else {}))

    async def _leads(self, _: Request) -> Response:
        """For reverse proxies: 200 where requests are to go."""
        return PlainTextResponse("leading\n" if self._ready else "waiting\n", 200 if self._ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(openapi.document())


class Bytes(Response):
    """Bytes that many are sent at once: pieces are views of them, and nothing is copied for anybody."""

    def __init__(self, content: memoryview, status: int, headers: Mapping[str, str], ways: _Ways) -> None:
        self._content, self._ways = content, ways
        super().__init__(None, status, {**headers, "Content-Length": str(len(content))}, BYTES)

    async def __call__(self, scope: Asked, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send them, as fast as the other side takes them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with AsyncExitStack() as stack:
            if len(self._content) > LARGE:
                await stack.enter_async_context(self._ways.turnstile.turn())
            for at in range(0, len(self._content), PIECE) or (0,):
                piece, end = self._content[at : at + PIECE], at + PIECE
                await send({"type": "http.response.body", "body": piece, "more_body": end < len(self._content)})
                self._ways.sent(len(piece))


class _Ways(NamedTuple):
    """How blobs go out: whose turn it is, and who counts the bytes."""

    turnstile: Turnstile
    sent: Callable[[int], None]


async def _whole(request: Request, most: int) -> bytes:
    """A request's body, of which no more is read than may be."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise TooLarge(f"a message of {announced} bytes is announced, and {most} are let in")
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise TooLarge(f"more than {most} bytes of a message came")
    return bytes(content)


def _hex(text: str, length: int) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != length or text != found.hex():
        raise MalformedMessage(f"the address names {2 * length} hexadecimal digits, not {text[:80]!r}")
    return found


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise MalformedMessage(f"a whole number is wanted in the address, not {text[:40]!r}")
    return int(text)


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes that a range names, from and to; None if there are none such."""
    found = _RANGE.fullmatch(asked.strip())
    if found is None or len(asked) > 64:
        return None
    begin, end = int(found[1]), min(size, int(found[2] or size) + (1 if found[2] else 0))
    return (begin, end) if begin < end else None


__all__ = ["Core", "Door", "Leading", "Shell"]
