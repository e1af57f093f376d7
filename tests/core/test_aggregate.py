"""Rounding floats to integers by their bits is rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foedus.core.aggregate import _limbs

LIMIT = 2.0**51 - 1
HALVES = st.integers(-(2**51) + 2, 2**51 - 2).map(lambda twice: twice / 2)  # ties, to the even number
VALUES = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-LIMIT, LIMIT) | HALVES)


@given(VALUES)
def test_limbs_are_the_rounded_values_and_what_is_left(values: Any) -> None:
    whole = np.rint(values)
    left = np.rint((values - whole) * 2.0**40)
    wanted = whole.astype(np.int64).sum(0), left.astype(np.int64).sum(0)
    for bound in (LIMIT, 2.0**51):  # by bits, and slowly
        for found, sums in zip(_limbs(values.copy(), bound), wanted, strict=True):
            assert np.array_equal(found, sums)
