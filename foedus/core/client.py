"""What a client does with the model it receives: local training, as plain values.

:func:`local_sgd` is data, not code: every executor (a loop, a batched cohort, a compiled program, a phone) can
carry it out, since the update rule :func:`descend` is written once, with operators that numpy, torch and jax
arrays share. :func:`local_training` is the escape hatch for everything else: the user's own optimiser or
the user's own loop, in the executors that run plain torch.

Not here: gradients (``backends``), which batch is drawn when (``core/batches.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np

from foedus.core.checks import check_number, check_whole
from foedus.core.values import Context
from foedus.errors import ConfigurationError

Array = Any  # an array of numpy, torch or jax
Schedule = Callable[[int], float]


class Penalty(NamedTuple):
    """A term that local training adds to the loss, from the weights and the received weights.

    * ``value(w, received) -> scalar``: the term for one parameter array; the terms of all arrays add up.
    * ``gradient(w, received) -> array``: its gradient, same shape as ``w``.

    Both are called once per parameter array and use operators and methods that numpy, torch and jax share.
    """

    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array], Array]
    label: str


def proximal(mu: float) -> Penalty:
    """FedProx: ``μ/2 · ‖w − received‖²`` (Li et al. 2020, "Federated optimization in heterogeneous networks").

    Example:
        >>> import numpy as np
        >>> float(proximal(2.0).value(np.array([1.0, 2.0]), np.zeros(2)))
        5.0
    """
    check_number("mu", mu)
    return Penalty(_Distance(mu), _Pull(mu), f"proximal({mu})")


@dataclass(frozen=True)
class _Distance:
    """The value of :func:`proximal`; a class, so that equal penalties compare equal."""

    mu: float

    def __call__(self, w: Array, received: Array) -> Array:
        return self.mu / 2 * ((w - received) ** 2).sum()


@dataclass(frozen=True)
class _Pull:
    """The gradient of :func:`proximal`."""

    mu: float

    def __call__(self, w: Array, received: Array) -> Array:
        return self.mu * (w - received)


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """Local stochastic gradient descent; made and checked by :func:`local_sgd`."""

    lr: float | Schedule
    epochs: int | None
    steps: int | None
    batch_size: int | None
    momentum: float
    weight_decay: float
    clip_norm: float | None
    penalty: Penalty | None

    def rate(self, round: int) -> float:
        """The learning rate of a round, counted from 1."""
        return _rate(self.lr, round)

    @property
    def label(self) -> str:
        return _label("local_sgd", self, hide=("momentum", "weight_decay"))


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Local training by the user's own torch optimiser or loop; made by :func:`local_training`.

    ``private``: noise of the loop hides the single examples in what it gives (:func:`foedus.dp_sgd`).
    """

    optimiser: Callable[[Any], Any] | None
    loop: Callable[[Any, Any, LoopContext], float | None] | None
    epochs: int | None
    steps: int | None
    batch_size: int | None
    lr: float | Schedule | None
    private: bool = False

    def rate(self, round: int) -> float:
        return 0.0 if self.lr is None else _rate(self.lr, round)

    @property
    def label(self) -> str:
        return _label("local_training", replace(self, private=False), hide=("private",))


class LoopContext(NamedTuple):
    """What a user's own loop may want to know: the loss function, where it is, and the batches that counted
    randomness drew for it (``batches``: one int array of row numbers per step).

    For randomness of its own: ``key``, 64 bits counted from seed, round and client, and ``context``, which knows where
    noise that has to stay secret comes from (``foedus.privacy``)."""

    loss: Callable[[Any, Any], Any]
    round: int
    client: object
    batches: Sequence[Any]
    lr: float
    key: int = 0
    context: Context = Context(0, 0, 0)


Client = LocalSGD | LocalTraining


