"""Gateways, workers and a coordinator, with a broker between them: the same bits as a simulation, whoever dies."""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.errors import ConfigurationError
from foedus.net import roles
from foedus.net.bell import listen
from foedus.net.brokers.broker import Broker
from foedus.net.brokers.kafka import KafkaBroker
from foedus.net.brokers.memory import MemoryBroker
from foedus.net.bundle import build
from foedus.net.identity.callers import TRAIN, Caller
from foedus.net.roles import Aggregator, GatewayServer, open_broker, serve_roles
from foedus.net.serve import Server, blocking
from foedus.net.served import Rounds, Served
from foedus.net.serving import Role, Serving
from foedus.protocol.messages import Bell, Event
from foedus.record.folder import read

from .test_bell import line
from .test_learning import simulated
from .test_serve import trainee_of
from .trainees import Trainee
from .visitors import Silo, Visitor, joined


def each_of(trainee: Trainee) -> Rounds:
    """Those take part who have something to train on; who will not come is not waited for long."""
    return Rounds(clients=int(np.count_nonzero(trainee.clients.sizes)), window=2.0)


class Roles:
    """All three in threads of this process; workers and gateways can be killed and added."""

    def __init__(self, folder: Path, trainee: Trainee, broker: Broker, **how: Any) -> None:
        self.folder, self.broker = folder, broker
        what = {"algorithm": trainee.algorithm, "rounds": 3, "central_test": trainee.clients.central_test} | how
        self.runs = [Served(name="run", task=trainee.task, seed=trainee.seed, each=each_of(trainee), **what)]
        port = roles._free_port()
        self.settings = Serving(folder=folder, port=port, progress=False, names=["localhost"], farewell=20.0)
        self.server = Server(self.runs, self.settings, elsewhere=roles._elsewhere(self.settings))
        self.threads = [threading.Thread(target=blocking, args=(self.server,), daemon=True)]
        self.gateways: list[GatewayServer] = []
        self.workers: list[tuple[Aggregator, threading.Event]] = []
        self.threads[0].start()

    def gateway(self) -> GatewayServer:
        self.gateways.append(GatewayServer(replace(self.settings, port=0), self.broker, server=self.server))
        self.threads.append(threading.Thread(target=blocking, args=(self.gateways[-1],), daemon=True))
        self.threads[-1].start()
        while not self.gateways[-1].uvicorn.started and self.threads[-1].is_alive():
            threading.Event().wait(0.01)
        return self.gateways[-1]

    def worker(self) -> Aggregator:
        stop = threading.Event()
        self.workers.append((Aggregator(self.runs, self.settings, self.broker), stop))
        self.threads.append(threading.Thread(target=self.workers[-1][0].run, args=(stop,), daemon=True))
        self.threads[-1].start()
        return self.workers[-1][0]

    def stop(self) -> None:
        for _, stop in self.workers:
            stop.set()
        for gateway in self.gateways:
            gateway.uvicorn.should_exit = True
        for thread in self.threads[1:]:
            thread.join(20)
        for gateway in self.gateways:
            gateway.close()
        self.server.uvicorn.should_exit = True
        self.threads[0].join(20)
        self.server.close()


@contextmanager
def opened(folder: Path, trainee: Trainee, broker: Broker, **how: Any) -> Iterator[Roles]:
    found = Roles(folder, trainee, broker, **how)
    try:
        yield found
    finally:
        found.stop()


async def trained(
    trainee: Trainee, folder: Path, found: Roles, act: Callable[[], None] = lambda: None, kind: type[Visitor] = Visitor
) -> list[bytes]:
    def where(number: int) -> Callable[[], tuple[str, str, str]]:
        gateway = found.gateways[number % len(found.gateways)]
        return lambda: (gateway.url, found.server.authority.pin, found.server.invite())

    visitors = [await joined(trainee, i, folder, where(i), kind=kind) for i in range(len(trainee.clients))]
    running = asyncio.gather(*(visitor.until_finished() for visitor in visitors))
    await asyncio.to_thread(act)
    await running
    for visitor in visitors:
        await visitor.transport.close()
    return [visitor.model for visitor in visitors]


