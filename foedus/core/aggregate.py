"""Aggregation: encode on the client, merge anywhere, decode on the server.

The one idea of foedus (docs/design.md): ``merge`` is associative and commutative *to the bit*, so that the
same value runs as a sum over a simulated cohort, as partial sums of worker processes, or later as a tree of
edge aggregators or a masked sum. Floating-point addition is not associative; therefore sums run in fixed
point. A value x·w is split exactly into two 64-bit integers,

    x·w  =  high · 2⁻²⁰  +  low · 2⁻⁶⁰  (+ at most 2⁻⁶¹),

which are added as integers: `Σ|x·w|` may reach 2⁴², contributors may be 4 million, and the resolution is
2⁻⁶⁰. (The product x·w itself is rounded to float64 once, on its own; for float32 updates and numbers of
examples it is exact.) Leaving that range raises :class:`~foedus.errors.SumOverflow` before anything is added;
an update that alone would leave it is refused at ``encode``, whichever others there are.

A message is a dict of numpy arrays. A client's message holds ``values`` as floats (what would travel);
``merge`` lifts it to limbs on first contact, so that encoding costs no bytes on the wire.

Not here: what stands before an aggregator (``core/stage.py``), rules that need every update (``core/robust.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.values import Context, Message, State, Update
from foedus.errors import ConfigurationError, Reason, SumOverflow, UpdateRefused
from foedus.tree import Layout, Vector

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

HIGH_BITS = 20  # the high limb counts units of 2**-20
LOW_BITS = 40  # the low limb counts units of 2**-(20 + 40)
WEIGHT_BITS = 20  # weights are rounded to 2**-20
_LIMIT = 2.0**62
_SNAP = 1.5 * 2.0**52  # floats of this size are 1 apart
_LOW_SNAP = _SNAP * 2.0**-LOW_BITS  # and of this size, a unit of the low limb
_CHUNK = 1 << 14  # entries per pass: the temporaries of one pass stay in the processor's cache


class Aggregator(NamedTuple):
    """How updates become one update. A value: pure functions, state passed in and out.

    * ``init(layout) -> state``: what the server keeps between rounds.
    * ``encode(update, context) -> message``: on the client; what travels.
    * ``admit(message, context) -> message``: on the server (or an edge), when one client's message has arrived and
      before it is merged: undoes what cannot be undone after merging. By default nothing.
    * ``merge(a, b) -> message``: associative and commutative to the bit. May reuse the memory of ``a``.
    * ``decode(state, message, context) -> (vector, state)``: on the server, the update of the global model.
    * ``additive``: whether merging is an addition of numbers. A rule that needs every single update (a
      median) merges by collecting, says ``False``, and cannot run under secure aggregation.
    * ``encode_all``: if given, a :class:`Shortcut` for encoding and admitting many updates and merging the messages;
      simulated cohorts use it as long as ``encode`` and ``merge`` are those that it stands for.
    * ``least``: how many updates it needs at least; what never gives it so many is refused at once.
    * ``remember(update, message, context) -> state``: if given, what the client keeps for its next encoding, which
      finds it in ``context.kept`` (what a lossy message left out, say).
    * ``tell(state) -> arrays``: if given, what clients have to know for encoding: it travels beside the model, and they
      find it in ``context.told``.
    * ``event``: what ``foedus.privacy`` accounts for one decoding; ``None``: no privacy is claimed. One that has it
      ignores how many contributed, and is decoded even if nobody did.
    * ``streams``: whether decoding mixes the sums of several rounds, so that no stage before it may be undone after it.
    * ``masking``: if given, messages are added up under masks, and nobody ever sees a single one; see :class:`Masking`.
    * ``sealed``: if given, messages are encrypted, and added up as they are; see :class:`Sealed`.
    * ``chained``: if ``chain`` made it, of what; see :class:`Chained`.

    Laws, held by the conformance suite: ``merge(a, b) == merge(b, a)`` and
    ``merge(merge(a, b), c) == merge(a, merge(b, c))``, bit for bit, of admitted messages.

    Example, whole: of every parameter the largest change that any client made:

        >>> largest = Aggregator(
        ...     init=lambda layout: {},
        ...     encode=lambda update, context: {"values": update.vector},
        ...     merge=lambda a, b: {"values": np.maximum(a["values"], b["values"])},
        ...     decode=lambda state, message, context: (message["values"], state),
        ...     additive=False,
        ...     label="largest()",
        ... )
        >>> a, b = ({"values": np.array(v)} for v in ([1.0, 5.0], [2.0, 3.0]))
        >>> largest.decode({}, largest.merge(a, b), Context(seed=0, round=1, client=-1))[0].tolist()
        [2.0, 5.0]
    """

    init: Callable[[Layout], State]
    encode: Callable[[Update, Context], Message]
    merge: Callable[[Message, Message], Message]
    decode: Callable[[State, Message, Context], tuple[Vector, State]]
    additive: bool
    label: str
    encode_all: Shortcut | None = None
    admit: Callable[[Message, Context], Message] = lambda message, context: message
    remember: Callable[[Update, Message, Context], State] | None = None
    least: int = 1
    tell: Callable[[State], Mapping[str, NDArray[Any]]] | None = None
    event: object | None = None
    masking: Masking | None = None
    streams: bool = False
    sealed: Sealed | None = None
    chained: Chained | None = None

    @property
    def hidden(self) -> bool:
        """Whether nobody but a client itself ever sees its update."""
        return self.masking is not None or self.sealed is not None

    @property
    def shortcut(self) -> Shortcut | None:
        """``encode_all``, unless ``encode`` or ``merge`` were replaced since: theirs is then the only right way."""
        short = self.encode_all
        own = isinstance(short, Shortcut) and short.encode is self.encode and short.merge is self.merge
        return short if own else None


class Shortcut(NamedTuple):
    """A faster way to the message of many updates: ``shortcut(updates, contexts)``.

    It says what it stands for, so that an aggregator made of another by ``_replace(encode=...)`` or
    ``_replace(merge=...)`` never takes the old one's shortcut past its own functions.

    * ``encode``, ``merge``: the functions of the aggregator that it stands for.
    * ``function(updates, contexts) -> message``: what encoding each and merging the messages gives, bit for bit.
    * ``plain``: whether that is the exact sum of what it is given, by weight, and nothing else: a stage that gives
      multiples of a grid may then add them up itself (``core/totals.py``).

    Example:
        >>> m = mean()
        >>> halved = m._replace(encode=lambda u, context: m.encode(u._replace(vector=u.vector / 2), context))
        >>> m.shortcut is None, halved.shortcut is None
        (False, True)
    """

    encode: Callable[[Update, Context], Message]
    merge: Callable[[Message, Message], Message]
    function: Callable[[Sequence[Update], Sequence[Context]], Message]
    plain: bool = False

    def __call__(self, updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        return self.function(updates, contexts)


class Chained(NamedTuple):
    """What an aggregator says of itself that ``chain`` made, so that a chain around it sees all stages as one row.

    * ``stages``: that ``chain`` was given, of type ``Stage``.
    * ``inner``: the aggregator behind them.
    * ``whole``: what ``chain`` made of them, but for this: whoever changed it since is taken as it is.
    """

    stages: tuple[Any, ...]
    inner: Aggregator
    whole: Aggregator


class Masking(NamedTuple):
    """What an aggregator says of itself whose messages are whole numbers that are added up under masks.

    * ``of_codes(bits)``: the same for codes from 0 to 2^bits − 1, which a quantiser before it gives.
    * ``of_whole(bits)``: the same for whole numbers, positive and negative, whose sum over a round lies from −2^(bits −
      1) to 2^(bits − 1) − 1: they are added modulo 2^bits.
    * ``entries(n)``: how many numbers a message holds for an update of n entries.
    * ``width``: bits of each; they are added modulo 2^width.
    * ``least``: fewest messages in a sum that is ever shown.
    * ``withstand``: what the masks withstand (``foedus.secure.graph.Withstand``), by which a round knows its cohort.
    * ``overhead``: bytes that a client sends and receives in a round for keys, shares and unmasking, beside its
      message.
    * ``check(sum)``: refuses what no messages that clients write add up to, by ``SecureAggregationFailed``: somebody
      lied. Under masks this is all that can be looked at.
    * ``planned``: what sums are divided by, however many came; ``None``: by the weight of those who came.
    """

    of_codes: Callable[[int], Aggregator]
    of_whole: Callable[[int], Aggregator]
    entries: Callable[[int], int]
    width: int
    least: int
    withstand: Any
    overhead: tuple[int, int]
    check: Callable[[Message], None]
    planned: float | None


KeyBytes = bytes  # of a key, in whatever form its aggregator reads


class Sealed(NamedTuple):
    """What an aggregator says of itself whose messages are encrypted, and decoded by those who have the key.

    * ``silos``: how many share the key.
    * ``least``: fewest messages in a sum that is decrypted.
    * ``bytes(n)``: of a message for an update of n entries, about.
    * ``error``: an entry of the mean is off by this at most.
    * ``correctness``: the chance that a number comes out wrong is at most 2^−correctness.
    * ``keyed(secret)``: the aggregator of those who have the key.
    * ``open(sum, context) -> message``: at somebody who has it: the sum as whole numbers, which ``decode`` takes
      without a key; raises if it is not of enough messages, each once, all of this round, and of ``context.client``'s
      own among them where that is a client.
    * ``opened(message, count, context) -> message``: what somebody said that a sum of so many opens to, as ``decode``
      takes it; raises :class:`UpdateRefused` if no such sum can be.
    """

    silos: int
    least: int
    bytes: Callable[[int], int]
    error: float
    correctness: float
    keyed: Callable[[KeyBytes], Aggregator]
    open: Callable[[Message, Context], Message]
    opened: Callable[[Message, int, Context], Message]


def mean(*, weighted: bool = True) -> Aggregator:
    """The mean of the updates, by default weighted by each client's number of examples.

    The sum is exact and does not depend on the order (module docstring). Source: McMahan et al. 2017,
    algorithm 1: ``w ← Σ (n_k / n) w_k``.

    Args:
        weighted: weight by the number of training examples; otherwise every client counts the same.

    Example:
        >>> m = mean()
        >>> c = Context(seed=0, round=1, client=0)
        >>> parts = [m.encode(Update(np.full(2, x, "f4"), weight=w), c) for x, w in [(1.0, 30), (5.0, 10)]]
        >>> m.decode({}, m.merge(*parts), c)[0].tolist()
        [2.0, 2.0]
    """

    def units(update: Update, context: Context) -> int:
        weight = float(update.weight) if weighted else 1.0
        if not (math.isfinite(weight) and 2.0**-WEIGHT_BITS <= weight < 2.0**32):
            raise UpdateRefused(
                f"a client's weight must lie in 2⁻²⁰ … 2³²; client {context.client} has {weight}",
                client=context.client, reason=Reason.WEIGHT,
            )  # fmt: skip
        return round(weight * 2.0**WEIGHT_BITS)

    def encode(update: Update, context: Context) -> Message:
        weight = units(update, context)
        check_sum(_bound(update.vector, weight), 1, weight)
        return {"values": update.vector, "weight": np.array([weight], np.int64)}

    def encode_all(updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        vectors = [u.vector for u in updates]
        return _added(_zero(vectors[0].shape[0]), vectors, list(map(units, updates, contexts)))

    def decode(state: State, message: Message, context: Context) -> tuple[Vector, State]:
        total = lift(message)
        weight = int(total["weight"][0]) / 2.0**WEIGHT_BITS
        return unlift(total) / weight, state

    label = "mean()" if weighted else "mean(weighted=False)"
    short = Shortcut(encode, add, encode_all, plain=True)
    return Aggregator(lambda layout: {}, encode, add, decode, additive=True, label=label, encode_all=short)


# --- exact sums ---------------------------------------------------------------------------------------------


def lift(message: Message) -> Message:
    """A client's message as limbs: ``high``, ``low`` int64 [parameter]; unchanged if it is a sum already."""
    if "high" in message:
        return message
    return _add_values(_zero(message["values"].shape[0]), message)


