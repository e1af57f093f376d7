"""The vectorised executor: layers and faults beyond those of the conformance suite, recordings, threads.

That it agrees with the plain executor over the usual layers is held there (tests/conformance/test_executors.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foedus.core.batches
from foedus.backends import Weights, open_trainer, torch_record, torch_stacked
from foedus.core.aggregate import mean
from foedus.core.client import LocalSGD, local_sgd, local_training, proximal
from foedus.core.compose import Algorithm, fedavg
from foedus.core.linear import linear, logistic
from foedus.core.population import Clients, Examples
from foedus.core.task import NumpyModel, Task
from foedus.core.values import SERVER, Context
from foedus.errors import ConfigurationError, FoedusError, TrainingError, UnsupportedOperator
from foedus.rounds.debug import Debug
from foedus.rounds.work import BUFFERS, Job, Orders
from foedus.sim.vectorised import Vectorised

from ..conformance.executions import assert_alike, net, ran

SIZES = [9, 1, 0, 23, 9, 12, 2, 20]  # ragged, with an empty client and one of one example
WORDS, CLASSES = 11, 5


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# --- models


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(WORDS, 6), kind(6, 7, batch_first=True, **settings)
        width = settings.get("proj_size") or 7
        self.scores = nn.Linear(width * (2 if self.layers.bidirectional else 1), WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.layers(self.words(x))[0]).transpose(1, 2)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(WORDS, 6), nn.LSTMCell(6, 7), nn.GRUCell(7, 5)
        self.scores = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.words(x)
        state, g = (words.new_zeros(len(x), 7), words.new_zeros(len(x), 7)), words.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = self.first(words[:, t], state)
            g = self.second(state[0], g)
        return self.scores(g)


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.norm, self.scores = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.words(x)
        return self.scores(self.norm(words + self.attention(words, words, words, need_weights=False)[0]).mean(1))


class Averaging(nn.Linear):
    """Keeps a running mean of its inputs, by putting a new tensor in place of the old."""

    def __init__(self) -> None:
        super().__init__(64, CLASSES)
        self.register_buffer("centre", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.centre = 0.9 * self.centre + 0.1 * x.detach().flatten(1).mean(0)
        return super().forward(x.flatten(1) - self.centre)


SEQUENCES = {
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3),
    "two-way lstm, projected": lambda: Recurrent(nn.LSTM, bidirectional=True, proj_size=4, num_layers=2),
    "gru": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "rnn": lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False),
}
TOKENS = {"cells": Cells, "attention, dropout": lambda: Attention(0.25)}
IMAGES = {
    "mlp": lambda: net(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "cnn": lambda: net(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, CLASSES)),
    "batch norm": lambda: net(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)),
    "own buffer": Averaging,
}
MODELS = {**SEQUENCES, **TOKENS, **IMAGES}
FURTHER = ["two-way lstm, projected", "gru", "rnn", "cells", "attention, dropout", "own buffer"]


def population(name: str, dtype: str = "float64", sizes: list[int] = SIZES) -> Clients:
    rng, count = np.random.default_rng(4), sum(sizes)
    if name in IMAGES:
        x = rng.normal(size=(count, 1, 8, 8)).astype(dtype)
    else:
        x = rng.integers(WORDS, size=(count, 4))
    y = rng.integers(WORDS, size=(count, 4)) if name in SEQUENCES else rng.integers(CLASSES, size=count)
    rows = np.split(rng.permutation(count), np.cumsum(sizes)[:-1])
    return Clients.pooled(Examples.of(x, y, keep_dtype=True), rows)


def task_of(name: str, dtype: str = "float64") -> Task:
    return Task(lambda: MODELS[name]().to(getattr(torch, dtype)), F.cross_entropy)


ROUND = local_sgd(lr=0.1, epochs=2, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_a_round_in_float64_is_the_plain_one(name: str) -> None:
    clients, task = population(name), task_of(name)
    assert_alike(ran(Vectorised(), task, clients, ROUND), ran(Debug(), task, clients, ROUND), 1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", FURTHER)
def test_a_step_in_float32_is_the_plain_one(name: str) -> None:
    sizes = [8, 8, 5, 3]
    clients, task = population(name, "float32", sizes), task_of(name, "float32")
    results = [ran(e, task, clients, ROUND, limit=1) for e in (Vectorised(), Debug())]
    assert_alike(*results, 1e-4)  # of the step
    start = open_trainer(task, seed=3).initial().vector
    ours, plain = (start + r.message["values"] for r in results)  # type: ignore[index]
    assert np.linalg.norm(ours - plain) <= 1e-5 * np.linalg.norm(plain)  # of the weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "two-way lstm, projected", "gru", "rnn", "cnn"])
def test_layers_computed_client_by_client(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_stacked, "_LARGE", 0)
    clients, task = population(name, sizes=[9, 12, 1]), task_of(name)
    assert_alike(ran(Vectorised(), task, clients, ROUND), ran(Debug(), task, clients, ROUND), 1e-10)


EVERYTHING = local_sgd(
    lr=lambda r: 0.2 / r, steps=5, batch_size=4, momentum=0.8, weight_decay=0.1, clip_norm=0.5,
    penalty=proximal(0.3),
)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        local_sgd(lr=0.1, batch_size=None, epochs=3),
        local_sgd(lr=0.1, batch_size=4, momentum=0.9, weight_decay=0.01),
        local_sgd(lr=0.1, batch_size=5, clip_norm=0.1),
    ],
)
def test_parts_of_local_sgd_by_themselves(spec: LocalSGD) -> None:
    clients, task = population("mlp"), task_of("mlp")
    assert_alike(ran(Vectorised(), task, clients, spec), ran(Debug(), task, clients, spec), 1e-10)


def test_the_same_bits_with_any_number_of_threads() -> None:
    clients, task = population("cnn", "float32", [40 + i for i in range(12)]), task_of("cnn", "float32")
    one, three = (ran(Vectorised(threads=t), task, clients, ROUND) for t in (1, 3))
    assert one.message is not None
    assert three.message is not None
    assert one.message["values"].tobytes() == three.message["values"].tobytes()
    assert one.losses == three.losses


def test_buffers_that_clients_keep() -> None:
    sizes = [6, 11, 4]
    clients = population("batch norm", sizes=sizes)
    task = Task(lambda: IMAGES["batch norm"]().double(), F.cross_entropy, average_buffers=False)
    own = {1: {BUFFERS: open_trainer(task, seed=0).initial().buffers + 0.5}}
    ours, plain = (ran(e, task, clients, ROUND, kept=own) for e in (Vectorised(), Debug()))
    assert sorted(ours.kept) == [0, 1, 2]
    assert_alike(ours, plain, 1e-10)


def test_several_inputs_and_a_loss_per_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.a(x) * self.b(y)).sum(1)

    rng = np.random.default_rng(0)
    pool = Examples.of((rng.normal(size=(30, 3)), rng.normal(size=(30, 2))), rng.normal(size=30), keep_dtype=True)
    clients = Clients.pooled(pool, np.split(np.arange(30), [11, 13]))
    task = Task(lambda: Two().double(), lambda output, target: (output - target) ** 2)
    assert_alike(ran(Vectorised(), task, clients, ROUND), ran(Debug(), task, clients, ROUND), 1e-10)


# --- numpy models

ABSOLUTE = NumpyModel(  # takes no client axis
    lambda g: {"w": g.normal(size=64)},
    lambda p, x: x.reshape(len(x), -1) @ p["w"],
    lambda p, x, y: (
        float(np.abs(x[0].reshape(len(y), -1) @ p["w"] - y).mean()),
        {"w": np.sign(x[0].reshape(len(y), -1) @ p["w"] - y) @ x[0].reshape(len(y), -1) / len(y)},
    ),
)


@pytest.mark.parametrize("spec", [ROUND, EVERYTHING])
@pytest.mark.parametrize("model", [logistic(64, CLASSES, dtype="float64"), linear(64, dtype="float64"), ABSOLUTE])
def test_numpy_models(model: NumpyModel, spec: LocalSGD) -> None:
    clients, task = population("mlp"), Task(model)
    assert_alike(ran(Vectorised(), task, clients, spec), ran(Debug(), task, clients, spec), 1e-10)


@pytest.mark.parametrize("rate", [lambda r: 0.1, lambda r: 0.1 * (r - 1), 1e-9], ids=["steady", "from 0", "tiny"])
def test_a_gradient_that_mixes_clients_is_found_out_at_any_learning_rate(rate: Any) -> None:
    def gradient(p: Any, x: Any, y: Any) -> Any:
        error = (x[0].reshape(*y.shape, -1) * p["w"][..., None, :]).sum(-1) - y
        own = error[..., None] * x[0].reshape(*y.shape, -1)
        return (error**2).mean(-1) / 2, {"w": own.mean(0 if y.ndim == 1 else (0, 1)) + 0 * p["w"]}

    mixing = NumpyModel(lambda g: {"w": g.normal(size=64)}, ABSOLUTE.predict, gradient, stacked=True)
    told = "its step differs from the plain one"
    with pytest.raises(UnsupportedOperator, match=told):
        ran(Vectorised(), Task(mixing), population("mlp"), local_sgd(rate, batch_size=8))


@pytest.mark.parametrize("known", [True, False])
def test_clients_that_differ_a_lot_are_planned_apart(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foedus.core.batches, "ROOM", 1)
    resident, task = population("mlp", sizes=[1, 300, 2, 0, 17, 40, 1]), task_of("mlp")
    clients = resident if known else Clients.generated(resident.train, len(resident))
    spec = local_sgd(0.1, batch_size=None, epochs=2)
    assert_alike(ran(Vectorised(), task, clients, spec), ran(Debug(), task, resident, spec), 1e-10)


# --- faults


class Fourier(nn.Linear):
    """An operator without a batching rule, and a model that looks at its data to decide what to do."""

    def __init__(self, deciding: bool) -> None:
        super().__init__(64, CLASSES)
        self.deciding = deciding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.deciding:
            x = x + torch.nn.functional.multilabel_margin_loss(x.flatten(1), x.flatten(1).long() * 0 - 1)
        elif x.sum() > 0:
            x = -x
        return super().forward(x.flatten(1))


@pytest.mark.parametrize(("deciding", "words"), [(False, "aten::multilabel_margin_loss"), (True, "control flow")])
def test_what_cannot_be_batched_is_named(deciding: bool, words: str) -> None:
    task = Task(lambda: Fourier(deciding), F.cross_entropy)
    with pytest.raises(UnsupportedOperator, match=words):
        ran(Vectorised(), task, population("mlp", "float32"), ROUND)


def test_a_random_operator_that_cannot_be_counted_is_named() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1) + torch.empty_like(x.flatten(1)).exponential_())

    with pytest.raises(UnsupportedOperator, match="exponential_"):
        ran(
            Vectorised(),
            Task(lambda: Noisy(64, CLASSES), F.cross_entropy),
            population("mlp", "float32"),
            ROUND,
        )


def test_local_training_is_refused() -> None:
    task = task_of("mlp")
    algorithm = fedavg(local_training(optimiser=torch.optim.AdamW))
    with pytest.raises(ConfigurationError, match="local_sgd"):
        Vectorised().open(Job(task, algorithm, population("mlp"), seed=0))


def test_a_fault_in_one_client_says_whose_it_is() -> None:
    clients = population("mlp")
    pool, rows = clients.pool  # type: ignore[misc]
    targets = pool.targets.copy()
    targets[rows[5][7]] = 77
    wrong = Clients.pooled(Examples(pool.inputs, targets), list(rows), ids=list("abcdefgh"))
    with pytest.raises(TrainingError, match="client 'f' in round 2") as caught:
        ran(Vectorised(), task_of("mlp"), wrong, ROUND)
    assert 77 in caught.value.batch[1]


def test_clients_of_different_shapes_are_told_apart() -> None:
    shapes = Clients.generated(lambda i: (np.ones((4, 64 + i % 2)), np.zeros(4, int)), 4)
    with pytest.raises(FoedusError, match="shape"):
        ran(Vectorised(), task_of("mlp", "float32"), shapes, ROUND)


def test_a_population_without_examples_is_refused() -> None:
    empty = Clients.generated(lambda i: (np.ones((0, 64)), np.zeros(0, int)), 5)
    with pytest.raises(ConfigurationError, match="no client has any examples"):
        ran(Vectorised(), task_of("mlp", "float32"), empty, ROUND)


def test_the_mean_does_not_depend_on_the_executor_for_a_cohort_that_repeats_no_one() -> None:
    """Through the real aggregator: merged sums of both executors give the same global update."""
    clients, task = population("mlp"), task_of("mlp")
    start = open_trainer(task, seed=3).initial()
    found = []
    for executor in (Vectorised(), Debug()):
        with executor.open(Job(task, Algorithm(client=ROUND), clients, seed=3)) as session:
            outcome = session.run(Orders(1, Weights(*start), np.array([6, 0, 3])))
            assert outcome.message is not None
            found.append(mean().decode({}, outcome.message, Context(0, 1, SERVER))[0])
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-14)


# --- recordings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "attention, dropout", "batch norm", "cnn", "own buffer"])
def test_recorded_steps_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [11, 12, 20, 4]
    clients, task, found, made = population(name, "float32", sizes), task_of(name, "float32"), [], []
    plainly = torch_record.recorded

    def watched(*args: Any) -> Any:
        made.append(plainly(*args))
        return made[-1]

    monkeypatch.setattr(torch_record, "recorded", watched)
    for uses in (1, 10**9):
        monkeypatch.setattr(torch_record, "USES", uses)
        found.append(ran(Vectorised(threads=1), task, clients, ROUND))
    assert made, "nothing was recorded"
    assert None not in made, "a recording was refused"
    recorded, plain = found
    assert recorded.losses == plain.losses
    assert recorded.message is not None
    assert recorded.message["values"].tobytes() == plain.message["values"].tobytes()  # type: ignore[index]


def test_a_function_that_draws_on_something_else_is_not_recorded() -> None:
    calls = iter(range(100))
    found = torch_record.recorded(lambda x: [x + next(calls)], [torch.ones(2)], slice(0, 0))
    assert found is None
