"""Strategies: how noise of different rounds hangs together, so that it nearly cancels in what a model becomes.

A model is the sum of all updates so far. Fresh noise in every round adds up there like a random walk. If a round's
noise takes back part of the noise of earlier ones, much less is left, at the same ε: what is made private is not the
sums x of the rounds but C x, for a lower triangular matrix C, and what is used is C⁻¹ (C x + noise) = x + C⁻¹ noise.
Nobody has to be sampled at random for it, and who takes part need not be secret. One client must only not come too
often: what it changes in C x is bounded by how long a column of C is, and by how many columns it is in.

* :func:`tree`: running sums from sums over blocks of 1, 2, 4, ... rounds (Kairouz et al. 2021, "Practical and private
  (deep) learning without sampling or shuffling"; Dwork et al. 2010, Chan et al. 2011).
* :func:`banded`: C is a band of diagonals, each of one number, found by minimising the error of the running sums
  (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization"; Toeplitz: McMahan et al. 2024, "A hassle-free
  algorithm for strong differential privacy in federated learning systems"). Participations as far apart as there are
  bands touch different rows, so that their squares add up.

All numbers are whole: what gets noise are whole numbers, and what is made of it afterwards is nobody's secret.

Not here: clipping and noise (``streams.py``), who comes when (``foedus.spaced``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.values import State
from foedus.errors import ConfigurationError, MissingExtra
from foedus.privacy.events import BandedStream, Stream, TreeStream

Whole = NDArray[np.int64]

UNIT = 1 << 16  # the first coefficient of a band: the others are whole multiples of 1 / UNIT of it
_MOST_BANDS = 32


class Strategy(NamedTuple):
    """A strategy, as pure functions.

    Attributes:
        rounds: planned; there can be no more.
        separation: rounds from one participation of a client to its next, at least.
        label: how it was made.
        squared: of everything that a client may change in what gets noise, in whole numbers, if its contribution has
            norm 1 each time.
        growth: by how much one round's sum may grow before it gets noise.
        unit: what stands for 1 in what gets noise.
        first: size -> what the server keeps.
        noised: (state, round, sum) -> what is to get noise in a round, and the state.
        released: (state, round, what got noise) -> the round's sum as it is used, and the state.
        event: what is accounted for, from the noise's standard deviation over all that a client may change.
    """

    rounds: int
    separation: int
    label: str
    squared: float
    growth: int
    unit: int
    first: Callable[[int], State]
    noised: Callable[[State, int, Whole], tuple[Whole, State]]
    released: Callable[[State, int, NDArray[np.float64]], tuple[NDArray[np.float64], State]]
    event: Callable[[float], Stream]


def participations(rounds: int, separation: int) -> int:
    """How often a client takes part at most.

    Example:
        >>> participations(10, 4)
        3
    """
    return -(-rounds // separation)


# --- bands --------------------------------------------------------------------------------------------------


def banded(rounds: int, *, separation: int, bands: int | None = None) -> Strategy:
    """Noise that takes back part of that of the last few rounds, by the numbers that are best for so many rounds.

    Args:
        rounds: of the run.
        separation: rounds from one participation of a client to its next, at least; ``foedus.spaced()`` keeps to it.
        bands: of how many rounds the noise hangs together, the round itself included: by default ``separation``, at
            most 32. The server keeps two vectors for each.

    Raises:
        ConfigurationError: there are more bands than rounds between participations.
        MissingExtra: ``pip install 'foedus[privacy]'``.

    Example:
        >>> banded(100, separation=10).label
        'banded(100, separation=10, bands=10)'
    """
    check_whole("rounds", rounds)
    check_whole("separation", separation)
    bands = min(separation, _MOST_BANDS, rounds) if bands is None else bands
    check_whole("bands", bands)
    if bands > separation:
        raise ConfigurationError(
            f"with {bands} bands, clients that come back after {separation} rounds meet their own noise again. Write "
            f"bands={separation}, or less, or a larger separation"
        )
    numbers = np.array(coefficients(int(rounds), int(bands)), np.int64)
    often, size = participations(rounds, separation), len(numbers) - 1
    squared = float(np.sum(numbers.astype(np.float64) ** 2))

    def noised(state: State, round: int, total: Whole) -> tuple[Whole, State]:
        whole = numbers[0] * total
        for number, earlier in zip(numbers[1:], state["sums"], strict=True):
            whole += number * earlier
        return whole, state | {"sums": np.concatenate([total[None], state["sums"][:-1]])[:size]}

    def released(state: State, round: int, noisy: NDArray[np.float64]) -> tuple[NDArray[np.float64], State]:
        found = noisy.copy()
        for number, earlier in zip(numbers[1:], state["released"], strict=True):
            found -= (number / UNIT) * earlier
        return found, state | {"released": np.concatenate([found[None], state["released"][:-1]])[:size]}

    return Strategy(
        int(rounds), int(separation), f"banded({rounds}, separation={separation}, bands={bands})", often * squared,
        int(np.abs(numbers).sum()), UNIT,
        lambda n: {"sums": np.zeros((size, n), np.int64), "released": np.zeros((size, n))}, noised, released,
        lambda z: BandedStream(z * math.sqrt(often), int(rounds), int(separation)),
    )  # fmt: skip


@lru_cache(maxsize=64)
def coefficients(rounds: int, bands: int) -> tuple[int, ...]:
    """The numbers on the diagonals of C, in units of 1 / ``UNIT``, that make the mean squared error of all running sums
    smallest: L-BFGS with its exact gradient from the best numbers for endlessly many bands, (2j choose j) / 4ʲ
    (Fichtenberger, Henzinger & Upadhyay 2023).

    Example:
        >>> [round(c / UNIT, 2) for c in coefficients(100, 3)]
        [1.0, 0.74, 0.62]
    """
    if bands == 1:
        return (UNIT,)
    start = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])[1:]
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingExtra("scipy", "privacy", "Correlated noise") from error
    found = minimize(
        _error, start, args=(rounds,), jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-13}
    )
    return (UNIT, *(round(float(c) * UNIT) for c in found.x))


def _error(rest: NDArray[np.float64], rounds: int) -> tuple[float, NDArray[np.float64]]:
    """The logarithm of the squared length of a column of C times the mean squared error, and its gradient."""
    from scipy.signal import lfilter

    column = np.concatenate([[1.0], rest])
    weights = np.arange(rounds, 0, -1.0)  # of how many running sums each entry of A C⁻¹ is part
    sums = lfilter([1.0], column, np.ones(rounds))  # the first column of A C⁻¹; all others are shifts of it
    error, length = float(weights @ sums**2), float(column @ column)
    spread, weighed = lfilter([1.0], column, sums), weights * sums
    slope = [-2 * float(weighed[m:] @ spread[: rounds - m]) for m in range(1, len(column))]
    return math.log(error) + math.log(length), np.array(slope) / error + 2 * rest / length


# --- trees --------------------------------------------------------------------------------------------------


def tree(rounds: int, *, separation: int | None = None) -> Strategy:
    """Running sums from noisy sums over blocks: every running sum is put together of at most log₂(rounds) + 1 of them.

    Args:
        rounds: of the run.
        separation: rounds from one participation of a client to its next, at least; by default every client takes part
            once.

    Example:
        >>> tree(2000).event(1.0).after(2000)
        1.0
    """
    check_whole("rounds", rounds)
    separation = rounds if separation is None else separation
    check_whole("separation", separation)
    levels = rounds.bit_length()
    whole = TreeStream(1.0, int(rounds), int(separation))

    def noised(state: State, round: int, total: Whole) -> tuple[Whole, State]:
        sums = state["sums"] + total
        level = _level(round)
        found = sums[level].copy()
        sums[: level + 1] = 0  # their blocks end here
        return found, state | {"sums": sums}

    def released(state: State, round: int, noisy: NDArray[np.float64]) -> tuple[NDArray[np.float64], State]:
        level, nodes = _level(round), state["nodes"].copy()
        found = noisy - nodes[:level].sum(0)  # the new block in place of the smaller ones within it
        nodes[level] = noisy
        return found, state | {"nodes": nodes}

    label = f"tree({rounds}{'' if separation == rounds else f', separation={separation}'})"
    return Strategy(
        int(rounds), int(separation), label, whole.squared(rounds), int(rounds), 1,
        lambda n: {"sums": np.zeros((levels, n), np.int64), "nodes": np.zeros((levels, n))}, noised, released,
        lambda z: TreeStream(z * math.sqrt(whole.squared(rounds)), int(rounds), int(separation)),
    )  # fmt: skip


def _level(round: int) -> int:
    """Of the block that ends with a round: the round's last bits that are 0."""
    return (round & -round).bit_length() - 1


