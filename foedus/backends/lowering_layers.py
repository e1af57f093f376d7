"""Layers that are lowered as a whole, because their operators one by one would be wrong or slow.

While a step is traced, :class:`Rewritten` stands between the model and torch:

* batch and instance normalisation are written out in plain operators, so that the running statistics are
  ordinary in-place updates (torch's kernel changes them behind the tracer's back) and so that padded rows of
  a batch stay out of the statistics;
* attention is written out, whichever kernel torch would choose;
* a recurrent layer stays one operator, which becomes one ``lax.scan``: traced and compiled in the time of one
  step, not of the whole sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from foedus.backends.lowering_rules import HIGHEST, Array, Out
from foedus.backends.torch_random import Attention, attended
from foedus.errors import UnsupportedOperator

Cell = Callable[..., tuple[Array, ...]]  # (gates of the input, gates of the state, states) -> new states

_numbers = itertools.count()  # names each recurrent call, so that its gradient finds what the call kept


class Rewritten(TorchFunctionMode):
    """Replace some of torch's functions while a step is traced. ``mask``: [B], 1 for the batch's real rows."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (rule := _REWRITES.get(func)) is not None:
            return rule(self.mask, *args, **kwargs)
        if (kind := _KINDS.get(func)) is not None:
            return _recurrent(kind, args)
        if func in _LEAVING:
            raise UnsupportedOperator(f"torch.Tensor.{func.__name__} (values that leave torch cannot be compiled)")
        return func(*args, **kwargs)


# --- normalisation over the batch -------------------------------------------------------------------------------


class Norm(NamedTuple):
    """The options of torch's batch and instance norm, in the order of ``torch.nn.functional``."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    by_batch: bool = False  # "training" of one, "use_input_stats" of the other
    momentum: float = 0.1
    eps: float = 1e-5


def _batch_norm(mask: Tensor, x: Tensor, norm: Norm) -> Tensor:
    if norm.by_batch:
        mean, var, count = _masked_moments(mask, x, (0, *range(2, x.ndim)))
        _update(norm.running_mean, mean, norm.momentum)
        _update(norm.running_var, var * (count / (count - 1)), norm.momentum)
        return _normalised(x, mean, var, norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return _normalised(x, norm.running_mean, norm.running_var, norm)


def _masked_moments(mask: Tensor, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance per channel over the real rows, and how many values that is per channel."""
    if len(x) != len(mask):
        raise UnsupportedOperator(
            f"batch_norm over {len(x)} rows in a batch of {len(mask)} (which rows are padding is not known)"
        )
    real = mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    count = mask.to(x.dtype).sum() * math.prod(x.shape[2:])
    mean = (x * real).sum(axes) / count
    off = (x - mean.view(1, -1, *[1] * (x.ndim - 2))) * real
    return mean, (off * off).sum(axes) / count, count


def _instance_norm(mask: Tensor, x: Tensor, norm: Norm) -> Tensor:
    if not norm.by_batch:
        return _batch_norm(mask, x, norm)
    axes, area = tuple(range(2, x.ndim)), math.prod(x.shape[2:])
    mean, var = x.mean(axes), x.var(axes, correction=0)
    share = (mask / mask.sum()).to(x.dtype).view(-1, 1)
    _update(norm.running_mean, (mean * share).sum(0), norm.momentum)
    _update(norm.running_var, (var * share).sum(0) * (area / max(area - 1, 1)), norm.momentum)
    return _normalised(x, mean, var, norm)


