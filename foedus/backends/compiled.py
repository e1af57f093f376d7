"""A whole cohort's local training as one compiled program.

Given a training step as a jax function (lowered from torch, or ``jax.grad`` of a jax model), the program loops
over clients and, inside, over each client's own number of steps, so that clients of unequal size cost no padded
steps. Clients are dealt out to the devices, longest first; on a CPU every core is a device, which computes alone.
The examples stay where they are, in one array that all devices share; a step gathers its rows by number.

Nothing is compiled anew when a cohort's sizes change: the lengths of the plan and of the result are rounded up,
and loops stop at bounds that are data. What a client computes depends on nothing but its own plan, so the number
of devices cannot change a bit.

Compiled programs are kept in the user's cache folder, so that the next process starts in a fraction of the time.

Not here: where a step comes from (``lowering.py``, ``jax_backend.py``), which rows a client trains on when
(``core/batches.py``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from foedus.backends.cohort import UNGUIDED, Guides
from foedus.backends.jax_devices import cpu_devices, devices, keep_programs
from foedus.backends.trainer import Weights, bases_of, with_momentum
from foedus.core.batches import Plan
from foedus.core.client import LocalSGD, Steering, descend
from foedus.core.examples import Examples
from foedus.tree import Layout, Vector

__all__ = [
    "CohortProgram", "Pool", "Recipe", "Results", "aligned", "cpu_devices", "devices", "pooled", "stacked", "tainted",
]  # fmt: skip

Array = Any
Step = Callable[..., tuple[Array, Mapping[str, Array], Mapping[str, Array]]]

ALIGNMENT: Final = 64  # bytes; from here on jax reads numpy's memory in place
# One thread a device, since every core is a device of its own; and vectors as wide as the machine has them.
CPU_OPTIONS: Final = {"xla_cpu_multi_thread_eigen": False, "xla_cpu_prefer_vector_width": 512}


@dataclass(frozen=True, eq=False)
class Recipe:
    """What every client computes.

    Attributes:
        step: ``(params, frozen, buffers, inputs, target, mask, key) -> (loss, gradients, new buffers)``, dicts
            by name; ``mask`` [B] is 1 for the batch's real rows, ``key`` is int32 [2]. Where data is at fault, the
            gradients are NaN (:func:`tainted`).
        spec: the rule that descends the gradients.
        layout, buffer_layout: of the flat vectors that come in and go out.
        frozen: parameters that are not trained, by name.
        wide: trace with 64-bit types, as steps lowered from torch need.
    """

    step: Step
    spec: LocalSGD
    layout: Layout
    buffer_layout: Layout
    frozen: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    wide: bool = True


class Pool(NamedTuple):
    """Examples on the devices: arrays [N, ...] that every device sees."""

    inputs: tuple[Array, ...]
    target: Array


@dataclass(frozen=True, eq=False)
class Results:
    """What a cohort's local training brought, in the order of the cohort.

    Attributes:
        updates: C vectors [P], trained minus received; views of the devices' memory.
        buffers: C vectors [Q], buffers after training minus before.
        losses: float64 [C], each client's mean loss over its steps (NaN without steps).
        momenta: C vectors [P] at the end, if training began with some.
    """

    updates: list[Vector]
    buffers: list[Vector]
    losses: NDArray[np.float64]
    momenta: list[Vector] | None = None

    @cached_property
    def matrix(self) -> Vector:
        """All updates in one array [C, P]."""
        return np.stack(self.updates)


class CohortProgram:
    """The compiled local training of a :class:`Recipe`, on one or more devices.

    Example:
        >>> program = CohortProgram(recipe, cpu_devices())  # doctest: +SKIP
        >>> pool = program.hold(examples)  # doctest: +SKIP
        >>> results = program.run(start, pool, pooled(plan, rows, cohort), lr=0.1)  # doctest: +SKIP
    """

    def __init__(self, recipe: Recipe, devices: Sequence[Any]) -> None:
        self.recipe, self.devices = recipe, list(devices)
        mesh = Mesh(np.array(self.devices), ("device",))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._cut = NamedSharding(mesh, PartitionSpec("device"))
        on_each, same = PartitionSpec("device"), PartitionSpec()
        body = jax.shard_map(
            _body(recipe), mesh=mesh, in_specs=(same, on_each, same, same, on_each, on_each, same, (on_each, same)),
            out_specs=on_each, check_vma=False,
        )  # fmt: skip
        options = CPU_OPTIONS if self.devices[0].platform == "cpu" else None
        self._call = jax.jit(body, compiler_options=options)
        self._bounds = (0, 0)  # of the plan's steps and clients on one device: never shrink, so rarely recompile
        with self._types():
            self._frozen = self._put({n: aligned(np.asarray(a)) for n, a in recipe.frozen.items()})
        keep_programs()

    def hold(self, examples: Examples) -> Pool:
        """Put examples where all devices see them; without a copy if their memory is :func:`aligned`.

        The arrays must not be changed as long as the pool is used.
        """
        with self._types():
            inputs = tuple(self._put(aligned(a)) for a in examples.inputs)
            return Pool(inputs, self._put(aligned(examples.targets)))

    def run(
        self, start: Weights, pool: Pool, plan: Plan, *, lr: float, kept: NDArray[Any] | None = None,
        guides: Guides = UNGUIDED,
    ) -> Results:  # fmt: skip
        """Carry out one round.

        Args:
            start: the received weights, [P] and [Q].
            pool: the examples.
            plan: the cohort's steps, whose ``rows`` are row numbers of the pool (see :func:`pooled`).
            lr: the learning rate of this round.
            kept: [C, Q], buffers that each client starts with instead of ``start.buffers``.
            guides: how training departs from the plain one. Updates are weights after training − those that
                training began from.
        """
        with_momentum(self.recipe.spec, guides.momenta)
        deal = balanced(plan.steps, len(self.devices))
        steps, bounds = self._packed(plan, deal)
        own = np.broadcast_to(start.buffers, (len(plan.steps), start.buffers.size)) if kept is None else kept
        buffers = np.zeros((len(self.devices), self._bounds[1], own.shape[1]), own.dtype)
        for device, slots in enumerate(deal):
            buffers[device, : len(slots)] = own[slots]
        with self._types():
            answer = self._call(
                start.vector, buffers, self._frozen, pool, steps, bounds, float(lr), self._guided(guides, deal)
            )
        return _unpacked(answer, deal, plan.steps)

    def _guided(self, guides: Guides, deal: Sequence[NDArray[np.int64]]) -> tuple[dict[str, Vector], dict[str, Any]]:
        """Each device's rows of what clients have of their own, [D, S, P]; and what all have in common."""
        own = {"start": guides.start, "anchor": guides.anchor, "shift": guides.shift, "momenta": guides.momenta}
        found = {}
        for name, rows in own.items():
            if rows is not None:
                found[name] = np.zeros((len(deal), self._bounds[1], rows.shape[1]), rows.dtype)
                for device, slots in enumerate(deal):
                    found[name][device, : len(slots)] = rows[slots]
        common: dict[str, Any] = {} if guides.mask is None else {"mask": guides.mask}
        if guides.bases is not None:
            common["bases"] = dict(
                zip(self.recipe.layout.names, bases_of(self.recipe.layout, guides.bases), strict=True)
            )
        return found, common

    def _packed(self, plan: Plan, deal: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Per device: rows, counts and keys of its steps [D, T, B + 3], and where its clients begin [D, S + 2]."""
        most = (max(int(plan.steps[s].sum()) for s in deal), max(len(s) for s in deal))
        self._bounds = tuple(max(b, roomy(m)) for b, m in zip(self._bounds, most, strict=True))  # type: ignore[assignment]
        batch = plan.rows.shape[1]
        steps = np.zeros((len(deal), self._bounds[0], batch + 3), np.int32)
        bounds = np.zeros((len(deal), self._bounds[1] + 2), np.int32)
        for device, slots in enumerate(deal):
            part = plan.of(slots)
            length = len(part.count)
            steps[device, :length, :batch] = part.rows
            steps[device, :length, batch] = part.count
            steps[device, :length, batch + 1 :] = part.keys.view(np.int32)
            bounds[device, 0] = len(slots)
            bounds[device, 2 : len(slots) + 2] = np.cumsum(part.steps)
        return steps, bounds

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._everywhere)

    def _types(self) -> Any:
        return jax.enable_x64(True) if self.recipe.wide else nullcontext()


def _body(recipe: Recipe) -> Callable[..., Any]:
    """What one device does: its clients one after another."""

    def run(
        vector: Array, buffers: Array, frozen: Any, pool: Pool, steps: Array, bounds: Array, lr: Array,
        guided: tuple[dict[str, Array], dict[str, Any]],
    ) -> Any:  # fmt: skip
        buffers, steps, bounds = buffers[0], steps[0], bounds[0]
        own, common = {name: rows[0] for name, rows in guided[0].items()}, dict(guided[1])
        bases = {"bases": common.pop("bases")} if "bases" in common else {}
        received = _leaves(recipe.layout, vector)
        train = _client(recipe, frozen=frozen, pool=pool, lr=lr)

        def client(slot: Array, results: Any) -> Any:
            before = _leaves(recipe.buffer_layout, buffers[slot])
            guide = {name: _leaves(recipe.layout, rows[slot]) for name, rows in own.items()}
            guide |= {name: _leaves(recipe.layout, vector) for name, vector in common.items()}
            guide = {"start": received, "anchor": received} | guide | bases
            params, memory, after, loss = train(guide, before, steps, (bounds[slot + 1], bounds[slot + 2]))
            updates, changes, losses, *momenta = results
            momenta = [_written(recipe.layout, rows, slot, memory) for rows in momenta]
            moved = {n: params[n] - guide["start"][n] for n in params}
            updates = _written(recipe.layout, updates, slot, moved)
            # Equal infinities (a mask of −∞) have not changed.
            # Whole numbers were rounded on their way in: what they grew by counts from what was received.
            begun = _raw(recipe.buffer_layout, buffers[slot])
            grown = {n: _grown(after[n].astype(begun[n].dtype), begun[n]) for n in after}
            changes = _written(recipe.buffer_layout, changes, slot, grown)
            return updates, changes, losses.at[slot].set(loss), *momenta

        room = bounds.shape[0] - 2
        empty = (
            jnp.zeros((room, recipe.layout.size), recipe.layout.dtype),
            jnp.zeros((room, recipe.buffer_layout.size), recipe.buffer_layout.dtype),
            jnp.zeros(room, recipe.layout.dtype),
            *([jnp.zeros((room, recipe.layout.size), recipe.layout.dtype)] if "momenta" in own else []),
        )
        return lax.fori_loop(0, bounds[0], client, empty)

    return run


def _client(recipe: Recipe, *, frozen: Any, pool: Pool, lr: Array) -> Callable[..., Any]:
    """One client: ``(guide, buffers, steps, (begin, end)) -> (params, momenta, buffers, sum of losses)``."""

    def train(guide: Mapping[str, dict[str, Array]], before: dict[str, Array], steps: Array, span: Any) -> Any:
        width, names = steps.shape[1] - 3, recipe.layout.names
        shift, mask, bases, memory = (
            [guide[g][n] for n in names] if g in guide else [] for g in ("shift", "mask", "bases", "momenta")
        )
        if recipe.spec.momentum and not memory:
            memory = [jnp.zeros_like(p) for p in guide["start"].values()]
        steering = Steering(shift, mask, bases)

        def step(t: Array, state: Any) -> Any:
            params, memory, buffers, total = state
            entry = steps[t]
            rows, mask = entry[:width], jnp.arange(width, dtype=jnp.int32) < entry[width]
            inputs = tuple(x[rows] for x in pool.inputs)
            loss, grads, buffers = recipe.step(
                params, frozen, buffers, inputs, pool.target[rows], mask.astype(total.dtype), entry[width + 1 :]
            )
            # By name: jax hands dicts back in the order of their keys, not in the layout's.
            mine, theirs, slopes = ([d[n] for n in names] for d in (params, guide["anchor"], grads))
            new, memory = descend(recipe.spec, mine, slopes, memory=memory, received=theirs, lr=lr, steering=steering)
            params = dict(zip(recipe.layout.names, new, strict=True))
            return params, memory, dict(buffers), total + loss.astype(total.dtype)

        first = (guide["start"], memory, before, jnp.zeros((), recipe.layout.dtype))
        params, memory, buffers, total = lax.fori_loop(*span, step, first)
        return params, dict(zip(names, memory, strict=False)), buffers, total

    return train


def _leaves(layout: Layout, vector: Array) -> dict[str, Array]:
    """The named arrays of a flat vector, in their own dtypes."""
    parts = zip(layout.names, layout.shapes, layout.offsets, layout.sizes, layout.dtypes, strict=True)
    return {name: _cast(vector[at : at + size], dtype).reshape(shape) for name, shape, at, size, dtype in parts}


def _raw(layout: Layout, vector: Array) -> dict[str, Array]:
    """The named arrays of a flat vector, as they are in it."""
    parts = zip(layout.names, layout.shapes, layout.offsets, layout.sizes, strict=True)
    return {name: vector[at : at + size].reshape(shape) for name, shape, at, size in parts}


def _grown(after: Array, before: Array) -> Array:
    return jnp.where(after == before, 0, after - before)


def _cast(values: Array, dtype: str) -> Array:
    return (jnp.rint(values) if np.issubdtype(np.dtype(dtype), np.integer) else values).astype(dtype)


def _written(layout: Layout, rows: Array, slot: Array, leaves: Mapping[str, Array]) -> Array:
    """``rows`` [S, size] with a client's arrays in row ``slot``, one by one: XLA writes each in place."""
    for name, at in zip(layout.names, layout.offsets, strict=True):
        part = leaves[name].astype(layout.dtype).reshape(1, -1)
        rows = lax.dynamic_update_slice(rows, part, (slot, jnp.asarray(at, slot.dtype)))
    return rows


def _unpacked(answer: Any, deal: Sequence[NDArray[np.int64]], steps: NDArray[np.int32]) -> Results:
    """The devices' blocks as rows in the order of the cohort."""
    columns: list[list[Any]] = [[None] * len(steps) for _ in answer]
    for column, array in zip(columns, answer, strict=True):
        for slots, block in zip(deal, _by_device(array, len(deal)), strict=True):
            for at, slot in enumerate(slots.tolist()):
                column[slot] = block[at]
    updates, buffers, losses, *momenta = columns
    with np.errstate(invalid="ignore"):
        return Results(updates, buffers, np.array(losses, np.float64) / steps, *momenta)


def _by_device(array: Any, count: int) -> Iterator[NDArray[Any]]:
    """Each device's block, without a copy."""
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    assert len(shards) == count
    return (np.asarray(s.data) for s in shards)


def tainted(grads: Mapping[str, Array], loss: Array, *, excused: Sequence[Array] = ()) -> dict[str, Array]:
    """Gradients, NaN if the loss is NaN and none of the booleans ``excused`` says that it should be.

    An index out of range shows as a NaN loss, whose gradients may be finite; it must not go unnoticed.
    """
    fault = jnp.isnan(loss)
    for right in excused:
        fault &= ~right
    return {name: jnp.where(fault, jnp.nan, grad) for name, grad in grads.items()}


# --- plans --------------------------------------------------------------------------------------------------------


def balanced(steps: NDArray[np.integer], count: int) -> list[NDArray[np.int64]]:
    """The slots of a cohort dealt out to ``count`` devices, longest first to the least loaded (Graham 1969)."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, device) for device in range(count)]
    for slot in np.argsort(-np.asarray(steps), kind="stable").tolist():
        load, device = loads[0]
        parts[device].append(slot)
        heapq.heapreplace(loads, (load + int(steps[slot]) + 1, device))
    return [np.array(sorted(p), np.int64) for p in parts]


def roomy(count: int) -> int:
    """``count`` rounded up to one of four sizes per power of two, so that few shapes occur."""
    if count <= 4:
        return max(count, 1)
    quarter = 1 << ((count - 1).bit_length() - 3)
    return -(-count // quarter) * quarter


def pooled(plan: Plan, rows: NDArray[np.integer], offsets: NDArray[np.integer]) -> Plan:
    """The plan with row numbers of a pool instead of the client's own.

    Args:
        plan: rows count within each client's examples.
        rows: the clients' pool rows, laid end to end.
        offsets: where each slot's rows begin, [C].
    """
    return plan._replace(rows=rows[offsets[plan.client][:, None] + plan.rows].astype(np.int32))


def stacked(examples: Sequence[Examples]) -> tuple[Examples, NDArray[np.int64]]:
    """Examples of a cohort laid end to end in aligned memory, and where each client's begin, [C].

    The length is rounded up (with zeros), so that a new cohort seldom means a new shape.
    """
    lengths = np.array([len(e) for e in examples])
    room = roomy(int(lengths.sum()))
    columns = [[e.inputs[i] for e in examples] for i in range(len(examples[0].inputs))]
    inputs = tuple(_joined(column, room) for column in columns)
    return Examples(inputs, _joined([e.targets for e in examples], room)), np.cumsum(lengths) - lengths


def _joined(parts: Sequence[NDArray[Any]], room: int) -> NDArray[Any]:
    whole = empty_aligned((room, *parts[0].shape[1:]), parts[0].dtype)
    filled = sum(len(p) for p in parts)
    np.concatenate(parts, out=whole[:filled])
    whole[filled:] = 0
    return whole


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The same values where jax reads them without a copy; the array itself if it already lies so."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = empty_aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Memory for an array that jax will read without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    held: NDArray[Any] = room[begin : begin + size].view(dtype).reshape(shape)
    return held
