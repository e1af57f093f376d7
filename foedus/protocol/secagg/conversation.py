"""A whole attempt in one process: a server and all its clients, each told only what it would be told over a network.

For simulations that run the real protocol, for benchmarks, and for tests. Who is lost says at which phase it is lost:
it has sent all that came before, and sends nothing from there on.

Not here: the machines (``client.py``, ``server.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import FoedusError, SecureAggregationFailed
from foedus.protocol.secagg import client as clients
from foedus.protocol.secagg import server as servers
from foedus.protocol.secagg.client import Client, Own
from foedus.protocol.secagg.messages import FromClient, FromServer, Terms, message_size
from foedus.protocol.secagg.server import Close, Failed, From, Phase, Refused, Revealed, Server
from foedus.secure.traffic import CHANNEL, TERMS


class Outcome(NamedTuple):
    """How an attempt went.

    Attributes:
        totals: the sums [entry] of all channels; ``None`` if it failed.
        survivors: slots of those in it.
        reason: why it failed; empty if it did not.
        up, down: bytes that every client sent and received, int64 [client].
        left: why clients left, by slot.
        refused: what the server refused: slots and reasons.
        memories: what every client remembers, by slot.
    """

    totals: tuple[NDArray[Any], ...] | None
    survivors: NDArray[np.int64]
    reason: str
    up: NDArray[np.int64]
    down: NDArray[np.int64]
    left: dict[int, str]
    refused: list[tuple[int, str]]
    memories: dict[int, clients.Memory]


Heard = Callable[[int, FromClient], None]  # a client's slot, and what of it reaches the server


class _Room:
    """Who is in the conversation, and what has passed."""

    def __init__(self, terms: Terms, lost: Mapping[int, Phase], heard: Heard) -> None:
        self.server: Server = servers.open_attempt(terms)
        self.clients: dict[int, Client] = {}
        self.lost, self.heard = lost, heard
        self.post: list[tuple[int, FromServer]] = []
        self.up = np.zeros(terms.clients, np.int64)
        self.down = np.full(terms.clients, TERMS + CHANNEL * (len(terms.channels) - 1), np.int64)
        self.left: dict[int, str] = {}
        self.refused: list[tuple[int, str]] = []
        self.memories: dict[int, clients.Memory] = {}
        self.end: Revealed | Failed | None = None

    def to_server(self, slot: int, actions: Sequence[clients.Action]) -> None:
        """Carry out a client's actions; of one that is lost by now nothing arrives."""
        for action in actions:
            if isinstance(action, clients.Remember):
                self.memories[slot] = action.memory
            elif isinstance(action, clients.Left):
                self.left[slot] = action.reason
            elif not self._gone(slot):
                self.up[slot] += message_size(action.message)
                self.heard(slot, action.message)
                self.do(From(slot, action.message))

    def _gone(self, slot: int) -> bool:
        at = self.lost.get(slot)
        return at is not None and _ORDER.index(self.server.phase) >= _ORDER.index(at)

    def do(self, event: servers.Event) -> None:
        """Put an event to the server, and carry out its actions."""
        self.server, actions = servers.step(self.server, event)
        for action in actions:
            if isinstance(action, servers.Send):
                self.post.append((action.slot, action.message))
            elif isinstance(action, Refused):
                self.refused.append((action.slot, action.reason))
            else:
                self.end = action

    def deliver(self) -> None:
        """Bring the server's messages to the clients, and theirs back."""
        post, self.post = self.post, []
        for slot, message in post:
            if slot in self.clients and not self._gone(slot):
                self.down[slot] += message_size(message)
                self.clients[slot], actions = clients.step(self.clients[slot], message)
                self.to_server(slot, actions)


_ORDER = (Phase.KEYS, Phase.SHARES, Phase.NUMBERS, Phase.VOTES, Phase.ANSWERS, Phase.DONE, Phase.FAILED)


def converse(
    terms: Terms,
    owns: Sequence[Own],
    numbers: Callable[[int], tuple[NDArray[Any], ...]],
    *,
    lost: Mapping[int, Phase] | None = None,
    heard: Heard = lambda slot, message: None,
) -> Outcome:
    """Carry out an attempt.

    Args:
        terms: what it is about.
        owns: what every client brings, by slot.
        numbers: a client's numbers in every channel, by slot; asked once, when it is to mask them.
        lost: at which phase clients are lost.
        heard: told of everything that reaches the server, for attacks that look at it.

    Example:
        >>> from foedus.protocol.secagg.messages import Channel, Promise, terms_for
        >>> from foedus.secure.graph import Withstand
        >>> promise = Promise(Withstand(clients=4, corrupt=0.0), least=2, channels=(Channel("update", 2, 10),))
        >>> same = dict(session=bytes(16), round=1, attempt=1, model=bytes(32), graph=bytes(32))
        >>> owns = [Own(slot, promise, bytes([slot]) * 32, bytes(32)) for slot in range(4)]
        >>> vectors = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.uint16)
        >>> terms = terms_for(promise, clients=4, **same)
        >>> found = converse(terms, owns, lambda slot: (vectors[slot],), lost={3: Phase.NUMBERS})
        >>> found.totals[0].tolist(), found.survivors.tolist()
        ([9, 12], [0, 1, 2])
    """
    room = _Room(terms, lost or {}, heard)
    for own in owns:
        try:
            room.clients[own.slot], actions = clients.begin(terms, own)
        except FoedusError as error:
            room.left[own.slot] = str(error)
            continue
        room.to_server(own.slot, actions)
    while room.end is None:
        before = room.server.phase
        room.deliver()
        if before is Phase.NUMBERS and room.server.phase is before:
            _masking(room, numbers)
        if room.end is None and room.server.phase is before:
            room.do(Close())
    return _outcome(room)


def _masking(room: _Room, numbers: Callable[[int], tuple[NDArray[Any], ...]]) -> None:
    """Give every client that has its delivery the numbers to mask."""
    for slot, client in list(room.clients.items()):
        if client.stage is clients.Stage.SHARED and client.delivery is not None and not room._gone(slot):
            room.clients[slot], actions = clients.step(client, clients.Numbers(numbers(slot)))
            room.to_server(slot, actions)


def _outcome(room: _Room) -> Outcome:
    end = room.end
    assert end is not None
    totals, survivors, reason = (
        (None, np.zeros(0, np.int64), end.reason) if isinstance(end, Failed) else (end.totals, end.survivors, "")
    )
    return Outcome(totals, survivors, reason, room.up, room.down, room.left, room.refused, room.memories)


def check_revealed(found: Outcome) -> tuple[NDArray[Any], ...]:
    """The sums of an attempt.

    Raises:
        SecureAggregationFailed: it failed; says why.
    """
    if found.totals is None:
        raise SecureAggregationFailed(found.reason)
    return found.totals
