"""Torch's core operators in jax: one table from an operator's name to a small function.

Every rule is called as ``rule(out, *args, **kwargs)`` with the arguments that torch was called with (tensors
are jax arrays now), and ``out`` saying what torch's result looked like. The interpreter casts the result to
``out.dtype``, so that a rule need not repeat torch's promotion of types.

Where jax is laxer than torch, the rules are strict in the only way that compiled code can be: an index out of
range, an error in torch, gives NaN, which the engine refuses at the end of the client's round.

Not here: how a module becomes a list of operators (``lowering.py``), and layers that are lowered as a whole
(``lowering_layers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from foedus.errors import UnsupportedOperator

Array = Any
Rule = Callable[..., Any]

HIGHEST: Final = lax.Precision.HIGHEST  # no TF32: it breaks the agreement between executors
FEW_ROWS: Final = 12  # up to so many summands a product is quicker as a sum of outer products, on a CPU …
IN_CACHE: Final = 2**19  # … as long as the result stays in the cache
FEW_CLASSES: Final = 1024  # up to so many, comparing with every class beats gathering and scattering


class Out(NamedTuple):
    """What torch's result looked like: of a tuple, its first tensor. ``pulls`` keeps what backward rules need."""

    shape: tuple[int, ...]
    dtype: Any
    pulls: dict[int, Callable[..., Any]]


# --- helpers ------------------------------------------------------------------------------------------------


def plain(function: Rule) -> Rule:
    """A rule that needs the arguments only."""
    return lambda out, *args, **kwargs: function(*args, **kwargs)


def pointwise(function: Rule) -> Rule:
    """A rule whose arguments are brought to the result's dtype first."""

    def rule(out: Out, *args: Any) -> Array:
        return function(*(jnp.asarray(a, out.dtype) for a in args))

    return rule


def reshaped(out: Out, x: Array, *_: Any, **__: Any) -> Array:
    """All operators that only say the shape anew."""
    return x.reshape(out.shape)


def filled(value: float) -> Rule:
    return lambda out, *_, **__: jnp.full(out.shape, value, out.dtype)


def axes_of(x: Array, dims: Any) -> tuple[int, ...]:
    """Torch's ``dim`` argument: None or an empty list stand for all axes."""
    if dims is None or dims == []:
        return tuple(range(x.ndim))
    return tuple(d % max(x.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims))


