"""A whole federation as one value: what a file hands to ``foedus simulate``, and what a sweep varies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from foedus.core.compose import Algorithm
from foedus.core.population import Clients
from foedus.core.select import Sampler
from foedus.core.task import Task
from foedus.errors import ConfigurationError
from foedus.rounds.evaluate import Evaluation
from foedus.sim.engine import simulate
from foedus.sim.run import Run
from foedus.sim.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The arguments of :func:`foedus.simulate`, by the same names, as one value.

    On the command line ``foedus simulate my_file.py:federation`` runs it, and every flag replaces one field.
    In Python, ``dataclasses.replace(federation, rounds=50)`` makes another one.

    Attributes:
        task, algorithm, rounds, cohort, seed, evaluation, settings: see :func:`foedus.simulate`.
        clients: the population, or a function without arguments that makes it. Where the same file is served, every
            client imports it for task and algorithm; a function keeps it from loading everybody's data there.

    Raises:
        ConfigurationError: task, algorithm or clients are something else, perhaps swapped.

    Example:
        >>> federation = Federation(task=task, algorithm=algorithm, clients=clients, rounds=20)  # doctest: +SKIP
    """

    task: Task
    algorithm: Algorithm
    clients: Clients | Callable[[], Clients]
    rounds: int
    cohort: int | Sampler | None = None
    seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name, kind in (("task", Task), ("algorithm", Algorithm), ("clients", Clients)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "clients" and callable(value)):
                raise ConfigurationError(
                    f"Federation({name}=...) takes a foedus.{kind.__name__}, and was given something of type "
                    f"{type(value).__name__}"
                )

    def population(self) -> Clients:
        """The clients, made if they are given as a function.

        Raises:
            ConfigurationError: the function gives something else.
        """
        if isinstance(self.clients, Clients):
            return self.clients
        found: object = self.clients()
        if not isinstance(found, Clients):
            raise ConfigurationError(
                f"Federation(clients=...): the function must give foedus.Clients, and gave {type(found).__name__}"
            )
        return found

    def __repr__(self) -> str:
        cohort = self.cohort.label if isinstance(self.cohort, Sampler) else self.cohort
        clients = repr(self.clients) if isinstance(self.clients, Clients) else "clients made when asked"
        told = f"{self.task!r}, {self.algorithm.label}, {clients}, rounds={self.rounds}"
        return f"Federation({told}, cohort={cohort}, seed={self.seed})"


def run_federation(federation: Federation) -> Run:
    """``simulate`` with the fields of a federation."""
    return simulate(
        federation.task, federation.algorithm, federation.population(),
        rounds=federation.rounds, cohort=federation.cohort, seed=federation.seed,
        evaluation=federation.evaluation, settings=federation.settings,
    )  # fmt: skip