def _update(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(momentum * value.detach().to(running.dtype))


def _normalised(x: Tensor, mean: Tensor, var: Tensor, norm: Norm) -> Tensor:
    """(x − mean) / √(var + eps), then weight and bias per channel; statistics are [C] or [B, C]."""
    ones = [1] * (x.ndim - 2)
    lead = (-1,) if mean.ndim == 2 else (1,)
    y = (x - mean.view(*lead, x.shape[1], *ones)) * (var + norm.eps).rsqrt().view(*lead, x.shape[1], *ones)
    y = y if norm.weight is None else y * norm.weight.view(1, -1, *ones)
    return y if norm.bias is None else y + norm.bias.view(1, -1, *ones)


def _functional(rule: Callable[[Tensor, Tensor, Norm], Tensor], **defaults: Any) -> Callable[..., Tensor]:
    """``rule`` with the arguments of ``torch.nn.functional``."""
    names = {"training": "by_batch", "use_input_stats": "by_batch"}

    def called(mask: Tensor, x: Tensor, *args: Any, **named: Any) -> Tensor:
        given = dict(zip(Norm._fields, args, strict=False)) | {names.get(n, n): v for n, v in named.items()}
        return rule(mask, x, Norm(**(defaults | given)))

    return called


def _kernel(rule: Callable[[Tensor, Tensor, Norm], Tensor]) -> Callable[..., Tensor]:
    """``rule`` with the arguments of torch's kernel, which has weight and bias first."""

    def called(mask: Tensor, x: Tensor, *args: Any) -> Tensor:
        weight, bias, mean, var, *rest = args
        return rule(mask, x, Norm(mean, var, weight, bias, *rest[:3]))

    return called


# --- attention --------------------------------------------------------------------------------------------------


def _attention(_mask: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
    """Without dropout: that is drawn by ``torch_random``, which never lets it come here."""
    options = Attention(*args, **named)
    assert not options.dropout_p
    return attended(query, key, value, options=options, drop=lambda weights: weights)


def _one_hot(_mask: Tensor, target: Tensor, num_classes: int = -1) -> Tensor:
    """Without torch's look at the data; the number of classes must be given."""
    if num_classes < 1:
        raise UnsupportedOperator("one_hot without num_classes (its result's shape depends on data)")
    return (target[..., None] == torch.arange(num_classes, device=target.device)).long()


# --- recurrent layers -------------------------------------------------------------------------------------------


class _Layer(torch.autograd.Function):
    """One recurrent layer in one direction: x [T, B, I] → [T, B, H] and the last state(s) [B, H]."""

    @staticmethod
    def forward(number: int, kind: str, reverse: bool, states: int, x: Tensor, *rest: Tensor) -> Any:
        state, weights = list(rest[:states]), list(rest[states:])
        return tuple(torch.ops.foedus.recurrent(x, state, weights, kind, reverse, number))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output  # only the inputs are kept
        ctx.number, _, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pulled = torch.ops.foedus.recurrent_backward(list(grads), list(ctx.saved_tensors), ctx.number)
        return None, None, None, None, *pulled


def _recurrent(kind: str, args: Any) -> Any:
    """Torch's recurrent call: (input, state, weights, biased, layers, dropout, train, both ways, batch first)."""
    if isinstance(args[2], Tensor) or (kind == "lstm" and isinstance(args[1], Tensor)):
        raise UnsupportedOperator(f"{kind} over packed sequences")
    x, state, weights, biased, layers, _, _, both_ways, batch_first = args
    state = list(state) if kind == "lstm" else [state]
    ways = 2 if both_ways else 1
    each = len(weights) // (layers * ways)
    if each == 5 or (each == 3 and not biased):
        raise UnsupportedOperator("lstm with proj_size")
    lone = x.ndim == 2
    x = x[:, None] if lone else x.transpose(0, 1) if batch_first else x
    state = [s[:, None] if lone else s for s in state]
    finals: list[Sequence[Tensor]] = []
    for layer in range(layers):
        outs = []
        for way in range(ways):
            at = layer * ways + way
            own = [s[at] for s in state]
            y, *final = _Layer.apply(  # type: ignore[no-untyped-call]
                next(_numbers), kind, way == 1, len(own), x, *own, *weights[at * each : (at + 1) * each]
            )
            outs.append(y)
            finals.append(final)
        x = outs[0] if ways == 1 else torch.cat(outs, -1)
    x = x[:, 0] if lone else x.transpose(0, 1) if batch_first else x
    ends = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    return x, *(e[:, 0] if lone else e for e in ends)


def _zeros(x: Tensor, state: list[Tensor], weights: list[Tensor], kind: str, *_: Any) -> list[Tensor]:
    """While tracing only shapes matter."""
    return [x.new_zeros(*x.shape[:2], state[0].shape[-1]), *(torch.zeros_like(s) for s in state)]


_library: Final = torch.library.Library("foedus", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "recurrent(Tensor x, Tensor[] state, Tensor[] weights, str kind, bool reverse, int number) -> Tensor[]",
    "recurrent_backward(Tensor[] grads, Tensor[] inputs, int number) -> Tensor[]",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]
for _name, _shapes in (
    ("recurrent", _zeros),
    ("recurrent_backward", lambda grads, inputs, number: [torch.zeros_like(t) for t in inputs]),
):
    _library.impl(_name, _shapes, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def recurrent(
    out: Out, x: Array, state: Sequence[Array], weights: Sequence[Array], kind: str, *rest: Any
) -> list[Array]:
    """One layer in one direction as a scan over time; keeps its own gradient for the backward rule."""
    reverse, number = rest
    outputs, kept = _forward(_CELLS[kind], x, tuple(state), weights, reverse=reverse)
    out.pulls[number] = lambda grads: _backward(_CELLS[kind], x, kept, weights, grads=grads, reverse=reverse)
    return list(outputs)


def recurrent_backward(out: Out, grads: Sequence[Array], _inputs: Any, number: int) -> list[Array]:
    gradients: list[Array] = out.pulls[number](grads)
    return gradients


def _forward(cell: Cell, x: Array, state: Any, weights: Sequence[Array], *, reverse: bool) -> tuple[Any, Any]:
    """Outputs [T, B, H] and last states; and what every step saw: gates of input and state, state before."""
    w_input, w_hidden, *biases = weights
    b_input, b_hidden = biases or (0, 0)
    gates = jnp.einsum("tbi,gi->tbg", x, w_input, precision=HIGHEST) + b_input

    def step(before: Any, of_input: Array) -> Any:
        of_state = jnp.matmul(before[0], w_hidden.T, precision=HIGHEST) + b_hidden
        after = cell(of_input, of_state, before)
        return after, (after[0], of_state, before)

    final, (outputs, of_state, before) = lax.scan(step, state, gates, reverse=reverse)
    return (outputs, *final), (gates, of_state, before)


def _backward(
    cell: Cell, x: Array, kept: Any, weights: Sequence[Array], *, grads: Sequence[Array], reverse: bool
) -> list[Array]:
    """Gradients of (x, states, weights). Those of the weights are one product over all of time at the end,
    where differentiating the scan would add one up in every step."""
    w_input, w_hidden, *biases = weights
    of_outputs, *of_final = grads

    def step(after: Any, seen: Any) -> Any:
        of_output, *arguments = seen
        pulled = jax.vjp(cell, *arguments)[1]((after[0] + of_output, *after[1:]))
        of_input, of_state, before = pulled
        through = jnp.matmul(of_state, w_hidden, precision=HIGHEST)
        return (before[0] + through, *before[1:]), (of_input, of_state)

    states, (of_input, of_state) = lax.scan(step, tuple(of_final), (of_outputs, *kept), reverse=not reverse)
    return [
        jnp.einsum("tbg,gi->tbi", of_input, w_input, precision=HIGHEST),
        *states,
        jnp.einsum("tbg,tbi->gi", of_input, x, precision=HIGHEST),
        jnp.einsum("tbg,tbh->gh", of_state, kept[2][0], precision=HIGHEST),
        *([of_input.sum((0, 1)), of_state.sum((0, 1))] if biases else []),
    ]


def _lstm_cell(x: Array, h: Array, state: Any) -> Any:
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru_cell(x: Array, h: Array, state: Any) -> Any:
    (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    z = jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    return ((1 - z) * n + z * state[0],)


_CELLS: Final[dict[str, Cell]] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": lambda x, h, _: (jnp.tanh(x + h),),
    "rnn_relu": lambda x, h, _: (jnp.maximum(x + h, 0),),
}

_KINDS: Final[dict[Any, str]] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}

_REWRITES: Final[dict[Any, Callable[..., Any]]] = {
    functional.batch_norm: _functional(_batch_norm),
    functional.instance_norm: _functional(_instance_norm, by_batch=True),
    torch.batch_norm: _kernel(_batch_norm),
    torch.instance_norm: _kernel(_instance_norm),
    functional.scaled_dot_product_attention: _attention,
    functional.one_hot: _one_hot,
}

_LEAVING: Final = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr})

LAYER_OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "foedus.recurrent.default": recurrent,
    "foedus.recurrent_backward.default": recurrent_backward,
}
"""The rules of this module's own operators."""
