"""Fast norms are as close as they say, and what is too close for that is decided by exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from foedus.core.lengths import BLOCK, CLOSE, about, squared, within


def exact(vector: NDArray[np.floating]) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for x in vector), Fraction(0))


@given(st.integers(0, 2**32), st.integers(0, 3000), st.integers(-40, 35), st.sampled_from(["float32", "float64"]))
def test_they_are_as_close_as_they_say(seed: int, size: int, scale: int, dtype: str) -> None:
    """Beside whole numbers of fractions; also where float32's squares are infinite or nothing."""
    vector = (np.random.default_rng(seed).standard_cauchy(size) * 10.0**scale).astype(dtype)
    wanted = exact(vector)
    assert abs(Fraction(about(vector)) - wanted) <= Fraction(CLOSE) * wanted
    assert abs(Fraction(squared(vector)) - wanted) <= Fraction(2.0**-40) * wanted


@pytest.mark.parametrize("size", [1023, 1024, BLOCK - 1, BLOCK, BLOCK + 1025, 5 * BLOCK])
def test_blocks_are_all_counted(size: int) -> None:
    """A vector of ones: every column as long as it can be."""
    assert squared(np.ones(size, np.float32)) == size
    assert about(np.ones(size, np.float32)) == pytest.approx(size, rel=CLOSE)
    third = np.full(size, np.float32(1 / 3))
    assert about(third) == pytest.approx(size * float(np.float32(1 / 3)) ** 2, rel=CLOSE)


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(-12, 12))
def test_a_bound_at_hand_is_decided_by_float64(seed: int, size: int, ulps: int) -> None:
    vector = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    norm = math.sqrt(squared(vector)) * (1 + ulps * 1e-12)
    assert within(vector, norm) == (squared(vector) <= norm**2)
    assert within(vector, norm * (1 + 1e-9))
    assert not within(vector, norm * (1 - 1e-9))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_has_no_norm(value: float, dtype: str) -> None:
    vector = np.array([1.0, value], dtype)
    assert not math.isfinite(about(vector))
    assert not math.isfinite(squared(vector))
    assert not within(vector, 1e30)


def test_of_nothing() -> None:
    assert about(np.zeros(0, np.float32)) == squared(np.zeros(0)) == 0
    assert within(np.zeros(0, np.float32), 1.0)
