"""The conformance suite of executors: the same work, carried out in other ways, gives the same result.

Every executor is compared with ``debug``, the plain loop, client by client: one local step in float32 to 10⁻⁵ of
the weights, a whole client's round in float64 to 10⁻¹⁰ of the update; and to the bit with itself, however many
workers it has. Executors that share the trainer of ``debug`` must equal it to the bit.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foedus as fd
from foedus.backends import open_trainer
from foedus.errors import TrainingError, UnsupportedOperator
from foedus.rounds.debug import Debug
from foedus.rounds.work import Job, Orders, Outcome

from .executions import (
    CLASSES,
    WORDS,
    Attention,
    Recurrent,
    SharedLayers,
    TiedAndFrozen,
    TwoInputs,
    assert_alike,
    everyone,
    net,
    ran,
    rows,
)

pytestmark = pytest.mark.slow

FAST = {"vectorised": fd.executors.vectorised, "compiled": fd.executors.compiled}
EXACT = {"processes": partial(fd.executors.processes, 2)}  # the trainer of `debug`, in other processes
EVERY = {"debug": fd.executors.debug, **FAST, **EXACT}

RAGGED = [9, 1, 0, 23, 8, 12]  # with an empty client and one of one example
EVEN = [8, 24, 0, 16]  # BatchNorm takes no padding, and no batch of one

ROUND = fd.local_sgd(lr=0.1, epochs=2, batch_size=8)
EVERYTHING = fd.local_sgd(
    lr=lambda r: 0.2 / r,
    steps=4,
    batch_size=8,
    momentum=0.8,
    weight_decay=0.1,
    clip_norm=0.5,
    penalty=fd.proximal(0.3),
)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: net(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "cnn": lambda: net(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    ),
    "group norm": lambda: net(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ),
    "batch norm": lambda: net(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ),
    "dropout": lambda: net(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, CLASSES)
    ),
    "lstm": Recurrent,
    "attention": Attention,
    "tied and frozen": TiedAndFrozen,
    "shared layers": SharedLayers,
    "two inputs": TwoInputs,
    "regression": lambda: net(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2)),
}
SEQUENCES, TOKENS = ("lstm", "tied and frozen", "shared layers"), ("attention",)


def population(name: str, dtype: str, sizes: list[int]) -> fd.Clients:
    rng, count = np.random.default_rng(4), sum(sizes)
    image, words = rng.normal(size=(count, 1, 8, 8)).astype(dtype), rng.integers(WORDS, size=(count, 4))
    x: Any = words if name in (*SEQUENCES, *TOKENS) else (image, words) if name == "two inputs" else image
    y = rng.integers(WORDS, size=(count, 4)) if name in SEQUENCES else rng.integers(CLASSES, size=count)
    if name == "regression":
        y = rng.normal(size=(count, 2)).astype(dtype)
    rows = np.split(rng.permutation(count), np.cumsum(sizes)[:-1])
    return fd.Clients.pooled(fd.Examples.of(x, y, keep_dtype=True), rows)


def task_of(name: str, dtype: str) -> fd.Task:
    loss = F.mse_loss if name == "regression" else F.cross_entropy
    return fd.Task(partial(made, name, dtype), loss)


def made(name: str, dtype: str) -> nn.Module:
    return MODELS[name]().to(getattr(torch, dtype))


def sizes_of(name: str) -> list[int]:
    return EVEN if name == "batch norm" else RAGGED


def bits(outcome: Outcome) -> str:
    assert outcome.message is not None
    parts = [np.asarray(rows(m)).tobytes() for m in (outcome.message, outcome.buffers)]
    return hashlib.sha256(b"".join(parts) + json.dumps(outcome.losses).encode()).hexdigest()


# --- agreement


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("executor", FAST)
def test_a_clients_round_in_float64(executor: str, name: str) -> None:
    clients, task = population(name, "float64", sizes_of(name)), task_of(name, "float64")
    found, wanted = (ran(e(), task, clients, ROUND) for e in (FAST[executor], Debug))
    assert wanted.clients == [i for i, n in enumerate(sizes_of(name)) if n]
    assert_alike(found, wanted, 1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("executor", FAST)
def test_a_step_in_float32(executor: str, name: str) -> None:
    clients, task = population(name, "float32", sizes_of(name)), task_of(name, "float32")
    found, wanted = (ran(e(), task, clients, ROUND, limit=1) for e in (FAST[executor], Debug))
    start = open_trainer(task, seed=3).initial().vector
    for a, b in zip(rows(found.message), rows(wanted.message), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(start + b)
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), "an update that is not there is no agreement"


@pytest.mark.parametrize("executor", FAST)
def test_every_part_of_local_sgd(executor: str) -> None:
    clients, task = population("mlp", "float64", RAGGED), task_of("mlp", "float64")
    assert_alike(*(ran(e(), task, clients, EVERYTHING) for e in (FAST[executor], Debug)), 1e-10)


@pytest.mark.parametrize("name", ["dropout", "batch norm"])
@pytest.mark.parametrize("executor", EXACT)
def test_the_same_trainer_elsewhere_gives_the_same_bits(executor: str, name: str) -> None:
    clients, task = population(name, "float32", sizes_of(name)), task_of(name, "float32")
    assert bits(ran(EXACT[executor](), task, clients, ROUND)) == bits(ran(Debug(), task, clients, ROUND))


# --- bits


@pytest.mark.parametrize("executor", EVERY)
def test_twice_the_same_gives_the_same_bits(executor: str) -> None:
    clients, task = population("dropout", "float32", RAGGED), task_of("dropout", "float32")
    algorithm = fd.fedavg(ROUND, aggregator=everyone())
    start = open_trainer(task, seed=3).initial()
    orders = Orders(2, start, np.arange(len(clients)))
    with EVERY[executor]().open(Job(task, algorithm, clients, seed=3)) as session:
        first = session.run(orders)
        session.run(Orders(3, start, np.array([3, 0])))  # what else a session did leaves no trace
        second = session.run(orders)
    assert bits(first) == bits(second)


def test_any_number_of_worker_processes_gives_the_same_bits() -> None:
    clients, task = population("mlp", "float32", RAGGED), task_of("mlp", "float32")
    one, three = (bits(ran(fd.executors.processes(n), task, clients, ROUND)) for n in (1, 3))
    assert one == three


CORES = """
    import os, sys
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:{cores}]))
    import numpy as np, torch, foedus as fd
    from foedus.backends import open_trainer
    from foedus.rounds.work import Job, Orders

    rng = np.random.default_rng(0)
    pool = fd.Examples.of(rng.normal(size=(90, 6)), rng.integers(3, size=90))
    clients = fd.Clients.pooled(pool, np.split(np.arange(90), [9, 10, 40, 63]))
    net = lambda: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
    task = fd.Task(net, torch.nn.functional.cross_entropy)
    job = Job(task, fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=8)), clients, 0)
    start = open_trainer(task, seed=0).initial()
    with fd.executors.{executor}().open(job) as session:
        out = session.run(Orders(1, start, np.arange(5)))
    print(*(out.message[n].tobytes().hex() for n in sorted(out.message)), *out.losses)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="binds processes to cores")
