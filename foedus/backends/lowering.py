"""A torch module's training step, lowered to one pure jax function.

The user's module is run once, for real, on an example batch: forward, loss and gradients by torch's own
autograd. Underneath, a recorder writes down every core operator that was called, after in-place changes were
made functional. The list of operators, each with a rule in ``lowering_ops.py``, is then a jax function:

    step(params, frozen, buffers, inputs, target, mask, key) -> (loss, gradients, new buffers)

which XLA compiles into one program. What a recording cannot hold is refused by name: an operator without a
rule, a value read back by Python (``.item()``), a shape that depends on data. :func:`verify` compares one step
with eager torch, since a graph that was recorded wrongly would train without complaint.

Jax is used with 64-bit types throughout (``jax.enable_x64``), so that dtypes are torch's own.

Not here: loops over steps and clients (``compiled.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foedus.backends.compiled import tainted
from foedus.backends.jax_devices import cpu_devices, keep_programs
from foedus.backends.lowering_layers import LAYER_OPERATORS, Rewritten
from foedus.backends.lowering_ops import OPERATORS
from foedus.backends.lowering_rules import Out
from foedus.backends.torch_random import counted, unrepeated
from foedus.backends.torch_record import restored
from foedus.errors import FoedusError, LoweringMismatch, UnsupportedOperator

__all__ = ["Batch", "Lowered", "lower", "verify"]

Array = Any
Objective = Callable[[Any, Tensor, Tensor], Tensor]
RULES: Final = OPERATORS | LAYER_OPERATORS


class Batch(NamedTuple):
    """What one step trains on; torch tensors for :func:`lower` and :func:`verify`.

    Attributes:
        inputs: the model's inputs, each [B, ...].
        target: [B, ...].
        mask: [B], 1 for real rows and 0 for padding.
        key: int32 [2], of the step's randomness.
    """

    inputs: tuple[Any, ...]
    target: Any
    mask: Any
    key: Any


@dataclass(frozen=True)
class Lowered:
    """A training step as a jax function, for one batch size.

    Attributes:
        instructions: the operators in order; dead ones are gone.
        constants: tensors that the model holds without registering them, by their number.
        inputs, outputs: where arguments go and results come from, as trees of numbers.
    """

    instructions: tuple[Instruction, ...]
    constants: Mapping[int, NDArray[Any]]
    inputs: Any
    outputs: Any

    def step(self, *arguments: Any) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """``(params, frozen, buffers, inputs, target, mask, key) -> (loss, gradients, new buffers)``.

        params, frozen and buffers are dicts by name; gradients are named like params. Pure; to be traced
        under ``jax.enable_x64(True)``.

        A loss that is NaN makes the gradients NaN, too: that is how an index out of range shows, which must not go
        unnoticed. Only the mean of a classification loss over no label at all is NaN in torch as well, and there its
        gradients are 0.
        """
        values: dict[int, Any] = {n: jnp.asarray(c) for n, c in self.constants.items()}
        _bind(self.inputs, arguments, values)
        pulls: dict[int, Callable[..., Any]] = {}
        hollow: list[Array] = []
        for instruction in self.instructions:
            instruction.run(values, pulls, hollow)
        loss, grads, buffers = _substituted(self.outputs, values)
        return loss, tainted(grads, loss, excused=hollow), buffers


def lower(module: torch.nn.Module, objective: Objective, batch: Batch) -> Lowered:
    """Record one training step of ``module`` and lower it.

    Args:
        module: in the mode it shall be trained in. Its state is not changed.
        objective: ``(output, target, mask) -> scalar``, the mean loss of the rows whose mask is 1.
        batch: an example with the batch size wanted; real data, since the step is really run.

    Raises:
        UnsupportedOperator: names all operators that have no rule.

    Example:
        >>> net = torch.nn.Linear(4, 3)
        >>> def objective(output, target, mask):
        ...     each = torch.nn.functional.cross_entropy(output, target, reduction="none")
        ...     return (each * mask).sum() / mask.sum()
        >>> key = torch.zeros(2, dtype=torch.int32)
        >>> batch = Batch((torch.rand(2, 4),), torch.tensor([0, 2]), torch.ones(2), key)
        >>> [str(i) for i in lower(net, objective, batch).instructions][:3]
        ['aten.detach.default', 'aten.detach.default', 'aten.addmm.default']
    """
    cpu_devices()  # one per core, before jax is used below
    keep_programs()
    params, frozen, buffers = tensors_of(module)
    arguments = (params, frozen, buffers, batch.inputs, batch.target, batch.mask, batch.key)
    recorder = Recorder()
    inputs = recorder.known(arguments)
    with restored(module), _plain_kernels(), _refusing(_UNRECORDED), recorder:
        results = _functionally(_step_of(module, objective), arguments)
    outputs = recorder.known(results)
    instructions = _live(_contracted(recorder.instructions), outputs)
    if unknown := recorder.leaks + [i.within for i in instructions if i.operator not in RULES]:
        raise UnsupportedOperator(*sorted(set(unknown)))
    lowered = Lowered(tuple(instructions), recorder.constants, inputs, outputs)
    with jax.enable_x64(True):  # rules may refuse their arguments, and every shape is checked
        jax.eval_shape(lowered.step, *_mapped(arguments, _array))
    return lowered


def tensors_of(module: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(trainable parameters, frozen parameters, buffers) by name; tied parameters once."""
    named = dict(module.named_parameters())
    params = {n: p.detach() for n, p in named.items() if p.requires_grad}
    frozen = {n: p.detach() for n, p in named.items() if not p.requires_grad}
    return params, frozen, {n: b.detach() for n, b in module.named_buffers()}


