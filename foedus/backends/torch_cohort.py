"""A cohort of torch modules as one: forwards under ``torch.func.vmap``, backwards as one ordinary gradient.

The parameters of all clients are leaves [client, ...]. vmap batches the model's forward pass over their client
axis, and the sum of the clients' losses is differentiated by plain autograd: since the clients share nothing,
the gradient of the sum is each one's own. That takes less of Python, and less memory traffic, than
``vmap(grad(...))``. Layers that vmap batches badly or not at all are in ``torch_stacked.py``.

Not here: which clients step together (``core/packing.py``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from foedus.backends.cohort import Block, Stacked, rows_of
from foedus.backends.masking import Objective, objective
from foedus.backends.torch_backend import TorchTrainer, same_bits
from foedus.backends.torch_random import unrepeated
from foedus.backends.torch_record import Recorder, restored
from foedus.backends.torch_stacked import stacked
from foedus.backends.trainer import Trainer, Weights, bases_of, leaves_of, with_momentum
from foedus.core.client import LocalSGD, Steering, descend
from foedus.core.population import Examples
from foedus.core.task import Task
from foedus.errors import UnsupportedOperator
from foedus.tree import Layout, Vector

GIB = 1 << 30
CACHED = 16 << 20  # bytes of a block that stays near the processor

Pool = list[Tensor]  # inputs and targets, each [example, ...]


class _Towards(NamedTuple):
    """What clients are pulled towards (``own``: arrays [client, ...], else [...] for all), the shifts [client, ...] of
    their gradients, the mask [...] and the bases."""

    received: list[Tensor]
    own: bool
    shift: list[Tensor]
    mask: list[Tensor]
    bases: list[Tensor | None]

    def of(self, members: slice | Tensor) -> _Towards:
        received = [w[members] for w in self.received] if self.own else self.received
        return self._replace(received=received, shift=[s[members] for s in self.shift])


class _State(NamedTuple):
    """What the clients of a block have each for their own; every array is [client, ...]."""

    parameters: list[Tensor]
    memory: list[Tensor]
    buffers: dict[str, Tensor]
    towards: _Towards


class _Batch(NamedTuple):
    """One call: inputs and target [k, width, ...], mask [k, width] or None, keys [k, 2]."""

    inputs: list[Tensor]
    target: Tensor
    mask: Tensor | None
    keys: Tensor


class TorchCohort:
    """See :class:`foedus.backends.cohort.Cohort`."""

    def __init__(
        self, trainer: TorchTrainer, spec: LocalSGD, found: Objective, *, size: int, recorder: Recorder
    ) -> None:
        self._trainer, self._spec, self._objective, self._recorder = trainer, spec, found, recorder
        self.unpadded, self.size = found.reason, size
        self.layout, self.buffer_layout, self.device = trainer.layout, trainer.buffer_layout, trainer.device
        self.memory, self.cache = (8 if self.device.startswith("cuda") else 1) * GIB, CACHED
        self._inputs = 1
        # A copy of its own: calling it puts other tensors in place of its parameters.
        self._module = copy.deepcopy(trainer.module).train()

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The same bits for any number of threads; attention in steps that vmap knows; and no loops over clients
        in place of batching rules that are missing, which would be slower than no batching."""
        fallback: Any = torch._C._functorch
        fallback._set_vmap_fallback_enabled(False)
        try:
            with same_bits(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            fallback._set_vmap_fallback_enabled(True)

    def copy(self) -> TorchCohort:
        return TorchCohort(self._trainer, self._spec, self._objective, size=self.size, recorder=self._recorder)

    def resident(self, pool: Examples) -> Pool:
        inputs, targets = self._trainer.tensors(pool)
        return [*inputs, targets]

    def train(self, start: Weights, pool: Pool, block: Block) -> Stacked:
        self._inputs = len(pool) - 1
        state = self._begin(start, block)
        losses = []
        for call, batch in zip(block.calls, _batches(pool, block), strict=True):
            where = call.where
            members = where if isinstance(where, slice) else torch.from_numpy(where).to(self.device)
            losses.append(self._step(state, members, batch, block.lr))
        total = torch.cat(losses).cpu().numpy() if losses else np.empty(0)
        order = np.concatenate([c.members for c in block.calls]) if losses else np.empty(0, np.int64)
        sums = np.bincount(order, weights=total, minlength=len(block.buffers))
        return Stacked(
            _flat(state.parameters, self.layout),
            _flat(list(state.buffers.values()), self.buffer_layout, rows=len(block.buffers)),
            sums / np.maximum(block.plan.steps, 1),
            None if block.guides.momenta is None else _flat(state.memory, self.layout),
        )

    def _begin(self, start: Weights, block: Block) -> _State:
        clients, own = len(block.buffers), self._trainer
        guides = block.guides
        received = self._arrays(leaves_of(own.layout, start.vector))
        if guides.start is None:
            parameters = [w.expand(clients, *w.shape).clone() for w in received]
        else:
            parameters = self._rows(guides.start)
        towards = _Towards(
            received if guides.anchor is None else self._rows(guides.anchor), guides.anchor is not None,
            [] if guides.shift is None else self._rows(guides.shift),
            self._arrays(leaves_of(own.layout, guides.mask)),
            [None if a is None else self._arrays([a])[0] for a in bases_of(own.layout, guides.bases)],
        )  # fmt: skip
        with_momentum(self._spec, guides.momenta)
        memory = [torch.zeros_like(w) for w in parameters] if self._spec.momentum else []
        memory = memory if guides.momenta is None else self._rows(guides.momenta)
        buffers = {}
        layout = own.buffer_layout
        for at, name in enumerate(layout.names):
            part = block.buffers[:, layout.slice(name)].reshape(clients, *layout.shapes[at])
            like = own.buffers[name]
            whole = not like.is_floating_point()
            buffers[name] = torch.tensor(np.rint(part) if whole else part, device=self.device, dtype=like.dtype)
        return _State(parameters, memory, buffers, towards)

    def _arrays(self, arrays: list[NDArray[Any]]) -> list[Tensor]:
        return [torch.tensor(a, device=self.device) for a in arrays]

    def _rows(self, vectors: Vector) -> list[Tensor]:
        return self._arrays(rows_of(self.layout, vectors))

    def _step(self, state: _State, members: slice | Tensor, batch: _Batch, lr: float) -> Tensor:
        """One step of some clients, in place; their losses [k]."""
        parameters = [w[members] for w in state.parameters]
        buffers = [b[members] for b in state.buffers.values()]
        masks = [] if batch.mask is None else [batch.mask]
        arguments = [*parameters, *buffers, *batch.inputs, batch.target, *masks, batch.keys]
        changed = slice(len(parameters), len(parameters) + len(buffers))
        shape = (*batch.target.shape, batch.mask is None)
        losses, *rest = self._recorder.run(shape, self._derived, arguments, changed)
        grads, after = rest[: len(parameters)], rest[len(parameters) :]
        with torch.no_grad():
            memory = [m[members] for m in state.memory]
            self._descend(parameters, memory, grads, state.towards.of(members), lr=lr)
            for old, new in zip(buffers, after, strict=True):
                if old.data_ptr() != new.data_ptr():  # the model put another tensor in its place
                    old.copy_(new)
            if isinstance(members, Tensor):  # copies were made: put them back
                parts = (*parameters, *memory, *buffers)
                for whole, part in zip((*state.parameters, *state.memory, *state.buffers.values()), parts, strict=True):
                    whole.index_copy_(0, members, part)
        return losses

    def _derived(self, *arguments: Tensor) -> list[Tensor]:
        """Losses [k], gradients [k, ...] and buffers afterwards, of parameters, buffers and a batch, all flat."""
        names, kept = self.layout.names, self.buffer_layout.names
        parameters = [p.detach().requires_grad_() for p in arguments[: len(names)]]
        buffers = dict(zip(kept, arguments[len(names) :], strict=False))
        batch = arguments[len(names) + len(kept) :]
        named = dict(zip(names, parameters, strict=True))
        with restored(self._module), torch.enable_grad(), _named_by_operator():
            losses, after = torch.vmap(self._one)(named, buffers, batch)
            with unrepeated():
                grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
        return [losses.detach(), *grads, *(after[name].detach() for name in kept)]

    def _one(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One client's loss and buffers, as a plain function."""
        inputs, (target, *masks, key) = batch[: self._inputs], batch[self._inputs :]
        state = {**parameters, **buffers}
        with stacked(key):
            output = functional_call(self._module, state, tuple(inputs))
        buffers = {name: state[name] for name in buffers}  # what the model put in their place
        if not masks:
            return self._objective.exact(output, target), buffers
        assert self._objective.masked is not None
        return self._objective.masked(output, target, *masks), buffers

    def _descend(
        self, parameters: list[Tensor], memory: list[Tensor], grads: Sequence[Tensor], towards: _Towards,
        *, lr: float,
    ) -> None:  # fmt: skip
        """The clients' step down their gradients, in place."""
        spec = self._spec
        steered = towards.shift or towards.mask or towards.bases
        if not (spec.momentum or spec.weight_decay or spec.clip_norm or spec.penalty or steered):
            torch._foreach_add_(parameters, list(grads), alpha=-lr)
            return

        def one(
            w: list[Tensor], g: list[Tensor], m: list[Tensor], received: list[Tensor], shift: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor]]:
            steering = Steering(shift, towards.mask, towards.bases)
            return descend(spec, w, g, memory=m, received=received, lr=lr, steering=steering)

        # Norms, and what a penalty may compute, are each client's own; all else is the same with one more axis.
        dims = (0, 0, 0, 0 if towards.own else None, 0)
        together = torch.vmap(one, dims) if spec.clip_norm or spec.penalty else one
        new, kept = together([p.detach() for p in parameters], list(grads), memory, towards.received, towards.shift)
        torch._foreach_copy_(parameters, new)
        if memory:
            torch._foreach_copy_(memory, kept)


def build(task: Task, spec: LocalSGD, trainer: Trainer, probe: Examples) -> TorchCohort:
    """The cohort of a task whose model is a torch module.

    Raises:
        UnsupportedOperator: see :func:`foedus.backends.cohort.open_cohort`.
    """
    assert isinstance(trainer, TorchTrainer)
    assert task.loss is not None
    demand_numpy_types(trainer.module)
    inputs, target = trainer.tensors(probe)
    found = objective(task.loss, trainer.module, inputs=inputs, target=target)
    size = _bytes(trainer, spec, inputs, target)
    return TorchCohort(trainer, spec, found, size=size, recorder=Recorder())


def demand_numpy_types(module: torch.nn.Module) -> None:
    """Refuse a model whose tensors have a type that numpy, through which weights travel, does not know.

    Raises:
        UnsupportedOperator: names the type, and a tensor that has it.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dtype is torch.bfloat16 or (tensor.dtype.itemsize == 1 and tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedOperator(f"{kind}, the type of {name!r}")


def _bytes(trainer: TorchTrainer, spec: LocalSGD, inputs: list[Tensor], target: Tensor) -> int:
    """What one client takes in a block: weights, gradients, momenta, a batch, and what a step keeps of it."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    module = copy.deepcopy(trainer.module).train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        module(*inputs)
    weights = sum(p.nbytes for p in trainer.parameters.values())
    batch = sum(x.nbytes for x in (*inputs, target)) + kept
    rows = (spec.batch_size or len(target)) / len(target)
    return int((3 if spec.momentum else 2) * weights + rows * batch)


def _batches(pool: Pool, block: Block) -> Iterator[_Batch]:
    """The batches of all calls; their row numbers go to the device in one piece."""
    device, plan = pool[0].device, block.plan
    order = np.concatenate([c.steps for c in block.calls]) if block.calls else np.empty(0, np.int64)
    keys = torch.from_numpy(plan.keys[order].view(np.int32)).to(device)
    count = torch.from_numpy(plan.count[order]).to(device)
    rows = [plan.rows[c.steps, : c.width].reshape(-1) for c in block.calls]
    flat = torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, np.int64)).to(device)
    at, begin = 0, 0
    for call in block.calls:
        members, width = len(call.members), call.width
        part = flat[begin : begin + members * width]
        *inputs, target = (x.index_select(0, part).reshape(members, width, *x.shape[1:]) for x in pool)
        own = slice(at, at + members)
        padded = bool((plan.count[call.steps] < width).any())
        mask = torch.arange(width, device=device) < count[own, None] if padded else None
        yield _Batch(inputs, target, mask, keys[own])
        at, begin = at + members, begin + members * width


def _flat(parts: list[Tensor], layout: Layout, rows: int = 0) -> NDArray[Any]:
    """[client, entry] of arrays [client, ...]."""
    if not parts:
        return np.empty((rows, 0), layout.dtype)
    flat = torch.cat([p.reshape(len(p), -1).to(getattr(torch, layout.dtype)) for p in parts], 1)
    return flat.cpu().numpy()


@contextmanager
def _named_by_operator() -> Iterator[None]:
    """vmap's complaints, as the error that names the operator."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if found := re.search(r"Batching rule not implemented for (\S+?)[.;,]?\s", text):
            raise UnsupportedOperator(found[1]) from error
        if text.startswith("vmap"):
            raise UnsupportedOperator(_first_sentence(text)) from error
        raise


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)])\. ", text.split("\n")[0])[0]
