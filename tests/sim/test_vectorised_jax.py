"""The vectorised executor over jax models, beyond the conformance suites of cohorts and of executors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foedus.core.client import local_sgd, proximal
from foedus.core.population import Clients, Examples
from foedus.core.task import JaxModel, Task
from foedus.rounds.debug import Debug
from foedus.sim.vectorised import Vectorised

from ..conformance.executions import assert_alike, ran

SIZES = [9, 1, 0, 17, 9, 10]
CLASSES = 5


def perceptron(dtype: str, *, centred: bool = True) -> JaxModel:
    """Two linear layers; if centred, around the mean of the batch."""

    def init(key: Any) -> Any:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return {
            "first": rng.normal(size=(64, 16)).astype(dtype) / 8,
            "out": rng.normal(size=(16, CLASSES)).astype(dtype) / 4,
        }

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        x = jax.nn.relu(x.reshape(len(x), -1) @ p["first"])
        x = x - x.mean(0) if centred else x
        return x @ p["out"]

    return JaxModel(init, apply)


def cross_entropy(output: Any, target: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1)[:, 0]


def population(dtype: str) -> Clients:
    rng, count = np.random.default_rng(4), sum(SIZES)
    pool = Examples.of(rng.normal(size=(count, 1, 8, 8)).astype(dtype), np.arange(count) % CLASSES, keep_dtype=True)
    return Clients.pooled(pool, np.split(rng.permutation(count), np.cumsum(SIZES)[:-1]))


@pytest.mark.slow
def test_a_model_whose_examples_interact_is_computed_without_padding() -> None:
    spec = local_sgd(lr=0.1, epochs=2, batch_size=8, momentum=0.5, clip_norm=1.0, penalty=proximal(0.1))
    clients, task = population("float64"), Task(perceptron("float64"), cross_entropy)
    assert_alike(*(ran(e, task, clients, spec) for e in (Vectorised(), Debug())), 1e-10)


@pytest.mark.slow
def test_a_client_with_a_label_out_of_range_is_refused_alone() -> None:
    clients, task = population("float32"), Task(perceptron("float32", centred=False), cross_entropy)
    pool, rows = clients.pool  # type: ignore[misc]
    targets = pool.targets.copy()
    targets[rows[4][2]] = 9
    wrong = Clients.pooled(Examples(pool.inputs, targets), list(rows))
    outcomes = [ran(e, task, wrong, local_sgd(lr=0.1, batch_size=8)) for e in (Vectorised(), Debug())]
    for outcome in outcomes:
        assert [r.client for r in outcome.refused] == [4]
