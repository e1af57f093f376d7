"""Membership inference: was this very example among those that the model was trained on?

Two attacks, by what the attacker has beside the model:

* :func:`by_loss`: nothing; examples of small loss are taken for members (Yeom, Giacomelli, Fredrikson, Jha 2018,
  "Privacy risk in machine learning");
* :func:`by_likelihood_ratio`: data of the same kind, and the means to train a few models of its own, half of which saw
  each example; how the loss differs between them is compared with the model's (LiRA: Carlini, Chien, Nasr, Song,
  Terzis, Tramèr 2022, "Membership inference attacks from first principles").

An average says little about the few who can be told for sure. So the figure to look at is the share of members that are
found while 1 % of the others are accused (``tpr``), which guessing puts at 1 %.

Losses come from ``Trainer.evaluate`` on one example at a time, so that any task of any framework can be attacked.
Not here: membership of a whole client, which canaries measure (``canaries.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.checks import check_whole
from foedus.core.examples import Examples
from foedus.core.random import generator
from foedus.core.task import Task
from foedus.errors import ConfigurationError, DataError

Scores = NDArray[np.float64]
Fit = Callable[[Examples, int], Weights]  # (examples, number of the model) -> a model trained on them

FALSE_ALARMS = 0.01


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well members can be told from others.

    Attributes:
        inside, outside: the scores of members and of others; more means "member".
        label: of the attack.

    Example:
        >>> Membership(inside=np.array([2.0, 3.0]), outside=np.array([0.0, 1.0]), label="loss").auc
        1.0
    """

    inside: Scores
    outside: Scores
    label: str

    @property
    def auc(self) -> float:
        """The chance that a member scores above another; 0.5 is guessing."""
        both = np.concatenate([self.inside, self.outside])
        _, rank, counts = np.unique(both, return_inverse=True, return_counts=True)
        places = (np.cumsum(counts) - (counts - 1) / 2)[rank.reshape(-1)]
        n, m = len(self.inside), len(self.outside)
        return float((places[:n].sum() - n * (n + 1) / 2) / (n * m))

    @property
    def advantage(self) -> float:
        """The largest difference of the shares of members and of others above a threshold, 0 to 1."""
        found, false = self.curve
        return float((found - false).max())

    @property
    def by_chance(self) -> float:
        """The advantage that guessing exceeds once in 20 times with so many examples (Kolmogorov–Smirnov)."""
        n, m = len(self.inside), len(self.outside)
        return 1.36 * math.sqrt((n + m) / (n * m))

    @property
    def tpr(self) -> float:
        """The share of members found while at most 1 % of the others are accused; 0.01 is guessing."""
        found, false = self.curve
        return float(found[false <= FALSE_ALARMS].max(initial=0.0))

    @property
    def curve(self) -> tuple[Scores, Scores]:
        """Shares of members and of others above every threshold, [threshold], from the strictest on."""
        levels = np.unique(np.concatenate([self.inside, self.outside]))[::-1]
        above = [1 - np.searchsorted(np.sort(s), levels, side="left") / len(s) for s in (self.inside, self.outside)]
        return np.concatenate([[0.0], above[0]]), np.concatenate([[0.0], above[1]])

    def figures(self) -> dict[str, float]:
        """For a record."""
        return {"auc": self.auc, "advantage": self.advantage, "by_chance": self.by_chance, "tpr": self.tpr}


def scored(inside: Any, outside: Any, label: str = "scores") -> Membership:
    """From scores, of which more means "member".

    Raises:
        DataError: one of them is empty, or not finite.

    Example:
        >>> found = scored([3.0, 2.0, 2.0, 5.0], [0.0, 1.0, 2.0, 1.0])
        >>> found.auc, found.advantage, found.tpr
        (0.9375, 0.75, 0.5)
    """
    parts = [np.asarray(s, np.float64).reshape(-1) for s in (inside, outside)]
    if not all(len(part) and np.isfinite(part).all() for part in parts):
        raise DataError(
            f"membership is judged by finite scores of members and of others; there are {len(parts[0])} and "
            f"{len(parts[1])}, and all of them have to be numbers"
        )
    return Membership(inside=parts[0], outside=parts[1], label=label)


