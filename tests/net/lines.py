"""A line of bad quality between clients and a server: a TCP proxy that delays, loses, stalls, throttles and resets.

Below TCP a lost packet is sent again after a while, so that a program only sees that bytes come late; so does this
line. What it decides is drawn from a seed, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

CHUNK = 1400  # bytes, about a packet
AGAIN_S = 0.2  # until a lost packet is sent again


class Weather(NamedTuple):
    """What befalls bytes.

    Attributes:
        delay_s: every chunk, each way.
        loss: share of chunks that come a while later still.
        reset: share of chunks with which the connection is cut, without a word.
        stall: share of chunks after which nothing more is passed on, and the connection stays open.
        rate: bytes per second at most, each way; 0 for no limit.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    reset: float = 0.0
    stall: float = 0.0
    rate: float = 0.0


class Line:
    """Where it listens, and what has happened on it."""

    def __init__(self, to: int, weather: Weather, seed: int) -> None:
        self.to, self.weather, self.port = to, weather, 0
        self.seen: Counter[str] = Counter()
        self._draw = random.Random(seed)

    async def between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways."""
        self.seen["connections"] += 1
        there: asyncio.StreamWriter | None = None
        with suppress(OSError, asyncio.CancelledError):
            back, there = await asyncio.open_connection("127.0.0.1", self.to)
            ways = [asyncio.create_task(self._pass(reader, there)), asyncio.create_task(self._pass(back, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, there):
            if end is not None:
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes in one direction, in order. Chunks are on their way at the same time, as packets are."""
        loop, weather = asyncio.get_running_loop(), self.weather
        arrives = loop.time()
        while chunk := await reader.read(CHUNK):
            self.seen["chunks"] += 1
            late = weather.delay_s + (AGAIN_S if self._draw.random() < weather.loss else 0.0)
            arrives = max(arrives + (len(chunk) / weather.rate if weather.rate else 0.0), loop.time() + late)
            if self._draw.random() < weather.reset:
                self.seen["resets"] += 1
                return
            if self._draw.random() < weather.stall:
                self.seen["stalls"] += 1
                await loop.create_future()  # for ever
            if weather.rate:
                await asyncio.sleep(max(0.0, arrives - loop.time() - 0.5))  # half a second's bytes lie in the line
            loop.call_at(arrives, self._write, writer, chunk)

    def _write(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        if not writer.is_closing():
            writer.write(chunk)


class Gate:
    """An HTTP proxy as organisations have it: ``CONNECT HOST:PORT`` and then bytes both ways, to where it permits."""

    def __init__(self, to: int) -> None:
        self.port, self.asked = 0, list[str]()
        self._line = Line(to, Weather(), 0)

    async def between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head.split(b"\r\n")[0].decode())
            writer.write(b"HTTP/1.1 200 go ahead\r\n\r\n")
            await self._line.between(reader, writer)


@contextmanager
def opened(here: Line | Gate) -> Iterator[int]:
    """Listen in a thread of its own; the port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(act: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(act, loop).result(20)

    listening = do(asyncio.start_server(here.between, "127.0.0.1", 0))
    here.port = listening.sockets[0].getsockname()[1]
    try:
        yield here.port
    finally:
        do(_ended(listening.close))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


async def _ended(close: Callable[[], None]) -> None:
    """All that is still under way ends."""
    close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
