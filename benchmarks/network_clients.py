"""Light clients for ``network.py``: the protocol over asyncio's streams, with neither framework nor HTTP library.

    python benchmarks/network_clients.py '{"what": "train", "first": 0, "count": 1, ...}'

Each client is a connection of its own. ``train``: check in, fetch the orders, send the update that is in a file (an
echo: nobody trains), come back when told to or when the doorbell rings, until the run is over. ``listen``: connect the
doorbell and stay. ``connect``: an HTTPS connection that is held open. What they saw is printed as one line of JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import ssl
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foedus.net import api
from foedus.protocol import wire
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Closed,
    Finished,
    Later,
    Message,
    Place,
    Problem,
    Received,
    Refused,
    StartUpload,
    Submit,
)

PIECE = 1 << 18


@dataclass
class Told:
    """What the driver wants, and what was seen."""

    port: int
    authority: str
    plain: bool
    tickets: list[str]
    update: bytes = b""
    digest: bytes = b""
    seen: dict[str, float] = field(default_factory=dict)

    def count(self, what: str, amount: float = 1.0) -> None:
        self.seen[what] = self.seen.get(what, 0.0) + amount


class Line:
    """One connection with HTTP/1.1 on it."""

    def __init__(self, told: Told, ticket: str) -> None:
        self.told, self.ticket = told, ticket
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def open(self) -> None:
        context = None
        if not self.told.plain:
            context = trust(self.told.authority)
        host = None if context is None else "localhost"
        for left in reversed(range(20)):
            try:
                self.reader, self.writer = await asyncio.open_connection(
                    "127.0.0.1", self.told.port, ssl=context, server_hostname=host, limit=1 << 18
                )
                return
            except OSError:
                if not left:
                    raise
                await asyncio.sleep(0.25)

    async def ask(self, method: str, path: str, body: bytes = b"", kind: str = api.MEDIA) -> bytes:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.ticket}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode())
        view = memoryview(body)
        for at in range(0, len(body), PIECE):
            self.writer.write(view[at : at + PIECE])
            await self.writer.drain()
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        return await self.reader.readexactly(length)

    async def fetch(self, path: str) -> int:
        """Read a blob and throw it away piece by piece; how many bytes it had."""
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.ticket}\r\n\r\n"
        self.writer.write(head.encode())
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = left = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        while left:
            left -= len(await self.reader.read(min(left, PIECE)))
        return length

    async def say(self, message: Message) -> Message:
        while True:
            found = wire.decode(await self.ask("POST", api.PATHS[type(message)], wire.encode(message)))
            if not isinstance(found, Problem) or found.fatal:
                return found
            self.told.count(str(found.code))
            await asyncio.sleep(max(0.05, found.after_s))

    def close(self) -> None:
        self.writer.transport.abort()


_TRUST: dict[str, ssl.SSLContext] = {}


def trust(authority: str) -> ssl.SSLContext:
    if authority not in _TRUST:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(authority)
        _TRUST[authority] = context
    return _TRUST[authority]


# --- taking part ----------------------------------------------------------------------------------------------


async def train(told: Told, ticket: str) -> None:
    """A client's whole life: until the run is over."""
    line, bell = Line(told, ticket), asyncio.Event()
    await line.open()
    ringing = asyncio.create_task(listen(told, ticket, bell))
    held = b""
    while True:
        bell.clear()
        found = await line.say(CheckIn(examples=10))
        if isinstance(found, Finished):
            told.count("finished")
            break
        if isinstance(found, Accepted):
            told.count("fetched", await line.fetch(api.blob_path(found.orders.digest)))
            held = found.key
            found = await send(told, line, held)
        if isinstance(found, Received):
            told.count("received")
            wait = found.later.after_s
        elif isinstance(found, Later):
            wait = found.after_s
        else:
            told.count(type(found).__name__)
            wait = 0.2
        try:
            await asyncio.wait_for(bell.wait(), wait + 0.001)
        except TimeoutError:
            told.count("came by the clock")
    if held:
        answer = await line.say(Ask(keys=(held,)))
        told.count(f"last {answer.entries[0].state}")
    ringing.cancel()
    line.close()