def _reduction(function: Rule) -> Rule:
    def rule(out: Out, x: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
        return function(x.astype(out.dtype), axis=axes_of(x, dim), keepdims=keepdim)

    return rule


# --- arithmetic ---------------------------------------------------------------------------------------------


def add(out: Out, a: Array, b: Array, alpha: float = 1) -> Array:
    a, b = jnp.asarray(a, out.dtype), jnp.asarray(b, out.dtype)
    return a + (b if alpha == 1 else alpha * b)


def subtract(out: Out, a: Array, b: Array, alpha: float = 1) -> Array:
    return add(out, a, b, -alpha) if alpha != 1 else jnp.asarray(a, out.dtype) - jnp.asarray(b, out.dtype)


def reverse_subtract(out: Out, a: Array, b: Array, alpha: float = 1) -> Array:
    return subtract(out, b, a, alpha)


def divide(out: Out, a: Array, b: Array, rounding_mode: str | None = None) -> Array:
    a, b = jnp.asarray(a, out.dtype), jnp.asarray(b, out.dtype)
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    if rounding_mode == "trunc":
        return lax.div(*jnp.broadcast_arrays(a, b)) if jnp.issubdtype(out.dtype, jnp.integer) else jnp.trunc(a / b)
    return a / b


def power(out: Out, base: Array, exponent: Any) -> Array:
    if isinstance(exponent, int | float):
        if exponent == 0.5:
            return jnp.sqrt(base)
        if float(exponent).is_integer() and abs(exponent) <= 64:
            return lax.integer_pow(jnp.asarray(base, out.dtype), int(exponent))
    return jnp.power(jnp.asarray(base, out.dtype), jnp.asarray(exponent, out.dtype))


def clamp(out: Out, x: Array, low: Any = None, high: Any = None, *, min: Any = None, max: Any = None) -> Array:
    low, high = low if min is None else min, high if max is None else max
    x = x if low is None else jnp.maximum(x, jnp.asarray(low, out.dtype))
    return x if high is None else jnp.minimum(x, jnp.asarray(high, out.dtype))


def addcmul(out: Out, x: Array, a: Array, b: Array, value: float = 1) -> Array:
    return x + value * a * b


def addcdiv(out: Out, x: Array, a: Array, b: Array, value: float = 1) -> Array:
    return x + value * a / b


def where(out: Out, condition: Array, a: Any = 0, b: Any = 0) -> Array:
    return jnp.where(condition, jnp.asarray(a, out.dtype), jnp.asarray(b, out.dtype))


def masked_fill(out: Out, x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, jnp.asarray(value, out.dtype), x)


# --- products -----------------------------------------------------------------------------------------------


def product(a: Array, b: Array) -> Array:
    """a [M, K] · b [K, N]. Gradients of weights sum few outer products, which XLA fuses into the update."""
    terms = a.shape[1]
    if 0 < terms <= FEW_ROWS and 2048 <= a.shape[0] * b.shape[1] <= IN_CACHE and jax.default_backend() == "cpu":
        total = a[:, 0, None] * b[0]
        for k in range(1, terms):
            total = total + a[:, k, None] * b[k]
        return total
    return jnp.matmul(a, b, precision=HIGHEST)


def scaled_sum(x: Array, y: Array, beta: float, alpha: float) -> Array:
    y = y if alpha == 1 else alpha * y
    return y + (x if beta == 1 else beta * x) if beta else y


def addmm(out: Out, bias: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1) -> Array:
    return scaled_sum(bias, product(a, b), beta, alpha)


def add_matmul(out: Out, bias: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1) -> Array:
    return scaled_sum(bias, matmul(a, b), beta, alpha)


def matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


# --- reductions ---------------------------------------------------------------------------------------------


def total(out: Out, x: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
    return jnp.sum(x.astype(out.dtype), axis=axes_of(x, dim), keepdims=keepdim)


def variance(out: Out, x: Array, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Array:
    if isinstance(dim, bool):  # the overload without axes: (x, unbiased)
        dim, correction = None, int(dim)
    axes = axes_of(x, dim)
    count = math.prod(x.shape[a] for a in axes)
    squares = jnp.square(x - jnp.mean(x, axis=axes, keepdims=True))
    return jnp.sum(squares, axis=axes, keepdims=keepdim) / (count - (1 if correction is None else correction))


def variance_and_mean(out: Out, x: Array, dim: Any = None, **options: Any) -> tuple[Array, Array]:
    keep = options.get("keepdim", False)
    return variance(out, x, dim, **options), jnp.mean(x, axis=axes_of(x, dim), keepdims=keep)


def extreme(value: Rule, place: Rule) -> Rule:
    """max or min along an axis, with the place of its first occurrence."""

    def rule(out: Out, x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
        return value(x, axis=dim, keepdims=keepdim), place(x, axis=dim, keepdims=keepdim)

    return rule


def place_of(function: Rule) -> Rule:
    def rule(out: Out, x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
        return function(x, axis=dim, keepdims=keepdim).reshape(out.shape)

    return rule


def vector_norm(
    out: Out, x: Array, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Array:
    axes, size = axes_of(x, dim), jnp.abs(x)
    if order == 2:
        return jnp.sqrt(jnp.sum(size * size, axis=axes, keepdims=keepdim))
    if order == math.inf:
        return jnp.max(size, axis=axes, keepdims=keepdim)
    if order == 0:
        return jnp.sum(size != 0, axis=axes, keepdims=keepdim)
    return jnp.sum(size**order, axis=axes, keepdims=keepdim) ** (1 / order)


def running(function: Rule) -> Rule:
    return lambda out, x, dim, **_: function(x.astype(out.dtype), axis=dim)


def sorted_by(out: Out, x: Array, dim: int = -1, descending: bool = False, **_: Any) -> tuple[Array, Array]:
    order = jnp.argsort(x, axis=dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, order, axis=dim), order


def stable_sort(out: Out, x: Array, *, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    return sorted_by(out, x, dim, descending)


def middle(out: Out, x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    """The median along an axis, the lower of two, and its place."""
    at = (x.shape[dim] - 1) // 2
    return tuple(lax.index_in_dim(v, at, dim, keepdims=keepdim) for v in sorted_by(out, x, dim))  # type: ignore[return-value]


def top(out: Out, x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, order = sorted_by(out, x, dim, largest)
    return lax.slice_in_dim(values, 0, k, axis=dim % x.ndim), lax.slice_in_dim(order, 0, k, axis=dim % x.ndim)


# --- softmax, normalisation, activations with their gradients -------------------------------------------------


def softmax_backward(out: Out, grad: Array, y: Array, dim: int, _dtype: Any) -> Array:
    return y * (grad - jnp.sum(grad * y, axis=dim, keepdims=True))


def log_softmax_backward(out: Out, grad: Array, y: Array, dim: int, _dtype: Any) -> Array:
    return grad - jnp.exp(y) * jnp.sum(grad, axis=dim, keepdims=True)


def log_softmax(out: Out, x: Array, dim: int, *_: Any) -> Array:
    return jax.nn.log_softmax(x.astype(out.dtype), axis=dim)


def softmax(out: Out, x: Array, dim: int, *_: Any) -> Array:
    return jax.nn.softmax(x.astype(out.dtype), axis=dim)


def layer_norm(out: Out, x: Array, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    mean, spread = _moments(x, axes, eps)
    y = (x - mean) * spread
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, spread


def group_norm(out: Out, x: Array, weight: Any, bias: Any, *numbers: Any) -> Any:
    n, channels, _area, groups, eps = numbers
    grouped = x.reshape(n, groups, -1)
    mean, spread = _moments(grouped, (2,), eps)
    y = ((grouped - mean) * spread).reshape(x.shape)
    per_channel = (1, channels, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(per_channel)
    y = y if bias is None else y + bias.reshape(per_channel)
    return y, mean.reshape(n, groups), spread.reshape(n, groups)


def _moments(x: Array, axes: tuple[int, ...], eps: float) -> tuple[Array, Array]:
    mean = jnp.mean(x, axis=axes, keepdims=True)
    return mean, lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=axes, keepdims=True) + eps)


def gelu(out: Out, x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def gelu_backward(out: Out, grad: Array, x: Array, approximate: str = "none") -> Array:
    return jax.vjp(lambda v: jax.nn.gelu(v, approximate=approximate == "tanh"), x)[1](grad)[0]


def silu_backward(out: Out, grad: Array, x: Array) -> Array:
    gate = jax.nn.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


def threshold_backward(out: Out, grad: Array, x: Array, threshold: float) -> Array:
    return jnp.where(x <= threshold, jnp.zeros((), out.dtype), grad)


def leaky_relu(out: Out, x: Array, slope: float = 0.01) -> Array:
    return jnp.where(x > 0, x, slope * x)


def leaky_relu_backward(out: Out, grad: Array, x: Array, slope: float, _is_result: bool) -> Array:
    return jnp.where(x > 0, grad, slope * grad)


# --- classification losses ------------------------------------------------------------------------------------


def nll_loss(out: Out, x: Array, target: Array, weight: Any, *options: int) -> tuple[Array, Array]:
    """Negative log-likelihood by comparing with every class, which needs no gather. x: [B, C, ...] or [C]."""
    reduction, ignore_index = options
    share, axis = _class_weights(x, target, weight, ignore_index)
    chosen = jnp.where(_one_hot(x, target, axis), x, 0).sum(axis)
    losses, weighed = -chosen * share, share.sum()
    if reduction == 0:
        return losses, jnp.zeros((), x.dtype)
    return (losses.sum() / weighed if reduction == 1 else losses.sum()), weighed


def nll_loss_backward(out: Out, grad: Array, x: Array, target: Array, weight: Any, *options: Any) -> Array:
    reduction, ignore_index, weighed = options
    share, axis = _class_weights(x, target, weight, ignore_index)
    factor = jnp.expand_dims(-grad * share / (weighed if reduction == 1 else 1), axis)
    return jnp.where(_one_hot(x, target, axis) | jnp.isnan(factor), factor, 0)


def _one_hot(x: Array, target: Array, axis: int) -> Array:
    classes = lax.broadcasted_iota(target.dtype, x.shape, axis)
    return classes == jnp.expand_dims(target, axis)


def _class_weights(x: Array, target: Array, weight: Any, ignore_index: int) -> tuple[Array, int]:
    """Every example's weight (0 if ignored, NaN if its class does not exist), and the axis of classes."""
    axis = 0 if x.ndim == 1 else 1
    count = x.shape[axis]
    share = jnp.ones(target.shape, x.dtype)
    if weight is not None:
        classes = lax.broadcasted_iota(target.dtype, x.shape, axis)
        table = weight.reshape([count if a == axis else 1 for a in range(x.ndim)])
        share = jnp.where(classes == jnp.expand_dims(target, axis), table, 0).sum(axis)
    share = jnp.where((target >= 0) & (target < count), share, jnp.nan)
    return jnp.where(target == ignore_index, 0, share), axis


# --- indexing -------------------------------------------------------------------------------------------------


def gather(out: Out, x: Array, dim: int, index: Array, **_: Any) -> Array:
    if not x.ndim:
        return x.reshape(out.shape)
    dim %= x.ndim
    x = x[tuple(slice(None) if a == dim else slice(0, n) for a, n in enumerate(index.shape))]
    if index.shape[dim] == 1 and x.shape[dim] <= FEW_CLASSES and jnp.issubdtype(x.dtype, jnp.floating):
        chosen = jnp.where(_along(x, dim, index), x, 0).sum(dim, keepdims=True)
        return jnp.where((index >= 0) & (index < x.shape[dim]), chosen, jnp.nan)
    return jnp.take_along_axis(x, index, axis=dim, mode="fill")


def scatter(combine: str) -> Rule:
    """``set`` or ``add`` of values at ``index`` along an axis; the value may be a number."""

    def rule(out: Out, x: Array, dim: int, index: Array, source: Any, **_: Any) -> Array:
        if not x.ndim:
            return jnp.asarray(source, out.dtype).reshape(()) + (x if combine == "add" else 0)
        dim %= x.ndim
        source = jnp.broadcast_to(jnp.asarray(source, out.dtype), index.shape) if jnp.ndim(source) == 0 else source
        source = source[tuple(slice(0, n) for n in index.shape)]
        if index.shape[dim] == 1 and x.shape[dim] <= FEW_CLASSES and _same_but(x, index, dim):
            hit = _along(x, dim, index)
            return jnp.where(hit, source + (x if combine == "add" else 0), x)
        at = list(jnp.ogrid[tuple(slice(0, n) for n in index.shape)])
        at[dim] = index
        return getattr(x.at[tuple(at)], combine)(source)

    return rule


def _along(x: Array, dim: int, index: Array) -> Array:
    return lax.broadcasted_iota(index.dtype, x.shape, dim) == index


def _same_but(x: Array, index: Array, dim: int) -> bool:
    return all(a == b for d, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)) if d != dim)


def index(out: Out, x: Array, indices: Sequence[Any]) -> Array:
    return x.at[_subscript(indices)].get(mode="fill")


def index_put(out: Out, x: Array, indices: Sequence[Any], values: Array, accumulate: bool = False) -> Array:
    if len(indices) == 1 and indices[0].dtype == jnp.bool_ and values.size == 1:
        chosen = indices[0].reshape(*indices[0].shape, *[1] * (x.ndim - indices[0].ndim))
        return jnp.where(chosen, values.reshape(()) + (x if accumulate else 0), x)
    place = x.at[_subscript(indices)]
    return place.add(values) if accumulate else place.set(values)


def _subscript(indices: Sequence[Any]) -> tuple[Any, ...]:
    if any(i is not None and i.dtype == jnp.bool_ for i in indices):
        raise UnsupportedOperator("aten.index.Tensor with a boolean mask (its result's shape depends on data)")
    return tuple(slice(None) if i is None else i for i in indices)


def index_select(out: Out, x: Array, dim: int, rows: Array) -> Array:
    return jnp.take(x, rows, axis=dim, mode="fill").reshape(out.shape)


def embedding(out: Out, table: Array, words: Array, *_: Any, **__: Any) -> Array:
    inside = (words >= 0) & (words < table.shape[0])
    return jnp.where(inside[..., None], jnp.take(table, words, axis=0, mode="clip"), jnp.nan)


def embedding_backward(
    out: Out, grad: Array, words: Array, rows: int, padding: int = -1, by_frequency: bool = False
) -> Array:
    flat, grad = words.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if by_frequency:
        grad = grad / jnp.zeros(rows, grad.dtype).at[flat].add(1)[flat][:, None]
    if rows <= FEW_CLASSES:
        chosen = (flat == jnp.arange(rows, dtype=flat.dtype)[:, None]).astype(grad.dtype)
        summed = jnp.matmul(chosen, grad, precision=HIGHEST)
    else:
        summed = jnp.zeros((rows, grad.shape[-1]), grad.dtype).at[flat].add(grad)
    return summed if padding < 0 else summed.at[padding].set(0)


def select(out: Out, x: Array, dim: int, place: int) -> Array:
    return lax.index_in_dim(x, place, dim, keepdims=False)


def sliced(out: Out, x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    return x[_slices(x, dim, start, end, step)]


def slice_scatter(
    out: Out, x: Array, source: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Array:
    return x.at[_slices(x, dim, start, end, step)].set(source)


def _slices(x: Array, dim: int, start: Any, end: Any, step: int) -> tuple[slice, ...]:
    end = None if end is None or end >= x.shape[dim] else end
    return tuple(slice(start, end, step) if a == dim % x.ndim else slice(None) for a in range(x.ndim))


def select_scatter(out: Out, x: Array, source: Array, dim: int, place: int) -> Array:
    return x.at[tuple(place if a == dim % x.ndim else slice(None) for a in range(x.ndim))].set(source)


def select_backward(out: Out, grad: Array, sizes: Sequence[int], dim: int, place: int) -> Array:
    return select_scatter(out, jnp.zeros(sizes, grad.dtype), grad, dim, place)


def slice_backward(
    out: Out, grad: Array, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Array:
    return slice_scatter(out, jnp.zeros(sizes, grad.dtype), grad, dim, start, end, step)


# --- shapes -----------------------------------------------------------------------------------------------------


def expand(out: Out, x: Array, *_: Any, **__: Any) -> Array:
    return jnp.broadcast_to(x, out.shape)


def repeat(out: Out, x: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(x.reshape((1,) * (len(repeats) - x.ndim) + x.shape), repeats)


def split(out: Out, x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    length = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [lax.slice_in_dim(x, e - n, e, axis=dim % x.ndim) for e, n in zip(ends, sizes, strict=True)]


def unbind(out: Out, x: Array, dim: int = 0) -> list[Array]:
    return [lax.index_in_dim(x, i, dim, keepdims=False) for i in range(x.shape[dim])]


def joined(out: Out, parts: Sequence[Array], dim: int = 0) -> Array:
    kept = [p.astype(out.dtype) for p in parts if p.shape != (0,)]  # torch lets an empty vector pass
    return jnp.concatenate(kept, axis=dim) if kept else jnp.zeros(out.shape, out.dtype)


def padded(out: Out, x: Array, pads: Sequence[int], value: float = 0) -> Array:
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    return lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in widths])


def copied(out: Out, x: Array, source: Array, *_: Any) -> Array:
    return jnp.broadcast_to(source.astype(out.dtype), x.shape)


def set_all(out: Out, x: Array, value: Any) -> Array:
    return jnp.full(out.shape, value, out.dtype)


def arange(out: Out, start: float, end: Any = None, step: float = 1, **_: Any) -> Array:
    start = 0 if end is None else start
    wide = jnp.arange(out.shape[0], dtype=out.dtype)
    return wide * jnp.asarray(step, out.dtype) + jnp.asarray(start, out.dtype)


def diagonal(out: Out, x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


def triangle(function: Rule) -> Rule:
    return lambda out, x, diagonal=0: function(x, k=diagonal)


def strided(out: Out, x: Array, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Array:
    """Only the case in which a dense array is seen as it lies; the general one depends on memory layouts."""
    dense = [math.prod(size[i + 1 :]) for i in range(len(size))]
    if list(stride) != dense or offset or math.prod(size) != x.size:
        raise UnsupportedOperator("aten.as_strided.default")
    return x.reshape(out.shape)


# --- convolutions and pools -------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """The numbers of a convolution, in torch's order."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


def convolved(x: Array, weight: Array, g: Geometry) -> Array:
    """x [B, C, ...] with weight [O, C/groups, ...] (transposed: [C, O/groups, ...])."""
    rank = x.ndim - 2
    stride, padding, dilation, extra = (_each(v, rank) for v in (g.stride, g.padding, g.dilation, g.output_padding))
    letters = "XYZ"[:rank]
    names = ("NC" + letters, "OI" + letters, "NC" + letters)
    if not g.transposed:
        pads = [(p, p) for p in padding]
        return lax.conv_general_dilated(
            x, weight, stride, pads, rhs_dilation=dilation, dimension_numbers=names,
            feature_group_count=g.groups, precision=HIGHEST,
        )  # fmt: skip
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    return lax.conv_general_dilated(
        x, _turned(weight, g.groups), (1,) * rank, pads, lhs_dilation=stride, rhs_dilation=dilation,
        dimension_numbers=names, feature_group_count=g.groups, precision=HIGHEST,
    )  # fmt: skip


def _turned(weight: Array, groups: int) -> Array:
    """The kernel [C, O/g, ...] of a transposed convolution as that of an ordinary one, [O, C/g, ...]."""
    inputs, outputs, *window = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *window).swapaxes(1, 2)
    return jnp.flip(split.reshape(groups * outputs, inputs // groups, *window), range(2, weight.ndim))


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def convolution(out: Out, x: Array, weight: Array, bias: Any, *geometry: Any) -> Array:
    batched = x.ndim == weight.ndim
    y = convolved(x if batched else x[None], weight, Geometry(*geometry))
    y = y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))
    return y if batched else y[0]


def convolution_backward(out: Out, grad: Array, x: Array, weight: Array, bias_sizes: Any, *rest: Any) -> Any:
    *geometry, wanted = rest
    pull = jax.vjp(lambda x, w: convolved(x, w, Geometry(*geometry)), x, weight)[1]
    inputs, weights = pull(grad)
    sums = grad.sum((0, *range(2, grad.ndim))) if wanted[2] else None
    return inputs if wanted[0] else None, weights if wanted[1] else None, sums


class Pool(NamedTuple):
    """A pooling window, one number per spatial axis."""

    window: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]


def _pool(rank: int, window: Any, stride: Any, padding: Any, dilation: Any = 1) -> Pool:
    window = _each(window, rank)
    return Pool(window, _each(stride or window, rank), _each(padding, rank), _each(dilation, rank))


def _views(x: Array, pool: Pool, outputs: Sequence[int], fill: float) -> list[Array]:
    """For each offset in the window, what every output sees there: list of [..., outputs]."""
    lead, rank = x.ndim - len(pool.window), len(pool.window)
    spans = [d * (k - 1) + s * (n - 1) + 1 for k, s, _, d, n in zip(*pool, outputs, strict=True)]
    pads = [(p, max(0, span - length - p), 0) for p, span, length in zip(pool.padding, spans, x.shape[lead:], strict=True)]
    wide = lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0)] * lead + pads)
    views = []
    for flat in range(math.prod(pool.window)):
        at = [o * d for o, d in zip(_unravel(flat, pool.window), pool.dilation, strict=True)]
        take = (slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(at, pool.stride, outputs, strict=True))
        views.append(wide[(..., *take)])
    assert rank == len(outputs)
    return views


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    place = []
    for length in reversed(shape):
        flat, at = divmod(flat, length)
        place.append(at)
    return place[::-1]


def max_pool(rank: int) -> Rule:
    """Values, and torch's flat places of them in the input."""

    def rule(out: Out, x: Array, window: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *_: Any) -> Any:
        pool, outputs = _pool(rank, window, stride, padding, dilation), out.shape[-rank:]
        best, chosen = _largest(x, pool, outputs)
        return best, _places(chosen, pool, x.shape[-rank:])

    return rule


def _largest(x: Array, pool: Pool, outputs: Sequence[int]) -> tuple[Array, Array]:
    """The greatest value of every window, and which offset of the window has it first (a NaN wins)."""
    best = chosen = None
    for number, view in enumerate(_views(x, pool, outputs, -math.inf)):
        if best is None or chosen is None:
            best, chosen = view, jnp.zeros(view.shape, jnp.int32)
            continue
        better = (view > best) | jnp.isnan(view)
        best, chosen = jnp.where(better, view, best), jnp.where(better, number, chosen)
    return best, chosen


def _places(chosen: Array, pool: Pool, lengths: Sequence[int]) -> Array:
    rank = len(lengths)
    place = jnp.zeros(chosen.shape, jnp.int64)
    for axis in range(rank):
        inner = math.prod(pool.window[axis + 1 :])
        offset = (chosen // inner) % pool.window[axis] * pool.dilation[axis]
        along = lax.broadcasted_iota(jnp.int32, chosen.shape, chosen.ndim - rank + axis)
        place = place * lengths[axis] + along * pool.stride[axis] - pool.padding[axis] + offset
    return place


def max_pool_backward(rank: int) -> Rule:
    def rule(out: Out, grad: Array, x: Array, window: Any, stride: Any, padding: Any, dilation: Any, *_: Any) -> Array:
        pool = _pool(rank, window, stride, padding, dilation)
        outputs = grad.shape[-rank:]
        _, chosen = _largest(x, pool, outputs)
        views = [jnp.where(chosen == number, grad, 0) for number in range(math.prod(pool.window))]
        return jax.vjp(lambda v: _views(v, pool, outputs, 0.0), x)[1](views)[0]

    return rule


def average_pool(rank: int) -> Rule:
    def rule(out: Out, x: Array, *options: Any) -> Array:
        return _averaged(x, out.shape[-rank:], rank, options)

    return rule


def average_pool_backward(rank: int) -> Rule:
    def rule(out: Out, grad: Array, x: Array, *options: Any) -> Array:
        return jax.vjp(lambda v: _averaged(v, grad.shape[-rank:], rank, options), x)[1](grad)[0]

    return rule


def _averaged(x: Array, outputs: Sequence[int], rank: int, options: Sequence[Any]) -> Array:
    defaults = (None, (), 0, False, True, None)
    window, stride, padding, _, count_padding, divisor = (*options, *defaults[len(options) :])
    pool = _pool(rank, window, stride, padding)
    summed = sum(_views(x, pool, outputs, 0.0))
    if divisor:
        return summed / divisor
    # What counts as seen: the input itself, and its padding if asked, but not the overhang of ceil_mode.
    seen = jnp.ones(x.shape[-rank:], x.dtype)
    if count_padding:
        seen = jnp.pad(seen, [(p, p) for p in pool.padding], constant_values=1)
        pool = pool._replace(padding=[0] * rank)
    return summed / sum(_views(seen, pool, outputs, 0.0))


def adaptive_average(rank: int) -> Rule:
    def rule(out: Out, x: Array, *_: Any) -> Array:
        return _adaptive(x, out.shape[-rank:])

    return rule


def adaptive_average_backward(rank: int) -> Rule:
    def rule(out: Out, grad: Array, x: Array) -> Array:
        return jax.vjp(lambda v: _adaptive(v, grad.shape[-rank:]), x)[1](grad)[0]

    return rule


def _adaptive(x: Array, outputs: Sequence[int]) -> Array:
    """The mean of each of torch's bins, axis by axis: bin i covers ⌊i·n/m⌋ … ⌈(i+1)·n/m⌉."""
    for axis, m in zip(range(x.ndim - len(outputs), x.ndim), outputs, strict=True):
        n = x.shape[axis]
        bins = [lax.slice_in_dim(x, i * n // m, -(-(i + 1) * n // m), axis=axis) for i in range(m)]
        x = jnp.concatenate([b.mean(axis, keepdims=True) for b in bins], axis)
    return x


def adaptive_max(out: Out, x: Array, sizes: Sequence[int]) -> tuple[Array, Array]:
    """Values and torch's flat places, bin by bin (two spatial axes)."""
    (height, width), (rows, columns) = x.shape[-2:], sizes
    values, places = [], []
    for i in range(rows):
        top, bottom = i * height // rows, -(-(i + 1) * height // rows)
        for j in range(columns):
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            part = x[..., top:bottom, left:right].reshape(*x.shape[:-2], -1)
            at = jnp.argmax(part, -1)
            values.append(part.max(-1))
            places.append((top + at // (right - left)) * width + left + at % (right - left))
    return tuple(jnp.stack(v, -1).reshape(out.shape) for v in (values, places))  # type: ignore[return-value]


def adaptive_max_backward(out: Out, grad: Array, x: Array, places: Array) -> Array:
    lead = math.prod(x.shape[:-2])
    flat = jnp.zeros((lead, x.shape[-2] * x.shape[-1]), grad.dtype)
    rows = jnp.arange(lead)[:, None]
    return flat.at[rows, places.reshape(lead, -1)].add(grad.reshape(lead, -1)).reshape(x.shape)


# --- the table --------------------------------------------------------------------------------------------------

_UNARY: Final[Mapping[str, Rule]] = {
    "abs": jnp.abs, "acos": jnp.arccos, "acosh": jnp.arccosh, "asin": jnp.arcsin, "asinh": jnp.arcsinh,
    "atan": jnp.arctan, "atanh": jnp.arctanh, "bitwise_not": jnp.bitwise_not, "ceil": jnp.ceil, "cos": jnp.cos,
    "cosh": jnp.cosh, "erf": lax.erf, "erfc": lax.erfc, "erfinv": lax.erf_inv, "exp": jnp.exp, "exp2": jnp.exp2,
    "expm1": jnp.expm1, "floor": jnp.floor, "log": jnp.log, "log10": jnp.log10, "log1p": jnp.log1p,
    "log2": jnp.log2, "neg": jnp.negative, "reciprocal": lambda x: 1 / x, "relu": lambda x: jnp.maximum(x, 0),
    "round": jnp.round, "rsqrt": lax.rsqrt, "sigmoid": jax.nn.sigmoid, "sign": jnp.sign, "silu": jax.nn.silu,
    "sin": jnp.sin, "sinh": jnp.sinh, "sqrt": jnp.sqrt, "square": jnp.square, "tan": jnp.tan, "tanh": jnp.tanh,
    "trunc": jnp.trunc, "lgamma": lax.lgamma, "digamma": lax.digamma,
}  # fmt: skip

_TESTS: Final[Mapping[str, Rule]] = {
    "isnan": jnp.isnan, "isinf": jnp.isinf, "isfinite": jnp.isfinite, "logical_not": jnp.logical_not,
}  # fmt: skip

_COMPARISONS: Final[Mapping[str, Rule]] = {
    "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater,
    "ge": jnp.greater_equal,
}  # fmt: skip

_BINARY: Final[Mapping[str, Rule]] = {
    "mul": jnp.multiply, "maximum": jnp.maximum, "minimum": jnp.minimum, "atan2": jnp.arctan2,
    "remainder": jnp.remainder, "fmod": jnp.fmod, "floor_divide": jnp.floor_divide,
    "bitwise_and": jnp.bitwise_and, "bitwise_or": jnp.bitwise_or, "bitwise_xor": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift, "bitwise_right_shift": jnp.right_shift, "hypot": jnp.hypot,
}  # fmt: skip

_LOGICAL: Final[Mapping[str, Rule]] = {
    "logical_and": jnp.logical_and, "logical_or": jnp.logical_or, "logical_xor": jnp.logical_xor,
}  # fmt: skip

_RESHAPING: Final = (
    "view.default", "_unsafe_view.default", "reshape.default", "_reshape_alias.default", "unsqueeze.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "alias.default", "detach.default", "clone.default",
    "lift_fresh_copy.default", "lift_fresh.default", "_to_copy.default", "contiguous.default",
)  # fmt: skip

_FULL: Final = ("full.default", "full_like.default", "new_full.default", "scalar_tensor.default")

_EMPTY: Final = (
    "zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
    "new_empty.default", "empty_strided.default", "new_empty_strided.default", "empty_permuted.default",
)  # fmt: skip


def full(out: Out, first: Any, value: Any = None, *rest: Any, **_: Any) -> Array:
    value = rest[0] if rest else first if value is None else value  # new_full(x, size, value); scalar_tensor(value)
    return jnp.full(out.shape, value, out.dtype)


# Torch's own primitives, of which many decompositions are made.
_PRIMITIVES: Final[Mapping[str, Rule]] = {
    **{n: plain(f) for n, f in (_UNARY | _TESTS | _COMPARISONS).items()},
    **{n: pointwise(f) for n, f in _BINARY.items()},
    "add": add, "sub": subtract, "pow": power, "where": where, "convert_element_type": reshaped, "var": variance,
    "div": lambda out, a, b: divide(out, a, b, "trunc" if jnp.issubdtype(out.dtype, jnp.integer) else None),
}  # fmt: skip


OPERATORS: Final[dict[str, Rule]] = {
    **{f"prims.{n}.default": f for n, f in _PRIMITIVES.items()},
    **{f"aten.{n}.default": plain(f) for n, f in (_UNARY | _TESTS).items()},
    **{f"aten.{n}.{o}": plain(f) for n, f in _COMPARISONS.items() for o in ("Scalar", "Tensor")},
    **{f"aten.{n}.{o}": pointwise(f) for n, f in _BINARY.items() for o in ("Tensor", "Scalar", "default", "Tensor_Scalar")},
    **{f"aten.{n}.default": plain(f) for n, f in _LOGICAL.items()},
    **{f"aten.{n}": reshaped for n in _RESHAPING},
    **{f"aten.{n}": full for n in _FULL},
    **{f"aten.{n}": filled(0) for n in _EMPTY},
    **{f"aten.{n}": filled(1) for n in ("ones.default", "ones_like.default", "new_ones.default")},
    "aten.__rshift__.Scalar": pointwise(jnp.right_shift),
    "aten.__lshift__.Scalar": pointwise(jnp.left_shift),
    "aten.add.Tensor": add,
    "aten.add.Scalar": add,
    "aten.sub.Tensor": subtract,
    "aten.sub.Scalar": subtract,
    "aten.rsub.Tensor": reverse_subtract,
    "aten.rsub.Scalar": reverse_subtract,
    "aten.div.Tensor": divide,
    "aten.div.Scalar": divide,
    "aten.div.Tensor_mode": divide,
    "aten.div.Scalar_mode": divide,
    "aten.pow.Tensor_Scalar": power,
    "aten.pow.Tensor_Tensor": power,
    "aten.pow.Scalar": power,
    "aten.addcmul.default": addcmul,
    "aten.addcdiv.default": addcdiv,
    "aten.clamp.default": clamp,
    "aten.clamp.Tensor": clamp,
    "aten.clamp_min.default": clamp,
    "aten.clamp_min.Tensor": clamp,
    "aten.clamp_max.default": lambda out, x, high: clamp(out, x, None, high),
    "aten.clamp_max.Tensor": lambda out, x, high: clamp(out, x, None, high),
    "aten.where.self": where,
    "aten.where.ScalarSelf": where,
    "aten.where.ScalarOther": where,
    "aten.where.Scalar": where,
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    # products
    "aten.mm.default": plain(product),
    "aten.addmm.default": addmm,
    "aten.bmm.default": plain(matmul),
    "aten.baddbmm.default": add_matmul,
    "aten.mv.default": plain(matmul),
    "aten.dot.default": plain(matmul),
    "aten.addmv.default": add_matmul,
    # reductions
    "aten.sum.default": total,
    "aten.sum.dim_IntList": total,
    "aten.mean.default": _reduction(jnp.mean),
    "aten.mean.dim": _reduction(jnp.mean),
    "aten.amax.default": _reduction(jnp.max),
    "aten.amin.default": _reduction(jnp.min),
    "aten.max.default": _reduction(jnp.max),
    "aten.min.default": _reduction(jnp.min),
    "aten.prod.default": _reduction(jnp.prod),
    "aten.prod.dim_int": _reduction(jnp.prod),
    "aten.any.default": _reduction(jnp.any),
    "aten.any.dim": _reduction(jnp.any),
    "aten.any.dims": _reduction(jnp.any),
    "aten.all.default": _reduction(jnp.all),
    "aten.all.dim": _reduction(jnp.all),
    "aten.max.dim": extreme(jnp.max, jnp.argmax),
    "aten.min.dim": extreme(jnp.min, jnp.argmin),
    "aten.argmax.default": place_of(jnp.argmax),
    "aten.argmin.default": place_of(jnp.argmin),
    "aten.var.correction": variance,
    "aten.var.default": variance,
    "aten.var.dim": lambda out, x, dim, unbiased=True, keepdim=False: variance(
        out, x, dim, correction=int(unbiased), keepdim=keepdim
    ),
    "aten.std.correction": lambda out, x, dim=None, **o: jnp.sqrt(variance(out, x, dim, **o)),
    "aten.std.default": lambda out, x, unbiased=True: jnp.sqrt(variance(out, x, bool(unbiased))),
    "aten.var_mean.correction": variance_and_mean,
    "aten.linalg_vector_norm.default": vector_norm,
    "aten.logsumexp.default": lambda out, x, dim, keepdim=False: jax.nn.logsumexp(
        x, axis=axes_of(x, dim), keepdims=keepdim
    ),
    "aten.cumsum.default": running(jnp.cumsum),
    "aten.cumprod.default": running(jnp.cumprod),
    "aten.sort.default": sorted_by,
    "aten.sort.stable": stable_sort,
    "aten.argsort.default": lambda out, x, dim=-1, descending=False: sorted_by(out, x, dim, descending)[1],
    "aten.topk.default": top,
    "aten.median.dim": middle,
    # softmax, normalisation, activations
    "aten._softmax.default": softmax,
    "aten._softmax_backward_data.default": softmax_backward,
    "aten._log_softmax.default": log_softmax,
    "aten._log_softmax_backward_data.default": log_softmax_backward,
    "aten.native_layer_norm.default": layer_norm,
    "aten.native_group_norm.default": group_norm,
    "aten.gelu.default": gelu,
    "aten.gelu_backward.default": gelu_backward,
    "aten.silu_backward.default": silu_backward,
    "aten.threshold_backward.default": threshold_backward,
    "aten.leaky_relu.default": leaky_relu,
    "aten.leaky_relu_backward.default": leaky_relu_backward,
    "aten.sigmoid_backward.default": lambda out, grad, y: grad * (1 - y) * y,
    "aten.tanh_backward.default": lambda out, grad, y: grad * (1 - y * y),
    "aten.nll_loss_forward.default": nll_loss,
    "aten.nll_loss_backward.default": nll_loss_backward,
    "aten.nll_loss2d_forward.default": nll_loss,
    "aten.nll_loss2d_backward.default": nll_loss_backward,
    # indexing
    "aten.gather.default": gather,
    "aten.scatter.src": scatter("set"),
    "aten.scatter.value": scatter("set"),
    "aten.scatter_add.default": scatter("add"),
    "aten.index.Tensor": index,
    "aten._unsafe_index.Tensor": index,
    "aten.index_put.default": index_put,
    "aten._unsafe_index_put.default": index_put,
    "aten.index_select.default": index_select,
    "aten.embedding.default": embedding,
    "aten.embedding_dense_backward.default": embedding_backward,
    "aten.select.int": select,
    "aten.slice.Tensor": sliced,
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.select_backward.default": select_backward,
    "aten.slice_backward.default": slice_backward,
    # shapes
    "aten.expand.default": expand,
    "aten.permute.default": lambda out, x, dims: jnp.transpose(x, [d % x.ndim for d in dims]),
    "aten.transpose.int": lambda out, x, a, b: jnp.swapaxes(x, a, b) if x.ndim else x,
    "aten.t.default": lambda out, x: x.T,
    "aten.repeat.default": repeat,
    "aten.cat.default": joined,
    "aten.stack.default": lambda out, parts, dim=0: jnp.stack(parts, axis=dim),
    "aten.split.Tensor": split,
    "aten.split_with_sizes.default": split,
    "aten.unbind.int": unbind,
    "aten.flip.default": lambda out, x, dims: jnp.flip(x, dims),
    "aten.roll.default": lambda out, x, shifts, dims=(): jnp.roll(x, shifts, axis=tuple(dims) or None),
    "aten.constant_pad_nd.default": padded,
    "aten.copy.default": copied,
    "aten.fill.Scalar": set_all,
    "aten.fill.Tensor": set_all,
    "aten.arange.default": arange,
    "aten.arange.start": arange,
    "aten.arange.start_step": arange,
    "aten.diagonal.default": diagonal,
    "aten.tril.default": triangle(jnp.tril),
    "aten.triu.default": triangle(jnp.triu),
    "aten.as_strided.default": strided,
    # convolutions and pools
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": convolution_backward,
    "aten.max_pool2d_with_indices.default": max_pool(2),
    "aten.max_pool2d_with_indices_backward.default": max_pool_backward(2),
    "aten.max_pool3d_with_indices.default": max_pool(3),
    "aten.max_pool3d_with_indices_backward.default": max_pool_backward(3),
    "aten.avg_pool1d.default": average_pool(1),
    "aten.avg_pool2d.default": average_pool(2),
    "aten.avg_pool2d_backward.default": average_pool_backward(2),
    "aten.avg_pool3d.default": average_pool(3),
    "aten.avg_pool3d_backward.default": average_pool_backward(3),
    "aten._adaptive_avg_pool2d.default": adaptive_average(2),
    "aten._adaptive_avg_pool2d_backward.default": adaptive_average_backward(2),
    "aten._adaptive_avg_pool3d.default": adaptive_average(3),
    "aten._adaptive_avg_pool3d_backward.default": adaptive_average_backward(3),
    "aten.adaptive_max_pool2d.default": adaptive_max,
    "aten.adaptive_max_pool2d_backward.default": adaptive_max_backward,
}
"""Torch operator (with overload) → rule."""
