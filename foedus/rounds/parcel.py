"""A client's result on its way to the server: encoded on the one side, checked and merged on the other.

A visit ends with a contribution. The *client's half* (:func:`packed`) makes a :class:`Parcel` of it: one encoded
message per channel, and a few figures. The *server's half* admits the messages and merges them into the round's
outcome: :func:`admitted` and :func:`let_in` where both halves are one process, as in the simulator; :class:`Intake`
where a parcel came from outside, so that nothing in it can be believed. There is one way for both, and so a served
federation ends with the bits of the simulated one.

Not here: parcels as bytes (``freight.py``), collecting the results of a simulated cohort (``collect.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from foedus.core.aggregate import Aggregator, add, message_bytes, reach
from foedus.core.compose import Algorithm
from foedus.core.gate import Form, Gate, check_replay, forms_of
from foedus.core.method import Contribution, Travels, Vectors, travelling
from foedus.core.values import NOTHING, Context, Message, Secret, State, Update
from foedus.errors import FoedusError, Reason, SecureAggregationFailed, SumOverflow, UpdateRefused
from foedus.rounds.untold import noised, sealed, trained_in_private
from foedus.rounds.work import (
    BUFFERS,
    ENCODING,
    METHOD,
    UPDATE,
    Job,
    Orders,
    Outcome,
    changed,
    merged,
    side_layout,
    under,
)  # fmt: skip
from foedus.secure.traffic import CHANNEL
from foedus.tree import Layout, Vector


class Terms(NamedTuple):
    """What both sides of a round know.

    Attributes:
        job, orders: of the run, and of the round.
        layouts: of parameters and buffers.
        travels: the parts of both that travel; ``None`` where it is all.
    """

    job: Job
    orders: Orders
    layouts: tuple[Layout, Layout]
    travels: tuple[Travels | None, Travels | None]

    @staticmethod
    def of(job: Job, orders: Orders, layouts: tuple[Layout, Layout]) -> Terms:
        return Terms(job, orders, layouts, travelling(job.algorithm.method, layouts))

    def layout(self, channel: str, size: int) -> Layout:
        """Of what travels in a channel."""
        if channel not in (UPDATE, BUFFERS):
            return side_layout(channel, size, self.layouts[0])
        part = self.travels[channel == BUFFERS]
        return self.layouts[channel == BUFFERS] if part is None else part.layout

    def context(self, client: int, channel: str, size: int, *, secret: Secret | None = None) -> Context:
        """Whose message it is, for encoding and admitting."""
        kept = self.orders.kept.get(client, NOTHING)
        return Context(
            self.job.seed, self.orders.round, client, layout=self.layout(channel, size), size=size, channel=channel,
            kept=under(f"{ENCODING}{channel}.", kept) if kept else NOTHING,
            told=self.orders.told.get(channel, NOTHING), secret=secret,
        )  # fmt: skip


class Carried(NamedTuple):
    """What a message was made of: a vector of so many entries of a dtype, such as ``"<f4"``."""

    size: int
    dtype: str


class Parcel(NamedTuple):
    """What one client sends after its visit.

    Attributes:
        messages: as encoded, by channel.
        vectors: what each was made of.
        weight: what it counts for in weighted means.
        examples, steps, loss, report: as in :class:`~foedus.core.method.Contribution`.
        kept: what the client keeps from now on, if it is let in; ``None``: nothing, as before. It never travels.
        masked: channels whose messages travel under masks only (``foedus.protocol.secagg``).
    """

    messages: Mapping[str, Message]
    vectors: Mapping[str, Carried]
    weight: float
    examples: int
    steps: int = 0
    loss: float = math.nan
    report: Mapping[str, float] = NOTHING  # type: ignore[assignment]
    kept: State | None = None
    masked: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """Bytes of the arrays that travel."""
        return sum(map(message_bytes, self.messages.values()))


def weight_of(brought: Contribution, examples: int) -> float:
    """What a contribution counts for in weighted means."""
    return float(examples if brought.weight is None else brought.weight)


# --- the client's half ----------------------------------------------------------------------------------------


def packed(terms: Terms, client: int, brought: Contribution, examples: int, *, secret: Secret | None = None) -> Parcel:
    """What a visit ended with, encoded.

    Args:
        terms: of the round.
        client: its position.
        brought: what the visit ended with.
        examples: how many examples it has.
        secret: where noise is drawn from; ``None``: from the operating system.

    Raises:
        SumOverflow, UpdateRefused: the update cannot be encoded.
    """
    weight = 1.0 if noised(terms.job.algorithm) else weight_of(brought, examples)
    messages: dict[str, Message] = {}
    vectors: dict[str, Carried] = {}
    memory: State = {}
    for channel, vector in _channels(terms, brought).items():
        aggregator = terms.job.algorithm.aggregator_of(channel)
        context = terms.context(client, channel, len(vector), secret=secret)
        update = Update(vector, weight)
        messages[channel] = message = aggregator.encode(update, context)
        vectors[channel] = Carried(len(vector), vector.dtype.str)
        if aggregator.remember is not None:
            kept = aggregator.remember(update, message, context)
            memory |= {f"{ENCODING}{channel}.{name}": array for name, array in kept.items()}
    kept_now = _kept(terms, client, brought, memory)
    hidden = masked_among(terms.job.algorithm, messages)
    return Parcel(
        messages, vectors, weight, examples, brought.steps, brought.loss, dict(brought.report), kept_now, hidden
    )


def hushed(parcel: Parcel) -> Parcel:
    """A parcel without the figures that would say in the open what its ciphertexts, or its noise, hide."""
    return parcel._replace(weight=1.0, examples=1, steps=0, loss=math.nan, report={})


def outward(algorithm: Algorithm, parcel: Parcel) -> Parcel:
    """A parcel as it may leave its client, and as a server takes it: with the figures that this algorithm may show.

    Args:
        algorithm: the run's.
        parcel: as it was packed; or as it came, since a client may say more than is wanted.
    """
    if sealed(algorithm) or noised(algorithm):
        return hushed(parcel)
    return parcel._replace(loss=math.nan, report={}) if trained_in_private(algorithm) else parcel


def masked_among(algorithm: Algorithm, channels: Iterable[str]) -> frozenset[str]:
    """The channels whose messages are added up under masks."""
    return frozenset(c for c in channels if algorithm.aggregator_of(c).masking is not None)


def masking_bytes(algorithm: Algorithm, channels: Iterable[str]) -> tuple[int, int]:
    """Bytes that a client sends and receives for the masks of some channels, beside its messages: they share them."""
    costs = [m.overhead for c in channels if (m := algorithm.aggregator_of(c).masking) is not None]
    if not costs:
        return 0, 0
    up, down = costs[0]
    return up, down + CHANNEL * (len(costs) - 1)


def _kept(terms: Terms, client: int, brought: Contribution, memory: State) -> State | None:
    """What the client keeps if its parcel is let in."""
    before = terms.orders.kept.get(client, NOTHING)
    kept: State = {name: array for name, array in before.items() if name.startswith(ENCODING)}
    kept |= {f"{METHOD}{name}": array for name, array in brought.kept.items()} | memory
    own = before.get(BUFFERS) if brought.buffers is None else brought.buffers
    if own is not None and own.size and not terms.job.task.average_buffers:
        kept[BUFFERS] = own
    return kept if kept or before else None  # what it kept is replaced, even by nothing


def _channels(terms: Terms, brought: Contribution) -> Vectors:
    """The vectors that travel, by channel."""
    orders, task, method = terms.orders, terms.job.task, terms.job.algorithm.method
    vectors: dict[str, Vector] = {} if brought.update is None else {UPDATE: scaled(orders, brought.update)}
    something = bool(vectors or brought.sides)
    if brought.buffers is not None and brought.buffers.size and task.average_buffers and something:
        vectors[BUFFERS] = scaled(orders, changed(brought.buffers, orders.start.buffers))
    for channel, part in zip((UPDATE, BUFFERS), terms.travels, strict=True):
        if part is not None and channel in vectors:
            vectors[channel] = vectors[channel][part.at]
    if BUFFERS in vectors and not vectors[BUFFERS].size:  # all of them stay at home
        del vectors[BUFFERS]
    models = frozenset() if method is None else method.updates
    return vectors | {name: scaled(orders, v) if name in models else v for name, v in brought.sides.items()}


def scaled(orders: Orders, update: Vector) -> Vector:
    """An update as it counts where it may be stale."""
    scale = orders.scale
    return update if scale == 1.0 else update * update.dtype.type(scale)


# --- the server's half ----------------------------------------------------------------------------------------


def admitted(terms: Terms, client: int, parcel: Parcel) -> dict[str, Message]:
    """A parcel's messages as they are merged.

    Raises:
        UpdateRefused: one of them is not what its aggregator writes.
    """
    algorithm = terms.job.algorithm
    return {
        channel: algorithm.aggregator_of(channel).admit(
            message, terms.context(client, channel, parcel.vectors[channel].size)
        )
        for channel, message in parcel.messages.items()
    }


def let_in(terms: Terms, outcome: Outcome, client: int, parcel: Parcel, messages: Mapping[str, Message]) -> None:
    """Merge a parcel's admitted messages into an outcome, and what its client keeps."""
    algorithm = terms.job.algorithm
    for channel, message in messages.items():
        if channel == UPDATE:
            outcome.message = merged(algorithm.aggregator, outcome.message, message)
        elif channel == BUFFERS:
            outcome.buffers = merged(algorithm.buffers, outcome.buffers, message)
        else:
            rule = algorithm.aggregator_of(channel)
            found = merged(rule, outcome.sides.get(channel), message)
            assert found is not None
            outcome.sides[channel] = found
            outcome.sizes[channel] = parcel.vectors[channel].size
    outcome.senders += bool(parcel.messages)
    if parcel.kept is not None:
        outcome.kept[client] = parcel.kept


