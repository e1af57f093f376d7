"""A cohort of numpy models: computed at once if the model takes a client axis, else one client after another."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends.cohort import Block, Stacked, rows_of
from foedus.backends.numpy_backend import NumpyTrainer
from foedus.backends.trainer import Trainer, Weights, bases_of, leaves_of, with_momentum
from foedus.core.client import LocalSGD, Steering, descend
from foedus.core.population import Examples

Array = NDArray[Any]


class _Towards(NamedTuple):
    """What the members of a call are pulled towards (``own``: an array [k, ...] each, else one [...] for all), the
    shifts [k, ...] of their gradients, the mask [...] and the bases."""

    received: list[Array]
    own: bool
    shift: list[Array]
    mask: list[Array]
    bases: list[Array | None]


class NumpyCohort:
    """See :class:`foedus.backends.cohort.Cohort`."""

    unpadded: str | None = "a NumpyModel's gradient takes no mask"
    memory = 1 << 30
    cache = 16 << 20
    device = "cpu"

    def __init__(self, trainer: NumpyTrainer, spec: LocalSGD, size: int) -> None:
        self._trainer, self._spec, self.size = trainer, spec, size
        self.layout, self.buffer_layout = trainer.layout, trainer.buffer_layout

    def settings(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self) -> NumpyCohort:
        return self  # nothing in it changes

    def resident(self, pool: Examples) -> Examples:
        return pool

    @np.errstate(over="ignore", invalid="ignore")
    def train(self, start: Weights, pool: Examples, block: Block) -> Stacked:
        clients, spec = len(block.buffers), self._spec
        received, guides = list(self.layout.unflatten(start.vector).values()), block.guides
        if guides.start is None:
            leaves = [np.repeat(w[None], clients, 0) for w in received]
        else:
            leaves = rows_of(self.layout, guides.start)
        anchors = None if guides.anchor is None else rows_of(self.layout, guides.anchor)
        shifts = [] if guides.shift is None else rows_of(self.layout, guides.shift)
        mask, bases = leaves_of(self.layout, guides.mask), bases_of(self.layout, guides.bases)
        with_momentum(spec, guides.momenta)
        memory = [np.zeros_like(w) for w in leaves] if spec.momentum else []
        memory = memory if guides.momenta is None else rows_of(self.layout, guides.momenta)
        sums = np.zeros(clients)
        for call in block.calls:
            where = call.where
            part = pool.take(block.plan.rows[call.steps, : call.width])  # [k, width, ...]
            own, kept = [w[where] for w in leaves], [m[where] for m in memory]
            losses, grads = self._gradients(own, part)
            sums[where] += losses
            towards = _Towards(
                received if anchors is None else [a[where] for a in anchors], anchors is not None,
                [s[where] for s in shifts], mask, bases,
            )  # fmt: skip
            new, kept = self._descend(own, grads, kept, towards, lr=block.lr)
            for whole, value in zip((*leaves, *memory), (*new, *kept), strict=True):
                whole[where] = value
        sums /= np.maximum(block.plan.steps, 1)
        momenta = None if guides.momenta is None else self._flat(memory)
        return Stacked(self._flat(leaves), block.buffers, sums, momenta)

    def _flat(self, arrays: list[Array]) -> Array:
        """Arrays [client, ...] as a matrix [client, parameter]."""
        whole = np.concatenate([w.reshape(len(w), -1) for w in arrays], 1)
        return whole.astype(self.layout.dtype, copy=False)

    def _descend(
        self,
        leaves: list[Array],
        grads: list[Array],
        memory: list[Array],
        towards: _Towards,
        *,
        lr: float,
    ) -> tuple[list[Array], list[Array]]:
        """The members' step down their gradients, all [k, ...]."""
        spec, (received, own, shift, mask, bases) = self._spec, towards
        if not (spec.clip_norm or spec.penalty):  # all else is the same with one more axis
            steering = Steering(shift, mask, bases)
            return descend(spec, leaves, grads, memory=memory, received=received, lr=lr, steering=steering)
        each = [
            descend(spec, [w[i] for w in leaves], [g[i] for g in grads], memory=[m[i] for m in memory],
                    received=[r[i] for r in received] if own else received, lr=lr,
                    steering=Steering([s[i] for s in shift], mask, bases))
            for i in range(len(leaves[0]))
        ]  # fmt: skip
        new, kept = ([np.stack(parts) for parts in zip(*lists, strict=True)] for lists in zip(*each, strict=True))
        return new, kept

    def _gradients(self, leaves: list[Array], part: Examples) -> tuple[Array, list[Array]]:
        """Losses [k] and gradients [k, ...] of the members of a call."""
        names, model = self.layout.names, self._trainer.net
        if model.stacked:
            loss, grads = model.gradient(dict(zip(names, leaves, strict=True)), part.inputs, part.targets)
            return loss, [grads[n].astype(w.dtype, copy=False) for n, w in zip(names, leaves, strict=True)]
        losses, own = np.zeros(len(part)), [np.empty_like(w) for w in leaves]
        for i in range(len(part)):
            named = {n: w[i] for n, w in zip(names, leaves, strict=True)}
            losses[i], grads = model.gradient(named, tuple(x[i] for x in part.inputs), part.targets[i])
            for n, whole in zip(names, own, strict=True):
                whole[i] = grads[n]
        return losses, own


def build(spec: LocalSGD, trainer: Trainer, probe: Examples) -> NumpyCohort:
    """The cohort of a task whose model is a NumpyModel."""
    assert isinstance(trainer, NumpyTrainer)
    rows = (spec.batch_size or len(probe)) / len(probe)
    weights = sum(a.nbytes for a in trainer.model(trainer.initial()).values())
    return NumpyCohort(trainer, spec, int(3 * weights + rows * probe.nbytes))
