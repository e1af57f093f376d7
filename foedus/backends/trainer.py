"""The trainer of one client: what every backend offers, and what simulation and network both use.

A :class:`Trainer` holds one model of one task in one process. It is given flat vectors and numpy examples and
gives back flat vectors, so that nothing outside the backends knows a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.core.batches import Plan
from foedus.core.client import Client, LocalSGD
from foedus.core.population import Examples
from foedus.core.task import Metric
from foedus.core.values import Context
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

PIECE_BYTES = 1 << 24  # of outputs that a loss is called on at once; more would be slow, far from the processor


class Weights(NamedTuple):
    """A model's state: trainable parameters [parameter] and buffers [buffer], both flat."""

    vector: Vector
    buffers: Vector


class Assignment(NamedTuple):
    """One client's local training in one round.

    ``plan`` is of this client alone; ``observe(step, weights)``, if given, is called before the first and
    after every local step. ``anchor`` [parameter] is what penalties pull towards instead of the weights that training
    begins from; ``shift`` and ``mask`` [parameter], and ``bases`` by name, steer every gradient
    (:class:`foedus.core.client.Steering`). ``momenta`` [parameter] are what it begins with instead of zeros.
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
    bases: Mapping[str, NDArray[Any]] | None = None
    momenta: Vector | None = None
    context: Context = Context(0, 0, 0)


def leaves_of(layout: Layout, vector: Vector | None) -> list[NDArray[Any]]:
    """The arrays of a flat vector; none without one."""
    return [] if vector is None else list(layout.unflatten(vector).values())


def bases_of(layout: Layout, bases: Mapping[str, NDArray[Any]] | None) -> list[NDArray[Any] | None]:
    """For every array of a layout its basis, in its own dtype and with as many axes, or None; nothing without any."""
    if bases is None:
        return []
    parts = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    return [
        bases[name].reshape(*bases[name].shape, *[1] * (len(shape) - 2)).astype(dtype) if name in bases else None
        for name, shape, dtype in parts
    ]


def with_momentum(spec: LocalSGD, momenta: Vector | None) -> None:
    """Refuse momenta where there is no momentum.

    Raises:
        ConfigurationError: the spec forgets every gradient at once.
    """
    if momenta is not None and not spec.momentum:
        raise ConfigurationError(
            "a method begins local training with momenta, and its spec has none: write "
            "local_sgd(..., momentum=0.9), or leave out Train(momenta=...)"
        )


class Trained(NamedTuple):
    """The weights after local training, and the mean loss over its steps; its momenta [parameter] if it began with
    some."""

    weights: Weights
    loss: float
    momenta: Vector | None = None


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
        """Loss and the task's metrics over a set of examples; the loss as :class:`Losses` says."""

    def predict(self, weights: Weights, examples: Examples) -> NDArray[Any]:
        """The model's outputs, in evaluation mode, [B, ...]."""

    def model(self, weights: Weights) -> Any:
        """The user's own kind of model with these weights, e.g. a torch module."""


class Mean(NamedTuple):
    """A mean loss, of how many losses (or of what sum of their weights) it is the mean, and whether that is known for
    sure or only likely."""

    value: float
    count: float  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a mean
    sure: bool = False


def mean_of(means: Sequence[Mean]) -> float:
    """The mean over the union of several sets; one that is of nothing counts nothing, though its value be NaN."""
    if len(means) == 1:
        return means[0].value
    total = sum(m.count for m in means)
    return sum(m.value * m.count for m in means if m.count) / total if total else float("nan")


def labelled(target: NDArray[Any]) -> int:
    """How many losses a batch's mean is of, as far as the targets [B, ...] tell: whole numbers below 0 mark padding."""
    return int((target >= 0).sum()) if target.dtype.kind == "i" else target.size


class Losses:
    """The loss over batches of predictions, as the user's own loss is on all outputs and targets together.

    A batch's mean does not tell of how many it is: labels that are left out (``ignore_index``) and class weights
    change the number it was divided by, and a batch may hold nothing but padding. The mean of means is another number.

    Where that number is known, batches are added up, exactly: if the loss gives a value per example, and for torch's
    ``cross_entropy`` and ``nll_loss``, functions or modules, with all their settings. Any other loss is called on all
    outputs together, which is exact for whatever it computes, up to ``PIECE_BYTES`` of outputs. Beyond, it is called on
    pieces of that size, and their mean is taken, weighted by the number of targets, whole numbers below 0 (labels left
    out) not counted; with other weights of the user's own that is near the truth, no more.

    Args:
        mean: lists of outputs and targets of some batches, in the backend's own arrays → their mean loss.
    """

    def __init__(self, mean: Callable[[list[Any], list[Any]], Mean]) -> None:
        self._mean, self._means = mean, list[Mean]()
        self._first: Mean | None = None
        self._outputs: list[Any] = []
        self._targets: list[Any] = []
        self._bytes = 0

    def add(self, output: Any, target: Any) -> None:
        """One batch: arrays of any framework, [B, ...]."""
        if self._first is None or self._first.sure:
            mean = self._mean([output], [target])
            self._first = self._first or mean
            if self._first.sure:
                self._means.append(mean)
                return
        last = self._outputs[-1] if self._outputs else output
        alike = output.ndim and last.shape[1:] == output.shape[1:]
        if self._outputs and (self._bytes + output.nbytes > PIECE_BYTES or not alike):
            self._close()
        self._outputs.append(output)
        self._targets.append(target)
        self._bytes += output.nbytes

    def result(self) -> float:
        """NaN without examples, or if all of them are left out."""
        if self._outputs:
            self._close()
        return mean_of(self._means) if self._means else float("nan")

    def _close(self) -> None:
        known = self._first if not self._means and len(self._outputs) == 1 else None
        self._means.append(known or self._mean(self._outputs, self._targets))
        self._outputs, self._targets, self._bytes = [], [], 0


class Tally:
    """Metrics over batches of predictions, exact over the union of the batches."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._sums = {m.name: (0.0, 0) for m in metrics if not m.whole}
        self._count = 0
        self._kept: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def add(self, output: NDArray[Any], target: NDArray[Any]) -> None:
        """One batch of outputs and targets, [B, ...]."""
        self._count += len(target)
        for metric in self._metrics:
            if not metric.whole:
                values = np.ma.asarray(metric.value(output, target))
                total, counted = self._sums[metric.name]
                added = values.filled(0).sum(dtype=np.float64)
                self._sums[metric.name] = (total + float(added), counted + int(values.count()))
        if any(m.whole for m in self._metrics):
            self._kept.append((output, target))

    def result(self) -> dict[str, float]:
        """The figures by name; NaN without examples."""
        if not self._count:
            return dict.fromkeys((m.name for m in self._metrics), float("nan"))
        figures = {}
        for metric in self._metrics:
            if metric.whole:
                output, target = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
                value = float(metric.value(output, target))
            else:
                total, counted = self._sums[metric.name]
                value = total / counted if counted else float("nan")
            figures[metric.name] = metric.finish(value)
        return figures
