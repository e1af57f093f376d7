"""Who takes part in a round, when, and what it brings: the paces at which a federation can run.

A :class:`Pace` makes one round of the engine out of the executor's work and, where there is one, the simulated
world's clock: :class:`InStep` waits for a cohort, :class:`ByEdges` lets edge aggregators average first, and
:class:`~foedus.sim.flights.AsTheyCome` takes updates as they arrive. The engine asks for a round, and commits it.

Not here: what the server makes of it (``rounds/commit.py``), local training (the executors).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.aggregate import Masking, message_bytes
from foedus.core.batches import processed, taken
from foedus.core.method import Contribution, Vectors
from foedus.core.random import generator
from foedus.core.select import Population, Sampler
from foedus.core.timing import Hierarchical
from foedus.core.values import NOTHING, Context, State, Update
from foedus.errors import ConfigurationError
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.record.kept import Kept
from foedus.rounds.brought import sent_down
from foedus.rounds.collect import Collector
from foedus.rounds.commit import Server
from foedus.rounds.masks import maskings
from foedus.rounds.parcel import masking_bytes
from foedus.rounds.sending import Sender
from foedus.rounds.state import RunState
from foedus.rounds.work import UPDATE, Job, Orders, Outcome, Session, union
from foedus.sim.masks import Called, Summed, check_asked, hidings, summed, unshown
from foedus.sim.settings import Settings
from foedus.sim.singly import Singly
from foedus.sim.world import Load, Passage, pass_round

Ints = NDArray[np.int64]


class Brought(NamedTuple):
    """What a round brought.

    Attributes:
        outcome: of the clients that trained.
        asked: positions of all whose costs are to be counted, int64 [A].
        costs: float64 [A, 5], see :data:`foedus.rounds.state.COSTS`.
        enough: whether the round counts.
        world: figures of the simulated world for the record; ``None`` without one.
        told: further figures for the record.
        pull: added by the server to parameters and buffers; ``None`` for nothing.
        timing: who is under way afterwards, where updates come at their own time.
    """

    outcome: Outcome
    asked: Ints
    costs: NDArray[np.float64]
    enough: bool
    world: dict[str, Any] | None = None
    told: Mapping[str, Any] = {}
    pull: Weights | None = None
    timing: State | None = None


class Pace(Protocol):
    """How rounds come about. Law: a round depends on the state, the seed and its number only."""

    def round(self, number: int, session: Session, state: RunState) -> Brought:
        """Carry out a round."""


@dataclass(frozen=True)
class Ground:
    """What all paces stand on: the job, who is asked, and what clients keep.

    Attributes:
        wanted: clients a round, where that is a number; a world may ask more of them.
        rounds: how many rounds there are to be.
    """

    job: Job
    server: Server
    settings: Settings
    sampler: Sampler
    wanted: int | None
    rounds: int
    kept: Kept
    sender: Sender

    def cohort(self, number: int) -> Ints:
        """Who is asked in a round: positions, each once."""
        clients = self.job.clients.at(number)
        population = Population(len(clients), clients.sizes)
        asked = np.asarray(self.sampler.sample(population, self.job.seed, number))
        check_asked(maskings(self.job.algorithm, buffers=False), asked)
        sound = asked.ndim == 1 and (asked.dtype.kind in "iu" or not asked.size)
        if not sound or len(np.unique(asked)) < len(asked) or ((asked < 0) | (asked >= population.count)).any():
            raise ConfigurationError(
                f"the sampler {self.sampler.label} must give different positions from 0 to {population.count - 1}, "
                f"and gave {reprlib.repr(asked.tolist())} in round {number}"
            )
        return asked.astype(np.int64, copy=False)

    def down(self, state: RunState) -> Vectors:
        """What the method sends to clients beside the model."""
        method = self.job.algorithm.method
        return {} if method is None else sent_down(method, state.method, state.round + 1)

    def orders(self, number: int, state: RunState, cohort: Ints) -> Orders:
        """The orders of a round to some clients."""
        start, told = self.sender.sent(state).weights, self.server.told(state)
        return Orders(number, start, cohort, self.kept.read(cohort), down=self.down(state), told=told)

    def bring(self, session: Session, orders: Orders, state: RunState) -> Outcome:
        """What the clients of some orders bring."""
        return self.singly.bring(session, orders, state)

    @property
    def singly(self) -> Singly:
        """Who attacks, and who watches."""
        layouts, settings = (self.server.layout, self.server.buffer_layout), self.settings
        return Singly(self.job, layouts, settings.adversary, settings.watch)

    def load(self, number: int, state: RunState, asked: Ints) -> Load:
        """Bytes and work of the round, per client; the bytes to be sent, foretold, and the work only where a world
        must know them before anybody has trained."""
        down = self.sender.sent(state).bytes + message_bytes(dict(self.down(state)))
        down += sum(message_bytes(dict(told)) for told in self.server.told(state).values())
        if not self.settings.cryptography:
            down += masking_bytes(self.job.algorithm, self.masks(state))[1]
        if self.settings.world is None:
            return Load(down, 0, np.zeros(len(asked), np.int64))
        clients, spec = self.job.clients.at(number), self.job.algorithm.client
        known = clients.sizes
        sizes = known[asked] if known is not None else np.array([len(clients.train(int(c))) for c in asked], np.int64)
        return Load(down, self._foretold(state), processed(spec, sizes), taken(spec, sizes))

    def _foretold(self, state: RunState) -> int:
        """Bytes that a client will send: what the last ones sent on average; at first, those of a random update."""
        if state.sent:
            return state.sent
        job, part = self.job, self.server.travels.get(UPDATE)
        layout = self.server.layout if part is None else part.layout
        noise = generator(job.seed, "foretold").standard_normal(layout.size).astype(layout.dtype)
        told = self.server.told(state).get(UPDATE, NOTHING)
        context = Context(job.seed, 0, 0, layout, layout.size, told=told, secret=known_to_all_who_know_the_seed)
        averaged = self.server.sizes(state.weights)[1] if job.task.average_buffers else 0
        masked = masking_bytes(job.algorithm, self.masks(state))[0]
        return averaged + masked + message_bytes(job.algorithm.aggregator.encode(Update(noise, 1.0), context))

    def masks(self, state: RunState) -> dict[str, Masking]:
        """The channels that are masked."""
        averaged = self.job.task.average_buffers and state.weights.buffers.size > 0
        return maskings(self.job.algorithm, buffers=averaged)


class _Called(NamedTuple):
    """Positions of the clients asked, int64 [C]; what each has to do; what becomes of them in a simulated world;
    and those whose updates count."""

    asked: Ints
    load: Load
    passage: Passage | None
    cohort: Ints


class InStep:
    """Rounds that wait for their cohort: until all have answered, as many as wanted, or the deadline has come."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._coming: tuple[int, _Called] | None = None  # the next round's call, where it has been made already

    def round(self, number: int, session: Session, state: RunState) -> Brought:
        called = self._called(number, state)
        orders = replace(
            self._ground.orders(number, state, called.cohort),
            following=self._following(number, state),
            limits=_limits(called),
            apart=self._ground.settings.cryptography,
        )
        outcome = self._ground.bring(session, orders, state)
        if not orders.apart:
            return shown(self._ground, in_step(called, outcome, minimum(self._ground.settings)), state)
        asked = Called(number, called.asked, orders.start)
        found = summed(self._ground.job, self._ground.masks(state), outcome, asked)
        return _after_masking(in_step(called, found.outcome, minimum(self._ground.settings)), found)

    def _called(self, number: int, state: RunState) -> _Called:
        """Who takes part in a round: a function of the seed and the number, never of how other rounds ended."""
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != number:
            return call(self._ground, number, state)
        called = coming[1]
        if called.passage is None:  # what a method sends beside the model may be more than when the call was made
            called = called._replace(load=self._ground.load(number, state, called.asked))
        return called

    def _following(self, number: int, state: RunState) -> Ints | None:
        """Who trains in the round after; None if there is none, or a fault that will be told when its turn comes."""
        ground = self._ground
        if number >= ground.rounds or ground.settings.world is not None or ground.job.algorithm.downlink is not None:
            return None  # how many bytes will be sent is known when this round has ended
        with suppress(Exception):
            self._coming = number + 1, call(self._ground, number + 1, state)
        return None if self._coming is None else self._coming[1].cohort