def noise_matrix(strategy: Strategy, rounds: int | None = None) -> NDArray[np.float64]:
    """Row by row, how each round's noise enters what is used in each round, in units of the noise: C⁻¹ [round, round]
    of a band, and for a tree what takes its place. The running sums of its columns say how much noise the model has.

    Args:
        strategy: any.
        rounds: by default all that are planned.

    Example:
        >>> noise_matrix(tree(4)).astype(int).tolist()
        [[1, 0, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, -1, -1, 1]]
    """
    count = strategy.rounds if rounds is None else rounds
    state, rows, nothing = strategy.first(count), [], np.zeros(count, np.int64)
    for round in range(1, count + 1):
        noise = np.zeros(count)
        noise[round - 1] = 1.0
        _, state = strategy.noised(state, round, nothing)
        found, state = strategy.released(state, round, noise)
        rows.append(found)
    return np.array(rows)


def prefix_error(strategy: Strategy) -> float:
    """The root of the mean squared error of the running sums, for a noise multiplier and a bound of 1: what is left of
    the noise in the model, on average over the rounds. Fresh noise in every round has √(participations · rounds / 2).

    Example:
        >>> fresh, bands = banded(100, separation=100, bands=1), banded(100, separation=100)
        >>> round(prefix_error(fresh), 1), round(prefix_error(bands), 1)
        (7.1, 2.4)
    """
    sums = np.cumsum(noise_matrix(strategy), 0)
    return math.sqrt(strategy.squared * float((sums**2).sum()) / strategy.rounds) / strategy.unit
