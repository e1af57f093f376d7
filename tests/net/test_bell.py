"""A client's ear for the doorbell: bells are heard; whatever else is said, or not said, does no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.server import serve

from foedus.net import bell
from foedus.net.bell import Line, listen
from foedus.protocol import wire
from foedus.protocol.messages import Bell, Event, Later

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def never(_: str) -> None:
    """Another server than the first is never asked."""
    await asyncio.Event().wait()


def line(url: str, ticket: Callable[[], str] = lambda: "t", context: Callable[[], Any] = lambda: None) -> Line:
    """To one server, in a run called ``run``."""
    return Line(lambda: url, never, context, ticket, "run")


async def heard(says: Any, *, wanted: int, again: float, monkeypatch: pytest.MonkeyPatch) -> list[Bell]:
    """What is heard of a server that says certain things on every connection."""
    monkeypatch.setattr(bell, "AGAIN_S", again)
    found: list[Bell] = []
    enough = asyncio.Event()

    def ring(message: Bell) -> None:
        found.append(message)
        if len(found) >= wanted:
            enough.set()

    async with serve(says, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        listening = asyncio.create_task(listen(line(f"http://127.0.0.1:{port}"), ring))
        waiting = asyncio.create_task(enough.wait())
        await asyncio.wait([listening, waiting], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert not listening.done(), listening
        for task in (listening, waiting):
            task.cancel()
        await asyncio.gather(listening, waiting, return_exceptions=True)
    return found


OFFER = Bell(run="run", event=Event.OFFER, round=3)


async def test_it_says_who_it_is_answers_pings_and_hears_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    async def says(connection: Any) -> None:
        said.append(connection.request.headers["Authorization"])
        await connection.send('0{"sid":"x"}')
        said.append(await connection.recv())
        await connection.send("2")
        said.append(await connection.recv())
        await connection.send('451-["bell",{"_placeholder":true,"num":0}]')
        await connection.send(wire.encode(OFFER))

    assert await heard(says, wanted=1, again=60.0, monkeypatch=monkeypatch) == [OFFER]
    assert said == ["Bearer t", '40{"run": "run"}', "3"]


async def test_nonsense_and_lost_connections_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        [b"nonsense", wire.encode(Later(after_s=1, until_s=2)), "44", b"x" * (1 << 17), None, wire.encode(OFFER)]
    )

    async def says(connection: Any) -> None:
        line = next(lines)
        if line is None:
            await connection.close(1011)
        else:
            await connection.send(line)

    assert await heard(says, wanted=1, again=0.0, monkeypatch=monkeypatch) == [OFFER]


async def test_a_line_that_has_fallen_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "SILENT_S", 0.05)
    connections: list[Any] = []

    async def says(connection: Any) -> None:
        connections.append(connection)
        await connection.send('0{"sid":"x"}')
        if len(connections) > 1:
            await connection.send(wire.encode(OFFER))
        await connection.wait_closed()

    assert await heard(says, wanted=1, again=0.0, monkeypatch=monkeypatch) == [OFFER]


async def test_a_server_that_is_not_there_is_tried_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "AGAIN_S", 0.0)
    tries: list[str] = []

    def ticket() -> str:
        tries.append("")
        return "t" if len(tries) > 1 else ""  # before the first request there is none

    listening = asyncio.create_task(listen(line("https://127.0.0.1:1", ticket), lambda _: None))
    for _ in range(10_000):
        if len(tries) > 3:
            break
        await asyncio.sleep(0)
    assert not listening.done()
    listening.cancel()
    assert len(tries) > 1


async def test_it_goes_wherever_requests_go_at_once() -> None:
    """The connection to the server before is left, though it is well, and so is the rest before it is tried again."""
    ended, heard = asyncio.Event(), asyncio.Event()
    address, moves = ["http://127.0.0.1:1"], asyncio.Event()

    async def moved(before: str) -> None:
        while address[-1] == before:
            moves.clear()
            await moves.wait()

    def go(server: Any) -> None:
        address.append(f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
        moves.set()

    async def quiet(connection: Any) -> None:
        await connection.send('0{"sid":"x"}')
        heard.set()
        await connection.wait_closed()
        ended.set()

    async def rings(connection: Any) -> None:
        await connection.send(wire.encode(OFFER))
        await connection.wait_closed()

    bells: asyncio.Queue[Bell] = asyncio.Queue()
    async with asyncio.timeout(20), serve(quiet, "127.0.0.1", 0) as one, serve(rings, "127.0.0.1", 0) as two:
        there = Line(lambda: address[-1], moved, lambda: None, lambda: "t")
        listening = asyncio.create_task(listen(there, bells.put_nowait))
        await asyncio.sleep(0)  # nobody is there at first
        go(one)
        await heard.wait()
        go(two)
        assert await bells.get() == OFFER
        await ended.wait()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
