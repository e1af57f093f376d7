"""The problem to solve, said once: model, loss, metrics.

The same :class:`Task` runs in simulation, on a cluster and over a network. The core never looks inside the
model; only ``backends`` know what a torch module is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError

Array = Any
TAKEN = ("loss", "round", "client", "step", "examples")  # what a line of a record says beside metrics


class Metric(NamedTuple):
    """A figure about predictions.

    * ``value(output, target)``: numpy arrays in; one value per example [B] or per element [B, ...], which are
      averaged (masked elements of a ``numpy.ma`` array are left out), or, with ``whole=True``, one number for a
      whole set (a metric, such as AUROC, that is no mean).
    * ``finish(mean) -> float``: applied to the mean, e.g. the root of a mean square.
    * ``better``: ``max`` or ``min``, which way is better.

    Law: unless ``whole``, the metric of a union is ``finish`` of the mean over the union's elements.

    Example:
        >>> within_ten = Metric("within_ten", lambda output, target: abs(output[:, 0] - target) <= 10)
    """

    name: str
    value: Callable[[NDArray[Any], NDArray[Any]], Any]
    finish: Callable[[float], float] = float
    whole: bool = False
    better: Callable[..., Any] = max


class JaxModel(NamedTuple):
    """A model written in jax.

    * ``init(key) -> parameters``: nested dict of arrays, from a jax PRNG key.
    * ``apply(parameters, *inputs, train, key) -> output``: ``train`` says whether it is training, ``key`` is a
      jax PRNG key for dropout.

    With a JaxModel the task's ``loss(output, target)`` gives one value per example, [B] (as optax's do).

    Example:
        >>> def apply(p, x, *, train, key): return x @ p["w"] + p["b"]  # doctest: +SKIP
        >>> model = JaxModel(lambda key: {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}, apply)  # doctest: +SKIP
    """

    init: Callable[[Any], Any]
    apply: Callable[..., Any]


class SparseLoss(NamedTuple):
    """The loss of a linear model of sparse examples, a function of one score per example (``NumpyModel.sparse``).

    * ``features``: how many there are.
    * ``l2``: strength of the penalty ``l2/2 · ‖weight‖²``.
    * ``value(score, target) -> [B]``: the loss of each example, without the penalty.
    * ``slope(score, target) -> [B]``: its derivative with respect to the score.
    * ``check(target)``: raises :class:`~foedus.errors.DataError` for targets that the loss is not made for.
    """

    features: int
    l2: float
    value: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
    slope: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
    check: Callable[[NDArray[Any]], None]


class NumpyModel(NamedTuple):
    """A model written in numpy with its gradient by hand; it needs no framework.

    * ``init(generator) -> parameters``: dict of arrays.
    * ``predict(parameters, *inputs) -> output``
    * ``gradient(parameters, inputs, target) -> (loss, gradients)``: the mean loss over the batch, and a dict of
      gradients like the parameters.
    * ``stacked``: both functions also take parameters, inputs and targets with one more leading axis, [client,
      ...], and then give a loss per client, [client]; the cohort is computed at once.
    * ``sparse``: for a linear model ``weight`` [feature], ``bias`` [1] of sparse examples, the loss by score, which
      algorithms made for such problems (:func:`foedus.fsvrg`) work on.

    See :func:`foedus.linear` and :func:`foedus.logistic`.

    Example:
        >>> mean_of = NumpyModel(  # learns the mean of its targets
        ...     init=lambda generator: {"m": np.zeros(1)},
        ...     predict=lambda p, x: np.broadcast_to(p["m"], len(x)),
        ...     gradient=lambda p, x, y: (np.mean((p["m"] - y) ** 2), {"m": 2 * np.mean(p["m"] - y, keepdims=True)}),
        ... )
        >>> Task(mean_of).loss is None
        True
    """

    init: Callable[[np.random.Generator], dict[str, NDArray[Any]]]
    predict: Callable[..., NDArray[Any]]
    gradient: Callable[..., tuple[Any, dict[str, NDArray[Any]]]]
    stacked: bool = False
    sparse: SparseLoss | None = None


@dataclass(frozen=True)
class Task:
    """Model, loss and metrics.

    Args:
        model: a function without arguments (such as the class itself) that makes a ``torch.nn.Module``; or a
            :class:`JaxModel` or :class:`NumpyModel`. A model of several inputs gets them as several arguments.
        loss: ``loss(output, target)``, the mean over the batch, or one value per example. ``None`` for a
            NumpyModel, whose gradient knows it.
        metrics: what evaluation reports beside the loss.
        average_buffers: whether buffers (BatchNorm's running statistics) are averaged like parameters; if not,
            every client keeps its own and the global model keeps its first ones.

    Raises:
        ConfigurationError: the model is an instance where a factory is needed, or there is no loss.

    Example:
        >>> import torch
        >>> net = lambda: torch.nn.Linear(64, 10)
        >>> task = Task(net, torch.nn.functional.cross_entropy, metrics=[accuracy])
    """

    model: Callable[[], Any] | JaxModel | NumpyModel
    loss: Callable[[Any, Any], Any] | None = None
    metrics: Sequence[Metric] = field(default_factory=tuple)
    average_buffers: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if hasattr(self.model, "named_parameters") and not isinstance(self.model, type):
            raise ConfigurationError(
                "model is a module; give the function that makes it, so that every run starts from fresh weights "
                "of its own seed: model=Net, or model=lambda: Net(width=64). To start from trained weights, use "
                "Settings(start=module)"
            )
        if not isinstance(self.model, JaxModel | NumpyModel):
            _check_factory(self.model)
        if self.loss is not None or not isinstance(self.model, NumpyModel):
            _check_loss(self.loss)
        _check_metrics(self.metrics)
        names = [*TAKEN, *(m.name for m in self.metrics)]
        if len(set(names)) < len(names):
            raise ConfigurationError(
                f"metrics need names that differ from each other and from {', '.join(TAKEN)}: {names[len(TAKEN) :]}"
            )

    def __repr__(self) -> str:
        model, loss = (getattr(v, "__name__", type(v).__name__) for v in (self.model, self.loss))
        loss = "" if self.loss is None else f", {loss}"
        return f"Task({model}{loss}, metrics={[m.name for m in self.metrics]})"


def _check_factory(model: Any) -> None:
    if not callable(model):
        raise ConfigurationError(
            f"model must be a function that makes a module, such as the class itself (model=Net); not {model!r}"
        )
    try:
        inspect.signature(model).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"model is called without arguments, and {getattr(model, '__name__', model)} needs some ({error}). Write "
            "model=lambda: Net(width=64), with yours"
        ) from error
    except ValueError:  # of a kind whose signature nobody knows
        return


def _check_loss(loss: Any) -> None:
    if loss is None:
        raise ConfigurationError("a loss is needed, e.g. loss=torch.nn.functional.cross_entropy")
    if isinstance(loss, type):
        raise ConfigurationError(
            f"loss is the class {loss.__name__}; give the function that it makes: loss={loss.__name__}()"
        )
    if not callable(loss):
        raise ConfigurationError(
            f"loss must be a function loss(output, target), e.g. torch.nn.functional.cross_entropy; not {loss!r}"
        )


def _check_metrics(metrics: Any) -> None:
    if isinstance(metrics, Metric):
        raise ConfigurationError(f"metrics is a list; write metrics=[foedus.{metrics.name}]")
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ConfigurationError(f"metrics is a list of metrics, e.g. metrics=[foedus.accuracy]; not {metrics!r}")
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise ConfigurationError(
                f"metrics holds {metric!r}, which is no Metric. Write foedus.accuracy, or make one: "
                "foedus.Metric('name', lambda output, target: ...)"
            )


# --- metrics ------------------------------------------------------------------------------------------------


def _hits(output: NDArray[Any], target: NDArray[Any]) -> Any:
    if output.shape == target.shape or output.shape == (*target.shape, 1):
        return np.asarray((output.reshape(target.shape) > 0) == (target > 0.5))
    # A negative label (torch's losses leave −100 out) marks padding, which is neither right nor wrong.
    axis = _class_axis(output, target)
    right = (output.argmax(axis) == target) & ~np.isnan(output).any(axis)  # argmax takes NaN for the greatest
    return np.ma.array(right, mask=target < 0)


def _class_axis(output: NDArray[Any], target: NDArray[Any]) -> int:
    last, first = output.shape[:-1] == target.shape, output.shape[:1] + output.shape[2:] == target.shape
    if last and first and output.ndim > 2:
        raise ConfigurationError(
            f"accuracy cannot tell which axis of an output {output.shape} holds the classes; "
            "write a Metric of your own with the right argmax"
        )
    if not (last or first):
        raise ConfigurationError(f"accuracy does not fit an output of shape {output.shape} to a target {target.shape}")
    return -1 if last else 1


def _scores(output: NDArray[Any], target: NDArray[Any]) -> float:
    """The chance that a positive example scores above a negative one (Mann–Whitney U, ties count half)."""
    score = output[:, 1] - output[:, 0] if output.ndim == 2 and output.shape[1] == 2 else output.reshape(-1)
    if score.size != target.size:
        raise ConfigurationError(
            f"auroc is for two classes: one output per example, or two; not outputs {list(output.shape)} for targets "
            f"{list(target.shape)}"
        )
    positive = target.reshape(-1) > 0.5
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below or np.isnan(score).any():
        return float("nan")  # of one class only, or a model that gives no scores: undefined
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]
    return float((ranks[positive].sum() - above * (above + 1) / 2) / (above * below))


def _squares(output: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.square(_like(output, target, "rmse") - target))


def _distances(output: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.abs(_like(output, target, "mae") - target))


def _like(output: NDArray[Any], target: NDArray[Any], name: str) -> NDArray[np.float64]:
    """The output in the target's shape, which may lack an axis of length one."""
    if output.size != target.size:
        raise ConfigurationError(
            f"{name} compares an output with a target of the same shape, not {list(output.shape)} with "
            f"{list(target.shape)}. For classes write foedus.accuracy"
        )
    return output.reshape(target.shape).astype(np.float64)


accuracy = Metric("accuracy", _hits)
"""Share of right predictions: the greatest score wins; a single output above 0 means class 1. Where the label is
negative (padding, by torch's −100) nothing is counted."""

auroc = Metric("auroc", _scores, whole=True)
"""Area under the ROC curve of a two-class model; NaN where only one class occurs, or an output is NaN."""

rmse = Metric("rmse", _squares, finish=lambda mean: float(np.sqrt(mean)), better=min)
"""Root of the mean squared error."""

mae = Metric("mae", _distances, better=min)
"""Mean absolute error."""
