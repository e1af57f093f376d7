"""Mistakes of a user's own functions and figures: each is told where it happened, and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.errors import ConfigurationError, DataError, FoedusError
from foedus.report.comparison import Arm, verdict
from foedus.sim.world import Device

from ..report.records import clients, record, settings, task

LOCAL = fd.fedavg(fd.local_sgd(0.3, batch_size=4))


def fails(*_: Any) -> Any:
    raise ZeroDivisionError("mine")


def go(folder: Path, metric: fd.Metric | None = None, **more: Any) -> fd.Run:
    asked = {"rounds": 2, "settings": fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)} | more
    problem = task() if metric is None else fd.Task(task().model, task().loss, metrics=[metric])
    return fd.simulate(problem, asked.pop("algorithm", LOCAL), asked.pop("clients", clients()), **asked)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (fd.Metric("m", lambda o, y: np.ones(len(y) - 1)), r"'m' must give one value for each of .*an array"),
        (fd.Metric("m", lambda o, y: 0.5), r"whole=True.*gave one number"),
        (fd.Metric("m", lambda o, y: np.ones(3), whole=True), r"one number for the whole set.*\[3\]"),
    ],
)
def test_metrics_with_another_number_of_values(tmp_path: Path, metric: fd.Metric, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        go(tmp_path, metric)


@pytest.mark.parametrize("device", [lambda draw: None, lambda draw: (1.0, 1.0, 1.0), fails])
def test_worlds_without_devices(tmp_path: Path, device: Any) -> None:
    plan = fd.Settings(folder=tmp_path, world=fd.World(device=device), progress=False, executor=fd.executors.debug())
    with pytest.raises(ConfigurationError, match=r"World\(device=...\) (returns|failed for the client at position 0)"):
        go(tmp_path, settings=plan)
    assert Device(1.0, 1.0, 1.0).dropout == 0


def test_samplers_that_fail(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"the sampler uniform\(2\) failed in round 1: ZeroDivisionError: mine"
    ):
        go(tmp_path, cohort=fd.uniform(2)._replace(sample=fails))


def test_variants_that_fail(tmp_path: Path) -> None:
    def variant(lr: float) -> fd.Federation:
        return fails(lr)

    with pytest.raises(ConfigurationError, match=r"called variant\(lr=0.1\), which failed: ZeroDivisionError: mine"):
        fd.sweep(variant, {"lr": [0.1]}, folder=tmp_path, progress=False)


def test_targets_that_no_figure_reaches() -> None:
    with pytest.raises(ConfigurationError, match="is nan"):
        fd.Evaluation(stop_at={"accuracy": float("nan")})


def test_timings_are_told_by_the_name_they_were_made_by(tmp_path: Path) -> None:
    with pytest.raises(FoedusError, match="asynchronous"):
        go(tmp_path, algorithm=fd.fedavg(fd.local_sgd(0.3), timing=fd.asynchronous()))
    assert fd.semi_synchronous(60.0).label == "semi_synchronous(seconds=60.0, staleness=polynomial(0.5))"


def test_an_empty_test_set_is_refused(tmp_path: Path) -> None:
    test = clients().central_test
    assert test is not None
    with pytest.raises(DataError, match="the central test set is empty"):
        go(tmp_path, clients=clients().with_test(test.take(slice(0))))


def test_runs_and_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    fd.compare(task(), LOCAL, clients(), rounds=1, settings=settings(tmp_path / "both"))
    with pytest.raises(ConfigurationError, match="holds a comparison"):
        go(tmp_path / "both")
    go(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="holds a run"):
        fd.compare(task(), LOCAL, clients(), rounds=1, settings=settings(tmp_path / "run"))
    with pytest.raises(ConfigurationError, match=r"compare\(rounds=...\)"):
        fd.compare(task(), LOCAL, clients(), rounds=0, settings=settings(tmp_path / "none"))


def test_federation_that_does_harm_is_told_so() -> None:
    arms = [Arm("federated", [record([0.3])]), Arm("centralised", [record([0.6])]), Arm("alone", [record([0.5])])]
    told = verdict(arms)
    assert told.endswith("Federation does worse than training alone.")
    assert "of the way" not in told


def test_a_comparison_says_why_an_arm_ended(tmp_path: Path) -> None:
    x, y = np.full((6, 6), np.nan, np.float32), np.zeros(6, int)
    own = clients()
    broken = fd.Clients.of({"bad": (x[:, : own.train(0).inputs[0].shape[1]], y)}, central_test=own.central_test)
    told = repr(fd.compare(task(), LOCAL, broken, rounds=1, settings=settings(tmp_path)))
    assert "client 'bad'" in told
    assert "ended early: federated" in told
