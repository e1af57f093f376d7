"""The numpy backend: local training and evaluation of a :class:`~foedus.core.task.NumpyModel`.

The model brings its own gradient, so nothing is needed but numpy. Linear models are trained in it to the last
bit of float64, which makes it the oracle of the other backends and executors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends.located import located
from foedus.backends.trainer import (
    Assignment,
    Mean,
    Tally,
    Trained,
    Weights,
    bases_of,
    labelled,
    leaves_of,
    mean_of,
    with_momentum,
)  # fmt: skip
from foedus.core.client import LocalSGD, Steering, descend
from foedus.core.population import Examples
from foedus.core.random import generator
from foedus.core.task import NumpyModel, Task
from foedus.errors import ConfigurationError
from foedus.tree import Layout

Array = NDArray[Any]

EVALUATION_BATCH = 1000
PIECE_BYTES = 1 << 28  # of examples that a loss is computed on at once


class NumpyTrainer:
    """See :class:`foedus.backends.trainer.Trainer`. A NumpyModel has no buffers.

    Its loss is computed by its gradient, hence for evaluation on all examples together, in pieces by the bytes of
    these rather than of the outputs.
    """

    backend = "numpy"
    device = "cpu"

    def __init__(self, task: Task, model: NumpyModel, initial: dict[str, Array]) -> None:
        self._task, self._net = task, model
        self.layout, self.buffer_layout = Layout.of(initial), Layout((), (), ())
        self._initial = self.layout.flatten(initial)

    @property
    def net(self) -> NumpyModel:
        return self._net

    def initial(self) -> Weights:
        return Weights(self._initial.copy(), _nothing())

    # A run that diverges overflows; its update is refused by name later, and a warning here says less.
    @np.errstate(over="ignore", invalid="ignore")
    def train(self, start: Weights, work: Assignment) -> Trained:
        spec = plain_descent(work.spec)
        leaves = leaves_of(self.layout, start.vector)
        received = leaves if work.anchor is None else leaves_of(self.layout, work.anchor)
        steering = Steering(
            leaves_of(self.layout, work.shift), leaves_of(self.layout, work.mask), bases_of(self.layout, work.bases)
        )
        with_momentum(spec, work.momenta)
        memory = leaves_of(self.layout, work.momenta)
        if not memory and spec.momentum:
            memory = [np.zeros_like(w) for w in received]
        rate, losses = spec.rate(work.round), []
        if work.observe:
            work.observe(0, start)
        for step, count in enumerate(work.plan.count):
            part = work.examples.take(work.plan.rows[step, :count])
            try:
                loss, grads = self._gradient(leaves, part)
            except Exception as error:
                raise located(error, work, step, part.inputs, part.targets) from error
            leaves, memory = descend(spec, leaves, grads, memory=memory, received=received, lr=rate, steering=steering)
            losses.append(float(loss))
            if work.observe:
                work.observe(step + 1, Weights(self._flat(leaves), _nothing()))
        mean = float(np.mean(losses)) if losses else float("nan")
        momenta = None if work.momenta is None else self._flat(memory)
        return Trained(Weights(self._flat(leaves), _nothing()), mean, momenta)

    def _gradient(self, leaves: list[Array], part: Examples) -> tuple[Any, list[Array]]:
        loss, grads = self._net.gradient(self._named(leaves), part.inputs, part.targets)
        return loss, [
            grads[name].astype(w.dtype, copy=False) for name, w in zip(self.layout.names, leaves, strict=True)
        ]

    def evaluate(self, weights: Weights, examples: Examples) -> dict[str, float]:
        parameters, tally = self.model(weights), Tally(self._task.metrics)
        for part in _cut(examples, EVALUATION_BATCH):
            tally.add(self._net.predict(parameters, *part.inputs), part.targets)
        each = max(1, examples.nbytes // max(len(examples), 1))
        means = [
            Mean(float(self._net.gradient(parameters, part.inputs, part.targets)[0]), labelled(part.targets))
            for part in _cut(examples, max(EVALUATION_BATCH, PIECE_BYTES // each))
        ]
        return {"loss": mean_of(means) if means else float("nan")} | tally.result()

    def predict(self, weights: Weights, examples: Examples) -> Array:
        if not len(examples):
            return np.empty(0, self.layout.dtype)
        return self._net.predict(self.model(weights), *examples.inputs)

    def model(self, weights: Weights) -> dict[str, Array]:
        return {name: array.copy() for name, array in self.layout.unflatten(weights.vector).items()}

    def _named(self, leaves: list[Array]) -> dict[str, Array]:
        return dict(zip(self.layout.names, leaves, strict=True))

    def _flat(self, leaves: list[Array]) -> Array:
        return self.layout.flatten(self._named(leaves))


def build(task: Task, *, seed: int) -> NumpyTrainer:
    """A trainer whose first weights are a function of the seed."""
    model = task.model
    assert isinstance(model, NumpyModel)
    initial = model.init(generator(seed, "weights"))
    wrong = [n for n, a in initial.items() if not isinstance(a, np.ndarray) or a.dtype.kind != "f"]
    if wrong or not initial:
        raise ConfigurationError(
            "a NumpyModel's init(generator) gives a dict of floating-point arrays, at least one; "
            + (f"not so: {', '.join(wrong)}" if wrong else "it gave an empty dict")
        )
    return NumpyTrainer(task, model, initial)


def _cut(examples: Examples, size: int) -> Iterator[Examples]:
    """Views of the examples, ``size`` at a time."""
    return (examples.take(slice(at, at + size)) for at in range(0, len(examples), size))


def plain_descent(spec: Any) -> LocalSGD:
    """The local training of a model that is no torch module: only ``local_sgd`` can be carried out."""
    if not isinstance(spec, LocalSGD):
        raise ConfigurationError(
            "local_training() drives a torch module by a torch optimiser or your own loop; this task's model "
            "is no torch module. Write local_sgd(lr=...), or give the model as a torch.nn.Module"
        )
    return spec


def _nothing() -> Array:
    return np.empty(0, np.float32)
