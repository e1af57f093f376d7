"""Pace steering: enough are there when a round begins, and never all at once. Arrivals are simulated."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.protocol.pacing import FEW, LONGEST, come_back


def arrivals(population: int, wanted: int, period: float, periods: int, seed: int) -> np.ndarray:
    """How many come in each period, if all begin at the same moment and each draws its own in every window."""
    rng = np.random.default_rng(seed)
    window = come_back(population=population, wanted=wanted, period_s=period)
    gaps = rng.uniform(window.after_s, window.until_s, (population, 1 + int(periods * period / window.after_s)))
    times = np.cumsum(gaps, axis=1).ravel()
    return np.bincount((times[times < periods * period] / period).astype(int), minlength=periods)


@pytest.mark.parametrize(("population", "wanted"), [(1000, 50), (10_000, 100), (20_000, 1000)])
def test_a_rounds_worth_of_many_comes_in_every_round(population: int, wanted: int) -> None:
    between = population / (1.3 * wanted)  # in periods
    found = arrivals(population, wanted, 60.0, int(6 * between), seed=0)
    steady = found[int(3 * between) :]  # after three times the usual interval, the common beginning is forgotten
    assert wanted <= steady.mean() <= 1.6 * wanted
    assert steady.max() <= 2.5 * wanted
    assert np.percentile(steady, 5) >= 0.7 * wanted


def test_even_after_an_outage_they_do_not_come_all_at_once() -> None:
    """All are turned away at one moment: the next time they are spread over many rounds."""
    window = come_back(population=100_000, wanted=100, period_s=60.0)
    first = np.random.default_rng(0).uniform(window.after_s, window.until_s, 100_000)
    assert np.histogram(first, np.arange(0, 90_000, 60.0))[0].max() < 300


@given(st.integers(1, 100), st.floats(1, 1000), st.floats(0, 1000))
def test_few_clients_meet_when_the_next_round_begins(wanted: int, period: float, left: float) -> None:
    window = come_back(population=FEW * wanted, wanted=wanted, period_s=period, left_s=left)
    assert window.after_s >= left
    assert window.until_s - window.after_s <= max(1.0, 0.1 * period) + 1e-6
    assert window.until_s <= max(1.0, left) + max(1.0, 0.1 * period) + 1e-6


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.floats(0, 10**9), st.floats(0, 10**9), st.floats(0.01, 100))
def test_a_window_is_one(population: int, wanted: int, period: float, left: float, floor: float) -> None:
    window = come_back(population=population, wanted=wanted, period_s=period, left_s=left, floor_s=floor)
    assert floor <= window.after_s <= LONGEST
    assert window.until_s - window.after_s >= floor * (1 - 1e-9)


@given(st.integers(1, 10**4), st.floats(1, 1000))
def test_more_clients_come_less_often(wanted: int, period: float) -> None:
    windows = [come_back(population=n * wanted, wanted=wanted, period_s=period).after_s for n in (5, 10, 100, 10**4)]
    assert windows == sorted(windows)