class ByEdges:
    """Rounds in which edge aggregators average some times among their own clients before the server averages them.

    An edge is to the server what a client is: its update goes through the same stages and rule. With one round of
    the edges their partial sums are merged as they are, which changes no bit.
    """

    def __init__(self, ground: Ground, timing: Hierarchical) -> None:
        self._ground, self._timing = ground, timing

    def round(self, number: int, session: Session, state: RunState) -> Brought:
        ground = self._ground
        called = call(ground, number, state, times=self._timing.rounds)
        orders = replace(ground.orders(number, state, called.cohort), limits=_limits(called))
        edges = self._edges(called.cohort)
        numbers = np.unique(edges)
        shares = [orders.only(np.flatnonzero(edges == edge)) for edge in numbers]
        told: dict[str, Any] = {"count": len(shares)}
        if self._timing.rounds > 1:
            collector = self._collector(orders, numbers)
            parts = [
                self._averaged(session, share, state, (int(edge), collector))
                for edge, share in zip(numbers, shares, strict=True)
            ]
            collector.outcome.senders = 0  # those of the clients are counted
            outcome = union(ground.job, [*parts, collector.outcome])
            told["bytes_up"] = collector.edge_bytes
        elif ground.settings.adversary is None and ground.settings.watch is None:
            outcome = union(ground.job, [ground.bring(session, share, state) for share in shares])
        else:  # attackers and watchers see the whole round, whichever edges it passes through
            outcome = ground.bring(session, orders, state)
        told = {"edges": told}
        return shown(ground, in_step(called, outcome, minimum(ground.settings))._replace(told=told), state)

    def _collector(self, orders: Orders, edges: Ints) -> Collector:
        """Where the edges' updates are gathered; edges keep what they keep under numbers after the clients'."""
        ground = self._ground
        own = ground.kept.read((len(ground.job.clients) + edges).tolist())
        layouts = (ground.server.layout, ground.server.buffer_layout)
        return Collector(ground.job, replace(orders, kept=own), layouts)

    def _edges(self, cohort: Ints) -> Ints:
        if not len(cohort):
            return cohort
        found = np.asarray(self._timing.edge(cohort))
        if found.shape != cohort.shape or found.dtype.kind not in "iu" or (found < 0).any():
            raise ConfigurationError(
                f"{self._timing.label}: the function must give the number of an edge, from 0, for each of "
                f"{len(cohort)} clients, and gave {found.dtype}{list(found.shape)}"
            )
        return found

    def _averaged(self, session: Session, orders: Orders, state: RunState, edge: tuple[int, Collector]) -> Outcome:
        """An edge's own rounds; its update goes to the collector, its clients' figures come back."""
        (number, collector), ground = edge, self._ground
        server = ground.server.averaging()
        own = server.first(orders.start)
        total = Outcome()
        weight = 0
        for part in range(self._timing.rounds):
            found = ground.bring(session, replace(orders, start=own.weights, part=part), state)
            if found.message is not None:
                server.commit(own, found, orders.round)
            orders = replace(orders, kept={**orders.kept, **found.kept})
            weight = found.weight
            total = _added(total, found)
        update = own.weights.vector - orders.start.vector
        if total.senders:
            collector.edge(len(ground.job.clients) + number, Contribution(update, buffers=own.weights.buffers), weight)
        return total