def _step_of(module: torch.nn.Module, objective: Objective) -> Callable[..., Any]:
    """The step as torch would take it: (loss, gradients, new buffers)."""
    harness = _Harness(module, objective)

    def step(params: Any, frozen: Any, buffers: Any, inputs: Any, target: Any, mask: Any, key: Any) -> Any:
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        state = {**leaves, **frozen, **{n: b.clone() for n, b in buffers.items()}}
        with Rewritten(mask), counted(key, strict=True):
            named = {f"module.{n}": t for n, t in state.items()}
            given = (list(leaves.values()), tuple(inputs), target, mask)
            loss, grads, after = torch.func.functional_call(harness, named, given)
        return loss.detach(), dict(zip(leaves, grads, strict=True)), {n: after[n].detach() for n in buffers}

    return step


_UNRECORDED: Final = "this model, whose training step could not be recorded"


class _Harness(torch.nn.Module):
    """A whole step inside one functional call: the backward pass may call checkpointed parts of the model once more,
    with the same parameters. Gives loss, gradients, and the buffers, were they changed in place or set anew."""

    def __init__(self, module: torch.nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module, self._objective = module, objective

    def forward(
        self, leaves: list[Tensor], inputs: tuple[Tensor, ...], target: Tensor, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        loss = self._objective(self.module(*inputs), target, mask)
        with unrepeated():
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss, grads, dict(self.module.named_buffers())


# --- recording --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """The place of a tensor in a recording."""

    number: int


class Instruction(NamedTuple):
    """One call of an operator; tensors among its arguments and results are :class:`Ref`.

    ``within`` is the operator that the model called, of which this one may be a part.
    """

    operator: str
    within: str
    args: Any
    kwargs: dict[str, Any]
    results: Any
    shape: tuple[int, ...]
    dtypes: dict[int, str]

    def run(self, values: dict[int, Any], pulls: dict[int, Callable[..., Any]], hollow: list[Any]) -> None:
        """Carry it out on jax arrays, reading and writing ``values``."""
        first = next(iter(self.dtypes.values()), "float32")
        out = Out(self.shape, jnp.dtype(first), pulls, hollow)
        kwargs = {k: _substituted(v, values) for k, v in self.kwargs.items()}
        with _refusing(self.within):
            _bind(self.results, RULES[self.operator](out, *_substituted(self.args, values), **kwargs), values)
        for number, dtype in self.dtypes.items():
            values[number] = values[number].astype(dtype)
        if self.dtypes and (found := values[next(iter(self.dtypes))].shape) != self.shape:
            raise UnsupportedOperator(f"{self.within} (its shape would be {found}, not torch's {self.shape})")

    def __str__(self) -> str:
        return self.operator


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator below autograd; those without a rule are decomposed first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.instructions: list[Instruction] = []
        self.constants: dict[int, NDArray[Any]] = {}
        self.leaks: list[str] = []  # operators that told Python something of the data
        self._within: str | None = None
        self._places: dict[int, Ref] = {}
        self._kept: list[Tensor] = []  # keeps ids from being given out twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled by torch, and importing its compiler takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name not in RULES:
            result = self._parts(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if torch.Tag.data_dependent_output in func.tags:
            self.leaks.append(name)
        positional, named = self._refs(args), {k: self._refs(v) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        tensors = [t for t in _leaves(result) if isinstance(t, Tensor)]
        results = self.known(result)
        dtypes = {self._places[id(t)].number: _name(t.dtype) for t in tensors}
        shape = tuple(tensors[0].shape) if tensors else ()
        self.instructions.append(Instruction(name, self._within or name, positional, named, results, shape, dtypes))
        return result

    def _parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a composite operator as its parts; NotImplemented if it has none."""
        outer = self._within
        self._within = outer or str(func)
        try:
            with self:
                return _decompositions().get(func, func.decompose)(*args, **kwargs)
        finally:
            self._within = outer

    def known(self, tree: Any) -> Any:
        """The tree with its tensors as Refs; new ones are given a number."""
        return _mapped(tree, self._place)

    def _place(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self._places:
            self._places[id(tensor)] = Ref(len(self._kept))
            self._kept.append(tensor)
        return self._places[id(tensor)]

    def _refs(self, tree: Any) -> Any:
        """As ``known``, but a tensor that was never seen is a constant of the model."""

        def ref(tensor: Tensor) -> Ref:
            if id(tensor) not in self._places:
                self.constants[self._place(tensor).number] = tensor.detach().cpu().numpy().copy()
            return self._place(tensor)

        return _mapped(tree, ref)


def _functionally(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call it with in-place changes and views made functional, so that the recorder sees none."""
    torch._enable_functionalization(reapply_views=True)
    try:
        results = function(*_mapped(arguments, torch._to_functional_tensor))
        return _mapped(results, _plain)
    finally:
        torch._disable_functionalization()  # type: ignore[no-untyped-call]


def _plain(tensor: Tensor) -> Tensor:
    if not torch._is_functional_tensor(tensor):
        return tensor
    torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(tensor)


@cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    from torch._decomp import decomposition_table  # slow to import, and often not needed

    return decomposition_table


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Faults of recording and of rules are no faults of the model: another executor may run it."""
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        raise UnsupportedOperator(f"{what} ({type(error).__name__}: {error})") from error


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without oneDNN, whose fused kernels would be recorded instead of core operators."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _contracted(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Products of transposed matrices as products of the matrices as they lie."""
    sources: dict[Any, Ref] = {}
    result = []
    for each in instructions:
        if each.operator in _TURNING and len(each.shape) == 2 and each.args[1:] in ([], [[1, 0]], [0, 1], [1, 0]):
            sources[each.results] = each.args[0]
        if each.operator in _PRODUCTS:
            *first, a, b = each.args
            turned = {"turned": (a in sources, b in sources)}
            args = [*first, sources.get(a, a), sources.get(b, b)]
            result.append(each._replace(args=args, kwargs=each.kwargs | turned))
        else:
            result.append(each)
    return result


_TURNING: Final = ("aten.t.default", "aten.permute.default", "aten.transpose.int")
_PRODUCTS: Final = ("aten.mm.default", "aten.addmm.default")


def _live(instructions: Sequence[Instruction], outputs: Any) -> list[Instruction]:
    """Only the instructions that the outputs depend on."""
    needed = {r.number for r in _leaves(outputs) if isinstance(r, Ref)}
    kept: list[Instruction] = []
    for instruction in reversed(instructions):
        if needed.intersection(instruction.dtypes):
            used = [*_leaves(instruction.args), *_leaves(list(instruction.kwargs.values()))]
            needed.update(r.number for r in used if isinstance(r, Ref))
            kept.append(instruction)
    return kept[::-1]


# --- trees of tensors, Refs and numbers ---------------------------------------------------------------------------


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _leaves(part)
    else:
        yield tree


def _mapped(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: _mapped(part, function) for name, part in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return [_mapped(part, function) for part in tree]
    return tree


def _substituted(tree: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(tree, Ref):
        return values[tree.number]
    if isinstance(tree, Mapping):
        return {name: _substituted(part, values) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [_substituted(part, values) for part in tree]
    return tree


def _bind(places: Any, arrays: Any, values: dict[int, Any]) -> None:
    """Put arrays where a tree of Refs says."""
    if isinstance(places, Ref):
        values[places.number] = arrays
    elif isinstance(places, Mapping):
        for name, place in places.items():
            _bind(place, arrays[name], values)
    elif isinstance(places, list | tuple):
        for place, array in zip(places, arrays, strict=True):
            _bind(place, array, values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- comparing with torch -----------------------------------------------------------------------------------------


def verify(
    lowered: Lowered, module: torch.nn.Module, objective: Objective, *, batch: Batch, tolerance: float = 1e-4
) -> None:
    """Compare one lowered step with eager torch: loss, gradients and buffers.

    Weights, rows and key are changed a little first, so that a value of the example batch that got stuck in the
    recording is found out. If some rows are padding, torch sees the real rows only, so that a model in which
    padding leaks into the result is found out, too.

    Raises:
        LoweringMismatch: something differs by more than ``tolerance``, relative to its norm.
    """
    params, frozen, buffers = tensors_of(module)
    params, batch = {n: p * 1.0625 for n, p in params.items()}, _turned(batch)
    loss, grads, after = _eager(module, objective, (params, frozen, buffers), batch=batch)
    with jax.enable_x64(True):
        ours = jax.jit(lowered.step)(*_mapped((params, frozen, buffers, *batch), _array))
        ours = jax.tree.map(np.asarray, ours)
    size = float(np.sqrt(sum(float(np.square(g[np.isfinite(g)], dtype=np.float64).sum()) for g in grads.values())))
    _compare("the loss", ours[0], loss, floor=tolerance, tolerance=tolerance)
    for name, grad in grads.items():
        _compare(f"the gradient of {name!r}", ours[1][name], grad, floor=1e-2 * size, tolerance=tolerance)
    for name, buffer in after.items():
        _compare(f"the buffer {name!r}", ours[2][name], buffer, floor=tolerance, tolerance=tolerance)


def _turned(batch: Batch) -> Batch:
    """Another batch of the same rows; padding stays where it is."""
    order, real = torch.arange(len(batch.mask)), batch.mask > 0
    order[real] = order[real].roll(1)
    return Batch(tuple(x[order] for x in batch.inputs), batch.target[order], batch.mask, batch.key ^ 0x5A5A)


def _eager(module: torch.nn.Module, objective: Objective, state: Any, *, batch: Batch) -> Any:
    """(loss, gradients, new buffers) by torch, over the real rows only, as numpy."""
    params, frozen, buffers = state
    real = batch.mask > 0
    inputs, target, mask = tuple(x[real] for x in batch.inputs), batch.target[real], batch.mask[real]
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    named = {**leaves, **frozen, **{n: b.clone() for n, b in buffers.items()}}
    with restored(module), counted(batch.key):
        harnessed = {f"module.{n}": t for n, t in named.items()}
        given = (list(leaves.values()), inputs, target, mask)
        loss, grads, after = torch.func.functional_call(_Harness(module, objective), harnessed, given)
    return _mapped((loss, dict(zip(leaves, grads, strict=True)), after), _array)


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _compare(what: str, ours: NDArray[Any], torchs: NDArray[Any], *, floor: float, tolerance: float) -> None:
    a, b = np.asarray(ours, np.float64), np.asarray(torchs, np.float64)
    # Equal infinities (a mask of −∞) do not differ; nor do NaNs, whose updates are refused by name, as in torch.
    with np.errstate(invalid="ignore"):
        difference = float(np.linalg.norm((a - b)[(a != b) & ~(np.isnan(a) & np.isnan(b))]))
    norm = float(np.linalg.norm(b[np.isfinite(b)]))
    if not difference <= tolerance * max(norm, floor):
        raise LoweringMismatch(what, difference / max(norm, floor), tolerance)
