"""Layers of torch computed for a whole cohort: what ``torch.func.vmap`` does slowly, or not at all.

``vmap`` turns a model of one client into one of a cohort, whose parameters have a leading axis [client, ...].
Most layers are batched well by it. Inside ``with stacked(key):`` these are computed otherwise:

* linear layers: one batched product forwards and two backwards, with gradients in the memory order of the
  weights (vmap's come out transposed, and adding them to the weights costs eight times as much);
* two-dimensional convolutions: vmap makes one grouped convolution, which is slow for large ones. On a CPU
  each client gets its own convolution; on a GPU all get one batched product over unfolded images;
* embeddings: vmap forgets the padding index, whose row has no gradient;
* LSTM, GRU and RNN: torch's fused layers cannot be batched. Large ones on a CPU are computed client by client;
  else their cells are written out, with one product over all time steps for the input's part.

It counts randomness as :class:`~foedus.backends.torch_random.counted` does.

Not here: the training loop (``torch_cohort.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foedus.backends.torch_random import counted
from foedus.errors import UnsupportedOperator

__all__ = ["stacked"]

State = tuple[Tensor, ...]

_LARGE = 1 << 20  # multiplications of one client's convolution, above which a grouped one is not worth it


class stacked(counted):
    """Counted randomness, and layers that suit a cohort; for use under ``torch.func.vmap``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (rule := _RULES.get(func)) is not None:
            result = rule(self, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return super().__torch_function__(func, types, args, kwargs)


def _over_cohort(
    plain: Callable[..., Any], batched: Callable[..., Any], results: int | None = None
) -> Callable[..., Any]:
    """``plain`` of one client's tensors that vmap turns into ``batched(clients, dims, ...)`` of the cohort's.

    ``dims`` says where each argument has its client axis (``None``: it has none); a result, or each of so many
    ``results``, has it in front.
    """

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return plain(*args)  # only if no argument belongs to a client: frozen weights on a constant

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def vmap(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
            return batched(info.batch_size, dims, *args), 0 if results is None else (0,) * results

    apply: Callable[..., Any] = Layer.apply
    return apply


# --- linear layers ------------------------------------------------------------------------------------------


def _linear_batched(clients: int, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = _front(x, dims[0], clients)
    if dims[1] is None and dims[2] is None:  # a frozen layer: one for all
        return torch.nn.functional.linear(x, weight, bias)
    weight = _front(weight, dims[1], clients)
    bias = None if bias is None else _front(bias, dims[2], clients)
    rows = x if x.ndim == 3 else x.reshape(clients, -1, x.shape[-1])  # [client, row, in]
    output = _product(rows, weight, bias)
    return output if x.ndim == 3 else output.reshape(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """``x [client, row, in] · weight [client, out, in]ᵀ + bias [client, out]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        turned = weight.transpose(1, 2)
        return torch.bmm(x, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if wanted[0] else None,
            torch.bmm(gradient.transpose(1, 2), x) if wanted[1] else None,
            gradient.sum(1) if wanted[2] else None,
        )


_product: Callable[..., Tensor] = _Product.apply
_linear = _over_cohort(torch.nn.functional.linear, _linear_batched)


# --- convolutions -------------------------------------------------------------------------------------------


def _conv2d_plain(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
    return torch.conv2d(x, weight, bias, *settings)


def _conv2d_batched(clients: int, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
    x = _front(x, dims[0], clients)  # [client, B, channel, row, column]
    if dims[1] is None and dims[2] is None:
        output = torch.conv2d(x.flatten(0, 1), weight, bias, *settings)
        return output.reshape(clients, -1, *output.shape[1:])
    weight = _front(weight, dims[1], clients)
    bias = None if bias is None else _front(bias, dims[2], clients)
    if x.is_cuda and settings[3] == 1 and not isinstance(settings[1], str):
        return unfolded(x, weight, bias, settings)
    biases = [None] * clients if bias is None else bias.unbind(0)
    parts = zip(x.unbind(0), weight.unbind(0), biases, strict=True)
    return torch.stack([torch.conv2d(*part, *settings) for part in parts])


_conv2d = _over_cohort(_conv2d_plain, _conv2d_batched)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
    """A cohort's convolution as one batched product over unfolded images (im2col).

    Args:
        x: [client, B, channel, row, column].
        weight: [client, out, channel, height, width].
        bias: [client, out] or None.
        settings: stride, padding, dilation and groups (1).
    """
    stride, padding, dilation, _ = ((s, s) if isinstance(s, int) else s for s in settings)
    size = weight.shape[-2:]
    columns = torch.nn.functional.unfold(x.flatten(0, 1), size, dilation, padding, stride)
    columns = columns.reshape(*x.shape[:2], *columns.shape[1:])  # [client, B, patch, place]
    columns = columns.transpose(1, 2).flatten(2)  # [client, patch, B·place]
    flat = weight.flatten(2)  # [client, out, patch]
    output = torch.bmm(flat, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), flat, columns)
    lengths = zip(x.shape[-2:], size, stride, padding, dilation, strict=True)
    image = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in lengths]
    return output.reshape(*output.shape[:2], x.shape[1], *image).transpose(1, 2)


# --- recurrent layers ---------------------------------------------------------------------------------------


def _layer_rule(name: str) -> Callable[..., Any]:
    """The rule of a recurrent layer.

    ``args`` as torch's own: (x, state, weights, has biases, layers, dropout, training, both ways, batch first).
    """

    def rule(draw: stacked, *args: Any) -> Any:
        if len(args) != 9 or not isinstance(args[3], bool):
            raise UnsupportedOperator(f"torch.{name} on packed sequences")
        x, state, weights, biased, layers, p, training, both_ways, batch_first = args
        states: State = (state,) if isinstance(state, Tensor) else tuple(state)
        cells = layers * (2 if both_ways else 1)
        steps = _unrolled if _small(x, weights[1]) else _fused
        each = len(weights) // cells
        outputs: list[Tensor] = []
        finals: list[State] = []
        for at in range(cells):
            backwards = bool(both_ways and at % 2)
            if at and not backwards:  # the next layer
                x, outputs = torch.cat(outputs, -1), []
                if p and training:
                    x = draw.__torch_function__(torch.dropout, (), (x, p, True))
            own = _named(weights[at * each : (at + 1) * each], biased)
            before = tuple(s[at] for s in states)
            output, final = steps(name, x, before, own, (backwards, batch_first))
            outputs.append(output)
            finals.append(final)
        return torch.cat(outputs, -1), *(torch.stack(parts) for parts in zip(*finals, strict=True))

    return rule


def _cell_rule(cell: Callable[..., State]) -> Callable[..., Any]:
    """The rule of a single cell; ``args`` as torch's own: (x, state, w_ih, w_hh, b_ih, b_hh)."""

    def rule(draw: stacked, x: Tensor, state: Any, *weights: Any) -> Any:
        own = _named([w for w in weights if w is not None], len(weights) == 4 and weights[2] is not None)
        part = _linear(x, own["w_ih"], own.get("b_ih"))
        after = cell(part, (state,) if isinstance(state, Tensor) else tuple(state), own)
        return after[0] if len(after) == 1 else after

    return rule


def _small(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer's step is so small that Python's share in it counts, or runs where launches count."""
    return x.is_cuda or x.shape[0] * x.shape[1] * weight.numel() < 16 * _LARGE


def _unrolled(
    name: str, x: Tensor, state: State, weights: dict[str, Tensor], how: tuple[bool, bool]
) -> tuple[Tensor, State]:
    """One layer in one direction: outputs [B, T, h] or [T, B, h], and the state after the last step [B, h]."""
    backwards, batch_first = how
    time = 1 if batch_first else 0
    inputs = _linear(x, weights["w_ih"], weights.get("b_ih")).unbind(time)
    outputs = []
    for part in reversed(inputs) if backwards else inputs:
        state = _CELLS[name](part, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, time), state


def _fused(
    name: str, x: Tensor, state: State, weights: dict[str, Tensor], how: tuple[bool, bool]
) -> tuple[Tensor, State]:
    """The same by torch's own layer, client by client."""
    backwards, batch_first = how
    time = 1 if batch_first else 0
    biased = "b_ih" in weights
    parts = (*(s.unsqueeze(0) for s in state), *weights.values())
    output, *final = _FUSED[name](name, biased, batch_first, x.flip(time) if backwards else x, *parts)
    return output.flip(time) if backwards else output, tuple(s.squeeze(0) for s in final)


def _fused_plain(name: str, biased: bool, batch_first: bool, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    states = 2 if name == "lstm" else 1
    state = parts[:states] if states == 2 else parts[0]
    result: tuple[Tensor, ...] = getattr(torch, name)(
        x, state, list(parts[states:]), biased, 1, 0.0, True, False, batch_first
    )
    return result


def _fused_batched(clients: int, dims: Any, name: str, biased: bool, batch_first: bool, *parts: Tensor) -> State:
    own = [_front(p, d, clients).unbind(0) for p, d in zip(parts, dims[3:], strict=True)]
    each = [_fused_plain(name, biased, batch_first, *p) for p in zip(*own, strict=True)]
    return tuple(torch.stack(outs) for outs in zip(*each, strict=True))


def _named(weights: Sequence[Tensor], biased: bool) -> dict[str, Tensor]:
    names = ("w_ih", "w_hh", *(("b_ih", "b_hh") if biased else ()), "w_hr")
    return dict(zip(names, weights, strict=False))


# A cell: (the input's part, state, weights) → the state afterwards, whose first is the output.


def _lstm(part: Tensor, state: State, weights: dict[str, Tensor]) -> State:
    """Hochreiter & Schmidhuber 1997, with forget gates; gates in torch's order i, f, g, o."""
    h, c = state
    i, f, g, o = (part + _linear(h, weights["w_hh"], weights.get("b_hh"))).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if "w_hr" in weights:  # a projected state (proj_size)
        h = _linear(h, weights["w_hr"], None)
    return h, c


def _gru(part: Tensor, state: State, weights: dict[str, Tensor]) -> State:
    """Cho et al. 2014, in torch's form: the reset gate acts on the product."""
    (h,) = state
    reset, update, new = part.chunk(3, -1)
    own_reset, own_update, own_new = _linear(h, weights["w_hh"], weights.get("b_hh")).chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
    share = torch.sigmoid(update + own_update)
    return (new + share * (h - new),)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    """Elman 1990."""

    def cell(part: Tensor, state: State, weights: dict[str, Tensor]) -> State:
        return (activation(part + _linear(state[0], weights["w_hh"], weights.get("b_hh"))),)

    return cell


def _front(x: Tensor, dim: int | None, clients: int) -> Tensor:
    """The client axis in front; what is the same for all is repeated without copying."""
    if dim is None:
        return x.expand(clients, *x.shape)
    return x.movedim(dim, 0) if dim else x


# --- which function is computed how -------------------------------------------------------------------------


def _linear_rule(draw: stacked, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = _linear(input, weight, bias)
    return output


def _conv2d_rule(
    draw: stacked, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    steps = stride if isinstance(stride, int) else max(stride)
    places = input.shape[-1] * input.shape[-2] // steps**2
    if input.ndim != 4 or (not input.is_cuda and len(input) * places * weight.numel() < _LARGE):
        return NotImplemented
    return _conv2d(input, weight, bias, (stride, padding, dilation, groups))


def _embedding_rule(
    draw: stacked, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    del norm_type, sparse  # the gradient's form, not its value
    if max_norm is not None:
        raise UnsupportedOperator("torch.nn.functional.embedding with max_norm")
    found = torch.embedding(weight, input, -1, scale_grad_by_freq)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), found.detach(), found)


_CELLS: Final[dict[str, Callable[..., State]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
}
_FUSED: Final[dict[str, Callable[..., Any]]] = {
    name: _over_cohort(_fused_plain, _fused_batched, 3 if name == "lstm" else 2) for name in _CELLS
}
_RULES: Final[dict[Any, Callable[..., Any]]] = {
    torch.nn.functional.linear: _linear_rule,
    torch.conv2d: _conv2d_rule,
    torch.nn.functional.embedding: _embedding_rule,
    **{getattr(torch, name): _layer_rule(name) for name in _CELLS},
    **{getattr(torch, f"{name}_cell"): _cell_rule(cell) for name, cell in _CELLS.items()},
}
