"""The trainer of one client: what every backend offers, and what simulation and network both use.

A :class:`Trainer` holds one model of one task in one process. It is given flat vectors and numpy examples and
gives back flat vectors, so that nothing outside the backends knows a framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.core.batches import Plan
from foedus.core.client import Client
from foedus.core.population import Examples
from foedus.core.task import Metric
from foedus.tree import Layout, Vector


class Weights(NamedTuple):
    """A model's state: trainable parameters [parameter] and buffers [buffer], both flat."""

    vector: Vector
    buffers: Vector


class Assignment(NamedTuple):
    """One client's local training in one round.

    ``plan`` is of this client alone; ``observe(step, weights)``, if given, is called before the first and
    after every local step. ``anchor`` [parameter] is what penalties pull towards instead of the weights that training
    begins from; ``shift`` and ``mask`` [parameter] steer every gradient (:class:`foedus.core.client.Steering`).
    """

    spec: Client
    examples: Examples
    plan: Plan
    round: int
    client: object
    observe: Callable[[int, Weights], None] | None = None
    anchor: Vector | None = None
    shift: Vector | None = None
    mask: Vector | None = None


def leaves_of(layout: Layout, vector: Vector | None) -> list[NDArray[Any]]:
    """The arrays of a flat vector; none without one."""
    return [] if vector is None else list(layout.unflatten(vector).values())


class Trained(NamedTuple):
    """The weights after local training, and the mean loss over its steps."""

    weights: Weights
    loss: float


class Trainer(Protocol):
    """One task's model in one process. Law: ``train`` depends on its arguments only."""

    layout: Layout
    buffer_layout: Layout
    backend: str
    device: str

    def initial(self) -> Weights:
        """Fresh weights, a function of the seed the trainer was opened with."""

    def train(self, start: Weights, work: Assignment) -> Trained:
        """Carry out one client's local training. Raises TrainingError with client, round, step and batch."""

    def evaluate(self, weights: Weights, examples: Examples) -> dict[str, float]:
        """Mean loss and the task's metrics over a set of examples."""

    def predict(self, weights: Weights, examples: Examples) -> NDArray[Any]:
        """The model's outputs, in evaluation mode, [B, ...]."""

    def model(self, weights: Weights) -> Any:
        """The user's own kind of model with these weights, e.g. a torch module."""


class Tally:
    """Loss and metrics over batches of predictions, exact over the union of the batches."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics
        self._sums = {m.name: (0.0, 0) for m in metrics if not m.whole}
        self._loss, self._count = 0.0, 0
        self._kept: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def add(self, loss: float, output: NDArray[Any], target: NDArray[Any]) -> None:
        count = len(target)
        self._count += count
        self._loss += loss * count
        for metric in self._metrics:
            if not metric.whole:
                values = np.ma.asarray(metric.value(output, target))
                total, counted = self._sums[metric.name]
                added = values.filled(0).sum(dtype=np.float64)
                self._sums[metric.name] = (total + float(added), counted + int(values.count()))
        if any(m.whole for m in self._metrics):
            self._kept.append((output, target))

    def result(self) -> dict[str, float]:
        if not self._count:
            return dict.fromkeys(["loss", *(m.name for m in self._metrics)], float("nan"))
        figures = {"loss": self._loss / self._count}
        for metric in self._metrics:
            if metric.whole:
                output, target = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
                value = float(metric.value(output, target))
            else:
                total, counted = self._sums[metric.name]
                value = total / counted if counted else float("nan")
            figures[metric.name] = metric.finish(value)
        return figures
