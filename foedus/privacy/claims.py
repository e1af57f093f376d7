"""What may be claimed for an algorithm, and what is refused: from mechanisms to the event of a round.

:func:`round_event` looks at everything that a round releases, and refuses the run if a part of it is not covered:
another channel without noise, averaged buffers, rounds that do not wait for their cohort. Sampling counts only where it
is Poisson and unseen. Whatever the sampler, the event of a round is about one client's contribution against zeros in
its place; only unseen Poisson sampling also makes nothing of whether the client is there (``events.py`` says why).

Not here: the engine that stops (``foedus.sim``), what an event is worth (``accounting.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from foedus.core.aggregate import Aggregator
from foedus.core.checks import check_number, check_whole
from foedus.core.compose import Algorithm
from foedus.core.method import unchanged
from foedus.core.select import Sampler
from foedus.core.timing import Buffered, Hierarchical
from foedus.errors import ConfigurationError, NoGuarantee
from foedus.privacy.accounting import Accountant, History, pld, rdp, smallest_noise
from foedus.privacy.events import (
    Event,
    Gaussian,
    LocalGaussian,
    Sampled,
    SharedGaussian,
    SharedSkellam,
    Stream,
    known,
    together,
)
from foedus.privacy.examples import Steps


def round_event(algorithm: Algorithm, sampler: Sampler, *, hidden: bool = False, buffers: bool = False) -> Event:
    """What one round of an algorithm releases, for the accountant.

    Args:
        algorithm: whose aggregator is ``central``, ``adaptive``, or a chain with ``local`` or one of these in it.
        sampler: who takes part.
        hidden: whether whom the guarantee is against learns nothing of who took part.
        buffers: whether buffers of the model are averaged, too.

    Raises:
        NoGuarantee: something of it would not be private, or sampling is to count that does not.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> from foedus.core.compose import fedavg
        >>> from foedus.core.select import poisson
        >>> from foedus.privacy.mechanisms import central
        >>> rule = central(clip=1.0, noise_multiplier=1.1, cohort=10)
        >>> round_event(fedavg(local_sgd(0.1), aggregator=rule), poisson(0.01), hidden=True)
        Sampled(rate=0.01, event=Gaussian(noise_multiplier=1.1))
    """
    _check_timing(algorithm)
    event = together([_covered(channel, rule) for channel, rule in algorithm.channels(buffers=buffers)])
    _check_counts(algorithm)
    _check_silence(algorithm, event)
    _check_separation(event, sampler)
    if not hidden:
        return event
    if sampler.rate is None:
        raise NoGuarantee(
            f"{sampler.label} does not let every client take part by itself with the same probability, so that "
            "sampling cannot be counted. Write cohort=foedus.poisson(rate), or leave out hidden=True, which costs "
            "more noise"
        )
    if isinstance(event, LocalGaussian):
        raise NoGuarantee(
            "local noise protects against the server, which sees who takes part: sampling cannot be counted. Leave out "
            "hidden=True"
        )
    if isinstance(event, SharedGaussian | SharedSkellam):
        raise NoGuarantee(
            "noise in shares protects against the server, which sees who takes part: sampling cannot be counted. Leave "
            "out hidden=True"
        )
    if not isinstance(event, Gaussian):
        raise NoGuarantee(f"sampling is accounted for where noise is Gaussian, not for {event}")
    return event if sampler.rate == 1 else Sampled(sampler.rate, event)


def seen_by_nobody(rule: Aggregator) -> bool:
    """Whether the server adds noise to the sum, so that nobody is to see whether anybody contributed: then also a round
    without contributions is decoded, and gets its noise. Where sums are masked, a round of too few shows none at all.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> seen_by_nobody(mean())
        False
    """
    return rule.event is not None and rule.masking is None and not noised_by_clients(rule)


def noised_by_clients(rule: Aggregator) -> bool:
    """Whether every client adds noise, or a share of it, to what it sends.

    Example:
        >>> from foedus.core.aggregate import mean
        >>> noised_by_clients(mean())
        False
    """
    return isinstance(rule.event, LocalGaussian | SharedGaussian | SharedSkellam)


def fewest(rule: Aggregator) -> int:
    """How many have to contribute to a round at least, or nothing may be released of it.

    Example:
        >>> from foedus.privacy.distributed import gaussian_shares, trusted_sum
        >>> fewest(trusted_sum(gaussian_shares(clip=1.0, noise_multiplier=1.0, cohort=10, honest=8), planned=10))
        8
    """
    shares = rule.event.shares if isinstance(rule.event, SharedGaussian | SharedSkellam) else 0
    hiding = rule.masking or rule.sealed
    return shares if hiding is None else max(shares, hiding.least)


def _covered(channel: str, rule: Aggregator) -> Event:
    """The event of one channel."""
    if rule.event is not None:
        event = known(rule.event)
        _check_honest(rule, event)
        return event
    if channel == "update":
        raise NoGuarantee(
            f"{rule.label} adds no noise, so that nothing is private. Write "
            "aggregator=foedus.privacy.central(clip=..., noise_multiplier=..., cohort=...)"
        )
    if channel == "buffers":
        raise NoGuarantee(
            "the model's buffers (BatchNorm's statistics) are averaged without noise, and say what updates do not. "
            "Write Task(..., average_buffers=False), use normalisation without buffers, or give "
            "Algorithm(buffers=...) noise, too"
        )
    raise NoGuarantee(
        f"the method also sends {channel!r} by {rule.label}, which adds no noise. Use a method that sends updates "
        f"only, or one whose side {channel!r} has a rule of foedus.privacy"
    )


def _check_honest(rule: Aggregator, event: Event) -> None:
    """Refuse shares of noise under masks that would show a sum with fewer of them than planned."""
    if rule.masking is None or not isinstance(event, SharedGaussian | SharedSkellam):
        return
    honest = rule.masking.least - rule.masking.withstand.corrupted
    if honest < event.shares:
        raise NoGuarantee(
            f"{rule.label} shows sums of {rule.masking.least} clients, of whom {rule.masking.withstand.corrupted} may "
            f"be corrupt, and the noise was planned for {event.shares} honest ones. Write "
            f"masked(..., least={event.shares + rule.masking.withstand.corrupted}), or honest={honest}"
        )


def _check_counts(algorithm: Algorithm) -> None:
    """Refuse a method that would put into the model how many clients came."""
    method = algorithm.method
    if method is None or method.finish is unchanged or not method.counts or not seen_by_nobody(algorithm.aggregator):
        return
    raise NoGuarantee(
        f"{method.label} makes use of how many clients sent something, and the noise on sums does not cover that. If "
        "its finish() does not look at gathered.senders and gathered.visited, write method._replace(counts=False); "
        "otherwise use another method, or local noise"
    )


def _check_silence(algorithm: Algorithm, event: Event) -> None:
    """Refuse a method whose clients decide by their data whether they send, where the server sees who did."""
    method, by_clients = algorithm.method, isinstance(event, LocalGaussian | SharedGaussian | SharedSkellam)
    if method is None or not by_clients or not (method.silent or method.looks):
        return
    raise NoGuarantee(
        f"clients of {method.label} look at their data, or at what came of it, to decide whether they send anything, "
        "and the server sees who does: no noise covers that. Leave the method out, or have the server add the noise "
        "(foedus.privacy.central)"
    )


def _check_separation(event: Event, sampler: Sampler) -> None:
    """Refuse a stream whose clients may come back too early."""
    if not isinstance(event, Stream) or event.separation <= (sampler.separation or 1):
        return
    raise NoGuarantee(
        f"{sampler.label} may let a client take part again before {event.separation} rounds have passed, which the "
        f"noise was planned for. Write cohort=foedus.spaced(clients, separation={event.separation})"
    )


def _check_timing(algorithm: Algorithm) -> None:
    timing = algorithm.timing
    if isinstance(timing, Buffered):
        raise NoGuarantee(
            f"{timing.label} takes whoever comes first, as often as it comes: neither who takes part nor how often "
            "is fixed beforehand. Leave the timing out"
        )
    if isinstance(timing, Hierarchical) and timing.rounds > 1:
        raise NoGuarantee(
            f"{timing.label} bounds what an edge changes, not what a client does. Write hierarchical(..., rounds=1)"
        )


# --- planned settings ---------------------------------------------------------------------------------------


class Point(NamedTuple):
    """ε after so many rounds."""

    round: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with central noise that has not begun yet.

    Attributes:
        noise_multiplier: z.
        rounds: in all.
        cohort: planned clients in a round.
        population: how many clients there are; needed if ``hidden``.
        hidden: whether cohorts are drawn by ``poisson(cohort / population)`` and whom the guarantee is against learns
            nothing of who took part. Otherwise every client is thought to take part in every round.

    Example:
        >>> Plan(noise_multiplier=1.0, rounds=1500, cohort=100, population=3400, hidden=True).event.rate
        0.029411764705882353
    """

    noise_multiplier: float
    rounds: int
    cohort: float
    population: int | None = None
    hidden: bool = False

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier, above=True)
        check_whole("rounds", self.rounds)
        check_number("cohort", self.cohort, above=True)
        if self.population is not None:
            check_whole("population", self.population)
            if self.cohort > self.population:
                raise ConfigurationError(
                    f"a cohort of {self.cohort} does not fit into a population of {self.population}"
                )
        if self.hidden and self.population is None:
            raise ConfigurationError(
                "hidden cohorts make a run more private by how many clients there are: write population=..."
            )

    @property
    def event(self) -> Event:
        """Of one round."""
        gaussian = Gaussian(float(self.noise_multiplier))
        if not self.hidden or self.population is None or self.cohort == self.population:
            return gaussian
        return Sampled(self.cohort / self.population, gaussian)

    @property
    def history(self) -> History:
        """All of it: what ``Budget(planned=...)`` takes."""
        return ((self.event, self.rounds),)


