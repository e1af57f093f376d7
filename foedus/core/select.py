"""Which clients take part in a round: samplers, as values.

A sampler draws positions in the population from counted randomness: the same seed and round give the same
cohort wherever the run happens. Its cost does not grow with the population where the method allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole, whole
from foedus.core.random import fold, generator, key, order
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Int64

Positions = NDArray[np.int64]


class Population(NamedTuple):
    """What a sampler may know: ``count`` clients and, where known, their ``sizes`` int64 [count].

    ``passing`` says that these are only the clients that are there in one round: a sampler that wants more of them
    than there are takes all instead of refusing, since there may be more the next time. ``part`` says that these are
    some of a larger population, numbered anew, so that positions in it are not what the user means by them.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a population
    sizes: NDArray[np.int64] | None
    passing: bool = False
    part: bool = False


class Sampler(NamedTuple):
    """``sample(population, seed, round) -> positions`` int64 [C], without repeats, in increasing order.

    ``expected(population)`` is the planned cohort size, fixed before the run (privacy accounting needs it). ``rate`` is
    given where every client takes part by itself with that probability, whoever else does (Poisson sampling).
    ``separation`` is given where no client takes part again for so many rounds: if in round 5 and 3, not before 8.
    """

    sample: Callable[[Population, int, int], Positions]
    expected: Callable[[Population], float]
    label: str
    rate: float | None = None
    separation: int | None = None


def everybody() -> Sampler:
    """Every client in every round.

    Example:
        >>> everybody().sample(Population(3, None), 0, 1).tolist()
        [0, 1, 2]
    """
    return Sampler(lambda p, seed, round: np.arange(p.count), lambda p: float(p.count), "everybody()")


def uniform(clients: int) -> Sampler:
    """``clients`` different clients, every subset equally likely.

    Example:
        >>> len(set(uniform(10).sample(Population(1_000_000, None), 0, 1).tolist()))
        10
    """
    _at_least_one(clients)

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        _fits(clients, population)
        return np.sort(_draw(seed, round).choice(population.count, clients, replace=False, shuffle=False))

    return Sampler(sample, lambda p: float(clients), f"uniform({clients})")


def poisson(rate: float) -> Sampler:
    """Every client by itself with probability ``rate``: cohort sizes vary, and a cohort may be empty.

    Amplification of differential privacy by sampling is proven for this sampler.

    Example:
        >>> poisson(0.1).expected(Population(1000, None))
        100.0
    """
    check_number("rate", rate, above=True)
    if rate > 1:
        raise ConfigurationError(f"poisson(rate) needs a rate in (0, 1], not {rate}")

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        draw = _draw(seed, round)
        # Binomial size, then a uniform subset of it: the same law, without a draw per client.
        size = int(draw.binomial(population.count, rate))
        return np.sort(draw.choice(population.count, size, replace=False, shuffle=False))

    return Sampler(sample, lambda p: rate * p.count, f"poisson({rate})", rate=float(rate))


def spaced(clients: int, *, separation: int) -> Sampler:
    """``clients`` different clients, none of whom takes part again for ``separation`` rounds.

    Clients are dealt out at random to as many groups, equally large, and the groups take turns. For noise that hangs
    together over rounds (``foedus.privacy.correlated``), which needs no sampling at random, but no client too often.

    Args:
        clients: in a round.
        separation: from a round of a client to its next one.

    Example:
        >>> turn = spaced(2, separation=3)
        >>> seen = [set(turn.sample(Population(6, None), 0, round).tolist()) for round in range(1, 7)]
        >>> seen[0] == seen[3], set.union(*seen[:3]) == set(range(6))
        (True, True)
    """
    _at_least_one(clients)
    check_whole("separation", separation)

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        _whole_population(population, "spaced")
        most = population.count // separation
        if clients > most:
            raise ConfigurationError(
                f"of {population.count} clients, no more than {most} can take part in every round if none comes back "
                f"for {separation} rounds. Write spaced({most}, separation={separation}), or a smaller separation"
            )
        group = np.flatnonzero(_groups(population.count, separation, seed) == round % separation)
        return np.sort(_draw(seed, round).choice(group, clients, replace=False, shuffle=False))

    label = f"spaced({clients}, separation={separation})"
    return Sampler(sample, lambda p: float(clients), label, separation=int(separation))


