"""A bad line between clients and a server: a TCP proxy that delays, loses, stalls, throttles, damages and resets.

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
        stall: share of chunks with which the connection falls silent: it takes bytes, and passes none on any more.
        rate: bytes per second at most, each way; 0 for no limit.
        damage: share of chunks of which a bit is turned over.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    reset: float = 0.0
    stall: float = 0.0
    rate: float = 0.0
    damage: float = 0.0

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Of chunks that are lost, cut off, stalled, damaged."""
        return (self.loss, self.reset, self.stall, self.damage)


class Line:
    """Where it listens, and what has happened on it."""

    def __init__(self, to: int, weather: Weather, seed: int) -> None:
        self.to, self.weather, self.port = to, weather, 0
        self.seen: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._under_way = set[asyncio.Task[None] | None]()  # a loop forgets tasks that wait for what it does not watch

    async def between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways."""
        self.seen["connections"] += 1
        self._under_way.add(asyncio.current_task())
        ends, ways = [writer], list[asyncio.Task[None]]()
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self.to)
            ends.append(there)
            ways = [asyncio.create_task(self._pass(reader, there)), asyncio.create_task(self._pass(back, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass  # the server is not there, or the line is closed: asyncio's own callback wants a task that has ended
        finally:
            for way in ways:
                way.cancel()
            for end in ends:
                end.transport.abort()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*ways, return_exceptions=True)
            self._under_way.discard(asyncio.current_task())

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes in one direction, in order. Chunks are on their way at the same time, as packets are."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(16)
        arriving = asyncio.create_task(self._arrive(under_way, writer))
        loop, weather, at = asyncio.get_running_loop(), self.weather, 0.0
        try:
            while chunk := await reader.read(CHUNK):
                self.seen["chunks"] += 1
                late = weather.delay_s + (AGAIN_S if self._befalls("lost", weather.loss) else 0.0)
                at = max(at + (len(chunk) / weather.rate if weather.rate else 0.0), loop.time() + late)
                if self._befalls("reset", weather.reset):
                    break
                if self._befalls("stalled", weather.stall):
                    arriving.cancel()
                    while await reader.read(CHUNK):
                        pass
                    break
                await under_way.put((at, self._damaged(chunk)))
            await under_way.join()
        finally:
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at, chunk = await under_way.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            writer.write(chunk)
            await writer.drain()
            under_way.task_done()

    def _befalls(self, what: str, share: float) -> bool:
        found = self._draw.random() < share
        self.seen[what] += found
        return found

    def _damaged(self, chunk: bytes) -> bytes:
        return chunk[:-1] + bytes([chunk[-1] ^ 1]) if self._befalls("damaged", self.weather.damage) else chunk


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
    for _ in range(20):  # what was closed is given back a few turns later
        await asyncio.sleep(0)
