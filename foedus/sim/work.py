"""A round's local work, and what comes back: the one interface between the engine and its executors.

An executor is opened with a :class:`Job` (what never changes in a run) and then carries out one
:class:`Orders` a round. It answers with an :class:`Outcome` in which the cohort's updates are already merged,
so that a worker process returns one partial sum, however many clients it trained. Merging is exact, so how a
cohort is cut into shards cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.aggregate import Aggregator
from foedus.core.compose import Algorithm
from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.core.values import Context, Message, Update
from foedus.errors import ConfigurationError, FoedusError, SumOverflow
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
        kept: buffers [buffer] that a client kept for itself, by position (``average_buffers=False``).
        limit: at most so many local steps for each client; ``None`` for all that the algorithm asks.
        following: int64, who trains in the round after this one, where that is known already: an executor may read
            their data meanwhile.
    """

    round: int
    start: Weights
    cohort: NDArray[np.int64]
    kept: Mapping[int, Vector] = field(default_factory=dict)
    limit: int | None = None
    following: NDArray[np.int64] | None = None

    def only(self, slots: NDArray[np.integer]) -> Orders:
        """The orders for some slots of the cohort."""
        cohort = self.cohort[slots]
        kept = {int(c): self.kept[int(c)] for c in cohort if int(c) in self.kept}
        return Orders(self.round, self.start, cohort, kept, self.limit)


class Refusal(NamedTuple):
    """An update that was refused, and never entered a sum."""

    client: int
    reason: str


@dataclass
class Outcome:
    """What a cohort, or a part of it, brought.

    Attributes:
        message: the merged messages of the parameters; None if no client contributed.
        buffers: the merged messages of the buffers; None if there are none.
        clients, examples, steps, losses: one entry per client that trained: position, number of examples,
            number of local steps, mean training loss.
        refused: updates that were refused.
        kept: buffers that clients keep, by position.
    """

    message: Message | None = None
    buffers: Message | None = None
    clients: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    kept: dict[int, Vector] = field(default_factory=dict)


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


class Gained(NamedTuple):
    """What many clients brought, one entry each: updates [parameter], changes of buffers [buffer], numbers of
    examples and steps, mean losses."""

    vectors: Sequence[Vector] | Vector
    buffers: Sequence[Vector] | Vector
    examples: Sequence[int] | NDArray[np.integer]
    steps: Sequence[int] | NDArray[np.integer]
    losses: Sequence[float] | NDArray[np.floating]


ORDINARY = 2.0**40  # weighted updates below this are surely within the range of exact sums, one by one


