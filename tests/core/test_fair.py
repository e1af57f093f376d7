"""Fair methods beside loops written from their papers' pseudocode, and what they promise: the worst served gain."""

from __future__ import annotations

import numpy as np
import pytest

import foedus as fd
from foedus.core.fair import afl, qfedavg
from foedus.errors import ConfigurationError

from .oracle import COUNT, FEATURES, SIZES, Floats, cohort, descended, final, loss, simulated

ROUNDS = 6
RAGGED = fd.local_sgd(lr=lambda r: 0.05 / r, epochs=2, batch_size=4)
START = np.zeros(FEATURES + 1)


def agree(found: Floats, wanted: Floats) -> None:
    assert np.linalg.norm(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_qfedavg_is_its_papers_loop(q: float, weighted: bool) -> None:
    """Algorithm 2: Δ = F^q L (w − wᵢ), h = q F^(q−1) ‖L (w − wᵢ)‖² + L F^q, w ← w − Σ Δ / Σ h."""
    w, weights = START, np.array(SIZES, float) if weighted else np.ones(COUNT)
    for t in range(1, ROUNDS + 1):
        top, bottom = START, 0.0
        for i in cohort(3, t):
            steep, before = 1 / RAGGED.rate(t), loss(i, w)
            difference = steep * (w - descended(RAGGED, i, t, w))
            top = top + weights[i] * before**q * difference
            bottom += weights[i] * (q * before ** (q - 1) * difference @ difference + steep * before**q)
        w = w - top / bottom
    agree(final(qfedavg(RAGGED, q=q, weighted=weighted), rounds=ROUNDS, size=3), w)


def test_qfedavg_without_q_is_federated_averaging() -> None:
    agree(final(qfedavg(RAGGED, q=0.0), rounds=3), final(fd.fedavg(RAGGED), rounds=3))


def test_qfedavg_needs_a_learning_rate() -> None:
    with pytest.raises(ConfigurationError, match=r"divides by the learning rate, which is 0.0 in round 1"):
        final(qfedavg(fd.local_sgd(lr=0.0)), rounds=1)


@pytest.mark.parametrize("domains", [list(range(COUNT)), [0, 1, 0, 2, 1]])
def test_agnostic_averaging_is_its_papers_loop(domains: list[int]) -> None:
    """Clients' updates by the weight of their domain over its examples; λ ← λ exp(γ loss) / Σ over domains' losses."""
    count, where = max(domains) + 1, np.array(domains)
    w, lam, losses, examples = START, np.full(count, 1 / count), np.zeros(count), np.ones(count)
    for t in range(1, ROUNDS + 1):
        chosen = cohort(3, t)
        ends = [descended(RAGGED, i, t, w) for i in chosen]
        weights = [SIZES[i] * lam[where[i]] / examples[where[i]] for i in chosen]
        for d in {where[i] for i in chosen}:
            members = [i for i in chosen if where[i] == d]
            examples[d] = sum(SIZES[i] for i in members)
            losses[d] = sum(SIZES[i] * loss(i, w) for i in members) / examples[d]
        lam = lam * np.exp(0.2 * losses)
        lam = lam / lam.sum()
        w = np.average(ends, axis=0, weights=weights)
    # sums count weights in units of 2⁻²⁰
    np.testing.assert_allclose(final(afl(RAGGED, domains=domains, step=0.2), rounds=ROUNDS, size=3), w, atol=1e-5)


@pytest.mark.slow
def test_both_serve_the_worst_client_better_than_federated_averaging() -> None:
    spec = fd.local_sgd(lr=0.05, steps=5, batch_size=None)
    fast = fd.executors.vectorised()
    rules = [fd.fedavg(spec), qfedavg(spec, q=2.0), afl(spec, domains=range(COUNT), step=0.1)]
    models = [final(rule, rounds=60, executor=fast) for rule in rules]
    plain, fair, agnostic = (max(loss(i, w) for i in range(COUNT)) for w in models)
    assert fair < 0.92 * plain
    assert agnostic < 0.88 * plain


def test_domains_are_one_for_every_client() -> None:
    with pytest.raises(ConfigurationError, match="domains of 2 clients, and there are 5"):
        simulated(afl(RAGGED, domains=[0, 1]), rounds=1)
    with pytest.raises(ConfigurationError, match="every client, and the list is empty"):
        afl(RAGGED, domains=[])
    with pytest.raises(ConfigurationError, match=r"a domain must be a whole number.*not 0.5"):
        afl(RAGGED, domains=[0.5])  # type: ignore[list-item]
