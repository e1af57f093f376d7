"""Rules for torch's convolutions and pools in jax; see ``lowering_rules.py``.

A pool is written as the largest, or the sum, of strided views of its input, one view for each place in the
window: plain slices, whose gradients are plain paddings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from foedus.backends.lowering_rules import HIGHEST, Array, Out, Rule

MANY_TAPS: Final = 64  # a window of more places than this is left to XLA's own convolution

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
        names = ("N" + letters + "C", letters + "IO", "N" + letters + "C")  # the order XLA is fast in on a CPU
        y = lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1), jnp.moveaxis(weight, (0, 1), (-1, -2)), stride, [(p, p) for p in padding],
            rhs_dilation=dilation, dimension_numbers=names, feature_group_count=g.groups, precision=HIGHEST,
        )  # fmt: skip
        return jnp.moveaxis(y, -1, 1)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    return lax.conv_general_dilated(
        x, _turned(weight, g.groups), (1,) * rank, pads, lhs_dilation=stride, rhs_dilation=dilation,
        dimension_numbers=names, feature_group_count=g.groups, precision=HIGHEST,
    )  # fmt: skip


def convolved_by_products(x: Array, weight: Array, g: Geometry) -> Array:
    """The same as one matrix product per place in the window, summed; channels last in between.

    For its gradients: those of XLA's own convolution are up to fifty times slower on a CPU.
    """
    rank, groups = x.ndim - 2, g.groups
    pool = Pool(list(weight.shape[2:]), *(_each(v, rank) for v in (g.stride, g.padding, g.dilation)))
    sizes = zip(x.shape[2:], *pool, strict=True)
    outputs = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    kernel = weight.reshape(groups, -1, *weight.shape[1:])  # [groups, O / groups, C / groups, ...]
    last = jnp.moveaxis(x, 1, -1)
    total: Array = 0.0
    for place, view in zip(_places_in(pool), _views(last, pool, outputs, 0.0, spatial=1), strict=True):
        tap = kernel[(..., *place)]
        if groups == 1:
            total = total + jnp.matmul(view, tap[0].T, precision=HIGHEST)
            continue
        parts = view.reshape(*view.shape[:-1], groups, -1)
        total = total + jnp.einsum("...gc,goc->...go", parts, tap, precision=HIGHEST)
    return jnp.moveaxis(total.reshape(x.shape[0], *outputs, -1), -1, 1)


def _few(weight: Array, g: Geometry) -> bool:
    """Whether products by place are the quicker way."""
    return not g.transposed and math.prod(weight.shape[2:]) <= MANY_TAPS and jax.default_backend() == "cpu"


def _turned(weight: Array, groups: int) -> Array:
    """The kernel [C, O/g, ...] of a transposed convolution as that of an ordinary one, [O, C/g, ...]."""
    inputs, outputs, *window = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *window).swapaxes(1, 2)
    return jnp.flip(split.reshape(groups * outputs, inputs // groups, *window), range(2, weight.ndim))


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def convolution(out: Out, x: Array, weight: Array, bias: Any, *geometry: Any) -> Array:
    g = Geometry(*geometry)
    # XLA's convolution of groups or with gaps is slow in itself.
    form = convolved_by_products if _few(weight, g) and (g.groups > 1 or set(g.dilation) != {1}) else convolved
    y = form(x, weight, g)
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))


def convolution_backward(out: Out, grad: Array, x: Array, weight: Array, bias_sizes: Any, *rest: Any) -> Any:
    *geometry, wanted = rest
    g = Geometry(*geometry)
    form = convolved_by_products if _few(weight, g) else convolved
    pull = jax.vjp(lambda x, w: form(x, w, g), x, weight)[1]
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


def _places_in(pool: Pool) -> list[tuple[int, ...]]:
    """All places in the window, in order."""
    return list(itertools.product(*(range(k) for k in pool.window)))


def _views(x: Array, pool: Pool, outputs: Sequence[int], fill: float, *, spatial: int | None = None) -> list[Array]:
    """For each place in the window, what every output sees there; ``spatial`` is the first of those axes."""
    rank = len(outputs)
    lead = x.ndim - rank if spatial is None else spatial
    rest = x.ndim - lead - rank
    spans = [d * (k - 1) + s * (n - 1) + 1 for k, s, _, d, n in zip(*pool, outputs, strict=True)]
    missing = [max(0, s - n - p) for s, n, p in zip(spans, x.shape[lead : lead + rank], pool.padding, strict=True)]
    pads = [(p, m, 0) for p, m in zip(pool.padding, missing, strict=True)]
    wide = lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0)] * lead + pads + [(0, 0, 0)] * rest)
    views = []
    for place in _places_in(pool):
        at = [o * d for o, d in zip(place, pool.dilation, strict=True)]
        take = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(at, pool.stride, outputs, strict=True)]
        views.append(wide[(*[slice(None)] * lead, *take)])
    return views


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
    defaults: list[Any] = [None, (), 0, False, True, None]
    window, stride, padding, _, count_padding, divisor = [*options, *defaults[len(options) :]]
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
    return jnp.stack(values, -1).reshape(out.shape), jnp.stack(places, -1).reshape(out.shape)


def adaptive_max_backward(out: Out, grad: Array, x: Array, places: Array) -> Array:
    lead = math.prod(x.shape[:-2])
    flat = jnp.zeros((lead, x.shape[-2] * x.shape[-1]), grad.dtype)
    rows = jnp.arange(lead)[:, None]
    return flat.at[rows, places.reshape(lead, -1)].add(grad.reshape(lead, -1)).reshape(x.shape)
