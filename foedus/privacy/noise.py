"""Noise that privacy rests on: discrete Gaussian and Skellam whole numbers from uniform random words, with no floating
point in between, and where the words come from.

**Why whole numbers.** Floating-point Gaussian noise betrays what it was added to: its last bits tell sums apart that
should look alike (Mironov 2012, "On significance of the least significant bits for differential privacy"). Here
updates are whole multiples of a grid, the noise is a discrete Gaussian on that grid (Canonne, Kamath & Steinke 2020,
"The discrete Gaussian for differential privacy"), and they are added exactly; what is divided or scaled
afterwards is nobody's secret any more. For whole shifts the moments of a discrete Gaussian are those of the continuous
one (theorem 4 there; the sums over a lattice do not change when it is shifted by itself, so this holds for the moments
of Poisson-sampled noise of whole orders, too), which is what lets accountants treat it as one.

**How it is drawn.** Of 2¹⁶ slots of the same probability, every number is given as many as go into its own, so that 16
random bits and one look-up are a draw; for what is left over, 1 to 5 % of all draws, a second draw is made from the
distribution that the slots leave: by a table of its distribution function in 127 bits, cut off where what lies beyond
has a probability under 10⁻³⁷ (13 standard deviations of a Gaussian), looked up with 31 bits and, where these do not
decide (about once in 10⁵ draws), 96 more. The two together are the distribution itself, to those 127 bits (Marsaglia
1963, "Generating discrete random variables in a computer"). Gaussian standard deviations above 1024 are put together of
smaller ones, x + 128·y, which is the discrete Gaussian itself to exp(−2π²·16) ≈ 10⁻¹³⁷ (Micciancio & Walter 2017,
"Gaussian sampling over the integers", corollary 4.1). A Skellam number is the difference of two independent Poisson
numbers of half the variance each; sums of them are Skellam again, which sums of discrete Gaussians are only nearly.

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
from collections.abc import Callable
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
_AT_ONCE = 1 << 16  # draws: what is needed for them stays in the processor's cache
_SLOTS = 1 << 16  # of the same probability, most of which stand for one number
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
    bits = np.random.SFC64(key(context.seed, *path))  # some times as fast as hashing counters
    return np.random.Generator(bits).integers(0, 2**64, count, np.uint64)  # its raw words; other threads may go on


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
    found = np.zeros(len(about), np.int64)
    _add(found, context, purpose, about, _levels(sigma))
    return found


def add_discrete_gaussian(whole: NDArray[Any], context: Context, purpose: str, *, sigma: float) -> None:
    """Add a draw of :func:`discrete_gaussian` to every entry, in place.

    Args:
        whole: whole numbers [entry], as integers or as floats that hold them and their sums with the noise exactly;
            what the noise is to protect.
        context, purpose, sigma: as there.

    Example:
        >>> context, steps = Context(0, 1, 0, secret=known_to_all_who_know_the_seed), np.arange(4, dtype=np.float32)
        >>> noise = discrete_gaussian(context, "example", steps, sigma=3.0)
        >>> add_discrete_gaussian(steps, context, "example", sigma=3.0)
        >>> bool((steps == np.arange(4) + noise).all())
        True
    """
    _add(whole, context, purpose, whole, _levels(sigma))


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
    found = np.zeros(len(about), np.int64)
    _add(found, context, purpose, about, [_Level(_skellam, float(variance), 1)])
    return found


def _levels(sigma: float) -> list[_Level]:
    """What a discrete Gaussian is put together of."""
    check_number("sigma", sigma, above=True)
    if not 0.5 <= sigma < 2.0**45:
        raise ConfigurationError(f"a discrete Gaussian's sigma lies in 0.5 … 2⁴⁵, not {sigma}")
    return [_Level(_gaussian, part, stride) for part, stride in _parts(sigma)]


def _parts(sigma: float) -> list[tuple[float, int]]:
    """Standard deviations that a table can hold, and their strides: σ² = Σ (stride · part)².

    Each part is the narrowest that leaves no trace: 1/part² + 1/rest² = 1/(4 · 128)², by which both are 16 times what
    the square of the stride asks for. Narrow ones leave less to be drawn twice.
    """
    parts, stride = [], 1
    while sigma > _WIDEST:
        part = sigma * math.sqrt((1 - math.sqrt(max(1 - (_WIDEST / sigma) ** 2, 0.0))) / 2)
        parts.append((part, stride))
        sigma = math.sqrt(sigma**2 - part**2) / _STRIDE
        stride *= _STRIDE
    return [*parts, (sigma, stride)]


class _Level(NamedTuple):
    """Numbers of one law, times a stride."""

    law: Callable[[float], _Law]
    width: float
    stride: int


class _Wanted(NamedTuple):
    """What words are wanted for."""

    context: Context
    purpose: str
    about: NDArray[Any]

    def words(self, count: int, more: str = "") -> Words:
        return source(self.context)(self.context, self.purpose + more, self.about, count).astype("<u8", copy=False)


class _Drawn(NamedTuple):
    """Draws of one level: words of 16 bits [entry], the places of those that stand for no number, and theirs."""

    words: NDArray[np.uint16]
    places: NDArray[np.int64]
    rest: NDArray[np.int64]

    @staticmethod
    def of(wanted: _Wanted, law: _Law) -> _Drawn:
        count = len(wanted.about)
        words = wanted.words(-(-count // 4)).view("<u2")[:count]
        places = np.flatnonzero(words >= law.decided)
        return _Drawn(words, places, law.rest.draws(wanted, len(places)))

    def add_to(self, total: NDArray[Any], level: _Level) -> None:
        values = _values(level.law, level.width, level.stride, total.dtype.str)
        scratch = np.empty(min(len(total), _AT_ONCE), total.dtype)
        for at in range(0, len(total), _AT_ONCE):
            some = total[at : at + _AT_ONCE]
            # "wrap" only because it needs no check: no word of 16 bits is beyond the table.
            some += values.take(self.words[at : at + _AT_ONCE], out=scratch[: len(some)], mode="wrap")
        total[self.places] += (self.rest * level.stride).astype(total.dtype)


def _add(
    total: NDArray[Any], context: Context, purpose: str, about: NDArray[Any], levels: list[_Level]
) -> None:  # fmt: skip
    """total += draws of all levels. All words are drawn before anything is added: ``about`` may be the total."""
    drawn = [_Drawn.of(_Wanted(context, f"{purpose}/{i}", about), at.law(at.width)) for i, at in enumerate(levels)]
    for found, level in zip(drawn, levels, strict=True):
        found.add_to(total, level)


class _Law(NamedTuple):
    """A symmetric distribution over the whole numbers, as 2¹⁶ slots of the same probability.

    Attributes:
        values: int64 [65536]: the numbers that the first slots stand for, beginning with 0; and 0 for the others.
        decided: how many slots stand for a number.
        rest: what a draw is distributed like that hits one of the others.
    """

    values: NDArray[np.int64]
    decided: int
    rest: _Table

    @staticmethod
    def of(masses: list[int]) -> _Law:
        """From what the magnitudes 0, 1, 2, ... are worth, on one side."""
        total = masses[0] + 2 * sum(masses[1:])
        shares = [divmod(mass * _SLOTS, total) for mass in masses]
        slots = np.array([whole for whole, _ in shares])
        both = np.stack([slots, slots], 1).ravel()[1:]  # 0, 1, −1, 2, −2, ...
        numbers = np.arange(1, len(both) + 1) // 2 * np.where(np.arange(len(both)) % 2, 1, -1)
        values, decided = np.zeros(_SLOTS, np.int64), int(both.sum())
        values[:decided] = np.repeat(numbers, both)
        return _Law(values, decided, _tabled([left for _, left in shares]))


@lru_cache(maxsize=16)
def _values(law: Callable[[float], _Law], width: float, stride: int, dtype: str) -> NDArray[Any]:
    """A law's values times a stride, as they are added."""
    return (law(width).values * stride).astype(dtype)


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

    def draws(self, wanted: _Wanted, count: int) -> NDArray[np.int64]:
        """So many draws [draw], two from a word: 31 of 32 bits find the magnitude, the last one is the sign."""
        if not count:
            return np.empty(0, np.int64)
        words = wanted.words(-(-count // 2), "/rest").view("<u4")[:count]
        first = words >> np.uint32(1)
        found = self.below(first)
        undecided = np.flatnonzero((found > 0) & (self.first.take(found - 1) == first))
        if len(undecided):  # the first 31 bits are those of a threshold
            more = wanted.words(2 * len(undecided), "/second").reshape(-1, 2).tolist()
            for i, (a, b) in zip(undecided.tolist(), more, strict=True):
                found[i] = self.find(int(first[i]), (a << 64 | b) >> 128 - _REST)
        sign = -(words & np.uint32(1)).astype(np.int64)  # 0 or −1: (x ^ sign) − sign is x or −x
        return (found ^ sign) - sign


@lru_cache(maxsize=64)
def _gaussian(sigma: float) -> _Law:
    """The law of a discrete Gaussian."""
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
    return _Law.of(masses)


@lru_cache(maxsize=64)
def _skellam(variance: float) -> _Law:
    """The law of a Skellam number: P(n) ∝ Iₙ(variance), the modified Bessel functions, by their recurrence
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
    return _Law.of(masses[::-1])


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
