"""Stages: what is done to an update on its way, and undone on the server.

A :class:`Stage` stands before an aggregator in a :func:`chain`. Two kinds differ in *when* they are undone:

* a **linear** stage (a rotation that all clients share, a shared random mask, codes on a common scale) is one whose
  decoding commutes with taking means: it is undone once, after the merging, and works where nothing but the mean is
  ever seen (secure aggregation);
* any other (a scale or codebook of each client's own) is undone for every message when it arrives, before merging.

A chain is refused when it is built if its parts cannot work together: see :class:`Kind`.

Not here: the stages that compress (``core/rotation.py``, ``core/sparse.py``, ``core/quantise.py``, ``core/layers.py``,
``core/entropy.py``), rules that need every update (``core/robust.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, Chained, Sealed, Shortcut, fold, lift
from foedus.core.checks import check_number
from foedus.core.coding import blocks, part, refused
from foedus.core.lengths import squared, within
from foedus.core.totals import Grid
from foedus.core.values import NOTHING, Context, Message, State, Update
from foedus.errors import ConfigurationError, IncompatibleStages, Reason, SumOverflow
from foedus.tree import Layout, Vector

if TYPE_CHECKING:
    from jaxtyping import UInt8


class Kind(IntEnum):
    """What an update's vector holds: a stage says what it takes and what it gives."""

    REALS = 0  # floating-point numbers
    CODES = 1  # whole numbers of a few bits: what quantisation gives
    BYTES = 2  # compressed bytes, uint8, of no known length
    WHOLE = 3  # whole numbers of either sign, int64, that only masked sums take: see Stage.bits


class Stage(NamedTuple):
    """A transformation before an aggregator: applied on the client, undone on the server.

    * ``encode(update, context) -> update``: pure; all randomness is a function of the context.
    * ``decode(update, context) -> update``: the other way. A linear stage is given the *mean* (and a context
      whose client is the server); any other is given one client's update with what its ``encode`` put
      into ``beside``.
    * ``linear``: whether decoding commutes with taking weighted means, to rounding.
    * ``takes``, ``gives``: what the vector holds before and after.
    * ``bits``: if it gives codes, how many bits each takes on the wire: whole numbers from 0 to 2**bits − 1. If it
      gives whole numbers of either sign, that the *sum* over a round lies from −2**(bits − 1) to 2**(bits − 1) − 1;
      whoever adds noise to them answers for that.
    * ``size(n, layout) -> length``: of the encoded vector, from that of the vector before.
    * ``layers``: it looks at the model's layers, so that the vector must still lie as the model's ``Layout`` says.
    * ``scatters``: after it the vector does not.
    * ``event``: what ``foedus.privacy`` accounts for one encoding; ``None``: no privacy is claimed.
    * ``room``: if it gives whole numbers, of how many clients the sum keeps that promise; ``None``: of any number.
    * ``grid``: if what it gives are whole multiples of a step, with the weight 1: which; see
      :class:`~foedus.core.totals.Grid`.
    * ``inside(context)``: if given, the :class:`Subspace` whose updates come back from ``decode`` as they were, so that
      clients can train within it (``structured``).

    Example:
        >>> double = Stage(
        ...     encode=lambda u, context: u._replace(vector=2 * u.vector),
        ...     decode=lambda u, context: u._replace(vector=u.vector / 2),
        ...     label="double()",
        ... )
        >>> from foedus.core.aggregate import mean
        >>> chain(double, mean()).label
        'chain(double(), mean())'
    """

    encode: Callable[[Update, Context], Update]
    decode: Callable[[Update, Context], Update]
    label: str
    linear: bool = True
    takes: Kind = Kind.REALS
    gives: Kind = Kind.REALS
    bits: int | None = None
    size: Callable[[int, Layout | None], int] = lambda n, layout: n
    layers: bool = False
    scatters: bool = False
    event: object | None = None
    inside: Callable[[Context], Subspace] | None = None
    room: int | None = None
    grid: Grid | None = None


class Subspace(NamedTuple):
    """What updates of a model may look like.

    Attributes:
        mask: 1 where entries may differ from 0 and 0 where not, [parameter]; ``None``: anywhere.
        bases: by name of an array [rows, ...], orthonormal columns [rows, rank] in whose span those of its matrix lie.
    """

    mask: Vector | None = None
    bases: Mapping[str, NDArray[np.float64]] = NOTHING