def _added(total: Outcome, found: Outcome) -> Outcome:
    """Figures of a further round of the same clients; no messages."""
    result = replace(found, message=None, buffers=None, sides={}, sent=list(found.sent), steps=list(found.steps))
    result.refused = total.refused + found.refused
    result.senders = max(total.senders, found.senders)
    result.kept = total.kept | found.kept
    if total.clients == found.clients:
        result.sent = [a + b for a, b in zip(total.sent, found.sent, strict=True)]
        result.steps = [a + b for a, b in zip(total.steps, found.steps, strict=True)]
    return result


def call(ground: Ground, number: int, state: RunState, *, times: int = 1) -> _Called:
    """Who takes part in a round, and what becomes of them; each has its work to do so many times."""
    asked = ground.cohort(number)
    load = ground.load(number, state, asked)
    load = Load(load.down * times, load.up * times, load.examples * times, load.steps)
    world = ground.settings.world
    if world is None:
        return _Called(asked, load, None, asked)
    goal = ground.wanted or max(1, math.ceil(len(asked) / world.over_selection - 1e-9))
    passage = pass_round(world, asked, load, goal=goal, seed=ground.job.seed, round=number)
    return _Called(asked, load, passage, asked[passage.counted])


def _limits(called: _Called) -> Ints | None:
    """How many local steps each client of the cohort may make, where a world lets slow ones do less."""
    passage = called.passage
    return None if passage is None or passage.limits is None else passage.limits[passage.counted]


