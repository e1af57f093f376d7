"""Attacks on aggregation: what malicious clients send in the place of their updates, to test defences with.

An :class:`Attack` is a pure function of what the attackers see (:class:`Scene`): the updates that they would honestly
have sent, and, if they are omniscient, those of everybody else, the aggregator and its state. An
:class:`Adversary` says which clients attack, and :func:`corrupted` puts their updates in the place of the honest
ones; in a simulation, ``Settings(adversary=...)``.

Not here: attacks on training data (``core/poison.py``), attacks on privacy, defences (``core/robust.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, fold
from foedus.core.checks import check_number, check_whole
from foedus.core.random import generator
from foedus.core.robust import distances, squared_distances
from foedus.core.values import NOTHING, SERVER, Context, State, Update
from foedus.errors import ConfigurationError, FoedusError
from foedus.tree import Vector

if TYPE_CHECKING:
    from jaxtyping import Float64

Matrix = NDArray[np.floating]  # [client, parameter]


class Scene(NamedTuple):
    """What the attackers of a round see.

    Attributes:
        honest: the updates of all honest clients, [honest, parameter]; [0, parameter] unless the attack is omniscient.
        own: what the attackers would honestly have sent, [attacker, parameter].
        context: of the server in this round.
        generator: their randomness.
        state: what the server's aggregator keeps, for those who know the aggregator.
        clients: positions of the honest clients, then of the attackers; empty: 0, 1, 2, ...
    """

    honest: Matrix
    own: Matrix
    context: Context
    generator: np.random.Generator
    state: State | Mapping[str, NDArray] = NOTHING  # type: ignore[type-arg]
    clients: Sequence[int] = ()

    @property
    def known(self) -> Matrix:
        """What attackers base themselves on: the honest updates if they see them, otherwise their own."""
        return self.honest if len(self.honest) else self.own


class Attack(NamedTuple):
    """A way to attack. A value, like everything else.

    * ``craft(scene) -> updates`` [attacker, parameter]: what is sent.
    * ``omniscient``: whether it is shown the honest clients' updates.

    Example, whole: everybody sends nothing new:

        >>> lazy = Attack(lambda scene: np.zeros_like(scene.own), "lazy()")
        >>> scene = Scene(np.ones((0, 3)), np.ones((2, 3)), Context(0, 1, SERVER), np.random.default_rng(0))
        >>> lazy.craft(scene).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    craft: Callable[[Scene], Matrix]
    label: str
    omniscient: bool = False


# --- without knowledge of others ----------------------------------------------------------------------------


def garbage(scale: float = 1e3) -> Attack:
    """Normal noise of standard deviation ``scale`` in every parameter, whatever the training gave.

    Example:
        >>> garbage().label
        'garbage(1000.0)'
    """
    check_number("scale", scale, above=True)
    return Attack(lambda s: scale * s.generator.standard_normal(s.own.shape), f"garbage({scale})")


def not_finite() -> Attack:
    """NaN in every parameter: what a broken client sends, too. One is enough to ruin a mean that lets it in."""
    return Attack(lambda s: np.full_like(s.own, np.nan), "not_finite()")


def sign_flip(scale: float = 1.0) -> Attack:
    """The opposite of the honest update, ``scale`` times as long.

    Example:
        >>> sign_flip(4.0).label
        'sign_flip(4.0)'
    """
    check_number("scale", scale, above=True)
    return Attack(lambda s: -scale * s.own, f"sign_flip({scale})")


def scaled_noise(scale: float = 1.0) -> Attack:
    """The honest update and normal noise whose expected norm is ``scale`` times the update's own."""
    check_number("scale", scale, above=True)

    def craft(s: Scene) -> Matrix:
        lengths = np.linalg.norm(s.own, axis=1, keepdims=True) / math.sqrt(max(s.own.shape[1], 1))
        noisy: Matrix = s.own + scale * lengths * s.generator.standard_normal(s.own.shape)
        return noisy

    return Attack(craft, f"scaled_noise({scale})")


