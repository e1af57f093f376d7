"""Random rotations: before a vector is quantised, its energy is spread evenly over all entries.

A rotation by ``H·D``, D random signs and H a Hadamard matrix, makes the entries of any vector look like draws from
one normal distribution, and a few levels then serve all of them. H is applied in O(n log n): as a Kronecker product
of small matrices, each a matrix product over one axis of the vector seen as a block of numbers, so that the work is
done by BLAS at 5 to 6 bits of the index per pass (a butterfly does one).

Hadamard matrices have the order of a power of two, and padding a vector to the next one would send up to twice as
many entries. Here a vector of n entries is seen as m rows of 2^a, 32 < m ≤ 64, which pads by 3 % at most; where m
is no power of two, the matrix across the rows is Hartley's (cos + sin of 2πij/m), which like Hadamard's is
symmetric, orthogonal, and its own inverse.

Sources: Ailon & Chazelle 2009 (random signs before the transform); Konečný et al. 2016 (arXiv 1610.05492, section
3) and Suresh et al. 2017 (rotation before quantisation); Bracewell 1983 (the discrete Hartley transform).

Not here: quantisers (``core/quantise.py``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import blocks, check_finite, draws, reals, words
from foedus.core.stage import Stage
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError
from foedus.tree import Layout

_ROWS = 6  # bits of the index that the first matrix takes
_RADIX = 5  # bits that each of the others takes
_BLOCK = 1 << 17  # entries that pass through all the small matrices before the next: they stay in the cache


def rotate(*, own: bool = False) -> Stage:
    """Rotate an update by random signs and a Hadamard matrix, the same for all clients of a round.

    The server rotates back the mean: the stage is linear and works under secure aggregation. Before
    ``quantise`` it lowers the error by orders of magnitude when entries differ in size.
    Source: Konečný et al. 2016 (arXiv 1610.05492), section 3, "structured random rotations".

    Args:
        own: give each client a rotation of its own, so that the errors of what stands behind it are independent
            between clients. Then every update is rotated back by itself, before the merging.

    Example:
        >>> stage, context = rotate(), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([8.0, 0, 0, 0]), 1.0), context)
        >>> np.abs(sent.vector).tolist()
        [4.0, 4.0, 4.0, 4.0]
        >>> bool(np.abs(stage.decode(sent, context).vector - [8, 0, 0, 0]).max() < 1e-9)
        True
    """

    def encode(update: Update, context: Context) -> Update:
        check_finite(update)
        return update._replace(vector=turned(update.vector, draws(context, "rotate", own=own)))

    def decode(update: Update, context: Context) -> Update:
        vector = reals(update, context, padded(context.size))
        return update._replace(vector=turned_back(vector, draws(context, "rotate", own=own), context.size))

    label = "rotate(own=True)" if own else "rotate()"
    return Stage(encode, decode, label, linear=not own, size=_size, scatters=True)


def _size(n: int, layout: Layout | None) -> int:
    return padded(n)


def turned(vector: NDArray[Any], draw: np.random.Generator, factor: float = 1.0) -> NDArray[Any]:
    """``factor`` · H·D·vector: [parameter] to [padded(parameter)], orthonormal if ``factor`` is 1."""
    spread = np.zeros(padded(len(vector)), vector.dtype)
    _signed(vector, draw, factor, spread)
    return transform(spread)


def turned_back(vector: NDArray[Any], draw: np.random.Generator, size: int) -> NDArray[Any]:
    """The inverse of :func:`turned`: [padded(size)] to [size]."""
    back = transform(vector)[:size]
    _signed(back, draw, 1.0, back)
    return back


def _signed(vector: NDArray[Any], draw: np.random.Generator, factor: float, out: NDArray[Any]) -> None:
    """out = factor · signs · vector, in blocks that stay in the cache."""
    random, wide = words(draw, -(-len(vector) // 8)), vector.dtype.itemsize
    integers = np.dtype(f"u{wide}")
    for place in blocks(len(vector)):
        bits = np.unpackbits(random[place.start // 8 : -(-place.stop // 8)], bitorder="little")
        signs = np.left_shift(bits[: place.stop - place.start], 8 * wide - 1, dtype=integers)  # the bit of the sign
        np.bitwise_xor(vector[place].view(integers), signs, out=out[place].view(integers))
        if factor != 1:
            out[place] *= vector.dtype.type(factor)


# --- the transform ------------------------------------------------------------------------------------------


def padded(size: int) -> int:
    """The length after rotation of a vector of ``size`` entries.

    >>> padded(199_210), padded(2**21), padded(50)
    (200704, 2097152, 50)
    """
    rows, row = _shape(size)
    return rows * row


def _shape(size: int) -> tuple[int, int]:
    """(m, 2^a): how many rows the vector is seen as, and their length."""
    row = 1 << max(0, (size - 1).bit_length() - _ROWS) if size else 1
    return -(-size // row), row


def transform(vector: NDArray[Any]) -> NDArray[Any]:
    """The vector times the orthonormal symmetric matrix (of Hartley's ⊗) Hadamard's, [n] to a new [n]; its own inverse.

    A plain Walsh–Hadamard transform, in the natural order, if n is a power of two.

    Args:
        vector: float32 or float64 [n]; n must be a length that :func:`padded` gives.

    Raises:
        ConfigurationError: it is not.

    Example:
        >>> transform(np.array([2.0, 0, 0, 0])).tolist(), transform(np.array([3.0, 4.0])).round(3).tolist()
        ([1.0, 1.0, 1.0, 1.0], [4.95, -0.707])
    """
    rows, row = _shape(len(vector))
    if rows * row != len(vector):
        raise ConfigurationError(
            f"no transform has {len(vector)} entries; pad the vector to {padded(len(vector))} with zeros"
        )
    if not len(vector):
        return vector.copy()
    found: NDArray[Any] = _across(rows, vector.dtype) @ vector.reshape(rows, row)
    if row == 1:
        return found.reshape(-1)
    each = max(1, _BLOCK // row)
    scratch = np.empty((2, each * row), vector.dtype)
    for at in range(0, rows, each):
        block = found[at : at + each]
        _along(block, scratch[:, : block.size])
    return found.reshape(-1)


def _along(block: NDArray[Any], scratch: NDArray[Any]) -> None:
    """Every row of ``block`` [row, 2^a] times the Hadamard matrix, in place."""
    bits = block.shape[1].bit_length() - 1
    passes = -(-bits // _RADIX)
    sizes = [1 << ((bits + i) // passes) for i in range(passes)]
    right, source = block.shape[1], block
    for i, size in enumerate(sizes):
        right //= size
        goal = block if i == passes - 1 else scratch[i % 2]
        matrix = _across(size, block.dtype)
        if right == 1:
            np.matmul(source.reshape(-1, size), matrix, out=goal.reshape(-1, size))
        else:
            np.matmul(matrix, source.reshape(-1, size, right), out=goal.reshape(-1, size, right))
        source = goal


@lru_cache(maxsize=256)
def _across(order: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The orthonormal Hadamard matrix of an order that is a power of two, Hartley's of any other."""
    if order & (order - 1):
        angle = np.outer(np.arange(order), np.arange(order)) % order * (2 * np.pi / order)
        found = np.cos(angle) + np.sin(angle)
    else:
        found = np.ones((1, 1))
        while len(found) < order:
            found = np.block([[found, found], [found, -found]])
    return np.asarray(found / np.sqrt(order), dtype)
