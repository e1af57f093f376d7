"""Rules for torch's indexing and shape operators in jax; see ``lowering_rules.py``.

Gathers and scatters along an axis of few classes become comparisons with every class, which XLA fuses with
what is around; on a CPU a real scatter is a slow loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
from jax import lax

from foedus.backends.lowering_rules import HIGHEST, Array, Out, Rule
from foedus.errors import UnsupportedOperator

FEW_CLASSES: Final = 1024  # up to so many, comparing with every class beats gathering and scattering


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


def slice_backward(out: Out, grad: Array, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Array:
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
