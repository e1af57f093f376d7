"""Noise that hangs together over rounds: differential privacy for cohorts that are not sampled at random (DP-FTRL).

:func:`correlated` clips like :func:`~foedus.privacy.mechanisms.central`, and adds noise to combinations of this
round's sum and of earlier ones that a :mod:`strategy <foedus.privacy.strategies>` chooses; what it gives the server
optimiser is put together of the noisy numbers only. The whole run is *one* release of the Gaussian mechanism.

What the server keeps for it, sums of the last few rounds without noise, is as secret as updates: it lies in the run's
state, so that a run which goes on ends with the same bytes, and checkpoints of such a run belong to nobody else.

Sources: Kairouz et al. 2021 (DP-FTRL); Denisov et al. 2022, "Improved differential privacy for SGD via optimal private
linear operators on adaptive streams" (theorem 2.1: what is released may decide what comes next); Choquette-Choo et al.
2023 (several participations).

Not here: strategies (``strategies.py``), who comes when (``foedus.spaced``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, lift, unlift
from foedus.core.values import Context, Message, State
from foedus.errors import ConfigurationError, NoGuarantee, SumOverflow
from foedus.privacy.mechanisms import central, grid
from foedus.privacy.noise import discrete_gaussian
from foedus.privacy.strategies import Strategy
from foedus.tree import Layout, Vector

_MOST = 2.0**62


def correlated(strategy: Strategy, *, clip: float, noise_multiplier: float, cohort: float) -> Aggregator:
    """The mean of clipped updates, with noise that hangs together over rounds as a strategy says.

    ``noise_multiplier`` is that of the *whole run*, with all participations of a client: ``foedus.calibrate(epsilon,
    delta, rounds=1, cohort=...)`` finds it. Participations must be as far apart as the strategy says: give
    ``simulate(cohort=foedus.spaced(clients, separation=...))``.

    Args:
        strategy: ``banded(rounds, separation=...)``, ``buffered_toeplitz(rounds)`` or ``tree(rounds)``, of
            ``foedus.privacy``.
        clip: the bound C of one client's contribution to a round.
        noise_multiplier: z, of the whole run.
        cohort: planned clients in a round, by which the sum is divided, however many come.

    Raises:
        ConfigurationError: it is given something else than a strategy.

    Example:
        >>> from foedus.privacy.strategies import banded
        >>> correlated(banded(100, separation=10), clip=1.0, noise_multiplier=2.0, cohort=50).event.after(100)
        2.0
    """
    if not isinstance(strategy, Strategy):
        raise ConfigurationError(
            f"correlated() takes a strategy, e.g. foedus.privacy.banded(100, separation=10); not {strategy!r}"
        )
    plain = central(clip=clip, noise_multiplier=noise_multiplier, cohort=cohort)
    stream = _Stream(strategy, float(clip), float(noise_multiplier), float(cohort))
    label = f"correlated({strategy.label}, clip={clip}, noise_multiplier={noise_multiplier}, cohort={cohort})"
    return plain._replace(
        init=stream.init, decode=stream.decode, event=strategy.event(float(noise_multiplier)), label=label, streams=True
    )


class _Stream(NamedTuple):
    """The server's part."""

    strategy: Strategy
    clip: float
    noise_multiplier: float
    cohort: float

    def init(self, layout: Layout) -> State:
        return self.strategy.first(layout.size) | {"round": np.zeros(1, np.int64)}

    def decode(self, state: State, message: Message, context: Context) -> tuple[Vector, State]:
        """Rounds that were left out since the last one are made up for: they were rounds of nobody."""
        total = unlift(lift(message)) / self._step(context.size)
        last = int(state["round"][0])
        if not last < context.round <= self.strategy.rounds:
            raise NoGuarantee(
                f"round {context.round} comes after round {last} of {self.strategy.label}, whose noise was planned for "
                f"{self.strategy.rounds} rounds, each once. Plan more: the noise of a run cannot be prolonged"
            )
        update = np.zeros(len(total))
        for round in range(last + 1, context.round + 1):
            here = total if round == context.round else np.zeros(len(total))
            found, state = self._released(state, here, context._replace(round=round))
            update += found
        return update / self.cohort, state | {"round": np.array([context.round])}

    def _step(self, size: int) -> float:
        return grid(self.clip, self.noise_multiplier, size)

    def _released(
        self, state: State, total: NDArray[np.float64], context: Context
    ) -> tuple[NDArray[np.float64], State]:  # fmt: skip
        """One round's sum, in steps, as it is used."""
        strategy, step = self.strategy, self._step(context.size)
        largest = max(float(total.max(initial=0.0)), -float(total.min(initial=0.0)))
        if largest * strategy.growth >= _MOST:
            raise SumOverflow(
                f"a sum of {largest:.3g} steps of {step:g} is no longer exact after {strategy.label}. Let fewer "
                "clients take part at once"
            )
        whole, state = strategy.noised(state, context.round, total.astype(np.int64))
        sigma = self.noise_multiplier * math.sqrt(strategy.squared) * (self.clip / step)
        whole += discrete_gaussian(context, "correlated", whole, sigma=sigma)
        noisy = np.multiply(whole, step / strategy.unit, dtype=np.float64)
        return strategy.released(state, context.round, noisy)
