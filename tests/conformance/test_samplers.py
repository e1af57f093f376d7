"""The conformance suite of samplers: counted, without repeats, of the law they claim, and cheap where they can be."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from foedus.core.select import Population, Sampler, always, available, by_data, everybody, poisson, spaced, uniform
from foedus.errors import ConfigurationError


def odd(round: int) -> Any:
    return np.arange(round % 2, 40, 2)


MEMBERS = [everybody(), uniform(1), uniform(5), poisson(0.3), poisson(1.0), by_data(4), available(odd, uniform(5)),
           available(odd, poisson(0.5)), available(odd, everybody()), available(odd, uniform(30)),
           spaced(5, separation=7), spaced(1, separation=40), spaced(40, separation=1),
           always([3, 17, 4], uniform(5)), always([39], by_data(4)), always([], poisson(0.3))]  # fmt: skip
every = pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.label)

POPULATION = Population(40, np.arange(40) % 7 + 1)
TRIALS = 4000
ALPHA = 1e-3  # of a false alarm; seeds are fixed, so that there is none


@every
@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_positions_are_different_in_order_and_in_the_population(member: Sampler, seed: int, round: int) -> None:
    found = member.sample(POPULATION, seed, round)
    assert found.dtype == np.int64
    assert found.ndim == 1
    assert (np.diff(found) > 0).all()
    assert all(0 <= p < POPULATION.count for p in found.tolist())


@every
@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_the_same_seed_and_round_give_the_same_cohort(member: Sampler, seed: int, round: int) -> None:
    assert member.sample(POPULATION, seed, round).tolist() == member.sample(POPULATION, seed, round).tolist()


@pytest.mark.parametrize("member", [uniform(5), poisson(0.3), by_data(4)], ids=lambda m: m.label)
def test_rounds_and_seeds_draw_different_cohorts(member: Sampler) -> None:
    cohorts = {tuple(member.sample(POPULATION, seed, round)) for seed in range(5) for round in range(1, 21)}
    assert len(cohorts) > 95


@every
def test_cohorts_are_as_large_as_expected_on_average(member: Sampler) -> None:
    sizes = [len(member.sample(POPULATION, 1, round)) for round in range(1, 401)]
    if not member.label.startswith("available"):  # what is planned is a matter of the whole population
        assert np.mean(sizes) == pytest.approx(member.expected(POPULATION), abs=0.5)


def test_every_subset_is_equally_likely() -> None:
    population, member = Population(6, None), uniform(3)
    counts = Counter(tuple(member.sample(population, 0, r).tolist()) for r in range(1, TRIALS + 1))
    subsets = list(itertools.combinations(range(6), 3))
    assert set(counts) == set(subsets)
    assert stats.chisquare([counts[s] for s in subsets]).pvalue > ALPHA


def test_poisson_sampling_takes_everyone_by_himself() -> None:
    population, rate = Population(5, None), 0.3
    member = poisson(rate)
    counts = Counter(tuple(member.sample(population, 2, r).tolist()) for r in range(1, TRIALS + 1))
    subsets = [s for k in range(6) for s in itertools.combinations(range(5), k)]
    expected = [TRIALS * rate ** len(s) * (1 - rate) ** (5 - len(s)) for s in subsets]
    assert stats.chisquare([counts[s] for s in subsets], expected).pvalue > ALPHA


@given(st.integers(1, 12), st.integers(12, 60), st.integers(0, 2**40), st.integers(1, 1000))
def test_who_took_part_keeps_away_for_a_while_though_others_join(
    separation: int, count: int, seed: int, round: int
) -> None:
    member = spaced(count // separation, separation=separation)
    seen: set[int] = set()
    for later in range(separation):
        now = set(member.sample(Population(count + 7 * later, None), seed, round + later).tolist())
        assert not now & seen
        seen |= now
    assert len(seen) == separation * (count // separation)


def test_groups_that_take_turns_are_dealt_at_random_and_no_larger_cohort_fits() -> None:
    member = spaced(1, separation=5)
    counts = Counter(int(member.sample(Population(5, None), seed, 1)[0]) for seed in range(TRIALS))
    assert stats.chisquare([counts[c] for c in range(5)]).pvalue > ALPHA
    with pytest.raises(ConfigurationError, match=r"no more than 3 .* Write spaced\(3, separation=5\)"):
        spaced(4, separation=5).sample(Population(19, None), 0, 1)
    with pytest.raises(ConfigurationError, match="whole population"):
        always([0], member).sample(Population(30, None), 0, 1)


def test_by_data_draws_one_client_after_another_in_proportion_to_size() -> None:
    sizes, member = np.array([1, 2, 3, 0, 6]), by_data(2)
    counts = Counter(tuple(member.sample(Population(5, sizes), 3, r).tolist()) for r in range(1, TRIALS + 1))
    expected = {
        (a, b): TRIALS * (sizes[a] / 12 * sizes[b] / (12 - sizes[a]) + sizes[b] / 12 * sizes[a] / (12 - sizes[b]))
        for a, b in itertools.combinations([0, 1, 2, 4], 2)
    }
    assert set(counts) <= set(expected), "an empty client is never drawn"
    assert stats.chisquare([counts[s] for s in expected], list(expected.values())).pvalue > ALPHA


def test_only_those_who_are_there_take_part() -> None:
    for round in range(1, 20):
        there = set(odd(round).tolist())
        assert set(available(odd, uniform(5)).sample(POPULATION, 0, round).tolist()) < there


def test_a_night_with_few_clients_takes_all_of_them_and_one_with_none_takes_nobody() -> None:
    few = available(lambda round: np.array([7, 3, 3]) if round == 1 else np.array([], np.int64), uniform(5))
    assert few.sample(POPULATION, 0, 1).tolist() == [3, 7]
    assert few.sample(POPULATION, 0, 2).tolist() == []
    rare = available(lambda round: np.array([7, 3]), poisson(0.01))
    assert sum(len(rare.sample(POPULATION, 0, r)) for r in range(1, 101)) < 10  # each with its own chance, not all


@given(st.lists(st.integers(0, 3), min_size=40, max_size=40), st.sets(st.integers(0, 39)), st.integers(1, 30))
def test_a_night_with_few_clients_that_have_data_takes_those(sizes: list[int], there: set[int], k: int) -> None:
    with_data = sorted(c for c in there if sizes[c])
    night = available(lambda round: np.array(sorted(there), np.int64), by_data(k))
    found = night.sample(Population(40, np.array(sizes)), 0, 1).tolist()
    assert set(found) <= set(with_data)
    assert len(found) == min(k, len(with_data))


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some tries: the one that nothing disturbed."""
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.parametrize("make", [lambda n: uniform(1000), lambda n: poisson(1000 / n)], ids=["uniform", "poisson"])
def test_a_cohort_of_a_million_costs_what_one_of_ten_thousand_costs(make: Callable[[int], Sampler]) -> None:
    members = {n: make(n) for n in (20_000, 1_000_000)}
    small, large = (fastest(lambda n=n: members[n].sample(Population(n, None), 0, 1)) for n in members)  # type: ignore[misc]
    assert large < 3 * small + 1e-3


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: uniform(0), "at least one client|at least 1"),
        (lambda: uniform(2.5), "at least one client|whole number"),
        (lambda: uniform(True), "at least one client, not True"),
        (lambda: by_data(True), "at least one client, not True"),
        (
            lambda: uniform(41).sample(POPULATION, 0, 1),
            "41 clients does not fit into a population of 40; write cohort=40",
        ),
        (lambda: poisson(0.0), "rate"),
        (lambda: poisson(1.1), "rate"),
        (lambda: poisson("0.1"), "rate must be a number"),  # type: ignore[arg-type]
        (
            lambda: available(lambda r: np.arange(40) > 30, uniform(1)).sample(POPULATION, 0, 4),
            r"in round 4 it gave bool\[40\]. For a mask, write np.flatnonzero",
        ),
        (lambda: available(lambda r: [2.5], uniform(1)).sample(POPULATION, 0, 4), "a list of positions"),  # type: ignore[arg-type,return-value]
        (lambda: by_data(3).sample(Population(5, None), 0, 1), "sizes"),
        (lambda: by_data(3).sample(Population(5, np.array([0, 0, 0, 1, 1])), 0, 1), "population of 2"),
        (
            lambda: available(lambda r: np.array([40]), uniform(1)).sample(POPULATION, 0, 4),
            "client 40 in round 4",
        ),
        (
            lambda: available(lambda r: np.array([-1]), uniform(1)).sample(POPULATION, 0, 4),
            "client -1 in round 4",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        draw()
