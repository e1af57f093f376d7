"""Server optimisers: what the server does with the aggregated update.

The aggregated update Δ is a pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization",
algorithm 2): the server takes an optimiser's step along it. All are values of two pure functions, and all
state is a dict of numpy arrays, so that it is checkpointed like a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foedus.core.checks import check_number
from foedus.core.values import State
from foedus.tree import Vector

if TYPE_CHECKING:
    from jaxtyping import Float


class ServerOptimiser(NamedTuple):
    """``init(vector) -> state`` and ``step(state, vector, update, round) -> (vector, state)``.

    ``vector`` and ``update`` are flat [parameter]; rounds count from 1. Pure: arguments are not changed.

    Example:
        >>> s = sgd(lr=0.5)
        >>> w = np.zeros(2, np.float32)
        >>> s.step(s.init(w), w, np.ones(2), 1)[0].tolist()
        [0.5, 0.5]
    """

    init: Callable[[Vector], State]
    step: Callable[[State, Vector, Vector, int], tuple[Vector, State]]
    label: str


def sgd(lr: float = 1.0) -> ServerOptimiser:
    """``w ← w + lr · Δ``. With ``lr=1`` this is plain federated averaging.

    Args:
        lr: how far to go along the aggregated update.

    Example:
        >>> w = np.zeros(1)
        >>> sgd(lr=0.5).step({}, w, np.ones(1), 1)[0].tolist()
        [0.5]
    """
    _positive(lr=lr)

    def step(
        state: State, vector: Float[Vector, " parameter"], update: Float[Vector, " parameter"], round: int
    ) -> tuple[Float[Vector, " parameter"], State]:
        return _moved(vector, lr * update), state

    return ServerOptimiser(lambda vector: {}, step, f"sgd(lr={lr})")


def momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimiser:
    """``m ← β m + Δ;  w ← w + lr · m`` (FedAvgM: Hsu et al. 2019, "Measuring the effects of non-identical
    data distribution").

    Args:
        lr: how far to go along the momentum.
        beta: how much of the momentum is kept from round to round, in [0, 1).

    Example:
        >>> w, optimiser = np.zeros(1), momentum(beta=0.5)
        >>> w, state = optimiser.step(optimiser.init(w), w, np.ones(1), 1)
        >>> optimiser.step(state, w, np.ones(1), 2)[0].tolist()  # 1, and then 1.5 further
        [2.5]
    """
    _positive(lr=lr)
    _fraction(beta=beta)

    def step(
        state: State, vector: Float[Vector, " parameter"], update: Float[Vector, " parameter"], round: int
    ) -> tuple[Float[Vector, " parameter"], State]:
        m = beta * state["m"] + update
        return _moved(vector, lr * m), {"m": m}

    return ServerOptimiser(lambda v: {"m": _zeros(v)}, step, f"momentum(lr={lr}, beta={beta})")


def adagrad(lr: float = 0.1, *, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimiser:
    """FedAdagrad: ``v ← v + Δ²`` (Reddi et al. 2021, algorithm 2).

    Args:
        lr: about how far each parameter moves in a round.
        beta1: momentum, in [0, 1).
        tau: parameters whose updates are much smaller than this move less.

    Example:
        >>> optimiser = adagrad(lr=0.1, tau=1e-9)
        >>> optimiser.step(optimiser.init(np.zeros(2)), np.zeros(2), np.array([3.0, -4.0]), 1)[0].round(3).tolist()
        [0.1, -0.1]
    """
    label = f"adagrad(lr={lr}, beta1={beta1}, tau={tau})"
    return _adaptive(lambda v, square: v + square, rates=(lr, beta1, tau), label=label)


def adam(lr: float = 0.01, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimiser:
    """FedAdam: ``v ← β₂ v + (1 − β₂) Δ²``, without bias correction (Reddi et al. 2021, algorithm 2).

    Args:
        lr: about how far each parameter moves in a round.
        beta1: momentum, in [0, 1).
        beta2: how slowly the mean square of the updates is forgotten, in [0, 1).
        tau: parameters whose updates are much smaller than this move less.

    Example:
        >>> optimiser = adam(lr=0.1, beta1=0.0, beta2=0.0, tau=1e-9)
        >>> optimiser.step(optimiser.init(np.zeros(2)), np.zeros(2), np.array([3.0, -4.0]), 1)[0].round(3).tolist()
        [0.1, -0.1]
    """
    _fraction(beta2=beta2)
    label = f"adam(lr={lr}, beta1={beta1}, beta2={beta2}, tau={tau})"
    return _adaptive(lambda v, square: beta2 * v + (1 - beta2) * square, rates=(lr, beta1, tau), label=label)


def yogi(lr: float = 0.01, *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimiser:
    """FedYogi: ``v ← v − (1 − β₂) Δ² sign(v − Δ²)`` (Reddi et al. 2021, algorithm 2).

    Args:
        lr, beta1, beta2, tau: as for :func:`adam`; the mean square of the updates shrinks more slowly.

    Example:
        >>> optimiser = yogi(lr=0.1, beta1=0.0, beta2=0.0, tau=1e-9)
        >>> optimiser.step(optimiser.init(np.zeros(2)), np.zeros(2), np.array([3.0, -4.0]), 1)[0].round(3).tolist()
        [0.1, -0.1]
    """
    _fraction(beta2=beta2)
    label = f"yogi(lr={lr}, beta1={beta1}, beta2={beta2}, tau={tau})"
    return _adaptive(
        lambda v, square: v - (1 - beta2) * square * np.sign(v - square), rates=(lr, beta1, tau), label=label
    )


def _adaptive(
    second: Callable[[Vector, Vector], Vector], *, rates: tuple[float, float, float], label: str
) -> ServerOptimiser:
    """``m ← β₁ m + (1 − β₁) Δ;  v ← second(v, Δ²);  w ← w + lr · m / (√v + τ)``, with v₀ = τ²."""
    lr, beta1, tau = rates
    _positive(lr=lr, tau=tau)
    _fraction(beta1=beta1)

    def init(vector: Vector) -> State:
        return {"m": _zeros(vector), "v": np.full(vector.shape, tau**2)}

    def step(
        state: State, vector: Float[Vector, " parameter"], update: Float[Vector, " parameter"], round: int
    ) -> tuple[Float[Vector, " parameter"], State]:
        m = beta1 * state["m"] + (1 - beta1) * update
        v = second(state["v"], np.square(update))
        return _moved(vector, lr * m / (np.sqrt(v) + tau)), {"m": m, "v": v}

    return ServerOptimiser(init, step, label)


def _zeros(vector: Vector) -> Vector:
    # State is float64 whatever the model is: second moments of small updates underflow in float32.
    return np.zeros(vector.shape, np.float64)


def _moved(vector: Float[Vector, " parameter"], step: Float[Vector, " parameter"]) -> Float[Vector, " parameter"]:
    return (vector + step).astype(vector.dtype, copy=False)


def _positive(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value, above=True)


def _fraction(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value, below=1)
