"""The doorbell: rings for whoever shows a ticket, and for nobody else."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import socketio

from foedus.net.api import BELL
from foedus.net.bell import Line, listen
from foedus.net.identity.tls import client_context
from foedus.net.serve import Server
from foedus.protocol import wire
from foedus.protocol.messages import Bell, Event

from .lines import Gate
from .lines import opened as line
from .test_serve import serving, trainee_of, where
from .visitors import joined


@pytest.mark.slow
def test_it_rings_when_a_round_begins_and_is_committed(tmp_path: Path) -> None:
    trainee = trainee_of("adam")

    async def act(url: str) -> list[Bell]:
        visitors = [await joined(trainee, i, tmp_path, where(server)) for i in (0, 1, 2, 3, 4)]
        await visitors[0].visit()
        heard: list[Bell] = []
        ear = socketio.AsyncClient(reconnection=False)
        ear.on(BELL, lambda content: heard.append(wire.decode(content)))
        ticket = visitors[0].transport._client.auth.ticket
        await ear.connect(url, auth={"ticket": ticket, "run": "run"}, transports=["websocket"])
        deaf = socketio.AsyncClient(reconnection=False)
        with pytest.raises(socketio.exceptions.ConnectionError):
            await deaf.connect(url, auth={"ticket": "nobody's"}, transports=["websocket"])
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        async with asyncio.timeout(60):
            while not any(bell.event is Event.FINISHED for bell in heard):
                await asyncio.sleep(0.02)
        await ear.disconnect()
        await deaf.shutdown()
        for visitor in visitors:
            await visitor.transport.close()
        return heard

    with serving(tmp_path / "server", trainee, settings={"insecure_loopback": True}) as server:
        heard = asyncio.run(act(f"http://localhost:{server.port}"))
    assert {bell.round for bell in heard if bell.event is Event.COMMITTED} == {1, 2, 3}
    assert Event.OFFER in {bell.event for bell in heard}
    assert {bell.run for bell in heard} == {"run"}


@pytest.mark.slow
def test_it_is_heard_through_the_proxy_of_an_organisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS is with the server, and the proxy sees where to, and bytes."""
    trainee = trainee_of("adam")

    async def act(server: Server) -> list[Bell]:
        visitors = [await joined(trainee, i, tmp_path, where(server)) for i in (0, 1, 2, 3, 4)]
        await visitors[0].visit()
        visit, heard, rung = visitors[0].transport._client.auth, list[Bell](), asyncio.Event()

        def ring(bell: Bell) -> None:
            heard.append(bell)
            if bell.event is Event.COMMITTED:
                rung.set()

        way = visitors[0].transport
        ear = asyncio.create_task(
            listen(
                Line(
                    lambda: way.address,
                    way.moved,
                    lambda: client_context(visit._mine.trust, files=visit._mine.files(now=time.time())),
                    lambda: visit.ticket,
                ),
                ring,
            )
        )
        while not server.metrics.doorbells._value.get():
            assert not ear.done(), ear.exception()
            await asyncio.sleep(0.01)
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        await asyncio.wait_for(rung.wait(), 60)
        ear.cancel()
        await asyncio.gather(ear, return_exceptions=True)
        for visitor in visitors:
            await visitor.transport.close()
        return heard

    with serving(tmp_path / "server", trainee) as server, line(gate := Gate(server.port)):
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{gate.port}")
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        heard = asyncio.run(asyncio.wait_for(act(server), 150))
    assert {bell.run for bell in heard} == {"run"}
    assert len(gate.asked) > 5
    assert set(gate.asked) == {f"CONNECT localhost:{gate._line.to} HTTP/1.1"}
