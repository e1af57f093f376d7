"""Real processes that are killed: the same round goes on, and ends with the bits of a run in which nothing died."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest

import foedus as fd
from foedus.net.bell import Line, listen
from foedus.protocol.messages import Ask, Event, Stands
from foedus.record.folder import read

from ..conformance.test_methods import population
from . import databases
from .servers import Process, until
from .trainees import Trainee
from .visitors import Visitor, joined


def trainee() -> Trainee:
    task = fd.Task(fd.logistic(5, 3, dtype="float64"))
    algorithm = fd.fedavg(fd.local_sgd(lr=0.1, epochs=1, batch_size=4), server=fd.adam(lr=0.01))
    return Trainee(task, algorithm, population(ragged=True), seed=2)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    found: list[Process] = []
    yield found
    for process in found:
        process.stop()


async def everybody(server: Process, who: Trainee, folder: Path) -> list[Visitor]:
    until(Path(server.told["token"]).exists)
    pin, token = Path(server.told["token"]).read_text().split()
    until(lambda: server.events("leading"))
    visitors = [await joined(who, i, folder, lambda: (server.url, pin, token)) for i in (0, 1, 2, 3, 4)]
    for visitor in visitors:
        visitor.patient = 90.0
    OPENED.extend(visitors)
    return visitors


def wanted(folder: Path) -> dict[str, Any]:
    """The model of a run in which nothing dies."""
    own = trainee()
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)
    return fd.simulate(own.task, own.algorithm, own.clients, rounds=3, seed=2, settings=settings).parameters


def check_same(folder: Path, tmp_path: Path) -> None:
    for name, array in wanted(tmp_path / "wanted").items():
        np.testing.assert_array_equal(read(folder / "runs" / "run").parameters[name], array)


T = TypeVar("T")
OPENED: list[Visitor] = []


def run(act: Coroutine[Any, Any, T]) -> T:
    """Carry out, and close the connections of all visitors."""

    async def whole() -> T:
        try:
            return await act
        finally:
            for visitor in OPENED:
                await visitor.transport.close()
            OPENED.clear()

    return asyncio.run(whole())


async def standing(visitor: Visitor) -> Any:
    assert visitor.held is not None
    return await visitor.ask(Ask(keys=(visitor.held[0],)))


async def until_received(visitor: Visitor) -> None:
    before = len(visitor.sent)
    while len(visitor.sent) == before:
        await visitor.visit()
        await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "keeping"),
    [("sqlite", "ephemeral"), ("postgres", "ephemeral"), ("sqlite", "sealed"), ("sqlite", "durable")],
)
def test_a_server_killed_in_the_middle_of_a_round_goes_on_with_it(
    tmp_path: Path, database: str, keeping: str, processes: list[Process]
) -> None:
    url = databases.postgres_url() if database == "postgres" else None
    server = Process(tmp_path / "server", port=free_port(), database=url, keeping=keeping).start()
    processes.append(server)

    async def act() -> float:
        who = trainee()
        visitors = await everybody(server, who, tmp_path)
        for visitor in visitors:  # all say how many examples they have; then the round begins
            await visitor.visit()
        await until_received(visitors[0])
        await until_received(visitors[3])
        server.kill()
        begun = len(server.events("resumed"))
        server.start()
        took = until(lambda: len(server.events("resumed")) > begun)
        asked = [entry.state for i in (0, 3) for entry in (await standing(visitors[i])).entries]
        assert set(asked) == {Stands.AGAIN if keeping == "ephemeral" else Stands.PENDING}, "who is asked to send again"
        for visitor in (visitors[0], visitors[3]):
            assert visitor.held is not None
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        assert [visitor.trained for visitor in visitors] == [3, 3, 0, 3, 3], "nobody trained twice for a round"
        return took

    took = run(act())
    until(lambda: server.process is not None and server.process.poll() is not None)
    check_same(tmp_path / "server", tmp_path)
    print(f"\n{database}, {keeping}: going on {took:.2f} s after the kill, Python's own start included")


async def listened(server: Process) -> None:
    """Wait until somebody listens at a server's doorbell."""
    async with asyncio.timeout(30), httpx.AsyncClient() as looking:
        while "\nfoedus_doorbells 1.0" not in (await looking.get(f"{server.url}/metrics")).text:
            await asyncio.sleep(0.02)


