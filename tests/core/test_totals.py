"""Sums in whole steps have the bits of sums of messages, and say where they would not."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.aggregate import add, fold, lift, mean
from foedus.core.stage import Stage, chain, clip, same
from foedus.core.totals import Grid, Total, summed
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, SumOverflow


@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.sampled_from([2.0**-20, 2.0**-7, 1.0, 2.0**15]),
    st.sampled_from([5.0, 3e6, 2.0**22]),
    st.sampled_from(["float32", "float64"]),
)
def test_they_are_what_merging_gives(seed: int, count: int, step: float, reach: float, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    steps = np.rint(rng.uniform(-reach, reach, (count, 9)))
    steps = steps.astype(np.float32 if reach < 2**24 else np.float64)
    bits = rng.choice([-0.5, 0.5], count) * max(step, 1.0) * 2
    total = Total(step, reach, list(steps.astype(dtype)), beside=1)
    for row, bit in zip(steps, bits.tolist(), strict=True):
        total.add(row, bit)
    found = total.message()
    rule, c = mean(weighted=False), Context(0, 1, 0)
    rows = [np.append(row.astype(np.float64) * step, bit) for row, bit in zip(steps, bits, strict=True)]
    wanted = fold(rule, [lift(rule.encode(Update(row, 1.0), c)) for row in rows])
    assert total.exact
    assert wanted is not None
    assert wanted.keys() == found.keys()
    assert all(wanted[name].dtype == found[name].dtype and (wanted[name] == found[name]).all() for name in wanted)


@pytest.mark.parametrize(("step", "reach"), [(2.0**-21, 1.0), (2.0**40, 1.0), (1.0, 2.0**51)])
def test_what_would_round_is_told(step: float, reach: float) -> None:
    assert not Total(step, reach, [np.zeros(2)] * 2).exact


def test_sums_that_leave_the_range_are_refused() -> None:
    with pytest.raises(SumOverflow):
        summed(np.zeros(2), 1.0, [2.0**41, 2.0**41])


def test_updates_of_other_lengths_do_not_add_up() -> None:
    total = Total(1.0, 5.0, [np.zeros(2)] * 2)
    with pytest.raises(ConfigurationError, match="3 and 2 entries"):
        total.add(np.zeros(3))


def whole(update: Update, context: Context, room: object = None) -> np.ndarray:
    del context, room
    return np.rint(4 * update.vector)


def test_a_stage_on_a_grid_is_added_up_by_its_steps_only_before_a_plain_mean() -> None:
    """Behind it may stand anything, which sees what it gives."""
    called = []

    def steps(update: Update, context: Context, room: object) -> np.ndarray:
        called.append(context.client)
        return whole(update, context)

    stage = Stage(
        lambda u, c: u._replace(vector=whole(u, c) / 4, weight=1.0), same, "quarters()",
        grid=Grid(lambda n: 0.25, lambda n: 100.0, steps),
    )  # fmt: skip
    updates = [Update(np.array(v), 7.0) for v in ([0.3, 1.0], [5.0, -2.1])]
    contexts = [Context(0, 1, i, size=2) for i in range(2)]
    for rule, quick in ((chain(clip(3.0), stage, mean()), [0, 1]), (chain(stage, chain(clip(3.0), mean())), [])):
        called.clear()
        assert rule.shortcut is not None
        found = rule.shortcut(updates, contexts)
        assert called == quick
        wanted = add(*(lift(rule.encode(u, c)) for u, c in zip(updates, contexts, strict=True)))
        assert all((wanted[name] == found[name]).all() for name in wanted)
