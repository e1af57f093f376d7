"""Counted randomness: every draw is a function of (seed, path, counter), never of what was drawn before.

A *key* is a 64-bit word hashed from a seed and a path such as ``("batches", round, client)``. The k-th
random word of a key is ``bits(key, k)``, computed on its own, so the same draw comes out in any
order, in any process and in any executor, and a resumed run needs no generator state. Words are
made by the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014; constants: D. Stafford's variant 13). For a fixed key the finaliser
is one-to-one in the counter, so sorting by ``bits`` is a permutation without ties.

Not here: randomness that an adversary must not guess (keys, masks, privacy noise). This module is
for experiments that repeat; it is not cryptographic.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Int64

__all__ = ["bits", "fold", "generator", "key", "order", "uniform"]

Words = NDArray[np.uint64]

_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN: Final = 0x9E37_79B9_7F4A_7C15  # odd, so that counter * _GOLDEN is one-to-one modulo 2**64
_FOLD: Final = 0xD1B5_4A32_D192_ED03  # keeps `fold` apart from `bits`
_TEXT: Final = 0x8CB9_2BA7_2F3D_8DD7  # keeps the text "1" apart from the number 1


def key(seed: int, *path: int | str) -> int:
    """The 64-bit key of a seed and a path; every part of the path and its place in it count.

    Errors: `ConfigurationError` for a part that is neither an integer of 64 bits nor a text.

    >>> key(0, "batches", 3) == key(0, "batches", 3), key(0, "batches", 3) == key(0, 3, "batches")
    (True, False)
    """
    word: int = _mix(_word(seed))
    for part in path:
        word = fold(word ^ _TEXT if isinstance(part, str) else word, _word(part))
    return word


@overload
def fold(keys: int, value: int) -> int: ...
@overload
def fold(keys: int | Words, value: Words) -> Words: ...
@overload
def fold(keys: Words, value: int) -> Words: ...
def fold(keys: int | Words, value: int | Words) -> int | Words:
    """New keys, one step deeper: ``fold(key(0, "a"), 7) == key(0, "a", 7)``. Arrays broadcast.

    For a fixed key different values give different keys, and the other way round.

    Args:
        keys: one key, or an array uint64 [...].
        value: an integer, or an array of them that broadcasts against ``keys``.
    """
    if isinstance(keys, int) and isinstance(value, int):
        word: int = _mix(_mix(keys ^ _FOLD) ^ _mix((value + _GOLDEN) & _MASK))
        return word
    words: Words = _mix(_mix(_words(keys) ^ np.uint64(_FOLD)) ^ _mix(_words(value) + np.uint64(_GOLDEN)))
    return words


def bits(keys: int | Words, counters: ArrayLike) -> Words:
    """Random words, uint64, of the broadcast shape of ``keys`` and ``counters`` (at least one axis).

    >>> bits(key(0, "noise"), np.arange(2)) == bits(key(0, "noise"), np.arange(5))[:2]
    array([ True,  True])
    """
    steps = (_words(counters) + np.uint64(1)) * np.uint64(_GOLDEN)
    words: Words = _mix(_words(keys) + steps)
    return words


def uniform(keys: int | Words, counters: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 of 53 random bits, of the broadcast shape of the arguments."""
    return (bits(keys, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(keys: ArrayLike, counts: ArrayLike) -> Int64[NDArray[np.int64], " total"]:
    """One random permutation per segment, laid end to end.

    Segment s permutes 0 .. counts[s]-1 and depends on keys[s] and counts[s] alone, so that it does
    not matter which other segments it was computed with.

    Args:
        keys: uint64 [segment].
        counts: the length of each segment, [segment].
    Returns:
        int64 [sum of counts].

    >>> order([key(0, "a"), key(0, "b")], [3, 2]).shape
    (5,)
    """
    lengths = np.asarray(counts, dtype=np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    segments = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(segments)) - starts
    words = np.argsort(bits(_words(keys)[segments], inside))
    # Sorting by word and then, stably, by segment is `lexsort((words, segments))`, several times as fast.
    small = segments[words].astype(np.min_scalar_type(len(lengths)))
    return words[np.argsort(small, kind="stable")].astype(np.int64, copy=False) - starts


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """numpy's Philox generator of the key of (seed, path), for draws that numpy has ready-made.

    >>> float(generator(0, "dirichlet").random()) == float(generator(0, "dirichlet").random())
    True
    """
    return np.random.Generator(np.random.Philox(key=key(seed, *path)))


def _mix(word: Any) -> Any:
    """SplitMix64's finaliser, one-to-one on 64 bits; the same lines for integers and arrays."""
    word = ((word ^ (word >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return word ^ (word >> 31)


def _word(part: Any) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    if isinstance(part, int | np.integer) and -(2**63) <= part < 2**64:
        return int(part) & _MASK
    raise ConfigurationError(
        f"A random key is made of integers of 64 bits and texts, and {part!r} is neither. "
        "Write a smaller integer, or str(...) of what you have."
    )


def _words(values: Any) -> Words:
    """uint64 with at least one axis: numpy warns of overflow for scalars, not for arrays."""
    if isinstance(values, int):
        values = _word(values)
    return np.atleast_1d(np.asarray(values)).astype(np.uint64, copy=False)
