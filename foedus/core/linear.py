"""Linear models, ready-made, in numpy with their gradients by hand.

They need no framework, train fast, and are convex: federated gradient descent over all clients *is* gradient
descent on the pooled data, step by step, which makes them the exact oracle that the whole system is tested
against (tests/conformance/test_linear_oracle.py), and a baseline worth beating for any network.

Every function also takes one more leading axis on parameters and data alike, [client, ...], and then computes
a cohort at once (:class:`~foedus.core.task.NumpyModel`, ``stacked``).

Not here: training (``core/client.py``, ``backends/numpy_backend.py``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.task import NumpyModel
from foedus.errors import ConfigurationError

Array = NDArray[Any]
Parameters = dict[str, Array]


def linear(features: int, outputs: int = 1, *, dtype: str = "float32") -> NumpyModel:
    """Linear regression: ``output = x · weight + bias``, with the loss ``½ · mean of ‖output − target‖²``.

    Args:
        features: numbers per example; examples of another shape, e.g. images, are flattened.
        outputs: numbers to predict.
        dtype: of the parameters and of all arithmetic, ``"float32"`` or ``"float64"``.

    Returns:
        A model with parameters ``weight`` [features, outputs] and ``bias`` [outputs], all zero at first.
        It predicts [B, outputs]; targets are [B, outputs], or [B] for one output.

    Example:
        >>> model = linear(2)
        >>> parameters = model.init(np.random.default_rng(0))
        >>> loss, gradients = model.gradient(parameters, (np.array([[1.0, 2.0]]),), np.array([3.0]))
        >>> float(loss), gradients["weight"].tolist()
        (4.5, [[-3.0], [-6.0]])
    """
    _counts(features=features, outputs=outputs)

    def residuals(parameters: Parameters, x: Array, target: Array) -> Array:
        output = _affine(parameters, x)  # [..., B, outputs]
        return np.subtract(output, target.reshape(output.shape), dtype=output.dtype, casting="unsafe")

    def gradient(parameters: Parameters, inputs: tuple[Array, ...], target: Array) -> tuple[Any, Parameters]:
        x = _rows(parameters, inputs)
        difference = residuals(parameters, x, target)
        loss = (difference**2).sum((-2, -1)) / (2 * x.shape[-2])
        return loss, _pulled(x, difference / x.shape[-2])

    return NumpyModel(_zeros(features, outputs, dtype), _predict, gradient, stacked=True)


def logistic(features: int, classes: int, *, dtype: str = "float32") -> NumpyModel:
    """Multinomial logistic regression: scores ``x · weight + bias``, loss the mean softmax cross entropy.

    Args:
        features: numbers per example; examples of another shape, e.g. images, are flattened.
        classes: number of classes, at least 2; targets are whole numbers from 0 to classes − 1, [B].
        dtype: of the parameters and of all arithmetic, ``"float32"`` or ``"float64"``.

    Returns:
        A model with parameters ``weight`` [features, classes] and ``bias`` [classes], all zero at first. It
        predicts scores [B, classes]; the greatest wins.

    Example:
        >>> model = logistic(4, classes=2)
        >>> parameters = model.init(np.random.default_rng(0))
        >>> loss, _ = model.gradient(parameters, (np.ones((3, 4)),), np.array([0, 1, 1]))
        >>> round(float(loss), 6) == round(math.log(2), 6)
        True
    """
    _counts(features=features, classes=classes)
    if classes < 2:
        raise ConfigurationError(f"logistic(classes={classes}): a classifier tells at least 2 classes apart")

    def gradient(parameters: Parameters, inputs: tuple[Array, ...], target: Array) -> tuple[Any, Parameters]:
        x, labels = _rows(parameters, inputs), _labels(target, classes)[..., None]
        scores = _affine(parameters, x)  # [..., B, class]
        scores -= scores.max(-1, keepdims=True)
        shares = np.exp(scores)
        total = shares.sum(-1, keepdims=True)
        loss = (np.log(total) - np.take_along_axis(scores, labels, -1)).mean((-2, -1))
        shares /= total
        hit = np.take_along_axis(shares, labels, -1)
        np.put_along_axis(shares, labels, hit - 1, -1)
        shares /= x.shape[-2]
        return loss, _pulled(x, shares)

    return NumpyModel(_zeros(features, classes, dtype), _predict, gradient, stacked=True)


def _zeros(features: int, outputs: int, dtype: str) -> Any:
    if dtype not in ("float32", "float64"):
        raise ConfigurationError(f"dtype must be 'float32' or 'float64', not {dtype!r}")

    def init(generator: np.random.Generator) -> Parameters:
        return {"weight": np.zeros((features, outputs), dtype), "bias": np.zeros(outputs, dtype)}

    return init


def _predict(parameters: Parameters, *inputs: Array) -> Array:
    """Outputs [..., B, outputs]."""
    return _affine(parameters, _rows(parameters, inputs))


def _affine(parameters: Parameters, x: Array) -> Array:
    output: Array = x @ parameters["weight"] + parameters["bias"][..., None, :]
    return output


def _pulled(x: Array, difference: Array) -> Parameters:
    """Gradients of the parameters from those of the outputs [..., B, outputs]."""
    return {"weight": np.swapaxes(x, -1, -2) @ difference, "bias": difference.sum(-2)}


def _rows(parameters: Parameters, inputs: tuple[Array, ...]) -> Array:
    """The one input as rows [..., B, features], in the dtype of the parameters."""
    if len(inputs) != 1:
        raise ConfigurationError(
            f"a linear model takes one input, and the examples have {len(inputs)}; put the columns together"
        )
    weight, x = parameters["weight"], inputs[0]
    lead = x.shape[: weight.ndim - 1]  # [B], or [client, B]
    if math.prod(x.shape[len(lead) :]) != weight.shape[-2]:
        raise ConfigurationError(
            f"the model was made for {weight.shape[-2]} features, and an example has the shape {x.shape[len(lead) :]}"
        )
    return x.reshape(*lead, weight.shape[-2]).astype(weight.dtype, copy=False)


def _labels(target: Array, classes: int) -> Array:
    if target.dtype.kind not in "iub" or (target.size and not (target.min() >= 0 and target.max() < classes)):
        raise ConfigurationError(
            f"logistic(classes={classes}) needs labels that are whole numbers from 0 to {classes - 1}; "
            f"there are {target.dtype} from {target.min()} to {target.max()}"
        )
    return target.astype(np.int64, copy=False)


def _counts(**values: int) -> None:
    for name, value in values.items():
        check_whole(name, value)