def check_failing(delta: float, cohort: float, population: int | None = None) -> None:
    """Refuse a δ that promises nothing: whatever publishes the data of one client in 1/δ keeps it.

    Args:
        delta: δ in (0, 1).
        cohort: planned clients in a round: so many there are at least.
        population: how many there are, where that is known.

    Raises:
        ConfigurationError: δ is more than one in as many as there are clients.

    Example:
        >>> check_failing(1e-5, cohort=50, population=5000)
    """
    check_number("delta", delta, above=True, below=1)
    clients = max(cohort, 1) if population is None else population
    if delta * clients > 1.01:  # 1 / clients may be written with few digits
        known = "clients" if population is not None else "clients in a round, and no fewer in all"
        raise ConfigurationError(
            f"delta={delta:g} with {clients:g} {known}: whoever publishes all data of {delta * clients:.3g} of them "
            f"keeps that promise. Take well below 1 / {clients:g}, such as {0.1 / clients:.1g}"
        )


def curve(plan: Plan, delta: float, *, by: Accountant = rdp, points: int = 20) -> list[Point]:
    """ε over the rounds of a plan.

    Args:
        plan: see :class:`Plan`.
        delta: δ in (0, 1).
        by: the accountant, ``rdp`` or ``pld``.
        points: how many, at most.

    Raises:
        ConfigurationError: δ is more than one in as many as there are clients.

    Example:
        >>> rows = curve(Plan(noise_multiplier=8.0, rounds=100, cohort=10), 1e-5, points=2)
        >>> [(n, round(epsilon, 2)) for n, epsilon in rows]
        [(50, 4.11), (100, 6.12)]
    """
    check_whole("points", points)
    check_failing(delta, plan.cohort, plan.population)
    rounds = sorted({-(-plan.rounds * i // points) for i in range(1, points + 1)})
    return [Point(n, by([(plan.event, n)], delta)) for n in rounds]


def example_epsilon(
    noise_multiplier: float, *, batch_size: int, examples: int, steps: int, delta: float, by: Accountant = pld
) -> float:  # fmt: skip
    """ε of training by ``foedus.dp_sgd``, for each single example of a client: whether one example is in it or nothing
    in its place. Batches are Poisson-sampled, and seen by nobody but the client itself. How many examples a client has
    is taken to be public.

    Args:
        noise_multiplier: z.
        batch_size: planned.
        examples: how many the client has.
        steps: of all its visits together.
        delta: δ in (0, 1); well below 1 / examples.
        by: the accountant.

    Example:
        >>> round(example_epsilon(1.1, batch_size=20, examples=600, steps=300, delta=1e-5), 2)
        3.11
    """
    check_whole("batch_size", batch_size)
    check_whole("examples", examples)
    check_whole("steps", steps, least=0)
    taken = Steps.of(noise_multiplier, batch_size, examples, steps)
    return by([(taken.event, taken.taken)], delta)


def calibrate(
    epsilon: float, delta: float, *, rounds: int, cohort: float, population: int | None = None, hidden: bool = False,
    by: Accountant = rdp,
) -> float:  # fmt: skip
    """The least noise multiplier that keeps a run within (ε, δ): for ``foedus.privacy.central`` and ``adaptive``.

    Args:
        epsilon: of the whole run: one client contributes in all its rounds, or zeros in its place. With ``hidden``, or
            where everybody takes part in every round, that is the same as its being there or not.
        delta: the probability with which that may fail; well below 1 / population.
        rounds: in all.
        cohort: planned clients in a round.
        population: how many clients there are; needed if ``hidden``.
        hidden: whether cohorts are drawn by ``poisson(cohort / population)``, and whom the guarantee is against learns
            nothing of who took part. Otherwise sampling does not count: every client is thought to take part in every
            round.
        by: ``rdp``, which budgets stop by, or the tighter ``pld`` for a plan that is kept (``Budget(planned=...)``).

    Raises:
        ConfigurationError: the figures cannot be, or δ is more than one in as many as there are clients.

    Example:
        >>> round(calibrate(8.0, 1e-5, rounds=100, cohort=50, population=5000, hidden=True), 2)
        0.5
    """
    check_number("epsilon", epsilon, above=True)
    check_failing(delta, cohort, population)

    def event_of(noise_multiplier: float) -> tuple[Event, int]:
        plan = Plan(
            noise_multiplier=noise_multiplier, rounds=rounds, cohort=cohort, population=population, hidden=hidden
        )
        return plan.event, plan.rounds

    return smallest_noise(event_of, (float(epsilon), float(delta)), by)
