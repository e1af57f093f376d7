"""FSVRG: federated optimisation of sparse convex problems, in few rounds.

Where examples are sparse and unevenly spread (words by author), some features occur on one client only and others
everywhere, and plain averaging moves the rare ones hardly at all. FSVRG takes variance-reduced steps on every client,
in which each feature is scaled by how much rarer or more frequent it is there than overall, and each feature's change
is averaged over the clients that have the feature instead of over all.

It works on what is there: an example costs a few operations per feature that it *has*; the part of a step that moves
all features alike is made up for when a feature is next met (in closed form), so that a client's whole pass costs its
entries plus one vector. Not here: models (``core/sparse_linear.py``).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, lift, mean, unlift
from foedus.core.client import Schedule, local_sgd
from foedus.core.compose import Algorithm, composed
from foedus.core.examples import Examples
from foedus.core.method import Consult, Contribution, Gathered, Local, Method, Vectors, Visit
from foedus.core.random import generator
from foedus.core.server import ServerOptimiser
from foedus.core.sparse_rows import Compressed
from foedus.core.task import NumpyModel, SparseLoss
from foedus.core.values import NOTHING, State
from foedus.errors import ConfigurationError
from foedus.tree import Vector

Floats = NDArray[np.float64]
_GRADIENT, _STEPS = 0.0, 1.0  # what the clients are asked for next


def fsvrg(
    model: NumpyModel,
    *,
    step: float | Schedule,
    gradient: Aggregator | None = None,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
) -> Algorithm:
    """Federated SVRG (Konečný, McMahan, Ramage, Richtárik 2016, "Federated optimization: Distributed machine learning
    for on-device intelligence", arXiv 1610.02527, algorithm 4).

    Client k of n_k examples goes once through them, in random order, by

        w ← w − h/n_k · ( S_k [∇f_i(w) − ∇f_i(wᵗ)] + ∇f(wᵗ) ),

    and the server sets wᵗ⁺¹ = wᵗ + A Σ (n_k/n) (w_k − wᵗ). S_k and A are diagonal: with φʲ the share of all examples
    that have feature j, φ_kʲ that of the client's, and ωʲ the number of the K clients that have it, S_k is φʲ/φ_kʲ and
    A is K/ωʲ. (For a feature that nobody has, A is 1.)

    The algorithm needs ∇f at the very model from which the steps begin, so that an iteration is *two* rounds of
    ``simulate``: in the odd ones every client sends its gradient (and at its first visit its counts of features) and
    the model stays as it is; in the even ones clients take steps. It is sent ∇f and φ beside the model then. Nothing of
    the algorithm is approximated by that. With a cohort of some clients only, ∇f is that cohort's, and counts are of
    the clients seen so far; the paper has everybody in every round.

    The penalty of the model is present in every example: it is scaled by neither φ (S is 1 there), nor are features
    that a client lacks held still: they go with ∇f(wᵗ) and the penalty. The bias is a feature that all examples have.

    Args:
        model: the task's, from :func:`foedus.sparse_logistic`.
        step: h, or a function of the round; in the scale of gradient descent's learning rate.
        gradient: how gradients are aggregated; by default exactly.
        aggregator, server: as for ``fedavg``. A server other than ``sgd(lr=1.0)`` scales the step after A.

    Raises:
        ConfigurationError: the model is not one of sparse examples, or not the task's.

    Example:
        >>> from foedus.core.sparse_linear import sparse_logistic
        >>> fsvrg(sparse_logistic(10_000, l2=1e-4), step=1.0).method.label
        'fsvrg()'
    """
    loss = model.sparse if isinstance(model, NumpyModel) else None
    if loss is None:
        raise ConfigurationError(
            "fsvrg() is for linear models of sparse examples. Write model = foedus.sparse_logistic(features, l2=...), "
            "Task(model), and fsvrg(model, step=1.0)"
        )
    client = local_sgd(lr=step, epochs=1, batch_size=1)  # what a step of one example is, for rates and costs
    return composed(client, _method(loss, gradient), aggregator=aggregator, server=server)


class Around(NamedTuple):
    """What a client's steps start from and are corrected by.

    Attributes:
        weight, bias: the received model, [feature] and a number.
        pull, pull_bias: ∇f there, of the losses without the penalty, [feature] and a number.
        share: φ, the share of all examples that have a feature, [feature].
        step: h.
    """

    weight: Floats
    bias: float
    pull: Floats
    pull_bias: float
    share: Floats
    step: float


class Walked(NamedTuple):
    """How far a client's steps went, [feature] and a number, and its mean loss where they began."""

    weight: Floats
    bias: float
    loss: float


class Look(NamedTuple):
    """A client's gradient, [feature] and a number, its mean loss, and how many of its examples have a feature,
    [feature]."""

    weight: Floats
    bias: float
    loss: float
    having: Floats


@np.errstate(over="ignore", invalid="ignore")  # what diverges is refused later, by name
def walk(examples: Examples, *, loss: SparseLoss, around: Around, order: NDArray[np.int64]) -> Walked:
    """One pass over a client's examples in the order given: lines 5 to 8 of the paper's algorithm 4.

    Between two examples that have it a feature moves by ``δ ← ρ δ − h_k g`` a step, with ρ = 1 − h_k · l2 and g its
    entry of ∇f and of the penalty's gradient at the start: m such steps are ``ρᵐ δ − h_k (1 + ρ + … + ρᵐ⁻¹) g``.
    """
    rows, target = Compressed.of(examples.inputs, loss.features), examples.targets.astype(np.float64)
    count = len(target)
    step = around.step / count
    there, at, having = np.unique(rows.features, return_inverse=True, return_counts=True)
    drift = around.pull + loss.l2 * around.weight  # g, [feature]
    kept: Floats = np.power(1.0 - step * loss.l2, np.arange(count + 1), dtype=np.float64)  # ρᵐ
    made = step * np.concatenate([[0.0], np.cumsum(kept[:-1])])  # h_k (1 + … + ρᵐ⁻¹)
    scale = around.share[there] * count / having  # of S_k
    scores = rows.times(around.weight) + around.bias
    own = _steps(
        rows._replace(features=at), loss=loss, order=order, start=(scores, target), drift=drift[there],
        scaled=scale[at] * rows.values * step, rates=(kept, made), bias=(step, step * around.pull_bias),
    )  # fmt: skip
    change = -made[count] * drift  # of the features that the client lacks
    change[there] = own[0]
    mean = float(loss.value(scores, target).mean()) + loss.l2 / 2 * float(np.square(around.weight).sum())
    return Walked(change, own[1], mean)


def _steps(
    rows: Compressed, *, loss: SparseLoss, order: NDArray[np.int64], start: tuple[Floats, Floats], drift: Floats,
    scaled: Floats, rates: tuple[Floats, Floats], bias: tuple[float, float],
) -> tuple[Floats, float]:  # fmt: skip
    """The steps themselves, over the features that the client has: their changes [present], and the bias's.

    Args:
        rows: of the client's examples, features counted among the present ones.
        order: of the examples.
        start: scores at the received model, and targets, [example].
        drift: g, [present].
        scaled: values times S_k times h_k, [entry].
        rates: ρᵐ, and h_k (1 + … + ρᵐ⁻¹), [step + 1].
        bias: h_k, and h_k times the bias's entry of ∇f.
    """
    (scores, target), (kept, made), (step, pull) = start, rates, bias
    before = loss.slope(scores, target)  # at the received model
    change, seen = np.zeros(len(drift)), np.zeros(len(drift), np.int64)
    moved, offsets = 0.0, rows.offsets.tolist()
    for t, i in enumerate(order.tolist()):
        part = slice(offsets[i], offsets[i + 1])
        here, values = rows.features[part], rows.values[part]
        missed, along = t - seen[here], drift[here]
        now = kept[missed] * change[here] - made[missed] * along  # made up for
        slope = loss.slope(scores[i] + values @ now + moved, target[i]) - before[i]
        change[here] = kept[1] * now - made[1] * along - scaled[part] * slope
        seen[here] = t + 1
        moved -= step * float(slope) + pull
    missed = len(order) - seen
    return kept[missed] * change - made[missed] * drift, moved


@np.errstate(over="ignore", invalid="ignore")
def look(examples: Examples, *, loss: SparseLoss, weight: Floats, bias: float) -> Look:
    """A client's gradient without the penalty, loss with it, and counts of features, at a model."""
    rows, target = Compressed.of(examples.inputs, loss.features), examples.targets.astype(np.float64)
    loss.check(examples.targets)
    scores = rows.times(weight) + bias
    slope = loss.slope(scores, target) / len(target)
    mean = float(loss.value(scores, target).mean()) + loss.l2 / 2 * float(np.square(weight).sum())
    having = np.bincount(rows.features, minlength=loss.features).astype(np.float64)
    return Look(rows.pulled(slope, loss.features), float(slope.sum()), mean, having)


# --- the two rounds of an iteration -------------------------------------------------------------------------


def _method(loss: SparseLoss, gradient: Aggregator | None) -> Method:
    def local(visit: Visit) -> Local:
        weight, bias = _split(visit, visit.received, loss)
        if "gradient" not in visit.down:
            found: Look = yield Consult(partial(look, loss=loss, weight=weight, bias=bias))
            return _looked(visit, found)
        pull = _split(visit, visit.down["gradient"], loss)
        around = Around(weight, bias, *pull, visit.down["share"].astype(np.float64), visit.rate)
        order = generator(visit.seed, "fsvrg", visit.round, visit.client).permutation(visit.examples)
        walked: Walked = yield Consult(partial(walk, loss=loss, around=around, order=order))
        update = _joined(visit, walked.weight, walked.bias)
        return Contribution(update, kept=visit.kept, loss=walked.loss, steps=visit.examples)

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        state = dict(gathered.state)
        if state["turn"][0] == _STEPS:
            state["turn"] = np.array([_GRADIENT])
            return None if gathered.update is None else gathered.update * _spread(state["counts"]), state
        if "gradient" in gathered.sides:
            found = gathered.sides["gradient"].astype(state["gradient"].dtype)
            counts = state["counts"] + gathered.sides.get("counts", 0.0)
            state |= {"gradient": found, "counts": counts, "turn": np.array([_STEPS])}
        return None, state

    return Method(
        local,
        "fsvrg()" if gradient is None else f"fsvrg(gradient={gradient.label})",
        init=lambda vector, population: {
            "turn": np.array([_GRADIENT]), "gradient": np.zeros_like(vector), "counts": np.zeros(2 * len(vector)),
        },
        down=_down,
        sides={"gradient": gradient or mean(), "counts": _total()},
        finish=finish,
        looks=True,
    )  # fmt: skip


def _looked(visit: Visit, found: Look) -> Contribution:
    """The gradient, and at the first visit the counts: of examples that have a feature (every one has the bias), then
    of clients, one, that have it: [2 · parameter]."""
    sides = {"gradient": _joined(visit, found.weight, found.bias)}
    if "counted" not in visit.kept:
        having = np.append(found.having, float(visit.examples))
        sides["counts"] = np.concatenate([having, having > 0])
    return Contribution(None, sides=sides, kept={"counted": np.ones(1)}, loss=found.loss)


def _down(state: State) -> Vectors:
    """∇f without the penalty [parameter] and φ [feature], if steps are to be taken."""
    if state["turn"][0] != _STEPS:
        return NOTHING
    examples, _ = np.split(state["counts"], 2)
    return {"gradient": state["gradient"], "share": (examples[:-1] / examples[-1]).astype(state["gradient"].dtype)}


def _spread(counts: Floats) -> Floats:
    """The diagonal of A, [parameter]: clients in all by clients that have the feature; 1 where there are none."""
    _, clients = np.split(counts, 2)
    spread: Floats = np.divide(clients[-1], clients, out=np.ones(len(clients)), where=clients > 0)
    return spread


def _total() -> Aggregator:
    """The sum of the messages of those who sent one."""
    rule = mean(weighted=False)
    return rule._replace(decode=lambda state, message, context: (unlift(lift(message)), state), label="total()")


def _split(visit: Visit, vector: Vector, loss: SparseLoss) -> tuple[Floats, float]:
    """Weight [feature] and bias of a vector [parameter], in float64."""
    if visit.layout.names != ("weight", "bias") or visit.layout.sizes != (loss.features, 1):
        raise ConfigurationError(
            f"fsvrg() was given a model of {loss.features} features, and the task trains another one "
            f"({dict(zip(visit.layout.names, visit.layout.shapes, strict=True))}). Give both the same: Task(model), "
            "fsvrg(model, ...)"
        )
    return vector[:-1].astype(np.float64), float(vector[-1])


def _joined(visit: Visit, weight: Floats, bias: float) -> Vector:
    """A vector [parameter], in the dtype of the received one."""
    return np.append(weight, bias).astype(visit.received.dtype)