def model_replacement(factor: float) -> Attack:
    """The update times ``factor``, so that averaging leaves it whole; together with poisoned training data.

    Source: Bagdasaryan, Veit, Hua, Estrin, Shmatikov 2020, "How to backdoor federated learning", equation 3: the factor
    that puts the attacker's model in the place of the global one is clients / attackers (times 1 / server rate).

    Example:
        >>> model_replacement(5.0).label
        'model_replacement(5.0)'
    """
    check_number("factor", factor, above=True)
    return Attack(lambda s: factor * s.own, f"model_replacement({factor})")


def colluders(attack: Attack) -> Attack:
    """The attackers agree on one update, the mean of what they would have sent, and all send the same.

    Example:
        >>> colluders(sign_flip()).label
        'colluders(sign_flip(1.0))'
    """

    def craft(s: Scene) -> Matrix:
        return same_for_all(attack.craft(s).mean(axis=0), s)

    return Attack(craft, f"colluders({attack.label})", attack.omniscient)


# --- with knowledge of others -------------------------------------------------------------------------------


def alie(deviations: float | None = None, *, omniscient: bool = True) -> Attack:
    """A little is enough: the mean minus so many standard deviations in every parameter, hidden in the spread.

    Source: Baruch, Baruch, Goldberg 2019, "A little is enough", algorithm 3: by default as many deviations as leave a
    majority with enough honest clients that are farther out.

    Args:
        deviations: how many (the paper's z).
        omniscient: whether mean and deviation are those of the honest clients, or of the attackers' own updates.

    Example:
        >>> round(most_deviations(50, 24), 2)
        1.43
    """
    if deviations is not None:
        check_number("deviations", deviations, above=True)

    def craft(s: Scene) -> Matrix:
        count = len(s.own) + len(s.honest) if omniscient else 0
        z = most_deviations(count, len(s.own)) if deviations is None else deviations
        return same_for_all(s.known.mean(axis=0) - z * s.known.std(axis=0), s)

    if deviations is None and not omniscient:
        raise ConfigurationError("alie(omniscient=False) does not know the cohort: write alie(1.0, omniscient=False)")
    return Attack(craft, f"alie({'' if deviations is None else deviations})", omniscient)


def most_deviations(clients: int, attackers: int) -> float:
    """ALIE's z: so many standard deviations from the mean that enough honest clients to make up a majority with the
    attackers are expected farther out. At least 0."""
    supporters = clients // 2 + 1 - attackers
    honest = clients - attackers
    if not honest:  # nobody is left to be farther out
        return 0.0
    share = min(max((honest - supporters) / honest, 0.5), 1 - 1e-9)
    return NormalDist().inv_cdf(share)


def inner_product(scale: float = 1.0) -> Attack:
    """Minus ``scale`` times the mean of the honest updates, so that the aggregate points the wrong way.

    Source: Xie, Koyejo, Gupta 2019, "Fall of empires" (their ε): small scales get past rules of distances, large ones
    turn means around.
    """
    check_number("scale", scale, above=True)
    return Attack(lambda s: same_for_all(-scale * s.known.mean(axis=0), s), f"inner_product({scale})", True)


Direction = Callable[[Matrix], Vector]


def against_mean(known: Matrix) -> Vector:
    """The direction against the honest mean, of length 1, [parameter]."""
    return _unit(-known.mean(axis=0))


def against_sign(known: Matrix) -> Vector:
    """Against the sign of the honest mean in every parameter, [parameter]."""
    signs: Vector = -np.sign(known.mean(axis=0))
    return signs


def against_deviation(known: Matrix) -> Vector:
    """Minus the honest standard deviation of every parameter, [parameter]: the strongest in most tests of the paper."""
    deviation: Vector = -known.std(axis=0)
    return deviation