def _zero(size: int) -> Message:
    """The sum of nothing."""
    return {
        "high": np.zeros(size, np.int64),
        "low": np.zeros(size, np.int64),
        "weight": np.zeros(1, np.int64),
        "count": np.zeros(1, np.int64),
        "bound": np.zeros(1, np.float64),
    }


def add(a: Message, b: Message) -> Message:
    """The exact sum of two messages. May reuse the memory of ``a``.

    Raises:
        SumOverflow: the sum could leave the range; neither message has been changed.
    """
    if "high" in b and "high" not in a:
        a, b = {name: array.copy() for name, array in b.items()}, a
    total = lift(a)
    if "high" not in b:
        return _add_values(total, b)
    check_sum(*((total[name][0] + b[name][0]).item() for name in ("bound", "count", "weight")))
    for name in total:
        total[name] += b[name]
    return total


def _add_values(total: Message, message: Message) -> Message:
    """total += values · weight, in place."""
    return _added(total, [message["values"]], [int(message["weight"][0])])


def _added(total: Message, vectors: Sequence[Vector], units: Sequence[int]) -> Message:
    """total += Σ vector · weight, in place, in blocks of a few rows and columns that stay in the cache.

    Args:
        total: the sum so far; unchanged if an error is raised.
        vectors: each [parameter].
        units: the weight of each, in units of 2⁻²⁰.
    """
    size = total["high"].shape[0]
    if wrong := [v.shape[0] for v in vectors if v.shape != (size,)]:
        raise ConfigurationError(f"updates of {wrong[0]} and {size} entries do not add up")
    grown = {
        "bound": math.fsum(_bound(v, u) for v, u in zip(vectors, units, strict=True)),
        "count": len(vectors),
        "weight": sum(units),
    }
    check_sum(*(total[name][0].item() + more for name, more in grown.items()))
    scales = np.array(units, np.float64)[:, None] * 2.0 ** (HIGH_BITS - WEIGHT_BITS)
    rows = max(1, 4 * _CHUNK // max(min(size, _CHUNK), 1))
    for row in range(0, len(vectors), rows):
        for at in range(0, size, _CHUNK):
            part = slice(at, at + _CHUNK)
            block = scales[row : row + rows]
            if len(block) == 1:  # converted and scaled in one pass
                exact = np.multiply(vectors[row][None, part], block, dtype=np.float64)
            else:
                exact = np.concatenate([v[part] for v in vectors[row : row + rows]], dtype=np.float64)
                exact = exact.reshape(len(block), -1)
                exact *= block
            high, low = _limbs(exact, grown["bound"] * 2.0**HIGH_BITS)
            total["high"][part] += high
            total["low"][part] += low
    for name, more in grown.items():
        total[name] += more
    return total


def _limbs(exact: NDArray[np.float64], bound: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Σ over the rows of ``exact`` [row, parameter], none above ``bound``: whole numbers, and what is left of each
    value in units of 2⁻⁴⁰, both int64 [parameter]. Overwrites ``exact``.

    A sum with 1.5 · 2⁵² has the rounded value as an integer in its last bits: that is 2.5 times as fast as
    rounding and converting, which processors do one by one.
    """
    if bound >= 2.0**51:
        whole = np.rint(exact)
        high = whole.astype(np.int64).sum(0)
    else:
        whole = exact + _SNAP
        high = _last_bits(whole, _SNAP)
        whole -= _SNAP
    exact -= whole
    exact += _LOW_SNAP
    return high, _last_bits(exact, _LOW_SNAP)


def _last_bits(snapped: NDArray[np.float64], snap: float) -> NDArray[np.int64]:
    """Σ over the rows of ``snapped`` [row, parameter] of the integers in the last bits, to each of which ``snap``
    has been added; integers wrap around, so that its own bits can be taken off at the end."""
    own: NDArray[np.int64] = len(snapped) * np.array([snap]).view(np.int64)
    bits = snapped.view(np.int64)
    total: NDArray[np.int64] = bits[0] if len(bits) == 1 else bits.sum(0)  # a sum of one would be a copy
    return total - own


def _bound(values: Float[Vector, " parameter"], units: int) -> float:
    """The power of two that no |value · weight| exceeds: sums of them are exact, in whatever order."""
    peak = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    if not math.isfinite(peak):
        raise SumOverflow("an update that is not finite cannot enter a sum")
    return bound_of(peak * units * 2.0**-WEIGHT_BITS)


def bound_of(peak: float) -> float:
    """The power of two that is at least a peak, or 2⁻¹⁰.

    Example:
        >>> bound_of(3.0)
        4.0
    """
    return 2.0 ** math.ceil(math.log2(max(peak, 2.0**-10))) if peak < math.inf else math.inf


def reach(message: Message) -> tuple[float, int]:
    """How much of the range of exact sums a client's message takes: a power of two that no |value · weight| exceeds,
    and its weight in units of 2⁻²⁰.

    Raises:
        SumOverflow: a value is not finite.

    Example:
        >>> reach(mean().encode(Update(np.array([3.0], "f4"), weight=2), Context(0, 1, 0)))
        (8.0, 2097152)
    """
    weight = int(message["weight"][0])
    if "high" in message:
        return float(message["bound"][0]), weight
    return _bound(message["values"], weight), weight


def check_sum(bound: float, count: int, weight: int) -> None:
    """Refuse a sum that could leave the range.

    Args:
        bound: no entry exceeds it.
        count: of updates in it.
        weight: of all of them, in units of 2⁻²⁰.

    Raises:
        SumOverflow: it could.

    Example:
        >>> check_sum(2.0**30, 100, 100 << 20)
    """
    if bound * 2.0**HIGH_BITS >= _LIMIT or count >= 2**22 or weight >= _LIMIT:
        raise SumOverflow(
            f"the sum of {count} weighted update{'s' * (count > 1)} could reach {bound:.3g}, with weights of "
            f"{weight * 2.0**-WEIGHT_BITS:.3g} in all; exact sums hold up to 2⁴², weights of 2⁴² and 4 million "
            "updates. Scale the updates or the weights down, or use mean(weighted=False)"
        )


def unlift(total: Message) -> Float64[NDArray[np.float64], " parameter"]:
    """The limbs' value as float64 [parameter]."""
    return total["high"] * 2.0**-HIGH_BITS + total["low"] * 2.0 ** -(HIGH_BITS + LOW_BITS)


def message_bytes(message: Message) -> int:
    """Bytes of the arrays of a message."""
    return int(sum(np.asarray(v).nbytes for v in message.values()))


def nothing(aggregator: Aggregator, context: Context) -> Message:
    """The sum of no messages at all, for an aggregator that adds up: noise for privacy is added to it, too.

    Args:
        aggregator: one whose merging is :func:`add`.
        context: with ``size``, the length of an update.

    Example:
        >>> int(nothing(mean(), Context(seed=0, round=1, client=0, size=3))["count"][0])
        0
    """
    one = aggregator.encode(Update(np.zeros(context.size, np.float32), 1.0), context)
    return {name: np.zeros_like(array) for name, array in lift(aggregator.admit(one, context)).items()}


def fold(aggregator: Aggregator, messages: list[Message]) -> Message | None:
    """All admitted messages merged into one; ``None`` if there is none."""
    total: Message | None = None
    for message in messages:
        total = message if total is None else aggregator.merge(total, message)
    return total
