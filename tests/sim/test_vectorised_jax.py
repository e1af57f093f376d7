"""The vectorised executor over jax models agrees with the plain one, client by client."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foedus.backends import open_trainer
from foedus.core.aggregate import Aggregator
from foedus.core.client import LocalSGD, local_sgd, proximal
from foedus.core.compose import Algorithm
from foedus.core.population import Clients, Examples
from foedus.core.task import JaxModel, Task
from foedus.sim.debug import Debug
from foedus.sim.vectorised import Vectorised
from foedus.sim.work import Executor, Job, Orders, Outcome

SIZES = [9, 1, 0, 17, 9, 10]
CLASSES = 5


def perceptron(dtype: str, *, centred: bool = False, dropout: bool = False) -> JaxModel:
    """Two linear layers, perhaps with dropout between them."""

    def init(key: Any) -> Any:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return {
            "first": rng.normal(size=(64, 16)).astype(dtype) / 8,
            "out": rng.normal(size=(16, CLASSES)).astype(dtype) / 4,
        }

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        x = jax.nn.relu(x.reshape(len(x), -1) @ p["first"])
        x = x - x.mean(0) if centred else x
        if train and dropout:
            x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)
        return x @ p["out"]

    return JaxModel(init, apply)


def cross_entropy(output: Any, target: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1)[:, 0]


def population(dtype: str) -> Clients:
    rng, count = np.random.default_rng(4), sum(SIZES)
    pool = Examples.of(
        rng.normal(size=(count, 1, 8, 8)).astype(dtype), np.arange(count) % CLASSES, keep_dtype=True
    )
    return Clients.pooled(pool, np.split(rng.permutation(count), np.cumsum(SIZES)[:-1]))


def collecting() -> Aggregator:
    """Keeps every single update, so that executors can be compared client by client."""

    def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: np.concatenate([a[name], b[name]]) for name in a}

    return Aggregator(
        init=lambda layout: {},
        encode=lambda update, context: {"values": update.vector[None], "client": np.array([context.client])},
        merge=merge,
        decode=lambda state, message: (message["values"], state),
        additive=False,
        label="collecting()",
    )


def ran(
    executor: Executor, task: Task, clients: Clients, spec: LocalSGD, **orders: Any
) -> tuple[Outcome, Any]:
    start = open_trainer(task, seed=3).initial()
    with executor.open(
        Job(task, Algorithm(client=spec, aggregator=collecting()), clients, seed=3)
    ) as session:
        outcome = session.run(Orders(2, start, np.arange(len(clients)), **orders))
    assert outcome.message is not None
    return outcome, outcome.message["values"][np.argsort(outcome.message["client"])]


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
def test_a_round_in_float64_is_the_plain_one(centred: bool) -> None:
    spec = local_sgd(lr=0.1, epochs=2, batch_size=8, momentum=0.5, clip_norm=1.0, penalty=proximal(0.1))
    clients, task = (
        population("float64"),
        Task(perceptron("float64", centred=centred, dropout=not centred), cross_entropy),
    )
    (ours, rows), (plain, wanted) = (ran(e, task, clients, spec) for e in (Vectorised(), Debug()))
    assert (ours.clients, ours.examples, ours.steps) == (plain.clients, plain.examples, plain.steps)
    np.testing.assert_allclose(ours.losses, plain.losses, rtol=1e-9)
    for row, right in zip(rows, wanted, strict=True):
        assert np.linalg.norm(row - right) <= 1e-10 * np.linalg.norm(right)


@pytest.mark.slow
def test_a_step_in_float32_is_the_plain_one_and_generated_clients_are_the_resident_ones() -> None:
    clients, task = population("float32"), Task(perceptron("float32"), cross_entropy)
    spec = local_sgd(lr=0.1, batch_size=8)
    _, wanted = ran(Debug(), task, clients, spec, limit=1)
    for own in (clients, Clients.generated(clients.train, len(clients))):
        _, rows = ran(Vectorised(), task, own, spec, limit=1)
        for row, right in zip(rows, wanted, strict=True):
            assert np.linalg.norm(row - right) <= 1e-4 * np.linalg.norm(right)
    start = open_trainer(task, seed=3).initial().vector
    assert np.linalg.norm(rows - wanted) <= 1e-5 * np.linalg.norm(start + wanted)


@pytest.mark.slow
def test_a_client_with_a_label_out_of_range_is_refused_alone() -> None:
    clients, task = population("float32"), Task(perceptron("float32"), cross_entropy)
    pool, rows = clients.pool  # type: ignore[misc]
    targets = pool.targets.copy()
    targets[rows[4][2]] = 9
    wrong = Clients.pooled(Examples(pool.inputs, targets), list(rows))
    outcomes = [ran(e, task, wrong, local_sgd(lr=0.1, batch_size=8))[0] for e in (Vectorised(), Debug())]
    for outcome in outcomes:
        assert [r.client for r in outcome.refused] == [4]