def local_sgd(
    lr: float | Schedule,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = 32,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    penalty: Penalty | None = None,
) -> LocalSGD:
    """Local training by stochastic gradient descent on shuffled batches.

    Each epoch goes once over the client's examples in a fresh order; its last batch may be smaller, and the
    loss is the mean over the examples of the batch. Momentum starts at zero in every round.

    Args:
        lr: learning rate, or a function of the round (counted from 1), e.g. ``lambda r: 0.1 * 0.99**r``.
        epochs: passes over the client's data; 1 if neither epochs nor steps is given.
        steps: number of batches instead of epochs.
        batch_size: examples a step; ``None`` takes all of the client's data as one batch.
        momentum: heavy-ball coefficient in [0, 1).
        weight_decay: L2 coefficient, added to the (clipped) gradient as ``weight_decay · w``.
        clip_norm: the objective's gradient, penalty included, is scaled down to this Euclidean norm if it is
            longer.
        penalty: a further term of the objective, e.g. ``proximal(0.01)``.

    What happens in a step, and in which order, is what ``torch.nn.utils.clip_grad_norm_`` and then
    ``torch.optim.SGD`` do: one client that trains alone equals the plain torch loop.

    Raises:
        ConfigurationError: a value is out of its range, or both epochs and steps are given.

    Example:
        >>> local_sgd(lr=0.1, epochs=5, batch_size=10).label
        'local_sgd(lr=0.1, epochs=5, batch_size=10)'
    """
    epochs, steps, batch_size = _amounts(epochs, steps, batch_size)
    if not callable(lr):
        check_number("lr", lr, also=", or a function of the round")
    check_number("momentum", momentum, below=1)
    check_number("weight_decay", weight_decay)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, also=", or None for no clipping", above=True)
    if penalty is not None and not isinstance(penalty, Penalty):
        raise ConfigurationError(f"penalty must be a Penalty, e.g. foedus.proximal(0.01); not {penalty!r}")
    return LocalSGD(
        lr=lr, epochs=epochs, steps=steps, batch_size=batch_size, momentum=momentum,
        weight_decay=weight_decay, clip_norm=clip_norm, penalty=penalty,
    )  # fmt: skip


def local_training(
    *,
    optimiser: Callable[[Any], Any] | None = None,
    loop: Callable[[Any, Any, LoopContext], float | None] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = 32,
    lr: float | Schedule | None = None,
) -> LocalTraining:
    """The escape hatch: train locally by any torch optimiser, or by a loop of your own.

    Runs in the executors ``debug``, ``processes`` and ``ray``; ``auto`` knows. Give exactly one of:

    Args:
        optimiser: a function ``parameters -> torch optimiser``, e.g.
            ``lambda p: torch.optim.AdamW(p, lr=1e-3)``; made afresh for every client and round.
        loop: a function ``(module, examples, context) -> mean loss or None`` that trains ``module`` in place;
            see :class:`LoopContext`.
        epochs, steps, batch_size: as in :func:`local_sgd`.
        lr: if given, a number or function of the round that overrides the optimiser's learning rate, and is
            passed to ``loop``.

    Example:
        >>> local_training(optimiser=lambda p: torch.optim.AdamW(p, lr=1e-3), epochs=2).epochs  # doctest: +SKIP
        2
    """
    if (optimiser is None) == (loop is None):
        raise ConfigurationError(
            "local_training() takes either optimiser=lambda params: torch.optim.AdamW(params, lr=1e-3) "
            "or loop=your_function(module, examples, context); give one of the two"
        )
    _check_function("optimiser", optimiser)
    _check_function("loop", loop)
    epochs, steps, batch_size = _amounts(epochs, steps, batch_size)
    if lr is not None and not callable(lr):
        check_number("lr", lr, also=", a function of the round, or None for the optimiser's own")
    return LocalTraining(
        optimiser=optimiser, loop=loop, epochs=epochs, steps=steps, batch_size=batch_size, lr=lr
    )  # fmt: skip


def manner(spec: Client, round: int) -> Hashable:
    """What training by a spec amounts to in a round: equal for specs that train alike, whenever they were made.

    Example:
        >>> manner(local_sgd(lr=0.1), 1) == manner(local_sgd(lr=lambda r: 0.1 / r), 1)
        True
    """
    amounts = (spec.rate(round), spec.epochs, spec.steps, spec.batch_size)
    if isinstance(spec, LocalSGD):
        return (*amounts, rule(spec))
    return (*amounts, spec.lr is None, _hashable(spec.optimiser), _hashable(spec.loop))


def rule(spec: LocalSGD) -> Hashable:
    """How gradients become steps, apart from the learning rate: equal for specs that need the same program.

    Example:
        >>> rule(local_sgd(lr=0.1, epochs=2)) == rule(local_sgd(lr=0.3, batch_size=4))
        True
    """
    penalty = None if spec.penalty is None else (_hashable(spec.penalty.value), _hashable(spec.penalty.gradient))
    return (spec.momentum, spec.weight_decay, spec.clip_norm, penalty)


def _hashable(value: Any) -> Hashable:
    """The value, or what tells it apart if it cannot be hashed."""
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return cast(Hashable, value)


class Steering(NamedTuple):
    """What an algorithm does to every gradient of a round: arrays like the parameters', or nothing.

    ``shift`` is added (SCAFFOLD's control variates); ``mask`` is 1 where parameters may move and 0 where not.
    ``bases`` has for every parameter the columns whose span its matrix's may move in, see :func:`projected`, or None
    for any.
    """

    shift: Sequence[Array] = ()
    mask: Sequence[Array] = ()
    bases: Sequence[Array | None] = ()