def chain(*stages: Stage | Aggregator) -> Aggregator:
    """Stages around an aggregator, applied left to right on the client and undone in reverse on the server.

    A chain in a chain is one row of stages: ``chain(a, chain(b, rule))`` is ``chain(a, b, rule)``.

    Args:
        stages: any number of :class:`Stage`, then exactly one :class:`Aggregator`.

    Raises:
        IncompatibleStages: the last part is not an aggregator, an earlier one is, or a stage cannot stand where it
            does.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> chain(clip(1.0), mean()).label
        'chain(clip(1.0), mean())'
    """
    stages = _unfolded(stages)
    outer, own = _parted(stages)
    inner = _taking(outer, own)
    label = f"chain({', '.join(s.label for s in stages)})"
    if not outer:
        return inner._replace(label=label)
    links = _Links(outer, inner)
    encode = links.encode  # one object: a shortcut knows by it what it stands for
    short = Shortcut(encode, inner.merge, links.encode_all) if links.plain and inner.shortcut else None
    whole = inner._replace(
        encode=encode, admit=links.admit, decode=links.decode, label=label, encode_all=short,
        remember=links.remember if inner.remember else None, event=_event(outer, inner), sealed=links.sealed,
        chained=None,
    )  # fmt: skip
    return whole._replace(chained=Chained(tuple(outer), own, whole))


def _unfolded(stages: tuple[Stage | Aggregator, ...]) -> tuple[Stage | Aggregator, ...]:
    """Stages and aggregator, with those of a chain at the end in its place, unless it was changed since it was made."""
    last = stages[-1] if stages else None
    if not isinstance(last, Aggregator) or last.chained is None or last._replace(chained=None) != last.chained.whole:
        return stages
    return (*stages[:-1], *last.chained.stages, last.chained.inner)


def _within(aggregator: Aggregator) -> list[Stage]:
    """All stages that stand in an aggregator, in its chain or in one that it was made of."""
    if aggregator.chained is None:
        return []
    return [*aggregator.chained.stages, *_within(aggregator.chained.inner)]


def _parted(stages: Sequence[Stage | Aggregator]) -> tuple[list[Stage], Aggregator]:
    """The stages and the aggregator of a chain, once they fit together."""
    inner, outer = stages[-1] if stages else None, [s for s in stages if isinstance(s, Stage)]
    if not isinstance(inner, Aggregator):
        raise IncompatibleStages("chain() ends with an aggregator, e.g. chain(clip(1.0), mean())")
    if strangers := [s for s in stages[:-1] if not isinstance(s, Stage | Aggregator)]:
        raise IncompatibleStages(f"chain() takes stages, such as clip(1.0), and an aggregator; not {strangers[0]!r}")
    if wrong := [s.label for s in stages[:-1] if isinstance(s, Aggregator)]:
        raise IncompatibleStages(
            f"chain() takes one aggregator, as its last part; {', '.join(wrong)} stands before {inner.label}"
        )
    behind = _within(inner)
    check_order([*outer, *behind])
    _event(outer, inner)
    if inner.streams and (turned := [stage.label for stage in outer if stage.linear and stage.decode is not same]):
        raise IncompatibleStages(
            f"{inner.label} mixes the sums of several rounds, and {turned[0]} is undone after it, otherwise in every "
            "round. Leave it out"
        )
    if inner.remember and not _Links(outer, inner).plain:
        raise IncompatibleStages(
            f"{inner.label} encodes on the client, and {outer[-1].label} before it is undone only on the server. "
            f"Write {inner.label.partition('(')[0]}(chain({outer[-1].label}, ...))"
        )
    if outer and behind and not _Links(outer, inner).plain:
        raise IncompatibleStages(
            f"{outer[-1].label} is undone on the server, message by message, and {behind[0].label} in {inner.label} "
            "would run there, too, instead of on the client. Write all stages in a row in one chain, and change that"
        )
    return outer, inner