@pytest.mark.parametrize("executor", FAST)
def test_any_number_of_cores_gives_the_same_bits(executor: str) -> None:
    scripts = [textwrap.dedent(CORES).format(cores=n, executor=executor) for n in (1, 2)]
    told = [
        subprocess.run([sys.executable, "-c", s], capture_output=True, text=True, check=True, timeout=200).stdout
        for s in scripts
    ]
    assert len(told[0]) > 1000
    assert told[0] == told[1]


# --- kinds of populations and rules


@pytest.mark.parametrize("executor", EVERY)
def test_clients_that_are_generated_are_trained_like_resident_ones(executor: str) -> None:
    resident, task = population("mlp", "float64", RAGGED), task_of("mlp", "float64")
    generated = fd.Clients.generated(resident.train, len(resident))
    assert_alike(*(ran(e(), task, c, ROUND) for e, c in ((EVERY[executor], generated), (Debug, resident))), 1e-10)


@pytest.mark.parametrize("executor", EVERY)
def test_a_cohort_of_empty_clients_brings_nothing(executor: str) -> None:
    clients, task = population("mlp", "float32", [0, 5, 0]), task_of("mlp", "float32")
    start = open_trainer(task, seed=3).initial()
    with EVERY[executor]().open(Job(task, fd.fedavg(ROUND), clients, 3)) as session:
        for cohort in ([0, 2], []):
            found = session.run(Orders(1, start, np.array(cohort, np.int64)))
            assert (found.message, found.clients, found.refused) == (None, [], [])


