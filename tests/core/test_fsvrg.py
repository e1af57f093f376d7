"""FSVRG against the paper's pseudocode in plain Python, and against the optimum; sparse rows and models."""

from __future__ import annotations

import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import foedus as fd
from foedus.core.fsvrg import Around, walk
from foedus.core.population import Clients, Examples
from foedus.core.random import generator
from foedus.core.sparse_rows import Compressed
from foedus.errors import ConfigurationError, DataError

FEATURES, L2 = 6, 0.05
DEBUG = fd.Settings(executor=fd.executors.debug(), progress=False)


def tiny(seed: int = 0, sizes: tuple[int, ...] = (3, 1, 7)) -> Clients:
    """Clients of very uneven sizes whose examples have one to three features; the last feature occurs nowhere."""
    draw = np.random.default_rng(seed)
    found = {}
    for client, size in enumerate(sizes):
        rows = [draw.choice(FEATURES - 1, draw.integers(1, 4), replace=False) for _ in range(size)]
        offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
        indices = np.concatenate(rows)
        inputs = fd.sparse_rows(indices, draw.normal(1.0, 0.5, len(indices)), offsets=offsets)
        wide = tuple(np.pad(a, ((0, 0), (0, 3 - a.shape[1]))) for a in inputs)
        found[client] = Examples.of(wide, draw.integers(0, 2, size), keep_dtype=True)
    return Clients.of(found)


def dense(examples: Examples) -> list[list[float]]:
    """What the arrays stand for, the bias as a last feature of 1."""
    rows = []
    for indices, values in zip(*examples.inputs, strict=True):
        row = [0.0] * FEATURES + [1.0]
        for j, x in zip(indices.tolist(), values.tolist(), strict=True):
            row[j] += x
        rows.append(row)
    return rows


def papers(clients: Clients, step: float, iterations: int, seed: int) -> list[float]:
    """Algorithm 4 of Konečný et al. 2016, line by line."""
    data = [(dense(clients.train(k)), clients.train(k).targets.tolist()) for k in range(len(clients))]
    d, K = FEATURES + 1, len(data)
    n = sum(len(x) for x, _ in data)
    n_j = [sum(row[j] != 0 for x, _ in data for row in x) for j in range(d)]
    omega = [sum(any(row[j] != 0 for row in x) for x, _ in data) for j in range(d)]
    a = [K / o if o else 1.0 for o in omega]

    def slope(w: list[float], row: list[float], y: int) -> float:
        z = sum(w_j * x_j for w_j, x_j in zip(w, row, strict=True))
        return 1 / (1 + math.exp(-z)) - y

    w = [0.0] * d
    penalty = [L2] * FEATURES + [0.0]
    for s in range(iterations):
        full = [penalty[j] * w[j] for j in range(d)]
        for x, y in data:
            for row, label in zip(x, y, strict=True):
                full = [f + slope(w, row, label) * x_j / n for f, x_j in zip(full, row, strict=True)]
        total = [0.0] * d
        for k, (x, y) in enumerate(data):
            n_k, own = len(x), list(w)
            phi_k = [sum(row[j] != 0 for row in x) / n_k for j in range(d)]
            for i in generator(seed, "fsvrg", 2 * s + 2, k).permutation(n_k):
                gap = slope(own, x[i], y[i]) - slope(w, x[i], y[i])
                for_each = []
                for j in range(d):
                    scaled = (n_j[j] / n) / phi_k[j] * gap * x[i][j] if x[i][j] else 0.0
                    for_each.append(scaled + penalty[j] * (own[j] - w[j]) + full[j])
                own = [own[j] - step / n_k * for_each[j] for j in range(d)]
            total = [t + n_k / n * (o - v) for t, o, v in zip(total, own, w, strict=True)]
        w = [w[j] + a[j] * total[j] for j in range(d)]
    return w


def trained(clients: Clients, rounds: int, *, step: float, seed: int, dtype: str = "float64") -> fd.Run:
    model = fd.sparse_logistic(FEATURES, l2=L2, dtype=dtype)
    return fd.simulate(fd.Task(model), fd.fsvrg(model, step=step), clients, rounds=rounds, seed=seed, settings=DEBUG)


def objective(w: np.ndarray, clients: Clients) -> float:
    examples = clients.pooled_examples()
    scores = np.array(dense(examples)) @ w
    losses = np.logaddexp(0, scores) - examples.targets * scores
    return float(losses.mean() + L2 / 2 * np.square(w[:-1]).sum())


def optimum(clients: Clients) -> np.ndarray:
    """By Newton's method."""
    examples = clients.pooled_examples()
    x, y, w = np.array(dense(examples)), examples.targets, np.zeros(FEATURES + 1)
    ridge = np.diag([L2] * FEATURES + [0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x.T * (p * (1 - p))) @ x / len(y) + ridge, x.T @ (p - y) / len(y) + ridge @ w)
    return w


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_papers_algorithm(seed: int) -> None:
    clients = tiny(seed)
    run = trained(clients, 6, step=0.7, seed=seed)
    np.testing.assert_allclose(run.weights.vector, papers(clients, 0.7, 3, seed), rtol=0, atol=1e-10)


def test_it_converges_to_the_optimum_of_all() -> None:
    clients = tiny(3, sizes=(2, 1, 20, 5))
    best = optimum(clients)
    run = trained(clients, 160, step=1.0, seed=0)
    assert objective(run.weights.vector, clients) - objective(best, clients) < 1e-10
    np.testing.assert_allclose(run.weights.vector, best, atol=1e-4)
