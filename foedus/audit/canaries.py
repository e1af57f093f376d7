"""Canaries: what a run really gives away about one client, measured.

Before training, clients are added that send nothing useful: each sends, whenever it takes part, a direction of its own,
drawn at random. Afterwards somebody who knows these directions looks for them in what was released. A direction that
nobody sent shows up there by chance only, with a cosine of about N(0, 1/d); if those that were sent show up more than
that, the run tells who took part, and how well it does is an ε that can be laid beside the one that was claimed
(Andrew, Kairouz, Oh, Oprea, McMahan, Suriyakumar 2024, "One-shot empirical privacy estimation for federated learning").
All canaries are in one run: among thousands of parameters they hardly touch each other, and what little they do makes
the estimate smaller.

Two observers: who holds the final model (algorithm 2 of the paper) and who saw the model of every round, as clients do
(algorithm 3; beside the largest cosine over the rounds we look at their sum, which finds those who take part often).

An estimate is not a proof: a low one shows what *this* attack finds. The lower bound is meant at 95 % for normally
distributed statistics. Not here: claims (``foedus.privacy``), the run itself (``examine.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.audit.seen import alike, opened, passed, room_of, without_noise
from foedus.core.aggregate import Aggregator
from foedus.core.attacks import Adversary, Attack, Scene
from foedus.core.checks import check_number, check_whole
from foedus.core.parts import chosen
from foedus.core.population import Clients
from foedus.core.random import generator
from foedus.core.values import NOTHING, Context
from foedus.errors import ConfigurationError, DataError
from foedus.sim.federation import Federation
from foedus.tree import Layout, Vector

Figures = NDArray[np.float64]

MOST = 500.0  # beyond it, ε is as good as infinite
UNSEEN = 200  # directions that nobody sent, to compare with
NAME = "canary"


@dataclass(frozen=True, kw_only=True)
class Empirical:
    """How private a release was, as far as canaries tell.

    Attributes:
        epsilon: the estimate; infinite where canaries are seen as they are.
        least: a lower bound at 95 %.
        delta: δ of both.
        observed: the statistic of every canary [canary], in units of what chance gives.
        unseen: the same for directions that nobody sent.
        label: what was looked at.

    Example:
        >>> empirical([3.0, 5.0], [-1.0, 0.0, 1.0]).figures()["canaries"]
        2
    """

    epsilon: float
    least: float
    delta: float
    observed: Figures
    unseen: Figures
    label: str

    def figures(self) -> dict[str, float]:
        """For a record."""
        return {"epsilon": self.epsilon, "least": self.least, "delta": self.delta, "canaries": len(self.observed)}


# --- from statistics to ε -----------------------------------------------------------------------------------


def empirical(
    observed: Any, unseen: Any, *, delta: float = 1e-5, label: str = "canaries", looks: int = 1
) -> Empirical:  # fmt: skip
    """ε from a statistic of canaries that took part and of directions that did not.

    Both are taken for normal, with the spread of the unseen; ε is what tells the two apart at δ, as for the Gaussian
    mechanism. (The paper fits the spread of the observed, too; with tens of canaries instead of thousands that spread
    is so uncertain that ε is mostly its error.)

    Args:
        observed: one number per canary, at least 2.
        unseen: one number per direction that nobody sent.
        delta: δ in (0, 1).
        label: what was looked at.
        looks: among how many statistics this one was chosen, which the lower bound makes up for.

    Raises:
        DataError: there are too few, or they are not finite.

    Example:
        >>> draws = np.random.default_rng(0)
        >>> found = empirical(draws.normal(1, 1, 1000), draws.normal(0, 1, 1000))  # Gaussian noise, multiplier 1
        >>> 3.9 < found.epsilon < 4.9, found.least < 4.38
        (True, True)
    """
    check_number("delta", delta, below=1, above=True)
    seen, null = (np.asarray(v, np.float64).reshape(-1) for v in (observed, unseen))
    if min(len(seen), len(null)) < 2 or not (np.isfinite(seen).all() and np.isfinite(null).all()):
        raise DataError(
            f"ε is estimated from at least 2 finite figures of canaries and of others; there are {len(seen)} and "
            f"{len(null)}"
        )
    centre, spread = float(null.mean()), float(null.std(ddof=1)) + 1e-300
    seen, null = (seen - centre) / spread, (null - centre) / spread
    mean, deviation = float(seen.mean()), max(float(seen.std(ddof=1)), 1.0)
    quantile = NormalDist().inv_cdf(1 - 0.05 / looks)
    lower = mean - quantile * deviation * math.sqrt(1 / len(seen) + 1 / len(null))
    return Empirical(
        epsilon=told_apart(mean, delta=delta), least=told_apart(lower, delta=delta),
        delta=delta, observed=seen, unseen=null, label=label,
    )  # fmt: skip


def told_apart(distance: float, *, delta: float) -> float:
    """The ε at which normal distributions of spread 1 whose means are so far apart are (ε, δ)-indistinguishable
    (Balle & Wang 2018, "Improving the Gaussian mechanism for differential privacy", theorem 5); 0 for what is negative.

    Example:
        >>> round(told_apart(1.0, delta=1e-5), 2), told_apart(-1.0, delta=1e-5)  # the Gaussian mechanism, multiplier 1
        (4.38, 0.0)
    """
    if distance <= 0 or _excess(distance, 0.0) <= delta:
        return 0.0
    if _excess(distance, MOST) > delta:
        return math.inf
    low, high = 0.0, MOST
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if _excess(distance, middle) <= delta else (middle, high)
    return high


def _excess(distance: float, epsilon: float) -> float:
    """Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), by complementary error functions, which are precise in the tails."""
    near, far = (sign * distance / 2 - epsilon / distance for sign in (1, -1))
    return 0.5 * math.erfc(-near / math.sqrt(2)) - 0.5 * math.exp(epsilon) * math.erfc(-far / math.sqrt(2))


# --- canaries in a federation -------------------------------------------------------------------------------


def direction(seed: int, number: int, size: int) -> Vector:
    """The direction of a canary: float32 [parameter], of length 1. Numbers from ``count`` on are sent by nobody."""
    found = generator(seed, NAME, number).standard_normal(size, np.float32)
    unit: Vector = found / np.linalg.norm(found)
    return unit


def with_canaries(
    federation: Federation, layout: Layout, *, count: int = 32, length: float | None = None
) -> Federation:
    """The federation with clients that are canaries, at the end of the population, entered before training.

    Cohorts that are a number grow with the population, so that everybody takes part as often as before. Sums that
    nobody sees the parts of (masks, encryption) may have no room for more than they were made for: there canaries take
    the place of the last clients, of half of them at most.

    Args:
        federation: the one to be measured.
        layout: of its model.
        count: how many canaries, at most; far fewer than parameters.
        length: of what they send. By default the bound, where updates are clipped, and else the median of the honest
            updates' lengths.

    Raises:
        ConfigurationError: data arrives over rounds, or there are attackers already.

    Example:
        >>> layout = open_trainer(federation.task, seed=federation.seed).layout  # doctest: +SKIP
        >>> run = foedus.simulate(**vars(with_canaries(federation, layout, count=64)))  # doctest: +SKIP
    """
    check_whole("count", count, least=2)
    clients = federation.population()
    if clients.later is not None:
        raise ConfigurationError("canaries cannot enter a population whose data arrives over rounds; audit one round's")
    if federation.settings.adversary is not None:
        raise ConfigurationError(
            f"the federation has attackers already ({federation.settings.adversary.label}), and canaries take their "
            "place in the simulator. Leave out Settings(adversary=...)"
        )
    rule, gate, first = federation.algorithm.aggregator, federation.algorithm.gate, len(clients)
    if not _fits(federation, count):
        count = min(count, max(2, len(clients) // 2))
        first -= count
    length = sending(rule, layout, federation.seed) if length is None else length
    if gate.max_norm is not None:
        length = 0.99 * gate.max_norm if length is None else min(length, 0.99 * gate.max_norm)
    hostile = Adversary(clients=range(first, first + count), attack=_Canaries(federation.seed, first, length).attack)
    settings = replace(federation.settings, adversary=hostile)
    grown = _with(clients, first, count)
    cohort = federation.cohort
    if isinstance(cohort, int | np.integer):
        cohort = round(int(cohort) * len(grown) / len(clients))
    return replace(federation, clients=grown, cohort=cohort, settings=settings)


def _fits(federation: Federation, count: int) -> bool:
    """Whether a round's sum has room for so many more."""
    rule, cohort, clients = federation.algorithm.aggregator, federation.cohort, len(federation.population())
    room, asked = room_of(rule), clients + count
    if rule.sealed is None and isinstance(cohort, int | np.integer):
        asked = round(int(cohort) * asked / clients)
    return room is None or asked <= room