def _taking(outer: Sequence[Stage], inner: Aggregator) -> Aggregator:
    """The aggregator for what the last stage gives: one that masks adds up codes and whole numbers as they are.

    Raises:
        IncompatibleStages: a stage is undone message by message, and under masks there is only the sum; or whole
            numbers go to an aggregator that does not mask.
    """
    gives = outer[-1].gives if outer else Kind.REALS
    if inner.sealed is not None and gives is not Kind.REALS:
        raise IncompatibleStages(
            f"{outer[-1].label} gives {gives.name.lower()}, and {inner.label} rounds and encrypts real numbers, whose "
            "ciphertexts are no smaller for it. Leave it out, or write masked(...), which adds up whole numbers"
        )
    if not inner.hidden:
        if gives is Kind.WHOLE:
            raise IncompatibleStages(
                f"{outer[-1].label} gives whole numbers that are to be added up under masks, and {inner.label} does "
                "not mask. Write masked(...) in its place, or foedus.privacy.trusted_sum(...) around the stage"
            )
        return inner
    if firm := [stage.label for stage in outer if not stage.linear]:
        raise IncompatibleStages(
            f"{firm[0]} is undone message by message, and behind {inner.label} only the sum of all is seen. What "
            "adds up: clip(c), rotate(), random_mask(share), quantise(bits, scale=...)"
        )
    if gives is Kind.REALS:
        return inner
    bits = outer[-1].bits
    assert bits is not None
    assert inner.masking is not None
    room, clients = outer[-1].room, inner.masking.withstand.clients
    if room is not None and clients > room:
        raise IncompatibleStages(
            f"{outer[-1].label} leaves room for sums of {room} clients, and {inner.label} may add up {clients}: they "
            f"could wrap around. Write cohort={clients}, or Withstand(clients={room}, ...)"
        )
    if outer[-1].event is not None and inner.masking.planned is None:
        raise IncompatibleStages(
            f"{outer[-1].label} is accounted for as noise on a sum, and {inner.label} divides that by how many came. "
            "Say by what instead: masked(..., planned=COHORT), with the number of clients that are planned for a round"
        )
    return inner.masking.of_codes(bits) if gives is Kind.CODES else inner.masking.of_whole(bits)


