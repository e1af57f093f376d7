"""Rules that carry out one of torch's core operators in jax: arithmetic, products, reductions, losses.

Every rule is called as ``rule(out, *args, **kwargs)`` with the arguments that torch was called with (tensors
are jax arrays now), and ``out`` saying what torch's result looked like. The interpreter casts the result to
``out.dtype``, so that a rule need not repeat torch's promotion of types.

Where jax is laxer than torch, the rules are strict in the only way that compiled code can be: an index out of
range, an error in torch, gives NaN, which the engine refuses at the end of the client's round.

Not here: indexing and shapes (``lowering_indexing.py``), convolutions and pools (``lowering_windows.py``), the
table of all rules (``lowering_ops.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
Rule = Callable[..., Any]

HIGHEST: Final = lax.Precision.HIGHEST  # no TF32: it breaks the agreement between executors
FEW_ROWS: Final = 12  # up to so many summands a product is quicker as a sum of outer products, on a CPU …
IN_CACHE: Final = 2**19  # … as long as the result stays in the cache


class Out(NamedTuple):
    """What torch's result looked like: of a tuple, its first tensor. ``pulls`` keeps what backward rules need;
    ``hollow`` gathers booleans, each whether a loss is NaN as it is in torch: the mean over no label at all."""

    shape: tuple[int, ...]
    dtype: Any
    pulls: dict[int, Callable[..., Any]]
    hollow: list[Array]


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


def reduction(function: Rule) -> Rule:
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


def product(a: Array, b: Array, turned: tuple[bool, bool] = (False, False)) -> Array:
    """a [M, K] · b [K, N], where ``turned`` says which of them is given transposed: contracted as they lie.

    Gradients of weights sum few outer products, which XLA fuses into the update.
    """
    of_a, of_b = (0 if turned[0] else 1), (1 if turned[1] else 0)
    terms, size = a.shape[of_a], a.shape[1 - of_a] * b.shape[1 - of_b]
    if 0 < terms <= FEW_ROWS and 2048 <= size <= IN_CACHE and jax.default_backend() == "cpu":
        total: Array = 0
        for k in range(terms):
            column = lax.index_in_dim(a, k, of_a, keepdims=False)
            total = total + column[:, None] * lax.index_in_dim(b, k, of_b, keepdims=False)
        return total
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision=HIGHEST)


def scaled_sum(x: Array, y: Array, beta: float, alpha: float) -> Array:
    y = y if alpha == 1 else alpha * y
    return y + (x if beta == 1 else beta * x) if beta else y


def addmm(out: Out, bias: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1, **turned: Any) -> Array:
    return scaled_sum(bias, product(a, b, **turned), beta, alpha)


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


def vector_norm(out: Out, x: Array, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
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
    values, places = (lax.index_in_dim(v, at, dim, keepdims=keepdim) for v in sorted_by(out, x, dim))
    return values, places


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
    if reduction == 1:
        out.hollow.append((target == ignore_index).all())
    return (losses.sum() / weighed if reduction == 1 else losses.sum()), weighed


def nll_loss_backward(out: Out, grad: Array, x: Array, target: Array, weight: Any, *options: Any) -> Array:
    reduction, ignore_index, weighed = options
    share, axis = _class_weights(x, target, weight, ignore_index)
    factor = -grad * share / (weighed if reduction == 1 else 1)
    # Labels left out have a gradient of 0 in torch, even where all are, so that the mean is 0/0.
    factor = jnp.expand_dims(jnp.where(target == ignore_index, 0, factor), axis)
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