@pytest.mark.parametrize("executor", EVERY)
def test_a_client_whose_training_leaves_the_numbers_is_refused_and_named(executor: str) -> None:
    clients, task = population("mlp", "float32", [6, 5, 7]), task_of("mlp", "float32")
    assert clients.pool is not None
    pool, own = clients.pool
    pool.inputs[0][own[1][2]] = np.nan
    found = ran(EVERY[executor](), task, clients, ROUND)
    assert [(r.client, "not finite" in r.reason, "nan" in r.reason) for r in found.refused] == [(1, True, True)]
    assert found.clients == [0, 1, 2]
    assert found.message is not None
    assert found.message["client"].tolist() == [0, 2]
    assert np.isfinite(rows(found.message)).all()


@pytest.mark.parametrize("label", [CLASSES, -1, 1000])
@pytest.mark.parametrize("executor", EVERY)
def test_a_label_out_of_range_names_the_client(executor: str, label: int) -> None:
    clients, task = population("mlp", "float32", [6, 5, 7]), task_of("mlp", "float32")
    assert clients.pool is not None
    pool, own = clients.pool
    pool.targets[own[1][2]] = label
    with pytest.raises(TrainingError, match="client 1 in round 2"):
        ran(EVERY[executor](), task, clients, ROUND)


