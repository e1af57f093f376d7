"""The conformance suite of server optimisers: pure, checkpointed like a model, and what the paper says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from foedus.core.server import ServerOptimiser, adagrad, adam, momentum, sgd, yogi
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.record import checkpoint

MEMBERS = [
    sgd(), sgd(lr=0.3), momentum(lr=0.5, beta=0.7), adagrad(lr=0.2), adagrad(lr=0.2, beta1=0.5), adam(),
    adam(0.1, tau=0.1), yogi(), yogi(0.5, beta1=0.0, beta2=0.5),
]  # fmt: skip
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.label)
seeds = st.integers(0, 2**32)


def by_hand(label: str, weights: list[float], updates: list[list[float]]) -> list[float]:
    """Reddi et al. 2021, algorithm 2, number by number. Parameters are read off the label."""
    name, _, rest = label.rstrip(")").partition("(")
    p = {k: float(v) for k, v in (item.split("=") for item in rest.split(", "))}
    found = []
    for i, w in enumerate(weights):
        m, v = 0.0, p.get("tau", 0.0) ** 2
        for update in updates:
            d = update[i]
            if name == "sgd":
                w = w + p["lr"] * d
                continue
            if name == "momentum":
                m = p["beta"] * m + d
                w = w + p["lr"] * m
                continue
            m = p["beta1"] * m + (1 - p["beta1"]) * d
            if name == "adagrad":
                v = v + d * d
            elif name == "adam":
                v = p["beta2"] * v + (1 - p["beta2"]) * d * d
            else:
                sign = (v > d * d) - (v < d * d)
                v = v - (1 - p["beta2"]) * d * d * sign
            w = w + p["lr"] * m / (math.sqrt(v) + p["tau"])
        found.append(w)
    return found


def walk(
    member: ServerOptimiser, vector: Any, updates: Any, state: State | None = None, first: int = 1
) -> tuple[Any, State]:
    state = member.init(vector) if state is None else state
    for round, update in enumerate(updates, first):
        vector, state = member.step(state, vector, update, round)
    return vector, state


def numbers(seed: int, rounds: int, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(rounds, size)) * 10.0 ** rng.integers(-6, 2, (rounds, size))
    return rng.normal(size=size), updates * rng.choice([0, 1], (rounds, size), p=[0.1, 0.9])


@every
@given(seeds, st.integers(1, 12), st.integers(0, 5))
def test_it_is_the_algorithm_of_the_paper(member: ServerOptimiser, seed: int, rounds: int, size: int) -> None:
    vector, updates = numbers(seed, rounds, size)
    found, _ = walk(member, vector, updates)
    np.testing.assert_allclose(found, by_hand(member.label, vector.tolist(), updates.tolist()), rtol=1e-12, atol=1e-14)


@every
@given(seeds)
def test_it_is_pure(member: ServerOptimiser, seed: int) -> None:
    vector, (update, other) = numbers(seed, 2, 4)
    state = member.init(vector)
    _, state = member.step(state, vector, other, 1)
    kept = (vector.copy(), update.copy(), {n: a.copy() for n, a in state.items()})
    first = member.step(state, vector, update, 2)
    assert vector.tobytes() == kept[0].tobytes()
    assert update.tobytes() == kept[1].tobytes()
    assert {n: a.tobytes() for n, a in state.items()} == {n: a.tobytes() for n, a in kept[2].items()}
    second = member.step(state, vector, update, 2)
    assert first[0].tobytes() == second[0].tobytes()


@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_model_keeps_its_dtype_and_the_state_does_not_grow(member: ServerOptimiser, dtype: str) -> None:
    vector = np.zeros(3, dtype)
    shapes = {n: (a.shape, a.dtype) for n, a in member.init(vector).items()}
    found, state = walk(member, vector, np.ones((4, 3)))
    assert found.dtype == vector.dtype
    assert {n: (a.shape, a.dtype) for n, a in state.items()} == shapes


@every
def test_a_run_saved_and_restored_half_way_ends_with_the_same_bits(member: ServerOptimiser, tmp_path: Path) -> None:
    vector, updates = numbers(1, 8, 50)
    start = vector.astype(np.float32)
    whole, _ = walk(member, start, updates)
    half, state = walk(member, start, updates[:4])
    checkpoint.save(tmp_path / "c", checkpoint.Checkpoint({"vector": half, **state}, {}))
    arrays = checkpoint.load(tmp_path / "c").arrays
    restored = arrays.pop("vector")
    assert walk(member, restored, updates[4:], arrays, first=5)[0].tobytes() == whole.tobytes()


@every
def test_no_update_moves_nothing_at_first(member: ServerOptimiser) -> None:
    vector = np.array([1.0, -2.0], np.float32)
    assert walk(member, vector, np.zeros((1, 2)))[0].tolist() == vector.tolist()


def test_plain_averaging_ends_at_the_mean_of_the_clients() -> None:
    vector, clients = np.array([1.0, 5.0]), np.array([[2.0, 2.0], [4.0, 6.0]])
    update = (clients - vector).mean(0)
    assert walk(sgd(), vector, [update])[0].tolist() == clients.mean(0).tolist()


def test_second_moments_of_tiny_updates_do_not_underflow() -> None:
    """In float32 the square of 10⁻²³ would be 0; the state is float64 whatever the model is."""
    vector = np.zeros(1, np.float32)
    _, state = walk(adagrad(tau=1e-30), vector, np.full((3, 1), 1e-23, np.float32).astype(np.float64))
    assert state["v"][0] == pytest.approx(3e-46, rel=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: sgd(lr=0), lambda: sgd(lr=-1), lambda: sgd(lr=float("nan")), lambda: momentum(beta=1),
        lambda: adam(lr=0), lambda: adam(beta1=1.0), lambda: adam(beta2=-0.1), lambda: yogi(tau=0),
        lambda: adagrad(beta1=1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(ConfigurationError):
        build()
