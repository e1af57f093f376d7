"""Token buckets, against a bucket that is simulated the long way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import ConfigurationError, TooFast
from foedus.net.identity.limits import Rate

Waits = st.lists(st.integers(0, 30), min_size=1, max_size=60)


@given(Waits, st.integers(1, 5), st.sampled_from([1, 2, 4, 8]))
def test_it_lets_through_what_a_bucket_would(waits: list[int], burst: int, every: int) -> None:
    """The oracle keeps tokens, in eighths, and adds to them as time passes; this keeps one number."""
    rate = Rate(per_s=1.0 / every, burst=burst)
    tokens, now = float(burst), 0.0
    for wait in waits:
        now += wait / 8
        tokens = min(float(burst), tokens + wait / 8 / every)
        if tokens >= 1.0:
            rate.take("a", now=now)
            tokens -= 1.0
            continue
        with pytest.raises(TooFast) as told:
            rate.take("a", now=now)
        assert told.value.after_s == pytest.approx((1.0 - tokens) * every)


def test_everybody_has_a_bucket_of_their_own_and_memory_is_bounded() -> None:
    rate = Rate(per_s=1.0, burst=1, remembered=100)
    for who in range(1000):
        rate.take(who, now=0.0)
    assert rate.remembered == 100
    with pytest.raises(TooFast):
        rate.take(999, now=0.5)
    rate.take(0, now=0.5)  # forgotten: others came in between


def test_a_clock_that_is_put_back_locks_nobody_out() -> None:
    rate = Rate(per_s=0.1, burst=2)
    rate.take("a", now=1e9)
    rate.take("a", now=1e9)
    rate.take("a", now=1e9 - 3600)


@pytest.mark.parametrize("wrong", [{"per_s": 0.0, "burst": 1}, {"per_s": 1.0, "burst": 0}])
def test_rates_that_let_nothing_through_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="per_s above 0"):
        Rate(**wrong)  # type: ignore[arg-type]
