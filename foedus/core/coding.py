"""What the compressing stages share: randomness of a context, and checks of what goes out and what comes in.

The sender's numbers are checked with :func:`peak` (nothing that is not finite is ever made to look finite), and
whatever arrives with :func:`part` and :func:`reals`: a message may have been written by anybody.

Not here: the stages themselves (``core/rotation.py``, ``sparse.py``, ``quantise.py``, ``layers.py``, ``entropy.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.random import key
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, Reason, SumOverflow, UpdateRefused

BLOCK = 1 << 16  # entries that pass through all steps of a stage before the next: they stay in the processor's cache


def blocks(size: int) -> Iterator[slice]:
    """The places 0 … size − 1 in parts that fit the cache; all but the last a multiple of 8 long."""
    return (slice(at, min(at + BLOCK, size)) for at in range(0, size, BLOCK))


def draws(context: Context, purpose: str, *, own: bool) -> np.random.Generator:
    """The generator of a stage: the same for all clients of a round, or this client's ``own``.

    The length of the vector is part of its key, so that a stage which stands twice in a chain draws anew.
    """
    who = context.client if own else "all"
    path = (purpose, context.round, context.channel, context.size, who)
    return np.random.Generator(np.random.SFC64(key(context.seed, *path)))  # twice as fast as Philox


def words(draw: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Random bytes [count], the same on every machine; four times as fast as numpy's own.

    They are the generator's raw words. ``random_raw`` gives the same, but keeps other threads waiting meanwhile.
    """
    raw = draw.integers(0, 2**64 - 1, -(-count // 8), np.uint64, endpoint=True)
    return np.asarray(raw).astype("<u8", copy=False).view(np.uint8)[:count]


def dither(draw: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Numbers in (0, 1), float32 [count], of 16 random bits: what stochastic rounding adds before it cuts off.

    It is therefore unbiased to 2⁻¹⁷ of a step.
    """
    found: NDArray[np.float32] = np.multiply(words(draw, 2 * count).view("<u2"), np.float32(2.0**-16), dtype=np.float32)
    found += np.float32(2.0**-17)
    return found


def peak(update: Update) -> float:
    """The largest magnitude among the entries; 0 if there are none.

    Raises:
        SumOverflow: one is not finite.
    """
    vector = update.vector
    found = max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0)))
    if not math.isfinite(found):
        raise SumOverflow("an update that is not finite cannot be compressed")
    return found


def check_finite(update: Update) -> None:
    """What :func:`peak` checks, where nobody needs to know the peak: a product is the fastest way.

    Raises:
        SumOverflow: an entry is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        told = math.isfinite(float(update.vector @ update.vector))
    if not told:  # or so large that their squares are not
        peak(update)


def square(vector: NDArray[Any]) -> float:
    """The squared Euclidean norm, summed in blocks so that float32 loses no digits over millions of entries."""
    return product(vector, vector)


def product(a: NDArray[Any], b: NDArray[Any]) -> float:
    """⟨a, b⟩, summed in blocks."""
    return math.fsum(float(np.dot(a[p], b[p])) for p in blocks(len(a)))


def part(
    beside: Mapping[str, NDArray[Any]], name: str, context: Context, *, dtype: str, shape: tuple[int, ...]
) -> NDArray[Any]:
    """What came beside a vector under a name, once it is what it must be.

    Raises:
        UpdateRefused: it is missing, of another shape or dtype, or not finite.
    """
    array = beside.get(name)
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise refused(f"sent {_shown(array)} as {name!r}, which must be {dtype}{list(shape)}", context)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise refused(f"sent numbers that are not finite as {name!r}", context, Reason.NOT_FINITE)
    return array


def refused(what: str, context: Context, reason: Reason = Reason.SHAPE) -> UpdateRefused:
    """The error that says what a client did."""
    return UpdateRefused(f"client {context.client} {what}", client=context.client, reason=reason)


def _shown(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "nothing"


def reals(update: Update, context: Context, size: int) -> NDArray[Any]:
    """The vector of an update that arrived: ``size`` finite floating-point numbers.

    Raises:
        UpdateRefused: it is something else.
    """
    vector = update.vector
    if vector.shape != (size,) or vector.dtype not in (np.float32, np.float64):
        raise refused(f"sent {_shown(vector)} where {size} floating-point numbers are expected", context)
    if not np.isfinite(vector).all():
        raise refused("sent numbers that are not finite", context, Reason.NOT_FINITE)
    return vector


def codes(update: Update, context: Context, levels: int) -> NDArray[Any]:
    """The codes that arrived, [context.size], whole numbers from 0 to ``levels`` − 1; or means of them.

    Raises:
        UpdateRefused: it is something else.
    """
    vector = update.vector
    if vector.shape != (context.size,) or vector.dtype.kind not in "uf":
        raise refused(f"sent {_shown(vector)} where {context.size} codes are expected", context)
    if len(vector) and not (0 <= vector.min() and vector.max() <= (levels - 1) * (1 + 1e-9)):
        raise refused(f"sent codes beyond 0 … {levels - 1}", context, Reason.RANGE)
    return vector


def check_share(share: Any) -> None:
    """Refuse what is no share: a number above 0 and at most 1.

    Raises:
        ConfigurationError: it is something else.
    """
    if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 < share <= 1:
        raise ConfigurationError(f"share must be a number above 0 and at most 1; not {share!r}")
