"""What the compressing stages share: random words, and checks of what goes out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.coding import check_finite, words
from foedus.core.values import Update
from foedus.errors import SumOverflow


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_random_words_are_the_generators_raw_ones(seed: int, counts: list[int]) -> None:
    """However many are asked for at a time; a stored seed gives the same masks with any version of numpy."""
    found, raw = np.random.Generator(np.random.SFC64(seed)), np.random.SFC64(seed)
    for count in counts:
        wanted = np.asarray(raw.random_raw(-(-count // 8)), np.uint64).astype("<u8").tobytes()[:count]
        assert words(found, count).tobytes() == wanted


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=5))
def test_whatever_is_finite_passes_though_its_squares_be_not(values: list[float]) -> None:
    check_finite(Update(np.array(values, np.float32), 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("beside", [0.0, 3e38, np.inf])
def test_what_is_not_finite_is_refused(bad: float, beside: float) -> None:
    with pytest.raises(SumOverflow, match="not finite"):
        check_finite(Update(np.array([1.0, bad, beside], np.float32), 1.0))