@pytest.fixture
def kafka() -> Iterator[Broker]:
    from confluent_kafka import Producer

    owner = Producer({"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0})
    (one,) = owner.list_topics(timeout=10).brokers.values()
    broker = KafkaBroker(f"kafka://{one.host}:{one.port}")
    yield broker
    broker.close()
    del owner


def compared(folder: Path, name: str, tmp_path: Path) -> None:
    wanted, found = simulated(trainee_of(name), tmp_path / "simulated"), read(folder / "runs" / "run")
    assert found.configuration["status"] == "finished"
    assert [line["central"] for line in found.metrics] == [line["central"] for line in wanted.metrics]
    for parameter, array in wanted.parameters.items():
        np.testing.assert_array_equal(found.parameters[parameter], array)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam"])
def test_two_gateways_and_two_workers_give_the_bits_of_the_simulation(tmp_path: Path, name: str) -> None:
    trainee = trainee_of(name)
    with opened(tmp_path / "server", trainee, MemoryBroker(partitions=3)) as found:
        for _ in range(2):
            found.gateway()
            found.worker()
        models, heard = asyncio.run(listened(trainee, tmp_path, found))
        assert len(set(models)) == 1
    compared(tmp_path / "server", name, tmp_path)
    assert {bell.event for bell in heard} >= {Event.COMMITTED, Event.FINISHED}, "a gateway rings for its own clients"
    assert {bell.run for bell in heard} == {"run"}


async def listened(trainee: Trainee, folder: Path, found: Roles) -> tuple[list[bytes], list[Bell]]:
    """A federation, and what one of its clients hears at the doorbell of a gateway."""
    gateway, heard, over = found.gateways[1], [], asyncio.Event()
    ticket = gateway.access.mint(Caller(0, "listener", TRAIN), now=time.time(), lifetime_s=600.0)
    context = ssl.create_default_context(cafile=str(found.server.authority.folder / "authority.pem"))

    def ring(bell: Bell) -> None:
        heard.append(bell)
        if bell.event is Event.FINISHED:
            over.set()

    ear = asyncio.create_task(listen(line(gateway.url, lambda: ticket, lambda: context), ring))
    try:
        models = await trained(trainee, folder, found)
        async with asyncio.timeout(30):
            await over.wait()
    finally:
        ear.cancel()
        await asyncio.gather(ear, return_exceptions=True)
    return models, heard


@pytest.mark.slow
def test_over_kafka_with_a_worker_that_dies(tmp_path: Path, kafka: Broker) -> None:
    """librdkafka's mock cluster; the first worker dies with what it has read and not written."""
    trainee = trainee_of("adam")
    with opened(tmp_path / "server", trainee, kafka) as found:
        found.gateway()
        dying = found.worker()

        def act() -> None:
            time.sleep(0.5)
            _, stop = found.workers[0]
            dying._worker.flush = lambda: None  # type: ignore[method-assign]  # it writes nothing any more
            stop.set()
            found.threads[-1].join(20)
            found.worker()

        models = asyncio.run(trained(trainee, tmp_path, found, act))
        assert len(set(models)) == 1
    compared(tmp_path / "server", "adam", tmp_path)


@pytest.mark.slow
def test_encrypted_updates_are_merged_by_workers_that_cannot_read_them(tmp_path: Path) -> None:
    """And those in the sum open it through the gateways."""
    pytest.importorskip("tenseal")
    from .test_unsealing import rule, simulated, trainee

    who = trainee()
    blind = replace(who.algorithm, aggregator=rule())
    broker = MemoryBroker(partitions=2)
    with opened(tmp_path / "server", who, broker, algorithm=blind, rounds=2, central_test=None) as found:
        for _ in range(2):
            found.gateway()
            found.worker()
        asyncio.run(trained(who, tmp_path, found, kind=Silo))
    wanted, record = simulated(tmp_path / "simulated"), read(tmp_path / "server" / "runs" / "run")
    assert [line["trained"] for line in record.metrics] == [len(who.clients)] * 2
    for parameter, array in wanted.parameters.items():
        np.testing.assert_array_equal(record.parameters[parameter], array)


@pytest.mark.slow
def test_all_in_one_process_by_one_setting(tmp_path: Path) -> None:
    """What ``foedus serve --broker memory:`` does."""
    trainee = trainee_of("adam")
    settings = Serving(
        folder=tmp_path / "server", port=roles._free_port(), progress=False, names=["localhost"], broker="memory:",
        farewell=20.0,
    )  # fmt: skip
    runs = [Served(
        name="run", task=trainee.task, algorithm=trainee.algorithm, rounds=3, seed=trainee.seed,
        each=each_of(trainee), central_test=trainee.clients.central_test,
    )]  # fmt: skip
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(serve_roles(runs, settings)))
    thread.start()

    async def clients() -> None:
        from foedus.net.identity.access import Access
        from foedus.net.identity.authority import Authority
        from foedus.net.store import open_store

        for _ in range(500):
            with suppress(Exception):
                async with __import__("httpx").AsyncClient(verify=False) as plain:
                    if (await plain.get(f"https://localhost:{settings.port}/health")).status_code == 200:
                        break
            await asyncio.sleep(0.02)
        authority = Authority.kept(tmp_path / "server" / "identity", now=time.time())
        store = open_store(f"sqlite:///{tmp_path}/server/foedus.sqlite")
        access = Access(authority, store)
        token = access.invite(now=time.time(), uses=100)
        address = f"https://localhost:{settings.port}", authority.pin, token
        visitors = [await joined(trainee, i, tmp_path, lambda: address) for i in range(len(trainee.clients))]
        await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
        for visitor in visitors:
            await visitor.transport.close()
        store.close()

    asyncio.run(clients())
    thread.join(60)
    assert len(done[0][0].metrics) == 3
    compared(tmp_path / "server", "adam", tmp_path)


def test_what_does_not_fit_behind_a_broker_is_refused(tmp_path: Path) -> None:
    task = fd.Task(fd.logistic(2, 2))
    settings = Serving(folder=tmp_path, broker="memory:", progress=False, port=0)
    median = Served(name="run", task=task, algorithm=fd.fedavg(fd.local_sgd(0.1), aggregator=fd.median()), rounds=1)
    with pytest.raises(ConfigurationError, match="needs its updates in one place"):
        serve_roles([median], settings)
    masked = fd.masked(fd.Withstand(clients=4, corrupt=0.0, dropouts=0.25), bits=16, most=100, least=3)
    hidden = Served(name="run", task=task, algorithm=fd.fedavg(fd.local_sgd(0.1), aggregator=masked), rounds=1)
    with pytest.raises(ConfigurationError, match="clients talk about with one server"):
        serve_roles([hidden], settings)
    many = Served(
        name="run",
        task=task,
        algorithm=fd.fedavg(fd.local_sgd(0.1)),
        rounds=1,
        cohort=3,
        each=Rounds(over_selection=1.3),
    )
    with pytest.raises(ConfigurationError, match=r"lets in 1\.3 times the cohort"):
        serve_roles([many], settings)
    with pytest.raises(ConfigurationError, match="--role gateway works with processes on other machines"):
        serve_roles([many], Serving(folder=tmp_path, broker="memory:", role=Role.GATEWAY))
    for role in (Role.GATEWAY, Role.AGGREGATOR, Role.COORDINATOR):  # or it would be a whole server, unnoticed
        with pytest.raises(ConfigurationError, match=f"a {role} works with processes on other machines"):
            Serving(folder=tmp_path, role=role)
    with pytest.raises(ConfigurationError, match="no broker; write kafka://host:9092"):
        open_broker("redis://x")


def test_what_a_gateway_prints_can_be_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("federation = None\n")
    run = Served(
        name="run", task=fd.Task(fd.logistic(2, 2)), algorithm=fd.fedavg(fd.local_sgd(0.1)), rounds=1,
        source=tmp_path / "task.py",
    )  # fmt: skip
    gateway = GatewayServer(Serving(folder=tmp_path / "server", port=8765), MemoryBroker(), runs=[run])
    try:
        told = gateway.told()
    finally:
        gateway.shell.shut()
        gateway.close()
    assert re.search(
        r"foedus join https://localhost:8765 --pin \w{64} --token (?!TOKEN)\S+ --data MODULE:OBJECT\n", told
    )
    assert f"the task they are asked to approve: {build(tmp_path / 'task.py').digest.hex()}" in told
