"""Sending some of the entries only: chosen at random by a seed that both sides know, or the largest.

Which entries were chosen by a seed costs nothing on the wire. A mask that all clients share is linear: the masked
entries of all clients add up. Choices of each client's own are put back into place message by message; whichever
entries a client chose by their size, it must say: k of n positions take about k·(2 + log₂(n/k)) bits here
(Elias–Fano coding, Elias 1974, Fano 1971; for few of many within 0.6 bits a position of the least possible).

Not here: error feedback, which biased choices need to converge (``core/feedback.py``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import check_share, draws, part, peak, reals, refused, words
from foedus.core.stage import Stage, Subspace, packed, unpacked
from foedus.core.values import Context, Update
from foedus.errors import Reason


def random_mask(share: float, *, unbiased: bool = True) -> Stage:
    """Send a random part of the entries, the same for all clients of a round; of the rest nothing is known.

    Linear: works under secure aggregation. The error of one update is ‖x‖²·(1/share − 1) if unbiased, and
    ‖x‖²·(1 − share) if not.
    Source: Konečný et al. 2016 (arXiv 1610.05492), section 2, "random mask".

    Args:
        share: of the entries, above 0 and at most 1; ⌈share·n⌉ are sent.
        unbiased: divide by the share of those sent, so that the expectation over rounds is the update; otherwise the
            others count as 0, as ``error_feedback`` needs it.

    Example:
        >>> stage, context = random_mask(0.5), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([1.0, 2, 3, 4]), 1.0), context)
        >>> len(sent.vector), sorted(stage.decode(sent, context).vector.tolist())
        (2, [0.0, 0.0, 4.0, 8.0])
    """
    return _chosen(share, "random_mask", unbiased=unbiased, own=False)


def subsample(share: float) -> Stage:
    """Send a random part of the entries, different for every client, scaled so that the expectation is the update.

    The mean over clients covers all entries, where that of :func:`random_mask` covers those of one mask; it does not
    add up under masks. Error: ‖x‖²·(1/share − 1).
    Source: Konečný et al. 2016 (arXiv 1610.05492), section 3, "subsampling".

    Args:
        share: of the entries, above 0 and at most 1; ⌈share·n⌉ are sent.

    Example:
        >>> stage, context = subsample(0.25), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([5.0, 5, 5, 5]), 1.0), context)
        >>> sorted(stage.decode(sent, context).vector.tolist())
        [0.0, 0.0, 0.0, 20.0]
    """
    return _chosen(share, "subsample", unbiased=True, own=True)


def rand_k(share: float) -> Stage:
    """Send a random part of the entries, different for every client; the others count as 0.

    Biased, with error ‖x‖²·(1 − share): a contraction, for use inside ``error_feedback``.
    Source: Stich, Cordonnier & Jaggi 2018 (arXiv 1809.07599), definition 2.2.

    Args:
        share: of the entries, above 0 and at most 1; ⌈share·n⌉ are sent.

    Example:
        >>> stage, context = rand_k(0.25), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([5.0, 5, 5, 5]), 1.0), context)
        >>> sorted(stage.decode(sent, context).vector.tolist())
        [0.0, 0.0, 0.0, 5.0]
    """
    return _chosen(share, "rand_k", unbiased=False, own=True)


def _chosen(share: float, purpose: str, *, unbiased: bool, own: bool) -> Stage:
    """Entries chosen by the seed."""
    check_share(share)

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        at = subset(len(update.vector), kept(len(update.vector), share), draws(context, purpose, own=own))
        return update._replace(vector=update.vector[at])

    def decode(update: Update, context: Context) -> Update:
        size, count = context.size, kept(context.size, share)
        vector = reals(update, context, count)
        whole = np.zeros(size, vector.dtype)
        factor = size / count if unbiased and count else 1.0
        whole[subset(size, count, draws(context, purpose, own=own))] = vector * vector.dtype.type(factor)
        return update._replace(vector=whole)

    def inside(context: Context) -> Subspace:
        mask = np.zeros(context.size, np.float32)
        mask[subset(context.size, kept(context.size, share), draws(context, purpose, own=own))] = 1
        return Subspace(mask)

    label = f"{purpose}({share})" if unbiased or own else f"{purpose}({share}, unbiased=False)"
    return Stage(
        encode, decode, label, linear=not own, size=lambda n, layout: kept(n, share), scatters=True,
        inside=None if unbiased else inside,
    )  # fmt: skip


def top_k(share: float) -> Stage:
    """Send the entries of largest magnitude and their positions; the others count as 0.

    The best that k entries can do, and biased: without ``error_feedback`` the small entries are never heard.
    Source: Aji & Heafield 2017 (arXiv 1704.05021); Stich, Cordonnier & Jaggi 2018 (arXiv 1809.07599).

    Args:
        share: of the entries, above 0 and at most 1; ⌈share·n⌉ are sent.

    Example:
        >>> stage, context = top_k(0.5), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([0.1, -7.0, 0.2, 5.0]), 1.0), context)
        >>> sent.vector.tolist(), stage.decode(sent, context).vector.tolist()
        ([-7.0, 5.0], [0.0, -7.0, 0.0, 5.0])
    """
    check_share(share)

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        size, count = len(update.vector), kept(len(update.vector), share)
        at = np.sort(np.argpartition(np.abs(update.vector), size - count)[size - count :]) if count else np.arange(0)
        low, high = positions_packed(at, size)
        return update._replace(vector=update.vector[at], beside={"low": low, "high": high})

    def decode(update: Update, context: Context) -> Update:
        size, count = context.size, kept(context.size, share)
        vector, (low, high) = reals(update, context, count), positions_bytes(count, size)
        found = positions_unpacked(
            part(update.beside, "low", context, dtype="uint8", shape=(low,)),
            part(update.beside, "high", context, dtype="uint8", shape=(high,)),
            count,
            context=context,
        )
        whole = np.zeros(size, vector.dtype)
        whole[found] = vector
        return update._replace(vector=whole)

    size = lambda n, layout: kept(n, share)  # noqa: E731
    return Stage(encode, decode, f"top_k({share})", linear=False, size=size, scatters=True)


# --- choosing -----------------------------------------------------------------------------------------------


def kept(size: int, share: float) -> int:
    """How many of ``size`` entries a share is: at least one, if there are any."""
    return min(size, math.ceil(size * share))


def subset(size: int, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """A random subset of 0 … size − 1, each of ``count`` elements equally likely, in order.

    Every entry is taken with a probability slightly above what is needed, and of these as many at random are left
    out again: given how many there are, both choices are even, and so is the result. It costs one pass with 16 random
    bits an entry, a tenth of sorting.

    >>> subset(10, 10, np.random.default_rng(0)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if count >= size:
        return np.arange(size)
    rate = (count + 5 * math.sqrt(count) + 5) / size  # fewer than wanted once in millions of times
    limit = min(math.ceil(rate * 2**16), 2**16)
    while True:
        found = np.flatnonzero(words(draw, 2 * size).view("<u2") < limit) if limit < 2**16 else np.arange(size)
        if len(found) >= count:
            break
    left_out = draw.choice(len(found), len(found) - count, replace=False, shuffle=False)
    return np.delete(found, left_out)


# --- positions on the wire ----------------------------------------------------------------------------------


def _low_bits(count: int, size: int) -> int:
    return max(0, (size // count).bit_length() - 1) if count else 0


def positions_bytes(count: int, size: int) -> tuple[int, int]:
    """How many bytes the low and the high part of ``count`` positions below ``size`` take."""
    bits = _low_bits(count, size)
    return -(-count * min(bits, 16) // 8) + -(-count * max(bits - 16, 0) // 8), (
        -(-(count + (size >> bits) + 1) // 8) if count else 0
    )


def positions_packed(at: NDArray[np.int64], size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rising positions below ``size``, [k], in Elias–Fano's code: the last bits of each, and the rest in unary.

    >>> low, high = positions_packed(np.array([3, 700, 701, 5000]), 10_000)
    >>> len(low), len(high)
    (6, 2)
    >>> positions_unpacked(low, high, 4, context=Context(0, 1, 0, size=10_000)).tolist()
    [3, 700, 701, 5000]
    """
    bits = _low_bits(len(at), size)
    if not len(at):
        return np.zeros(0, np.uint8), np.zeros(0, np.uint8)
    last = [packed((at >> i) & (2 ** min(bits - i, 16) - 1), min(bits - i, 16)) for i in range(0, bits, 16)]
    unary = np.zeros(len(at) + (size >> bits) + 1, np.uint8)
    unary[(at >> bits) + np.arange(len(at))] = 1
    low = np.concatenate(last) if last else np.zeros(0, np.uint8)
    return low, np.packbits(unary, bitorder="little")


def positions_unpacked(
    low: NDArray[np.uint8], high: NDArray[np.uint8], count: int, *, context: Context
) -> NDArray[np.int64]:
    """The inverse of :func:`positions_packed`, for positions below ``context.size``.

    Raises:
        UpdateRefused: the bytes are not the code of ``count`` rising positions.
    """
    bits = _low_bits(count, context.size)
    ones = np.flatnonzero(np.unpackbits(high, bitorder="little"))
    if len(ones) != count:
        raise refused(f"sent {len(ones)} positions where {count} are expected", context)
    found = (ones - np.arange(count)) << bits
    for i in range(0, bits, 16):
        width = min(bits - i, 16)
        at = 2 * count * (i // 16)
        lasts = unpacked(low[at : at + -(-count * width // 8)], width, count)
        found |= lasts.astype(np.int64) << i
    if count and (found[-1] >= context.size or not (np.diff(found) > 0).all()):
        raise refused(f"sent positions that do not rise from 0 to {context.size - 1}", context, Reason.RANGE)
    return found
