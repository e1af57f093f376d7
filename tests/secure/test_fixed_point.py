"""Fixed point: unbiased, clipped, finite, and no sum that wraps around."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, SumOverflow
from foedus.secure.fixed_point import Grid, centred, weighted, width, wrapped


def context(client: int = 0, size: int = 0) -> Context:
    return Context(seed=1, round=1, client=client, size=size)


@given(st.integers(2, 24), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_an_entry_is_off_by_less_than_a_step_and_cut_at_the_bound(bits: int, bound: float, seed: int) -> None:
    grid = Grid(bits, bound)
    vector = np.random.default_rng(seed).uniform(-2 * bound, 2 * bound, 100)
    codes = grid.codes(Update(vector, 1.0), context())
    assert codes.max() <= 2**bits - 2
    found = grid.values(codes.astype(np.float64))
    assert np.abs(found - np.clip(vector, -bound, bound)).max() <= grid.step * (1 + 1e-9)
    assert np.abs(found).max() <= bound * (1 + 1e-9)


@given(st.integers(2, 24), st.floats(1e-6, 1e6))
def test_nothing_stays_nothing(bits: int, bound: float) -> None:
    grid = Grid(bits, bound)
    codes = grid.codes(Update(np.zeros(5, np.float32), 1.0), context())
    assert grid.values(codes.astype(np.float64)).tolist() == [0.0] * 5


def test_rounding_is_unbiased() -> None:
    grid, vector = Grid(4, 1.0), np.full(200_000, 0.3, np.float32)
    found = grid.values(grid.codes(Update(vector, 1.0), context()).astype(np.float64))
    assert abs(found.mean() - 0.3) < 5 * grid.step / 2 / np.sqrt(len(vector))


def test_two_clients_round_by_draws_of_their_own() -> None:
    vector = np.full(1000, 0.3)
    one, other = (Grid(4, 1.0).codes(Update(vector, 1.0), context(i)) for i in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_before_it_is_a_number(value: float) -> None:
    with pytest.raises(SumOverflow, match="not finite"):
        Grid(8, 1.0).codes(Update(np.array([0.0, value]), 1.0), context())


@given(st.integers(3, 10**6), st.integers(1, 24), st.integers(1, 10**6))
def test_no_sum_of_as_many_as_are_allowed_wraps_around(clients: int, bits: int, most: int) -> None:
    if clients * (2**bits - 1) * most >= 2**64:
        with pytest.raises(ConfigurationError, match="wrap around"):
            width(clients, bits, most)
        return
    found = width(clients, bits, most)
    assert clients * (2**bits - 1) * most < 2**found
    assert clients * (2**bits - 1) * most >= 2 ** (found - 1), "a bit more than is needed"


@given(st.integers(0, 2**24 - 1), st.integers(1, 2**20))
def test_weights_multiply_exactly(code: int, weight: int) -> None:
    bits = width(3, 24, 2**20)
    assert weighted(np.array([code], np.uint32), weight, bits).tolist() == [code * weight]


@given(st.integers(2, 64), st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=9))
def test_whole_numbers_of_either_sign_add_up_modulo_the_width(bits: int, values: list[int]) -> None:
    total = wrapped(np.array(values), bits)
    wanted = [(v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for v in values]
    assert centred(total, bits).tolist() == wanted