def canaries_in(federation: Federation) -> int | None:
    """How many canaries entered a federation by :func:`with_canaries`; ``None`` if it has none."""
    hostile = federation.settings.adversary
    craft = None if hostile is None else hostile.attack.craft
    entered = isinstance(craft, MethodType) and isinstance(craft.__self__, _Canaries)
    return len(hostile.clients) if entered and hostile is not None else None


def sending(rule: Aggregator, layout: Layout, seed: int) -> float | None:
    """What a canary should send where updates are clipped: twice the bound; ``None`` where they are not."""

    def left(length: float) -> float:
        context = Context(seed, 1, 0, layout=layout, size=layout.size, told=_told(rule, layout))
        vector = (length * direction(seed, -1, layout.size)).astype(np.float32)
        messages = alike(rule, vector, context, weight=1.0, secret=without_noise)
        return float(np.linalg.norm(opened(rule, messages, context)))

    longest, most = 1e6, left(1e6)
    length = longest
    while left(length) > 0.5 * most:
        length /= 10
        if length < 1e-6:  # what is left does not depend on how long it was: signs, say
            return None
    slope = left(length) / length
    bound = most / slope if slope else longest
    return 2 * bound if bound < 0.5 * longest else None


def _told(rule: Aggregator, layout: Layout) -> Any:
    return NOTHING if rule.tell is None else rule.tell(rule.init(layout))


