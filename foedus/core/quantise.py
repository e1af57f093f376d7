"""Quantisers: a few bits per entry.

Two families. *Stochastic rounding* on evenly spaced levels (``quantise``, ``qsgd``) is unbiased whatever the
entries are, with an error that grows with their range. *Codebooks* for rotated vectors (``drive``, ``eden``) use
that the entries of a randomly rotated vector are as good as normally distributed: the levels are the best ones for
that distribution, known to both sides, and one number per update makes the estimate unbiased.

With a common scale the codes of all clients add up (under secure aggregation too); scales and rotations of each
client's own are undone message by message.

Expected error ‖decoded − x‖² / ‖x‖² at 1, 2, 3, 4 bits (n = 2²⁰): EDEN 0.571, 0.133, 0.0358, 0.0096; rotation and
stochastic rounding between minimum and maximum about 24, 2, 0.33, 0.07 (``experiments/compression_nmse.py``).

Not here: rotation alone (``core/rotation.py``), lossless coding of the codes (``core/entropy.py``).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean
from foedus.core.checks import check_number, check_whole
from foedus.core.coding import blocks, codes, dither, draws, part, peak, refused, square
from foedus.core.rotation import padded, turned, turned_back
from foedus.core.stage import Kind, Stage, chain
from foedus.core.values import Context, Message, State, Update
from foedus.errors import SumOverflow
from foedus.tree import Vector

_TINY = 2.0**-100  # a range below this is no range: float32 could not divide by it

# --- evenly spaced levels -----------------------------------------------------------------------------------


def quantise(bits: int, scale: float | None = None) -> Stage:
    """Round every entry at random to one of the two levels beside it, of 2^bits evenly spaced ones; unbiased.

    Without ``scale`` the levels go from the update's minimum to its maximum (two numbers beside the codes). With
    it, they go from −scale to scale for everybody, so that codes add up: linear, fit for secure aggregation.
    Entries beyond are cut to ±scale: clip and rotate first, so that there are hardly any (``chain(clip(c),
    rotate(), quantise(8, scale=5 * c / n**0.5), mean())`` for n parameters).
    Source: Konečný et al. 2016 (arXiv 1610.05492), section 3, "probabilistic quantization"; Suresh et al. 2017.

    Args:
        bits: 1 to 16 per entry.
        scale: the largest magnitude that is sent, common to all clients.

    Example:
        >>> stage, context = quantise(2), Context(seed=0, round=1, client=0, size=4)
        >>> sent = stage.encode(Update(np.array([0.0, 1.0, 2.0, 3.0], "f4"), 1.0), context)
        >>> sent.vector.tolist(), stage.decode(sent, context).vector.tolist()
        ([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0])
    """
    check_whole("bits", bits, least=1, most=16)
    if scale is not None:
        return _common(bits, scale)
    top = 2**bits - 1

    def encode(update: Update, context: Context) -> Update:
        low, high = (float(np.float32(f(initial=0.0))) for f in (update.vector.min, update.vector.max))
        if not (math.isfinite(low) and math.isfinite(high)):
            peak(update)  # says so, unless float32 is too narrow for the entries, which is told below
        if len(update.vector) and (low == 0.0 or high == 0.0):  # the initial 0 may not be among the entries
            low, high = float(update.vector.min()), float(update.vector.max())
        bounds = np.array([low, high], np.float32)
        return _rounded(update, bounds, top, draws(context, "quantise", own=True), {"range": bounds})

    def decode(update: Update, context: Context) -> Update:
        low, high = map(float, part(update.beside, "range", context, dtype="float32", shape=(2,)))
        if high < low:
            raise refused(f"sent a range from {low} to {high}", context)
        return _spread(update, context, (low, high), top)

    return Stage(encode, decode, f"quantise({bits})", linear=False, gives=Kind.CODES, bits=bits)


def _common(bits: int, scale: float) -> Stage:
    """Levels from −scale to scale, for all clients."""
    check_number("scale", scale, above=True, also=", or None for each client's own")
    top, bounds = 2**bits - 1, np.array([-scale, scale], np.float64)

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        return _rounded(update, bounds, top, draws(context, "quantise", own=True), {})

    def decode(update: Update, context: Context) -> Update:
        return _spread(update, context, (-scale, scale), top)

    return Stage(encode, decode, f"quantise({bits}, scale={scale})", gives=Kind.CODES, bits=bits)


def _rounded(
    update: Update, bounds: NDArray[Any], top: int, draw: np.random.Generator, beside: dict[str, NDArray[Any]]
) -> Update:
    """The update as codes 0 … top, uint8 or uint16, of the levels between two bounds."""
    low, high = map(float, bounds)
    kind, vector = np.uint8 if top < 256 else np.uint16, update.vector
    if high - low < _TINY:
        return update._replace(vector=np.zeros(len(vector), kind), beside=beside)
    if not math.isfinite(np.float32(high - low)):
        raise SumOverflow(
            f"an update with entries from {low:.3g} to {high:.3g} is beyond float32; it cannot be quantised"
        )
    start, per = vector.dtype.type(low), vector.dtype.type(top / (high - low))
    found = np.empty(len(vector), kind)
    for place in blocks(len(vector)):
        steps = vector[place] - start
        steps *= per
        steps += dither(draw, len(steps))
        np.clip(steps, 0, top + 0.5, out=steps)
        np.copyto(found[place], steps, casting="unsafe")  # cuts off
    return update._replace(vector=found, beside=beside)


def _spread(update: Update, context: Context, bounds: tuple[float, float], top: int) -> Update:
    """The levels that codes, or means of codes, stand for."""
    (low, high), vector = bounds, codes(update, context, top + 1)
    dtype = vector.dtype if vector.dtype.kind == "f" else np.dtype(np.float32)
    step, start = dtype.type((high - low) / top), dtype.type(low)
    found = np.empty(len(vector), dtype)
    for place in blocks(len(vector)):
        np.multiply(vector[place], step, out=found[place], dtype=dtype)
        found[place] += start
    return update._replace(vector=found)


def qsgd(levels: int) -> Stage:
    """Signs, and magnitudes rounded at random to one of ``levels`` even parts of the update's norm; unbiased.

    Most codes are 0 when there are few levels: put :func:`~foedus.core.entropy.entropy` behind it, as the paper does
    with a code of its own. Error: at most min(n / levels², √n / levels)·‖x‖².
    Source: Alistarh et al. 2017 (arXiv 1610.02132), section 3.1.

    Args:
        levels: 1 to 32767; codes take ⌈log₂(2·levels + 1)⌉ bits.

    Example:
        >>> stage, context = qsgd(5), Context(seed=0, round=1, client=0, size=2)
        >>> sent = stage.encode(Update(np.array([3.0, -4.0], "f4"), 1.0), context)
        >>> sent.vector.tolist(), stage.decode(sent, context).vector.round(3).tolist()
        ([8, 1], [3.0, -4.0])
    """
    check_whole("levels", levels, least=1, most=2**15 - 1)

    def encode(update: Update, context: Context) -> Update:
        largest = peak(update)
        unit = update.vector / update.vector.dtype.type(largest) if largest > _TINY else update.vector
        norm = np.float32(largest * math.sqrt(square(unit)))
        if not np.isfinite(norm):
            raise SumOverflow(f"an update with entries up to {largest:.3g} is beyond float32; it cannot be quantised")
        bounds = np.array([-norm, norm], np.float64)
        draw = draws(context, "qsgd", own=True)
        return _rounded(update, bounds, 2 * levels, draw, {"norm": np.array([norm], np.float32)})

    def decode(update: Update, context: Context) -> Update:
        norm = float(part(update.beside, "norm", context, dtype="float32", shape=(1,))[0])
        if norm < 0:
            raise refused(f"sent a norm of {norm}", context)
        if norm < _TINY / 2:
            codes(update, context, 2 * levels + 1)
            return update._replace(vector=np.zeros(context.size, np.float32))
        return _spread(update, context, (-norm, norm), 2 * levels)

    bits = (2 * levels).bit_length()
    return Stage(encode, decode, f"qsgd({levels})", linear=False, gives=Kind.CODES, bits=bits)


# --- the best levels for rotated vectors --------------------------------------------------------------------


def drive(*, biased: bool = False) -> Stage:
    """One bit per entry: the signs of the rotated update, and one scale.

    Error: (π/2 − 1)·‖x‖² = 0.571·‖x‖² if unbiased, 0.363·‖x‖² if not.
    Source: Vargaftik et al. 2021 (arXiv 2105.08339), algorithm 1, with a Hadamard rotation.

    Args:
        biased: the scale that gives the least error, ‖Rx‖₁/n, in place of the one that is right on average,
            ‖x‖²/‖Rx‖₁.

    Example:
        >>> stage, context = drive(), Context(seed=0, round=1, client=0, size=2)
        >>> sent = stage.encode(Update(np.array([2.0, 0.0], "f4"), 1.0), context)
        >>> bool(np.abs(stage.decode(sent, context).vector - [2, 0]).max() < 1e-6)
        True
    """
    return _codebook(1, "drive(biased=True)" if biased else "drive()", biased=biased)


def eden(bits: int, *, biased: bool = False) -> Stage:
    """A rotation of each client's own, the best 2^bits levels for normally distributed numbers, and one scale.

    Of all stages here the least error per bit: 0.571, 0.133, 0.0358, 0.0096 times ‖x‖² at 1, 2, 3, 4 bits, whatever
    the entries look like; the errors of different clients are independent and the mean's shrinks with their number.
    Source: Vargaftik et al. 2022 (arXiv 2108.08842), algorithm 1; the levels are those of Lloyd 1982 and Max 1960.

    Args:
        bits: 1 to 8 per entry.
        biased: the scale that gives the least error in place of the one that is right on average (0.363, 0.1175, …),
            as for ``error_feedback``.

    Example:
        >>> stage, context = eden(2), Context(seed=0, round=1, client=0, size=8)
        >>> sent = stage.encode(Update(np.ones(8, "f4"), 1.0), context)
        >>> bool(sent.vector.max() < 4), stage.decode(sent, context).vector.shape
        (True, (8,))
    """
    check_whole("bits", bits, least=1, most=8)
    return _codebook(bits, f"eden({bits}, biased=True)" if biased else f"eden({bits})", biased=biased)


def _codebook(bits: int, label: str, *, biased: bool) -> Stage:
    """Rotated, normalised, rounded to the nearest of the levels, and scaled back."""

    def encode(update: Update, context: Context) -> Update:
        largest = peak(update)
        size = padded(len(update.vector))
        if largest < _TINY:
            return update._replace(vector=np.zeros(size, np.uint8), beside={"scale": np.zeros(1, np.float32)})
        rotated = turned(update.vector, draws(context, "eden", own=True), 1 / largest)
        norm = math.sqrt(square(rotated))
        found, towards, own = _nearest(rotated, math.sqrt(size) / norm, bits)
        scale = np.float32(largest * norm / math.sqrt(size) * (towards / own if biased else size / towards))
        if not np.isfinite(scale):
            raise SumOverflow(f"an update with entries up to {largest:.3g} is beyond float32; it cannot be quantised")
        return update._replace(vector=found, beside={"scale": np.array([scale], np.float32)})

    def decode(update: Update, context: Context) -> Update:
        scale = part(update.beside, "scale", context, dtype="float32", shape=(1,))
        found = codes(update, context._replace(size=padded(context.size)), 2**bits)
        table, near = (levels(bits) * scale).astype(np.float32), np.empty(len(found), np.float32)
        for place in blocks(len(found)):
            table.take(found[place], out=near[place], mode="clip")
        return update._replace(vector=turned_back(near, draws(context, "eden", own=True), context.size))

    size = lambda n, layout: padded(n)  # noqa: E731
    return Stage(encode, decode, label, linear=False, gives=Kind.CODES, bits=bits, size=size, scatters=True)


def _nearest(rotated: NDArray[Any], factor: float, bits: int) -> tuple[NDArray[np.uint8], float, float]:
    """The codes of factor · rotated [n], ⟨factor · rotated, levels of the codes⟩, and ‖levels of the codes‖²."""
    table, found, towards, own = levels(bits).astype(rotated.dtype), np.empty(len(rotated), np.uint8), [], []
    for place in blocks(len(rotated)):
        entries = rotated[place] * rotated.dtype.type(factor)
        found[place] = nearest(entries, bits)
        near = table.take(found[place])
        towards.append(float(np.dot(entries, near)))
        own.append(float(np.dot(near, near)))
    return found, math.fsum(towards), math.fsum(own)


def nearest(vector: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """For each entry the index of the nearest of the :func:`levels`, uint8 [n]."""
    borders = ((levels(bits)[1:] + levels(bits)[:-1]) / 2).astype(vector.dtype)
    if bits > 4:
        return _looked_up(vector, borders)
    found: NDArray[np.uint8] = (vector > borders[0]).view(np.uint8)
    for border in borders[1:]:  # 0.2 ns an entry each, where a search takes 25
        found += vector > border
    return found


def _looked_up(vector: NDArray[Any], borders: NDArray[Any]) -> NDArray[np.uint8]:
    """How many of many borders [border] lie below each entry: by a table of cells so fine that none holds two."""
    start, cells = float(borders[0]), 1 << 12
    per = (cells - 1) / (float(borders[-1]) - start)  # cells for a unit
    first = np.searchsorted(borders, start + (np.arange(cells) - 0.5) / per).astype(
        np.uint8
    )  # half a cell for rounding
    following = np.append(borders, vector.dtype.type(np.inf))
    found = np.empty(len(vector), np.uint8)
    for at in range(0, len(vector), 1 << 15):
        part = vector[at : at + (1 << 15)]
        cell = np.clip((part - start) * vector.dtype.type(per), 0, cells - 1).astype(np.intp)
        code = first.take(cell)
        for _ in range(2):  # of a cell and the halves beside it, at most two
            code += part > following.take(code)
        found[at : at + (1 << 15)] = code
    return found


@lru_cache(maxsize=8)
def levels(bits: int) -> NDArray[np.float64]:
    """The 2^bits numbers, rising, that represent a standard normal variable with the least mean squared error.

    Lloyd's iteration: borders half-way between levels, levels at the means of what lies between borders. Source:
    Lloyd 1982 ("Least squares quantization in PCM"), Max 1960 ("Quantizing for minimum distortion").

    >>> levels(1).round(4).tolist(), levels(2).round(4).tolist()
    ([-0.7979, 0.7979], [-1.5104, -0.4528, 0.4528, 1.5104])
    """
    half = 2 ** (bits - 1)
    # A start whose density is that of the best levels: the cube root of the normal's (Panter & Dite 1951).
    found = np.array([_normal_quantile(0.5 + (i + 0.5) / (2 * half)) * math.sqrt(3) for i in range(half)])
    for _ in range(3_000):
        borders = np.concatenate([[0.0], (found[1:] + found[:-1]) / 2, [math.inf]])
        below = np.array([math.erfc(b / math.sqrt(2)) / 2 for b in borders])
        height = np.exp(-np.square(borders) / 2) / math.sqrt(2 * math.pi)
        better = (height[:-1] - height[1:]) / (below[:-1] - below[1:])
        moved, found = np.abs(better - found).max(), better
        if moved < 1e-10:
            break
    return np.concatenate([-found[::-1], found])


def _normal_quantile(probability: float) -> float:
    """The number below which a standard normal variable lies with this probability."""
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(-middle / math.sqrt(2)) / 2 < probability else (low, middle)
    return low


def eden_error(bits: int, *, biased: bool = False) -> float:
    """The expected ‖decoded − x‖² / ‖x‖² of :func:`eden` for long vectors.

    With D the mean squared error of the levels for a standard normal variable: D if biased, D / (1 − D) if not.
    Source: Vargaftik et al. 2022 (arXiv 2108.08842), theorem 2.1 and section 2.3.

    >>> [round(eden_error(b), 4) for b in (1, 2, 3, 4)], round(eden_error(1, biased=True), 4)
    ([0.5708, 0.1331, 0.0358, 0.0096], 0.3634)
    """
    near = levels(bits)
    borders = np.concatenate([[-math.inf], (near[1:] + near[:-1]) / 2, [math.inf]])
    mass = -np.diff([math.erfc(b / math.sqrt(2)) / 2 for b in borders])
    left = 1 - float(np.dot(mass, np.square(near)))
    return left if biased else left / (1 - left)


# --- signs --------------------------------------------------------------------------------------------------


def signs() -> Stage:
    """One bit per entry: whether it is positive; what comes back is ±1, or the mean of many ±1.

    Zeros are sent as a random sign, so that they favour none. Linear: votes add up. :func:`sign_majority` decides
    them.

    Example:
        >>> stage, context = signs(), Context(seed=0, round=1, client=0, size=2)
        >>> stage.decode(stage.encode(Update(np.array([5.0, -0.1]), 1.0), context), context).vector.tolist()
        [1.0, -1.0]
    """

    def encode(update: Update, context: Context) -> Update:
        peak(update)
        found = (update.vector > 0).view(np.uint8)
        zeros = np.flatnonzero(update.vector == 0)
        if len(zeros):
            found[zeros] = draws(context, "signs", own=True).integers(0, 2, len(zeros), np.uint8)
        return update._replace(vector=found)

    def decode(update: Update, context: Context) -> Update:
        return _spread(update, context, (-1.0, 1.0), 1)

    return Stage(encode, decode, "signs()", gives=Kind.CODES, bits=1)


def sign_majority() -> Aggregator:
    """Every client sends the sign of each entry, one bit; the result is the sign that most of them sent, ±1, 0 if even.

    Each client has one vote, whatever its number of examples. The step's length is the server's learning
    rate (``server=fd.sgd(lr=...)``). Sums of signs add up under secure aggregation.
    Source: Bernstein et al. 2018 (arXiv 1802.04434), algorithm 3, "majority vote".

    Example:
        >>> rule, context = sign_majority(), Context(seed=0, round=1, client=0, size=2)
        >>> votes = [rule.encode(Update(np.array(v), 1.0), context) for v in ([3.0, -1], [0.1, -9], [-50.0, 2])]
        >>> a, b, c = (rule.admit(vote, context) for vote in votes)
        >>> rule.decode({}, rule.merge(rule.merge(a, b), c), context)[0].tolist()
        [1.0, -1.0]
    """
    votes = chain(signs(), mean(weighted=False))

    def decode(state: State, message: Message, context: Context) -> tuple[Vector, State]:
        share, state = votes.decode(state, message, context)
        return np.sign(share), state

    return votes._replace(decode=decode, label="sign_majority()")