def _event(outer: Sequence[Stage], inner: Aggregator) -> object | None:
    """What is accounted for a chain: the event of the one part that adds noise.

    Raises:
        IncompatibleStages: two parts add noise, or the server's is added to something else than numbers.
    """
    parts: list[Stage | Aggregator] = [*outer, inner]
    noisy = [part for part in parts if part.event is not None]
    if len(noisy) > 1:
        raise IncompatibleStages(
            f"{' and '.join(part.label for part in noisy)} both add noise for privacy, and only one of them would be "
            "accounted for: on the client for those who do not trust the server, else on the server. Leave one out"
        )
    if inner.event is not None and (codes := [s.label for s in outer if s.linear and s.gives is not Kind.REALS]):
        raise IncompatibleStages(
            f"{inner.label} bounds and adds real numbers, and {codes[0]} makes codes that are undone only after the "
            "adding: their bound is not that of the update. Leave it out, or write quantise(bits) without a scale, "
            "which is undone message by message"
        )
    return noisy[0].event if noisy else None


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse stages that cannot follow each other.

    Raises:
        IncompatibleStages: one takes another kind than the one before gives, or looks at layers that one before moved.
    """
    kind, last, moved = Kind.REALS, "the client's training", ""
    for stage in stages:
        if stage.takes != kind:
            raise IncompatibleStages(
                f"{stage.label} takes {stage.takes.name.lower()}, and {last} before it gives {kind.name.lower()}. "
                f"{_ORDER}"
            )
        if stage.layers and moved:
            raise IncompatibleStages(
                f"{stage.label} looks at the model's layers, and {moved} before it moves entries; write it first"
            )
        kind, last, moved = stage.gives, stage.label, moved or (stage.label if stage.scatters else "")


_ORDER = "Write stages that change numbers first (clip, rotate, masks), then one quantiser, then lossless coding"


class _Links(NamedTuple):
    """The stages of a chain and its aggregator: how a vector passes through."""

    outer: Sequence[Stage]
    inner: Aggregator

    @property
    def later(self) -> int:
        """How many of the first stages are undone after the merging; the others, message by message."""
        if not self.inner.additive:
            return 0  # a median of rotated updates is not the rotated median
        firm = [i for i, stage in enumerate(self.outer) if not stage.linear]
        return firm[0] if firm else len(self.outer)

    @property
    def plain(self) -> bool:
        """Whether what travels adds up as it is: real numbers, or whatever is masked."""
        added = self.outer[-1].gives is Kind.REALS or self.inner.masking is not None
        return self.later == len(self.outer) and added

    def encode(self, update: Update, context: Context) -> Message:
        if self.plain:  # then the aggregator's own way of writing is what travels
            update, context = self.through(update, context)
            return self.inner.encode(update, context)
        return sent(self.outer, update, context) | {"weight": np.array([update.weight], np.float64)}

    def through(self, update: Update, context: Context) -> tuple[Update, Context]:
        """The update after all stages, for plain ones, which put nothing beside it."""
        for stage in self.outer:
            update = stage.encode(update, context._replace(size=len(update.vector)))
        return update, context._replace(size=len(update.vector))

    def encode_all(self, updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        assert self.inner.shortcut is not None
        grid = self.outer[-1].grid if self.inner.shortcut.plain else None
        before = self if grid is None else self._replace(outer=self.outer[:-1])
        pairs = [before.through(u, c) for u, c in zip(updates, contexts, strict=True)]
        vectors, own = [u for u, _ in pairs], [c for _, c in pairs]
        if grid is None:
            return self.inner.shortcut(vectors, own)
        found = grid.total(vectors, own)
        return self._replace(outer=self.outer[-1:]).one_by_one(vectors, own) if found is None else found

    def one_by_one(self, updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        total = fold(self.inner, [self.encode(u, c) for u, c in zip(updates, contexts, strict=True)])
        assert total is not None
        return lift(total)

    def remember(self, update: Update, message: Message, context: Context) -> State:
        assert self.inner.remember is not None
        update, context = self.through(update, context)
        return self.inner.remember(update, message, context)

    def admit(self, message: Message, context: Context) -> Message:
        """One client's message with its last stages undone, as the aggregator's own."""
        own = context._replace(size=lengths(self.outer, context)[self.later])
        if self.plain:
            return self.inner.admit(message, own)
        weight = float(part(message, "weight", context, dtype="float64", shape=(1,))[0])
        update = received(self.outer, message, context, down_to=self.later)._replace(weight=weight)
        return self.inner.admit(self.inner.encode(update, own), own)

    @property
    def sealed(self) -> Sealed | None:
        """As the aggregator's, behind these stages."""
        own, outer = self.inner.sealed, self.outer
        if own is None:
            return None

        def within(context: Context) -> Context:
            return context._replace(size=lengths(outer, context)[-1])

        return own._replace(
            keyed=lambda secret: chain(*outer, own.keyed(secret)),
            open=lambda message, context: own.open(message, within(context)),
            opened=lambda message, count, context: own.opened(message, count, within(context)),
        )

    def decode(self, state: State, message: Message, context: Context) -> tuple[Vector, State]:
        sizes = lengths(self.outer, context)
        vector, state = self.inner.decode(state, message, context._replace(size=sizes[self.later]))
        if context.layout and any(stage.scatters for stage in self.outer[: self.later]):
            vector = vector.astype(
                context.layout.dtype
            )  # rotating more digits than the model has would only take longer
        update = Update(vector, 1.0)
        for i in range(self.later - 1, -1, -1):
            update = self.outer[i].decode(update, context._replace(size=sizes[i]))
        return update.vector, state


# --- a row of stages ----------------------------------------------------------------------------------------


def sent(stages: Sequence[Stage], update: Update, context: Context) -> Message:
    """What travels of an update that goes through stages: ``values``, and what each put beside it as ``0.name``."""
    beside: Message = {}
    for i, stage in enumerate(stages):
        update = stage.encode(update._replace(beside=NOTHING), context._replace(size=len(update.vector)))
        beside |= {f"{i}.{name}": array for name, array in update.beside.items()}
    bits = stages[-1].bits
    return {"values": update.vector if bits is None else packed(update.vector, bits), **beside}


