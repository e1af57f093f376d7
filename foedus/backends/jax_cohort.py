"""A cohort of jax models as one: a training step under ``jax.vmap``, compiled, on parameters [client, ...].

Every number of members would be a program of its own; therefore a call is cut into pieces of 1, 2, 4, 8, …
members, and a handful of programs serves every cohort. The pool of examples lies on the device, where a step
gathers its rows.

Not here: which clients step together (``core/packing.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from foedus.backends.cohort import Block, Guides, Stacked, rows_of
from foedus.backends.jax_backend import JaxTrainer, Step, advanced, roomy, steady
from foedus.backends.trainer import Trainer, Weights, bases_of, with_momentum
from foedus.core.client import LocalSGD, Steering
from foedus.core.packing import Call
from foedus.core.population import Examples
from foedus.tree import Vector

Array = Any
Pool = tuple[Array, ...]  # inputs and targets, each [example, ...]
State = tuple[list[Array], list[Array]]  # parameters and momenta, each [client, ...]

GIB = 1 << 30
_LONG = 1 << 14  # examples above which a pool is taken to be the one of the whole population


class JaxCohort:
    """See :class:`foedus.backends.cohort.Cohort`."""

    cache = 16 << 20

    def __init__(self, trainer: JaxTrainer, spec: LocalSGD, *, size: int, unpadded: str | None) -> None:
        self._trainer, self._spec, self.size, self.unpadded = trainer, spec, size, unpadded
        self.layout, self.buffer_layout, self.device = trainer.layout, trainer.buffer_layout, trainer.device
        self.memory = (1 if self.device == "cpu" else 8) * GIB
        self._room = 1
        step = partial(_together, trainer.step, steady(spec))
        self._call = jax.jit(step, donate_argnums=0)

    def copy(self) -> JaxCohort:
        return self  # its programs may be called from many threads

    def settings(self) -> AbstractContextManager[None]:
        return nullcontext()

    def resident(self, pool: Examples) -> Pool:
        """The pool on the device; a block's own one in one of few lengths, so that few programs are compiled."""
        with self._trainer.types():
            return tuple(self._trainer.put(_rounded(a)) for a in (*pool.inputs, pool.targets))

    def train(self, start: Weights, pool: Pool, block: Block) -> Stacked:
        clients = len(block.buffers)
        sums = np.zeros(clients)
        with self._trainer.types():
            self._room = max(self._room, roomy(clients))  # never shrinks, so that few programs are compiled
            towards, begin = self._towards(start, block.guides)
            with_momentum(self._spec, block.guides.momenta)
            state = self._begin(begin, self._rows(block.guides.momenta))
            losses: list[tuple[NDArray[np.int64], Array]] = []
            for call in _pieces(block.calls):
                state, loss = self._call(state, towards, pool, self._batch(call, block))
                losses.append((call.members, loss))
            for members, loss in losses:
                sums[members] += np.asarray(loss)
            vectors, momenta = self._flat(state[0])[:clients], None
            if block.guides.momenta is not None:
                momenta = self._flat(state[1])[:clients]
        losses_of = sums / np.maximum(block.plan.steps, 1)
        vectors[np.isnan(losses_of)] = np.nan  # as in the trainer: a label out of range is a NaN loss
        return Stacked(vectors, block.buffers, losses_of, momenta)

    def _flat(self, arrays: list[Array]) -> Vector:
        """Arrays [room, ...] as a matrix [room, parameter]."""
        return np.concatenate([np.asarray(w).reshape(len(w), -1) for w in arrays], 1).astype(self.layout.dtype)

    def _towards(self, start: Weights, guides: Guides) -> tuple[_Towards, list[Array]]:
        """What members are pulled towards, and where they begin: arrays [...] for all, or [room, ...]."""
        received = self._trainer.leaves(start.vector)
        begin, anchor, shift = (self._rows(v) for v in (guides.start, guides.anchor, guides.shift))
        mask = [] if guides.mask is None else self._trainer.leaves(guides.mask)
        bases = bases_of(self.layout, guides.bases)
        return _Towards([] if anchor else received, anchor, shift, mask, bases), begin or received

    def _rows(self, vectors: NDArray[Any] | None) -> list[Array]:
        """The arrays [room, ...] of a matrix [client, parameter]."""
        if vectors is None:
            return []
        return rows_of(self.layout, np.pad(vectors, ((0, self._room - len(vectors)), (0, 0))))

    def _begin(self, begin: list[Array], momenta: list[Array]) -> State:
        shapes = self.layout.shapes
        parameters = [
            jnp.repeat(w[None], self._room, 0) if w.ndim == len(shape) else jnp.array(w)
            for w, shape in zip(begin, shapes, strict=True)
        ]
        if momenta:
            return parameters, [jnp.array(m) for m in momenta]
        return parameters, [jnp.zeros_like(w) for w in parameters] if self._spec.momentum else []

    def _batch(self, call: Call, block: Block) -> _Batch:
        plan, steps = block.plan, call.steps
        rows = plan.rows[steps, : call.width].astype(np.int32)
        count = plan.count[steps]
        padded = None if self.unpadded else count
        return _Batch(call.members.astype(np.int32), rows, padded, plan.keys[steps], block.lr)