class Collector:
    """Gathers the results of a shard's clients into an :class:`Outcome`, refusing what is not finite."""

    def __init__(self, job: Job, orders: Orders, layouts: tuple[Layout, Layout]) -> None:
        self._job, self._orders, self._layouts = job, orders, layouts
        self.outcome = Outcome()

    def add(self, slot: int, after: Weights, *, examples: int, steps: int, loss: float) -> None:
        """The weights of one client after its training."""
        start = self._orders.start
        client = int(self._orders.cohort[slot])
        before = self._orders.kept.get(client, start.buffers)
        self.add_update(
            slot, after.vector - start.vector, changed(after.buffers, before), examples=examples, steps=steps, loss=loss
        )

    def add_update(
        self, slot: int, vector: Vector, buffers: Vector, *, examples: int, steps: int, loss: float
    ) -> None:
        """One client's update [parameter] and change of buffers [buffer]."""
        out, client = self.outcome, int(self._orders.cohort[slot])
        out.clients.append(client)
        out.examples.append(examples)
        out.steps.append(steps)
        out.losses.append(loss)
        if reason := self._fault(vector, buffers):
            out.refused.append(Refusal(client, reason))
            return
        try:
            message, change = self._encoded(client, Update(vector, float(examples)), buffers)
        except SumOverflow as error:
            out.refused.append(Refusal(client, f"the update has diverged: {error}"))
            return
        out.message = merged(self._job.algorithm.aggregator, out.message, message)
        if change is not None:
            out.buffers = merged(self._job.algorithm.buffers, out.buffers, change)
        elif buffers.size:
            out.kept[client] = self._orders.kept.get(client, self._orders.start.buffers) + buffers

    def add_all(self, slots: Sequence[int], results: Gained) -> None:
        """The updates of many clients at once: the same as adding one by one, bit for bit, only faster."""
        aggregator, cohort = self._job.algorithm.aggregator, self._orders.cohort
        if not self._at_once(aggregator, results):
            for slot, *gained in zip(slots, *results, strict=True):
                vector, buffers, examples, steps, loss = gained
                self.add_update(slot, vector, buffers, examples=int(examples), steps=int(steps), loss=float(loss))
            return
        assert aggregator.shortcut is not None
        clients = [int(cohort[slot]) for slot in slots]
        contexts = [Context(self._job.seed, self._orders.round, client) for client in clients]
        updates = [Update(v, float(n)) for v, n in zip(results.vectors, results.examples, strict=True)]
        out = self.outcome
        out.message = merged(aggregator, out.message, aggregator.shortcut(updates, contexts))
        out.clients += clients
        out.examples += [int(n) for n in results.examples]
        out.steps += [int(n) for n in results.steps]
        out.losses += [float(x) for x in results.losses]

    def _at_once(self, aggregator: Aggregator, results: Gained) -> bool:
        """Whether every update is one to be added, and there is nothing beside it."""
        if aggregator.shortcut is None or not len(results.vectors) or results.buffers[0].size:
            return False
        pairs = zip(results.vectors, results.examples, strict=True)
        # The length bounds every entry, and a product is the fastest way to it; false for NaN, too.
        with np.errstate(over="ignore", invalid="ignore"):
            return all(float(v.dot(v)) * float(n) ** 2 < ORDINARY**2 for v, n in pairs)

    def _encoded(self, client: int, update: Update, buffers: Vector) -> tuple[Message, Message | None]:
        """The messages of the parameters and, where they are averaged, of the buffers."""
        algorithm, context = self._job.algorithm, Context(self._job.seed, self._orders.round, client)
        message = algorithm.aggregator.encode(update, context)
        if not (buffers.size and self._job.task.average_buffers):
            return message, None
        return message, algorithm.buffers.encode(update._replace(vector=buffers), context)

    def _fault(self, vector: Vector, buffers: Vector) -> str | None:
        for values, layout, what in zip((vector, buffers), self._layouts, ("parameter", "buffer"), strict=True):
            # One pass: a sum of finite floats can overflow, so a suspicious one is looked at closely.
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = not np.isfinite(values.sum())
            if suspicious and not (finite := np.isfinite(values)).all():
                first = int(np.argmin(finite))
                return f"{what} {layout.name_at(first)!r} is {values[first]} ({int((~finite).sum())} values not finite)"
        return None


def changed(after: Vector, before: Vector) -> Vector:
    """``after − before``, which is 0 where they are equal: a buffer may hold infinities, as masks of −∞ do."""
    return np.subtract(after, before, out=np.zeros_like(after), where=after != before)


def merged(aggregator: Aggregator, a: Message | None, b: Message | None) -> Message | None:
    """``merge`` where a side may be missing."""
    if a is None or b is None:
        return a if b is None else b
    return aggregator.merge(a, b)


def union(job: Job, parts: Iterable[Outcome]) -> Outcome:
    """The outcome of a cohort from those of its shards, in whatever order they came."""
    total = Outcome()
    rows: list[tuple[int, int, int, float]] = []
    for part in parts:
        total.message = merged(job.algorithm.aggregator, total.message, part.message)
        total.buffers = merged(job.algorithm.buffers, total.buffers, part.buffers)
        rows += zip(part.clients, part.examples, part.steps, part.losses, strict=True)
        total.refused += part.refused
        total.kept.update(part.kept)
    rows.sort()
    total.refused.sort()
    for client, examples, steps, loss in rows:
        total.clients.append(client)
        total.examples.append(examples)
        total.steps.append(steps)
        total.losses.append(loss)
    return total


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


