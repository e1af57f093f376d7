"""The doorbell: rings for whoever shows a ticket, and for nobody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import socketio

from foedus.net.api import BELL
from foedus.protocol import wire
from foedus.protocol.messages import Bell, Event

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
