"""Events: what a mechanism did, as plain values. A mechanism says what ran; only an accountant says ε.

Every event is about one release, and knows against which *neighbours* it was calibrated: what two situations it makes
hard to tell apart. Figures of different neighbours are not comparable, and are never added up.

A sum is made private against *one client contributes, or zeros in its place*. That one client were not there at all is
another question: of a cohort of fixed size, or of those who come first, somebody else would then have its place, and
the sum would differ by two contributions, not one. Only where every client takes part by itself, whoever else does
(everybody, Poisson), is an absent client the same as zeros; and only :class:`Sampled` claims it. (Replacing a client by
another one is two steps: out, and in.)

Not here: what events are worth (``accounting.py``), how often each has run (``ledger.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.errors import NoGuarantee


class Neighbours(StrEnum):
    """Which two situations cannot be told apart, up to (ε, δ)."""

    ONE_CLIENT_MORE = "one client is there with all its data, or is not, beside the same others"
    ANOTHER_UPDATE = "one client sends its update, or any other"
    ONE_CLIENT_BLANK = "one client contributes, or zeros in its place"

    @property
    def of_a_sum(self) -> bool:
        """Whether it is about a contribution to a sum, against zeros in its place; where a client can be left out
        without another one coming, that is the same."""
        return self is not Neighbours.ANOTHER_UPDATE


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on a sum to which one client contributes at most C in norm, whoever is chosen for it.

    Attributes:
        noise_multiplier: z = σ / C.

    Example:
        >>> Gaussian(1.1).neighbours.value
        'one client contributes, or zeros in its place'
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK


@dataclass(frozen=True)
class LocalGaussian:
    """Gaussian noise that a client adds to its own update of norm at most C. Two updates are up to 2 C apart, so that
    it is worth what central noise of half the multiplier is.

    Attributes:
        noise_multiplier: z = σ / C.

    Example:
        >>> LocalGaussian(8.0).neighbours.value
        'one client sends its update, or any other'
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ANOTHER_UPDATE


@dataclass(frozen=True)
class Sampled:
    """A release of a cohort in which every client took part by itself with probability ``rate``, unseen by whom the
    guarantee is against (Poisson sampling). Anything else is no reason to claim more.

    Attributes:
        rate: q, in (0, 1].
        event: what happened to that cohort.

    Example:
        >>> Sampled(0.01, Gaussian(1.0)).rate
        0.01
    """

    rate: float
    event: Gaussian

    def __post_init__(self) -> None:
        if not isinstance(self.event, Gaussian):
            raise NoGuarantee(
                f"sampling makes a release more private if nobody sees who took part; not {self.event!r}, whose "
                "noise is added by clients that the server sees"
            )
        check_number("rate", self.rate, above=True)
        if self.rate > 1:
            raise NoGuarantee(f"a sampling rate lies in (0, 1], not {self.rate}")

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_MORE  # nobody comes in the place of a client that is not drawn


@dataclass(frozen=True)
class Tree:
    """All running sums of a sequence in which each client contributes to one step, by tree aggregation (Kairouz et al.
    2021, "Practical and private (deep) learning without sampling or shuffling").

    Attributes:
        noise_multiplier: of every node of the tree.
        steps: how many sums.

    Example:
        >>> Tree(7.0, steps=2000).neighbours.value
        'one client contributes, or zeros in its place'
    """

    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)
        check_whole("steps", self.steps)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK


@dataclass(frozen=True)
class BandedStream:
    """Rounds whose noise hangs together over a few rounds, with participations so far apart that they meet in none of
    them (Choquette-Choo et al. 2023). Counted as one release of as many rounds as there have been.

    Attributes:
        noise_multiplier: z of what one participation of a client changes in all.
        rounds: planned.
        separation: rounds from one participation of a client to its next, at least.

    Example:
        >>> BandedStream(8.0, rounds=100, separation=25).after(100), BandedStream(8.0, 100, 25).after(25)
        (4.0, 8.0)
    """

    noise_multiplier: float
    rounds: int
    separation: int

    def __post_init__(self) -> None:
        _check_stream(self)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK

    def after(self, rounds: int) -> float:
        """The noise multiplier that the first so many rounds have together."""
        return self.noise_multiplier / math.sqrt(-(-_planned(self, rounds) // self.separation))


@dataclass(frozen=True)
class TreeStream:
    """Rounds whose running sums are put together of noisy sums over blocks of 1, 2, 4, ... rounds (Kairouz et al.
    2021). Counted as one release of as many rounds as there have been.

    Attributes:
        noise_multiplier: z of the sum over one block.
        rounds: planned.
        separation: rounds from one participation of a client to its next, at least.

    Example:
        >>> TreeStream(7.0, rounds=2000, separation=2000).squared(2000)
        11.0
    """

    noise_multiplier: float
    rounds: int
    separation: int

    def __post_init__(self) -> None:
        _check_stream(self)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK

    def squared(self, rounds: int) -> float:
        """The square of what a client changes in the sums over all blocks of the first so many rounds, at most: on
        each level, no block holds more than its length allows of the client's participations."""
        often, total = -(-rounds // self.separation), 0
        for level in range(rounds.bit_length()):
            ends = (rounds >> level) - (rounds >> (level + 1))  # blocks of this level that are summed
            inside = min(often, -(-(1 << level) // self.separation))
            total += inside * min(often, ends * inside)
        return float(total)

    def after(self, rounds: int) -> float:
        """The noise multiplier that the first so many rounds have together."""
        return self.noise_multiplier / math.sqrt(self.squared(_planned(self, rounds)))


@dataclass(frozen=True)
class ToeplitzStream:
    """Rounds whose noise hangs together over all rounds before, by a matrix whose diagonals are sums of geometric
    sequences that decrease (Dvijotham et al. 2024). Counted as one release of as many rounds as there have been.

    Attributes:
        noise_multiplier: z of what a client changes in all rounds that are planned.
        rounds: planned.
        separation: rounds from one participation of a client to its next, at least.
        omegas, thetas: cᵢ = Σ ω θⁱ⁻¹, and c₀ = 1.

    Example:
        >>> once = ToeplitzStream(2.0, rounds=100, separation=100, omegas=(0.5,), thetas=(0.9,))
        >>> once.after(100), round(once.after(1), 2)  # of a first round alone, less is seen
        (2.0, 3.04)
    """

    noise_multiplier: float
    rounds: int
    separation: int
    omegas: tuple[float, ...]
    thetas: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_stream(self)
        for name in ("omegas", "thetas"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        sound = len(self.omegas) == len(self.thetas) and all(o > 0 for o in self.omegas) and sum(self.omegas) <= 1
        if not sound or not all(0 < theta < 1 for theta in self.thetas):
            raise NoGuarantee(
                "diagonals decrease, as what is known of them asks for, if every θ lies in (0, 1) and the ω are above "
                f"0 and at most 1 together; not for ω = {self.omegas} and θ = {self.thetas}"
            )

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK

    def squared(self, rounds: int) -> float:
        """The square of what a client changes in the first so many rounds, at most, if each contribution has norm 1: it
        comes at once, and as often as it may (Kalinin & Lampert 2024, theorem 2)."""
        found = toeplitz(self.omegas, self.thetas, rounds, self.separation)
        return float(found @ found)

    def after(self, rounds: int) -> float:
        """The noise multiplier that the first so many rounds have together."""
        return self.noise_multiplier * math.sqrt(self.squared(self.rounds) / self.squared(_planned(self, rounds)))


def toeplitz(
    omegas: tuple[float, ...], thetas: tuple[float, ...], rounds: int, separation: int
) -> NDArray[np.float64]:  # fmt: skip
    """What a client changes in each round [round] that comes at once, and again after every ``separation`` rounds.

    Example:
        >>> toeplitz((0.5,), (0.5,), 5, 3).tolist()
        [1.0, 0.5, 0.25, 1.125, 0.5625]
    """
    column = np.zeros(-(-rounds // separation) * separation)
    column[0], powers = 1.0, np.array(thetas)[:, None] ** np.arange(len(column) - 1)
    column[1:] = np.array(omegas) @ powers
    column[rounds:] = 0
    return np.asarray(np.cumsum(column.reshape(-1, separation), 0).ravel()[:rounds])


def _check_stream(event: BandedStream | TreeStream | ToeplitzStream) -> None:
    check_number("noise_multiplier", event.noise_multiplier, above=True)
    check_whole("rounds", event.rounds)
    check_whole("separation", event.separation)


def _planned(event: BandedStream | TreeStream | ToeplitzStream, rounds: int) -> int:
    """So many rounds, if they were planned.

    Raises:
        NoGuarantee: they were not.
    """
    if not 0 < rounds <= event.rounds:
        raise NoGuarantee(f"{event} says what up to {event.rounds} rounds are worth, not {rounds}")
    return rounds


@dataclass(frozen=True)
class SharedGaussian:
    """A sum to which at least ``shares`` clients have each added discrete Gaussian noise (Kairouz, Liu & Steinke 2021,
    theorem 1). Of every client's contribution nothing is seen but the sum.

    Attributes:
        noise_multiplier: z of the noise of so many clients together.
        shares: how many add noise at least.
        spread: each one's standard deviation in steps of the grid, at least: a sum of discrete Gaussians of so many
            steps is so near to one.
        entries: of the sum, at most.

    Example:
        >>> round(SharedGaussian(1.0, shares=100).rho, 9)
        0.5
    """

    noise_multiplier: float
    shares: int
    spread: float = 2.0
    entries: int = 2**32

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)
        check_number("spread", self.spread, above=True)
        check_whole("shares", self.shares)
        check_whole("entries", self.entries)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK

    @property
    def rho(self) -> float:
        """It is ρ-zero-concentrated, ρ = (1 / z + τ √entries)² / 2."""
        exponent = -2 * (math.pi * self.spread) ** 2
        tau = 10 * math.fsum(math.exp(exponent * k / (k + 1)) for k in range(1, self.shares))
        return (1 / self.noise_multiplier + tau * math.sqrt(self.entries)) ** 2 / 2


@dataclass(frozen=True)
class SharedSkellam:
    """A sum to which at least ``shares`` clients have each added Skellam noise (Agarwal, Kairouz & Liu 2021, corollary
    4.1). Of every client's contribution nothing is seen but the sum.

    Attributes:
        noise_multiplier: z of the noise of so many clients together.
        shares: how many add noise at least.
        spread: the standard deviation of that noise in steps of the grid, at least.

    Example:
        >>> round(SharedSkellam(1.0, shares=100, spread=64.0).divergence(2.0), 4)
        1.0005
    """

    noise_multiplier: float
    shares: int
    spread: float = 64.0

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)
        check_whole("shares", self.shares)
        check_number("spread", self.spread, above=True)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK

    def divergence(self, order: float) -> float:
        """Rényi's, of an order above 1; proven for whole ones, and no smaller order has a larger one."""
        whole, squared = math.ceil(order), self.noise_multiplier**2
        # With a bound of s steps, the sum of a whole vector's magnitudes is at most s², too; the variance is (z · s)².
        near = (2 * whole - 1 + 6) / (4 * squared * self.spread**2)
        return whole / (2 * squared) + min(near, 3 / (2 * squared))


@dataclass(frozen=True)
class Concentrated:
    """A release of which only this is known: zero-concentrated differential privacy ρ (Bun & Steinke 2016).

    Attributes:
        rho: ρ; a Gaussian of multiplier z has 1 / (2 z²).

    Example:
        >>> Concentrated(0.81).rho
        0.81
    """

    rho: float

    def __post_init__(self) -> None:
        check_number("rho", self.rho, above=True)

    @property
    def neighbours(self) -> Neighbours:
        return Neighbours.ONE_CLIENT_BLANK


Shared = SharedGaussian | SharedSkellam
Stream = BandedStream | TreeStream | ToeplitzStream
Event = Gaussian | LocalGaussian | Sampled | Tree | Shared | Stream | Concentrated
_KINDS: dict[str, Callable[..., Event]] = {
    kind.__name__: kind
    for kind in (
        Gaussian,
        LocalGaussian,
        Sampled,
        Tree,
        SharedGaussian,
        SharedSkellam,
        BandedStream,
        TreeStream,
        ToeplitzStream,
        Concentrated,
    )
}


def trusted(event: Event) -> str:
    """Whom a guarantee takes on trust.

    Example:
        >>> trusted(LocalGaussian(4.0))
        'nobody'
    """
    match event:
        case LocalGaussian():
            return "nobody"
        case SharedGaussian() | SharedSkellam():
            return (
                "whoever adds updates up looks at the sum only (masks see to that), and at least "
                f"{event.shares} of the contributors keep their noise to themselves"
            )
        case Sampled():
            return "the server, which sees updates and who takes part"
        case BandedStream() | TreeStream() | ToeplitzStream():
            return "the server, which sees updates and keeps sums of some rounds"
        case _:
            return "the server, which sees updates"


def known(event: object) -> Event:
    """The event, if it is one that can be accounted for.

    Raises:
        NoGuarantee: it is something else.

    Example:
        >>> known(Gaussian(1.0))
        Gaussian(noise_multiplier=1.0)
    """
    if not isinstance(event, Event):
        raise NoGuarantee(
            f"{event!r} is no event that can be accounted for ({', '.join(_KINDS)}); nothing is claimed for it, and "
            "nothing was counted"
        )
    return event


def together(events: list[Event]) -> Event:
    """One event for what a round releases of one cohort all at once: independent Gaussian noise on several sums is
    Gaussian noise on all of them side by side, 1/z² = Σ 1/z_i².

    Raises:
        NoGuarantee: there is nothing, or they are not all Gaussian, or not all on one side.

    Example:
        >>> together([Gaussian(3.0), Gaussian(4.0)])
        Gaussian(noise_multiplier=2.4)
    """
    if len(events) == 1:
        return events[0]
    for kind in (Gaussian, LocalGaussian):
        alike = [event.noise_multiplier for event in events if isinstance(event, kind)]
        if alike and len(alike) == len(events):
            return kind(math.fsum(z**-2 for z in alike) ** -0.5)
    raise NoGuarantee(
        f"what a round releases at once is accounted for where all of it has Gaussian noise, added on the same side; "
        f"here it is {', '.join(map(repr, events)) or 'nothing'}"
    )


def as_json(event: Event) -> dict[str, Any]:
    """An event as plain values for JSON.

    Example:
        >>> as_json(Sampled(0.01, Gaussian(1.0)))
        {'event': 'Sampled', 'rate': 0.01, 'of': {'event': 'Gaussian', 'noise_multiplier': 1.0}}
    """
    told: dict[str, Any] = {"event": type(event).__name__}
    if isinstance(event, Sampled):
        return told | {"rate": event.rate, "of": as_json(event.event)}
    return told | dict(vars(event))


def of_json(told: Mapping[str, Any]) -> Event:
    """The inverse of :func:`as_json`.

    Raises:
        NoGuarantee: it is no event of this version.

    Example:
        >>> of_json({"event": "Gaussian", "noise_multiplier": 1.0})
        Gaussian(noise_multiplier=1.0)
    """
    values = {name: value for name, value in told.items() if name not in ("event", "of")}
    inner = {"event": of_json(told["of"])} if "of" in told else {}
    try:
        return _KINDS[told["event"]](**values, **inner)
    except (KeyError, TypeError) as error:
        raise NoGuarantee(f"{dict(told)!r} is no event that this version can account for") from error