class _Towards(NamedTuple):
    """What members are pulled towards, ``received`` [...] for all or ``anchor`` [room, ...]; the shifts [room, ...] of
    their gradients; the mask [...] and the bases."""

    received: list[Array]
    anchor: list[Array]
    shift: list[Array]
    mask: list[Array]
    bases: list[Array | None]


class _Batch(NamedTuple):
    """What some clients train on in one step: ``members`` [k]; ``rows`` [k, width] of the pool, of which the first
    ``real`` [k] are no padding (all of them if it is ``None``); ``keys`` [k, 2]; the learning rate."""

    members: Array
    rows: Array
    real: Array | None
    keys: Array
    lr: Array


def _together(
    step: Step, spec: LocalSGD, state: State, towards: _Towards, pool: Pool, chosen: _Batch
) -> tuple[State, Array]:
    """One step of some clients: the state afterwards, and their losses [k]."""
    members, rows, real, keys, lr = chosen
    *inputs, target = (x[rows] for x in pool)  # [k, width, ...]
    mask = None if real is None else jnp.arange(rows.shape[1]) < real[:, None]

    def one(params: list[Array], memory: list[Array], anchor: list[Array], shift: list[Array], batch: Any) -> Any:
        guide = (anchor or towards.received, Steering(shift, towards.mask, towards.bases))
        return advanced(step, spec, params, memory, guide, batch, lr)

    own, kept, anchor, shift = ([w[members] for w in part] for part in (*state, towards.anchor, towards.shift))
    new, moved, losses = jax.vmap(one)(own, kept, anchor, shift, (tuple(inputs), target, mask, keys))
    parameters, memory = (
        [w.at[members].set(n) for w, n in zip(part, values, strict=True)]
        for part, values in zip(state, (new, moved), strict=True)
    )
    return (parameters, memory), losses


def _pieces(calls: list[Call]) -> Iterator[Call]:
    """The calls, cut into numbers of members that are powers of two."""
    for members, steps, width in calls:
        at = 0
        while at < len(members):
            size = 1 << ((len(members) - at).bit_length() - 1)
            yield Call(members[at : at + size], steps[at : at + size], width)
            at += size


def _rounded(array: NDArray[Any]) -> NDArray[Any]:
    room = 0 if len(array) > _LONG else roomy(len(array)) - len(array)
    return np.pad(array, [(0, room), *[(0, 0)] * (array.ndim - 1)]) if room else array


def build(spec: LocalSGD, trainer: Trainer, probe: Examples) -> JaxCohort:
    """The cohort of a task whose model is a JaxModel."""
    assert isinstance(trainer, JaxTrainer)
    weights = trainer.layout.size * np.dtype(trainer.layout.dtype).itemsize
    rows = (spec.batch_size or len(probe)) / len(probe)
    # What a step keeps for its gradient is not known from outside; batches are counted four times instead.
    size = int((3 if spec.momentum else 2) * weights + 4 * rows * probe.nbytes)
    return JaxCohort(trainer, spec, size=size, unpadded=trainer.unpadded(probe))
