"""Export into TensorBoard and MLflow: what is theirs alone; tests/conformance has what all sinks share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import foedus as fd
from foedus.errors import MissingExtra
from foedus.record.export import MLflow, Sink, TensorBoard, export, figures

from ..report.records import clients, settings, task


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


def mlflow_runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(folder.resolve().as_uri())
    experiment = client.get_experiment_by_name("tests")
    return [(client, found) for found in client.search_runs([experiment.experiment_id])]


@pytest.mark.slow
def test_mlflow_has_parameters_metrics_by_round_and_the_model(tmp_path: Path) -> None:
    made = fd.simulate(task(), fd.fedavg(fd.local_sgd(0.3)), clients(), rounds=3, settings=settings(tmp_path / "first"))
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
