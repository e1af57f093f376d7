"""Drawing whole numbers by looking up 16 random bits.

Of 2¹⁶ slots of the same probability, every number (or every block of 2^k numbers side by side, which k more bits choose
one from) is given as many as go into its own, so that 16 + k random bits and one look-up are a draw. What is left over,
1 to 5 % of all draws, is drawn again, from exactly the distribution that the slots leave. The two together are the
distribution itself (Marsaglia 1963, "Generating discrete random variables in a computer").

Not here: which number has how many slots, and what they leave (``tables.py``, ``blocks.py``); where words come from
(``noise.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.core.values import Context, Secret

SLOTS = 1 << 16
_AT_ONCE = 1 << 15  # draws: what is needed for them stays in the processor's cache

Words = NDArray[np.uint64]


class Wanted(NamedTuple):
    """What words are wanted for, and where they come from."""

    secret: Secret
    context: Context
    purpose: str
    about: NDArray[Any]

    def words(self, count: int, more: str = "") -> Words:
        """So many random words, for one part of the drawing."""
        return self.secret(self.context, self.purpose + more, self.about, count).astype("<u8", copy=False)


class Rest(Protocol):
    """What slots leave."""

    def draws(self, wanted: Wanted, count: int) -> NDArray[np.int64]:
        """So many draws [draw]."""


@dataclass(frozen=True, eq=False)
class Slots:
    """A distribution over the whole numbers.

    Attributes:
        values: int64 [65536]: the numbers that the first slots stand for, beginning with 0; and 0 for the others.
        decided: how many slots stand for a number.
        bits: of random bits that are added to a slot's number.
        rest: what a draw is distributed like that hits one of the other slots.
    """

    values: NDArray[np.int64]
    decided: int
    bits: int
    rest: Rest
    _typed: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def add_to(self, total: NDArray[Any], wanted: Wanted) -> None:
        """A draw to every entry [entry], in place. All words are drawn before: what they are about may be the total."""
        count, wide = len(total), self._bytes
        begin = -(-count // 4) * 8
        raw = wanted.words(-(-(begin + wide * count) // 8)).view(np.uint8)
        words, low = raw[: 2 * count].view("<u2"), self._low(raw[begin : begin + wide * count])
        places = np.flatnonzero(words >= self.decided)
        rest = self.rest.draws(wanted, len(places))
        if low is not None:
            rest = rest - low[places].astype(np.int64)  # which is added to them, too
        self._add(total, words, low)
        total[places] += rest.astype(total.dtype)

    def _add(self, total: NDArray[Any], words: NDArray[np.uint16], low: NDArray[Any] | None) -> None:
        values, scratch = self._as(total.dtype), np.empty(min(len(total), _AT_ONCE), total.dtype)
        for at in range(0, len(total), _AT_ONCE):
            some = total[at : at + _AT_ONCE]
            # "wrap" only because it needs no check: no word of 16 bits is beyond the table.
            some += values.take(words[at : at + _AT_ONCE], out=scratch[: len(some)], mode="wrap")
            if low is not None:
                some += low[at : at + _AT_ONCE]

    def _as(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The values, as they are added."""
        if dtype.str not in self._typed:
            self._typed[dtype.str] = self.values.astype(dtype)
        return self._typed[dtype.str]

    @property
    def _bytes(self) -> int:
        """Of the smallest integer that holds the low bits."""
        return next(wide for wide in (0, 1, 2, 4, 8) if self.bits <= 8 * wide)

    def _low(self, raw: NDArray[np.uint8]) -> NDArray[Any] | None:
        """The bits that are added to what slots stand for [entry]."""
        if not self.bits:
            return None
        low = raw.view(f"<u{self._bytes}")
        if self.bits < 8 * self._bytes:
            low = low & low.dtype.type((1 << self.bits) - 1)
        return low.view(np.int64) if self._bytes == 8 else low  # numpy adds no unsigned words to signed ones