@lru_cache(maxsize=2)
def _groups(count: int, groups: int, seed: int) -> Positions:
    """The group of each client, [count]: every ``groups`` successive positions are one of each, in an order of their
    own, so that a client stays in its group if the population grows."""
    parts = np.arange(-(-count // groups), dtype=np.uint64)
    own = fold(np.full(len(parts), key(seed, "groups", groups), np.uint64), parts)
    found: Positions = order(own, np.full(len(parts), groups))[:count]
    return found


def by_data(clients: int) -> Sampler:
    """``clients`` different clients, drawn with probability proportional to their number of examples
    (successively, without replacement). Clients without examples are never drawn. Use it with
    ``mean(weighted=False)``.

    Example:
        >>> by_data(1).sample(Population(3, np.array([0, 5, 0])), 0, 1).tolist()
        [1]
    """
    _at_least_one(clients)

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        if population.sizes is None:
            raise ConfigurationError(
                "by_data() needs the clients' sizes, and this population does not know them. Write "
                "Clients.generated(..., sizes=[...]); between machines every owner has to let it be told, by the rule "
                "data.tell_examples"
            )
        with_data = int((population.sizes > 0).sum())
        if not population.passing:
            _fits(clients, Population(with_data, None))
        wanted = min(clients, with_data)
        # Efraimidis & Spirakis 2006: the k smallest of Exponential(1) / weight.
        waits = _draw(seed, round).exponential(size=population.count)
        with np.errstate(divide="ignore"):
            waits /= population.sizes
        return np.sort(np.argpartition(waits, wanted - 1)[:wanted] if wanted else np.empty(0, np.int64))

    def expected(population: Population) -> float:
        return float(clients if population.sizes is None else min(clients, int((population.sizes > 0).sum())))

    return Sampler(sample, expected, f"by_data({clients})")


def always(positions: Sequence[int], sampler: Sampler) -> Sampler:
    """Some clients in every cohort, and others that a sampler draws from the rest.

    For a client that the server runs itself (``fltrust``), or for exactly so many attackers in every cohort.

    Args:
        positions: in the population, of those who always take part.
        sampler: draws among all others.

    Example:
        >>> always([7], uniform(2)).sample(Population(10, None), 0, 1).tolist()
        [2, 7, 8]
    """
    for position in positions:
        check_whole("always(positions, ...): a position", position, least=0)
    fixed = np.unique(np.asarray(positions, np.int64))

    def rest(population: Population) -> Population:
        _whole_population(population, "always")
        if len(fixed) and fixed[-1] >= population.count:
            raise ConfigurationError(
                f"always() names client {int(fixed[-1])}; the population has clients 0 to {population.count - 1}"
            )
        sizes = None if population.sizes is None else np.delete(population.sizes, fixed)
        return Population(population.count - len(fixed), sizes, part=True)

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        drawn = sampler.sample(rest(population), seed, round)
        # The k-th of the others lies behind as many fixed ones as have at most k others before them.
        drawn = drawn + np.searchsorted(fixed - np.arange(len(fixed)), drawn, side="right")
        return np.sort(np.concatenate([fixed, drawn]))

    expected: Callable[[Population], float] = lambda p: len(fixed) + sampler.expected(rest(p))  # noqa: E731
    return Sampler(sample, expected, f"always({fixed.tolist()}, {sampler.label})")


def available(trace: Callable[[int], NDArray[np.integer]], sampler: Sampler) -> Sampler:
    """Only clients that a trace says are available, e.g. at night and on power.

    In a round in which fewer are there than the sampler wants, all that are there (with :func:`by_data`, all of these
    that have examples) take part, perhaps nobody.

    Args:
        trace: round → positions of the clients that can take part in it.
        sampler: draws among them.

    Example:
        >>> night = available(lambda round: np.arange(0, 100, 1 + round % 2), uniform(5))
        >>> bool((night.sample(Population(100, None), 0, 1) % 2 == 0).all())
        True
    """

    def sample(population: Population, seed: int, round: int) -> Int64[Positions, " client"]:
        _whole_population(population, "available")
        there = _positions(trace(round), round)
        if len(there) and not (0 <= there[0] and there[-1] < population.count):
            raise ConfigurationError(
                f"the availability trace names client {int(there[-1] if there[0] >= 0 else there[0])} in round "
                f"{round}; the population has clients 0 to {population.count - 1}"
            )
        sizes = None if population.sizes is None else population.sizes[there]
        present = Population(len(there), sizes, passing=True, part=True)
        if present.count <= sampler.expected(present):
            return there
        return there[sampler.sample(present, seed, round)]

    return Sampler(sample, sampler.expected, f"available(<trace>, {sampler.label})")


def _whole_population(population: Population, name: str) -> None:
    if population.part:
        raise ConfigurationError(
            f"{name}() names clients by their position in the whole population, and here it would draw among a part "
            f"of it. Write it as one sampler: always(positions, uniform(10)), or available(trace, uniform(10))"
        )


def _positions(named: Any, round: int) -> Int64[Positions, " client"]:
    """What a trace gave, without repeats, in order."""
    found = np.asarray(named)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ConfigurationError(
            f"an availability trace gives a list of positions, and in round {round} it gave {found.dtype}"
            f"{list(found.shape)}. For a mask, write np.flatnonzero(mask)"
        )
    return np.unique(found.astype(np.int64))


def _draw(seed: int, round: int) -> np.random.Generator:
    return generator(seed, round, "cohort")


def _at_least_one(clients: int) -> None:
    if not whole(clients, least=1):
        raise ConfigurationError(f"a cohort has at least one client, not {clients!r}")


def _fits(clients: int, population: Population) -> None:
    if clients > population.count:
        raise ConfigurationError(
            f"a cohort of {clients} clients does not fit into a population of {population.count}; "
            f"write cohort={population.count}, or less"
        )
