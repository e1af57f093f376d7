"""A whole federation in one thread, on a clock and a network of its own, all of it drawn from one seed.

The protocol, the coordinator, leases and the store (SQLite) are the very same code that serves; the clients are the
session machine, the client's half of a parcel, and a disk. Around them everything goes wrong that can: messages are
lost, late, twice and out of order; clients cannot be reached, or die between any two things that they do; servers stand
still, die between any two writes, or two believe to lead; clocks differ; disks are slow, and fail.

After every step of a server what lies on its disk is checked (``invariants.py``). ``run(seed)`` gives a report, or
raises :class:`Violation` with what is broken; the same seed always does the same.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.linear import logistic
from foedus.core.method import Contribution
from foedus.core.values import Context, Message
from foedus.errors import (
    CheckpointError,
    FoedusError,
    ProtocolError,
    SecureAggregationFailed,
    StaleEpoch,
    StorageError,
)
from foedus.net import leases
from foedus.net import store as stores
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.learning import Learning
from foedus.net.sealing import Vault
from foedus.net.served import Keeping, Rounds, Served
from foedus.net.store import SqlStore
from foedus.net.uploads import Uploads
from foedus.protocol import blob, session, wire
from foedus.protocol.messages import Accepted, Blob, CheckIn, Kind, Received, Submit, problem
from foedus.rounds.evaluate import ClientFigures, Evaluation
from foedus.rounds.freight import closed_of, figures_blob, opened_blob, orders_of, parcel_of, update_blob
from foedus.rounds.parcel import Terms, packed
from foedus.rounds.visits import layouts_of
from foedus.rounds.work import Job

from . import sealed

RUN = "run"
PIECE = 400  # bytes: an update takes two
TICK_S, RENEW_S, LEASE_S, TIMEOUT_S = 1.0, 20.0, 30.0, 8.0


class Killed(BaseException):
    """The process is no more: nothing catches it but the world."""


class Violation(AssertionError):
    """What must always hold does not."""


@dataclass(frozen=True)
class Plan:
    """What a seed makes of the world: who there is, and what goes wrong how often."""

    seed: int
    clients: int
    rounds: int
    flowing: bool
    cohort: int | None
    minimum: int
    over: float
    servers: int
    until: float  # faults end
    lost: float  # of requests, and of answers
    twice: float
    slow: float  # seconds that a message takes at most
    dies: float  # a client, at each thing that it does
    gives_up: float  # a client, instead of training
    away: float  # how often clients cannot be reached for a while
    killed: float  # a server, at each of its writes
    stands: float  # how often a server stands still, a second
    disk_fails: float  # a write
    disk_slow: float  # seconds a write at most
    skew: float  # seconds that clocks differ
    vault: bool  # a partial sum outlives its process
    keeping: Keeping = Keeping.EPHEMERAL  # what of a round under way lies on the disk
    evaluated: bool = False  # clients are asked to evaluate, too
    sealed: bool = False  # updates are encrypted: those in a sum are asked to open it
    liar: int | None = None  # a client that says something else of what a sum opens to

    @staticmethod
    def of(seed: int) -> Plan:
        r = random.Random(f"plan {seed}")
        size = r.choices([r.randint(3, 6), r.randint(5, 12), r.randint(20, 60), r.randint(100, 300)], [60, 36, 3, 1])[0]
        some = lambda *values: r.choice((0.0, *values))  # noqa: E731
        flowing = r.random() < 0.2
        cohort = r.choice([None, max(2, size // 2), max(2, size - 1)])
        wanted = size if cohort is None else cohort
        found = Plan(
            seed=seed, clients=size, rounds=r.randint(2, 4) if size < 20 else 2, flowing=flowing,
            cohort=wanted if flowing else cohort, minimum=r.randint(1, max(1, min(3, wanted - 1))),
            over=r.choice([1.0, 1.3]), servers=r.choice([1, 2, 2]), until=r.uniform(60, 200),
            lost=some(0.02, 0.1, 0.3), twice=some(0.05, 0.3), slow=r.choice([0.2, 2.0, 6.0]),
            dies=some(0.002, 0.01, 0.04), gives_up=some(0.02, 0.1), away=some(0.01, 0.05),
            killed=some(0.002, 0.01, 0.03), stands=some(0.005, 0.02), disk_fails=some(0.005, 0.03, 0.1),
            disk_slow=some(0.05, 1.0), skew=some(2.0, 50.0), vault=r.random() < 0.5,
            keeping=r.choice([*Keeping, *[Keeping.EPHEMERAL] * 5]), evaluated=r.random() < 0.2,
            sealed=r.random() < 0.25 and not flowing and size < 20, liar=r.choice([None, 0, 1]),
        )  # fmt: skip
        if not found.sealed:
            return found
        # A sum that is opened is of three at least: it would show each of two the other's update.
        return replace(found, minimum=3, cohort=None if cohort is None else max(3, cohort))

    @property
    def calm(self) -> Plan:
        """The same world, in which nothing goes wrong any more."""
        still = dict.fromkeys(("lost", "twice", "dies", "gives_up", "away", "killed", "stands", "disk_fails"), 0.0)
        return replace(self, **still, disk_slow=0.0, slow=min(self.slow, 2.0), liar=None)


class Caller(NamedTuple):
    position: int
    name: str


# --- disks ----------------------------------------------------------------------------------------------------


@cache
def _template() -> sqlite3.Connection:
    """A database with all its tables, to be copied: migrating takes longer than a whole run."""
    engine = stores._engine("sqlite://")
    stores._migrated(engine)
    found = engine.raw_connection().driver_connection
    assert isinstance(found, sqlite3.Connection)
    return found


def database() -> SqlStore:
    """An empty database in memory, with its tables."""
    engine = stores._engine("sqlite://")
    connection = engine.raw_connection().driver_connection
    assert isinstance(connection, sqlite3.Connection)
    _template().backup(connection)
    return SqlStore(engine)


class Disk:
    """What is left when a process dies: a database and blobs, written through ``point``, at which a process may die."""

    def __init__(self) -> None:
        self.rows, self.blobs = database(), {}  # type: ignore[var-annotated]
        self.point: Callable[[str], None] = lambda where: None
        self.changed = False

    @contextmanager
    def begin(self, epoch: int | None = None) -> Iterator[Any]:
        self.point("begin")
        with self.rows.begin(epoch) as rows:
            yield _Written(rows, self)
            self.point("commit")
        self.point("after")

    def close(self) -> None:
        self.rows.close()

    # blobs: whole or not there, as the conformance suite holds of the real ones

    def put(self, content: bytes) -> str:
        self.point("put")
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = bytes(content)
        self.point("after")
        return digest

    def get(self, digest: str) -> bytes:
        if digest not in self.blobs:
            raise CheckpointError(f"there is no blob {digest[:8]}")
        return bytes(self.blobs[digest])

    def has(self, digest: str) -> bool:
        return digest in self.blobs

    def remove(self, digest: str) -> None:
        self.point("remove")
        self.blobs.pop(digest, None)
        self.point("after")

    def digests(self) -> Iterator[str]:
        return iter(sorted(self.blobs))


class _Written:
    """A transaction, with a point at every write."""

    def __init__(self, rows: Any, disk: Disk) -> None:
        self._rows, self._disk = rows, disk

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._rows, name)
        if not name.startswith(("put_", "enrol", "count", "note", "forget")) or name in ("counted", "notes"):
            return found

        def write(*args: Any, **kwargs: Any) -> Any:
            self._disk.point(name)
            result = found(*args, **kwargs)
            self._disk.changed = True
            return result

        return write


# --- servers --------------------------------------------------------------------------------------------------


@cache
def _trainer() -> Any:
    return open_trainer(_task(), seed=0)


@cache
def _task() -> fd.Task:
    return fd.Task(logistic(4, 3))


def served(plan: Plan, *, key: bool = False) -> Served:
    """What the servers of a plan serve; with the key, as its clients see it."""
    timing = fd.buffered(max(1, plan.minimum)) if plan.flowing else None
    rule = sealed.rule(2 * plan.clients, plan.minimum, key=key) if plan.sealed else fd.mean()
    algorithm = fd.Algorithm(client=fd.local_sgd(0.1), aggregator=rule, timing=timing)
    each = Rounds(
        minimum=plan.minimum, over_selection=plan.over, window=40.0, deadline=90.0, clients=plan.clients, retry=2.0,
        attempts=10_000,
    )  # fmt: skip
    return Served(
        name=RUN, task=_task(), algorithm=algorithm, rounds=plan.rounds, cohort=plan.cohort, seed=plan.seed, each=each,
        evaluation=Evaluation(every=1, clients=plan.evaluated), keeping=plan.keeping,
    )  # fmt: skip


@dataclass
class Server:
    """A process, or what is left of it."""

    name: str
    offset: float
    coordinator: Coordinator | None = None
    epoch: int | None = None
    address: str = ""
    free_at: float = 0.0  # it stands still, or is busy, until then
    dead: bool = False
    renewed: float = -math.inf
    life: int = 0

    @property
    def holder(self) -> str:
        return f"{self.name}.{self.life}"


# --- clients --------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """A client: its process, of which ``life`` is the number, and its disk."""

    position: int
    offset: float
    state: session.State
    disk: dict[bytes, tuple[session.Held, bytes]] = field(default_factory=dict)
    life: int = 0
    asked: int = 0  # what it waits for; answers to anything else are too late
    brought: tuple[bytes, Contribution, Terms] | None = None  # what it could encode anew
    orders: bytes = b""
    content: bytes = b""
    made_from: bytes = b""  # digest of the orders that the content answers
    opened: dict[int, bytes] = field(default_factory=dict)  # on its disk: of which round it has opened which sum
    model: bytes = b""
    away_until: float = 0.0

    @property
    def caller(self) -> Caller:
        return Caller(self.position, f"c{self.position}")


# --- the world ------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a run was like."""

    seed: int
    clients: int
    rounds: int
    seconds: float
    steps: int
    faults: Counter[str]
    shapes: Counter[str]


