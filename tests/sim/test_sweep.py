"""A sweep runs every combination once, sorts them, and goes on where it stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.errors import ConfigurationError
from foedus.report.tables import plain
from foedus.sim.sweep import RESULTS

from ..report.records import clients, settings, task


def variant(lr: float, epochs: int = 1) -> fd.Federation:
    algorithm = fd.fedavg(fd.local_sgd(lr, epochs=epochs, batch_size=4))
    return fd.Federation(
        task=task(), algorithm=algorithm, clients=clients(), rounds=4, settings=settings(Path("unused"))
    )


def swept(folder: Path, grid: dict[str, object] | None = None, **more: object) -> fd.Sweep:
    return fd.sweep(variant, grid or {"lr": [0.001, 0.3], "epochs": [1, 2]}, folder=folder, progress=False, **more)


def test_every_combination_is_run_and_the_best_comes_first(tmp_path: Path) -> None:
    found = swept(tmp_path)
    assert len(found.results) == 4
    assert {(r.values["lr"], r.values["epochs"]) for r in found.results} == {
        (0.001, 1), (0.001, 2), (0.3, 1), (0.3, 2)
    }  # fmt: skip
    finals = [r.final for r in found.results]
    assert finals == sorted(finals, reverse=True)
    assert found.best.values["lr"] == 0.3
    for result in found.results:
        assert result.final == result.record.metrics[-1]["central"]["accuracy"]


def test_a_result_is_shown_in_a_line(tmp_path: Path) -> None:
    found = fd.sweep(variant, {"lr": [0.5]}, folder=tmp_path, progress=False)
    assert repr(found.best).startswith("Result(lr=0.5: 0.")
    assert len(repr(found.best)) < 200 + len(str(tmp_path))


def test_a_loss_is_sorted_upwards(tmp_path: Path) -> None:
    losses = [r.final for r in swept(tmp_path, metric="loss").results]
    assert losses == sorted(losses)


def test_a_figure_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"metric='acc'.*there is loss, accuracy"):
        swept(tmp_path, metric="acc")


def test_with_a_target_the_fewest_rounds_come_first(tmp_path: Path) -> None:
    found = swept(tmp_path, target=0.74)
    rounds = [math.inf if r.rounds is None else r.rounds for r in found.results]
    assert rounds == sorted(rounds)
    assert rounds[0] < math.inf
    assert "never" in plain(found.table())


def test_each_run_is_the_one_that_simulate_would_make(tmp_path: Path) -> None:
    found = swept(tmp_path / "sweep", {"lr": [0.3]})
    federation = variant(0.3)
    alone = fd.simulate(
        federation.task,
        federation.algorithm,
        federation.clients,
        rounds=4,
        settings=settings(tmp_path / "alone"),
    )
    assert found.results[0].record.metrics == alone.metrics
    assert not Path("unused").exists()


def test_a_larger_sweep_takes_the_runs_that_are_there(tmp_path: Path) -> None:
    swept(tmp_path, {"lr": [0.3]})
    (run,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    before = (run / "run.json").stat().st_mtime_ns
    found = swept(tmp_path, {"lr": [0.3, 0.1]})
    assert len(found.results) == 2
    assert (run / "run.json").stat().st_mtime_ns == before


def test_results_lie_in_the_folder_best_first(tmp_path: Path) -> None:
    found = swept(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert [(x["lr"], x["epochs"], x["accuracy"]) for x in lines] == [
        (r.values["lr"], r.values["epochs"], r.final) for r in found.results
    ]
    assert "★ best" in (tmp_path / "sweep.txt").read_text().splitlines()[1]


def test_values_may_be_algorithms_and_are_shown_by_their_label(tmp_path: Path) -> None:
    servers = [fd.sgd(), fd.adam(lr=0.1)]

    def by_server(server: object) -> fd.Federation:
        return fd.Federation(
            task=task(), algorithm=fd.fedavg(fd.local_sgd(0.1), server=server), clients=clients(), rounds=1,
            settings=settings(tmp_path),
        )  # fmt: skip

    found = fd.sweep(by_server, {"server": servers}, folder=tmp_path, progress=False)
    assert {r.name for r in found.results} == {f"server={s.label}" for s in servers}
    assert {r.values["server"] for r in found.results} == set(servers)


def test_numpy_values_are_numbers_and_arrays_are_lists(tmp_path: Path) -> None:
    found = swept(tmp_path, {"lr": np.array([0.1, 0.3], np.float64), "epochs": np.array([1])})
    assert all(type(r.values["epochs"]) is int for r in found.results)
    assert len(found.results) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_diverges_comes_last(tmp_path: Path) -> None:
    found = swept(tmp_path, {"lr": [1e38, 0.3]})
    assert found.best.values["lr"] == 0.3
    assert math.isnan(found.results[1].final)
    assert "diverged" in plain(found.table()).splitlines()[-1]
    lost = swept(tmp_path / "lost", {"lr": [1e38]})
    with pytest.raises(ConfigurationError, match="every combination diverged"):
        _ = lost.best


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({}, "the grid is empty"),
        ({"lr": []}, "'lr' must be a list of at least one value"),
        ({"lr": 0.1}, "'lr' must be a list"),
        ({"lr": "0.1"}, "'lr' must be a list"),
        ({"lr": [lambda r: 0.1, lambda r: 0.2]}, "both shown as lr=<lambda>"),
    ],
)
def test_grids_that_cannot_be(tmp_path: Path, grid: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        fd.sweep(variant, grid, folder=tmp_path, progress=False)


def test_a_function_that_gives_no_federation(tmp_path: Path) -> None:
    def wrong(lr: float) -> float:
        return lr

    with pytest.raises(ConfigurationError, match=r"sweep\(\) calls wrong\(lr\).* float"):
        fd.sweep(wrong, {"lr": [0.1]}, folder=tmp_path, progress=False)


@pytest.mark.slow
def test_the_figure_has_a_curve_per_combination(tmp_path: Path) -> None:
    figure = swept(tmp_path).plot()
    assert len(figure.axes[0].lines) == 4
    assert (tmp_path / "figures" / "sweep.png").exists()


def test_sweeps_without_a_folder_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {fd.sweep(variant, {"lr": [0.3]}, progress=False).folder for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.name.startswith("sweep-") for folder in folders)


def test_a_sweep_in_which_nothing_is_evaluated_is_refused_after_the_first_run(tmp_path: Path) -> None:
    def blind(lr: float) -> fd.Federation:
        federation = variant(lr)
        return replace(federation, clients=federation.clients.with_test(None))

    with pytest.raises(ConfigurationError, match=r"nothing was evaluated centrally.*with_test"):
        fd.sweep(blind, {"lr": [0.1, 0.2]}, folder=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["lr=0.1"]
