"""When updates are aggregated: round by round, as they come, every so often, or by edges first.

A :class:`Timing` is part of an algorithm. Without one, a round waits for its cohort. With :func:`buffered` the server
takes a step whenever so many updates have come, whatever model they started from, and those that started from an
old one count less; FedAsync (:func:`asynchronous`) is the case of one. :func:`semi_synchronous` takes a step every
so many seconds. :func:`hierarchical` puts edge aggregators between clients and server.

Not here: how long things take (``foedus.sim.world``), the server that does it over a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foedus.core.checks import check_number, check_whole, named
from foedus.core.select import Positions
from foedus.errors import ConfigurationError

__all__ = [
    "Buffered", "Hierarchical", "Staleness", "Timing", "asynchronous", "buffered", "constant", "hierarchical",
    "hinge", "polynomial", "semi_synchronous",
]  # fmt: skip


@dataclass(frozen=True)
class Staleness:
    """How much an update counts that started from a model so many server steps old: ``weight(age) -> [0, 1]``."""

    weight: Callable[[int], float]
    label: str


def constant() -> Staleness:
    """Every update counts the same, however old.

    Example:
        >>> constant().weight(7)
        1.0
    """
    return Staleness(lambda age: 1.0, "constant()")


def polynomial(exponent: float = 0.5) -> Staleness:
    """``(1 + age)^−a``: FedBuff's choice with a = 1/2 (Nguyen et al. 2022), and one of FedAsync's (Xie et al. 2019).

    Example:
        >>> polynomial(0.5).weight(3)
        0.5
    """
    check_number("exponent", exponent)
    return Staleness(lambda age: float((1 + age) ** -exponent), f"polynomial({exponent})")


def hinge(a: float = 10.0, b: float = 4.0) -> Staleness:
    """1 up to age b, and then ``1 / (a (age − b) + 1)`` (Xie et al. 2019, section 5.2).

    Example:
        >>> hinge(a=1.0, b=4.0).weight(5)
        0.5
    """
    check_number("a", a, above=True)
    check_number("b", b)
    return Staleness(lambda age: 1.0 if age <= b else float(1 / (a * (age - b) + 1)), f"hinge({a}, {b})")


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """The server takes a step when enough updates have come, or every so many seconds; the cohort's size says how many
    clients train at once. Made by :func:`buffered`, :func:`asynchronous` and :func:`semi_synchronous`.

    Attributes:
        size: updates that make a step; ``None``: whatever has come by the time.
        seconds: a step every so many seconds of the simulated world's clock; ``None``: by ``size`` alone.
        staleness: how much older updates count.
        mixing: if given, the server mixes models instead of adding updates: ``w ← (1 − α s) w + α s · (the
            client's model)``.
    """

    size: int | None = None
    seconds: float | None = None
    staleness: Staleness
    mixing: float | None = None

    @property
    def label(self) -> str:
        if self.mixing is not None:
            return f"asynchronous({self.mixing}, staleness={self.staleness.label})"
        given = {"size": self.size, "seconds": self.seconds}
        told = [f"{name}={value}" for name, value in given.items() if value is not None]
        told.append(f"staleness={self.staleness.label}")
        return f"{'buffered' if self.seconds is None else 'semi_synchronous'}({', '.join(told)})"


@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """Clients belong to edge aggregators, which average for some rounds among themselves before the server averages
    them. Made by :func:`hierarchical`."""

    edge: Callable[[Positions], Positions]
    rounds: int
    name: str

    @property
    def label(self) -> str:
        return f"hierarchical({self.name}, rounds={self.rounds})"


Timing = Buffered | Hierarchical


def buffered(size: int, *, staleness: Staleness | None = None) -> Buffered:
    """FedBuff (Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", algorithm 1).

    ``cohort=`` of the run says how many clients train at any time; a round is one step of the server. A client takes
    part again once its update is in a step. Updates are scaled by the staleness's weight before they are encoded.

    Args:
        size: updates that make a step (K).
        staleness: by default ``polynomial(0.5)``, as in the paper.

    Example:
        >>> buffered(10).label
        'buffered(size=10, staleness=polynomial(0.5))'
    """
    check_whole("size", size)
    return Buffered(size=int(size), staleness=staleness or polynomial())


def asynchronous(mixing: float = 0.6, *, staleness: Staleness | None = None) -> Buffered:
    """FedAsync (Xie, Koyejo, Gupta 2019, "Asynchronous federated optimization", algorithm 1): every client's model is
    mixed into the global one as it comes, ``w ← (1 − α s(age)) w + α s(age) · w_client``.

    Args:
        mixing: α, in (0, 1].
        staleness: by default ``polynomial(0.5)``.

    Example:
        >>> asynchronous(0.6).label
        'asynchronous(0.6, staleness=polynomial(0.5))'
    """
    check_number("mixing", mixing, above=True)
    if mixing > 1:
        raise ConfigurationError(f"mixing is a share in (0, 1], not {mixing}")
    return Buffered(size=1, staleness=staleness or polynomial(), mixing=mixing)


def semi_synchronous(seconds: float, *, staleness: Staleness | None = None) -> Buffered:
    """A step every so many seconds, of all the updates that have come since the last; slow clients go on, and
    their updates enter a later step.

    Args:
        seconds: of the simulated world's clock.
        staleness: by default ``polynomial(0.5)``.

    Example:
        >>> semi_synchronous(60.0).seconds
        60.0
    """
    check_number("seconds", seconds, above=True)
    return Buffered(seconds=float(seconds), staleness=staleness or polynomial())


def hierarchical(edges: int | Callable[[Positions], Positions], *, rounds: int = 1) -> Hierarchical:
    """Edge aggregators between clients and server (Liu et al. 2020, "Client-edge-cloud hierarchical federated
    learning", algorithm 1).

    In each round, every edge averages its own clients of the cohort ``rounds`` times; then the server aggregates the
    edges, weighted by their clients' weights. With ``rounds=1`` the result equals the flat one bit for bit: edges merge
    partial sums, and merging does not care where.

    Args:
        edges: how many, client i belonging to edge ``i mod edges``; or a function from positions int64 [C] to the
            numbers of their edges [C].
        rounds: of the edges, for each of the server's.

    Example:
        >>> import numpy as np
        >>> hierarchical(4, rounds=2).edge(np.array([0, 5, 9])).tolist()
        [0, 1, 1]
    """
    check_whole("rounds", rounds)
    if callable(edges):
        return Hierarchical(edge=edges, rounds=int(rounds), name=named(edges))
    check_whole("edges", edges)
    count = int(edges)
    return Hierarchical(edge=lambda positions: positions % count, rounds=int(rounds), name=str(count))
