"""A round's local work, and what comes back: the one interface between the engine and its executors.

An executor is opened with a :class:`Job` (what never changes in a run) and then carries out one
:class:`Orders` a round. It answers with an :class:`Outcome` in which the cohort's updates are already merged,
so that a worker process returns one partial sum, however many clients it trained. Merging is exact, so how a
cohort is cut into shards cannot change a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.aggregate import Aggregator
from foedus.core.compose import Algorithm
from foedus.core.examples import Examples
from foedus.core.method import Contribution, Vectors
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.core.values import NOTHING, Message, State
from foedus.errors import ConfigurationError, FoedusError, Reason, UpdateRefused
from foedus.tree import Layout, Vector


@dataclass(frozen=True)
class Job:
    """What does not change during a run. ``device`` None lets the backend choose."""

    task: Task
    algorithm: Algorithm
    clients: Clients
    seed: int
    device: str | None = None


@dataclass(frozen=True)
class Orders:
    """One round: the weights to start from and who trains.

    Attributes:
        round: counted from 1.
        start: the global model.
        cohort: int64 [C], positions of the clients in the population.
        kept: what clients kept since their last visit, by position; see :data:`BUFFERS`.
        limit: at most so many local steps for each client; ``None`` for all that the algorithm asks.
        limits: int64 [C], the same for each client on its own; ``None`` for no limits.
        down: vectors that the algorithm's method sends beside the model.
        single: give back every client's update by itself, unmerged (``Outcome.given``).
        part: tells several orders of one round apart, whose batches are to differ (rounds within a round).
        scale: updates are multiplied by it before they are encoded (less than 1 for stale ones).
        told: what the aggregators tell clients in this round, by channel (``Aggregator.tell``).
        following: int64, who trains in the round after this one, where that is known already: an executor may read
            their data meanwhile.
        apart: give back messages that are to be masked one by one, for the real protocol (``Outcome.apart``).
    """

    round: int
    start: Weights
    cohort: NDArray[np.int64]
    kept: Mapping[int, Vectors] = field(default_factory=dict)
    limit: int | None = None
    limits: NDArray[np.int64] | None = None
    down: Vectors = field(default_factory=dict)
    single: bool = False
    part: int = 0
    scale: float = 1.0
    following: NDArray[np.int64] | None = None
    told: Mapping[str, Vectors] = field(default_factory=dict)
    apart: bool = False

    def only(self, slots: NDArray[np.integer]) -> Orders:
        """The orders for some slots of the cohort."""
        cohort = self.cohort[slots]
        kept = {int(c): self.kept[int(c)] for c in cohort if int(c) in self.kept}
        limits = None if self.limits is None else self.limits[slots]
        return replace(self, cohort=cohort, kept=kept, limits=limits)

    def buffers(self, position: int) -> Vector:
        """The buffers [buffer] that a client starts with: its own, if it keeps them, or the global model's."""
        own: Vector = self.kept.get(position, NOTHING).get(BUFFERS, self.start.buffers)
        return own

    def most(self, slots: NDArray[np.integer] | slice) -> NDArray[np.int64] | int | None:
        """At most so many local steps for the clients of some slots; ``None`` for no limit."""
        if self.limits is None:
            return self.limit
        own = self.limits[slots]
        return own if self.limit is None else np.minimum(own, self.limit)


# What a client keeps is a dict of arrays. Its buffers, if they are not averaged, are under this name; what the
# algorithm's method and its aggregators keep is under theirs.
BUFFERS, METHOD, ENCODING = "buffers", "method.", "encoding."


def under(prefix: str, kept: Vectors) -> Vectors:
    """The entries of a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in kept.items() if name.startswith(prefix)}


class Refusal(NamedTuple):
    """An update that was refused, and never entered a sum."""

    client: int
    reason: str


class Given(NamedTuple):
    """One client's result by itself: what the method made of its visit, and its number of examples."""

    contribution: Contribution
    examples: int


@dataclass
class Outcome:
    """What a cohort, or a part of it, brought.

    Attributes:
        message: the merged messages of the parameters; None if no client contributed.
        buffers: the merged messages of the buffers; None if there are none.
        sides: the merged messages of the method's other channels.
        sizes: the length of the vectors in each of them.
        clients, examples, steps, losses: one entry per client that trained: position, number of examples (0: not
            told), number of local steps, mean training loss.
        sent: bytes that each of them sent, in the same order.
        senders: how many clients sent something.
        refused: updates that were refused.
        kept: what clients keep, by position.
        reports: figures that a method reports, by client.
        given: single results, where the orders asked for them.
        spent: why clients train no more, by position: another visit would exceed their budget for single examples.
        apart: admitted messages that are to be masked, by client and channel, where the orders asked for them.
    """

    message: Message | None = None
    buffers: Message | None = None
    sides: dict[str, Message] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    clients: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    senders: int = 0
    refused: list[Refusal] = field(default_factory=list)
    kept: dict[int, State] = field(default_factory=dict)
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    given: dict[int, Given] = field(default_factory=dict)
    spent: dict[int, str] = field(default_factory=dict)
    apart: dict[int, dict[str, Message]] = field(default_factory=dict)

    @property
    def out(self) -> set[int]:
        """The clients whose updates were refused."""
        return {refusal.client for refusal in self.refused}

    @property
    def weight(self) -> int:
        """How many examples the updates that were let in stand for."""
        out = self.out
        return sum(n for client, n in zip(self.clients, self.examples, strict=True) if client not in out)


