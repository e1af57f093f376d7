"""Figures of runs in other tools: one small interface, and the two tools that most people have.

A :class:`Sink` is a place (a TensorBoard folder, an MLflow server); opened for a run folder it is a
:class:`Stream` that takes the figures of one round after another. The same sinks take a finished run
(:func:`export`) and one that is going on (``Settings(sinks=[...])``).

    TensorBoard(folder)     event files, one sub-folder per run; ``tensorboard --logdir folder``
    MLflow(uri)             parameters, metrics by round, and the model as an artifact

Nothing is sent anywhere but to the place named; MLflow's own telemetry is switched off.

Not here: what the run folder holds (``folder.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from foedus.errors import ConfigurationError, MissingExtra
from foedus.record.folder import MODEL, Record


class Stream(Protocol):
    """One run on its way into a sink."""

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:
        """The figures of a round, by name with slashes; ``at``: seconds since 1970. A round may be written again,
        with the same figures, where a run was resumed."""

    def close(self) -> None:
        """All is written, and is in the sink when this returns."""


class Sink(Protocol):
    """A place that keeps figures of runs.

    A new one is a class of two methods, and a Stream of two; printing every figure, for instance:

    >>> class Printed:
    ...     def open(self, folder, configuration): return self
    ...     def write(self, round, figures, *, at): print(round, figures)
    ...     def close(self): print("done")
    >>> export(Record(Path("r"), {}, [{"round": 1, "train_loss": 0.5}], []), Printed())
    1 {'train_loss': 0.5}
    done

    Laws, held by the conformance suite: what is read back is what was written, round by round; a run that is
    exported twice, or goes on in its folder, is there once.
    """

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Stream:
        """Begin with a run, or go on with it. Raises MissingExtra if the tool is not installed."""


def export(record: Record, sink: Sink) -> None:
    """Write all rounds of a run, finished or not, into a sink.

    Args:
        record: ``run.record``, or ``foedus.read_run(folder).record``.
        sink: where to.
    """
    timings = {line["round"]: line for line in record.timings}
    stream = sink.open(record.folder, record.configuration)
    try:
        for line in record.metrics:
            timing = timings.get(line["round"], {})
            stream.write(line["round"], figures(line, timing), at=_moment(timing.get("at")))
    finally:
        stream.close()


def figures(line: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl``, and of its line of ``timings.jsonl``, by name with slashes.

    Example:
        >>> figures({"round": 3, "central": {"loss": 0.5, "auroc": None}}, {"round": 3, "seconds": 2})
        {'central/loss': 0.5, 'timing/seconds': 2.0}
    """
    found = dict(_numbers({k: v for k, v in line.items() if k != "round"}, ""))
    return found | dict(_numbers({k: v for k, v in (timing or {}).items() if k != "round"}, "timing/"))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _moment(stamp: str | None) -> float:
    return time.time() if stamp is None else datetime.fromisoformat(stamp).timestamp()


# --- TensorBoard --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorBoard:
    """Event files for TensorBoard, in a sub-folder named after the run folder.

    Args:
        folder: what ``tensorboard --logdir`` is given.

    Example:
        >>> export(run.record, TensorBoard("logs"))  # doctest: +SKIP
    """

    folder: str | Path = "tensorboard"

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Stream:  # noqa: ARG002
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "tensorboard", "tensorboard", "Export to TensorBoard") from error
        return _Events(Writer(str(Path(self.folder) / folder.resolve().name)))


class _Events:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:  # noqa: ARG002
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


# --- MLflow -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLflow:
    """A run in MLflow: configuration as parameters, figures as metrics by round, the model as an artifact.

    A run folder is one MLflow run, however often it is exported or resumed: rounds that are there already are
    left out.

    Args:
        uri: a server (``"http://..."``) or a folder; with the package mlflow, of which the extra holds a small
            part, also a database (``"sqlite:///mlflow.db"``). By default what MLFLOW_TRACKING_URI names, else
            the folder ``mlruns``.
        experiment: the experiment's name.

    Example:
        >>> export(run.record, MLflow("http://localhost:5000", experiment="digits"))  # doctest: +SKIP
    """

    uri: str | Path | None = None
    experiment: str = "foedus"

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Stream:
        client = _mlflow(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        place = str(folder.resolve())
        same = client.search_runs([experiment], f"tags.`foedus.folder` = '{place}'", max_results=1)
        if same:
            return _MLflowRun(client, same[0].info.run_id, folder)
        run = client.create_run(experiment, run_name=folder.resolve().name, tags={"foedus.folder": place})
        for name, value in _parameters(configuration, ""):
            client.log_param(run.info.run_id, name, value)
        return _MLflowRun(client, run.info.run_id, folder)


class _MLflowRun:
    def __init__(self, client: Any, run: str, folder: Path) -> None:
        self._client, self._run, self._folder = client, run, folder
        self._done = {point.step for point in client.get_metric_history(run, "cohort")}

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:
        from mlflow.entities import Metric

        if round in self._done:
            return
        moment = int(at * 1000)
        points = [Metric(name, value, moment, round) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=points)

    def close(self) -> None:
        model = self._folder / MODEL
        if model.exists():
            self._client.log_artifact(self._run, str(model))
        self._client.set_terminated(self._run)


def _mlflow(uri: str | Path | None) -> Any:
    # Both are read when MLflow is imported or a store is opened; what the user has set stays.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "mlflow", "mlflow", "Export to MLflow") from error
    place = str(uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns")
    try:
        return MlflowClient(tracking_uri=place if "://" in place else Path(place).resolve().as_uri())
    except MlflowException as error:
        told = str(error).strip().split(". See")[0]
        raise ConfigurationError(
            f"MLflow cannot keep runs in {place!r}: {told}. A folder or a server always will do; a database needs the "
            "whole of MLflow: pip install mlflow"
        ) from error


def _parameters(configuration: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)[:500]  # what every MLflow store takes
