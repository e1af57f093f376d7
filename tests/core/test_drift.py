"""Methods against drift, beside loops written from their papers' pseudocode, and the fixed points that they promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.core.client import LocalSGD
from foedus.core.drift import averaged_momentum, feddyn, fednova, grown, mime_lite, scaffold, stretch
from foedus.core.method import Gathered, averaging
from foedus.core.values import State
from foedus.errors import ConfigurationError

from .oracle import (
    COUNT,
    DATA,
    FEATURES,
    SHARES,
    SIZES,
    TASK,
    Floats,
    batches,
    cohort,
    descended,
    final,
    gradient,
    optimum,
    steps,
)

ROUNDS = 7
RAGGED = fd.local_sgd(lr=lambda r: 0.05 / r, epochs=2, batch_size=4)  # 6, 2, 6, 4 and 6 steps
LONG = fd.local_sgd(lr=0.1, steps=20, batch_size=None)
START = np.zeros(FEATURES + 1)


def averaged(chosen: list[int], vectors: list[Floats], weights: Floats) -> Floats:
    return np.average(vectors, axis=0, weights=weights[chosen])


def weights_of(weighted: bool) -> Floats:
    return np.array(SIZES, float) if weighted else np.ones(COUNT)


def agree(found: Floats, wanted: Floats) -> None:
    assert np.linalg.norm(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------


def by_scaffold(spec: LocalSGD, size: int, *, option: int, weights: Floats, lr: float = 1.0) -> Floats:
    """Algorithm 1. With unequal weights fᵢ is N pᵢ fᵢ: the server's c is the weighted mean of the clients', where
    those not seen have 0 and p is known as far as clients were seen."""
    x, own = START, {}
    for t in range(1, ROUNDS + 1):
        chosen = cohort(size, t)
        known = np.mean(weights[list(own)]) if own else 1.0
        c = sum((weights[i] * ci for i, ci in own.items()), START) / (COUNT * known)
        moved = []
        for i in chosen:
            before = own.get(i, START)
            y = descended(spec, i, t, x, phase=int(option == 1), shift=c - before)
            after = gradient(i, x) if option == 1 else before - c + (x - y) / (steps(spec, i) * spec.rate(t))
            moved.append((i, y, after))
        own |= {i: after for i, _, after in moved}
        x = x + lr * averaged(chosen, [y - x for _, y, _ in moved], weights)
    return x


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("size", [2, COUNT])
def test_scaffold_is_its_papers_loop(size: int, option: int, weighted: bool) -> None:
    algorithm = scaffold(RAGGED, full_gradient=option == 1, weighted=weighted, server=fd.sgd(lr=0.7))
    wanted = by_scaffold(RAGGED, size, option=option, weights=weights_of(weighted), lr=0.7)
    agree(final(algorithm, rounds=ROUNDS, size=size), wanted)


def test_unweighted_scaffold_keeps_c_at_the_mean_over_all_clients() -> None:
    """The paper's c ← c + |S|/N mean(Δcᵢ) in so many words."""
    x, c, own = START, START, np.zeros((COUNT, FEATURES + 1))
    for t in range(1, ROUNDS + 1):
        chosen = cohort(2, t)
        ys = [descended(RAGGED, i, t, x, shift=c - own[i]) for i in chosen]
        new = np.array(
            [own[i] - c + (x - y) / (steps(RAGGED, i) * RAGGED.rate(t)) for i, y in zip(chosen, ys, strict=True)]
        )
        c = c + len(chosen) / COUNT * (new - own[chosen]).mean(0)
        own[chosen] = new
        x = x + (np.array(ys) - x).mean(0)
    agree(final(scaffold(RAGGED, weighted=False), rounds=ROUNDS, size=2), x)


# --- FedDyn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, COUNT])
def test_feddyn_is_its_papers_loop(size: int) -> None:
    """Algorithm 1, its argmin by local SGD."""
    alpha, theta, h, own = 0.3, START, START, np.zeros((COUNT, FEATURES + 1))
    for t in range(1, ROUNDS + 1):
        chosen = cohort(size, t)
        ends = [descended(RAGGED, i, t, theta, shift=-own[i], mu=alpha, anchor=theta) for i in chosen]
        for i, end in zip(chosen, ends, strict=True):
            own[i] = own[i] - alpha * (end - theta)
        h = h - alpha / COUNT * sum(end - theta for end in ends)
        theta = np.mean(ends, axis=0) - h / alpha
    agree(final(feddyn(RAGGED, alpha=alpha, weighted=False), rounds=ROUNDS, size=size), theta)


def test_feddyn_with_weights_keeps_h_at_the_weighted_mean_of_the_clients_gradients() -> None:
    alpha, theta, own = 0.3, START, {}
    weights = np.array(SIZES, float)
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        ends = [descended(RAGGED, i, t, theta, shift=-own.get(i, START), mu=alpha, anchor=theta) for i in chosen]
        own |= {i: own.get(i, START) - alpha * (end - theta) for i, end in zip(chosen, ends, strict=True)}
        h = sum(weights[i] * g for i, g in own.items()) / (COUNT * np.mean(weights[list(own)]))
        theta = averaged(chosen, ends, weights) - h / alpha
    agree(final(feddyn(RAGGED, alpha=alpha), rounds=ROUNDS, size=3), theta)


