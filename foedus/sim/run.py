"""What ``simulate`` returns: the finished run, its figures and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights
from foedus.record import Record


class Run:
    """A run, finished or stopped.

    Attributes:
        record: folder, configuration, one dict per round (``record.metrics``), timings.
        weights: the final flat weights.

    Example:
        >>> run.final["accuracy"]  # doctest: +SKIP
        0.97
    """

    def __init__(self, record: Record, weights: Weights, trainer: Trainer) -> None:
        self.record, self.weights, self._trainer = record, weights, trainer

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per round: round, cohort, train_loss, central figures, costs."""
        return self.record.metrics

    @property
    def final(self) -> dict[str, Any]:
        """The central figures of the last evaluated round."""
        return next((m["central"] for m in reversed(self.metrics) if "central" in m), {})

    @property
    def model(self) -> Any:
        """The trained model, of the user's own kind: a torch module (in eval mode, on the CPU), or a tree."""
        return self._trainer.model(self.weights)

    @property
    def parameters(self) -> dict[str, NDArray[Any]]:
        """The trained parameters and buffers by name, as numpy arrays."""
        trainer = self._trainer
        named = trainer.layout.unflatten(self.weights.vector) | trainer.buffer_layout.unflatten(self.weights.buffers)
        return {name: np.array(array) for name, array in named.items()}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw loss and metrics over rounds; saves into the run folder's ``figures/`` and returns the figure."""
        from foedus.report.curves import plot_run

        return plot_run(self.record, path)

    def rounds_to(self, metric: str, target: float) -> float | None:
        """Rounds until a central metric reached a target: the curve made monotone by its best value so far
        and interpolated (McMahan et al. 2017, section 3); ``None`` if it never did.

        Raises:
            ConfigurationError: the metric was never evaluated.
        """
        from foedus.report.curves import better, rounds_to

        return rounds_to(self.metrics, metric, target, better=better(self.record, metric))

    def __repr__(self) -> str:
        final = ", ".join(f"{k} {v:.4g}" for k, v in self.final.items() if v is not None)
        return f"Run({len(self.metrics)} rounds, {final or 'not evaluated'}, in {self.folder})"
