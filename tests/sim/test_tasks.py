"""Kinds of problems, end to end: classification, regression, several inputs, sequences, in torch and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foedus as fd

pytestmark = pytest.mark.slow
RNG = np.random.default_rng(0)


def run(folder: Path, task: fd.Task, x: Any, y: Any, *, local: Any, rounds: int = 15) -> fd.Run:
    whole = fd.Examples.of(x, y)
    clients = fd.Clients.pooled(whole, np.array_split(np.arange(len(whole)), 6), central_test=whole)
    settings = fd.Settings(folder=folder, progress=False, executor=fd.executors.debug())
    return fd.simulate(task, fd.fedavg(local), clients, rounds=rounds, cohort=4, settings=settings)


def test_classification(tmp_path: Path) -> None:
    x = RNG.normal(size=(300, 2))
    task = fd.Task(
        lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)),
        F.cross_entropy,
        metrics=[fd.accuracy],
    )
    done = run(
        tmp_path,
        task,
        x,
        (x[:, 0] * x[:, 1] > 0).astype(int),
        local=fd.local_sgd(lr=0.5, epochs=5, batch_size=10),
    )
    assert done.final["accuracy"] > 0.9
    with torch.no_grad():
        hits = done.model(torch.tensor(x, dtype=torch.float32)).argmax(1).numpy() == (x[:, 0] * x[:, 1] > 0)
    assert hits.mean() == pytest.approx(done.final["accuracy"])


def test_two_classes_with_one_output(tmp_path: Path) -> None:
    x = RNG.normal(size=(200, 3))
    loss = lambda output, target: F.binary_cross_entropy_with_logits(output[:, 0], target.float())  # noqa: E731
    task = fd.Task(lambda: nn.Linear(3, 1), loss, metrics=[fd.accuracy, fd.auroc])
    done = run(tmp_path, task, x, (x.sum(1) > 0).astype(int), local=fd.local_sgd(lr=0.5, batch_size=10))
    assert done.final["accuracy"] > 0.95
    assert done.final["auroc"] > 0.99


def test_regression(tmp_path: Path) -> None:
    x = RNG.normal(size=(200, 3))
    y = x @ [1.0, -2.0, 0.5] + 3
    task = fd.Task(lambda: nn.Linear(3, 1), lambda o, t: (o[:, 0] - t) ** 2, metrics=[fd.rmse, fd.mae])
    done = run(tmp_path, task, x, y, local=fd.local_sgd(lr=0.05, batch_size=10))
    assert done.final["rmse"] < 0.05
    assert done.final["mae"] <= done.final["rmse"]
    assert done.final["loss"] == pytest.approx(done.final["rmse"] ** 2, rel=1e-4)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.words, self.out = nn.Linear(2, 8), nn.Embedding(5, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.numbers(x) + self.words(word)))


@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs(tmp_path: Path, kind: Any) -> None:
    x, word = RNG.normal(size=(300, 2)), RNG.integers(5, size=300)
    y = (x[:, 0] + word > 2).astype(int)
    inputs = (x, word) if kind is tuple else {"x": x, "word": word}
    task = fd.Task(Both, F.cross_entropy, metrics=[fd.accuracy])
    assert run(tmp_path, task, inputs, y, local=fd.local_sgd(lr=0.5, epochs=3, batch_size=10)).final["accuracy"] > 0.9


class Echo(nn.Module):
    """Says the symbol before last."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.memory, self.out = (
            nn.Embedding(4, 8),
            nn.LSTM(8, 16, batch_first=True),
            nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.memory(self.words(x))[0]).transpose(1, 2)


def test_sequences(tmp_path: Path) -> None:
    x = RNG.integers(4, size=(240, 8))
    y = np.concatenate([np.zeros((240, 1), int), x[:, :-1]], 1)
    task = fd.Task(Echo, F.cross_entropy, metrics=[fd.accuracy])
    done = run(tmp_path, task, x, y, local=fd.local_sgd(lr=1.0, epochs=5, batch_size=8, clip_norm=1.0), rounds=20)
    assert done.final["accuracy"] > 0.9


def test_an_optimiser_and_a_loop_of_ones_own(tmp_path: Path) -> None:
    x = RNG.normal(size=(200, 3))
    y = (x.sum(1) > 0).astype(int)
    task = fd.Task(lambda: nn.Linear(3, 2), F.cross_entropy, metrics=[fd.accuracy])
    adamw = fd.local_training(optimiser=lambda p: torch.optim.AdamW(p, lr=0.05), batch_size=10)

    def loop(module: nn.Module, examples: fd.Examples, context: Any) -> float:
        optimiser = torch.optim.SGD(module.parameters(), lr=context.lr, nesterov=True, momentum=0.9)
        for rows in context.batches:
            optimiser.zero_grad()
            inputs, target = torch.tensor(examples.inputs[0][rows]), torch.tensor(examples.targets[rows])
            loss = context.loss(module(inputs), target)
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    for i, local in enumerate([adamw, fd.local_training(loop=loop, lr=lambda r: 0.2 / r, epochs=2, batch_size=20)]):
        done = run(tmp_path / str(i), task, x, y, local=local)
        assert done.final["accuracy"] > 0.95
        assert done.metrics[-1]["train_loss"] < done.metrics[0]["train_loss"]


def test_buffers_are_averaged_or_stay_with_their_clients(tmp_path: Path) -> None:
    x = RNG.normal(size=(240, 3)) * [1, 5, 0.2] + 4
    y = (x[:, 0] > 4).astype(int)
    for average in (True, False):
        task = fd.Task(
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), F.cross_entropy, metrics=[fd.accuracy],
            average_buffers=average,
        )  # fmt: skip
        done = run(tmp_path / str(average), task, x, y, local=fd.local_sgd(lr=0.2, epochs=3, batch_size=10))
        mean = done.parameters["0.running_mean"]
        np.testing.assert_allclose(mean, [4, 4, 4] if average else [0, 0, 0], atol=0.5)


def test_frozen_parameters_stay_as_they_are_and_are_not_sent(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.above(torch.tanh(self.below(x)))

    x = RNG.normal(size=(120, 3))
    done = run(tmp_path, fd.Task(Half, F.cross_entropy), x, (x.sum(1) > 0).astype(int), local=fd.local_sgd(lr=0.1))
    assert set(done.parameters) == {"above.weight", "above.bias"}
    assert done.record.configuration["parameters"] == 10
    again = run(tmp_path / "again", fd.Task(Half, F.cross_entropy), x, (x.sum(1) > 0).astype(int),
                local=fd.local_sgd(lr=0.1), rounds=0)  # fmt: skip
    assert torch.equal(done.model.below.weight, again.model.below.weight)