def test_feddyn_adds_its_penalty_to_one_that_is_there() -> None:
    spec = fd.local_sgd(lr=0.05, steps=3, batch_size=None, penalty=fd.proximal(0.2))
    algorithm = feddyn(spec, alpha=0.3)
    assert algorithm.client.penalty is not None
    w = np.array([1.0, 2.0])
    assert float(algorithm.client.penalty.value(w, 0 * w)) == pytest.approx(0.25 * 5)
    np.testing.assert_allclose(algorithm.client.penalty.gradient(w, 0 * w), 0.5 * w)
    assert "proximal(0.2) + proximal(0.3)" in algorithm.label


# --- FedNova ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.4)])
def test_fednova_is_its_papers_loop(momentum: float, mu: float) -> None:
    """x ← x − (Σ pᵢ ‖aᵢ‖₁) Σ pᵢ (x − yᵢ) / ‖aᵢ‖₁, with the paper's closed forms of ‖aᵢ‖₁ (section 3)."""
    penalty = fd.proximal(mu) if mu else None
    spec = fd.local_sgd(lr=0.05, epochs=2, batch_size=4, momentum=momentum, penalty=penalty)

    def length(i: int) -> float:
        tau = steps(spec, i)
        if mu:
            return (1 - (1 - 0.05 * mu) ** tau) / (0.05 * mu)
        return (tau - momentum * (1 - momentum**tau) / (1 - momentum)) / (1 - momentum)

    x = START
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        p = np.array(SIZES)[chosen] / np.array(SIZES)[chosen].sum()
        ends = [descended(spec, i, t, x, mu=mu, anchor=x) for i in chosen]
        lengths = np.array([length(i) for i in chosen])
        x = x + (p @ lengths) * (p / lengths) @ (np.array(ends) - x)
    agree(final(fednova(spec), rounds=ROUNDS, size=3), x)


def test_the_length_of_steps_is_the_sum_of_the_coefficients_of_their_gradients() -> None:
    """With momentum and a penalty at once, by feeding one gradient at a time."""
    spec = fd.local_sgd(lr=0.1, steps=6, momentum=0.7, penalty=fd.proximal(0.5), weight_decay=0.3, clip_norm=0.01)
    total = 0.0
    for which in range(6):
        y = memory = 0.0
        for k in range(6):
            memory = 0.7 * memory + (k == which) + 0.5 * y
            y -= 0.1 * memory
        total += -y / 0.1
    assert stretch(spec, 6, 0.1) == pytest.approx(total, rel=1e-12)
    assert stretch(spec, 6, 0.0) == 6.0


def test_fednova_of_equal_steps_is_federated_averaging() -> None:
    agree(final(fednova(LONG), rounds=4), final(fd.fedavg(LONG), rounds=4))


# --- MimeLite ---------------------------------------------------------------------------------------------------


def test_mime_lite_is_its_papers_loop() -> None:
    """Algorithm 1, MimeLite, with SGDm: y ← y − η ((1 − β) ∇f(y) + β m), m ← (1 − β) mean ∇fᵢ(x) + β m."""
    x = m = START
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        ends = [descended(RAGGED, i, t, x, phase=1, shift=0.8 / 0.2 * m, scale=0.2) for i in chosen]
        m = 0.2 * averaged(chosen, [gradient(i, x) for i in chosen], np.ones(COUNT)) + 0.8 * m
        x = np.mean(ends, axis=0)
    agree(final(mime_lite(RAGGED, beta=0.8, weighted=False), rounds=ROUNDS, size=3), x)


# --- averaged momentum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_averaged_momentum_is_its_papers_loop(weighted: bool) -> None:
    """Algorithm 1, option I: u ← β u + g, x ← x − γ u in every client; then both are averaged."""
    spec = fd.local_sgd(lr=lambda r: 0.05 / r, epochs=2, batch_size=4, momentum=0.7)
    x = u = START
    for t in range(1, ROUNDS + 1):
        chosen, models, momenta = cohort(3, t), [], []
        for i in chosen:
            y, own = x, u
            for rows in batches(spec, i, t):
                own = 0.7 * own + gradient(i, y, rows)
                y = y - spec.rate(t) * own
            models.append(y)
            momenta.append(own)
        x, u = (averaged(chosen, found, weights_of(weighted)) for found in (models, momenta))
    agree(final(averaged_momentum(spec, weighted=weighted), rounds=ROUNDS, size=3), x)


def test_one_step_of_everybody_is_momentum_on_all_data() -> None:
    """Which momentum that every client begins anew is not."""
    spec = fd.local_sgd(lr=0.05, steps=1, batch_size=None, momentum=0.8)
    x = u = START
    for _ in range(ROUNDS):
        u = 0.8 * u + sum(p * gradient(i, x) for i, p in enumerate(SHARES))
        x = x - 0.05 * u
    agree(final(averaged_momentum(spec), rounds=ROUNDS), x)
    assert np.linalg.norm(final(fd.fedavg(spec), rounds=ROUNDS) - x) > 0.1


