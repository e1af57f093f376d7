"""Does it work? Federated, centralised and local-only training of the same task on the same data, side by side.

    federated     as :func:`foedus.simulate` would run it
    centralised   all clients' examples together as one client: what could be had if data were allowed to move
    alone         some clients by themselves, with the model of nobody else: what each could have without

All begin with the same weights, train with the same local settings, and are evaluated on the same test set.
The centralised run makes as many passes over the data as the federation does. A client alone trains for as many
rounds as the federation has, also where it would have been drawn into few of them, so that it is not the lack
of training that sets it back. Both go without the server's optimiser and without a penalty towards the received
model, which mean nothing where nobody is averaged.

Every run has a folder of its own inside the comparison's, so that an interrupted comparison goes on.

Not here: figures and tables (``foedus.report.comparison``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foedus.core.checks import check_whole
from foedus.core.client import Client, LocalSGD
from foedus.core.compose import Algorithm, fedavg
from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.core.random import generator
from foedus.core.select import Sampler
from foedus.core.task import Task
from foedus.errors import ConfigurationError, NothingToAggregate
from foedus.record import Record, files
from foedus.record.folder import CONFIGURATION, new_folder, read
from foedus.report.comparison import Arm, comparison_table, plot_comparison, verdict
from foedus.report.tables import plain
from foedus.rounds.evaluate import Evaluation
from foedus.sim.auto import Auto
from foedus.sim.engine import simulate
from foedus.sim.executors import by_name
from foedus.sim.progress import announce, steps
from foedus.sim.settings import Settings

ALL = "all"  # the one client of the centralised run


@dataclass(frozen=True, kw_only=True)
class Arms:
    """What a comparison is made of, beside the federation.

    Attributes:
        alone: how many clients are trained alone, drawn at random from those that have data.
        every: all are evaluated after each so many rounds (and after the last).

    Example:
        >>> Arms(alone=20, every=5)
        Arms(alone=20, every=5)
    """

    alone: int = 8
    every: int = 1

    def __post_init__(self) -> None:
        check_whole("Arms(alone=...)", self.alone)
        check_whole("Arms(every=...)", self.every)


class Comparison(NamedTuple):
    """Federated, centralised and local-only training on the same data.

    Attributes:
        folder: where everything is.
        federated, centralised: their records.
        alone: client's id → record of its own training.

    Example:
        >>> found = compare(task, algorithm, clients, rounds=20)  # doctest: +SKIP
        >>> found.plot("comparison.png")  # doctest: +SKIP
    """

    folder: Path
    federated: Record
    centralised: Record
    alone: dict[Any, Record]

    @property
    def arms(self) -> list[Arm]:
        """The three, as the report draws them."""
        return [
            Arm("federated", [self.federated]),
            Arm("centralised", [self.centralised]),
            Arm("alone", list(self.alone.values())),
        ]

    def table(self) -> Any:
        """A rich table: final and best figures, their spread over the clients alone, and traffic."""
        return comparison_table(self.arms)

    def plot(self, path: str | Path | None = None) -> Any:
        """Every metric over rounds; saved as ``figures/comparison.png`` in the folder unless a path is given."""
        return plot_comparison(self.arms, Path(path) if path else self.folder / "figures" / "comparison.png")

    def __repr__(self) -> str:
        return f"Comparison({verdict(self.arms)} In {self.folder})"


def compare(
    task: Task,
    algorithm: Algorithm,
    clients: Clients,
    *,
    rounds: int,
    cohort: int | Sampler | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    arms: Arms | None = None,
) -> Comparison:
    """Train federated, centralised and local-only, on the same data; evaluate all on the same test set.

    Args:
        task, algorithm, clients, rounds, cohort, seed: as for :func:`foedus.simulate`.
        settings: likewise. ``folder`` is the comparison's, with a run folder in it for every run; a simulated
            world applies to the federated run only.
        arms: how many clients train alone, and how often all are evaluated.

    Returns:
        ``.table()``, ``.plot()``, and the records of all runs.

    Raises:
        ConfigurationError: there is nothing to evaluate on: neither a central test set nor clients' own.

    Example:
        >>> compare(task, fedavg(local_sgd(lr=0.1)), clients, rounds=20).table()  # doctest: +SKIP
    """
    check_whole("compare(rounds=...)", rounds)
    arms, settings = arms or Arms(), settings or Settings()
    _check_folder(settings)
    tested = clients.with_test(_test(clients))
    study = _Study(
        task,
        seed,
        replace(settings, folder=settings.folder or new_folder("compare-"), local_curves=None),
        Evaluation(every=arms.every),
    )
    announce(settings.progress, f"Federated: {len(clients):,} clients")
    federated = study.run("federated", algorithm, tested, rounds=rounds, cohort=cohort)
    pool = tested.pooled_examples()
    together = Clients.pooled(pool, [np.arange(len(pool))], [ALL], central_test=tested.central_test)
    announce(settings.progress, f"Centralised: the {len(pool):,} examples of all clients together")
    centre = fedavg(centralised_client(algorithm.client, federated, examples=len(pool)))
    centralised = study.alone().run("centralised", centre, together, rounds=rounds)
    alone = dict(study.each_alone(algorithm, tested, rounds=rounds, count=arms.alone))
    found = Comparison(study.folder, federated, centralised, alone)
    files.replace(study.folder / "comparison.txt", (plain(found.table()) + "\n").encode())
    return found


class _Study(NamedTuple):
    """What all runs of a comparison share."""

    task: Task
    seed: int
    settings: Settings
    evaluation: Evaluation

    @property
    def folder(self) -> Path:
        return Path(self.settings.folder or ".")

    def run(
        self,
        name: str,
        algorithm: Algorithm,
        clients: Clients,
        *,
        rounds: int,
        cohort: int | Sampler | None = None,
    ) -> Record:
        settings = replace(self.settings, folder=self.folder / name)
        try:
            return simulate(
                self.task, algorithm, clients, rounds=rounds, cohort=cohort, seed=self.seed,
                evaluation=self.evaluation, settings=settings,
            ).record  # fmt: skip
        except NothingToAggregate as error:  # one that diverges is a result as well
            announce(self.settings.progress, f"{name} ended early: {error}")
            record = read(self.folder / name)
            return record._replace(configuration=record.configuration | {"error": str(error)})

    def alone(self) -> _Study:
        """The same, where nobody communicates."""
        return self._replace(settings=replace(self.settings, world=None))

    def each_alone(
        self, algorithm: Algorithm, clients: Clients, *, rounds: int, count: int
    ) -> Iterator[tuple[Any, Record]]:
        chosen = some_with_data(clients, count, self.seed)
        announce(self.settings.progress, f"Alone: {len(chosen)} of {len(clients):,} clients, each by itself")
        study, own = self.alone(), fedavg(without_penalty(algorithm.client))
        study = study._replace(settings=replace(study.settings, progress=False))
        with steps(self.settings.progress, len(chosen), "clients") as done:
            for position in chosen:
                client = clients.ids[position]
                record = study.run(f"alone/{position}", own, clients.subset([position]), rounds=rounds)
                if isinstance(study.settings.executor, Auto):  # what it measured for the first is right for all
                    chose = by_name(record.configuration["executor"])
                    study = study._replace(settings=replace(study.settings, executor=chose))
                done(f"client {client!r} alone: {_told(record)}")
                yield client, record


def centralised_client(client: Client, federated: Record, *, examples: int) -> Client:
    """Local training of one client that has all data, with as many passes in a round as the federated run made.

    Args:
        client: the federated run's local training.
        federated: its record.
        examples: how many there are in all.
    """
    own = without_penalty(client)
    asked = [line["examples"] for line in federated.metrics]
    if not asked or (own.epochs is not None and all(n == examples for n in asked)):
        return own
    batch = examples if own.batch_size is None else min(own.batch_size, examples)
    taken = _stepped(own, federated) if own.epochs is None else sum(asked) * own.epochs
    return replace(own, epochs=None, steps=max(1, round(taken / len(asked) / batch)))


def _stepped(client: Client, federated: Record) -> float:
    """Examples that clients went through in steps: batches are as large as asked, or as the client has data."""
    total = 0.0
    for line in federated.metrics:
        mean = line["examples"] / max(1, line["trained"])
        total += line["steps"] * (mean if client.batch_size is None else min(client.batch_size, mean))
    return total


def without_penalty(client: Client) -> Client:
    """The same local training without a term towards the received model, which a client alone does not have."""
    return replace(client, penalty=None) if isinstance(client, LocalSGD) else client


def some_with_data(clients: Clients, count: int, seed: int) -> list[int]:
    """Positions of at most ``count`` clients that have training examples, drawn at random, in order."""
    found: list[int] = []
    for position in generator(seed, "alone").permutation(len(clients)).tolist():
        if len(clients.train(position)):
            found.append(position)
        if len(found) == count:
            break
    return sorted(found)


def _check_folder(settings: Settings) -> None:
    """Refuse a folder that holds a run itself: a comparison's has one for every run."""
    if settings.folder is not None and (Path(settings.folder) / CONFIGURATION).exists():
        raise ConfigurationError(
            f"{settings.folder} holds a run, and a comparison makes a folder for each of its own. Choose another folder"
        )


def _test(clients: Clients) -> Examples:
    """The central test set, else all clients' own test examples together."""
    if clients.central_test is not None:
        return clients.central_test
    own = [part for i in range(len(clients)) if (part := clients.test(i)) is not None and len(part)]
    if not own:
        raise ConfigurationError(
            "compare() needs one test set for all: give the clients a central one, clients.with_test((x, y)), or "
            "parts of their own, clients.split(test=0.2)"
        )
    return Examples.concat(own)


def _told(record: Record) -> str:
    final: dict[str, Any] = next((line["central"] for line in reversed(record.metrics) if "central" in line), {})
    return ", ".join(f"{name} {value:.4g}" for name, value in final.items() if value is not None)
