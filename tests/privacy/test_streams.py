"""Noise that hangs together over rounds: what it adds up to, what one client can change, and what it is worth."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

import foedus as fd
from foedus.core.aggregate import Aggregator, fold, nothing
from foedus.core.values import SERVER, Context, State, Update
from foedus.errors import BudgetSpent, ConfigurationError, IncompatibleStages, NoGuarantee, SumOverflow
from foedus.privacy.accounting import pld, rdp
from foedus.privacy.blt import _error as blt_error
from foedus.privacy.blt import buffered_toeplitz, parameters
from foedus.privacy.claims import round_event
from foedus.privacy.events import BandedStream, Gaussian, Stream, ToeplitzStream, Tree, TreeStream, as_json, of_json
from foedus.privacy.ledger import Budget, Ledger, allows, charged, spent
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.privacy.strategies import UNIT, Strategy, _error, banded, coefficients, noise_matrix, prefix_error, tree
from foedus.privacy.streams import correlated
from foedus.tree import Layout

STRATEGIES = [
    banded(9, separation=3),
    banded(9, separation=9),
    banded(9, separation=4, bands=1),
    tree(9),
    tree(9, separation=2),
    buffered_toeplitz(9, separation=3, buffers=2),
    buffered_toeplitz(9),
]
any_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.label)


LONG = 1 << 20  # a sum that is so long is rounded by next to nothing of itself


def matrix(strategy: Strategy) -> NDArray[np.float64]:
    """Row by row, how sums enter what gets noise [round, round]."""
    count = strategy.rounds
    state, rows = strategy.first(count), []
    for round in range(1, count + 1):
        total = np.zeros(count, np.int64)
        total[round - 1] = LONG
        row, state = strategy.noised(state, round, total)
        rows.append(row)
    return np.array(rows) / LONG


# --- strategies ---------------------------------------------------------------------------------------------


@any_strategy
def test_what_gets_noise_gives_back_every_sum(strategy: Strategy) -> None:
    """What is released is the inverse of what gets noise."""
    both = noise_matrix(strategy) @ (matrix(strategy) / strategy.unit)
    np.testing.assert_allclose(both, np.eye(9), atol=1e-8)


@any_strategy
def test_no_pattern_of_participations_changes_more_than_claimed(strategy: Strategy) -> None:
    """All patterns that keep their distance, with contributions that all point the same way: the worst there is for
    matrices without negative numbers."""
    whole = matrix(strategy)
    assert (whole >= 0).all()
    worst = 0.0
    for mask in range(1, 2**9):
        rounds = [i for i in range(9) if mask >> i & 1]
        if all(b - a >= strategy.separation for a, b in itertools.pairwise(rounds)):
            worst = max(worst, float((whole[:, rounds].sum(1) ** 2).sum()))
    assert worst <= strategy.squared * (1 + 1e-12)
    assert worst >= 0.55 * strategy.squared, "and not far from it"


@pytest.mark.parametrize("event", [TreeStream(1.0, 40, 7), TreeStream(1.0, 40, 40), TreeStream(1.0, 33, 1)])
def test_a_trees_first_rounds_change_no_more_than_claimed(event: TreeStream) -> None:
    """Clients that come in every separation-th round, for every number of rounds."""
    for rounds in range(1, event.rounds + 1):
        for first in range(1, event.separation + 1):
            came = set(range(first, rounds + 1, event.separation))
            blocks = [(t - (t & -t), t) for t in range(1, rounds + 1)]
            change = sum(len([r for r in came if begin < r <= end]) ** 2 for begin, end in blocks)
            assert change <= event.squared(rounds)


def test_the_gradient_of_the_error_is_its_slope() -> None:
    at, small = np.array([0.6, 0.5, 0.1]), 1e-6
    slopes = [(_error(at + small * e, 40)[0] - _error(at - small * e, 40)[0]) / (2 * small) for e in np.eye(3)]
    np.testing.assert_allclose(_error(at, 40)[1], slopes, rtol=1e-5)


def test_no_other_two_bands_are_better() -> None:
    def by_matrix(second: float) -> float:
        c = np.eye(12) + second * np.eye(12, k=-1)
        return (1 + second**2) * float((np.tril(np.ones((12, 12))) @ np.linalg.inv(c)).__pow__(2).sum())

    tried = np.arange(0, 1, 1e-3)
    assert coefficients(12, 2)[1] / UNIT == pytest.approx(tried[np.argmin([by_matrix(x) for x in tried])], abs=2e-3)


@pytest.mark.parametrize(
    ("rounds", "bands", "first", "loss"),
    [
        (20, 5, [0.551775, 0.421911, 0.34477, 0.285481], 4.005355710596639),
        (100, 3, [0.739454, 0.622031], 19.131850611600626),
        (100, 10, [0.591506, 0.486507, 0.430474, 0.392285], 8.681873898575267),
        (200, 32, [0.533118, 0.417644, 0.359943, 0.32367], 8.281206009360613),
    ],
)
def test_bands_are_those_that_jax_privacy_finds(rounds: int, bands: int, first: list[float], loss: float) -> None:
    """By ``optimize_banded_toeplitz`` of jax-privacy 2.0.0, float64: the numbers after the leading 1, and the loss."""
    found = np.array(coefficients(rounds, bands)) / UNIT
    np.testing.assert_allclose(found[1:5], first, atol=2e-5)
    assert math.exp(_error(found[1:], rounds)[0]) / rounds == pytest.approx(loss, rel=1e-8)


def test_more_bands_leave_less_noise_and_less_than_a_tree() -> None:
    errors = [prefix_error(banded(64, separation=64, bands=n)) for n in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(math.sqrt(65 / 2))
    assert errors[-1] < 0.55 * prefix_error(tree(64))
    sums = np.linalg.svd(np.tril(np.ones((64, 64))), compute_uv=False)
    assert float(sums.sum()) / 64 <= errors[-1], "the least that any factorisation leaves: the mean singular value"


# --- buffers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "buffers", "decays", "scales", "loss"),
    [
        (100, 2, [0.97102964, 0.66227434], [0.21535641, 0.27949744], 5.386033560947417),
        (100, 3, [0.97259478, 0.76978826, 0.3066942], [0.20172516, 0.19646869, 0.10654805], 5.382563493494014),
        (300, 2, [0.9891129, 0.78798034], [0.1428532, 0.32426888], 7.148759728688837),
    ],
)
def test_buffers_are_those_that_jax_privacy_finds(
    rounds: int, buffers: int, decays: list[float], scales: list[float], loss: float
) -> None:
    """By ``optimize_loss`` of jax-privacy 2.0.0 for the mean error and one participation: θ, ω and the loss."""
    omegas, thetas = parameters(rounds, rounds, buffers)
    found = math.exp(blt_error(np.array(omegas), np.array(thetas), rounds, rounds)) / rounds
    assert found == pytest.approx(loss, rel=1e-5)
    assert found == pytest.approx(
        math.exp(blt_error(np.array(scales), np.array(decays), rounds, rounds)) / rounds, rel=1e-5
    )
    if buffers == 2:  # with three, many are as good
        np.testing.assert_allclose(thetas, decays, rtol=2e-3)
        np.testing.assert_allclose(omegas, scales, rtol=1e-2)


def test_few_buffers_are_within_a_hundredth_of_all_diagonals_and_far_better_than_bands() -> None:
    best, bands = (prefix_error(banded(200, separation=200, bands=n)) for n in (200, 32))
    found = prefix_error(buffered_toeplitz(200))
    assert best < found < 1.01 * best
    assert found < 0.9 * bands


@given(st.integers(0, 2**32), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_one_client_changes_no_more_of_rounded_sums_than_claimed(seed: int, separation: int) -> None:
    """Two runs that differ by one client's contributions, each as long as the bound and of any direction, on as coarse
    a grid as there is: what gets noise differs by no more than is accounted for."""
    rng, size = np.random.default_rng(seed), 16
    strategy = buffered_toeplitz(9, separation=separation, buffers=2)
    reach = 64 * math.sqrt(size)  # steps: the fewest that the grid leaves
    others, states = rng.integers(-5000, 5000, (9, size)), [strategy.first(size)] * 2
    direction, changed = rng.normal(size=size), 0.0
    for round in range(1, 10):
        if rng.random() < 0.5:
            direction = rng.normal(size=size)
        own = np.trunc(direction / np.linalg.norm(direction) * reach).astype(np.int64) * ((round - 1) % separation == 0)
        both = []
        for i, total in enumerate((others[round - 1], others[round - 1] + own)):
            noised, states[i] = strategy.noised(states[i], round, total)
            both.append(noised)
        changed += float(((both[1] - both[0]) ** 2).sum())
    assert changed <= strategy.squared * reach**2


@pytest.mark.parametrize("separation", [1, 2, 4, 9])
def test_the_first_rounds_of_buffers_cost_what_their_rows_say(separation: int) -> None:
    strategy = buffered_toeplitz(9, separation=separation, buffers=2)
    event, rows = strategy.event(2.0), matrix(strategy) / strategy.unit
    assert isinstance(event, ToeplitzStream)
    for rounds in range(1, 10):
        came = rows[:rounds, 0:rounds:separation].sum(1)
        assert event.squared(rounds) == pytest.approx(float(came @ came), rel=1e-6)
    assert event.after(9) == pytest.approx(2.0)


def test_diagonals_that_do_not_decrease_and_sums_that_are_too_long_are_refused() -> None:
    for omegas, thetas in (((0.6, 0.6), (0.9, 0.5)), ((0.5,), (1.0,)), ((-0.1,), (0.5,)), ((0.5,), (0.5, 0.5))):
        with pytest.raises(NoGuarantee, match="decrease"):
            ToeplitzStream(1.0, 9, 9, omegas, thetas)
    strategy = buffered_toeplitz(9)
    with pytest.raises(SumOverflow, match="too long for 3 buffers"):
        strategy.noised(strategy.first(2), 1, np.array([0, 1 << 45]))


# --- what the server makes of it ----------------------------------------------------------------------------


def run(rule: Aggregator, vectors: list[NDArray[Any] | None], seed: int = 5) -> list[NDArray[Any]]:
    """What is used in each round, of one client's contribution or of nobody's."""
    size = next(len(v) for v in vectors if v is not None)
    state: State = rule.init(Layout(("p",), ((size,),), ("float64",)))
    found = []
    for round, vector in enumerate(vectors, 1):
        context = Context(seed, round, SERVER, size=size, secret=known_to_all_who_know_the_seed)
        message = nothing(rule, context) if vector is None else fold(rule, [rule.encode(Update(vector, 1.0), context)])
        assert message is not None
        update, state = rule.decode(state, message, context)
        found.append(update)
    return found


@any_strategy
@given(st.integers(0, 2**32))
@settings(max_examples=10)
def test_what_is_used_is_each_rounds_mean_and_noise(strategy: Strategy, seed: int) -> None:
    """The noise is the same with and without clients: the difference is what they sent, to the grid."""
    rng = np.random.default_rng(seed)
    rule = correlated(strategy, clip=1.0, noise_multiplier=2.0, cohort=4)
    vectors: list[NDArray[Any] | None] = [None if rng.random() < 0.3 else rng.normal(size=3) / 9 for _ in range(9)]
    with_them, without = run(rule, [*vectors[:-1], np.zeros(3)]), run(rule, [np.zeros(3)] * 9)
    for sent, a, b in zip([*vectors[:-1], None], with_them, without, strict=True):
        np.testing.assert_allclose(a - b, np.zeros(3) if sent is None else sent / 4, atol=2e-3)


@any_strategy
def test_the_noise_of_running_sums_is_as_much_as_foretold(strategy: Strategy) -> None:
    rule = correlated(strategy, clip=0.5, noise_multiplier=2.0, cohort=4)
    sums = np.cumsum(run(rule, [np.zeros(20_000)] * 9), 0)
    foretold = np.cumsum(noise_matrix(strategy), 0)
    scale = 0.5 * 2.0 * math.sqrt(strategy.squared) / strategy.unit / 4
    np.testing.assert_allclose(np.std(sums, axis=1), scale * np.sqrt((foretold**2).sum(1)), rtol=0.03)
    assert math.sqrt(np.mean(np.var(sums, axis=1))) == pytest.approx(prefix_error(strategy) * 0.5 * 2.0 / 4, rel=0.02)


@any_strategy
def test_rounds_left_out_pass_as_rounds_of_nobody(strategy: Strategy) -> None:
    rule = correlated(strategy, clip=0.5, noise_multiplier=2.0, cohort=4)
    whole = run(rule, [np.ones(5), None, None, np.ones(5)])
    context = Context(5, 4, SERVER, size=5, secret=known_to_all_who_know_the_seed)
    state = rule.init(Layout(("p",), ((5,),), ("float64",)))
    message = rule.encode(Update(np.ones(5), 1.0), context)
    _, state = rule.decode(state, message, context._replace(round=1))
    update, state = rule.decode(state, message, context)
    np.testing.assert_allclose(update, np.sum(whole[1:], 0), atol=1e-12)
    with pytest.raises(NoGuarantee, match=r"round 4 comes after round 4"):
        rule.decode(state, message, context)
    with pytest.raises(NoGuarantee, match=r"planned for 9 rounds"):
        rule.decode(state, message, context._replace(round=10))


# --- what it is worth ---------------------------------------------------------------------------------------


def test_the_row_of_tree_aggregation_comes_out() -> None:
    """z = 7 for every node, 2000 steps, δ = 10⁻⁶: by the library's own event, and by a stream's last round."""
    assert rdp([(Tree(7.0, 2000), 1)], 1e-6) == pytest.approx(2.281, abs=5e-4)
    assert rdp([(TreeStream(7.0, 2000, 2000), 2000)], 1e-6) == pytest.approx(2.281, abs=5e-4)


@any_strategy
def test_a_whole_run_is_one_gaussian_release(strategy: Strategy) -> None:
    event = correlated(strategy, clip=1.0, noise_multiplier=2.0, cohort=4).event
    assert isinstance(event, Stream)
    assert event.after(9) == pytest.approx(2.0)
    assert rdp([(event, 9)], 1e-5) == pytest.approx(rdp([(Gaussian(2.0), 1)], 1e-5))
    assert pld([(event, 9)], 1e-5) == pytest.approx(pld([(Gaussian(2.0), 1)], 1e-5))
    costs = [rdp([(event, n)], 1e-5) for n in range(1, 10)]
    assert costs == sorted(costs)
    assert of_json(as_json(event)) == event
    with pytest.raises(NoGuarantee, match="up to 9 rounds"):
        rdp([(event, 10)], 1e-5)


def test_a_ledger_counts_a_streams_rounds_and_no_second_attempt() -> None:
    event = BandedStream(8.0, rounds=8, separation=4)
    budget = Budget(epsilon=rdp([(event, 4)], 1e-5) * 1.01, delta=1e-5)
    ledger = charged(Ledger(), event, round=2, budget=budget)
    assert ledger.counts == ((event, 2),), "round 1 passed as one of nobody"
    assert charged(ledger, event, round=2) == ledger
    with pytest.raises(NoGuarantee, match="a second attempt"):
        charged(ledger, event, round=2, release="again")
    ledger = charged(ledger, event, round=4, budget=budget)
    assert not allows(ledger, event, budget), "from round 5 on clients may have come twice"
    with pytest.raises(BudgetSpent):
        charged(ledger, event, round=5, budget=budget)
    assert spent(charged(ledger, event, round=8), 1e-5) == rdp([(event, 8)], 1e-5)
    assert not allows(Ledger(), event, Budget(epsilon=99.0, delta=1e-5), round=9)


# --- refusals -----------------------------------------------------------------------------------------------

RULE = correlated(banded(20, separation=5), clip=1.0, noise_multiplier=2.0, cohort=4)


def test_only_samplers_that_keep_their_distance_are_taken() -> None:
    algorithm = fd.fedavg(fd.local_sgd(lr=0.1), aggregator=RULE)
    assert round_event(algorithm, fd.spaced(4, separation=5)) == RULE.event
    assert round_event(algorithm, fd.spaced(4, separation=9)) == RULE.event
    for sampler in (fd.spaced(4, separation=4), fd.uniform(4), fd.poisson(0.1)):
        with pytest.raises(NoGuarantee, match=r"foedus.spaced\(clients, separation=5\)"):
            round_event(algorithm, sampler)
    with pytest.raises(NoGuarantee):
        round_event(algorithm, fd.spaced(4, separation=5), hidden=True)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(IncompatibleStages, match=r"rotate\(\) is undone after it"):
        fd.chain(fd.rotate(), RULE)
    assert fd.chain(fd.clip(3.0), fd.quantise(8), RULE).event == RULE.event
    with pytest.raises(ConfigurationError, match="bands=5, or less"):
        banded(20, separation=5, bands=6)
    with pytest.raises(ConfigurationError, match="takes a strategy"):
        correlated(3, clip=1.0, noise_multiplier=1.0, cohort=4)  # type: ignore[arg-type]
