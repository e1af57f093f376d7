"""The aggregator whose messages are added up under masks: the server learns the sum, and nothing of any one client.

A message holds whole numbers, added modulo a power of two. That is associative and commutative to the bit, and so a
masked sum is a merge like any other: what ``merge`` adds up in the plain, ``foedus.protocol.secagg`` adds up with masks
that cancel, and both give the same numbers. In a simulation nobody has to be kept from looking, so that by default the
numbers are added as they are and the protocol's bytes are counted; ``Settings(cryptography=True)`` runs it all.

Sources: Bonawitz et al. 2017 ("Practical secure aggregation for privacy-preserving machine learning"); Bell et al. 2020
("Secure single-server aggregation with (poly)logarithmic overhead").

Not here: the protocol (``foedus.protocol.secagg``), what it withstands (``secure/graph.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, Masking, Shortcut
from foedus.core.checks import check_number, check_whole
from foedus.core.coding import part
from foedus.core.values import Context, Message, State, Update
from foedus.errors import (
    ConfigurationError,
    IncompatibleStages,
    NoGuarantee,
    SecureAggregationFailed,
    SumOverflow,
)
from foedus.secure.fixed_point import Grid, centred, check_integers, weighted, whole_weight, width, wrapped
from foedus.secure.graph import Withstand
from foedus.secure.planes import packed, packed_bytes, unpacked, word
from foedus.secure.traffic import overhead
from foedus.tree import Vector


def masked(
    withstand: Withstand, *, bits: int = 16, bound: float = 1.0, most: int | None = None, least: int | None = None,
    planned: float | None = None,
) -> Aggregator:  # fmt: skip
    """The mean of updates of which the server sees only the sum, under masks that cancel.

    What stands before it in a chain must add up: ``chain(clip(1.0), rotate(), masked(...))``. Behind a quantiser with a
    common scale, the quantiser's codes are added as they are, and ``bits`` and ``bound`` are its own.

    Args:
        withstand: how many clients there are, how many may collude with the server, how many may be lost.
        bits: an entry is rounded, unbiased, to so many bits.
        bound: entries are cut to ±bound; ``clip(1.0)`` before it makes sure that none is beyond 1.
        most: weigh by the number of examples, of which at most so many count, rounded to whole ones; ``None``: all
            count the same. Nobody sees single weights either.
        least: fewest clients in a sum; by default half of those asked, and two more than may collude.
        planned: divide the sum by so many, however many came, as shares of noise need it; by default by the weight of
            those who came.

    Raises:
        ConfigurationError: a sum could wrap around.
        NoGuarantee: nothing withstands this, or too small a sum would be shown.

    Example:
        >>> from foedus.core.aggregate import fold
        >>> rule = masked(Withstand(clients=4, corrupt=0.0), bits=20, bound=8.0, least=3)
        >>> contexts = [Context(seed=0, round=1, client=i, size=2) for i in range(3)]
        >>> sent = [rule.encode(Update(np.array([i, -4.0]), 1.0), c) for i, c in enumerate(contexts)]
        >>> total = fold(rule, [rule.admit(m, c) for m, c in zip(sent, contexts)])
        >>> rule.decode({}, total, contexts[0])[0].round(4).tolist()
        [1.0, -4.0]
    """
    if not isinstance(withstand, Withstand):
        raise ConfigurationError(
            f"masked() is told what to withstand, e.g. masked(Withstand(clients=100, corrupt=0.1, dropouts=0.1)); not "
            f"{withstand!r}"
        )
    check_whole("bits", bits, least=2, most=24)
    check_number("bound", bound, above=True)
    if most is not None:
        check_whole("most", most, also=", or None")
    if planned is not None:
        check_number("planned", planned, above=True, also=", or None")
    floor = _floor(withstand, least)
    told = [withstand.label, f"bits={bits}", f"bound={bound}"]
    given = {"most": most, "least": least, "planned": planned}
    told += [f"{name}={value}" for name, value in given.items() if value is not None]
    return _Sum(withstand, f"masked({', '.join(told)})", floor, most, planned, Grid(bits, float(bound))).aggregator()


def _floor(withstand: Withstand, least: int | None) -> int:
    """Fewest summands."""
    needed = withstand.corrupted + 2
    if least is None:
        return max(needed, math.ceil(withstand.clients / 2))
    check_whole("least", least, most=withstand.clients, also=", or None")
    if least < needed:
        raise NoGuarantee(
            f"a sum of {least} clients, {withstand.corrupted} of which may collude, would show a single one. Write "
            f"least={needed}, or more"
        )
    return int(least)


class _Sum(NamedTuple):
    """A masked sum: of real numbers on a grid, of codes of some bits, or of whole numbers modulo 2^whole."""

    withstand: Withstand
    label: str
    least: int
    most: int | None
    planned: float | None
    grid: Grid
    codes: int | None = None
    whole: int | None = None

    @property
    def width(self) -> int:
        """Bits of a number of the sum."""
        if self.whole is not None:
            return self.whole
        return width(self.withstand.clients, self.codes or self.grid.bits, self.most or 1)

    def aggregator(self) -> Aggregator:
        bits = self.width
        masking = Masking(
            of_codes=self._of_codes, of_whole=self._of_whole,
            entries=self.entries, width=bits, least=self.least, withstand=self.withstand,
            overhead=overhead(self.withstand), check=self.check, planned=self.planned,
        )  # fmt: skip
        encode, merge = self.encode, self.merge  # one object each: a shortcut knows by it what it stands for
        return Aggregator(
            init=lambda layout: {}, encode=encode, admit=self.admit, merge=merge, decode=self.decode, additive=True,
            label=self.label, masking=masking, encode_all=Shortcut(encode, merge, self.encode_all),
        )  # fmt: skip

    def _of_codes(self, bits: int) -> Aggregator:
        if self.planned is not None:
            raise IncompatibleStages(
                f"{self.label} divides by a planned number, and codes count from the lowest level, not from 0. Leave "
                "out the quantiser: masked(bits=...) rounds by itself"
            )
        return self._replace(codes=bits).aggregator()

    def _of_whole(self, bits: int) -> Aggregator:
        if self.most is not None:
            raise IncompatibleStages(
                f"{self.label} would multiply whole numbers, and the noise in them, by weights. Leave out most="
            )
        return self._replace(whole=bits).aggregator()

    def entries(self, size: int) -> int:
        """Numbers in a message: where weights count, theirs is the last."""
        return size if self.most is None else size + 1

    # --- on the client

    def encode(self, update: Update, context: Context) -> Message:
        return {"values": packed(self.numbers(update, context), self.width)}

    def numbers(self, update: Update, context: Context) -> NDArray[Any]:
        """What is added up."""
        if self.whole is not None:
            check_integers(update.vector)
            return wrapped(update.vector.view(np.int64), self.whole)
        codes = update.vector if self.codes is not None else self.grid.codes(update, context)
        if self.most is None:
            return weighted(codes, 1, self.width)
        weight = whole_weight(update, self.most, context)
        return np.append(weighted(codes, weight, self.width), word(self.width).type(weight))

    def encode_all(self, updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        """The sum of many messages, without packing each."""
        total: Message | None = None
        for update, context in zip(updates, contexts, strict=True):
            message = {"sum": self.numbers(update, context), "count": np.ones(1, np.int64)}
            total = message if total is None else self.merge(total, message)
        assert total is not None
        return total

    # --- anywhere

    def admit(self, message: Message, context: Context) -> Message:
        count = self.entries(context.size)
        values = part(message, "values", context, dtype="uint8", shape=(packed_bytes(count, self.width),))
        return {"sum": unpacked(values, self.width, count), "count": np.ones(1, np.int64)}

    def merge(self, a: Message, b: Message) -> Message:
        total, other = a["sum"], b["sum"]
        if total.shape != other.shape:
            raise ConfigurationError(f"messages of {len(other)} and {len(total)} numbers do not add up")
        count = int(a["count"][0] + b["count"][0])
        if count > self.withstand.clients:
            raise SumOverflow(
                f"{count} messages are to be added up, and {self.label} has room for {self.withstand.clients}: sums "
                f"could wrap around. Write Withstand(clients={count}, ...), or more"
            )
        total += other
        if self.width < 8 * total.dtype.itemsize:
            total &= total.dtype.type(2**self.width - 1)
        a["count"] += b["count"]
        return a

    # --- on the server

    def check(self, message: Message) -> None:
        """Refuse what cannot be a sum of clients' messages.

        Numbers wrap around, and masks hide whose they were: one client that lies can make any sum of a sum. What it
        cannot have is a mean beyond the bound, or a weight that so many clients cannot have.

        Raises:
            SecureAggregationFailed: says which.
        """
        total, count = message["sum"], int(message["count"][0])
        if count < self.least:
            raise SecureAggregationFailed(
                f"{count} clients have sent something, and {self.label} shows no sum of fewer than {self.least}"
            )
        if self.whole is not None:
            return
        weight = count if self.most is None else int(total[-1])
        if not count <= weight <= count * (self.most or 1):
            raise SecureAggregationFailed(
                f"{count} clients in a sum say that they weigh {weight} together, and each weighs from 1 to "
                f"{self.most}: at least one of them lies. Nothing of the sum is used"
            )
        highest = max(int(total[: len(total) - (self.most is not None)].max(initial=0)), 0)
        if highest > weight * self._top:
            raise SecureAggregationFailed(
                f"a number of the sum of {count} clients is {highest}, and they reach {weight * self._top} together: "
                "at least one of them lies. Nothing of the sum is used"
            )

    @property
    def _top(self) -> int:
        """The highest code of a client."""
        return 2 * self.grid.half if self.codes is None else 2**self.codes - 1

    def decode(self, state: State, message: Message, _: Context) -> tuple[Vector, State]:
        self.check(message)
        total, count = message["sum"], int(message["count"][0])
        if self.whole is not None:
            return centred(total, self.width) / (self.planned or count), state
        if self.most is not None:
            total, count = total[:-1], int(total[-1])
        means = total / np.float64(count)
        found = means if self.codes is not None else self.grid.values(means)
        return found if self.planned is None else found * (count / self.planned), state