def in_step(called: _Called, outcome: Outcome, fewest: int) -> Brought:
    """A round that waited for its cohort, with its costs."""
    asked, load, passage, cohort = called
    up = _sent(outcome, asked, None if passage is None else passage.up)
    nothing = np.zeros(len(asked))
    if passage is None:
        costs = np.stack([nothing + 1, up, nothing + load.down, nothing, nothing], axis=-1)
        return Brought(outcome, asked, costs, True)
    costs = np.stack([nothing + 1, up, passage.down, passage.compute, passage.energy], axis=-1)
    world = {
        "seconds": passage.seconds,
        "dropped": int(passage.dropped.sum()),
        "late": int(passage.late.sum()),
    }
    return Brought(outcome, asked, costs, len(cohort) >= fewest, world)


def shown(ground: Ground, brought: Brought, state: RunState) -> Brought:
    """A round as it counts where nobody sees single updates: with too few in a sum, none is shown."""
    averaged = ground.job.task.average_buffers and state.weights.buffers.size > 0
    failed = unshown(hidings(ground.job.algorithm, buffers=averaged), brought.outcome, len(brought.asked))
    if not failed:
        return brought
    return brought._replace(enough=False, told={**brought.told, "secure": {"failed": failed}})


def _after_masking(brought: Brought, found: Summed) -> Brought:
    """A round whose sums the real protocol has made, or not, with its bytes."""
    costs = brought.costs.copy()
    costs[:, 2] += [found.down.get(client, 0) for client in brought.asked.tolist()]
    told = {**brought.told, "secure": found.told}
    return brought._replace(costs=costs, told=told, enough=brought.enough and not found.failed)


def _sent(outcome: Outcome, asked: Ints, foretold: Ints | None) -> Ints:
    """Bytes that each client asked has sent, [C]: what those that trained did send, and what the others are
    thought to have sent before they were lost."""
    sent = np.zeros(len(asked), np.int64) if foretold is None else foretold.copy()
    trained = dict(zip(outcome.clients, outcome.sent, strict=True))
    for slot, client in enumerate(asked.tolist()):
        sent[slot] = trained.get(client, sent[slot])
    return sent


def minimum(settings: Settings) -> int:
    """Fewest answers for a round to count."""
    return settings.world.minimum if settings.world else 1