REALS = ("<f8", "<f4", "<f2")
WHOLES = ("<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1")


class Intake:
    """The server's half for parcels that came from outside: each is checked, and merged or refused.

    A refused one changes nothing. Names, shapes, dtypes and the weight inside a message must be those that the
    client's half would have written; an update may take at most its share of the range of exact sums, so that nobody
    can fill it up for the others. The norm is looked at where the gate asks for it and a single update can be seen:
    under rules with noise it is their own bound that counts.

    Args:
        terms: of the round.
        seats: how many clients there may be in this round.
        outcome: a partial sum to go on from.
        counted: the clients that are in it.
    """

    def __init__(
        self, terms: Terms, *, seats: int, outcome: Outcome | None = None, counted: frozenset[int] = frozenset()
    ) -> None:
        self._terms, self._seats = terms, max(1, seats)
        self.outcome = Outcome() if outcome is None else outcome
        self.counted: set[int] = set(counted)
        self._expected: dict[tuple[str, Carried], _Expected] = {}

    def take(self, client: int, parcel: Parcel) -> None:
        """Check and merge one client's parcel.

        Raises:
            UpdateRefused: with the reason; nothing has been changed.
        """
        context = Context(self._terms.job.seed, self._terms.orders.round, client)
        parcel = outward(self._terms.job.algorithm, parcel)
        check_replay(context, self.counted)
        self._check_figures(parcel, context)
        for channel, message in parcel.messages.items():
            self._check_channel(channel, message, parcel, context)
        messages = self._admitted(client, parcel)
        try:
            let_in(self._terms, self.outcome, client, parcel._replace(kept=None), messages)
        except SecureAggregationFailed as error:  # ciphertexts that do not go together; the sum is as it was
            told = f"the update of client {client} does not add up with the others: {error}"
            raise UpdateRefused(told, client=client, reason=Reason.SHAPE) from error
        self.counted.add(client)
        self._listed(client, parcel)

    def _listed(self, client: int, parcel: Parcel) -> None:
        out, algorithm = self.outcome, self._terms.job.algorithm
        out.clients.append(client)
        out.examples.append(0 if sealed(algorithm) or noised(algorithm) else parcel.examples)
        out.steps.append(parcel.steps)
        out.losses.append(parcel.loss)
        out.sent.append(parcel.bytes)
        if parcel.report:
            out.reports[client] = dict(parcel.report)

    def _check_figures(self, parcel: Parcel, context: Context) -> None:
        if parcel.examples < 1 or parcel.steps < 0:
            told = f"tells of {parcel.examples} examples and {parcel.steps} steps"
            raise UpdateRefused(
                f"the update of client {context.client} {told}", client=context.client, reason=Reason.WEIGHT
            )
        self._gate.check_weight(parcel.weight, context)

    @property
    def _gate(self) -> Gate:
        return self._terms.job.algorithm.gate

    def _check_channel(self, channel: str, message: Message, parcel: Parcel, context: Context) -> None:
        carried = parcel.vectors[channel]
        self._check_carried(channel, carried, context)
        own, rule = (
            self._terms.context(context.client, channel, carried.size),
            self._terms.job.algorithm.aggregator_of(channel),
        )
        if rule.sealed is not None:  # without the key nobody knows what it would look like: `admit` takes it apart
            return
        if (channel, carried) not in self._expected:
            self._expected[channel, carried] = _Expected.of(rule, own, carried)
        expected = self._expected[channel, carried]
        self._gate.check_message(message, expected.forms, own)
        expected.check_weight(message, parcel.weight, own)

    def _check_carried(self, channel: str, carried: Carried, context: Context) -> None:
        """Refuse vectors of a channel, a length or a dtype that no client of this round sends."""
        terms, sides = self._terms, self._terms.job.algorithm.sides
        if channel in (UPDATE, BUFFERS):
            known = channel == UPDATE or terms.job.task.average_buffers
            size = terms.layout(channel, 0).size
        else:
            known, size = channel in sides, self.outcome.sizes.get(channel, carried.size)
        if not known:
            _refuse(context, Reason.SHAPE, f"sent a channel {channel!r}, which this algorithm has not")
        if carried.size != size:
            _refuse(context, Reason.SHAPE, f"sent {carried.size} entries in {channel!r}, and there are {size}")
        if carried.dtype not in REALS + (WHOLES if channel in sides else ()):
            _refuse(context, Reason.DTYPE, f"sent {channel!r} of dtype {carried.dtype}, which is no real number's")

    def _admitted(self, client: int, parcel: Parcel) -> dict[str, Message]:
        """The messages to be merged, which will surely be merged."""
        try:
            messages = admitted(self._terms, client, parcel)
            for channel, message in messages.items():
                self._check_mergeable(channel, message, parcel, client)
        except UpdateRefused:
            raise
        except SumOverflow as error:
            told = f"the update of client {client} has diverged: {error}"
            raise UpdateRefused(told, client=client, reason=Reason.RANGE) from error
        except (FoedusError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            # Whatever a strange message does to a rule's own code, it is that message's fault.
            told = f"the update of client {client} is not what the rule writes: {type(error).__name__}"
            raise UpdateRefused(told, client=client, reason=Reason.SHAPE) from error
        return messages

    def _check_mergeable(self, channel: str, message: Message, parcel: Parcel, client: int) -> None:
        algorithm, context = (
            self._terms.job.algorithm,
            self._terms.context(client, channel, parcel.vectors[channel].size),
        )
        rule = algorithm.aggregator_of(channel)
        if rule.merge is add:
            check_share(message, self._seats, context)
        looked_at = channel == UPDATE or (algorithm.method is not None and channel in algorithm.method.updates)
        if looked_at and self._gate.max_norm is not None and rule.event is None:
            vector = _alone(rule, message, context)
            self._gate.check(Update(vector, parcel.weight), context._replace(size=len(vector)))


class _Expected(NamedTuple):
    """What messages of a channel look like: their arrays, and what weight they hold for a client of weight 1 and of
    weight 2 (``None`` where they hold none)."""

    forms: Mapping[str, Form]
    weights: tuple[float, float] | None

    @staticmethod
    def of(rule: Aggregator, context: Context, carried: Carried) -> _Expected:
        forms = forms_of(rule, context, dtype=carried.dtype)
        if forms.get("weight", Form("", ())).shape != (1,):
            return _Expected(forms, None)
        zeros = np.zeros(context.size, carried.dtype)
        one, two = (float(rule.encode(Update(zeros, w), context)["weight"][0]) for w in (1.0, 2.0))
        return _Expected(forms, (one, two))

    def check_weight(self, message: Message, weight: float, context: Context) -> None:
        """Refuse a message whose own weight is not what its client told."""
        if self.weights is None:
            return
        one, two = self.weights
        wanted, found = one if one == two else one * weight, float(message["weight"][0])
        if not abs(found - wanted) <= 0.5 * (message["weight"].dtype.kind in "iu") + 1e-9 * abs(wanted):
            _refuse(
                context, Reason.WEIGHT, f"claims the weight {weight:g}, and its message in {context.channel!r} another"
            )


def check_share(message: Message, seats: int, context: Context) -> None:
    """Refuse a message that takes more than its share of the range of exact sums.

    Raises:
        UpdateRefused: if as many like it as there are seats would not add up.
    """
    bound, weight = reach(message)
    if weight <= 0:
        _refuse(context, Reason.WEIGHT, "claims a weight that is not above 0")
    if not bound * seats <= _RANGE or weight * seats > _WEIGHTS:
        told = f"is so large that {seats} like it would leave the range of exact sums; clip updates, or scale them down"
        _refuse(context, Reason.RANGE, told)


_RANGE, _WEIGHTS = 2.0**41, 2**61  # half of what sums hold (foedus/core/aggregate.py)


def _alone(rule: Aggregator, message: Message, context: Context) -> Vector:
    """The update that one admitted message stands for."""
    own = message.get(f"{context.client}.values")  # rules that collect file it under its name
    if own is not None:
        return own
    assert context.layout is not None
    vector, _ = rule.decode(rule.init(context.layout), {n: a.copy() for n, a in message.items()}, context)
    return vector


def _refuse(context: Context, reason: Reason, told: str) -> None:
    raise UpdateRefused(f"the update of client {context.client} {told}", client=context.client, reason=reason)
