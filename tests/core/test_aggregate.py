"""Rounding floats to integers by their bits is rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foedus.core.aggregate import _whole

LIMIT = 2.0**51 - 1
HALVES = st.integers(-(2**51) + 2, 2**51 - 2).map(lambda twice: twice / 2)  # ties, to the even number
VALUES = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-LIMIT, LIMIT) | HALVES
)


@given(VALUES)
def test_rounding_by_bits_is_rounding(values: Any) -> None:
    whole, total = _whole(values.copy(), LIMIT)
    slow, slow_total = _whole(values.copy(), 2.0**51)
    assert np.array_equal(whole, np.rint(values))
    assert np.array_equal(slow, np.rint(values))
    assert np.array_equal(total, np.rint(values).astype(np.int64).sum(0))
    assert np.array_equal(slow_total, total)