def by_loss(task: Task, weights: Weights, *, members: Examples, others: Examples) -> Membership:
    """Take examples of small loss for members.

    Args:
        task: model and loss.
        weights: of the trained model.
        members: examples that it was trained on.
        others: of the same kind, which it was not.

    Example:
        >>> from foedus.core.linear import logistic
        >>> task, data = Task(logistic(2, 2)), Examples.of(np.eye(2), [0, 1])
        >>> by_loss(task, open_trainer(task, seed=0).initial(), members=data, others=data).auc
        0.5
    """
    trainer = open_trainer(task, seed=0)
    inside, outside = (-losses(trainer, weights, part) for part in (members, others))
    return scored(inside, outside, "loss threshold")


def by_likelihood_ratio(
    task: Task, weights: Weights, fit: Fit, *, members: Examples, others: Examples, shadows: int = 8, seed: int = 0
) -> Membership:
    """Compare the model with models of the attacker's own that were, or were not, trained on each example.

    Shadow models come in pairs that share the examples out between them, so that each example is in half of them.
    With so few, spreads are estimated over all examples together, as the paper does.

    Args:
        task, weights, members, others: as for :func:`by_loss`.
        fit: (examples, number) -> weights: trains a model as the one that is attacked was.
        shadows: how many; an even number.
        seed: who is in which.

    Raises:
        ConfigurationError: the number of shadows is odd.

    Example:
        >>> from foedus.core.linear import logistic
        >>> task, data = Task(logistic(2, 2)), Examples.of(np.eye(2), [0, 1])
        >>> same = open_trainer(task, seed=0).initial()  # of models that learn nothing, nothing can be told
        >>> by_likelihood_ratio(task, same, lambda e, i: same, members=data, others=data, shadows=2).auc
        0.5
    """
    check_whole("shadows", shadows, least=2)
    if shadows % 2:
        raise ConfigurationError(f"shadow models come in pairs; write shadows={shadows + 1} instead of {shadows}")
    trainer = open_trainer(task, seed=0)
    pool = joined(members, others)
    draws = generator(seed, "shadows")
    scores, was_in = np.empty((shadows, len(pool))), np.empty((shadows, len(pool)), bool)
    for first in range(0, shadows, 2):
        half = draws.permutation(len(pool)) < len(pool) // 2
        for number, chosen in ((first, half), (first + 1, ~half)):
            own = fit(pool.take(np.flatnonzero(chosen)), number)
            scores[number], was_in[number] = confidence(losses(trainer, own, pool)), chosen
    ratio = _ratio(confidence(losses(trainer, weights, pool)), scores, was_in)
    return scored(ratio[: len(members)], ratio[len(members) :], f"likelihood ratio, {shadows} shadow models")


def losses(trainer: Trainer, weights: Weights, examples: Examples) -> Scores:
    """The loss of every example by itself, [example]; those that are no number are taken for very large."""
    found = [trainer.evaluate(weights, examples.take(slice(i, i + 1)))["loss"] for i in range(len(examples))]
    return np.asarray(np.nan_to_num(np.array(found, np.float64), nan=1e6, posinf=1e6, neginf=-1e6))


def confidence(values: Scores) -> Scores:
    """log(p / (1 − p)) of the probability p = exp(−loss) that the model gives to the truth, whose distribution over
    models is near a normal one; minus the loss itself where losses are no logarithms of probabilities."""
    if (values < 0).any():
        return -values
    bounded = np.clip(values, 1e-12, 50.0)
    return np.asarray(-bounded - np.log(-np.expm1(-bounded)))


def joined(first: Examples, second: Examples) -> Examples:
    """One set of examples after the other."""
    inputs = tuple(np.concatenate(pair) for pair in zip(first.inputs, second.inputs, strict=True))
    return Examples(inputs, np.concatenate([first.targets, second.targets]))


def _ratio(found: Scores, scores: NDArray[np.float64], was_in: NDArray[np.bool_]) -> Scores:
    """log N(found; in) − log N(found; out) of every example; ``scores``, ``was_in`` [shadow, example]."""

    def fitted(chosen: NDArray[np.bool_]) -> tuple[Scores, float]:
        counts = chosen.sum(0)
        means = np.where(chosen, scores, 0).sum(0) / counts
        spread = np.where(chosen, (scores - means) ** 2, 0).sum() / max(int((counts - 1).clip(0).sum()), 1)
        return means, max(float(spread), 1e-6)

    (mean_in, var_in), (mean_out, var_out) = fitted(was_in), fitted(~was_in)
    return np.asarray((found - mean_out) ** 2 / (2 * var_out) - (found - mean_in) ** 2 / (2 * var_in))
