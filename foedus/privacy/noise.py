"""Noise that privacy rests on: discrete Gaussian and Skellam whole numbers from uniform random words, with no floating
point in between, and where the words come from.

**Why whole numbers.** Floating-point Gaussian noise betrays what it was added to: its last bits tell sums apart that
should look alike (Mironov 2012, "On significance of the least significant bits for differential privacy"). Here
updates are whole multiples of a grid, the noise is a discrete Gaussian on that grid (Canonne, Kamath & Steinke 2020,
"The discrete Gaussian for differential privacy"), and they are added as integers; what is divided or scaled
afterwards is nobody's secret any more. For whole shifts the moments of a discrete Gaussian are those of the continuous
one (theorem 4 there; the sums over a lattice do not change when it is shifted by itself, so this holds for the moments
of Poisson-sampled noise of whole orders, too), which is what lets accountants treat it as one.

**How it is drawn.** By a table of the distribution function in 127 bits, cut off where what lies beyond has a
probability under 10⁻³⁷ (13 standard deviations of a Gaussian), looked up with 31 bits and, where these do not decide
(about once in 10⁵ draws), 96 more. Gaussian standard deviations above 1024 are put together of smaller ones, x + 128·y,
which is the discrete Gaussian itself to exp(−2π²·16) ≈ 10⁻¹³⁷ (Micciancio & Walter 2017, "Gaussian sampling over the
integers", corollary 4.1). A Skellam number is the difference of two independent Poisson numbers of half the variance
each; sums of them are Skellam again, which sums of discrete Gaussians are only nearly.

**Where words come from.** A ``Secret`` of a context (``core/values.py``): :func:`system` by default, :func:`keyed` for
a party that must be able to repeat itself after a restart, :func:`known_to_all_who_know_the_seed` for simulations.
Timing of the table look-up is not made constant.

Not here: how much noise (``mechanisms.py``), what it is worth (``accounting.py``).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number
from foedus.core.random import key
from foedus.core.values import Context, Secret
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Int64

Words = NDArray[np.uint64]

_WIDEST = 1024.0  # the largest standard deviation that is drawn from one table
_STRIDE = 128  # x + 128 y for larger ones
_TAIL = 13  # standard deviations, beyond which nothing is drawn
_FAR = 87.0  # e⁻⁸⁷ < 10⁻³⁷
_BITS = 127  # of the table's thresholds
_FIRST = 31  # of these in the first word, whose last bit is the sign
_REST = _BITS - _FIRST
_GUARD = 64  # bits more while the table is made
_AT_ONCE = 1 << 14  # draws: what is needed for them stays in the processor's cache
_GUIDE = 16  # first bits by which a place in the table is found


# --- where words come from ----------------------------------------------------------------------------------


def system(context: Context, purpose: str, about: NDArray[Any], count: int) -> Words:
    """Words from the operating system's cryptographic source: never the same twice. The default.

    Whoever draws from it must keep what was made of it, and send the same bytes when asked again: noise drawn afresh
    for the same update is averaged out by whoever collects it.

    Example:
        >>> system(Context(0, 1, 0), "example", np.zeros(1), 4).shape
        (4,)
    """
    return np.frombuffer(secrets.token_bytes(8 * count), np.uint64)


@dataclass(frozen=True)
class Keyed:
    """See :func:`keyed`."""

    key: bytes

    def __call__(self, context: Context, purpose: str, about: NDArray[Any], count: int) -> Words:
        told = repr((context.round, context.client, context.channel, purpose, about.dtype.str, about.shape))
        stream = hashlib.shake_256(b"foedus noise 1" + self.key + len(told).to_bytes(8, "little") + told.encode())
        stream.update(np.ascontiguousarray(about).data)
        return np.frombuffer(stream.digest(8 * count), "<u8")

    def __repr__(self) -> str:
        return "Keyed(<secret>)"


def keyed(key: bytes) -> Secret:
    """Words that are a function of a secret key, of the round, and of the very array that the noise is to protect.

    The same update in the same round gets the same noise, so that a party that was restarted sends the same bytes
    again; any other update, and any other sum of a round that was tried again, gets noise of its own. (Noise that
    depended on the round only would be laid bare by subtracting two attempts.) SHAKE-256 of all of these.

    Args:
        key: at least 32 bytes from ``secrets.token_bytes(32)``, kept like a password, used for nothing else.

    Raises:
        ConfigurationError: it is shorter.

    Example:
        >>> draw, context = keyed(bytes(32)), Context(0, 1, 0)
        >>> a, b, c = (draw(context, "sum", np.array(v), 2).tolist() for v in ([1.0], [1.0], [2.0]))
        >>> a == b, a == c
        (True, False)
    """
    if not isinstance(key, bytes) or len(key) < 32:
        raise ConfigurationError("a key for noise is at least 32 secret bytes: write keyed(secrets.token_bytes(32))")
    return Keyed(key)


def known_to_all_who_know_the_seed(context: Context, purpose: str, about: NDArray[Any], count: int) -> Words:
    """Words counted from the run's seed, the round, the client and the channel: for simulations and tests only.

    Everybody who knows the seed can subtract the noise, and what is released protects nobody against them. It is right
    where data and results never leave one's hands, because then runs repeat to the byte.

    Example:
        >>> draw = known_to_all_who_know_the_seed
        >>> bool((draw(Context(7, 1, 0), "x", np.zeros(1), 3) == draw(Context(7, 1, 0), "x", np.ones(1), 3)).all())
        True
    """
    path = ("privacy", context.round, context.client, context.channel, purpose)
    raw = np.random.SFC64(key(context.seed, *path)).random_raw(count)  # some times as fast as hashing counters
    return np.asarray(raw, np.uint64)


def source(context: Context) -> Secret:
    """Where noise is drawn from in a context: its own secret, or the operating system."""
    return system if context.secret is None else context.secret


# --- discrete Gaussian noise --------------------------------------------------------------------------------


def discrete_gaussian(
    context: Context, purpose: str, about: NDArray[Any], *, sigma: float
) -> Int64[NDArray[np.int64], " entry"]:
    """Independent draws of the discrete Gaussian: P(x) ∝ exp(−x² / 2σ²) over the whole numbers.

    Args:
        context: its secret gives the random words.
        purpose: what for, so that two draws of one context differ.
        about: what the noise is to be added to, [entry]; as many draws as it has entries.
        sigma: σ, at least 1/2. (The variance is less than σ² below σ = 1, and σ² to 10⁻¹⁰ from 1.3 on.)

    Example:
        >>> draws = discrete_gaussian(
        ...     Context(0, 1, 0, secret=known_to_all_who_know_the_seed), "example", np.zeros(10_000), sigma=3.0)
        >>> round(float(draws.std()), 1)
        3.0
    """
    check_number("sigma", sigma, above=True)
    if not 0.5 <= sigma < 2.0**45:
        raise ConfigurationError(f"a discrete Gaussian's sigma lies in 0.5 … 2⁴⁵, not {sigma}")
    parts = _parts(sigma)
    found = _draws(_Wanted(context, f"{purpose}/0", about), _gaussian(parts[0][0]))
    for level, (part, stride) in enumerate(parts[1:], 1):
        more = _draws(_Wanted(context, f"{purpose}/{level}", about), _gaussian(part))
        more *= stride
        found += more
    return found


def skellam(
    context: Context, purpose: str, about: NDArray[Any], *, variance: float
) -> Int64[NDArray[np.int64], " entry"]:
    """Independent Skellam numbers of mean 0: differences of two Poisson numbers of mean ``variance / 2`` each.

    Args:
        context, purpose, about: as for :func:`discrete_gaussian`.
        variance: at least 1/4, and at most 2²⁰.

    Example:
        >>> draws = skellam(
        ...     Context(0, 1, 0, secret=known_to_all_who_know_the_seed), "example", np.zeros(10_000), variance=9.0)
        >>> round(float(draws.std()), 1)
        3.0
    """
    check_number("variance", variance, above=True)
    if not 0.25 <= variance <= _WIDEST**2:
        raise ConfigurationError(f"a Skellam number's variance lies in 1/4 … 2²⁰, not {variance}")
    return _draws(_Wanted(context, purpose, about), _skellam(float(variance)))


def _parts(sigma: float) -> list[tuple[float, int]]:
    """Standard deviations that a table can hold, and their strides: σ² = Σ (stride · part)²."""
    parts, stride = [], 1
    while sigma > _WIDEST:
        part = min(_WIDEST, sigma / math.sqrt(2))
        parts.append((part, stride))
        sigma = math.sqrt(sigma**2 - part**2) / _STRIDE
        stride *= _STRIDE
    return [*parts, (sigma, stride)]


class _Wanted(NamedTuple):
    """What words are wanted for."""

    context: Context
    purpose: str
    about: NDArray[Any]

    def words(self, count: int, more: str = "") -> Words:
        return source(self.context)(self.context, self.purpose + more, self.about, count)


def _draws(wanted: _Wanted, table: _Table) -> NDArray[np.int64]:
    """Draws by one table, two from a word: the first 31 of 32 bits find the magnitude, the last one is the sign."""
    count = len(wanted.about)
    halves = wanted.words(-(-count // 2)).astype("<u8", copy=False).view("<u4")[:count]
    found = np.empty(count, np.int64)
    undecided: list[int] = []
    for at in range(0, count, _AT_ONCE):
        words = halves[at : at + _AT_ONCE]
        first = words >> np.uint32(1)
        below = table.below(first)
        undecided += (at + np.flatnonzero((below > 0) & (table.first.take(below - 1) == first))).tolist()
        sign = -(words & np.uint32(1)).astype(np.int64)  # 0 or −1: (x ^ sign) − sign is x or −x
        below ^= sign
        np.subtract(below, sign, out=found[at : at + _AT_ONCE])
    if undecided:  # the first 31 bits are those of a threshold
        more = wanted.words(2 * len(undecided), "/second").reshape(-1, 2).tolist()
        for i, (a, b) in zip(undecided, more, strict=True):
            magnitude = table.find(int(halves[i]) >> 1, (a << 64 | b) >> 128 - _REST)
            found[i] = -magnitude if halves[i] & 1 else magnitude
    return found


class _Table(NamedTuple):
    """Thresholds P(|x| ≤ n) · 2¹²⁷ for n = 0, 1, ...: whole numbers; the first 31 of their 127 bits [n + 1], with one
    above all words at the end; and where to begin to look, by a word's first 16 bits [65536]."""

    thresholds: tuple[int, ...]
    first: NDArray[np.uint32]
    guide: NDArray[np.int64]

    def below(self, words: NDArray[np.uint32]) -> NDArray[np.int64]:
        """How many thresholds are at most each word [draw]; many times as fast as a binary search."""
        found: NDArray[np.int64] = self.guide.take(words >> np.uint32(_FIRST - _GUIDE))
        ahead = self.first.take(found) <= words
        found += ahead
        places = np.flatnonzero(ahead)
        places = places[self.first.take(found[places]) <= words[places]]
        if len(places):  # the few whose first bits are those of several thresholds
            found[places] = np.searchsorted(self.first, words[places], side="right")
        return found

    def find(self, first: int, rest: int) -> int:
        """The magnitude that 31 and 96 random bits stand for."""
        return bisect_right(self.thresholds, (first << _REST) | rest)