class _Canaries(NamedTuple):
    """What canaries send."""

    seed: int
    first: int
    length: float | None

    @property
    def attack(self) -> Attack:
        return Attack(self.craft, f"{NAME}(seed={self.seed}, length={self.length})", omniscient=True)

    def craft(self, scene: Scene) -> NDArray[np.floating]:
        """[canary, parameter]: each its own direction."""
        count, size = scene.own.shape
        norms = [float(np.linalg.norm(row)) for row in scene.known]
        length = (float(np.median(norms)) or 1.0) if self.length is None else self.length
        numbers = [client - self.first for client in scene.clients[-count:]]
        return np.stack([length * direction(self.seed, number, size) for number in numbers])


def _with(clients: Clients, first: int, count: int) -> Clients:
    """The population with canaries from a position on, whose data, which is never sent, is that of others."""
    own = np.arange(first)
    positions = np.concatenate([own, np.arange(count) % len(clients)])
    validating, testing = (None if p is None else chosen(p, positions) for p in (clients.validating, clients.testing))
    ids = [*clients.ids[:first], *(f"{NAME} {i}" for i in range(count))]
    return replace(
        clients, ids=ids, training=chosen(clients.training, positions), validating=validating, testing=testing
    )


# --- looking for them ---------------------------------------------------------------------------------------


