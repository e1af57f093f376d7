"""Export into TensorBoard and MLflow, with both packages, from a finished run and from one going on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import foedus as fd
from foedus.errors import MissingExtra
from foedus.record.export import MLflow, Sink, TensorBoard, export, figures
from foedus.record.folder import read

from ..report.records import clients, record, settings, task


def run(folder: Path, rounds: int = 3, sinks: tuple[Sink, ...] = ()) -> fd.Run:
    return fd.simulate(
        task(), fd.fedavg(fd.local_sgd(0.3)), clients(), rounds=rounds, settings=settings(folder, sinks=sinks)
    )


def test_figures_are_flat_numbers() -> None:
    line = {
        "round": 2,
        "trained": 3,
        "train_loss": None,
        "refused": [1],
        "central": {"accuracy": 0.5},
        "ok": True,
    }
    assert figures(line, {"round": 2, "train": 0.25, "at": "noon"}) == {
        "trained": 3.0, "central/accuracy": 0.5, "timing/train": 0.25,
    }  # fmt: skip


def test_a_sink_is_closed_even_if_it_fails() -> None:
    class Failing:
        closed = False

        def open(self, folder: Path, configuration: Any) -> Failing:
            return self

        def write(self, round: int, figures: Any, *, at: float) -> None:
            raise OSError("no space")

        def close(self) -> None:
            self.closed = True

    sink = Failing()
    with pytest.raises(OSError, match="no space"):
        export(record([0.5]), sink)
    assert sink.closed


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads: tag → step → value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)}
        for tag in found.Tags()["tensors"]
    }


@pytest.mark.slow
def test_tensorboard_reads_what_was_exported(tmp_path: Path) -> None:
    made = run(tmp_path / "first")
    export(read(made.folder), TensorBoard(tmp_path / "logs"))
    found = scalars(tmp_path / "logs" / "first")
    assert set(found["central/accuracy"]) == {1, 2, 3}
    for line in made.metrics:
        assert found["central/accuracy"][line["round"]] == pytest.approx(
            line["central"]["accuracy"], rel=1e-6
        )
    assert set(found) >= {"train_loss", "bytes_up", "bytes_down", "timing/seconds", "timing/train"}


@pytest.mark.slow
def test_tensorboard_can_watch_a_run(tmp_path: Path) -> None:
    made = run(tmp_path / "live", sinks=(TensorBoard(tmp_path / "logs"),))
    found = scalars(tmp_path / "logs" / "live")
    for line in made.metrics:
        assert found["train_loss"][line["round"]] == pytest.approx(line["train_loss"], rel=1e-6)


def mlflow_runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(folder.resolve().as_uri())
    experiment = client.get_experiment_by_name("tests")
    return [(client, found) for found in client.search_runs([experiment.experiment_id])]


@pytest.mark.slow
def test_mlflow_has_parameters_metrics_by_round_and_the_model(tmp_path: Path) -> None:
    made = run(tmp_path / "first")
    export(made.record, MLflow(tmp_path / "mlruns", "tests"))
    ((client, found),) = mlflow_runs(tmp_path / "mlruns")
    assert found.info.run_name == "first"
    assert found.info.status == "FINISHED"
    assert found.data.params["algorithm"] == made.record.configuration["algorithm"]
    points = client.get_metric_history(found.info.run_id, "central/accuracy")
    assert [(p.step, p.value) for p in points] == [
        (line["round"], pytest.approx(line["central"]["accuracy"])) for line in made.metrics
    ]
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["model.safetensors"]


@pytest.mark.slow
def test_mlflow_takes_a_resumed_run_up_again_and_counts_no_round_twice(tmp_path: Path) -> None:
    sink = MLflow(tmp_path / "mlruns", "tests")
    run(tmp_path / "live", rounds=2, sinks=(sink,))
    longer = run(tmp_path / "live", rounds=4, sinks=(sink,))
    export(longer.record, sink)
    ((client, found),) = mlflow_runs(tmp_path / "mlruns")
    points = client.get_metric_history(found.info.run_id, "train_loss")
    assert [p.step for p in points] == [1, 2, 3, 4]


@pytest.mark.slow
def test_mlflow_sends_nothing_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    MLflow(tmp_path / "mlruns", "tests").open(tmp_path, {})
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


@pytest.mark.parametrize(("package", "sink"), [("tensorboard", TensorBoard()), ("mlflow", MLflow())])
def test_a_missing_package_is_named(package: str, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'foedus\[{package}\]'"):
        sink.open(Path("run"), {})
