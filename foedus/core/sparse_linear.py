"""Linear models of sparse examples, in numpy: work and memory per example follow the features that it has.

A text is a handful of words out of tens of thousands. :func:`sparse_logistic` never makes an array
[example, feature]: scores gather the weights of the features that are present, and a gradient is added up from them
alone (its result is a full vector [feature] once per batch, as training asks for).

The examples are those of :mod:`foedus.core.sparse_rows`. Not here: training of its own for such problems
(``core/fsvrg.py``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.sparse_rows import check_sparse
from foedus.core.task import NumpyModel, SparseLoss
from foedus.errors import ConfigurationError, DataError

Array = NDArray[Any]
Parameters = dict[str, Array]


def sparse_logistic(features: int, *, l2: float = 0.0, dtype: str = "float32") -> NumpyModel:
    """Logistic regression on sparse examples, of two classes.

    The loss of a batch is the mean of ``log(1 + exp(−±score))`` with ``score = Σ value · weight[index] + bias``, plus
    ``l2/2 · ‖weight‖²``.

    Args:
        features: how many there are; indices lie from 0 to features − 1.
        l2: strength of the penalty on the weights (not on the bias); the reciprocal of the number of examples is usual.
        dtype: of the parameters and of all arithmetic, ``"float32"`` or ``"float64"``.

    Returns:
        A model with parameters ``weight`` [feature] and ``bias`` [1], all zero at first. Its inputs are ``indices`` and
        ``values``, [B, place] each (:func:`~foedus.core.sparse_rows.sparse_rows`); it predicts scores [B], above 0 for
        class 1; targets are 0 or 1, [B].

    Raises:
        DataError: when trained on examples that are not sparse, have other features, or other labels.

    Example:
        >>> model = sparse_logistic(1_000_000, l2=1e-4)
        >>> parameters = model.init(np.random.default_rng(0))
        >>> inputs = (np.array([[3, 999_999]]), np.array([[1.0, 2.0]]))
        >>> loss, gradients = model.gradient(parameters, inputs, np.array([1]))
        >>> round(float(loss), 4), gradients["weight"][[3, 999_999]].tolist()
        (0.6931, [-0.5, -1.0])
    """
    check_whole("features", features)
    check_number("l2", l2)
    if dtype not in ("float32", "float64"):
        raise ConfigurationError(f"dtype must be 'float32' or 'float64', not {dtype!r}")
    return _model(SparseLoss(features, float(l2), _logistic, _slope, _check_labels), dtype)


def _model(loss: SparseLoss, dtype: str) -> NumpyModel:
    """The model of a loss; all functions take one more leading axis, [client, ...], as well."""

    def init(generator: np.random.Generator) -> Parameters:
        return {"weight": np.zeros(loss.features, dtype), "bias": np.zeros(1, dtype)}

    def places(parameters: Parameters, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        """Where the features' weights lie in all clients' weights laid end to end, and values, [..., B, place]."""
        weight = parameters["weight"]
        indices, values = check_sparse(inputs, loss.features)
        clients = np.arange(math.prod(weight.shape[:-1])) * loss.features
        start = clients.reshape(*weight.shape[:-1], 1, 1)
        return indices + start, values.astype(weight.dtype, copy=False)

    def scores(parameters: Parameters, at: Array, values: Array) -> Array:
        found: Array = np.einsum("...k,...k->...", parameters["weight"].reshape(-1)[at], values)
        return found + parameters["bias"]

    def predict(parameters: Parameters, *inputs: Array) -> Array:
        return scores(parameters, *places(parameters, inputs))

    def gradient(parameters: Parameters, inputs: tuple[Array, ...], target: Array) -> tuple[Any, Parameters]:
        weight = parameters["weight"]
        at, values = places(parameters, inputs)
        loss.check(target)
        score, labels = scores(parameters, at, values), target.astype(weight.dtype)
        slope = loss.slope(score, labels) / score.shape[-1]  # [..., B]
        pulled = np.bincount(at.reshape(-1), (slope[..., None] * values).reshape(-1), weight.size)
        total = loss.value(score, labels).mean(-1) + loss.l2 / 2 * np.square(weight).sum(-1)
        own = pulled.reshape(weight.shape).astype(weight.dtype, copy=False) + loss.l2 * weight
        return total, {"weight": own, "bias": slope.sum(-1, keepdims=True)}

    return NumpyModel(init, predict, gradient, stacked=True, sparse=loss)


def _logistic(score: Array, target: Array) -> Array:
    return np.asarray(np.logaddexp(0, score) - target * score)


def _slope(score: Array, target: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * score)) - target)  # tanh does not overflow


def _check_labels(target: Array) -> None:
    if target.dtype.kind not in "iufb" or not ((target == 0) | (target == 1)).all():
        wrong = target.reshape(-1)[np.argmax((target != 0) & (target != 1))] if target.size else target.dtype
        raise DataError(f"sparse_logistic() tells two classes apart, 0 and 1, and there is a target of {wrong}.")