LEFT_OUT = -100
LOSSES = {
    "plain": F.cross_entropy,
    "smooth": partial(F.cross_entropy, label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)),
    "mean of rows": partial(F.cross_entropy, reduction="none"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("executor", [*FAST, *EXACT])
def test_a_batch_of_labels_left_out_trains_nothing_and_spoils_nothing(executor: str, loss: str) -> None:
    """Torch's mean over no label is 0/0, and its gradient 0: the client's other batches count."""
    clients, task = population("mlp", "float64", RAGGED), fd.Task(partial(made, "mlp", "float64"), LOSSES[loss])
    assert clients.pool is not None
    pool, own = clients.pool
    pool.targets[own[0]] = [LEFT_OUT] * 8 + [1]  # its last batch of one row: now and then, and ...
    pool.targets[own[5][:9]] = LEFT_OUT
    pool.targets[own[1]] = LEFT_OUT  # ... whatever the order
    found, wanted = (ran(e(), task, clients, ROUND) for e in (EVERY[executor], Debug))
    assert_alike(found, wanted, 1e-10)
    assert wanted.refused == []
    undefined = {c for c, mean in zip(wanted.clients, wanted.losses, strict=True) if np.isnan(mean)}
    assert ({0, 1} <= undefined) == (loss != "mean of rows")
    assert 3 not in undefined
    assert np.linalg.norm(rows(wanted.message)[0]) > 0  # client 0 learns from the batch that has a label
    assert np.linalg.norm(rows(wanted.message)[1]) == 0


@pytest.mark.parametrize("executor", EVERY)
def test_labels_left_out_do_not_hide_one_that_is_out_of_range(executor: str) -> None:
    """Compiled code shows the least and the greatest label only; one in between is refused by its NaN."""
    clients, task = population("mlp", "float32", [6, 5, 7]), task_of("mlp", "float32")
    assert clients.pool is not None
    pool, own = clients.pool
    last = len(pool) - 1  # beyond those that the step is tried out on
    (owner,) = (i for i in range(3) if last in own[i])
    pool.targets[own[owner]] = LEFT_OUT
    pool.targets[last] = -3
    if executor == "compiled":
        assert [r.client for r in ran(EVERY[executor](), task, clients, ROUND).refused] == [owner]
    else:
        with pytest.raises(TrainingError, match=f"client {owner} in round 2"):
            ran(EVERY[executor](), task, clients, ROUND)


def test_a_step_is_tried_out_on_a_batch_that_has_labels() -> None:
    """The first examples of all have none: with them, a wrong step would look right."""
    clients, task = population("mlp", "float64", [40]), task_of("mlp", "float64")
    assert clients.pool is not None
    clients.pool[0].targets[:12] = LEFT_OUT
    found, wanted = (ran(e(), task, clients, ROUND, limit=1) for e in (fd.executors.compiled, Debug))
    assert_alike(found, wanted, 1e-10)


FAULTS: dict[str, Callable[..., Any]] = {
    "detached": lambda output, target: F.cross_entropy(output, target).detach(),
    "targets that are floats": lambda output, target: F.cross_entropy(output, target.float()),
    "raising": lambda output, target: output / 0 + "x",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("executor", EVERY)
def test_a_loss_that_fails_is_told_as_by_the_plain_loop(executor: str, fault: str) -> None:
    clients, task = population("mlp", "float32", [6, 5]), fd.Task(partial(made, "mlp", "float32"), FAULTS[fault])
    with pytest.raises(TrainingError, match=r"client 0 in round \d"):
        ran(EVERY[executor](), task, clients, ROUND)


@pytest.mark.parametrize("executor", EVERY)
def test_a_loss_that_is_never_a_number_is_refused_by_client(executor: str) -> None:
    clients = population("mlp", "float32", [9, 5])
    task = fd.Task(partial(made, "mlp", "float32"), lambda output, target: F.cross_entropy(output, target) * np.nan)
    assert [r.client for r in ran(EVERY[executor](), task, clients, ROUND).refused] == [0, 1]


class Half(nn.Module):
    """Computes a part in a type that numpy does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.coarse = nn.Linear(64, CLASSES), nn.Linear(CLASSES, CLASSES).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coarse(self.first(x.flatten(1)).to(torch.bfloat16)).float()


@pytest.mark.parametrize("executor", FAST)
def test_weights_of_a_type_that_fast_paths_do_not_know_are_named(executor: str) -> None:
    with pytest.raises(UnsupportedOperator, match=r"no fast path for bfloat16, the type of 'coarse\.weight'"):
        ran(FAST[executor](), fd.Task(Half, F.cross_entropy), population("mlp", "float32", [6, 5]), ROUND)


@pytest.mark.parametrize("executor", EVERY)
def test_a_word_out_of_range_names_the_client(executor: str) -> None:
    clients, task = population("attention", "float32", [6, 5, 7]), task_of("attention", "float32")
    assert clients.pool is not None
    pool, own = clients.pool
    pool.inputs[0][own[2][1], 0] = WORDS
    with pytest.raises(TrainingError, match="client 2 in round"):  # some find it before the first round
        ran(EVERY[executor](), task, clients, ROUND)


# --- jax models


def jax_task(dtype: str) -> fd.Task:
    def init(key: Any) -> Any:
        first, second = jax.random.split(key)
        shapes = {"w": (first, (64, 8)), "v": (second, (8, CLASSES))}
        return {name: 0.2 * jax.random.normal(k, s, dtype) for name, (k, s) in shapes.items()}

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        hidden = jnp.tanh(x.reshape(len(x), -1) @ p["w"])
        if train:
            hidden = hidden * jax.random.bernoulli(key, 0.7, hidden.shape) / 0.7
        return hidden @ p["v"]

    def loss(output: Any, target: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1)[:, 0]

    return fd.Task(fd.JaxModel(init, apply), loss)


@pytest.mark.parametrize("executor", [*FAST, *EXACT])
def test_a_jax_model(executor: str) -> None:
    clients, task = population("mlp", "float32", RAGGED), jax_task("float32")
    found, wanted = (ran(e(), task, clients, ROUND) for e in (EVERY[executor], Debug))
    assert_alike(found, wanted, 1e-5)
