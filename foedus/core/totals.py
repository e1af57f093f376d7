"""Sums of updates that are whole multiples of a grid: whole steps are added as floats, exactly, and become limbs once.

What is clipped and noised for privacy lies on a grid (``privacy/mechanisms.py``). As long as all steps together stay
within the whole numbers that a float holds, adding them rounds nothing, whatever the order: one addition for an entry
instead of the splitting into limbs that arbitrary floats need. The result has the bits of merging messages one by one.

Not here: sums of anything else (``core/aggregate.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import HIGH_BITS, WEIGHT_BITS, bound_of, check_sum
from foedus.core.values import Context, Message, Update
from foedus.errors import ConfigurationError
from foedus.tree import Vector

EXACT = 2.0**52  # whole numbers below it are exact in float64


class Grid(NamedTuple):
    """What a stage says of itself that gives whole multiples of a step, with the weight 1.

    * ``step(n)``: for updates of n entries; a power of two.
    * ``reach(n)``: how many steps an entry has at most.
    * ``steps(update, context, room)``: what ``encode`` gives, in steps [entry], as float32 or float64; written into
      ``room``, if that fits.
    """

    step: Callable[[int], float]
    reach: Callable[[int], float]
    steps: Callable[[Update, Context, NDArray[Any] | None], NDArray[Any]]

    def total(self, updates: Sequence[Update], contexts: Sequence[Context]) -> Message | None:
        """The merged messages of updates whose mean is to be taken; ``None`` where they have to be merged one by one.

        Example:
            >>> halves = Grid(lambda n: 0.5, lambda n: 100.0, lambda update, context, room: 2 * update.vector)
            >>> updates = [Update(np.array(v), 1.0) for v in ([0.5, 1.0], [3.0, -1.0])]
            >>> (halves.total(updates, [Context(0, 1, 0)] * 2)["high"] / 2**20).tolist()
            [3.5, 0.0]
        """
        size = len(updates[0].vector)
        total = Total(self.step(size), self.reach(size), [u.vector for u in updates])
        if not total.exact:
            return None
        for update, context in zip(updates, contexts, strict=True):
            total.add(self.steps(update, context, total.room))
        return total.message()


class Total:
    """A sum under way: one update after the other through the same memory, since pages that are fresh for every client
    cost more than the sums.

    Args:
        step: a power of two.
        reach: how many steps an entry of one update has at most.
        vectors: of the updates, before they are put on the grid.
        beside: how many more numbers come with each of them.
    """

    def __init__(self, step: float, reach: float, vectors: Sequence[Vector], *, beside: int = 0) -> None:
        most = len(vectors) * reach
        self._step, self._size = step, len(vectors[0])
        self._steps = np.zeros(self._size + beside, whole_dtype(vectors[0], most))
        self._peaks: list[float] = []
        self.room = np.empty_like(vectors[0])
        # Otherwise steps are no whole units of the high limb, or too many: each update is split by itself.
        self.exact = 1 <= step * 2.0**HIGH_BITS < 2.0**40 and most < EXACT

    def add(self, steps: NDArray[Any], *beside: float) -> None:
        """One update's steps [entry], and what comes with them, in its own units.

        Raises:
            ConfigurationError: there are more or fewer than for others.
        """
        if steps.shape != (self._size,):
            raise ConfigurationError(f"updates of {len(steps)} and {self._size} entries do not add up")
        self._steps[: self._size] += steps
        self._steps[self._size :] += np.array(beside) / self._step
        self._peaks.append(max(peak(steps) * self._step, *map(abs, beside), 0.0))

    def message(self) -> Message:
        """The sum, as merging gives it."""
        return summed(self._steps, self._step, self._peaks)


def summed(steps: NDArray[Any], step: float, peaks: Sequence[float]) -> Message:
    """What merging updates of weight 1 gives, from their sum.

    Args:
        steps: the sum [parameter] in steps, whole numbers.
        step: their size, a power of two and at least 2⁻²⁰.
        peaks: the largest magnitude in each update.

    Raises:
        SumOverflow: the sum could leave the range.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> m, c = mean(weighted=False), Context(seed=0, round=1, client=0)
        >>> parts = [m.encode(Update(np.array([x, 1.0]), 1), c) for x in (0.5, 3.0)]
        >>> one, other = summed(np.array([7.0, 4.0]), 0.5, [1.0, 3.0]), m.merge(*parts)
        >>> all((one[name] == other[name]).all() for name in other)
        True
    """
    count, weight = len(peaks), len(peaks) << WEIGHT_BITS
    bound = math.fsum(bound_of(peak) for peak in peaks)
    check_sum(bound, count, weight)
    high = steps.astype(np.int64)
    high *= int(step * 2.0**HIGH_BITS)
    own = {"weight": np.array([weight]), "count": np.array([count]), "bound": np.array([bound])}
    return {"high": high, "low": np.zeros(len(steps), np.int64), **own}


def peak(vector: NDArray[Any]) -> float:
    """The largest magnitude.

    Example:
        >>> peak(np.array([1.0, -3.0]))
        3.0
    """
    return max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0)))


def whole_dtype(vector: Vector, most: float) -> np.dtype[Any]:
    """float32, if it is the vector's own and holds whole numbers up to ``most``; otherwise float64.

    Example:
        >>> whole_dtype(np.zeros(1, np.float32), 1e6), whole_dtype(np.zeros(1, np.float32), 1e8)
        (dtype('float32'), dtype('float64'))
    """
    return np.dtype(np.float32 if vector.dtype == np.float32 and most < 2.0**24 else np.float64)
