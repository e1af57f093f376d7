"""A run read back from its folder is the run that simulate returned; what is not there is said to be not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foedus as fd
from foedus.core.linear import logistic
from foedus.errors import CheckpointError, ConfigurationError
from foedus.record.folder import CONFIGURATION, METRICS, MODEL

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(int)
CLIENTS = fd.Clients.of({f"c{i}": (X[i::3], Y[i::3]) for i in range(3)}, central_test=(X, Y))


def net() -> torch.nn.Module:
    """With a frozen part and with buffers."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    layers[0].requires_grad_(False)
    return layers


TORCH = fd.Task(net, torch.nn.functional.cross_entropy, metrics=[fd.accuracy])
NUMPY = fd.Task(logistic(4, 2), metrics=[fd.accuracy])
TASKS = {"torch": TORCH, "numpy": NUMPY}


def simulated(folder: Path, task: fd.Task = NUMPY, rounds: int = 3) -> fd.Run:
    return fd.simulate(
        task, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=5)), CLIENTS, rounds=rounds, seed=7,
        evaluation=fd.Evaluation(clients=True),
        settings=fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False),
    )  # fmt: skip


def same_arrays(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() and a[n].shape == b[n].shape for n in a)


@pytest.mark.parametrize("backend", TASKS)
def test_what_is_read_is_what_was_returned(tmp_path: Path, backend: str) -> None:
    done = simulated(tmp_path / "run", TASKS[backend])
    shutil.move(tmp_path / "run", tmp_path / "moved")  # nothing in it knows where it lies
    for found in (fd.read_run(tmp_path / "moved"), fd.read_run(str(tmp_path / "moved"), TASKS[backend])):
        assert found.folder == tmp_path / "moved"
        for part in ("configuration", "metrics", "timings", "final"):
            assert getattr(found, part) == getattr(done, part)
        assert found.rounds_to("accuracy", 0.1) == done.rounds_to("accuracy", 0.1)
        assert len(found.clients) == 9
        assert same_arrays(found.parameters, done.parameters)
        assert [row["client"] for row in found.record.costs] == ["c0", "c1", "c2"]
    assert (found.configuration["status"], found.configuration["rounds"]) == ("finished", 3)
    assert repr(found) == repr(done).replace("/run)", "/moved)")


def test_the_model_comes_back_with_its_task(tmp_path: Path) -> None:
    done = simulated(tmp_path, NUMPY)
    found = fd.read_run(tmp_path, NUMPY)
    assert same_arrays(found.model, done.model)
    assert [a.tobytes() for a in found.weights] == [a.tobytes() for a in done.weights]


def test_a_module_comes_back_ready_to_predict(tmp_path: Path) -> None:
    """Frozen parameters, which are not in the folder, are made anew from the run's own seed."""
    done, found = simulated(tmp_path, TORCH).model, fd.read_run(tmp_path, TORCH).model
    assert not found.training
    assert torch.equal(done(torch.from_numpy(X)), found(torch.from_numpy(X)))
    assert "0.weight" not in fd.read_run(tmp_path).parameters


def test_without_its_task_there_is_no_model_and_the_error_says_what_there_is(tmp_path: Path) -> None:
    simulated(tmp_path)
    for part in ("model", "weights"):
        with pytest.raises(ConfigurationError, match=r"read_run\(.*, task\); the arrays by name are in run.parameters"):
            getattr(fd.read_run(tmp_path), part)


def test_the_task_of_another_model_is_refused(tmp_path: Path) -> None:
    simulated(tmp_path)
    with pytest.raises(ConfigurationError, match="is not a run of this task's model"):
        fd.read_run(tmp_path, fd.Task(logistic(5, 2)))
    with pytest.raises(ConfigurationError, match=r"is not a run of this task's model.*lack 1\.weight"):
        fd.read_run(tmp_path, TORCH)


def test_a_run_that_was_cut_short_has_figures_and_no_model(tmp_path: Path) -> None:
    simulated(tmp_path)
    (tmp_path / MODEL).unlink()
    found = fd.read_run(tmp_path)
    assert len(found.metrics) == 3
    with pytest.raises(ConfigurationError, match=r"the run has not ended.*goes on to its end"):
        _ = found.parameters


def test_the_model_of_earlier_rounds_is_not_taken_for_the_last(tmp_path: Path) -> None:
    simulated(tmp_path, rounds=2)
    old = (tmp_path / MODEL).read_bytes()
    simulated(tmp_path, rounds=4)
    (tmp_path / MODEL).write_bytes(old)  # as if it had been killed on its way from 2 to 4
    with pytest.raises(ConfigurationError, match="the model of round 2, and the run has gone on to round 4"):
        _ = fd.read_run(tmp_path).parameters


def test_no_rounds_have_the_first_weights(tmp_path: Path) -> None:
    simulated(tmp_path, rounds=0)
    found = fd.read_run(tmp_path)
    assert (found.metrics, found.final, found.clients) == ([], {}, [])
    assert not found.parameters["weight"].any()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (CONFIGURATION, b"{", r"run\.json is damaged"),
        (METRICS, b"7\n", r"metrics\.jsonl is damaged in line 1"),
        (MODEL, b"\x00" * 20, r"model\.safetensors is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    simulated(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        _ = fd.read_run(tmp_path).parameters


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no run folder"):
        fd.read_run(tmp_path / "nothing")


@pytest.mark.slow  # loads matplotlib
def test_it_draws_itself_into_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    simulated(tmp_path)
    fd.read_run(tmp_path).plot()
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 1000
