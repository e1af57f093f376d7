"""Noise that privacy rests on: discrete Gaussian and Skellam whole numbers from uniform random words, with no floating
point in between, and where the words come from.

**Why whole numbers.** Floating-point Gaussian noise betrays what it was added to: its last bits tell sums apart that
should look alike (Mironov 2012, "On significance of the least significant bits for differential privacy"). Here
updates are whole multiples of a grid, the noise is a discrete Gaussian on that grid (Canonne, Kamath & Steinke 2020,
"The discrete Gaussian for differential privacy"), and they are added exactly; what is divided or scaled
afterwards is nobody's secret any more. For whole shifts the moments of a discrete Gaussian are those of the continuous
one (theorem 4 there; the sums over a lattice do not change when it is shifted by itself, so this holds for the moments
of Poisson-sampled noise of whole orders, too), which is what lets accountants treat it as one.

**How it is drawn.** By a look-up with 16 random bits, and what that does not decide by more (``slots.py``): single
numbers where the distribution is narrow (``tables.py``), blocks of them where it is wide (``blocks.py``), to 127 bits
either way. A Skellam number is the difference of two independent Poisson numbers of half the variance each; sums of
them are Skellam again, which sums of discrete Gaussians are only nearly.

**Where words come from.** A ``Secret`` of a context (``core/values.py``): :func:`system` by default, :func:`keyed` for
a party that must be able to repeat itself after a restart, :func:`known_to_all_who_know_the_seed` for simulations.
Each makes a key for one purpose, and its words are that key's keystream (``core/keystream.py``), which is faster than
what systems and numpy give, and cannot be told from random bits by whoever has not got the key. Timing of the table
look-up is not made constant.

Not here: how much noise (``mechanisms.py``), what it is worth (``accounting.py``).
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number
from foedus.core.keystream import words
from foedus.core.values import Context, Secret
from foedus.errors import ConfigurationError
from foedus.privacy.blocks import wide_gaussian
from foedus.privacy.slots import Slots, Wanted, Words
from foedus.privacy.tables import WIDEST, gaussian
from foedus.privacy.tables import skellam as skellam_law

if TYPE_CHECKING:
    from jaxtyping import Int64


# --- where words come from ----------------------------------------------------------------------------------


def system(context: Context, purpose: str, about: NDArray[Any], count: int) -> Words:
    """Words from a key that the operating system's cryptographic source gives: never the same twice. The default.

    Whoever draws from it must keep what was made of it, and send the same bytes when asked again: noise drawn afresh
    for the same update is averaged out by whoever collects it.

    Example:
        >>> system(Context(0, 1, 0), "example", np.zeros(1), 4).shape
        (4,)
    """
    return words(secrets.token_bytes(32), count)


@dataclass(frozen=True)
class Keyed:
    """See :func:`keyed`."""

    key: bytes

    def __call__(self, context: Context, purpose: str, about: NDArray[Any], count: int) -> Words:
        told = _told(context, purpose, about.dtype.str, *about.shape)
        found = hashlib.shake_256(b"foedus noise 2" + self.key + len(told).to_bytes(8, "little") + told)
        found.update(np.ascontiguousarray(about).data)
        return words(found.digest(32), count)

    def __repr__(self) -> str:
        return "Keyed(<secret>)"


def keyed(key: bytes) -> Secret:
    """Words that are a function of a secret key, of the round, and of the very array that the noise is to protect.

    The same update in the same round gets the same noise, so that a party that was restarted sends the same bytes
    again; any other update, and any other sum of a round that was tried again, gets noise of its own. (Noise that
    depended on the round only would be laid bare by subtracting two attempts.) Their key is SHAKE-256 of all of these.

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
    told = _told(context, purpose, int(context.seed))
    return words(hashlib.sha256(b"foedus counted noise 2" + told).digest(), count)


def _told(context: Context, *more: int | str) -> bytes:
    """What noise is for, in bytes of which no two are alike."""
    return repr((int(context.round), int(context.client), context.channel, *more)).encode()


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
    _gaussian(sigma).add_to(found, Wanted(source(context), context, purpose, about))
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
    _gaussian(sigma).add_to(whole, Wanted(source(context), context, purpose, whole))


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
    if not 0.25 <= variance <= WIDEST**2:
        raise ConfigurationError(f"a Skellam number's variance lies in 1/4 … 2²⁰, not {variance}")
    found = np.zeros(len(about), np.int64)
    skellam_law(float(variance)).add_to(found, Wanted(source(context), context, purpose, about))
    return found


def _gaussian(sigma: float) -> Slots:
    check_number("sigma", sigma, above=True)
    if not 0.5 <= sigma < 2.0**45:
        raise ConfigurationError(f"a discrete Gaussian's sigma lies in 0.5 … 2⁴⁵, not {sigma}")
    return gaussian(float(sigma)) if sigma <= WIDEST else wide_gaussian(float(sigma))
