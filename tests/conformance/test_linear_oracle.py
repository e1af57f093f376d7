"""Linear models are an exact oracle: federated gradient descent over all clients is pooled descent."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from foedus.backends import Weights
from foedus.core.client import local_sgd, proximal
from foedus.core.compose import Algorithm, fedavg, fedsgd
from foedus.core.linear import linear, logistic
from foedus.core.population import Clients, Examples
from foedus.core.task import NumpyModel, Task
from foedus.core.values import SERVER, Context
from foedus.rounds.debug import Debug
from foedus.rounds.work import Executor, Job, Orders

SIZES = [1, 2, 40, 0, 7, 13, 1]  # ragged, with an empty client
FEATURES = 5


def population(kind: str, seed: int) -> Clients:
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(sum(SIZES), FEATURES)) * [1, 2, 0.5, 1, 3]
    truth = rng.normal(size=(FEATURES, 3))
    scores = pool @ truth + rng.normal(size=(len(pool), 3))
    targets = scores.argmax(1) if kind == "logistic" else scores
    rows = np.split(rng.permutation(len(pool)), np.cumsum(SIZES)[:-1])
    return Clients.pooled(Examples.of(pool, targets, keep_dtype=True), rows)


def model(kind: str) -> NumpyModel:
    return (logistic if kind == "logistic" else linear)(FEATURES, 3, dtype="float64")


def federated(
    task: Task, algorithm: Algorithm, clients: Clients, *, rounds: int, executor: Executor
) -> list[NDArray[np.float64]]:
    """The global model after every round, every client in every cohort."""
    job = Job(task, algorithm, clients, seed=11)
    vectors = []
    vector = np.zeros(3 * FEATURES + 3)
    state, own = algorithm.server.init(vector), {}
    with executor.open(job) as session:
        for round in range(1, rounds + 1):
            start = Weights(vector, np.empty(0, np.float32))
            outcome = session.run(Orders(round, start, np.arange(len(clients))))
            assert outcome.message is not None
            assert not outcome.refused
            update, own = algorithm.aggregator.decode(own, outcome.message, Context(0, 1, SERVER))
            vector, state = algorithm.server.step(state, vector, update, round)
            vectors.append(vector)
    return vectors


def pooled(kind: str, clients: Clients, *, rounds: int, lr: float) -> list[NDArray[np.float64]]:
    """Plain gradient descent, written down on its own: no model, no layout, no plan."""
    examples = clients.pooled_examples()
    x = np.concatenate([examples.inputs[0], np.ones((len(examples), 1))], 1)
    aims = np.eye(3)[examples.targets] if kind == "logistic" else examples.targets
    w, found = np.zeros((FEATURES + 1, 3)), []
    for _ in range(rounds):
        out = x @ w
        if kind == "logistic":
            out = np.exp(out) / np.exp(out).sum(1, keepdims=True)
        w = w - lr * x.T @ (out - aims) / len(x)
        found.append(w.reshape(-1))
    return found


@pytest.mark.parametrize("kind", ["linear", "logistic"])
@pytest.mark.parametrize("seed", [0, 1])
def test_federated_gradient_descent_is_pooled_gradient_descent(kind: str, seed: int) -> None:
    clients = population(kind, seed)
    ours = federated(Task(model(kind)), fedsgd(lr=0.05), clients, rounds=60, executor=Debug())
    theirs = pooled(kind, clients, rounds=60, lr=0.05)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_linear_regression_reaches_the_closed_form() -> None:
    clients = population("linear", 2)
    *_, last = federated(Task(model("linear")), fedsgd(lr=0.2), clients, rounds=1500, executor=Debug())
    examples = clients.pooled_examples()
    x = np.concatenate([examples.inputs[0], np.ones((len(examples), 1))], 1)
    best = np.linalg.lstsq(x, examples.targets, rcond=None)[0]
    np.testing.assert_allclose(last.reshape(-1, 3), best, atol=1e-9)


def test_one_local_epoch_of_the_whole_batch_with_a_penalty_is_still_gradient_descent() -> None:
    """At the received weights the proximal term has no gradient, so that one full step ignores it."""
    clients = population("linear", 3)
    spec = local_sgd(lr=0.05, epochs=1, batch_size=None, penalty=proximal(3.0))
    ours = federated(Task(model("linear")), fedavg(spec), clients, rounds=20, executor=Debug())
    theirs = pooled("linear", clients, rounds=20, lr=0.05)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