@dataclass
class Lookout:
    """Somebody who knows the directions and sees the model of every round.

    Attributes:
        seed, count: of the canaries.
        rows: for every round the cosines of its step with all directions, [direction], canaries first.

    Example:
        >>> lookout = Lookout(seed=0, count=4)
        >>> sent = sum(direction(0, i, 500) for i in range(4))  # all of them take part
        >>> lookout.see(np.zeros(500), sent)
        >>> lookout.found(1e-5).least > 10
        True
    """

    seed: int
    count: int
    rows: list[Figures] = field(default_factory=list)

    def see(self, before: Vector, after: Vector) -> None:
        """One round's step of the model."""
        self.rows.append(cosines(after.astype(np.float64) - before, self.seed, self.count + UNSEEN))

    def found(self, delta: float) -> Empirical:
        """What the steps of all rounds tell: by their sum or by the largest, whichever tells more."""
        table = np.stack(self.rows)  # [round, direction]
        ways = {"every model, sum of cosines": table.sum(0), "every model, largest cosine": table.max(0)}
        n = self.count
        each = [empirical(v[:n], v[n:], delta=delta, label=name, looks=len(ways)) for name, v in ways.items()]
        return max(each, key=lambda one: (one.least, one.epsilon))


def cosines(vector: Vector, seed: int, count: int) -> Figures:
    """Cosines [direction] of a vector [parameter] with the first so many directions, times √d, so that chance gives
    N(0, 1)."""
    norm = float(np.linalg.norm(vector)) or 1.0
    wide = vector.astype(np.float32) / np.float32(norm)
    found = [float(direction(seed, i, len(vector)) @ wide) for i in range(count)]
    return np.array(found) * math.sqrt(len(vector))


def in_final_model(first: Vector, last: Vector, *, seed: int, count: int, delta: float = 1e-5) -> Empirical:
    """What the final model tells of canaries that took part.

    Args:
        first, last: the model before and after the run, [parameter].
        seed: of the federation.
        count: how many canaries there were.
        delta: δ in (0, 1).

    Example:
        >>> sent = sum(direction(0, i, 500) for i in range(4))
        >>> in_final_model(np.zeros(500), sent, seed=0, count=4).least > 10
        True
    """
    found = cosines(last.astype(np.float64) - first, seed, count + UNSEEN)
    return empirical(found[:count], found[count:], delta=delta, label="final model")


def in_messages(
    rule: Aggregator, layout: Layout, *, seed: int, count: int = 32, length: float | None = None, delta: float = 1e-5,
    messages: int = 1,
) -> Empirical:  # fmt: skip
    """What messages of one client tell the server, who sees each of them alone, and puts a client's together.

    Args:
        rule: the algorithm's aggregator.
        layout: of the model.
        seed: of the canaries.
        count: how many clients.
        length: of what is sent; by default as :func:`with_canaries` chooses.
        delta: δ in (0, 1).
        messages: of each client, in as many rounds.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> in_messages(mean(), Layout(("w",), ((300,),), ("float32",)), seed=0, count=4).least > 10  # as it was sent
        True
    """
    check_whole("messages", messages)
    length = (sending(rule, layout, seed) or 1.0) if length is None else length
    observed, unseen = [], []
    for i in range(count):
        numbers = (i, *(count + (i * 8 + k) for k in range(8)))  # its own direction, and some that nobody sends
        known = np.stack([direction(seed, number, layout.size) for number in numbers])
        seen = np.zeros(len(known))
        for round in range(1, messages + 1):
            context = Context(seed, round, i, layout=layout, size=layout.size, told=_told(rule, layout))
            message = passed(rule, (length * known[0]).astype(np.float32), context, weight=1.0)
            view = opened(rule, [message], context).astype(np.float64)
            seen += known @ view * math.sqrt(layout.size) / (float(np.linalg.norm(view)) or 1.0)
        observed.append(seen[0])
        unseen += seen[1:].tolist()
    label = "one client's message" if messages == 1 else f"{messages} messages of one client"
    return empirical(observed, unseen, delta=delta, label=label)
