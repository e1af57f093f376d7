"""A served federation in memory: the coordinator, and clients that talk with it at a time of the test's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import foedus as fd
from foedus.backends import open_trainer
from foedus.net.blobs import Blobs, open_blobs
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.learning import Learning
from foedus.net.served import Served
from foedus.net.store import Store, open_store
from foedus.net.uploads import Uploads
from foedus.protocol import blob, wire
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Finished,
    Kind,
    Message,
    Place,
    Received,
    Stands,
    StartUpload,
    Submit,
)  # fmt: skip

from .trainees import Trainee

BOTH = (Kind.TRAIN, Kind.EVALUATE)


class Caller(NamedTuple):
    position: int
    name: str


def counted(seed: int = 0) -> Callable[[int], bytes]:
    """A source of keys that repeats itself."""
    numbers = itertools.count(1 + (seed << 32))
    return lambda length: next(numbers).to_bytes(length, "big")


@dataclass
class Federation:
    """A coordinator and all its clients; ``restarted`` puts another coordinator on the same store."""

    trainee: Trainee
    how: dict[str, Any] = field(default_factory=dict)
    store: Store = field(default_factory=lambda: open_store("sqlite://"))
    blobs: Blobs = field(default_factory=lambda: open_blobs(f"memory://{next(_PLACES)}"))
    ground: dict[str, Any] = field(default_factory=dict)
    now: float = 1000.0
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # position → key, bytes
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    check: Callable[[], None] = lambda: None
    model: bytes = b""

    def __post_init__(self) -> None:
        with self.store.begin() as rows:
            if not rows.clients():
                for name, size in zip(self.trainee.clients.ids, self.trainee.clients.sizes.tolist(), strict=True):
                    rows.put_client(rows.enrol(str(name), str(name).encode(), self.now)._replace(examples=size))
        self.coordinator = self.restarted()

    @property
    def served(self) -> Served:
        how = {"rounds": 3, "seed": self.trainee.seed, "central_test": self.trainee.clients.central_test} | self.how
        return Served(name="run", task=self.trainee.task, algorithm=self.trainee.algorithm, **how)

    def restarted(self, seed: int = 0) -> Coordinator:
        """A new process on what the old one wrote."""
        ground = Ground(
            store=self.store, blobs=self.blobs, secret=counted(seed), uploads=Uploads(), pause=0.0,
            watch=lambda event, told: self.events.append((event, dict(told))), **self.ground,
        )  # fmt: skip
        self.coordinator = Coordinator(
            ground, [Learning(self.served, open_trainer(self.trainee.task, seed=self.served.seed))]
        )
        self.coordinator.load(self.now)
        return self.coordinator

    @property
    def learning(self) -> Learning:
        return self.coordinator.learnings[0]

    def caller(self, position: int) -> Caller:
        return Caller(position, str(self.trainee.clients.ids[position]))

    def ask(self, position: int, message: Message) -> Any:
        """Through the wire format, both ways."""
        caller = self.caller(position)
        found = self.coordinator.handle(caller, wire.decode(wire.encode(message)), self.now)
        self.check()
        return wire.decode(wire.encode(found))

    def tick(self, seconds: float = 0.01) -> None:
        self.now += seconds
        self.coordinator.tick(self.now)
        self.check()

    # --- what one client does

    def check_in(self, position: int, kinds: Sequence[Kind] = BOTH) -> Message:
        pending = (self.held[position][0],) if position in self.held else ()
        size = int(self.trainee.clients.sizes[position])
        found = self.ask(position, CheckIn(kinds=tuple(kinds), examples=size, pending=pending))
        if isinstance(found, Finished) and found.model is not None:
            caller = self.caller(position)
            self.model = self.coordinator.blob(caller, found.model.digest)
        return found

    def trained(self, position: int, told: Accepted, scale: float = 1.0) -> bytes:
        """The bytes that a client sends."""
        if told.held is not None and position in self.held:
            return self.held[position][1]
        caller = self.caller(position)
        orders = self.coordinator.blob(caller, told.orders.digest)
        assert blob.digest_of(orders) == told.orders.digest
        if told.kind is Kind.EVALUATE:
            return self.trainee.figures(orders, position)
        return self.trainee.update(orders, position, scale=scale)

    def send(self, position: int, key: bytes, content: bytes, *, place: Place | None = None) -> Message:
        """Upload and submit."""
        if place is None:
            found = self.ask(position, StartUpload(key=key, size=len(content), digest=blob.digest_of(content)))
            if not isinstance(found, Place):
                return found
            place = found
        middle = len(content) // 2
        for begin, end in ((0, middle), (middle, len(content))):
            self.coordinator.uploads.write(place.upload, begin, content[begin:end], owner=position, now=self.now)
        found = self.ask(position, Submit(
            key=key, upload=place.upload, size=len(content), digest=blob.digest_of(content)
        ))  # fmt: skip
        if isinstance(found, Received):
            self.trainee.let_in(position, content)
        return found

    def visit(self, position: int) -> Message:
        """A whole device session, as far as it goes."""
        found = self.check_in(position)
        if not isinstance(found, Accepted):
            return found
        place, scale = None, 1.0
        if self.learning.served.algorithm.timing is not None:  # it may be buffered: asked before it encodes
            started = self.ask(position, StartUpload(key=found.key))
            if not isinstance(started, Place):
                return started
            scale = started.scale
        content = self.trained(position, found, scale)
        self.held[position] = found.key, content
        return self.send(position, found.key, content, place=place)

    def standing(self, position: int) -> Stands:
        (entry,) = self.ask(position, Ask(keys=(self.held[position][0],))).entries
        if entry.state in (Stands.COUNTED, Stands.DISCARDED):
            del self.held[position]
        return entry.state

    def again(self, position: int) -> Message | None:
        """Ask how the held bytes stand; send them again if so told."""
        key, content = self.held[position]
        return self.send(position, key, content) if self.standing(position) is Stands.AGAIN else None

    def run(self, order: Iterable[int] | None = None, *, most: int = 2000) -> None:
        """All clients come again and again, until the run is over."""
        everybody = list(order if order is not None else range(len(self.trainee.clients)))
        for _ in range(most):
            self.tick()
            answers = [self.visit(position) for position in everybody]
            for position in list(self.held):
                self.again(position)
            if all(isinstance(answer, Finished) for answer in answers):
                return
        raise AssertionError(f"the run is not over: {self.coordinator.runs()}; {self.events[-5:]}")

    def lines(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        import json

        return [json.loads(line) for line in self.coordinator.lines("run", file, 0).splitlines()]


_PLACES = itertools.count()
__all__ = ["Federation", "fd"]
