"""Noise that hangs together over all rounds, in a few buffers: buffered linear Toeplitz matrices.

Bands (``strategies.py``) take back noise of the last few rounds, and the server keeps two vectors for each of these.
For runs of hundreds of rounds in which clients come back late, or never, noise should be taken back over hundreds of
rounds. Here the diagonals of C are sums of a few geometric sequences,

    c₀ = 1,  cᵢ = Σⱼ ωⱼ θⱼⁱ⁻¹,

which come near to the best matrix there is, while C x and C⁻¹ need one vector for each j only: sⱼ ← θⱼ sⱼ + x
(Dvijotham, McMahan, Pillutla, Steinke & Thakurta 2024, "Efficient and near-optimal noise generation for streaming
differential privacy"; McMahan, Xu & Zhang 2024, "A hassle-free algorithm for strong differential privacy in federated
learning systems"). ω and θ are found offline, by minimising the error of the running sums for the rounds and the
separation planned.

**What a client changes.** With decreasing cᵢ ≥ 0 it changes most by coming as early and as often as it may (Kalinin &
Lampert 2024, "Banded square root matrix factorization for differentially private model training", theorem 2). What gets
noise are whole numbers here as everywhere, so that C x is rounded, to 1/256 of a step of the grid. That is covered: two
runs that differ by one client are rounded apart by at most 5/4 of that in any entry of any round, while the bound of a
contribution has at least 64 √entries steps.

Not here: clipping and noise (``streams.py``), who comes when (``foedus.spaced``).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.values import State
from foedus.errors import MissingExtra, SumOverflow
from foedus.privacy.events import ToeplitzStream, toeplitz
from foedus.privacy.strategies import Strategy, Whole

_UNIT = 1 << 8  # units in a step of the grid
_FEWEST = 64  # steps in the bound of a contribution, times √entries: ``mechanisms.grid`` sees to that
_APART = 1.25  # units by which two runs may be rounded apart: 1, and twice what float64 may add to each
_ADDED = 2.0**-4  # of which this is half
_STARTS = ((0.9, 0.5), (0.99, 0.7), (0.999, 0.9))  # the slowest decay, and the next ones' share of it


def buffered_toeplitz(rounds: int, *, separation: int | None = None, buffers: int = 3) -> Strategy:
    """Noise that takes back part of that of all rounds before, by a few vectors whatever the number of rounds.

    Better than ``banded`` where many rounds pass until a client comes back, or where it never does; ``prefix_error``
    tells. Participations may meet each other's noise, unlike there: that is accounted for.

    Args:
        rounds: of the run.
        separation: rounds from one participation of a client to its next, at least, as ``foedus.spaced()`` keeps it; by
            default every client takes part once.
        buffers: how many sequences the diagonals are put together of. The server keeps two vectors for each.

    Raises:
        MissingExtra: ``pip install 'foedus[privacy]'``.

    Example:
        >>> from foedus.privacy.strategies import banded, prefix_error
        >>> round(prefix_error(buffered_toeplitz(300)), 1), round(prefix_error(banded(300, separation=300)), 1)
        (2.7, 3.2)
    """
    check_whole("rounds", rounds)
    separation = rounds if separation is None else separation
    check_whole("separation", separation)
    check_whole("buffers", buffers)
    omegas, thetas = parameters(int(rounds), int(separation), int(buffers))
    omega, theta = np.array(omegas)[:, None], np.array(thetas)[:, None]
    event = ToeplitzStream(1.0, int(rounds), int(separation), omegas, thetas)
    rounded = _APART * math.sqrt(rounds) / (_FEWEST * _UNIT)
    squared = (_UNIT * (math.sqrt(event.squared(rounds)) + rounded)) ** 2
    longest = 1 / (1 - max(thetas))  # what is rounded in a sum stays in it for about so many rounds
    most = _ADDED * 2.0**51 / (_UNIT * longest)

    def noised(state: State, round: int, total: Whole) -> tuple[Whole, State]:
        whole = _UNIT * total + np.rint(_UNIT * (omega * state["sums"]).sum(0)).astype(np.int64)
        sums = theta * state["sums"] + total
        if (largest := float(np.abs(sums).max(initial=0.0))) > most:
            raise SumOverflow(
                f"a sum of {largest:.3g} steps is too long for {buffers} buffers of float64. Let fewer clients take "
                "part at once, or take banded()"
            )
        return whole, state | {"sums": sums}

    def released(state: State, round: int, noisy: NDArray[np.float64]) -> tuple[NDArray[np.float64], State]:
        found = noisy - (omega * state["released"]).sum(0)
        return found, state | {"released": theta * state["released"] + found}

    label = f"buffered_toeplitz({rounds}, separation={separation}, buffers={buffers})"
    return Strategy(
        int(rounds), int(separation), label, squared, 2 * _UNIT, _UNIT,
        lambda n: {"sums": np.zeros((buffers, n)), "released": np.zeros((buffers, n))}, noised, released,
        lambda z: ToeplitzStream(z, int(rounds), int(separation), omegas, thetas),
    )  # fmt: skip


@lru_cache(maxsize=64)
def parameters(rounds: int, separation: int, buffers: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ω and θ that make the error of all running sums smallest, for what a client may change: L-BFGS from a few starts,
    θ by logits, and ω as shares of what keeps Σ ω below 1, so that the diagonals decrease.

    Example:
        >>> omegas, thetas = parameters(100, 100, 2)
        >>> sum(omegas) < 1, all(0 < theta < 1 for theta in thetas)
        (True, True)
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingExtra("scipy", "privacy", "Correlated noise") from error

    def loss(free: NDArray[np.float64]) -> float:
        return _error(*_bounded(free), rounds, separation)

    best = None
    for slowest, share in _STARTS:
        thetas = 1 - (1 - slowest) * (1 / (1 - share)) ** np.arange(buffers) if buffers > 1 else np.array([slowest])
        thetas = np.clip(thetas, 0.02, slowest)
        start = np.concatenate([np.zeros(buffers), np.log(thetas / (1 - thetas))])
        found = minimize(loss, start, method="L-BFGS-B", bounds=[(-12, 12)] * (2 * buffers), options={"maxiter": 400})
        best = found if best is None or found.fun < best.fun else best
    omegas, thetas = _bounded(best.x)  # type: ignore[union-attr]
    order = np.argsort(-thetas)
    return tuple(omegas[order].tolist()), tuple(thetas[order].tolist())


def _bounded(free: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """ω and θ, from numbers without bounds."""
    shares, logits = np.split(free, 2)
    raised = np.exp(shares - max(shares.max(), 0.0))
    omegas = raised / (math.exp(-max(float(shares.max()), 0.0)) * 0.1 + raised.sum())
    return omegas, 1 / (1 + np.exp(-logits))


def _error(omegas: NDArray[np.float64], thetas: NDArray[np.float64], rounds: int, separation: int) -> float:
    """The logarithm of what a client may change, squared, times the mean squared error."""
    from scipy.signal import lfilter

    # As a filter, C is P / Q with Q = Π (1 − θ q) and P = Q + Σ ω q Π' (1 − θ q), the factor of its own left out.
    below = np.array([1.0])
    for theta in thetas:
        below = np.convolve(below, [1.0, -theta])
    above = below.copy()
    for j, omega in enumerate(omegas):
        others = np.array([omega])
        for theta in np.delete(thetas, j):
            others = np.convolve(others, [1.0, -theta])
        above[1:] += others
    sums = lfilter(below, above, np.ones(rounds))  # the first column of A C⁻¹
    error = float(np.arange(rounds, 0, -1.0) @ sums**2)
    changed = float(np.sum(toeplitz(tuple(omegas), tuple(thetas), rounds, separation) ** 2))
    return math.log(error) + math.log(changed) if math.isfinite(error) else 1e6
