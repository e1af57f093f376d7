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
from foedus.core.aggregate import Aggregator, message_bytes
from foedus.core.compose import Algorithm
from foedus.core.examples import Examples
from foedus.core.gate import Gate, check_replay, check_side
from foedus.core.method import Contribution, Vectors, travelling
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.core.values import NOTHING, Context, Message, State, Update
from foedus.errors import ConfigurationError, FoedusError, Reason, SumOverflow, UpdateRefused
from foedus.privacy.noise import known_to_all_who_know_the_seed
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
        clients, examples, steps, losses: one entry per client that trained: position, number of examples,
            number of local steps, mean training loss.
        sent: bytes that each of them sent, in the same order.
        senders: how many clients sent something.
        refused: updates that were refused.
        kept: what clients keep, by position.
        reports: figures that a method reports, by client.
        given: single results, where the orders asked for them.
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
        self._travels = travelling(job.algorithm.method, layouts)  # of parameters, and of buffers
        self.outcome = Outcome()
        self.edge_bytes = 0
        self._counted: set[int] = set()

    def add(self, slot: int, after: Weights, *, examples: int, steps: int, loss: float) -> None:
        """The weights of one client after its training."""
        vector = after.vector - self._orders.start.vector
        self.contribute(slot, Contribution(vector, buffers=after.buffers, steps=steps, loss=loss), examples)

    def contribute(self, slot: int, brought: Contribution, examples: int) -> None:
        """What one client's visit ended with."""
        client = int(self._orders.cohort[slot])
        self._listed(client, examples, brought.steps, brought.loss)
        if self._orders.single and client not in self.outcome.given:
            self.outcome.given[client] = Given(brought, examples)
            self.outcome.sent.append(0)
        elif self._orders.single:  # what it sent first is the one that counts
            self.outcome.refused.append(Refusal(client, _twice(client, self._orders.round)))
            self.outcome.sent.append(0)
        else:
            self.outcome.sent.append(self._taken(client, brought, examples))

    def again(self, client: int, given: Given) -> None:
        """A result that was given by itself, to be merged now."""
        brought, examples = given
        self._listed(client, examples, brought.steps, brought.loss)
        self.outcome.sent.append(self._taken(client, brought, examples))

    def refuse(self, client: int, given: Given, reason: str) -> None:
        """A result that was given by itself, and is not to be merged; the client keeps what it kept before."""
        self._listed(client, given.examples, given.contribution.steps, given.contribution.loss)
        self.outcome.sent.append(0)
        self.outcome.refused.append(Refusal(client, reason))

    def _listed(self, client: int, examples: int, steps: int, loss: float) -> None:
        out = self.outcome
        out.clients.append(client)
        out.examples.append(examples)
        out.steps.append(steps)
        out.losses.append(loss)

    def _taken(self, client: int, brought: Contribution, examples: int) -> int:
        """Encode, merge and remember; how many bytes the client sent."""
        out = self.outcome
        if brought.report:
            out.reports[client] = dict(brought.report)
        try:
            self._check(brought, client, examples)
            messages, memory, sent = self._encoded(client, brought, examples)
        except SumOverflow as error:
            out.refused.append(Refusal(client, f"the update has diverged: {error}"))
            return 0
        except UpdateRefused as error:
            out.refused.append(Refusal(client, str(error)))
            return 0
        algorithm = self._job.algorithm
        for channel, message in messages.items():
            if channel == UPDATE:
                out.message = merged(algorithm.aggregator, out.message, message)
            elif channel == BUFFERS:
                out.buffers = merged(algorithm.buffers, out.buffers, message)
            else:
                out.sides[channel] = _merged(algorithm.aggregator_of(channel), out.sides.get(channel), message)
                out.sizes[channel] = len(brought.sides[channel])
        self._counted.add(client)
        out.senders += bool(messages)
        before = self._orders.kept.get(client, NOTHING)
        kept: State = {name: array for name, array in before.items() if name.startswith(ENCODING)}
        kept |= {f"{METHOD}{name}": array for name, array in brought.kept.items()} | memory
        own = before.get(BUFFERS) if brought.buffers is None else brought.buffers
        if own is not None and own.size and not self._job.task.average_buffers:
            kept[BUFFERS] = own
        if kept or before:  # what it kept is replaced, even by nothing
            out.kept[client] = kept
        return sent

    def _encoded(self, client: int, brought: Contribution, examples: int) -> tuple[dict[str, Message], State, int]:
        """The admitted messages by channel, what the encodings remember, and the bytes that travelled."""
        weight = float(examples if brought.weight is None else brought.weight)
        messages: dict[str, Message] = {}
        memory: State = {}
        sent = 0
        for channel, vector in self._channels(brought).items():
            aggregator, context = (
                self._job.algorithm.aggregator_of(channel),
                self._context(client, channel, vector),
            )
            update = Update(vector, weight)
            message = aggregator.encode(update, context)
            sent += message_bytes(message)
            if aggregator.remember is not None:
                kept = aggregator.remember(update, message, context)
                memory |= {f"{ENCODING}{channel}.{name}": array for name, array in kept.items()}
            messages[channel] = aggregator.admit(message, context)
        return messages, memory, sent

    def _channels(self, brought: Contribution) -> dict[str, Vector]:
        """The vectors that travel, by channel."""
        vectors: dict[str, Vector] = {} if brought.update is None else {UPDATE: self._scaled(brought.update)}
        if (
            brought.buffers is not None
            and brought.buffers.size
            and self._job.task.average_buffers
            and (vectors or brought.sides)
        ):
            vectors[BUFFERS] = self._scaled(changed(brought.buffers, self._orders.start.buffers))
        for channel, part in zip((UPDATE, BUFFERS), self._travels, strict=True):
            if part is not None and channel in vectors:
                vectors[channel] = vectors[channel][part.at]
        if BUFFERS in vectors and not vectors[BUFFERS].size:  # all of them stay at home
            del vectors[BUFFERS]
        method = self._job.algorithm.method
        models = frozenset() if method is None else method.updates
        return vectors | {name: self._scaled(v) if name in models else v for name, v in brought.sides.items()}

    def _scaled(self, update: Vector) -> Vector:
        scale = self._orders.scale
        return update if scale == 1.0 else update * update.dtype.type(scale)

    def edge(self, number: int, brought: Contribution, weight: int) -> None:
        """The update of an edge aggregator, which is to the server what a client is."""
        self.edge_bytes += self._taken(number, brought, weight)

    def _context(self, client: int, channel: str, vector: Vector) -> Context:
        kept = self._orders.kept.get(client, NOTHING)
        own = under(f"{ENCODING}{channel}.", kept) if kept else NOTHING
        if channel in (UPDATE, BUFFERS):
            layout = self._layout(channel == BUFFERS)
        else:
            layout = side_layout(channel, len(vector), self._layouts[0])
        return Context(
            self._job.seed,
            self._orders.round,
            client,
            layout=layout,
            size=len(vector),
            channel=channel,
            kept=own,
            told=self._orders.told.get(channel, NOTHING),
            secret=known_to_all_who_know_the_seed,
        )

    def _layout(self, buffers: bool) -> Layout:
        """Of what travels of the parameters, or of the buffers."""
        part = self._travels[buffers]
        return self._layouts[buffers] if part is None else part.layout

    def add_all(self, slots: Sequence[int], results: Gained) -> None:
        """The updates of many clients at once: the same as adding one by one, bit for bit, only faster."""
        aggregator, cohort = self._job.algorithm.aggregator, self._orders.cohort
        if not self._at_once(aggregator, results) or not self._once([int(cohort[slot]) for slot in slots]):
            for slot, *gained in zip(slots, *results, strict=True):
                vector, change, examples, steps, loss = gained
                buffers = self._orders.buffers(int(cohort[slot])) + change
                brought = Contribution(vector, buffers=buffers, steps=int(steps), loss=float(loss))
                self.contribute(slot, brought, int(examples))
            return
        assert aggregator.shortcut is not None
        clients = [int(cohort[slot]) for slot in slots]
        self._counted.update(clients)
        updates = [Update(self._scaled(v), float(n)) for v, n in zip(results.vectors, results.examples, strict=True)]
        contexts = [self._context(client, UPDATE, u.vector) for client, u in zip(clients, updates, strict=True)]
        out = self.outcome
        out.message = merged(aggregator, out.message, aggregator.shortcut(updates, contexts))
        out.clients += clients
        out.examples += [int(n) for n in results.examples]
        out.steps += [int(n) for n in results.steps]
        out.losses += [float(x) for x in results.losses]
        out.sent += [message_bytes(aggregator.encode(updates[0], contexts[0]))] * len(clients)
        out.senders += len(clients)

    def _at_once(self, aggregator: Aggregator, results: Gained) -> bool:
        """Whether every update is one to be added, and there is nothing beside it."""
        if self._orders.single or aggregator.shortcut is None or aggregator.remember is not None:
            return False
        if self._job.algorithm.gate.needs_single:
            return False
        if not len(results.vectors) or results.buffers[0].size:
            return False
        size = self._layout(False).size
        if any(v.shape != (size,) or v.dtype.kind != "f" for v in results.vectors) or min(results.examples) < 1:
            return False  # a look at each of them tells who is refused, and why
        pairs = zip(results.vectors, results.examples, strict=True)
        # The length bounds every entry, and a product is the fastest way to it; false for NaN, too.
        with np.errstate(over="ignore", invalid="ignore"):
            return all(float(v.dot(v)) * float(n) ** 2 < ORDINARY**2 for v, n in pairs)

    def _once(self, clients: Sequence[int]) -> bool:
        """Whether none of them is counted already, nor comes twice."""
        return len(set(clients)) == len(clients) and self._counted.isdisjoint(clients)

    def _check(self, brought: Contribution, client: int, examples: int) -> None:
        """Let the gate look at whatever updates the model, and refuse what else is malformed.

        Raises:
            UpdateRefused: with the reason.
        """
        method, round = self._job.algorithm.method, self._orders.round
        weight = float(examples if brought.weight is None else brought.weight)
        layout = self._layouts[0]
        context = Context(self._job.seed, round, client, layout=layout, size=layout.size, channel=UPDATE)
        gate = self._job.algorithm.gate
        if brought.update is not None:
            gate.check(Update(brought.update, weight), context, counted=self._counted)
        if brought.buffers is not None:
            before = self._orders.buffers(client)
            check_side(brought.buffers, context, "buffers", like=before.shape)
            _check_finite(changed(brought.buffers, before), context, "buffer", self._layouts[1])
        for name, vector in brought.sides.items():
            check_side(vector, context, repr(name), like=(self.outcome.sizes.get(name, len(np.atleast_1d(vector))),))
            _check_finite(vector, context, f"entry of {name!r}")
            whole = context if len(vector) == layout.size else context._replace(layout=None, size=len(vector))
            if method is not None and name in method.updates:
                gate.check(Update(vector, weight), whole, counted=self._counted)
            elif brought.update is None:
                Gate().check_weight(weight, context)
                check_replay(context, self._counted)


UPDATE = "update"  # the channel of the parameters' updates


def side_layout(channel: str, size: int, layout: Layout) -> Layout:
    """The layout of what travels in a channel of a method's own: the model's, if it is as long as the model, and
    otherwise one array of one axis."""
    return layout if size == layout.size else _flat(channel, size, layout.dtype)


@lru_cache(maxsize=256)
def _flat(channel: str, size: int, dtype: str) -> Layout:
    return Layout((channel,), ((size,),), (dtype,))


def _check_finite(values: Vector, context: Context, what: str, layout: Layout | None = None) -> None:
    # One pass: a sum of finite floats can overflow, so a suspicious one is looked at closely.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(values.sum())
    if suspicious and not (finite := np.isfinite(values)).all():
        first = int(np.argmin(finite))
        name = first if layout is None else repr(layout.name_at(first))
        told = f"{what} {name} is {values[first]} ({int((~finite).sum())} values not finite)"
        raise UpdateRefused(told, client=context.client, reason=Reason.NOT_FINITE)


def _twice(client: int, round: int) -> str:
    return f"the update of client {client} is counted already in round {round}"


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