class World:
    """Time, the network, and everybody in it."""

    def __init__(self, plan: Plan, check: Callable[[World], Any]) -> None:
        self.plan = self.original = plan
        self.random = random.Random(f"world {plan.seed}")
        self.now, self._serial, self._heap = 1000.0, itertools.count(), []  # type: ignore[var-annotated]
        self.faults: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self.steps = 0
        self.disk = Disk()
        self.vault = Vault(bytes(32))
        self.keys = random.Random(f"keys {plan.seed}")
        self.acting: Server | None = None
        self.last_fault = self.now
        skew = lambda: self.random.uniform(-plan.skew, plan.skew)  # noqa: E731
        kinds = (Kind.TRAIN, Kind.EVALUATE, *((Kind.DECRYPT,) if plan.sealed else ()))
        hello = self.hello = CheckIn(run=RUN, kinds=kinds)
        self.clients = [Client(p, skew(), session.State(hello)) for p in range(plan.clients)]
        with self.disk.begin() as rows:
            for client in self.clients:
                rows.put_client(rows.enrol(client.caller.name, bytes([1]) * 8 + client.position.to_bytes(4, "big"), 0.0)
                                ._replace(examples=self.examples(client.position)))  # fmt: skip
        self.servers = [Server(f"s{i}", skew()) for i in range(plan.servers)]
        self.disk.point = self._point
        self.watched = check(self)
        for server in self.servers:
            self.at(0.0, lambda s=server: self._live(s))
        for client in self.clients:
            self.at(self.random.uniform(0, 5), lambda c=client: self._wake(c, c.life))
        self.at(plan.until, self._calm)

    # --- time

    def at(self, delay: float, what: Callable[[], None]) -> None:
        """Something happens after a while."""
        heapq.heappush(self._heap, (self.now + delay, next(self._serial), what))

    def go(self, until: float) -> None:
        """Let time pass until everybody has the final model."""
        while self._heap and not self.done:
            when, _, what = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            if self.now > until:
                raise Violation(
                    f"after {until - self.original.until:.0f} calm seconds the run is not over: {self.where()}"
                )
            what()
            self.steps += 1

    @property
    def done(self) -> bool:
        return all(client.state.phase is session.Phase.OVER for client in self.clients)

    def where(self) -> str:
        """Where everybody is, for whoever has to find a fault."""
        leaders = [s for s in self.servers if s.coordinator is not None]
        course = leaders[0].coordinator._driver.courses[RUN].state if leaders and leaders[0].coordinator else None
        at = "nobody leads" if course is None else (
            f"round {course.round}, attempt {course.attempt}, {course.phase}, deadline {course.deadline:.0f}, seats "
            f"{[(s.position, str(s.at)) for s in course.seats.values()]}"
        )  # fmt: skip
        told = Counter(str(c.state.phase) for c in self.clients)
        return f"time {self.now:.0f}, {at}; clients {dict(told)}"

    def _calm(self) -> None:
        """From now on nothing goes wrong; whoever is dead or away comes back."""
        self.plan = self.plan.calm
        for server in self.servers:
            server.free_at = min(server.free_at, self.now + 1.0)
        for client in self.clients:
            client.away_until = self.now

    def chance(self, share: float, what: str) -> bool:
        """Whether something goes wrong now."""
        if share and self.random.random() < share:
            self.faults[what] += 1
            return True
        return False

    # --- a server's disk and process

    def _point(self, where: str) -> None:
        """Between two writes: the process may die, the disk may fail or take its time."""
        server = self.acting
        if server is None:
            return
        if self.chance(self.plan.killed, f"killed at {where}"):
            raise Killed
        if self.plan.disk_slow and where != "after":
            server.free_at = max(server.free_at, self.now) + self.random.uniform(0, self.plan.disk_slow) / 10
        if where != "after" and self.chance(self.plan.disk_fails, "disk failed"):
            raise StorageError("the disk is full")

    @contextmanager
    def process(self, server: Server) -> Iterator[None]:
        """What a server does; if it dies of it, it is started again after a while. Then the disk is looked at."""
        self.acting = server
        try:
            yield
        except Killed:
            self._died(server)
        except StaleEpoch:
            self.faults["fenced"] += 1
            server.coordinator, server.epoch = None, None
        except StorageError:
            pass  # it says so, and goes on
        finally:
            self.acting = None
        self.watched.after(server)

    def _died(self, server: Server) -> None:
        server.coordinator, server.epoch, server.dead = None, None, True
        server.life += 1

        def again() -> None:
            server.dead, server.free_at = False, 0.0

        self.at(self.random.uniform(0.5, 20.0), again)

    def _live(self, server: Server) -> None:
        """A second of a server's life."""
        self.at(TICK_S, lambda: self._live(server))
        if server.dead or server.free_at > self.now:
            return
        if self.chance(self.plan.stands, "stands still"):
            server.free_at = self.now + self.random.uniform(5, 100)
            return
        if self.chance(self.plan.killed / 4, "killed"):
            self._died(server)
            return
        with self.process(server):
            self._lead(server)
        if server.coordinator is not None:
            with self.process(server):
                server.coordinator.tick(self.now + server.offset)
                self.watched.ticked(server)

    def _lead(self, server: Server) -> None:
        """Take the lease, or keep it."""
        now = self.now + server.offset
        if now - server.renewed < RENEW_S and server.coordinator is not None:
            return
        lease = leases.lead(self.disk, server.holder, server.name, now, seconds=LEASE_S)
        if lease.holder != server.holder:
            server.coordinator, server.epoch = None, None
            return
        server.renewed = now
        if server.epoch != lease.epoch or server.coordinator is None:
            server.epoch = lease.epoch
            server.coordinator = None
            made = self._made(server)
            made.load(now)
            server.coordinator = made

    def _made(self, server: Server) -> Coordinator:
        epoch = server.epoch
        ground = Ground(
            store=self.disk, blobs=self.disk, secret=self.keys.randbytes, uploads=Uploads(), epoch=lambda: epoch,
            memory=self.vault if self.original.vault else None, operator=self.vault, pause=0.5,
        )  # fmt: skip
        return Coordinator(ground, [Learning(served(self.original), _trainer())])

    # --- the network

    def call(self, client: Client, what: Callable[[Coordinator, float], Any], then: Callable[[Any], None]) -> None:
        """A request and its answer, either of which may be lost, late, or come twice. ``then(None)``: no answer."""
        client.asked += 1
        token = client.life, client.asked

        def answered(answer: Any) -> None:
            if (client.life, client.asked) == token:
                client.asked += 1
                then(answer)

        self.at(TIMEOUT_S, lambda: answered(None))
        for _ in range(1 + self.chance(self.plan.twice, "twice")):
            if client.away_until > self.now or self.chance(self.plan.lost, "request lost"):
                continue
            self.at(self._late(), lambda: self._arrive(client, what, answered))

    def _late(self) -> float:
        return self.random.uniform(0.01, self.plan.slow) * self.random.random() ** 2 + 0.01

    def _arrive(
        self, client: Client, what: Callable[[Coordinator, float], Any], answered: Callable[[Any], None]
    ) -> None:
        """A request comes to one of the servers that believe to lead."""
        leading = [s for s in self.servers if s.coordinator is not None and not s.dead]
        if not leading or client.away_until > self.now:
            return
        server = self.random.choice(leading)
        if server.free_at > self.now:  # it stands still, or is busy: the request waits
            if server.free_at - self.now < 30:
                self.at(server.free_at - self.now + 0.01, lambda: self._arrive(client, what, answered))
            return
        answer: Any = None
        with self.process(server):
            try:
                assert server.coordinator is not None
                answer = what(server.coordinator, self.now + server.offset)
            except ProtocolError as error:
                answer = problem(error)
        if answer is not None and not self.chance(self.plan.lost, "answer lost"):
            busy = max(0.0, server.free_at - self.now)
            self.at(busy + self._late(), lambda: answered(answer))

    # --- clients

    def examples(self, position: int) -> int:
        return 1 + position % 5

    def _wake(self, client: Client, life: int) -> None:
        if client.life == life and client.state.phase is session.Phase.RESTING:
            self.step(client, session.Woke(self._clock(client), self.random.random()))

    def _clock(self, client: Client) -> float:
        return self.now + client.offset

    def step(self, client: Client, event: session.Event) -> None:
        """Something happens to a client: it does what its machine says, thing by thing, and may die before each."""
        if self.chance(self.plan.away / 10, "away"):
            client.away_until = self.now + self.random.uniform(5, 60)
        life = client.life
        client.state, actions = session.step(client.state, event)
        for action in actions:
            if self.chance(self.plan.dies, "client died"):
                self._perished(client)
                return
            self._do(client, action)
            if client.life != life:
                return

    def _perished(self, client: Client) -> None:
        """Only its disk is left."""
        client.life += 1
        client.brought, client.orders, client.content = None, b"", b""
        client.state = session.State(self.hello, {key: held for key, (held, _) in client.disk.items()})
        life = client.life
        self.at(self.random.uniform(0.5, 30), lambda: self._wake(client, life))

    def _do(self, client: Client, action: session.Action) -> None:
        match action:
            case session.Say(request):
                data = wire.encode(request)
                self.call(client, lambda c, now: self._say(c, client, data, now), lambda a: self._heard(client, a))
            case session.Fetch(accepted):
                self._fetch(client, accepted.orders, lambda: session.Fetched(self._clock(client)))
            case session.Publish(finished):
                assert finished.model is not None
                self._fetch(client, finished.model, lambda: session.Fetched(self._clock(client)), final=True)
            case session.Train(accepted):
                self._train(client, accepted)
            case session.Encode(scale):
                self._encode(client, scale)
            case session.Piece(key, upload, offset, length):
                piece = client.disk[key][1][offset : offset + min(length, PIECE)]
                self.call(
                    client,
                    lambda c, now: c.uploads.write(upload, offset, piece, owner=client.position, now=now),
                    lambda a: self._heard(client, a),
                )
            case session.Rest(until):
                life = client.life
                self.at(max(0.0, until - self._clock(client)), lambda: self._wake(client, life))
            case session.Log(shape):
                self.shapes[shape] += 1
            case _:
                self._note(client, action)

    def _note(self, client: Client, action: session.Action) -> None:
        """What goes to the client's disk."""
        match action:
            case session.Keep(held):
                known = client.disk.get(held.key)
                fresh = client.content if blob.digest_of(client.content) == held.digest else b""
                client.disk[held.key] = held, fresh or (known[1] if known else b"")
                assert blob.digest_of(client.disk[held.key][1]) == held.digest
                if fresh:
                    self.watched.held(client, held.key, fresh, client.made_from)
            case session.Rename(old, held):
                client.disk[held.key] = held, client.disk.pop(old)[1]
                self.watched.renamed(old, held.key)
            case session.Settle(key, counted):
                client.disk.pop(key, None)
                self.watched.settled(client, key, counted)

    def _say(self, coordinator: Coordinator, client: Client, data: bytes, now: float) -> Any:
        request = wire.decode(data)
        if isinstance(request, Submit):
            self.watched.submitted(client, request)
        answer = coordinator.handle(client.caller, request, now)
        if isinstance(request, Submit) and isinstance(answer, Received):
            self.watched.received(coordinator, client, request.key)
        if isinstance(answer, Accepted):
            self.watched.accepted(client, answer)
        return wire.decode(wire.encode(answer))

    def _heard(self, client: Client, answer: Any) -> None:
        now, draw = self._clock(client), self.random.random()
        if answer is None:
            self.step(client, session.Lost(now, draw))
        elif isinstance(answer, int):
            self.step(client, session.Went(now, answer))
        else:
            self.step(client, session.Heard(now, answer, draw))

    def _fetch(self, client: Client, wanted: Blob, then: Callable[[], session.Event], *, final: bool = False) -> None:
        def fetched(content: Any) -> None:
            if not isinstance(content, bytes) or blob.digest_of(content) != wanted.digest:
                self.step(client, session.Lost(self._clock(client), self.random.random()))
                return
            client.orders = content
            if final:
                client.model = content
            self.step(client, then())

        self.call(client, lambda c, now: c.blob(client.caller, wanted.digest), fetched)

    # --- training: a pure function of orders and client

    def _train(self, client: Client, accepted: Accepted) -> None:
        life = client.life

        def trained() -> None:
            if client.life != life:
                return
            if self.chance(self.plan.gives_up, "gave up"):
                self.step(client, session.GaveUp(self._clock(client), "training"))
                return
            client.made_from = accepted.orders.digest
            if accepted.kind is Kind.EVALUATE:
                client.content = figures_blob(
                    ClientFigures(self.examples(client.position), {"loss": client.position / 7})
                )
                self._finished(client)
                return
            if accepted.kind is Kind.DECRYPT:
                client.content = opened_blob(self._opened(client, accepted), accepted.orders.digest)
                self._finished(client)
                return
            salt = client.position.to_bytes(4, "big") + client.life.to_bytes(4, "big")
            client.brought = accepted.key, *contribution(self.original, client.orders, salt)
            self._encode(client, 1.0)

        self.at(self.random.uniform(0.5, 10.0), trained)

    def _opened(self, client: Client, accepted: Accepted) -> Message:
        """What the client finds in an encrypted sum, once it is sure that it may be opened."""
        mine = [held for held, _ in client.disk.values() if held.round == accepted.round]
        if not mine:
            raise Violation(f"client {client.position} is asked to open a sum that nothing of it is in")
        if client.opened.setdefault(accepted.round, accepted.orders.digest) != accepted.orders.digest:
            raise Violation(f"client {client.position} is asked to open a second sum of round {accepted.round}")
        closed = closed_of(blob.unpack(client.orders), run=RUN, round=accepted.round)
        context = Context(
            seed=self.plan.seed, round=accepted.round, client=client.position, size=_trainer().layout.size
        )
        opening = served(self.original, key=True).algorithm.aggregator.sealed
        assert opening is not None
        try:
            found = opening.open(closed, context)
        except SecureAggregationFailed as error:
            raise Violation(f"client {client.position} refuses the sum of round {accepted.round}: {error}") from error
        lies = client.position == self.plan.liar
        return found | {"sum": found["sum"] + (1 << 16)} if lies else found

    def _encode(self, client: Client, scale: float) -> None:
        assert client.brought is not None
        _, brought, terms = client.brought
        scaled = terms._replace(orders=replace(terms.orders, scale=scale))
        parcel = packed(scaled, client.position, brought, self.examples(client.position))
        client.content = update_blob(parcel)
        self._finished(client)

    def _finished(self, client: Client) -> None:
        made = session.Made(self._clock(client), len(client.content), blob.digest_of(client.content))
        self.step(client, made)


