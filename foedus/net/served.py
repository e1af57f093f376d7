"""What a server is to do: one value per run.

Not here: how it does it (``coordinator``), where it listens (``serving.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from foedus.core.checks import check_number, check_whole, whole
from foedus.core.compose import Algorithm
from foedus.core.examples import Examples
from foedus.core.select import Sampler, everybody
from foedus.core.task import Task
from foedus.core.timing import Buffered
from foedus.errors import ConfigurationError, NoGuarantee
from foedus.privacy.claims import fewest
from foedus.privacy.ledger import Budget
from foedus.rounds.evaluate import Evaluation


class Keeping(StrEnum):
    """What of a round under way lies on a disk.

    ``EPHEMERAL``: no update, and no sum of fewer than the minimum of contributors; clients that were not in the last
    checkpoint are asked to send again after a restart. ``SEALED``: updates, encrypted with a key of the round that is
    destroyed at its end. ``DURABLE``: updates as they came, until the round has ended.

    Example:
        >>> Keeping("sealed") is Keeping.SEALED
        True
    """

    EPHEMERAL = "ephemeral"
    SEALED = "sealed"
    DURABLE = "durable"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How rounds come about.

    Attributes:
        minimum: fewer contributors than this are never summed up and shown; a round with fewer fails. Masks,
            shares of noise, and rules such as Krum have a minimum of their own, which counts if it is more.
        over_selection: so many times the cohort's number are let in, since some will not come back.
        window: seconds in which clients are let in, from the round's beginning.
        deadline: seconds until uploads are no longer taken.
        clients: so many must have enrolled before the first round begins; by default the minimum.
        attempts: failed attempts of one round in a row, after which the run stops.
        retry: seconds until the next attempt of a round that failed.
        patience: seconds after which a client that does not answer is taken for lost, where sums are masked; for its
            training it has the time that is left.

    Example:
        >>> Rounds(minimum=3, deadline=600.0).over_selection
        1.0
    """

    minimum: int = 1
    over_selection: float = 1.0
    window: float = 300.0
    deadline: float = 3600.0
    clients: int = 0
    attempts: int = 100
    retry: float = 5.0
    patience: float = 60.0

    def __post_init__(self) -> None:
        check_whole("Rounds(minimum=...)", self.minimum, least=1)
        check_whole("Rounds(clients=...)", self.clients, least=0)
        check_whole("Rounds(attempts=...)", self.attempts, least=1)
        for name in ("window", "deadline", "retry", "patience"):
            check_number(f"Rounds({name}=...)", getattr(self, name), above=True)
        check_number("Rounds(over_selection=...)", self.over_selection)
        if self.over_selection < 1:
            raise ConfigurationError(f"over_selection is 1 or more, not {self.over_selection}")
        if self.window > self.deadline:
            raise ConfigurationError(
                f"clients would be let in for {self.window:g} s, and uploads taken for {self.deadline:g} s only. Write "
                "a longer deadline, or a shorter window"
            )


@dataclass(frozen=True, kw_only=True)
class Served:
    """One run: what is learned, by whom, and how its rounds come about.

    Attributes:
        name: of the run.
        task, algorithm, rounds, cohort, seed, evaluation: as for ``simulate``; a number as ``cohort`` takes the first
            that come, a sampler draws among those enrolled.
        each: how rounds come about.
        keeping: what of a round under way may lie on a disk.
        budget: of privacy.
        start: first weights; ``None`` for fresh ones.
        central_test: examples that the server evaluates on.
        target: what clients read in the bundle, ``"module:object"``.
        source: the file or folder of Python source that clients get; ``None`` if they have the code.
        protections: what the server promises to those who take part.
        population: whose run it is: of the clients that were invited to a population of this name; ``""`` for all.
        population: whose run it is: of the clients that were invited to a population of this name; ``""`` for all.
    """

    name: str
    task: Task
    algorithm: Algorithm
    rounds: int
    cohort: int | Sampler | None = None
    seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)
    each: Rounds = field(default_factory=Rounds)
    keeping: Keeping = Keeping.EPHEMERAL
    budget: Budget | None = None
    start: Any = None
    central_test: Examples | None = None
    target: str = ""
    source: Path | None = None
    protections: tuple[str, ...] = ()
    population: str = ""

    def __post_init__(self) -> None:
        check_whole("rounds", self.rounds, least=1)
        if not 0 < len(self.name) <= 64:
            raise ConfigurationError(
                f"the name of a run has 1 to 64 characters, and {self.name[:20]!r}... has {len(self.name)}: clients "
                "ask for it by name. Rename the file, or write another name"
            )
        if not isinstance(self.population, str) or len(self.population) > 100:
            raise ConfigurationError(f"population is a name of at most 100 characters, not {self.population!r:.120}")
        if not (whole(self.seed, least=-(2**63)) and self.seed < 2**63):
            raise ConfigurationError(f"seed must be a whole number of at most 64 bits, not {self.seed!r}")
        if self.cohort is not None and not isinstance(self.cohort, Sampler) and not whole(self.cohort, least=1):
            raise ConfigurationError(
                f"cohort is a number of clients, a sampler such as foedus.poisson(0.1), or None for all; not "
                f"{self.cohort!r}"
            )
        if self.budget is not None and self.budget.hidden:
            raise NoGuarantee(
                "between machines who is at hand takes part, and the server sees who: sampling cannot be counted. "
                "Leave out hidden=True"
            )
        rule = self.algorithm.aggregator
        asked = None if isinstance(self.cohort, Sampler) else self.cohort
        if asked is not None and fewest(rule) <= asked < rule.least:  # masks and shares say themselves what they need
            raise ConfigurationError(
                f"{rule.label} needs at least {rule.least} updates, and cohort={asked} takes {asked} "
                f"clients. Write cohort={rule.least} or more, or a rule that needs fewer"
            )
        timing = self.algorithm.timing
        if isinstance(timing, Buffered) and isinstance(self.cohort, Sampler):
            raise ConfigurationError(
                f"{timing.label} takes whoever comes: cohort= is the number of clients that train at a time, or None"
            )

    @property
    def sampler(self) -> Sampler:
        """Who takes part, as it is told and accounted for."""
        if isinstance(self.cohort, Sampler):
            return self.cohort
        return everybody() if self.cohort is None else first_to_come(self.cohort)

    @property
    def minimum(self) -> int:
        """Fewest contributors to a round: what ``each`` says, or what masks, shares of noise, and rules that compare
        updates need if it is more."""
        rule = self.algorithm.aggregator
        return max(self.each.minimum, fewest(rule), rule.least)

    @property
    def first(self) -> int:
        """How many must be enrolled before the first round begins."""
        wanted = self.cohort if isinstance(self.cohort, int) else 1
        return max(self.each.clients, self.minimum, wanted)


def common_population(runs: Iterable[Served]) -> str:
    """The population that all of some runs are for; ``""`` where there is none such."""
    found = {run.population for run in runs}
    return found.pop() if len(found) == 1 else ""


def first_to_come(count: int) -> Sampler:
    """The first so many that come: nothing is drawn."""
    return everybody()._replace(expected=lambda p: float(min(count, p.count)), label=f"first({count})")


__all__ = ["Keeping", "Rounds", "Served", "common_population", "first_to_come"]