async def send(told: Told, line: Line, key: bytes) -> Message:
    size, digest = len(told.update), told.digest
    began = time.perf_counter()
    place = await line.say(StartUpload(key=key, size=size, digest=digest))
    if not isinstance(place, Place):
        return place
    middle = time.perf_counter()
    await line.ask("PUT", f"{api.upload_path(place.upload)}?offset=0", told.update, api.BYTES)
    told.count("put_s", time.perf_counter() - middle)
    found = await line.say(Submit(key=key, upload=place.upload, size=size, digest=digest))
    told.count("upload_s", time.perf_counter() - began)
    assert isinstance(found, Received | Refused | Closed), found
    return found


async def serial(told: Told) -> None:
    """One client after another, each alone on the line: what the path of an upload takes by itself."""
    for ticket in told.tickets:
        line = Line(told, ticket)
        await line.open()
        while not isinstance(found := await line.say(CheckIn(examples=10)), Accepted):
            await asyncio.sleep(0.1)
        assert isinstance(await send(told, line, found.key), Received)
        told.count("received")
        line.close()


# --- the doorbell ---------------------------------------------------------------------------------------------


async def listen(told: Told, ticket: str, bell: asyncio.Event | None = None) -> None:
    """Socket.IO over a WebSocket, as far as a doorbell needs it."""
    line = Line(told, ticket)
    await line.open()
    nonce = base64.b64encode(os.urandom(16)).decode()
    line.writer.write(
        f"GET /{api.DOORBELL}/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Bearer {ticket}\r\n\r\n".encode()
    )
    answer = await line.reader.readuntil(b"\r\n\r\n")
    assert b" 101 " in answer, answer
    line.writer.write(_frame(b"40" + json.dumps({"ticket": ticket}).encode()))
    while True:
        kind, content = await _heard(line.reader)
        if kind == 9:
            line.writer.write(_frame(content, kind=10))
        elif content[:1] == b"2":
            line.writer.write(_frame(b"3"))
        elif content[:2] == b"40":
            told.count("listening")
        elif content[:2] == b"45" and bell is not None:
            bell.set()
        elif kind == 8:
            told.count("hung up")
            return


def _frame(content: bytes, *, kind: int = 1) -> bytes:
    mask = os.urandom(4)
    size = len(content)
    head = bytes([0x80 | kind, 0x80 | size]) if size < 126 else bytes([0x80 | kind, 0xFE]) + size.to_bytes(2, "big")
    return head + mask + bytes(c ^ mask[i % 4] for i, c in enumerate(content))


async def _heard(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        size = int.from_bytes(await reader.readexactly(2), "big")
    return first & 0x0F, await reader.readexactly(size)


async def connect(told: Told, ticket: str) -> None:
    """An HTTP connection that has asked once, and is held open."""
    line = Line(told, ticket)
    await line.open()
    await line.ask("GET", "/health")
    told.count("listening")
    await asyncio.Event().wait()


# --- many in one process --------------------------------------------------------------------------------------

WHAT = {"train": train, "listen": listen, "connect": connect}


async def everybody(given: dict[str, Any]) -> None:
    folder = Path(given["folder"])
    first, count = given["first"], given["count"]
    tickets = json.loads((folder / "tickets.json").read_text())[first : first + count]
    update = (folder / "update.bin").read_bytes() if given["what"] in ("train", "serial") else b""
    told = Told(given["port"], given["authority"], given.get("plain", False), tickets, update)
    told.digest = hashlib.sha256(update).digest()
    opening = asyncio.Semaphore(given.get("at_once", 50))

    async def one(ticket: str) -> None:
        async with opening:
            task = asyncio.create_task(WHAT[given["what"]](told, ticket))
            before = told.seen.get("listening", 0.0)
            while given["what"] != "train" and told.seen.get("listening", 0.0) <= before and not task.done():
                await asyncio.sleep(0.02)
        await task

    began = time.perf_counter()
    waiting = asyncio.gather(*(one(ticket) for ticket in tickets if given["what"] in WHAT))
    if given["what"] == "serial":
        await serial(told)
    elif given["what"] == "train":
        await waiting
    else:
        while told.seen.get("listening", 0.0) < count and not waiting.done():
            await asyncio.sleep(0.05)
        print(json.dumps({"connected": told.seen, "seconds": time.perf_counter() - began}), flush=True)
        await asyncio.to_thread(sys.stdin.readline)  # until the driver says so
        waiting.cancel()
    print(json.dumps({"seen": told.seen, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.suppress(asyncio.CancelledError):
        runner.run(everybody(json.loads(sys.argv[1])))