def min_max(direction: Direction = against_deviation) -> Attack:
    """As far from the honest mean as can be, but no farther from any honest update than the two most distant honest
    ones are from each other.

    Source: Shejwalkar, Houmansadr 2021, "Manipulating the Byzantine", section IV-C, equation 8. The paper
    searches the scale by halving; the squared distance to each update is quadratic in it, so it is solved for.

    Args:
        direction: honest updates [honest, parameter] -> direction [parameter]; ``against_deviation``,
            ``against_mean``, ``against_sign`` or one's own.

    Example:
        >>> min_max(against_sign).label
        'min_max(against_sign)'
    """

    def craft(s: Scene) -> Matrix:
        mean, along = s.known.mean(axis=0, dtype=np.float64), direction(s.known)
        bound = squared_distances(s.known).max()
        scales = [_reach(1, c1, c2 - bound, along) for c1, c2 in _crossing(s.known, mean, along)]
        return same_for_all(mean + max(min(scales), 0.0) * along, s)

    return Attack(craft, f"min_max({direction.__name__})", True)


def min_sum(direction: Direction = against_deviation) -> Attack:
    """As far from the honest mean as can be, but with no greater sum of squared distances to the honest updates than
    the honest update of the greatest has.

    Source: Shejwalkar, Houmansadr 2021, section IV-C, equation 9; solved as :func:`min_max` is.
    """

    def craft(s: Scene) -> Matrix:
        mean, along = s.known.mean(axis=0, dtype=np.float64), direction(s.known)
        bound = squared_distances(s.known).sum(axis=1).max()
        c1, c2 = np.sum(_crossing(s.known, mean, along), axis=0)
        scale = _reach(len(s.known), c1, c2 - bound, along)
        return same_for_all(mean + max(scale, 0.0) * along, s)

    return Attack(craft, f"min_sum({direction.__name__})", True)


def adaptive(aggregator: Aggregator, direction: Direction = against_deviation, *, steps: int = 40) -> Attack:
    """Knows the rule and all honest updates, and takes the scale of the perturbation that moves the result farthest.

    Tries scales of a geometric ladder, then halves the interval around the best one; each try runs the aggregator.

    Source: Shejwalkar, Houmansadr 2021, section IV-B (attacks tailored to the rule), equation 1: maximise
    ‖honest mean − rule(honest and malicious updates)‖. The context must have a layout if the aggregator needs one.

    Args:
        aggregator: the one that the server uses.
        direction: as for :func:`min_max`.
        steps: how often the aggregator is run.

    Example:
        >>> from foedus.core.robust import median
        >>> adaptive(median()).label
        'adaptive(median(), against_deviation)'
    """
    check_whole("steps", steps, least=4)

    def craft(s: Scene) -> Matrix:
        mean, along = s.known.mean(axis=0, dtype=np.float64), direction(s.known)
        spread = math.sqrt(float(squared_distances(s.known).max()))
        unit = max(spread, 1e-12) / max(float(np.linalg.norm(along)), 1e-300)

        def gained(scale: float) -> float:
            moved = aggregated(aggregator, [*s.known, *same_for_all(mean + scale * along, s)], s)
            return -1.0 if moved is None else float(np.linalg.norm(moved - mean))

        return same_for_all(mean + best_scale(gained, unit, steps) * along, s)

    return Attack(craft, f"adaptive({aggregator.label}, {direction.__name__})", True)


