"""Wide discrete Gaussians, by blocks of numbers side by side: one look-up, and 24 random bits for most widths.

A slot stands for a block of 2^k numbers, all of the same probability in it, as many as fit *under* the distribution.
That leaves about 1 % of it: what slots round off, and the slope within each block. It is drawn by rejection (von
Neumann 1951, "Various techniques used in connection with random digits"): a block in proportion to a bound of what is
left in it, by slots again, a number of the block, and a random part of the bound that has to lie below what is left at
this number. That is decided in float64 where it is clear by far more than float64 can be wrong, and in 80 digits, with
128 more bits, where it is not; so floating point chooses nothing. What lies beyond 13 standard deviations is never
drawn: it has a probability under 10⁻³⁷.

Not here: narrow ones (``tables.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from foedus.privacy.slots import SLOTS, Slots, Wanted
from foedus.privacy.tables import TAIL

_CLEAR = 1e-6  # far more than float64 is wrong by in what is left at a number, in units of its bound
_PART = 48  # bits of the first word by which the random part of a bound is known
_MORE = 128  # further ones, where these do not decide
_FEWEST, _MOST = 32, 512  # blocks in a standard deviation
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")


@lru_cache(maxsize=64)
def wide_gaussian(sigma: float) -> Slots:
    """The law of a discrete Gaussian of standard deviation 1024 or more.

    Example:
        >>> law = wide_gaussian(40_000.0)
        >>> law.bits, law.decided > 0.97 * 2**16
        (8, True)
    """
    bits = _bits(sigma)
    last = math.ceil(TAIL * sigma / 2**bits)
    blocks = (
        np.arange(2 * last) // 2 * np.where(np.arange(2 * last) % 2, -1, 1) - np.arange(2 * last) % 2
    )  # 0, −1, 1, −2
    near = np.where(blocks < 0, -(blocks + 1), blocks) * 2.0**bits + (blocks < 0)  # the magnitude nearest to 0, ...
    height = SLOTS * 2.0**bits / (sigma * math.sqrt(2 * math.pi))
    # ... in slots, if all numbers of the block were as probable as there, and as at its far end.
    most, least = (height * np.exp(-0.5 * (at / sigma) ** 2) for at in (near, near + 2.0**bits - 1))
    whole = np.maximum(np.floor(least - _CLEAR), 0).astype(np.int64)
    rest = _Left.of(sigma, bits, blocks << bits, most, whole)
    values, decided = np.zeros(SLOTS, np.int64), int(whole.sum())
    values[:decided] = np.repeat(blocks << bits, whole)
    return Slots(values, decided, bits, rest)


def _bits(sigma: float) -> int:
    """Low bits: whole bytes where blocks are then neither too many nor too steep, since these need no masking."""
    for bits in (8, 16, 32):
        if _FEWEST <= sigma / 2**bits <= _MOST:
            return bits
    return math.frexp(sigma)[1] - 7


@dataclass(frozen=True, eq=False)
class _Left:
    """What slots leave of a wide discrete Gaussian.

    Attributes:
        sigma: σ.
        bits: of a block's width.
        starts: int64 [block]: the least number of each.
        whole: int64 [block]: its slots.
        bounds: int64 [block]: how many of 65536 tries are for it; and one more, of tries that are for none.
        block: int64 [65536]: the block of each try.
        scale: tries for a slot's worth of what is left.
    """

    sigma: float
    bits: int
    starts: NDArray[np.int64]
    whole: NDArray[np.int64]
    bounds: NDArray[np.int64]
    block: NDArray[np.int64]
    scale: float

    @staticmethod
    def of(
        sigma: float, bits: int, starts: NDArray[np.int64], most: NDArray[np.float64], whole: NDArray[np.int64]
    ) -> _Left:  # fmt: skip
        """From how many slots each block would have if all its numbers were like its most probable one."""
        left = most - whole

        def bounds(scale: float) -> NDArray[np.int64]:
            found: NDArray[np.int64] = np.ceil(scale * left + 2 * _CLEAR).astype(np.int64)
            return found

        scale = SLOTS / float(left.sum())
        while (found := bounds(scale)).sum() > SLOTS:
            scale *= 0.99
        tries = np.append(found, SLOTS - found.sum())
        return _Left(
            sigma, bits, np.append(starts, 0), np.append(whole, SLOTS), tries,
            np.repeat(np.arange(len(tries)), tries), scale,
        )  # fmt: skip

    def draws(self, wanted: Wanted, count: int) -> NDArray[np.int64]:
        """So many draws [draw]."""
        found, missing, turn = [np.empty(0, np.int64)], count, 0
        share = self.scale * (SLOTS - int(self.whole[:-1].sum())) / SLOTS  # of the tries that are good
        while missing > 0:
            tries = math.ceil((missing + 4 * math.sqrt(missing) + 4) / share)
            good = self._good(wanted, tries, f"/rest {turn}")[:missing]
            found.append(good)
            missing, turn = missing - len(good), turn + 1
        return np.concatenate(found)

    def _good(self, wanted: Wanted, tries: int, part: str) -> NDArray[np.int64]:
        """The numbers of those of so many tries that are good [try]."""
        first, second = wanted.words(2 * tries, part).reshape(2, -1)
        block = self.block.take(first & np.uint64(SLOTS - 1))
        numbers = self.starts.take(block) + (second & np.uint64((1 << self.bits) - 1)).view(np.int64)
        parts, bounds = first >> np.uint64(64 - _PART), self.bounds.take(block)
        above = self._left(numbers, block) - (parts + 0.5) * (bounds * 2.0**-_PART)
        good = above > 0
        unclear = np.flatnonzero(np.abs(above) < _CLEAR)
        if len(unclear):
            more = wanted.words(_MORE // 64 * len(unclear), f"{part} more").reshape(-1, _MORE // 64).tolist()
            for i, words in zip(unclear.tolist(), more, strict=True):
                exactly = (int(parts[i]) << _MORE) + (words[0] << 64) + words[1]
                good[i] = self._below(exactly, int(numbers[i]), int(block[i]))
        return np.asarray(numbers[good])

    def _left(self, numbers: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.float64]:
        """What is left at each number, in the units of the bounds."""
        height = SLOTS * 2.0**self.bits / (self.sigma * math.sqrt(2 * math.pi))
        found = height * np.exp(-0.5 * np.square(numbers / self.sigma))
        return np.asarray(self.scale * (found - self.whole.take(block)))

    def _below(self, part: int, number: int, block: int) -> bool:
        """Whether a part of the bound, of 2¹⁷⁶ parts, lies below what is left at a number."""
        with localcontext() as exact:
            exact.prec = 80
            sigma = Decimal(self.sigma)
            found = (-((Decimal(number) / sigma) ** 2) / 2).exp() * (SLOTS << self.bits) / (sigma * (2 * _PI).sqrt())
            left = Decimal(self.scale) * (found - int(self.whole[block]))
            return Decimal(part) * int(self.bounds[block]) < left * (1 << _PART + _MORE)
