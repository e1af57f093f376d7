"""The results of a shard's clients, gathered into one outcome.

Each client's result goes through both halves of ``parcel.py`` in turn; where nothing travels beside the updates and
their rule has a way for many at once, all are merged in one go, with the same bits.

Not here: how clients trained (the executors), parcels from other machines (``parcel.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.aggregate import Aggregator, message_bytes
from foedus.core.gate import Gate, check_replay, check_side
from foedus.core.method import Contribution
from foedus.core.values import Context, Message, Update
from foedus.errors import Reason, SumOverflow, UpdateRefused
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.rounds.parcel import Parcel, Terms, admitted, let_in, masking_bytes, packed, scaled, weight_of
from foedus.rounds.spending import counted
from foedus.rounds.work import BUFFERS, UPDATE, Given, Job, Orders, Outcome, Refusal, changed, merged
from foedus.tree import Layout, Vector


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
        self._terms = Terms.of(job, orders, layouts)
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
        self._contributed(client, brought, examples)
        self._count(client, examples, brought.steps)

    def _contributed(self, client: int, brought: Contribution, examples: int) -> None:
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
        self._count(client, examples, brought.steps)

    def refuse(self, client: int, given: Given, reason: str) -> None:
        """A result that was given by itself, and is not to be merged; the client keeps what it kept before."""
        self._listed(client, given.examples, given.contribution.steps, given.contribution.loss)
        self.outcome.sent.append(0)
        self.outcome.refused.append(Refusal(client, reason))
        self._count(client, given.examples, given.contribution.steps)

    def spent(self, slot: int, told: str) -> None:
        """A client that trains no more, and why."""
        self.outcome.spent[int(self._orders.cohort[slot])] = told

    def _count(self, client: int, examples: int, steps: int) -> None:
        """What the visit cost the client's single examples, into what it keeps: also if it is not let in."""
        before = self._orders.kept.get(client, {})
        if own := counted(self._job.algorithm, before, examples, steps):
            self.outcome.kept[client] = {**self.outcome.kept.get(client, before), **own}

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
            parcel = packed(self._terms, client, brought, examples, secret=known_to_all_who_know_the_seed)
            messages = admitted(self._terms, client, parcel)
        except SumOverflow as error:
            out.refused.append(Refusal(client, f"the update has diverged: {error}"))
            return 0
        except UpdateRefused as error:
            out.refused.append(Refusal(client, str(error)))
            return 0
        if self._orders.apart:
            self._set_apart(client, parcel, messages)
        let_in(self._terms, out, client, parcel, messages)
        self._counted.add(client)
        return parcel.bytes + masking_bytes(self._job.algorithm, parcel.messages)[0]

    def _set_apart(self, client: int, parcel: Parcel, messages: dict[str, Message]) -> None:
        """Take out what is to be added up under masks."""
        out = self.outcome
        out.apart[client] = {channel: messages.pop(channel) for channel in sorted(parcel.masked)}
        for channel in parcel.masked - {UPDATE, BUFFERS}:
            out.sizes[channel] = parcel.vectors[channel].size

    def edge(self, number: int, brought: Contribution, weight: int) -> None:
        """The update of an edge aggregator, which is to the server what a client is."""
        self.edge_bytes += self._taken(number, brought, weight)

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
        pairs = zip(results.vectors, results.examples, strict=True)
        updates = [Update(scaled(self._orders, v), float(n)) for v, n in pairs]
        secret = known_to_all_who_know_the_seed
        contexts = [
            self._terms.context(client, UPDATE, len(u.vector), secret=secret)
            for client, u in zip(clients, updates, strict=True)
        ]
        out = self.outcome
        out.message = merged(aggregator, out.message, aggregator.shortcut(updates, contexts))
        out.clients += clients
        out.examples += [int(n) for n in results.examples]
        out.steps += [int(n) for n in results.steps]
        out.losses += [float(x) for x in results.losses]
        sent = _bytes_of(aggregator, updates[0], contexts[0])
        out.sent += [sent + masking_bytes(self._job.algorithm, [UPDATE])[0]] * len(clients)
        out.senders += len(clients)

    def _at_once(self, aggregator: Aggregator, results: Gained) -> bool:
        """Whether every update is one to be added, and there is nothing beside it."""
        if self._orders.single or self._orders.apart or aggregator.shortcut is None or aggregator.remember is not None:
            return False
        if not len(results.vectors) or results.buffers[0].size:
            return False
        size = self._terms.layout(UPDATE, 0).size
        if any(v.shape != (size,) or v.dtype.kind != "f" for v in results.vectors) or min(results.examples) < 1:
            return False  # a look at each of them tells who is refused, and why
        pairs = zip(results.vectors, results.examples, strict=True)
        return all(self._ordinary(v, float(n)) for v, n in pairs)

    def _ordinary(self, vector: Vector, weight: float) -> bool:
        """Whether an update passes the gate, and is far from leaving the range of exact sums."""
        # The length bounds every entry, and a product is the fastest way to it; false for NaN, too.
        with np.errstate(over="ignore", invalid="ignore"):
            squared = float(vector.dot(vector))
        return squared * weight**2 < ORDINARY**2 and self._job.algorithm.gate.lets(math.sqrt(squared), weight)

    def _once(self, clients: Sequence[int]) -> bool:
        """Whether none of them is counted already, nor comes twice."""
        return len(set(clients)) == len(clients) and self._counted.isdisjoint(clients)

    def _check(self, brought: Contribution, client: int, examples: int) -> None:
        """Let the gate look at whatever updates the model, and refuse what else is malformed.

        Raises:
            UpdateRefused: with the reason.
        """
        method, round = self._job.algorithm.method, self._orders.round
        weight = weight_of(brought, examples)
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


# Bytes of one message, by what encodes it and what it is made of: encoding one more would cost noise, for its length.
_BYTES: WeakKeyDictionary[Callable[..., Message], dict[tuple[int, str], int]] = WeakKeyDictionary()


def _bytes_of(aggregator: Aggregator, update: Update, context: Context) -> int:
    """Bytes of a message of an aggregator that has a shortcut: its messages are all alike."""
    known, like = _BYTES.setdefault(aggregator.encode, {}), (len(update.vector), update.vector.dtype.str)
    if like not in known:
        known[like] = message_bytes(aggregator.encode(update, context))
    return known[like]


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