def received(stages: Sequence[Stage], message: Message, context: Context, *, down_to: int = 0) -> Update:
    """The inverse of :func:`sent`, or that of the stages from ``down_to`` on.

    Args:
        stages: at least one.
        message: of one client; may have been written by anybody.
        context: with the size of the vector before the first stage.
        down_to: how many of the first stages are left as they are.

    Raises:
        UpdateRefused: the message is not what the stages write.
    """
    sizes = lengths(stages, context)
    update = Update(_values(stages[-1], message, context._replace(size=sizes[-1])), 1.0)
    for i in range(len(stages) - 1, down_to - 1, -1):
        beside = {n.partition(".")[2]: a for n, a in message.items() if n.startswith(f"{i}.")}
        update = stages[i].decode(update._replace(beside=beside), context._replace(size=sizes[i]))
    vector = update.vector
    if vector.shape != (sizes[down_to],):
        raise refused(f"sent a vector of {list(vector.shape)} where {sizes[down_to]} numbers are expected", context)
    if vector.dtype.kind in "iu":  # codes that are undone after the merging
        if len(vector) and vector.max() >= 2 ** (stages[down_to - 1].bits or 16):
            raise refused(f"sent codes that {stages[down_to - 1].label} never gives", context, Reason.RANGE)
        vector = vector.astype(np.float32)
    return update._replace(vector=vector, beside=NOTHING)


