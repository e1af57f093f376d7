"""TLS in little memory: every byte arrives, whatever the pieces; what is no TLS, or no end, is let go."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from foedus.net.identity import tls_line
from foedus.net.identity.authority import Authority
from foedus.net.identity.tls import server_context
from foedus.net.identity.tls_line import RECORD, over_tls

SIZES = (1, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD + 7, 1 << 20)


class Echo(asyncio.Protocol):
    """Sends back what comes; stops taking for a moment after every piece, as a busy application does."""

    ends: ClassVar[list[str]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.ends.append("made")
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.went = transport, 0

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"close"):
            self.transport.write(b"bye")
            self.transport.close()
            return
        self.transport.write(data)
        self.transport.pause_reading()
        asyncio.get_running_loop().call_soon(self.transport.resume_reading)

    def eof_received(self) -> None:
        self.ends.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.append("lost")


class Fountain(Echo):
    """Gives more than anybody's buffers hold, and closes."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(bytes(1 << 25))
        self.transport.close()

    def pause_writing(self) -> None:
        self.ends.append("full")

    def resume_writing(self) -> None:
        self.ends.append("empty")


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    if request.param == "asyncio":
        return asyncio.new_event_loop
    return pytest.importorskip("uvloop").new_event_loop  # type: ignore[no-any-return]


@contextmanager
def listening(
    folder: Path,
    make: Callable[[], asyncio.AbstractEventLoop],
    *,
    handshake_s: float = 20.0,
    serving: type[Echo] = Echo,
) -> Iterator[tuple[int, ssl.SSLContext]]:
    """A server in a thread; its port, and what a client needs."""
    authority = Authority.kept(folder, now=time.time())
    context = server_context(authority, ["localhost"], now=time.time())
    loop = make()
    Echo.ends = []

    async def opened() -> asyncio.Server:
        return await loop.create_server(over_tls(serving, context, handshake_s=handshake_s), "127.0.0.1", 0)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(opened(), loop).result(20)
    trust = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    try:
        yield server.sockets[0].getsockname()[1], trust
    finally:
        loop.call_soon_threadsafe(server.close)
        until(lambda: Echo.ends.count("lost") == Echo.ends.count("made"))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def joined(port: int, trust: ssl.SSLContext) -> ssl.SSLSocket:
    return trust.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20), server_hostname="localhost")


def received(line: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size and (piece := line.recv(1 << 16)):
        found += piece
    return bytes(found)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


async def echoed(port: int, trust: ssl.SSLContext, sent: bytes) -> bytes:
    """What comes back of bytes that were sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname="localhost")
    writer.write(sent)
    found = await asyncio.wait_for(reader.readexactly(len(sent)), 20)
    writer.close()
    await writer.wait_closed()
    return found


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_comes_back(tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop], size: int) -> None:
    sent = hashlib.shake_128(b"bytes").digest(size)
    with listening(tmp_path, loop) as (port, trust):
        assert asyncio.run(echoed(port, trust, sent)) == sent


def test_ends_are_told_and_answered(tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with listening(tmp_path, loop) as (port, trust):
        with joined(port, trust) as line:  # the server's goodbye
            line.sendall(b"close")
            assert received(line, 100) == b"bye"
            assert line.recv(10) == b"", "it ended in order, as TLS has it"
        until(lambda: Echo.ends == ["made", "lost"])
        with joined(port, trust) as line:  # the client's
            line.sendall(b"x")
            assert received(line, 1) == b"x"
            line.unwrap().close()
        until(lambda: Echo.ends[2:] == ["made", "eof", "lost"])
        line = joined(port, trust)  # the line is cut
        line.sendall(b"x")
        assert received(line, 1) == b"x"
        line.close()
        until(lambda: Echo.ends[5:] in (["made", "eof", "lost"], ["made", "lost"]))


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x16\x03\x01\x40\x00" + bytes(20000)])
def test_what_is_no_tls_is_closed(tmp_path: Path, said: bytes) -> None:
    with listening(tmp_path, asyncio.new_event_loop) as (port, trust):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(said)
            answer = received(line, 1 << 20)
        assert answer[:1] in (b"", b"\x15"), "an alert, or nothing"
        with joined(port, trust) as line:  # and others are served
            line.sendall(b"x")
            assert received(line, 1) == b"x"
        until(lambda: "lost" in Echo.ends)
        assert Echo.ends.count("made") == 1, "the application never heard of the first"


def test_bytes_that_were_changed_on_the_way_end_the_connection(tmp_path: Path) -> None:
    with listening(tmp_path, asyncio.new_event_loop) as (port, trust):
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(outgoing.read())
                incoming.write(raw.recv(1 << 16))
        tls.write(b"to be changed")
        record = bytearray(outgoing.read())
        record[-1] ^= 1
        raw.sendall(record)
        until(lambda: Echo.ends == ["made", "lost"])
        raw.close()


def test_a_handshake_that_does_not_end_is_cut(tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with (
        listening(tmp_path, loop, handshake_s=0.05) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=20) as line,
    ):
        line.sendall(b"\x16\x03\x01")
        with pytest.raises(ConnectionResetError):  # aborted, or closed without a word
            raise ConnectionResetError if line.recv(10) == b"" else AssertionError


def test_whoever_takes_nothing_is_not_heard_either(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """An echo that is not read would pile up in the server's memory, as would answers to pings."""
    with listening(tmp_path, loop) as (port, trust):
        line = joined(port, trust)
        line.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 26:
                sent += line.send(bytes(1 << 16))
        assert sent < 1 << 25, "what the systems' buffers take, of both sides and both ways"
        line.close()


def test_whoever_takes_nothing_is_let_go_in_the_end(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_line, "LAST_S", 0.1)
    with listening(tmp_path, loop, serving=Fountain) as (port, trust):
        line = joined(port, trust)
        line.sendall(b"give")
        until(lambda: "lost" in Echo.ends)
        line.close()


CLIENTS = """
import asyncio, ssl, sys

async def main():
    trust = ssl.create_default_context(cafile=sys.argv[2])
    lines = []
    for _ in range(int(sys.argv[3])):
        where = {"ssl": trust, "server_hostname": "localhost"}
        reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]), **where)
        writer.write(b"x" * 500_000 + b".")
        assert await reader.readexactly(1) == b"k"
        lines.append(writer)
    print("there", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


class Sink(Echo):
    """Takes what comes, and says when it was all."""

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"."):
            self.transport.write(b"k")


@pytest.mark.slow
def test_a_connection_keeps_little_of_what_went_over_it(tmp_path: Path) -> None:
    def held(port: int, count: int) -> int:
        """Memory of this process while so many connections are open that have carried half a megabyte each."""
        command = [sys.executable, "-c", CLIENTS, str(port), str(tmp_path / "authority.pem"), str(count)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None
            assert clients.stdout.readline() == "there\n"
            gc.collect()
            found = psutil.Process().memory_info().rss
            clients.communicate("\n", timeout=20)
        return int(found)

    uvloop = pytest.importorskip("uvloop")
    with listening(tmp_path, uvloop.new_event_loop, serving=Sink) as (port, _):
        before = held(port, 5)
        assert held(port, 65) - before < 60 * 120_000, "the loops' own TLS: 500 kB a connection"