def answers(server: Process) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/leading").status_code == 503
    return False


@pytest.mark.slow
@pytest.mark.parametrize("keeping", ["ephemeral", "sealed"])
def test_another_server_takes_over_from_one_that_was_killed(
    tmp_path: Path, keeping: str, processes: list[Process]
) -> None:
    """On one PostgreSQL, with one identity. Clients joined at the one that leads, which names the other: when it is no
    more they go there; and so do their ears for the doorbell."""
    shared = {"database": databases.postgres_url(), "blobs": str(tmp_path / "blobs"), "keeping": keeping}
    one = Process(tmp_path / "one", port=free_port(), **shared).start()
    processes.append(one)

    async def act() -> float:
        who = trainee()
        visitors = await everybody(one, who, tmp_path)
        two = Process(tmp_path / "two", port=free_port(), token=one.told["token"], **shared)
        shutil.copytree(tmp_path / "one" / "identity", tmp_path / "two" / "identity")
        two.start()
        processes.append(two)
        until(lambda: answers(two))
        for visitor in visitors:
            await visitor.visit()
            async with asyncio.timeout(30):
                while two.url not in visitor.transport._others:
                    await visitor.visit()
        assert {visitor.transport.address for visitor in visitors} == {one.url}
        way, heard = visitors[0].transport, list[tuple[str, Event]]()
        line = Line(lambda: way.address, way.moved, lambda: None, lambda: way._client.auth.ticket)
        ear = asyncio.create_task(listen(line, lambda bell: heard.append((way.address, bell.event))))
        await listened(one)
        await until_received(visitors[0])
        one.kill()
        begin = time.monotonic()
        until(lambda: two.events("leading"))
        took = time.monotonic() - begin
        await visitors[0].visit()
        await listened(two)
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        ear.cancel()
        await asyncio.gather(ear, return_exceptions=True)
        assert (two.url, Event.COMMITTED) in heard
        until(lambda: two.process is not None and two.process.poll() is not None)
        return took

    took = run(act())
    assert took < 10, "take-over"
    check_same(tmp_path / "two", tmp_path)
    print(f"\ntake-over {took:.2f} s after the leader was killed")


@pytest.mark.slow
def test_a_database_that_is_restarted_costs_no_update(tmp_path: Path, processes: list[Process]) -> None:
    server = Process(tmp_path / "server", port=free_port(), database=databases.postgres_url()).start()
    processes.append(server)

    async def act() -> None:
        who = trainee()
        visitors = await everybody(server, who, tmp_path)
        for visitor in visitors:
            await visitor.visit()
        await until_received(visitors[0])
        databases.restart_postgres()
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        assert [visitor.trained for visitor in visitors] == [3, 3, 0, 3, 3]

    run(act())
    until(lambda: server.process is not None and server.process.poll() is not None)
    check_same(tmp_path / "server", tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path, processes: list[Process]) -> None:
    """No file may grow beyond a size that the database's log soon has; then there is room again."""
    server = Process(tmp_path / "server", port=free_port(), bytes=300_000).start()
    processes.append(server)

    async def act() -> None:
        who = trainee()
        visitors = await everybody(server, who, tmp_path)
        tasks = [asyncio.ensure_future(visitor.until_finished()) for visitor in visitors]
        while not (server.events("storage failed") or server.events("tick failed")):
            assert not all(task.done() for task in tasks), "the disk was never full"
            await asyncio.sleep(0.02)
        server.kill()
        server.told["bytes"] = 0
        server.start()
        await asyncio.gather(*tasks)
        assert all(v.held is None or Stands.COUNTED for v in visitors)

    run(act())
    until(lambda: server.process is not None and server.process.poll() is not None)
    check_same(tmp_path / "server", tmp_path)