def _values(last: Stage, message: Message, context: Context) -> NDArray[Any]:
    """The vector as the last stage gave it."""
    values, bits = message.get("values"), last.bits
    if bits is not None:
        size = -(-context.size * bits // 8)
        return unpacked(part(message, "values", context, dtype="uint8", shape=(size,)), bits, context.size)
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "fu":
        raise refused(f"sent {type(values).__name__} where a vector is expected", context)
    return values


def lengths(stages: Sequence[Stage], context: Context) -> list[int]:
    """The lengths of the vector before every stage, and after the last."""
    sizes = [context.size]
    for stage in stages:
        sizes.append(stage.size(sizes[-1], context.layout))
    return sizes


# --- simple stages ------------------------------------------------------------------------------------------


def clip(norm: float) -> Stage:
    """Scale an update down so that its Euclidean norm is at most ``norm``; a shorter one stays as it is.

    Never above, not even by rounding and in whatever order the norm is summed: a scaled update is shorter than
    ``norm`` by two units in the last place of its dtype or one in 10¹², and one that is as long as ``norm`` to twelve
    digits is scaled, too, since what is promised about privacy is promised about the bound.

    Raises:
        SumOverflow: an update is not finite.

    Example:
        >>> clip(1.0).encode(Update(np.array([3.0, 4.0]), weight=1), Context(0, 1, 0)).vector.round(9).tolist()
        [0.6, 0.8]
    """
    check_number("norm", norm, above=True)

    def encode(update: Update, context: Context) -> Update:
        if within(update.vector, norm * _NEARLY):
            return update
        length = math.sqrt(squared(update.vector))
        if not math.isfinite(length):
            raise SumOverflow("an update that is not finite cannot be clipped")
        return update._replace(vector=_shortened(update.vector, length, norm))

    return Stage(encode, same, f"clip({norm})")


_NEARLY = 1 - 2.0**-40  # sums in another order may differ by less


def _shortened(vector: Vector, length: float, norm: float) -> Vector:
    """The vector [parameter] of that length, scaled to at most ``norm``: what rounding may add is taken off first."""
    kind = np.finfo(vector.dtype)
    # Rounding takes three quarters of it: half for the factor, a quarter for products. In float64, sums round by more.
    factor, spare = min(norm / length, 1.0), max(2 * float(kind.eps), 1.25 * (1 - _NEARLY))
    scaled = vector * vector.dtype.type(factor * (1 - spare))
    if norm > 2.0**30 * float(kind.tiny) * math.sqrt(len(vector)):
        return scaled
    while not within(scaled, norm * _NEARLY):  # numbers that are too small to be precise
        spare *= 2
        scaled = vector * vector.dtype.type(factor * max(1 - spare, 0.0))
    return scaled


def same(update: Update, context: Context) -> Update:
    """For stages with nothing to undo."""
    return update


# --- codes on the wire --------------------------------------------------------------------------------------


def packed(codes: NDArray[Any], bits: int) -> UInt8[NDArray[np.uint8], " byte"]:
    """Whole numbers 0 … 2**bits − 1 [n], laid end to end in ``ceil(n · bits / 8)`` bytes.

    Args:
        codes: unsigned integers [n].
        bits: 1 to 16.
    """
    if bits in (8, 16):
        return np.ascontiguousarray(codes, "<u1" if bits == 8 else "<u2").view(np.uint8)
    count = len(codes)
    if bits > 8:
        digits = (np.ascontiguousarray(codes, "<u2")[:, None] >> np.arange(bits, dtype=np.uint16)) & 1
        return np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little")
    found = np.empty(-(-count * bits // 8), np.uint8)
    for place in blocks(count):
        eights = np.zeros((-(-(place.stop - place.start) // 8), 8), np.uint8)
        eights.reshape(-1)[: place.stop - place.start] = codes[place]
        goal = found[place.start * bits // 8 : -(-place.stop * bits // 8)]
        goal[:] = _narrowed(eights, bits)[: len(goal)]
    return found


def _narrowed(eights: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Eight codes of ``bits`` bits in eight bytes [n, 8], moved together into ``bits`` bytes: [n · bits]."""
    words = eights.view("<u8").reshape(-1)
    for width in (8, 16, 32):  # neighbours move together, then pairs, then fours
        some = width * bits // 8
        if bits > 4:  # what moves would run into what stays
            moved = (words >> np.uint64(width - some)) & (_lanes(some, 2 * width) << np.uint64(some))
            words &= _lanes(some, 2 * width)
            words |= moved
        else:
            words |= words >> np.uint64(width - some)
            words &= _lanes(2 * some, 2 * width)
    return _first(eights, bits).reshape(-1).copy().view(np.uint8).reshape(-1)


def _first(eights: NDArray[np.uint8], bits: int) -> NDArray[Any]:
    """The first ``bits`` bytes of every eight [n, 8]: [n] as one integer each where there is one so wide, [n, bits]."""
    return eights.view(f"<u{bits}")[:, 0] if bits in (1, 2, 4) else eights[:, :bits]


def _lanes(bits: int, width: int) -> np.uint64:
    """A word whose every ``width`` bits begin with ``bits`` ones."""
    return np.uint64(sum((2**bits - 1) << at for at in range(0, 64, width)))


def unpacked(values: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16] | NDArray[np.uint8]:
    """The inverse of :func:`packed`: unsigned integers [count].

    Raises:
        ConfigurationError: there are not as many bytes as ``count`` codes take.
    """
    if values.dtype != np.uint8 or values.shape != (-(-count * bits // 8),):
        raise ConfigurationError(
            f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes; there are {values.dtype}{values.shape}"
        )
    if bits in (8, 16):
        return values.view("<u1" if bits == 8 else "<u2")
    if bits > 8:
        digits = np.unpackbits(values, bitorder="little")[: count * bits].reshape(count, bits)
        found: NDArray[np.uint16] = digits.astype(np.uint16) @ (1 << np.arange(bits)).astype(np.uint16)
        return found
    wide = np.empty(count, np.uint8)
    for place in blocks(count):
        wide[place] = _widened(values[place.start * bits // 8 : -(-place.stop * bits // 8)], bits)[
            : place.stop - place.start
        ]
    return wide


def _widened(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of :func:`_narrowed`: codes [8 · ⌈n / bits⌉] of bytes [n]."""
    whole = len(values) // bits
    eights = np.zeros((-(-len(values) // bits), 8), np.uint8)
    goal = _first(eights[:whole], bits)
    goal[...] = values[: whole * bits].view(goal.dtype).reshape(goal.shape)
    eights[whole:, : len(values) - whole * bits] = values[whole * bits :]  # a last one that is not full
    words = eights.view("<u8").reshape(-1)
    for width in (32, 16, 8):
        some = width * bits // 8
        if bits > 4:
            moved = (words & (_lanes(some, 2 * width) << np.uint64(some))) << np.uint64(width - some)
            words &= _lanes(some, 2 * width)
            words |= moved
        else:
            words |= words << np.uint64(width - some)
            words &= _lanes(some, width)
    return eights.reshape(-1)