def test_without_momentum_there_is_none_to_average() -> None:
    with pytest.raises(ConfigurationError, match=r"local_sgd\(..., momentum=0.9\)"):
        averaged_momentum(fd.local_sgd(lr=0.1))


# --- fixed points -----------------------------------------------------------------------------------------------


def apart(algorithm: fd.Algorithm, rounds: int, best: Floats) -> float:
    return float(np.linalg.norm(final(algorithm, rounds=rounds, executor=fd.executors.vectorised()) - best))


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("method", [scaffold, feddyn])
def test_the_optimum_of_all_is_where_local_training_stays(method: Callable[..., fd.Algorithm], weighted: bool) -> None:
    best = optimum(SHARES if weighted else np.full(COUNT, 1 / COUNT))
    assert apart(method(LONG, weighted=weighted), 150, best) < 1e-4
    assert apart(fd.fedavg(LONG, aggregator=fd.mean(weighted=weighted)), 150, best) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", [scaffold, feddyn])
def test_with_few_clients_a_round_and_unequal_sizes_it_stays_there_too(method: Callable[..., fd.Algorithm]) -> None:
    found = final(method(fd.local_sgd(lr=0.05, steps=10, batch_size=None)), rounds=700, size=3)
    assert np.linalg.norm(found - optimum()) < 1e-5


@pytest.mark.slow
def test_fednovas_fixed_point_with_unequal_steps_is_the_optimum() -> None:
    """Up to drift within a round, which goes with the learning rate; federated averaging's stays where it is."""
    slow, fast = (fd.local_sgd(lr=lr, epochs=1, batch_size=1) for lr in (1e-4, 4e-4))  # 12, 3, 9, 6 and 10 steps

    def ahead(spec: LocalSGD) -> fd.Algorithm:
        """Longer steps of the server have the same fixed point."""
        return fednova(spec, server=fd.sgd(lr=0.04 / spec.rate(1)))

    nova = [apart(ahead(spec), 300, optimum()) for spec in (slow, fast)]
    plain = apart(fd.fedavg(slow, server=fd.sgd(lr=400.0)), 300, optimum())
    assert nova[0] < 0.3 * nova[1] < 0.001
    assert plain > 500 * nova[0]


# --- populations that change ------------------------------------------------------------------------------------


def test_the_population_is_that_of_the_round(tmp_path: Path) -> None:
    """Data arrives over rounds: two clients have some at first, and all five from the third on."""

    def at(number: int) -> fd.Clients:
        own = [x if i < 2 or number > 2 else (x[0][:0], x[1][:0]) for i, x in enumerate(DATA)]
        return fd.Clients.generated(lambda i: own[i], COUNT, sizes=[len(y) for _, y in own])

    seen: list[int] = []

    def finish(gathered: Gathered) -> tuple[Floats | None, State]:
        seen.append(gathered.population)
        return gathered.update, gathered.state

    algorithm = fd.Algorithm(client=LONG, method=averaging()._replace(finish=finish))
    settings = fd.Settings(folder=tmp_path / "run", executor=fd.executors.debug(), progress=False)
    fd.simulate(TASK, algorithm, fd.Clients.streamed(at), rounds=4, settings=settings)
    assert seen == [2, 2, 5, 5]


@pytest.mark.parametrize("population", [10, 25])
def test_a_sum_over_all_clients_survives_that_there_are_more(population: int) -> None:
    """Σ nᵢ vᵢ over N · n̄ before, of 10 clients; what the round brings is added to the sum itself."""
    seen, kept, brought = np.array([30.0, 3.0, 10.0]), np.array([0.5, -2.0]), np.array([1.0, 4.0])
    sides = {"sizes": np.array([12.0, 2.0, 0.5])}  # means over two senders: Σ n = 24, of whom one of 4 is new
    gathered = Gathered({"seen": seen}, kept, brought, sides, 2, population, 4, 0.1)
    found = grown(gathered)
    assert found.seen.tolist() == [30 + 2 * 2, 3 + 1, population]
    np.testing.assert_allclose(found.summed(kept, brought) * population * 34 / 4, kept * 10 * 10 + brought * 24)


# --- what they refuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [scaffold, feddyn, fednova, mime_lite, averaged_momentum])
def test_steps_of_the_users_own_cannot_be_corrected(method: Callable[..., fd.Algorithm]) -> None:
    with pytest.raises(ConfigurationError, match=r"local_training.*steps of its own"):
        method(fd.local_training(optimiser=lambda p: p))


@pytest.mark.slow
def test_a_rate_of_nothing_changes_nothing() -> None:
    still = fd.local_sgd(lr=lambda r: 0.05 * (r < 3), epochs=1, batch_size=4)
    for algorithm in (scaffold(still), fednova(still), mime_lite(still)):
        agree(final(algorithm, rounds=5), final(algorithm, rounds=2))
