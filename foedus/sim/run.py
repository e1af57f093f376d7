"""A run as a value, its figures and its model: what ``simulate`` returns, and what its folder gives back later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights, open_trainer
from foedus.core.population import ClientId
from foedus.core.task import Task
from foedus.errors import ConfigurationError
from foedus.record import Record
from foedus.record.folder import read
from foedus.rounds import start


def read_run(path: str | Path, task: Task | None = None) -> Run:
    """Open a run folder, of yesterday or of another machine, finished or still going on.

    A folder holds figures and named arrays, and no code: the model itself comes back where its task is given.

    Args:
        path: the run folder.
        task: the task it was run with, for ``run.model`` and ``run.weights``; everything else needs none.

    Returns:
        The same as :func:`foedus.simulate` returned.

    Raises:
        ConfigurationError: there is no run in the folder, or the task's model has other parameters.
        CheckpointError: a file in it is damaged; says which, and where.

    Example:
        >>> run = read_run("runs/20260101-120000")  # doctest: +SKIP
        >>> run.final, run.configuration["algorithm"], run.parameters["0.weight"].shape  # doctest: +SKIP
        ({'loss': 0.1, 'accuracy': 0.97}, 'fedavg(local_sgd(lr=0.1))', (16, 64))
    """
    record = read(path)
    if task is None:
        return Run(record)
    parameters = record.parameters
    trainer = open_trainer(task, seed=record.configuration["seed"])  # of what is frozen, and so not in the folder
    try:
        return Run(record, start.weights(parameters, trainer), trainer)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} is not a run of this task's model: {error}") from error


class Run:
    """A run, finished or not.

    Attributes:
        record: what the run folder tells, see :class:`foedus.record.Record`.

    Example:
        >>> run.final["accuracy"]  # doctest: +SKIP
        0.97
    """

    def __init__(self, record: Record, weights: Weights | None = None, trainer: Trainer | None = None) -> None:
        self.record, self._weights, self._trainer = record, weights, trainer

    # --- figures

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.record.folder

    @property
    def configuration(self) -> dict[str, Any]:
        """What was run, and with which versions; ``configuration["status"]`` is ``finished`` or ``running``."""
        return self.record.configuration

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per round: round, cohort, train_loss, central figures, costs."""
        return self.record.metrics

    @property
    def timings(self) -> list[dict[str, Any]]:
        """One dict per round: seconds by phase."""
        return self.record.timings

    @property
    def final(self) -> dict[str, Any]:
        """The central figures of the last evaluated round."""
        return self.record.final

    @property
    def clients(self) -> list[dict[str, Any]]:
        """One dict per evaluated round and client, with ``Evaluation(clients=True)``: round, client, number of
        examples, loss and metrics. ``pandas.DataFrame(run.clients)`` is a table of them."""
        return self.record.clients

    @property
    def final_clients(self) -> dict[ClientId, dict[str, Any]]:
        """Every client's own figures in the last evaluated round, by the client's id."""
        rows = self.clients
        last = [row for row in rows if row["round"] == rows[-1]["round"]]
        return {row["client"]: {k: v for k, v in row.items() if k not in ("round", "client")} for row in last}

    def rounds_to(self, metric: str, target: float) -> float | None:
        """Rounds until a central metric reached a target: the curve made monotone by its best value so far
        and interpolated (McMahan et al. 2017, section 3); ``None`` if it never did.

        Raises:
            ConfigurationError: the metric was never evaluated.
        """
        from foedus.report.curves import better, rounds_to

        return rounds_to(self.metrics, metric, target, better=better(self.record, metric))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw loss and metrics over rounds; saves into the run folder's ``figures/`` and returns the figure."""
        from foedus.report.curves import plot_run

        return plot_run(self.record, path)

    # --- the model

    @property
    def parameters(self) -> dict[str, NDArray[Any]]:
        """The trained parameters and buffers by name, as numpy arrays.

        Raises:
            ConfigurationError: the run was read from a folder in which it has not ended.
        """
        if self._weights is None or self._trainer is None:
            return self.record.parameters
        trainer, weights = self._trainer, self._weights
        named = trainer.layout.unflatten(weights.vector) | trainer.buffer_layout.unflatten(weights.buffers)
        return {name: np.array(array) for name, array in named.items()}

    @property
    def weights(self) -> Weights:
        """The final flat weights: ``vector`` [parameter] and ``buffers`` [buffer]."""
        return self._trained()[0]

    @property
    def model(self) -> Any:
        """The trained model, of the user's own kind: a torch module (in eval mode, on the CPU), or a tree."""
        weights, trainer = self._trained()
        return trainer.model(weights)

    def _trained(self) -> tuple[Weights, Trainer]:
        if self._weights is None or self._trainer is None:
            raise ConfigurationError(
                f"{self.folder} holds the model's arrays, but not its code. Give the task that it was run with, "
                f"foedus.read_run({str(self.folder)!r}, task); the arrays by name are in run.parameters"
            )
        return self._weights, self._trainer

    def __repr__(self) -> str:
        final = ", ".join(f"{k} {v:.4g}" for k, v in self.final.items() if v is not None)
        return f"Run({len(self.metrics)} rounds, {final or 'not evaluated'}, in {self.folder})"