STRAIGHT = Steering()


def descend(
    spec: LocalSGD, params: Sequence[Array], grads: Sequence[Array], *, memory: Sequence[Array],
    received: Sequence[Array], lr: Array, steering: Steering = STRAIGHT,
) -> tuple[list[Array], list[Array]]:  # fmt: skip
    """One step of local SGD over lists of parameter arrays of one client: (new parameters, new momenta).

    In this order, which is torch's: shift and penalty, clipping of the whole gradient, weight decay, mask and bases,
    momentum, step.
    ``memory`` holds the momenta, or is empty without momentum. Pure; numpy, torch and jax arrays run the same
    lines.
    """
    grads = total_gradient(spec, params, grads, received, steering)
    if spec.momentum:
        memory = [spec.momentum * m + g for m, g in zip(memory, grads, strict=True)]
        grads = memory
    return [w - lr * g for w, g in zip(params, grads, strict=True)], list(memory)


def total_gradient(
    spec: LocalSGD, params: Sequence[Array], grads: Sequence[Array], received: Sequence[Array],
    steering: Steering = STRAIGHT,
) -> list[Array]:  # fmt: skip
    """The loss's gradient with shift and penalty added, clipped, then weight decay added, masked and projected."""
    grads = list(grads)
    if steering.shift:
        grads = [g + s for g, s in zip(grads, steering.shift, strict=True)]
    if spec.penalty is not None:
        extra = [spec.penalty.gradient(w, r) for w, r in zip(params, received, strict=True)]
        grads = [g + e for g, e in zip(grads, extra, strict=True)]
    if spec.clip_norm is not None:
        norm = sum((g * g).sum() for g in grads) ** 0.5
        factor = spec.clip_norm / (norm + 1e-12)
        # min(1, factor) in operations that all array libraries share, traced ones included.
        factor = factor * (factor < 1) + (factor >= 1)
        grads = [g * factor for g in grads]
    if spec.weight_decay:
        grads = [g + spec.weight_decay * w for g, w in zip(grads, params, strict=True)]
    if steering.mask:
        grads = [g * m for g, m in zip(grads, steering.mask, strict=True)]
    if steering.bases:
        grads = [g if a is None else projected(a, g) for g, a in zip(grads, steering.bases, strict=True)]
    return grads


def projected(basis: Array, gradient: Array) -> Array:
    """``A·(Aᵀ·g)``: what is left of a gradient in the span of A's orthonormal columns.

    That is how the parameter moves if it is what was received plus A·B, of which B is trained.

    Args:
        basis: A [rows, rank], with as many axes of length 1 behind as make its axes as many as the parameter's.
        gradient: [..., rows, columns...], with any axes (of clients) before.
    """
    rows, rank = basis.shape[:2]
    a = basis.reshape((rows, rank))
    flat = gradient.reshape((*gradient.shape[: gradient.ndim - basis.ndim], rows, -1))
    return (a @ (a.T @ flat)).reshape(gradient.shape)


def _check_function(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        hint = " It is made afresh for every client and round: write optimiser=lambda p: torch.optim.AdamW(p)"
        raise ConfigurationError(
            f"{name} must be a function, and is of type {type(value).__name__}.{hint if name == 'optimiser' else ''}"
        )


def _amounts(epochs: int | None, steps: int | None, batch_size: int | None) -> tuple[int | None, ...]:
    """The three as Python's own numbers, so that equal ones look alike wherever they came from."""
    if epochs is not None and steps is not None:
        raise ConfigurationError(f"give epochs or steps, not both (epochs={epochs}, steps={steps})")
    if epochs is None and steps is None:
        epochs = 1
    for name, value in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        if value is not None:
            check_whole(name, value)
    return tuple(None if value is None else int(value) for value in (epochs, steps, batch_size))


def _rate(lr: float | Schedule, round: int) -> float:
    if not callable(lr):
        return float(lr)
    value: Any = lr(round)
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = float("nan")
    if not 0 <= rate < float("inf"):
        raise ConfigurationError(
            f"the learning-rate schedule gives {value!r} in round {round}; it must be a number of at least 0"
        )
    return rate


def _label(verb: str, spec: Any, hide: tuple[str, ...]) -> str:
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    shown = {k: v for k, v in fields.items() if v is not None and not (k in hide and v == 0)}
    return f"{verb}({', '.join(f'{k}={_shown(v)}' for k, v in shown.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, Penalty):
        return value.label
    if isinstance(value, np.generic):
        value = value.item()
    return f"<{getattr(value, '__name__', 'function')}>" if callable(value) else repr(value)