@cache
def _population(count: int) -> fd.Clients:
    sizes = np.array([1 + p % 5 for p in range(count)])
    return fd.Clients.generated(lambda position: None, [f"c{p}" for p in range(count)], sizes=sizes)  # type: ignore


def contribution(plan: Plan, orders: bytes, salt: bytes) -> tuple[Contribution, Terms]:
    """What a client makes of orders: numbers that nobody else has, and that differ when it trains anew."""
    trainer, what = _trainer(), served(plan, key=True)
    job = Job(what.task, what.algorithm, _population(plan.clients), plan.seed)
    bare = Terms.of(job, orders_of(blob.unpack(orders), trainer.initial(), (None, None)), layouts_of(trainer))
    words = hashlib.blake2b(orders + salt, digest_size=60).digest()
    vector = (np.frombuffer(words, "<u4")[: trainer.layout.size] / 2**31 - 1).astype(np.float32)
    return Contribution(vector, steps=1, loss=0.5), bare


def vector_of(content: bytes) -> tuple[Any, float]:
    """The update in a client's bytes, and its weight."""
    parcel = parcel_of(blob.unpack(content))
    if "closed" in parcel.messages["update"]:
        return sealed.numbers_of(parcel.messages["update"], _trainer().layout.size)
    return parcel.messages["update"]["values"].astype(np.float64), parcel.weight


def run(seed: int, *, plan: Plan | None = None) -> Report:
    """One federation from beginning to end.

    Raises:
        Violation: something that must hold does not; its text says what.
    """
    from .invariants import Watch

    plan = plan or Plan.of(seed)
    world = World(plan, Watch)
    try:
        world.go(plan.until + 400.0 * (plan.rounds + 2))
        world.watched.end()
    except (Violation, Killed):
        raise
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}") from error
    finally:
        with suppress(FoedusError):
            world.disk.close()
    return Report(seed, plan.clients, plan.rounds, world.now - 1000.0, world.steps, world.faults, world.shapes)


def told(found: Mapping[str, int]) -> str:
    """Counts, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in Counter(found).most_common())


def attempt(seed: int) -> tuple[int, str, Counter[str], Counter[str]]:
    """What came of a seed: a text if something is broken, which faults there were, and the shapes of sessions."""
    try:
        report = run(seed)
    except Violation as error:
        return seed, str(error), Counter(), Counter()
    return seed, "", report.faults, report.shapes
