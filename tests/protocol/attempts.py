"""Attempts at masked sums for tests: terms, clients with counted secrets, and a server and clients moved by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foedus.protocol.secagg import client as clients
from foedus.protocol.secagg import server as servers
from foedus.protocol.secagg.client import Client, Memory, Own
from foedus.protocol.secagg.conversation import Outcome, converse
from foedus.protocol.secagg.messages import Channel, FromClient, Identity, Promise, Terms, pinned, terms_for
from foedus.protocol.secagg.server import Close, Failed, From, Phase, Revealed, Server
from foedus.secure.graph import Withstand
from foedus.secure.planes import word
from foedus.secure.primitives import digest, identity_key

MODEL = digest(b"the model of the round")
PRIVATE = [digest(b"identity", bytes([i])) for i in range(64)]
TRUST = pinned({identity_key(p) for p in PRIVATE})


Numbers = tuple[np.ndarray, ...]


def promised(count: int, *, least: int = 2, sizes: Sequence[tuple[int, int]] = ((5, 20),), **how: Any) -> Promise:
    """``sizes`` are entries and width of every channel."""
    withstand = Withstand(clients=count, **{"corrupt": 0.0, "dropouts": 0.3, **how})
    return Promise(withstand, least, tuple(Channel(f"channel {i}", *size) for i, size in enumerate(sizes)))


def termed(promise: Promise, **changes: Any) -> Terms:
    """The terms of attempt 1 of round 3."""
    found = terms_for(
        promise, session=b"s" * 16, round=3, attempt=1, model=MODEL, graph=digest(b"graph"),
        clients=promise.withstand.clients,
    )  # fmt: skip
    return found._replace(**changes)


def own(slot: int, promise: Promise, *, entropy: str = "", memory: Memory | None = None) -> Own:
    identity = Identity(PRIVATE[slot], TRUST) if promise.withstand.malicious else None
    return Own(slot, promise, digest(entropy.encode(), bytes([slot])), MODEL, memory, identity)


def vectors(promise: Promise, seed: int = 0) -> list[Numbers]:
    """What all clients add up in every channel, so that no sum wraps around."""
    count, random = promise.withstand.clients, np.random.default_rng(seed)
    made = [
        random.integers(0, 2**c.width // count, (count, c.entries), np.uint64).astype(word(c.width))
        for c in promise.channels
    ]
    return [tuple(rows[slot] for rows in made) for slot in range(count)]


def sums(promise: Promise, survivors: Sequence[int] | np.ndarray, seed: int = 0) -> list[list[int]]:
    """The sums over some clients, worked out with whole numbers of any size."""
    chosen = [vectors(promise, seed)[slot] for slot in survivors]
    return [
        [sum(int(numbers[i][j]) for numbers in chosen) % 2**c.width for j in range(c.entries)]
        for i, c in enumerate(promise.channels)
    ]


def lists(totals: Numbers | None) -> list[list[int]]:
    assert totals is not None
    return [total.tolist() for total in totals]


def held(promise: Promise, *, lost: Mapping[int, Phase] | None = None, seed: int = 0, **changes: Any) -> Outcome:
    """A whole attempt."""
    owns = [own(slot, promise) for slot in range(promise.withstand.clients)]
    return converse(termed(promise, **changes), owns, vectors(promise, seed).__getitem__, lost=lost)


class Table:
    """A server and its clients, moved one phase at a time, so that a test may change what is said in between."""

    def __init__(self, promise: Promise, **changes: Any) -> None:
        self.promise, self.terms = promise, termed(promise, **changes)
        self.server: Server = servers.open_attempt(self.terms)
        self.clients: dict[int, Client] = {}
        self.said: dict[int, FromClient] = {}  # what clients said last
        self.told: dict[int, Any] = {}  # what the server told them last
        self.refused: list[tuple[int, str]] = []
        self.left: dict[int, str] = {}
        self.end: Revealed | Failed | None = None
        self.numbers = vectors(promise)
        for slot in range(self.terms.clients):
            self.clients[slot], actions = clients.begin(self.terms, own(slot, promise))
            self._carry(slot, actions)

    def _carry(self, slot: int, actions: Any) -> None:
        for action in actions:
            if isinstance(action, clients.Send):
                self.said[slot] = action.message
            elif isinstance(action, clients.Left):
                self.left[slot] = action.reason

    def hear(self, event: servers.Event) -> None:
        """The server hears something."""
        self.server, actions = servers.step(self.server, event)
        for action in actions:
            if isinstance(action, servers.Send):
                self.told[action.slot] = action.message
            elif isinstance(action, servers.Refused):
                self.refused.append((action.slot, action.reason))
            else:
                self.end = action

    def up(self, *, without: set[int] = frozenset()) -> Table:  # type: ignore[assignment]
        """All that clients said goes to the server, and time is up for the others."""
        said, self.said = self.said, {}
        before = self.server.phase
        for slot, message in said.items():
            if slot not in without:
                self.hear(From(slot, message))
        if self.server.phase is before and self.end is None:
            self.hear(Close())
        return self

    def down(self) -> Table:
        """All that the server told goes to the clients."""
        told, self.told = self.told, {}
        for slot, message in told.items():
            self.tell(slot, message)
        return self

    def tell(self, slot: int, event: Any) -> tuple[Any, ...]:
        """One client is told something."""
        self.clients[slot], actions = clients.step(self.clients[slot], event)
        self._carry(slot, actions)
        return tuple(actions)

    def ready(self) -> Table:
        """All clients have their numbers."""
        for slot, client in self.clients.items():
            if client.stage is clients.Stage.SHARED:
                self.tell(slot, clients.Numbers(self.numbers[slot]))
        return self

    def until_masked(self) -> Table:
        """Keys, shares and masked numbers are exchanged, and the server is about to ask."""
        return self.up().down().ready().up().down().up()