@lru_cache(maxsize=64)
def _gaussian(sigma: float) -> _Table:
    """The table of |x| for a discrete Gaussian."""
    one = 1 << (_BITS + _GUARD)
    with localcontext() as exact:
        exact.prec = 80
        step = int((Decimal(-1) / (2 * Decimal(sigma) ** 2)).exp() * one)  # exp(−1 / 2σ²)
        square = int((Decimal(-1) / Decimal(sigma) ** 2).exp() * one)
    masses, mass = [one], one
    for _ in range(math.ceil(_TAIL * sigma)):  # exp(−n² / 2σ²) by exp(−(2n − 1) / 2σ²), which falls by a square each
        mass = mass * step // one
        step = step * square // one
        masses.append(mass)
    return _tabled(masses)


@lru_cache(maxsize=64)
def _skellam(variance: float) -> _Table:
    """The table of |x| for a Skellam number: P(n) ∝ Iₙ(variance), the modified Bessel functions, by their recurrence
    Iₙ₋₁ = Iₙ₊₁ + (2n / variance) Iₙ, which all terms being positive is stable downwards (Miller's algorithm)."""
    last = _reach(variance)
    top, bottom = variance.as_integer_ratio()
    masses, above, here = [], 0, 1 << _GUARD
    for n in range(2 * last + 64, 0, -1):  # from so far out that where it begins no longer matters
        above, here = here, above + 2 * n * bottom * here // top
        if n <= last + 1:
            masses.append(here)
        if here.bit_length() > 4096:
            scale = here.bit_length() - 1024
            above, here, masses = above >> scale, here >> scale, [m >> scale for m in masses]
    return _tabled(masses[::-1])


def _reach(variance: float) -> int:
    """A number that a Skellam number exceeds with a probability under 10⁻³⁷, by Chernoff's bound."""
    far = math.ceil(_TAIL * math.sqrt(variance))
    while far * math.asinh(far / variance) - (math.hypot(far, variance) - variance) < _FAR:
        far += math.ceil(math.sqrt(variance)) + 1
    return far


def _tabled(masses: list[int]) -> _Table:
    """The table of the magnitudes of a symmetric distribution, from what 0, 1, 2, ... are worth: its thresholds are
    right to the last of 127 bits."""
    masses = [masses[0], *(2 * mass for mass in masses[1:])]
    total, sums = sum(masses), 0
    thresholds = []
    for mass in masses[:-1]:  # what is left over is the last one's
        sums += mass
        thresholds.append((sums << _BITS) // total)
    first = np.array([*(t >> _REST for t in thresholds), 2**32 - 1], np.uint32)
    starts = np.arange(2**_GUIDE, dtype=np.uint32) << np.uint32(_FIRST - _GUIDE)
    return _Table(tuple(thresholds), first, np.searchsorted(first, starts, side="right"))
