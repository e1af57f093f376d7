"""FSVRG against the paper's pseudocode in plain Python, and against the optimum; sparse rows and models."""

from __future__ import annotations

import math
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import foedus as fd
from foedus.core.fsvrg import Around, walk
from foedus.core.population import Clients, Examples
from foedus.core.random import generator
from foedus.core.select import Sampler
from foedus.core.sparse_rows import Compressed
from foedus.errors import ConfigurationError, DataError

FEATURES, L2 = 6, 0.05


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


def trained(clients: Clients, rounds: int, folder: Path, *, step: float, seed: int = 0) -> np.ndarray:
    model = fd.sparse_logistic(FEATURES, l2=L2, dtype="float64")
    options = fd.Settings(executor=fd.executors.debug(), progress=False, folder=folder / "run")
    algorithm = fd.fsvrg(model, step=step)
    return fd.simulate(fd.Task(model), algorithm, clients, rounds=rounds, seed=seed, settings=options).weights.vector


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
def test_it_is_the_papers_algorithm(seed: int, tmp_path: Path) -> None:
    clients = tiny(seed)
    found = trained(clients, 6, tmp_path, step=0.7, seed=seed)
    np.testing.assert_allclose(found, papers(clients, 0.7, 3, seed), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_it_converges_to_the_optimum_of_all(tmp_path: Path) -> None:
    clients = tiny(3, sizes=(2, 1, 20, 5))
    best, found = optimum(clients), trained(clients, 200, tmp_path, step=6.0)
    assert objective(found, clients) - objective(best, clients) < 1e-12
    np.testing.assert_allclose(found, best, atol=1e-6)


def test_odd_rounds_leave_the_model_as_it_is_and_even_ones_move_it(tmp_path: Path) -> None:
    clients = tiny()
    after = [trained(clients, n, tmp_path / str(n), step=1.0) for n in (1, 2, 3)]
    assert not after[0].any()
    assert after[1].any()
    np.testing.assert_array_equal(after[1], after[2])


def test_counts_travel_once_and_gradients_every_second_round(tmp_path: Path) -> None:
    model = fd.sparse_logistic(FEATURES, l2=L2)
    options = fd.Settings(executor=fd.executors.debug(), progress=False, folder=tmp_path / "run")
    run = fd.simulate(fd.Task(model), fd.fsvrg(model, step=1.0), tiny(), rounds=4, settings=options)
    up, down = ([m[name] / 3 for m in run.metrics] for name in ("bytes_up", "bytes_down"))
    vector, weight = 4 * (FEATURES + 1), 8  # float32; a message's weight travels with it
    assert up == [vector + weight + 2 * 8 * (FEATURES + 1) + weight, vector + weight, vector + weight, vector + weight]
    assert down == [vector, 2 * vector + 4 * FEATURES, vector, 2 * vector + 4 * FEATURES]


@pytest.mark.parametrize(
    "executor", [fd.executors.vectorised(), fd.executors.processes(2)], ids=["vectorised", "procs"]
)
@pytest.mark.slow
def test_every_executor_consults_the_clients(executor: Any, tmp_path: Path) -> None:
    clients, model = tiny(1), fd.sparse_logistic(FEATURES, l2=L2, dtype="float64")
    options = fd.Settings(executor=executor, progress=False, folder=tmp_path / "other")
    run = fd.simulate(fd.Task(model), fd.fsvrg(model, step=1.0), clients, rounds=4, settings=options)
    np.testing.assert_array_equal(run.weights.vector, trained(clients, 4, tmp_path, step=1.0))


def called(*cohorts: list[int]) -> Sampler:
    """Who is asked round by round, written down."""
    return fd.uniform(1)._replace(
        sample=lambda population, seed, number: np.array(cohorts[number - 1], np.int64), label=f"called{cohorts}"
    )


def simulated(folder: Path, clients: Clients, rounds: int, cohort: Sampler | None = None) -> fd.Run:
    model = fd.sparse_logistic(FEATURES, l2=L2, dtype="float64")
    options = fd.Settings(executor=fd.executors.debug(), progress=False, folder=folder)
    return fd.simulate(
        fd.Task(model), fd.fsvrg(model, step=1.0), clients, rounds=rounds, cohort=cohort, settings=options
    )


def test_a_run_resumed_between_the_two_rounds_ends_with_the_same_bits(tmp_path: Path) -> None:
    for rounds in (1, 2, 3, 6):
        run = simulated(tmp_path / "resumed", tiny(), rounds)
    np.testing.assert_array_equal(run.weights.vector, simulated(tmp_path / "whole", tiny(), 6).weights.vector)


def test_rounds_without_anybody_change_nothing(tmp_path: Path) -> None:
    """What was to be asked is asked in the next round: the model has not moved, so that the gradient still holds."""
    clients, both = tiny(), [0, 2]
    plain = simulated(tmp_path / "plain", clients, 1, called(both))
    waited = simulated(tmp_path / "waited", clients, 3, called([], both, []))
    assert not plain.weights.vector.any()
    assert not waited.weights.vector.any()
    assert simulated(tmp_path / "moved", clients, 4, called([], both, [], both)).weights.vector.any()


def test_a_client_with_nan_is_refused_in_both_rounds(tmp_path: Path) -> None:
    clients = tiny()
    spoilt = clients.map(lambda e: Examples((e.inputs[0], np.where(e.inputs[1] > 1.5, np.nan, e.inputs[1])), e.targets))
    hit = [str(i) for i in range(3) if np.isnan(spoilt.train(i).inputs[1]).any()]
    run = simulated(tmp_path / "run", spoilt, 2)
    assert 0 < len(hit) < 3
    for line in run.metrics:
        assert [str(r["client"]) for r in line["refused"]] == hit
    assert np.isfinite(run.weights.vector).all()
    assert run.weights.vector.any()


def test_clients_who_come_late_are_counted_when_they_come(tmp_path: Path) -> None:
    """Steps of somebody whose features nobody has counted yet: they follow the gradient alone."""
    run = simulated(tmp_path / "run", tiny(), 4, called([0], [2], [2], [0, 2]))
    assert np.isfinite(run.weights.vector).all()


def test_a_model_without_sparse_examples_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sparse_logistic"):
        fd.fsvrg(fd.logistic(4, 2), step=1.0)


def test_another_model_than_the_tasks_is_refused(tmp_path: Path) -> None:
    options = fd.Settings(executor=fd.executors.debug(), progress=False, folder=tmp_path / "run")
    task, algorithm = fd.Task(fd.sparse_logistic(FEATURES)), fd.fsvrg(fd.sparse_logistic(FEATURES + 1), step=1.0)
    with pytest.raises(ConfigurationError, match="7 features, and the task trains another"):
        fd.simulate(task, algorithm, tiny(), rounds=1, settings=options)


# --- sparse rows --------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.integers(0, 20), st.floats(-5, 5, width=32).filter(bool), max_size=6), max_size=8))
def test_rows_are_filled_up_and_compressed_again(rows: list[dict[int, float]]) -> None:
    entries = [(j, x) for row in rows for j, x in sorted(row.items())]
    offsets = np.cumsum([0, *map(len, rows)])
    inputs = fd.sparse_rows([j for j, _ in entries], [x for _, x in entries], offsets=offsets)
    assert inputs[0].shape == inputs[1].shape == (len(rows), max([1, *map(len, rows)]))
    back = Compressed.of(inputs, 21)
    assert back.offsets.tolist() == offsets.tolist()
    assert list(zip(back.features.tolist(), back.values.tolist(), strict=True)) == entries


def test_a_feature_that_stands_twice_in_a_row_counts_as_the_sum() -> None:
    indices, values = np.array([[2, 2, 0]]), np.array([[1.0, 3.0, 0.0]])
    model, zero = fd.sparse_logistic(3, dtype="float64"), {"weight": np.zeros(3), "bias": np.zeros(1)}
    _, twice = model.gradient(zero, (indices, values), np.array([0]))
    _, once = model.gradient(zero, (np.array([[2]]), np.array([[4.0]])), np.array([0]))
    np.testing.assert_array_equal(twice["weight"], once["weight"])
    assert Compressed.of((indices, values), 3).values.tolist() == [4.0]


@pytest.mark.parametrize(
    ("indices", "values", "offsets", "told"),
    [
        ([1, 2], [1.0], [0, 2], "as many indices as values"),
        ([1, -2], [1.0, 1.0], [0, 2], "not from -2 to 1"),
        ([1, 2**31], [1.0, 1.0], [0, 2], "not from 1 to 2147483648"),
        ([0.5, 1.0], [1.0, 1.0], [0, 2], "whole numbers, not float64"),
        ([1, 2], [1.0, np.nan], [0, 2], "entry 1 is not finite"),
        ([1, 2], [1.0, 1.0], [0, 1], "number of entries, 2"),
        ([1, 2], [1.0, 1.0], [0, 2, 1, 2], "Offsets rise"),
        ([1, 2], [1.0, 1.0], [], "Offsets are whole numbers"),
    ],
)
def test_compressed_rows_that_cannot_be_are_refused(indices: Any, values: Any, offsets: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        fd.sparse_rows(indices, values, offsets=offsets)


# --- the model ----------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_the_sparse_model_is_the_dense_one(seed: int) -> None:
    examples, draw = tiny(seed, sizes=(9,)).train(0), np.random.default_rng(seed)
    model = fd.sparse_logistic(FEATURES, l2=L2, dtype="float64")
    w = draw.normal(size=FEATURES + 1)
    named = {"weight": w[:-1], "bias": w[-1:]}
    loss, found = model.gradient(named, examples.inputs, examples.targets)
    x, y = np.array(dense(examples)), examples.targets
    slope = 1 / (1 + np.exp(-x @ w)) - y
    want = x.T @ slope / len(y) + L2 * np.append(w[:-1], 0)
    np.testing.assert_allclose(np.append(found["weight"], found["bias"]), want, atol=1e-12)
    np.testing.assert_allclose(model.predict(named, *examples.inputs), x @ w, atol=1e-12)
    log_losses = np.logaddexp(0, x @ w) - y * (x @ w)
    assert float(loss) == pytest.approx(log_losses.mean() + L2 / 2 * np.square(w[:-1]).sum(), abs=1e-12)


def test_a_cohort_at_once_is_one_client_after_another() -> None:
    model, draw = fd.sparse_logistic(FEATURES, l2=L2, dtype="float64"), np.random.default_rng(0)
    parts = [tiny(seed, sizes=(5,)).train(0) for seed in range(3)]
    named = {"weight": draw.normal(size=(3, FEATURES)), "bias": draw.normal(size=(3, 1))}
    stacked = tuple(np.stack(arrays) for arrays in zip(*(p.inputs for p in parts), strict=True))
    losses, found = model.gradient(named, stacked, np.stack([p.targets for p in parts]))
    for i, part in enumerate(parts):
        loss, alone = model.gradient({n: a[i] for n, a in named.items()}, part.inputs, part.targets)
        assert losses[i] == pytest.approx(float(loss))
        for name in named:
            np.testing.assert_allclose(found[name][i], alone[name], atol=1e-14)


@pytest.mark.parametrize(
    ("inputs", "targets", "told"),
    [
        ((np.array([[0, 6]]), np.ones((1, 2))), [0], "Row 0 has the feature 6, and the model was made for 6"),
        ((np.array([[0], [-1]]), np.ones((2, 1))), [0, 1], "Row 1 has the feature -1"),
        ((np.array([[0, 1]]), np.ones((1, 3))), [0], r"these are \[1, 2\] and \[1, 3\]"),
        ((np.ones((1, 2)), np.array([[0, 1]])), [0], r"\(indices, values\), in this order"),
        ((np.ones((1, 6)),), [0], "these have 1"),
        ((np.array([[0]]), np.ones((1, 1))), [2], "a target of 2"),
    ],
)
def test_examples_that_do_not_fit_are_refused(inputs: Any, targets: list[int], told: str) -> None:
    model = fd.sparse_logistic(FEATURES)
    with pytest.raises(DataError, match=told):
        model.gradient({"weight": np.zeros(6), "bias": np.zeros(1)}, inputs, np.array(targets))


def test_fsvrg_refuses_them_too_and_says_so(tmp_path: Path) -> None:
    clients = Clients.of({"a": ((np.array([[9]]), np.ones((1, 1))), [1])})
    with pytest.raises(DataError, match="feature 9"):
        trained(clients, 1, tmp_path, step=1.0)


def test_clients_of_unequal_widths_do_not_go_together() -> None:
    wide, narrow = fd.sparse_rows([0, 1], [1.0, 1.0], offsets=[0, 2]), fd.sparse_rows([0], [1.0], offsets=[0, 1])
    with pytest.raises(DataError, match="examples of one shape"):
        Clients.of({"a": (wide, [0]), "b": (narrow, [1])})


# --- memory -------------------------------------------------------------------------------------------------


def test_no_array_of_examples_times_features_is_made(tmp_path: Path) -> None:
    rows, features, draw = 400, 50_000, np.random.default_rng(0)
    inputs = fd.sparse_rows(
        draw.integers(0, features, rows * 5), np.ones(rows * 5), offsets=np.arange(0, rows * 5 + 1, 5)
    )
    model, targets = fd.sparse_logistic(features, l2=1e-3), draw.integers(0, 2, rows)
    halves = {i: (tuple(a[i::2] for a in inputs), targets[i::2]) for i in range(2)}
    clients = Clients.of(halves, central_test=(inputs, targets))
    options = fd.Settings(executor=fd.executors.debug(), progress=False, folder=tmp_path / "run")
    tracemalloc.start()
    try:
        fd.simulate(fd.Task(model), fd.fsvrg(model, step=1.0), clients, rounds=2, settings=options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 * 4 * features < rows * features * 4 / 4  # some vectors, and far from [example, feature]


def test_a_pass_works_on_the_features_that_are_there() -> None:
    """One vector for the result, and nothing else that grows with the number of features."""
    features, draw = 1_000_000, np.random.default_rng(0)
    inputs = fd.sparse_rows(draw.integers(0, features, 300), np.ones(300), offsets=np.arange(0, 301, 3))
    examples = Examples.of(inputs, draw.integers(0, 2, 100))
    loss = fd.sparse_logistic(features, l2=1e-3).sparse
    assert loss is not None
    around = Around(np.zeros(features), 0.0, np.zeros(features), 0.0, np.full(features, 1e-3), 1.0)
    pass_ = partial(walk, examples, loss=loss, around=around, order=draw.permutation(100))
    tracemalloc.start()
    try:
        pass_()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4.5 * 8 * features
