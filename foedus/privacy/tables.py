"""Laws of noise that a table of single numbers holds: discrete Gaussians that are not wide, and Skellam's.

What the slots of :class:`~foedus.privacy.slots.Slots` leave is drawn by a table of its distribution function in 127
bits, cut off where what lies beyond has a probability under 10⁻³⁷ (13 standard deviations of a Gaussian): looked up
with 31 bits and, where these do not decide (about once in 10⁵ draws), 96 more.

Not here: wider Gaussians (``blocks.py``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.privacy.slots import SLOTS, Slots, Wanted

WIDEST = 1024.0  # the largest standard deviation whose numbers have slots of their own
TAIL = 13  # standard deviations, beyond which nothing is drawn
_FAR = 87.0  # e⁻⁸⁷ < 10⁻³⁷
_BITS = 127  # of the table's thresholds
_FIRST = 31  # of these in the first word, whose last bit is the sign
_REST = _BITS - _FIRST
_GUARD = 64  # bits more while the table is made
_GUIDE = 16  # first bits by which a place in the table is found


class Table(NamedTuple):
    """Thresholds P(|x| ≤ n) · 2¹²⁷ for n = 0, 1, ...: whole numbers; the first 31 of their 127 bits [n + 1], with one
    above all words at the end; and where to begin to look, by a word's first 16 bits [65536]."""

    thresholds: tuple[int, ...]
    first: NDArray[np.uint32]
    guide: NDArray[np.int64]

    def below(self, words: NDArray[np.uint32]) -> NDArray[np.int64]:
        """How many thresholds are at most each word [draw]; many times as fast as a binary search."""
        found: NDArray[np.int64] = self.guide.take(words >> np.uint32(_FIRST - _GUIDE))
        ahead = self.first.take(found) <= words
        found += ahead
        places = np.flatnonzero(ahead)
        places = places[self.first.take(found[places]) <= words[places]]
        if len(places):  # the few whose first bits are those of several thresholds
            found[places] = np.searchsorted(self.first, words[places], side="right")
        return found

    def find(self, first: int, rest: int) -> int:
        """The magnitude that 31 and 96 random bits stand for."""
        return bisect_right(self.thresholds, (first << _REST) | rest)

    def draws(self, wanted: Wanted, count: int) -> NDArray[np.int64]:
        """So many draws [draw], two from a word: 31 of 32 bits find the magnitude, the last one is the sign."""
        if not count:
            return np.empty(0, np.int64)
        words = wanted.words(-(-count // 2), "/rest").view("<u4")[:count]
        first = words >> np.uint32(1)
        found = self.below(first)
        undecided = np.flatnonzero((found > 0) & (self.first.take(found - 1) == first))
        if len(undecided):  # the first 31 bits are those of a threshold
            more = wanted.words(2 * len(undecided), "/second").reshape(-1, 2).tolist()
            for i, (a, b) in zip(undecided.tolist(), more, strict=True):
                found[i] = self.find(int(first[i]), (a << 64 | b) >> 128 - _REST)
        sign = -(words & np.uint32(1)).astype(np.int64)  # 0 or −1: (x ^ sign) − sign is x or −x
        return (found ^ sign) - sign


@lru_cache(maxsize=64)
def gaussian(sigma: float) -> Slots:
    """The law of a discrete Gaussian of standard deviation up to ``WIDEST``."""
    one = 1 << (_BITS + _GUARD)
    with localcontext() as exact:
        exact.prec = 80
        step = int((Decimal(-1) / (2 * Decimal(sigma) ** 2)).exp() * one)  # exp(−1 / 2σ²)
        square = int((Decimal(-1) / Decimal(sigma) ** 2).exp() * one)
    masses, mass = [one], one
    for _ in range(math.ceil(TAIL * sigma)):  # exp(−n² / 2σ²) by exp(−(2n − 1) / 2σ²), which falls by a square each
        mass = mass * step // one
        step = step * square // one
        masses.append(mass)
    return _slots(masses)


@lru_cache(maxsize=64)
def skellam(variance: float) -> Slots:
    """The law of a Skellam number: P(n) ∝ Iₙ(variance), the modified Bessel functions, by their recurrence
    Iₙ₋₁ = Iₙ₊₁ + (2n / variance) Iₙ, which all terms being positive is stable downwards (Miller's algorithm)."""
    last = _reach(variance)
    top, bottom = variance.as_integer_ratio()
    masses, above, here = [], 0, 1 << _GUARD
    for n in range(2 * last + 64, 0, -1):  # from so far out that where it begins no longer matters
        above, here = here, above + 2 * n * bottom * here // top
        if n <= last + 1:
            masses.append(here)
        if here.bit_length() > 4096:
            scale = here.bit_length() - 1024
            above, here, masses = above >> scale, here >> scale, [m >> scale for m in masses]
    return _slots(masses[::-1])


def _reach(variance: float) -> int:
    """A number that a Skellam number exceeds with a probability under 10⁻³⁷, by Chernoff's bound."""
    far = math.ceil(TAIL * math.sqrt(variance))
    while far * math.asinh(far / variance) - (math.hypot(far, variance) - variance) < _FAR:
        far += math.ceil(math.sqrt(variance)) + 1
    return far


def _slots(masses: list[int]) -> Slots:
    """From what the magnitudes 0, 1, 2, ... of a symmetric distribution are worth, on one side."""
    total = masses[0] + 2 * sum(masses[1:])
    shares = [divmod(mass * SLOTS, total) for mass in masses]
    slots = np.array([whole for whole, _ in shares])
    both = np.stack([slots, slots], 1).ravel()[1:]  # 0, 1, −1, 2, −2, ...
    numbers = np.arange(1, len(both) + 1) // 2 * np.where(np.arange(len(both)) % 2, 1, -1)
    values, decided = np.zeros(SLOTS, np.int64), int(both.sum())
    values[:decided] = np.repeat(numbers, both)
    return Slots(values, decided, 0, _tabled([left for _, left in shares]))


def _tabled(masses: list[int]) -> Table:
    """The table of the magnitudes of a symmetric distribution, from what 0, 1, 2, ... are worth: its thresholds are
    right to the last of 127 bits."""
    masses = [masses[0], *(2 * mass for mass in masses[1:])]
    total, sums = sum(masses), 0
    thresholds = []
    for mass in masses[:-1]:  # what is left over is the last one's
        sums += mass
        thresholds.append((sums << _BITS) // total)
    first = np.array([*(t >> _REST for t in thresholds), 2**32 - 1], np.uint32)
    starts = np.arange(2**_GUIDE, dtype=np.uint32) << np.uint32(_FIRST - _GUIDE)
    return Table(tuple(thresholds), first, np.searchsorted(first, starts, side="right"))
