"""Updates as whole numbers of a few bits that add up without ever wrapping around.

An entry is clipped to ±bound and rounded at random to one of the 2^bits − 1 evenly spaced levels beside it, 0 among
them; unbiased. It is sent as the level's number, 0 … 2^bits − 2, times the client's weight. Numbers are added modulo
2^width, and the width is found when an algorithm is built: clients · (2^bits − 1) · largest weight < 2^width.

Not here: bits on the wire (``secure/planes.py``), masks (``foedus.protocol.secagg``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import blocks, dither, draws, peak, refused
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, Reason, SumOverflow
from foedus.secure.planes import word

if TYPE_CHECKING:
    from jaxtyping import Float64

WIDEST = 64  # bits that a sum may take


def width(clients: int, bits: int, most: int) -> int:
    """Bits of the sum of so many numbers of ``bits`` bits, each times at most ``most``.

    Raises:
        ConfigurationError: more than there are; the sum would wrap around.

    Example:
        >>> width(1024, 16, 1), width(100, 16, 1000)
        (26, 33)
    """
    found: int = (clients * (2**bits - 1) * most).bit_length()
    if found > WIDEST:
        raise ConfigurationError(
            f"{clients} clients with {bits} bits an entry and weights up to {most} add up to {found} bits, and sums "
            f"have {WIDEST}: they could wrap around. Write fewer bits, or a smaller most="
        )
    return found


class Grid(NamedTuple):
    """Levels for entries from −bound to bound."""

    bits: int
    bound: float

    @property
    def half(self) -> int:
        """The number of the level of 0."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def step(self) -> float:
        """The distance of two levels."""
        return self.bound / self.half

    def codes(self, update: Update, context: Context) -> NDArray[np.uint32]:
        """The levels' numbers, uint32 [entry].

        Raises:
            SumOverflow: an entry is not finite.

        Example:
            >>> Grid(3, 3.0).codes(Update(np.array([-9.0, 0, 2, 3]), 1.0), Context(0, 1, 0)).tolist()
            [0, 3, 5, 6]
        """
        peak(update)
        vector, half = update.vector, self.half
        draw = draws(context._replace(size=len(vector)), "masked", own=True)
        found = np.empty(len(vector), np.uint32)
        for place in blocks(len(vector)):
            steps = vector[place] * np.float64(1 / self.step)
            np.clip(steps, -half, half, out=steps)
            steps += half
            steps += dither(draw, len(steps))
            np.copyto(found[place], steps, casting="unsafe")  # cuts off
        return found

    def values(self, means: Float64[NDArray[np.float64], " entry"]) -> NDArray[np.float64]:
        """The entries that means of levels' numbers stand for, float64."""
        return (means - self.half) * self.step


def weighted(codes: NDArray[Any], weight: int, bits: int) -> NDArray[Any]:
    """Codes times a weight, as integers of the :func:`~foedus.secure.planes.word` that holds ``bits``."""
    found: NDArray[Any] = codes.astype(word(bits))
    if weight != 1:
        found *= found.dtype.type(weight)
    return found


def whole_weight(update: Update, most: int, context: Context) -> int:
    """A client's weight as the whole number from 1 to ``most`` that is nearest.

    Raises:
        UpdateRefused: it is no finite number above 0.
    """
    weight = float(update.weight)
    if not (math.isfinite(weight) and weight > 0):
        raise refused(f"has the weight {weight}, and weights are numbers above 0", context, Reason.WEIGHT)
    return int(min(max(round(weight), 1), most))


def wrapped(whole: NDArray[np.int64], bits: int) -> NDArray[Any]:
    """Whole numbers of either sign modulo 2^bits."""
    kind = word(bits)
    found: NDArray[Any] = whole.astype(np.int64, copy=False).view(np.uint64).astype(kind)
    return found if bits == 8 * kind.itemsize else found & kind.type(2**bits - 1)


def centred(total: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """The inverse of :func:`wrapped`: the numbers from −2^(bits − 1) to 2^(bits − 1) − 1.

    Example:
        >>> centred(wrapped(np.array([-5, 7]), 10), 10).tolist()
        [-5, 7]
    """
    away = 64 - bits
    found: NDArray[np.int64] = (total.astype(np.uint64) << np.uint64(away)).view(np.int64) >> np.int64(away)
    return found


def check_integers(whole: NDArray[Any]) -> None:
    """Refuse what are no whole numbers.

    Raises:
        SumOverflow: they are of another dtype.
    """
    if whole.dtype != np.int64:
        raise SumOverflow(f"whole numbers are int64, and a stage gave {whole.dtype}")
