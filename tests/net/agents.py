"""Agents and a coordinator in one process, on virtual time: real training processes, real files, no network."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import foedus as fd
from foedus.backends import open_trainer
from foedus.net.agent import Agent, Data, Place
from foedus.net.blobs import open_blobs
from foedus.net.bundle import Bundle, import_bundle
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.identity.keys import SigningKey
from foedus.net.learning import Learning
from foedus.net.memory import MemoryTransport
from foedus.net.owner.folder import OwnerFolder
from foedus.net.owner.surroundings import Surroundings
from foedus.net.sandbox import Limits
from foedus.net.served import Rounds, Served
from foedus.net.source import own, to_bytes
from foedus.net.store import open_store
from foedus.net.training import Training
from foedus.protocol.messages import CheckIn, Kind

from .federations import Caller, counted

URL = "https://fl.example.org:8765"
SOURCE = """
import foedus as fd

class federation:
    task = fd.Task(fd.logistic(3, 2), metrics=[fd.accuracy])
    algorithm = {algorithm}
"""
FEDAVG = "fd.fedavg(fd.local_sgd(0.1, batch_size=4))"
RNG = np.random.default_rng(0)
DATA = {i: (RNG.normal(size=(9 + i, 3)).astype(np.float32), RNG.integers(0, 2, 9 + i)) for i in range(3)}


@dataclass
class Time:
    """Virtual time: whoever rests lets it pass, for all."""

    now_: float = 1_900_000_000.0
    passes: Callable[[], None] = lambda: None
    most: int = 2000

    def now(self) -> float:
        return self.now_

    async def rest(self, seconds: float) -> None:
        self.most -= 1
        assert self.most, "the federation does not end"
        self.now_ += max(0.01, seconds)
        self.passes()
        await asyncio.sleep(0)


@dataclass
class Server:
    """A coordinator, and what clients must know of it."""

    folder: Path
    algorithm: str = FEDAVG
    how: dict[str, Any] = field(default_factory=dict)
    time: Time = field(default_factory=Time)
    signing: SigningKey = field(default_factory=SigningKey.generate)
    only: int = len(DATA)

    def __post_init__(self) -> None:
        self.bundle = Bundle.of({"task.py": SOURCE.format(algorithm=self.algorithm).encode()})
        path = self.folder / "served.bundle"
        path.write_bytes(self.bundle.content)
        self.found = import_bundle(path, self.bundle.digest, "task:federation")
        self.store, self.blobs = open_store("sqlite://"), open_blobs(str(self.folder / "blobs"))
        with self.store.begin() as rows:
            for position, (_, y) in list(DATA.items())[: self.only]:
                rows.put_client(rows.enrol(str(position), str(position).encode(), 0.0)._replace(examples=len(y)))
        self.restarted()
        self.time.passes = lambda: self.coordinator.tick(self.time.now())

    def restarted(self) -> None:
        """A new process on what the old one wrote."""
        ground = Ground(
            store=self.store, blobs=self.blobs, secret=counted(int(self.time.now())), pause=0.0, signing=self.signing
        )
        how = {"rounds": 2, "seed": 5, "each": Rounds(minimum=3)} | self.how
        served = Served(
            name="run", task=self.found.task, algorithm=self.found.algorithm, target="task:federation", **how,
        )  # fmt: skip
        self.learning = Learning(served, open_trainer(self.found.task, seed=served.seed))
        self.coordinator = Coordinator(ground, [self.learning])
        self.learning.bundle = self.coordinator.offer(self.bundle.content)
        self.coordinator.load(self.time.now())
        self.coordinator.tick(self.time.now())

    def transport(self, position: int) -> MemoryTransport:
        return MemoryTransport(lambda: self.coordinator, Caller(position, str(position)), self.time.now)


class Client(NamedTuple):
    """An agent, and what it said."""

    agent: Agent
    said: list[str]


def owner(server: Server, position: int, *, consent: bool = True, rules: str = "") -> OwnerFolder:
    """An owner's folder; a second call finds the first one's."""
    folder = OwnerFolder(server.folder / f"owner{position}")
    if not folder.path.exists():
        folder.path.mkdir()
        folder.rules_file.write_text(rules)
        if consent:
            folder.consents().give(URL, who="x", when=0.0)
    return folder


def client(server: Server, position: int, **given: Any) -> Client:
    """An agent of a server, with the client's own data."""
    said: list[str] = []
    folder = owner(server, position, **{k: given.pop(k) for k in ("consent", "rules") if k in given})
    place = Place(URL, "ab" * 32, server.signing.public, folder)
    scratch = server.folder / f"scratch{position}"
    scratch.mkdir(exist_ok=True)
    how: dict[str, Any] = {
        "transport": server.transport(position),
        "training": Training(Limits(seconds=60), scratch),
        "data": Data("data", read=lambda: to_bytes(own(DATA[position]))),
        "hello": CheckIn(run="run", kinds=(Kind.TRAIN, Kind.EVALUATE)),
        "clock": server.time,
        "surroundings": Surroundings,
        "approve": (server.bundle.digest.hex(),),
        "tell": said.append,
        "draw": lambda: 0.5,
    }
    return Client(Agent(place, **{**how, **{name: value for name, value in given.items() if value is not None}}), said)


@contextlib.asynccontextmanager
async def closing(*clients: Client) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for each in clients:
            await each.agent.close()


def simulated(server: Server, folder: Path, rounds: int = 2) -> Any:
    """The same federation in the simulator."""
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)
    clients = fd.Clients.of(DATA)
    return fd.simulate(server.found.task, server.found.algorithm, clients, rounds=rounds, seed=5, settings=settings)


# --- what is heard of an agent, and how it dies ---------------------------------------------------------------


def heard(each: Client) -> list[Any]:
    """What a client says to its server from now on."""
    said, plain = list[Any](), each.agent.transport.ask

    async def ask(message: Any) -> Any:
        said.append(message)
        return await plain(message)

    each.agent.transport.ask = ask  # type: ignore[method-assign]
    return said


class Killed(BaseException):
    """What a power cut looks like from inside: nothing after it happens, no clean-up either."""


def fragile(agent: Agent, at: int) -> None:
    """Have an agent die before its so-manieth action: after all that it did before."""
    plain, count = agent._act, itertools.count()

    async def act(action: Any) -> Any:
        if next(count) == at:
            raise Killed
        return await plain(action)

    agent._act = act  # type: ignore[method-assign]


async def killed_at(agent: Agent, at: int, work: Awaitable[None]) -> bool:
    """Have an agent work until it dies before its so-manieth action; whether it did, or came to an end before."""
    fragile(agent, at)
    try:
        await work
    except Killed:
        agent.journal.close()
        return True
    return False
