"""Euclidean norms of updates: fast, and the same for any number of threads, which BLAS's own are not.

Most often all that matters is on which side of a bound a norm lies, or a norm to a few digits. Then float32 is squared
and added up as it is, half of the work of float64, in columns of at most 64 additions each, whose rounding errors have
a bound whatever the order (Higham 2002, "Accuracy and stability of numerical algorithms", section 4.2); float64 decides
what is too close for that.

Not here: clipping (``core/stage.py``, ``privacy/mechanisms.py``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foedus.tree import Vector

BLOCK = 1 << 16  # entries that pass through all steps before the next: they stay in the processor's cache
CLOSE = 2.0**-17  # by so much of itself `about` may be wrong: nearly twice (1 + 2⁻²⁴)⁶⁶ − 1
_COLUMNS = 1 << 10  # sums that run side by side, each of BLOCK / 1024 entries at most
_FAINT = 2.0**-60  # squares of entries above it are far from where float32 loses digits


def squared(vector: Vector) -> float:
    """The squared norm in float64, not finite if an entry is not.

    Example:
        >>> squared(np.array([3.0, 4.0], "f4"))
        25.0
    """
    scratch, parts = np.empty(min(BLOCK, len(vector))), []
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(vector), BLOCK):
            block = vector[at : at + BLOCK]
            wide = scratch[: len(block)]
            np.copyto(wide, block)
            parts.append(float(np.square(wide, out=wide).sum()))
        return float(np.sum(parts)) if not all(map(math.isfinite, parts)) else math.fsum(parts)


def about(vector: Vector) -> float:
    """The squared norm, wrong by ``CLOSE`` of itself at most; not finite if an entry is not.

    Example:
        >>> about(np.array([3.0, 4.0], "f4"))
        25.0
    """
    if vector.dtype != np.float32:
        return squared(vector)
    scratch = np.empty(min(BLOCK, len(vector)), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        parts = [of_block(vector[at : at + BLOCK], scratch) for at in range(0, len(vector), BLOCK)]
        found = float(np.sum(parts))
    ordinary = math.isfinite(found) and found > len(vector) * (_FAINT / CLOSE) ** 2
    return found if ordinary else squared(vector)


def of_block(block: NDArray[np.floating], scratch: NDArray[np.floating]) -> float:
    """The sum of the squares of at most ``BLOCK`` entries, in their own precision: as :func:`about`.

    Args:
        block: of float32 or float64, far from overflow.
        scratch: room for as many, of the same dtype; overwritten.
    """
    squares = np.square(block, out=scratch[: len(block)])
    whole = len(block) - len(block) % _COLUMNS
    columns = np.add.reduce(squares[:whole].reshape(-1, _COLUMNS), 0)
    return float(np.add.reduce(columns, dtype=np.float64)) + float(np.add.reduce(squares[whole:], dtype=np.float64))


def within(vector: Vector, norm: float) -> bool:
    """Whether a vector is at most so long; ``False`` if an entry is not finite.

    Example:
        >>> within(np.array([3.0, 4.0], "f4"), 5.0), within(np.array([3.0, 4.0], "f4"), 4.999999)
        (True, False)
    """
    found, most = about(vector), norm**2
    if found <= most * (1 - 2 * CLOSE):
        return True
    return abs(found - most) <= 2 * CLOSE * most and squared(vector) <= most
