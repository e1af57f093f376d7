"""A whole cohort trained as one computation: what the backends offer to the vectorised executor.

A :class:`Cohort` holds one model of one task, whose parameters exist once per client, [client, ...]. It is
given a pool of examples and a block of clients' steps, already arranged into calls, and gives back one row of
weights per client. As with the trainer, nothing outside the backends knows a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foedus.backends.trainer import Trainer, Weights
from foedus.core.batches import Plan
from foedus.core.client import LocalSGD
from foedus.core.packing import Call
from foedus.core.population import Examples
from foedus.core.task import JaxModel, NumpyModel, Task
from foedus.tree import Layout, Vector


class Guides(NamedTuple):
    """How clients' training departs from the plain one: rows of one for each client, or nothing.

    Attributes:
        start: weights to begin from, [client, parameter].
        anchor: what penalties pull towards, [client, parameter]; without it the received weights.
        shift: added to every gradient, [client, parameter].
        mask: 1 where parameters may move and 0 where not, [parameter], the same for all.
        bases: columns in whose span matrices may move, by name, the same for all; see
            :func:`foedus.core.client.projected`.
        momenta: to begin with, [client, parameter]; without them zeros.
    """

    start: Vector | None = None
    anchor: Vector | None = None
    shift: Vector | None = None
    mask: Vector | None = None
    bases: Mapping[str, NDArray[Any]] | None = None
    momenta: Vector | None = None

    def of(self, slots: NDArray[np.integer]) -> Guides:
        """Those of some clients."""
        own = (self.start, self.anchor, self.shift, self.momenta)
        start, anchor, shift, momenta = (None if v is None else v[slots] for v in own)
        return Guides(start, anchor, shift, self.mask, self.bases, momenta)


UNGUIDED = Guides()


class Block(NamedTuple):
    """The local training of some clients in one round.

    Attributes:
        plan: their steps; ``rows`` are row numbers of the *pool*.
        calls: the steps, arranged.
        buffers: what each starts from, [client, buffer].
        lr: this round's learning rate.
        guides: how training departs from the plain one.
    """

    plan: Plan
    calls: list[Call]
    buffers: Vector
    lr: float
    guides: Guides = UNGUIDED


def rows_of(layout: Layout, vectors: Vector) -> list[NDArray[Any]]:
    """The arrays [client, ...] of a matrix [client, parameter]."""
    parts = zip(layout.offsets, layout.sizes, layout.shapes, layout.dtypes, strict=True)
    return [vectors[:, at : at + n].reshape(-1, *shape).astype(dtype) for at, n, shape, dtype in parts]


class Stacked(NamedTuple):
    """What came of a block: weights [client, parameter], buffers [client, buffer], mean losses [client]; momenta
    [client, parameter] if it began with some."""

    vectors: Vector
    buffers: Vector
    losses: NDArray[np.float64]
    momenta: Vector | None = None


@runtime_checkable
class Cohort(Protocol):
    """One model with as many sets of weights as a block has clients.

    Law: each client's row equals what the plain trainer gives (docs/design.md has the tolerances).
    Not thread-safe: every thread has a cohort of its own (``copy``).

    Attributes:
        unpadded: why batches must keep their exact shapes; ``None`` if they may be padded.
        size: bytes that one client takes in a block, about.
        memory: bytes that a block may take.
        cache: bytes of a block that stays near the processor.
    """

    layout: Layout
    buffer_layout: Layout
    unpadded: str | None
    size: int
    memory: int
    cache: int
    device: str

    def resident(self, pool: Examples) -> Any:
        """A pool of examples where the cohort computes."""

    def settings(self) -> AbstractContextManager[None]:
        """The framework's own settings, for the whole process, while blocks are trained."""

    def train(self, start: Weights, pool: Any, block: Block) -> Stacked:
        """Carry out a block's local training."""

    def copy(self) -> Cohort:
        """Another cohort of the same task."""


def open_cohort(task: Task, spec: LocalSGD, trainer: Trainer, probe: Examples) -> Cohort:
    """The cohort of a task, of the backend that its model is written in, tried out on a few real examples.

    Args:
        task: the problem.
        spec: local training.
        trainer: an opened trainer of the same task.
        probe: a few examples of one client, at least one.

    Raises:
        UnsupportedOperator: the model cannot be computed for many clients at once; names the operator.
    """
    if isinstance(task.model, NumpyModel):
        from foedus.backends import numpy_cohort

        return numpy_cohort.build(spec, trainer, probe)
    if isinstance(task.model, JaxModel):
        from foedus.backends import jax_cohort

        return jax_cohort.build(spec, trainer, probe)
    from foedus.backends import torch_cohort

    return torch_cohort.build(task, spec, trainer, probe)
