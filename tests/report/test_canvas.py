"""Names pushed apart: in order, far enough from each other, as near as can be to where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.report.canvas import apart

PLACES = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@given(PLACES)
def test_places_are_kept_apart_and_in_order(at: list[float]) -> None:
    found = apart(at, 5.0, low=0.0, high=100.0)
    order = np.argsort(at, kind="stable")
    assert (np.diff(found[order]) >= 5.0 - 1e-9).all()
    assert found.min() >= -1e-9
    assert found.max() <= 100 + 1e-9


@pytest.mark.slow
@given(PLACES)
def test_no_other_places_are_nearer(at: list[float]) -> None:
    """Isotonic regression of scikit-learn is the oracle, where no limit is near."""
    from sklearn import isotonic

    gaps = 5.0 * np.arange(len(at))
    wanted = isotonic.isotonic_regression(np.sort(at) - gaps) + gaps
    found = apart(at, 5.0, low=-1e3, high=1e3)
    np.testing.assert_allclose(np.sort(found), wanted, atol=1e-6)


def test_more_names_than_fit_run_over_the_upper_limit_rather_than_into_each_other() -> None:
    found = apart([1.0, 1.0, 1.0], 5.0, low=0.0, high=4.0)
    assert found.tolist() == [0.0, 5.0, 10.0]