class Session(AbstractContextManager["Session"], Protocol):
    """An opened executor. ``run`` may be called many times; ``close`` ends processes and frees memory.

    ``name`` is the executor's that really runs (never ``auto``); it is stored, and a resumed run uses it again.
    """

    name: str

    def run(self, orders: Orders) -> Outcome: ...

    def close(self) -> None: ...

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@runtime_checkable
class Executor(Protocol):
    """A way to carry out a round's local work.

    Laws, held by the conformance suite: the same orders give the same bits at any number of workers; one local
    step agrees across executors to 10⁻⁵ relative in float32, a whole client round to 10⁻¹⁰ in float64.

    ``open`` raises :class:`~foedus.errors.UnsupportedOperator` (it names the operator) or
    :class:`~foedus.errors.ConfigurationError` if it cannot run the job.
    """

    @property
    def name(self) -> str: ...

    def open(self, job: Job) -> Session: ...


UPDATE = "update"  # the channel of the parameters' updates


def side_layout(channel: str, size: int, layout: Layout) -> Layout:
    """The layout of what travels in a channel of a method's own: the model's, if it is as long as the model, and
    otherwise one array of one axis."""
    return layout if size == layout.size else _flat(channel, size, layout.dtype)


@lru_cache(maxsize=256)
def _flat(channel: str, size: int, dtype: str) -> Layout:
    return Layout((channel,), ((size,),), (dtype,))


def changed(after: Vector, before: Vector) -> Vector:
    """``after − before``, which is 0 where they are equal: a buffer may hold infinities, as masks of −∞ do."""
    return np.subtract(after, before, out=np.zeros_like(after), where=after != before)


def merged(aggregator: Aggregator, a: Message | None, b: Message | None) -> Message | None:
    """``merge`` where a side may be missing."""
    return a if b is None else _merged(aggregator, a, b)


def _merged(aggregator: Aggregator, a: Message | None, b: Message) -> Message:
    return b if a is None else aggregator.merge(a, b)


def union(job: Job, parts: Iterable[Outcome]) -> Outcome:
    """The outcome of a cohort from those of its shards, in whatever order they came."""
    total = Outcome()
    rows: list[tuple[int, int, int, float, int]] = []
    for part in parts:
        total.message = merged(job.algorithm.aggregator, total.message, part.message)
        total.buffers = merged(job.algorithm.buffers, total.buffers, part.buffers)
        for channel, message in part.sides.items():
            total.sides[channel] = _merged(job.algorithm.aggregator_of(channel), total.sides.get(channel), message)
        total.sizes |= part.sizes
        rows += zip(part.clients, part.examples, part.steps, part.losses, part.sent, strict=True)
        total.senders += part.senders
        total.refused += part.refused
        total.kept.update(part.kept)
        total.reports.update(part.reports)
        total.given.update(part.given)
        total.spent.update(part.spent)
        total.apart.update(part.apart)
    rows.sort()
    total.refused.sort()
    _check_once(rows, total.refused)
    for client, examples, steps, loss, sent in rows:
        total.clients.append(client)
        total.examples.append(examples)
        total.steps.append(steps)
        total.losses.append(loss)
        total.sent.append(sent)
    return total


def _check_once(rows: Sequence[tuple[int, int, int, float, int]], refused: Sequence[Refusal]) -> None:
    """Refuse sums in which a client is counted twice: a collector refuses the second message itself, but not another
    collector's."""
    twice = {a[0] for a, b in itertools.pairwise(rows) if a[0] == b[0]} - {r.client for r in refused}
    if twice:
        client = min(twice)
        raise UpdateRefused(
            f"client {client} was trained in two parts of one round, and its update is in both sums: a cohort holds "
            "every client once",
            client=client, reason=Reason.REPLAY,
        )  # fmt: skip


def shards(sizes: NDArray[np.integer], count: int) -> list[NDArray[np.int64]]:
    """The slots of a cohort cut into at most ``count`` parts of about equal work, largest first (Graham 1969)."""
    loads, parts = [0] * count, [[] for _ in range(count)]  # type: list[int], list[list[int]]
    for slot in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        least = loads.index(min(loads))
        parts[least].append(slot)
        loads[least] += int(sizes[slot]) + 1
    return [np.array(sorted(p), np.int64) for p in parts if p]


def read(clients: Clients, position: int) -> Examples:
    """A client's training examples; an error says whose they are."""
    try:
        return clients.train(position)
    except FoedusError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the data of client {clients.ids[position]!r} could not be read: {type(error).__name__}: {error}"
        ) from error


def held_out(clients: Clients, position: int) -> Examples:
    """A client's examples of the first of these parts that the population has: test, validation, training.

    It is one part for all clients, so that figures compare: a client that has nothing in it is empty here, and not
    evaluated on data that it trained on. No other part is read.
    """
    for part, read in ((clients.testing, clients.test), (clients.validating, clients.validation)):
        if part is not None:
            found = read(position)
            assert found is not None
            return found
    return clients.train(position)