def best_scale(gained: Callable[[float], float], unit: float, steps: int) -> float:
    """The scale of the greatest gain: a ladder from unit/32 to 32·unit, then halving around its best rung."""
    ladder = [unit * 2.0 ** float(k) for k in np.linspace(-5, 5, max(steps // 2, 2))]
    found: dict[float, float] = {scale: gained(scale) for scale in ladder}
    width = ladder[1] / ladder[0]
    while len(found) < steps:
        best, width = max(found, key=lambda scale: found[scale]), math.sqrt(width)
        found |= {scale: gained(scale) for scale in (best / width, best * width)}
    return max(found, key=lambda scale: found[scale])


def aggregated(aggregator: Aggregator, rows: Sequence[Vector], scene: Scene) -> Vector | None:
    """What the server would make of these updates, each [parameter]; ``None`` if it refused one of them."""
    state, messages = dict(scene.state), []
    if not state and scene.context.layout is not None:
        state = aggregator.init(scene.context.layout)
    try:
        for client, row in zip(scene.clients or range(len(rows)), rows, strict=True):
            context = scene.context._replace(client=client, size=len(row))
            messages.append(aggregator.admit(aggregator.encode(Update(row, 1.0), context), context))
        message = fold(aggregator, messages)
        context = scene.context._replace(client=SERVER, size=len(rows[0]))
        return None if message is None else aggregator.decode(state, message, context)[0]
    except FoedusError:
        return None


def same_for_all(vector: Vector, scene: Scene) -> Matrix:
    """One update for every attacker, [attacker, parameter], of the dtype of their own."""
    return np.repeat(vector[None].astype(scene.own.dtype), len(scene.own), axis=0)


def _unit(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def _crossing(known: Matrix, mean: Vector, along: Vector) -> Float64[NDArray[np.float64], "client 2"]:
    """For every row the terms of ‖mean + γ·along − row‖² that do not have γ²: of γ, and the constant."""
    linear = 2 * (float(mean @ along) - known @ along.astype(np.float64))
    return np.stack([linear, distances(known, mean) ** 2], axis=1)


def _reach(count: int, linear: float, constant: float, along: Vector) -> float:
    """The greater γ with count·‖along‖²·γ² + linear·γ + constant = 0."""
    square = count * float(along.astype(np.float64) @ along)
    root = math.sqrt(max(linear * linear - 4 * square * constant, 0.0))
    return (root - linear) / (2 * square) if square else 0.0


# --- in a simulation ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Who attacks, how, and from when on.

    Attributes:
        clients: positions in the population.
        attack: what they do with their updates.
        since: the first round in which they attack.

    Example:
        >>> Adversary(clients=[3, 7], attack=sign_flip()).label
        'sign_flip(1.0) by 2 clients'
    """

    clients: Sequence[int]
    attack: Attack
    since: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise ConfigurationError(f"attack must be an Attack, e.g. foedus.attacks.alie(); not {self.attack!r}")
        object.__setattr__(self, "clients", tuple(self.clients))
        for client in self.clients:
            check_whole("Adversary(clients=...): a position", client, least=0)
        check_whole("since", self.since, least=1)

    @property
    def label(self) -> str:
        return f"{self.attack.label} by {len(self.clients)} client{'s' * (len(self.clients) != 1)}"


def corrupted(
    adversary: Adversary, updates: Mapping[int, Update], context: Context, *, state: State | None = None
) -> dict[int, Update]:
    """The updates of a round as they arrive, the attackers' replaced; weights stay as they were.

    Args:
        adversary: who attacks.
        updates: by client, before encoding.
        context: of the server in this round.
        state: what the aggregator keeps, for attacks that run it.

    Example:
        >>> sent = {c: Update(np.full(2, 1.0 + c, "f4"), weight=5) for c in range(3)}
        >>> arrived = corrupted(Adversary(clients=[2], attack=sign_flip()), sent, Context(0, 1, SERVER))
        >>> [arrived[c].vector.tolist() for c in range(3)]
        [[1.0, 1.0], [2.0, 2.0], [-3.0, -3.0]]
    """
    bad = sorted(set(adversary.clients) & updates.keys())
    if not bad or context.round < adversary.since:
        return dict(updates)
    own = np.stack([updates[c].vector for c in bad])
    seen = sorted(updates.keys() - set(bad)) if adversary.attack.omniscient else []
    good = [c for c in seen if np.isfinite(updates[c].vector).all()]  # others will be refused
    honest = np.stack([updates[c].vector for c in good]) if good else np.empty((0, own.shape[1]), own.dtype)
    draws = generator(context.seed, context.round, "attack")
    scene = Scene(honest, own, context, draws, state or NOTHING, (*good, *bad))
    crafted = adversary.attack.craft(scene).astype(own.dtype, copy=False)
    return dict(updates) | {c: updates[c]._replace(vector=row) for c, row in zip(bad, crafted, strict=True)}
