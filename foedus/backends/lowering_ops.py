"""Torch's core operators in jax: one table from an operator's name to the rule that carries it out.

Not here: the rules themselves (``lowering_rules.py``, ``lowering_indexing.py``, ``lowering_windows.py``), how a
module becomes a list of operators (``lowering.py``), and layers that are lowered as a whole
(``lowering_layers.py``).
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax

from foedus.backends import lowering_indexing as indexing
from foedus.backends import lowering_rules as rules
from foedus.backends import lowering_windows as windows
from foedus.backends.lowering_rules import Array, Out, Rule

# --- families --------------------------------------------------------------------------------------------------

_UNARY: Final[dict[str, Rule]] = {
    "abs": jnp.abs, "acos": jnp.arccos, "acosh": jnp.arccosh, "asin": jnp.arcsin, "asinh": jnp.arcsinh,
    "atan": jnp.arctan, "atanh": jnp.arctanh, "bitwise_not": jnp.bitwise_not, "ceil": jnp.ceil, "cos": jnp.cos,
    "cosh": jnp.cosh, "erf": lax.erf, "erfc": lax.erfc, "erfinv": lax.erf_inv, "exp": jnp.exp, "exp2": jnp.exp2,
    "expm1": jnp.expm1, "floor": jnp.floor, "log": jnp.log, "log10": jnp.log10, "log1p": jnp.log1p,
    "log2": jnp.log2, "neg": jnp.negative, "reciprocal": lambda x: 1 / x, "relu": lambda x: jnp.maximum(x, 0),
    "round": jnp.round, "rsqrt": lax.rsqrt, "sigmoid": jax.nn.sigmoid, "sign": jnp.sign, "silu": jax.nn.silu,
    "sin": jnp.sin, "sinh": jnp.sinh, "sqrt": jnp.sqrt, "square": jnp.square, "tan": jnp.tan, "tanh": jnp.tanh,
    "trunc": jnp.trunc, "lgamma": lax.lgamma, "digamma": lax.digamma,
}  # fmt: skip

_TESTS: Final[dict[str, Rule]] = {
    "isnan": jnp.isnan, "isinf": jnp.isinf, "isfinite": jnp.isfinite, "logical_not": jnp.logical_not,
}  # fmt: skip

_COMPARISONS: Final[dict[str, Rule]] = {
    "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater,
    "ge": jnp.greater_equal,
}  # fmt: skip

_BINARY: Final[dict[str, Rule]] = {
    "mul": jnp.multiply, "maximum": jnp.maximum, "minimum": jnp.minimum, "atan2": jnp.arctan2,
    "remainder": jnp.remainder, "fmod": jnp.fmod, "floor_divide": jnp.floor_divide,
    "bitwise_and": jnp.bitwise_and, "bitwise_or": jnp.bitwise_or, "bitwise_xor": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift, "bitwise_right_shift": jnp.right_shift, "hypot": jnp.hypot,
}  # fmt: skip

_OVERLOADS: Final = ("default", "Tensor", "Scalar", "Tensor_Scalar")

_LOGICAL: Final[dict[str, Rule]] = {
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
_PRIMITIVES: Final[dict[str, Rule]] = {
    **{n: rules.plain(f) for n, f in (_UNARY | _TESTS | _COMPARISONS).items()},
    **{n: rules.pointwise(f) for n, f in _BINARY.items()},
    "add": rules.add, "sub": rules.subtract, "pow": rules.power, "where": rules.where, "var": rules.variance,
    "convert_element_type": rules.reshaped,
    "div": lambda out, a, b: rules.divide(out, a, b, "trunc" if jnp.issubdtype(out.dtype, jnp.integer) else None),
}  # fmt: skip


OPERATORS: Final[dict[str, Rule]] = {
    **{f"prims.{n}.default": f for n, f in _PRIMITIVES.items()},
    **{f"aten.{n}.default": rules.plain(f) for n, f in (_UNARY | _TESTS).items()},
    **{f"aten.{n}.{o}": rules.plain(f) for n, f in _COMPARISONS.items() for o in ("Scalar", "Tensor")},
    **{f"aten.{n}.{o}": rules.pointwise(f) for n, f in _BINARY.items() for o in _OVERLOADS},
    **{f"aten.{n}.default": rules.plain(f) for n, f in _LOGICAL.items()},
    **{f"aten.{n}": rules.reshaped for n in _RESHAPING},
    **{f"aten.{n}": full for n in _FULL},
    **{f"aten.{n}": rules.filled(0) for n in _EMPTY},
    **{f"aten.{n}": rules.filled(1) for n in ("ones.default", "ones_like.default", "new_ones.default")},
    "aten.__rshift__.Scalar": rules.pointwise(jnp.right_shift),
    "aten.__lshift__.Scalar": rules.pointwise(jnp.left_shift),
    "aten.add.Tensor": rules.add,
    "aten.add.Scalar": rules.add,
    "aten.sub.Tensor": rules.subtract,
    "aten.sub.Scalar": rules.subtract,
    "aten.rsub.Tensor": rules.reverse_subtract,
    "aten.rsub.Scalar": rules.reverse_subtract,
    "aten.div.Tensor": rules.divide,
    "aten.div.Scalar": rules.divide,
    "aten.div.Tensor_mode": rules.divide,
    "aten.div.Scalar_mode": rules.divide,
    "aten.pow.Tensor_Scalar": rules.power,
    "aten.pow.Tensor_Tensor": rules.power,
    "aten.pow.Scalar": rules.power,
    "aten.addcmul.default": rules.addcmul,
    "aten.addcdiv.default": rules.addcdiv,
    "aten.clamp.default": rules.clamp,
    "aten.clamp.Tensor": rules.clamp,
    "aten.clamp_min.default": rules.clamp,
    "aten.clamp_min.Tensor": rules.clamp,
    "aten.clamp_max.default": lambda out, x, high: rules.clamp(out, x, None, high),
    "aten.clamp_max.Tensor": lambda out, x, high: rules.clamp(out, x, None, high),
    "aten.where.self": rules.where,
    "aten.where.ScalarSelf": rules.where,
    "aten.where.ScalarOther": rules.where,
    "aten.where.Scalar": rules.where,
    "aten.masked_fill.Scalar": rules.masked_fill,
    "aten.masked_fill.Tensor": rules.masked_fill,
    # products
    "aten.mm.default": rules.plain(rules.product),
    "aten.addmm.default": rules.addmm,
    "aten.bmm.default": rules.plain(rules.matmul),
    "aten.baddbmm.default": rules.add_matmul,
    "aten.mv.default": rules.plain(rules.matmul),
    "aten.dot.default": rules.plain(rules.matmul),
    "aten.addmv.default": rules.add_matmul,
    # reductions
    "aten.sum.default": rules.total,
    "aten.sum.dim_IntList": rules.total,
    "aten.mean.default": rules.reduction(jnp.mean),
    "aten.mean.dim": rules.reduction(jnp.mean),
    "aten.amax.default": rules.reduction(jnp.max),
    "aten.amin.default": rules.reduction(jnp.min),
    "aten.max.default": rules.reduction(jnp.max),
    "aten.min.default": rules.reduction(jnp.min),
    "aten.prod.default": rules.reduction(jnp.prod),
    "aten.prod.dim_int": rules.reduction(jnp.prod),
    "aten.any.default": rules.reduction(jnp.any),
    "aten.any.dim": rules.reduction(jnp.any),
    "aten.any.dims": rules.reduction(jnp.any),
    "aten.all.default": rules.reduction(jnp.all),
    "aten.all.dim": rules.reduction(jnp.all),
    "aten.max.dim": rules.extreme(jnp.max, jnp.argmax),
    "aten.min.dim": rules.extreme(jnp.min, jnp.argmin),
    "aten.argmax.default": rules.place_of(jnp.argmax),
    "aten.argmin.default": rules.place_of(jnp.argmin),
    "aten.var.correction": rules.variance,
    "aten.var.default": rules.variance,
    "aten.var.dim": lambda out, x, dim, unbiased=True, keepdim=False: rules.variance(
        out, x, dim, correction=int(unbiased), keepdim=keepdim
    ),
    "aten.std.correction": lambda out, x, dim=None, **o: jnp.sqrt(rules.variance(out, x, dim, **o)),
    "aten.std.default": lambda out, x, unbiased=True: jnp.sqrt(rules.variance(out, x, bool(unbiased))),
    "aten.var_mean.correction": rules.variance_and_mean,
    "aten.linalg_vector_norm.default": rules.vector_norm,
    "aten.logsumexp.default": lambda out, x, dim, keepdim=False: jax.nn.logsumexp(
        x, axis=rules.axes_of(x, dim), keepdims=keepdim
    ),
    "aten.cumsum.default": rules.running(jnp.cumsum),
    "aten.cumprod.default": rules.running(jnp.cumprod),
    "aten.sort.default": rules.sorted_by,
    "aten.sort.stable": rules.stable_sort,
    "aten.argsort.default": lambda out, x, dim=-1, descending=False: rules.sorted_by(out, x, dim, descending)[1],
    "aten.topk.default": rules.top,
    "aten.median.dim": rules.middle,
    # softmax, normalisation, activations
    "aten._softmax.default": rules.softmax,
    "aten._softmax_backward_data.default": rules.softmax_backward,
    "aten._log_softmax.default": rules.log_softmax,
    "aten._log_softmax_backward_data.default": rules.log_softmax_backward,
    "aten.native_layer_norm.default": rules.layer_norm,
    "aten.native_group_norm.default": rules.group_norm,
    "aten.gelu.default": rules.gelu,
    "aten.gelu_backward.default": rules.gelu_backward,
    "aten.silu_backward.default": rules.silu_backward,
    "aten.threshold_backward.default": rules.threshold_backward,
    "aten.leaky_relu.default": rules.leaky_relu,
    "aten.leaky_relu_backward.default": rules.leaky_relu_backward,
    "aten.sigmoid_backward.default": lambda out, grad, y: grad * (1 - y) * y,
    "aten.tanh_backward.default": lambda out, grad, y: grad * (1 - y * y),
    "aten.nll_loss_forward.default": rules.nll_loss,
    "aten.nll_loss_backward.default": rules.nll_loss_backward,
    "aten.nll_loss2d_forward.default": rules.nll_loss,
    "aten.nll_loss2d_backward.default": rules.nll_loss_backward,
    # indexing
    "aten.gather.default": indexing.gather,
    "aten.scatter.src": indexing.scatter("set"),
    "aten.scatter.value": indexing.scatter("set"),
    "aten.scatter_add.default": indexing.scatter("add"),
    "aten.index.Tensor": indexing.index,
    "aten._unsafe_index.Tensor": indexing.index,
    "aten.index_put.default": indexing.index_put,
    "aten._unsafe_index_put.default": indexing.index_put,
    "aten.index_select.default": indexing.index_select,
    "aten.embedding.default": indexing.embedding,
    "aten.embedding_dense_backward.default": indexing.embedding_backward,
    "aten.select.int": indexing.select,
    "aten.slice.Tensor": indexing.sliced,
    "aten.slice_scatter.default": indexing.slice_scatter,
    "aten.select_scatter.default": indexing.select_scatter,
    "aten.select_backward.default": indexing.select_backward,
    "aten.slice_backward.default": indexing.slice_backward,
    # shapes
    "aten.expand.default": indexing.expand,
    "aten.permute.default": lambda out, x, dims: jnp.transpose(x, [d % x.ndim for d in dims]),
    "aten.transpose.int": lambda out, x, a, b: jnp.swapaxes(x, a, b) if x.ndim else x,
    "aten.t.default": lambda out, x: x.T,
    "aten.repeat.default": indexing.repeat,
    "aten.cat.default": indexing.joined,
    "aten.stack.default": lambda out, parts, dim=0: jnp.stack(parts, axis=dim),
    "aten.split.Tensor": indexing.split,
    "aten.split_with_sizes.default": indexing.split,
    "aten.unbind.int": indexing.unbind,
    "aten.flip.default": lambda out, x, dims: jnp.flip(x, dims),
    "aten.roll.default": lambda out, x, shifts, dims=(): jnp.roll(x, shifts, axis=tuple(dims) or None),
    "aten.constant_pad_nd.default": indexing.padded,
    "aten.copy.default": indexing.copied,
    "aten.fill.Scalar": indexing.set_all,
    "aten.fill.Tensor": indexing.set_all,
    "aten.arange.default": indexing.arange,
    "aten.arange.start": indexing.arange,
    "aten.arange.start_step": indexing.arange,
    "aten.diagonal.default": indexing.diagonal,
    "aten.tril.default": indexing.triangle(jnp.tril),
    "aten.triu.default": indexing.triangle(jnp.triu),
    "aten.as_strided.default": indexing.strided,
    # convolutions and pools
    "aten.convolution.default": windows.convolution,
    "aten.convolution_backward.default": windows.convolution_backward,
    "aten.max_pool2d_with_indices.default": windows.max_pool(2),
    "aten.max_pool2d_with_indices_backward.default": windows.max_pool_backward(2),
    "aten.max_pool3d_with_indices.default": windows.max_pool(3),
    "aten.max_pool3d_with_indices_backward.default": windows.max_pool_backward(3),
    "aten.avg_pool1d.default": windows.average_pool(1),
    "aten.avg_pool2d.default": windows.average_pool(2),
    "aten.avg_pool2d_backward.default": windows.average_pool_backward(2),
    "aten.avg_pool3d.default": windows.average_pool(3),
    "aten.avg_pool3d_backward.default": windows.average_pool_backward(3),
    "aten._adaptive_avg_pool2d.default": windows.adaptive_average(2),
    "aten._adaptive_avg_pool2d_backward.default": windows.adaptive_average_backward(2),
    "aten._adaptive_avg_pool3d.default": windows.adaptive_average(3),
    "aten._adaptive_avg_pool3d_backward.default": windows.adaptive_average_backward(3),
    "aten.adaptive_max_pool2d.default": windows.adaptive_max,
    "aten.adaptive_max_pool2d_backward.default": windows.adaptive_max_backward,
}
"""Torch operator (with overload) → rule."""
