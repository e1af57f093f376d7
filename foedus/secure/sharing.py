"""Secrets shared among many, of whom any ``t`` can put them together and fewer learn nothing (Shamir 1979, "How to
share a secret").

A secret of 32 bytes is eight words of 32 bits, each shared by a polynomial of its own over the prime field of
p = 2³² − 5, at the points 1 … n: a share is 32 bytes, too. (A word that is no element of the field, one in a billion,
must not occur: :func:`shareable`.) Sums over the field are matrix products of 16-bit halves in float64, exact as long
as there are fewer than 2²⁰ terms; polynomials are evaluated in blocks of √t coefficients (Paterson & Stockmeyer 1973),
and the weights of Lagrange's interpolation are found once for all secrets that the same holders put together.

Timing does not depend on secrets but through numpy's and the processor's arithmetic, which is not made constant.

Not here: sealing shares, and who holds which (``foedus.protocol.secagg``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError, NotEnoughShares

if TYPE_CHECKING:
    from jaxtyping import UInt64

Words = NDArray[np.uint64]

PRIME = 2**32 - 5
WORDS = 8  # of a secret of 32 bytes
MOST = 1 << 20  # holders, points and terms: products of 16-bit halves add up exactly in float64
_ROWS = 256  # points at a time
_COLUMNS = 1 << 7  # words of secrets at a time
_LOW = np.uint64(2**32 - 1)
_FIVE, _HALF, _WORD = np.uint64(5), np.uint64(16), np.uint64(32)
_P = np.uint64(PRIME)


# --- the field ----------------------------------------------------------------------------------------------


def reduced(values: Words) -> Words:
    """Numbers below 2⁶⁴ modulo p, uint64: 2³² is 5."""
    folded = (values >> _WORD) * _FIVE + (values & _LOW)
    folded = (folded >> _WORD) * _FIVE + (folded & _LOW)
    return folded - _P * (folded >= _P)


def product(a: UInt64[Words, "row inner"], b: UInt64[Words, "inner column"]) -> UInt64[Words, "row column"]:
    """The matrix product over the field of elements below p.

    Example:
        >>> product(np.array([[PRIME - 1, 2]], np.uint64), np.array([[3], [4]], np.uint64)).tolist()
        [[5]]
    """
    left = np.concatenate([a >> _HALF, a & np.uint64(0xFFFF)]).astype(np.float64)
    right = np.concatenate([b >> _HALF, b & np.uint64(0xFFFF)], axis=1).astype(np.float64)
    sums = reduced((left @ right).astype(np.uint64))
    rows, columns = a.shape[0], b.shape[1]
    high, low = sums[:rows, :columns], sums[rows:, columns:]
    middle = sums[:rows, columns:] + sums[rows:, :columns]
    return reduced((reduced((high << _HALF) + middle) << _HALF) + low)


def inverse(values: Words) -> Words:
    """1 / values over the field, by Fermat: values^(p − 2)."""
    found, power, left = np.ones_like(values), values, PRIME - 2
    while left:
        if left & 1:
            found = reduced(found * power)
        power = reduced(power * power)
        left >>= 1
    return found


# --- sharing ------------------------------------------------------------------------------------------------


def shareable(secret: bytes) -> bool:
    """Whether every word of it is an element of the field; all but one secret in half a billion are.

    Example:
        >>> shareable(bytes(32)), shareable(b"\\xff" * 32)
        (True, False)
    """
    return bool((np.frombuffer(secret, "<u4") < PRIME).all())


def coefficients(stream: bytes, count: int) -> Words:
    """Elements of the field, uniformly random if the bytes are: uint64 [count]; words beyond p are passed over.

    Raises:
        ConfigurationError: there are too few bytes; a few more than 4 a coefficient are enough.
    """
    words = np.frombuffer(stream, "<u4").astype(np.uint64)
    words = words[words < _P]
    if len(words) < count:
        raise ConfigurationError(f"{count} random elements of the field take more than {len(stream)} bytes")
    return words[:count]


def spare(count: int) -> int:
    """How many random bytes to give :func:`coefficients` for so many elements: fewer do not suffice only once in
    2⁶⁰.
    """
    return 4 * (count + 4)


def shares(secrets: NDArray[np.uint8], points: NDArray[Any], threshold: int, random: Words) -> NDArray[np.uint8]:
    """Shares of some secrets, all with the same threshold.

    Args:
        secrets: uint8 [secret, 32], each :func:`shareable`.
        points: whole numbers [holder] above 0, all different.
        threshold: t, how many shares put a secret together.
        random: elements of the field [(t − 1) · 8 · secret], see :func:`coefficients`.

    Returns:
        uint8 [holder, secret, 32].

    Example:
        >>> secret = np.arange(32, dtype=np.uint8)[None]
        >>> held = shares(secret, np.arange(1, 6), 3, coefficients(bytes(spare(16) * 4), 16))
        >>> bool((recovered(held[[4, 0, 2]], np.array([5, 1, 3])) == secret).all())
        True
    """
    constant = np.ascontiguousarray(secrets).view("<u4").astype(np.uint64).reshape(1, -1)
    if (constant >= _P).any():
        raise ConfigurationError("a secret has a word that is no element of the field; draw another")
    table = np.concatenate([constant, random.reshape(threshold - 1, constant.shape[1])])
    values = _evaluated(table, np.asarray(points, np.uint64))
    return values.astype("<u4").view(np.uint8).reshape(len(points), len(secrets), 4 * WORDS)


def _evaluated(table: UInt64[Words, "power column"], points: UInt64[Words, " point"]) -> Words:
    """Polynomials [power, column] at points: [point, column].

    In blocks of about 10·√t powers, since products of matrices are ten times as fast as what it takes to put blocks
    together; and of a few hundred points, so that it all stays in the cache.
    """
    count, columns = table.shape
    block = min(count, max(1, round(10 * count**0.5)))
    blocks = -(-count // block)
    padded = np.zeros((blocks * block, columns), np.uint64)
    padded[:count] = table
    wide = padded.reshape(blocks, block, columns).transpose(1, 0, 2).reshape(block, blocks * columns)
    found = [_at(wide, points[at : at + _ROWS], blocks) for at in range(0, len(points), _ROWS)]
    return np.concatenate(found) if found else np.zeros((0, columns), np.uint64)


def _at(wide: Words, points: Words, blocks: int) -> Words:
    """Polynomials in blocks [power, block · column] at a few points: [point, column]."""
    powers = np.ones((len(wide) + 1, len(points)), np.uint64)
    for i in range(len(wide)):
        powers[i + 1] = reduced(powers[i] * points)
    parts = product(np.ascontiguousarray(powers[:-1].T), wide).reshape(len(points), blocks, -1)
    found: Words = parts[:, -1]
    for i in range(blocks - 2, -1, -1):
        found = reduced(found * powers[-1][:, None] + parts[:, i])
    return found


# --- putting together ---------------------------------------------------------------------------------------


def weights(points: Words) -> Words:
    """Lagrange's weights at 0 of sets of points: uint64 [set, t] for points [set, t].

    Σ weight · share is the secret. The product over all other points, for all points at once.

    Raises:
        NotEnoughShares: a point occurs twice in a set, or is 0.
    """
    own = np.asarray(points, np.uint64)
    above, below = np.ones_like(own), np.ones_like(own)
    for i in range(own.shape[1]):
        other = own[:, i : i + 1]
        gap = reduced(other + (_P - own))
        gap[:, i] = 1
        factor = np.broadcast_to(other, own.shape).copy()
        factor[:, i] = 1
        below = reduced(below * gap)
        above = reduced(above * factor)
    if not (below.all() and own.all()):
        raise NotEnoughShares("a secret is to be put together from shares of which two are at the same point")
    return reduced(above * inverse(below))


def recovered(held: NDArray[np.uint8], points: NDArray[Any]) -> NDArray[np.uint8]:
    """The secrets that as many holders as the threshold put together; of other shares, something else comes out.

    Args:
        held: uint8 [holder, secret, 32]: the same holders' shares of some secrets.
        points: the holders' points [holder].

    Returns:
        uint8 [secret, 32].
    """
    own = weights(np.asarray(points, np.uint64)[None])
    halves = np.ascontiguousarray(held).view("<u2").reshape(len(held), -1)
    parts = (_combined(own, halves[:, at : at + 2 * _COLUMNS]) for at in range(0, halves.shape[1], 2 * _COLUMNS))
    found: Words = np.concatenate([np.zeros(0, np.uint64), *parts])
    return found.astype("<u4").view(np.uint8).reshape(held.shape[1], 4 * WORDS)


def _combined(own: Words, halves: NDArray[np.uint16]) -> Words:
    """Σ weight · word [word] for weights [1, holder] and words as low and high halves [holder, 2 · word]."""
    split = np.concatenate([own & np.uint64(0xFFFF), own >> _HALF]).astype(np.float64)
    low, high = reduced((split @ halves.astype(np.float64)).astype(np.uint64))  # of the weights, [half of a word] each
    middle = low[1::2] + high[::2]
    return reduced((reduced((high[1::2] << _HALF) + middle) << _HALF) + low[::2])


def recovered_apart(held: NDArray[np.uint8], points: NDArray[Any]) -> NDArray[np.uint8]:
    """Secrets each of which other holders put together: uint8 [secret, t, 32] at points [secret, t] to [secret, 32]."""
    own, values = weights(np.asarray(points, np.uint64)), _elements(held)
    total = np.zeros((len(held), WORDS), np.uint64)
    for i in range(held.shape[1]):
        total = reduced(total + reduced(own[:, i : i + 1] * values[:, i]))
    return total.astype("<u4").view(np.uint8).reshape(len(held), 4 * WORDS)


def _elements(held: NDArray[np.uint8]) -> Words:
    """Shares [..., 32] as elements of the field [..., 8]; a word beyond it is brought back, and spoils the secret."""
    return reduced(np.ascontiguousarray(held).view("<u4").astype(np.uint64))
