"""Which entries are sent: evenly chosen, unbiased, the largest; and how positions travel."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from foedus.core.aggregate import mean, message_bytes
from foedus.core.sparse import (
    kept,
    positions_bytes,
    positions_packed,
    positions_unpacked,
    rand_k,
    random_mask,
    subsample,
    subset,
    top_k,
)
from foedus.core.stage import Stage, chain
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, UpdateRefused


def gone_through(stage: Stage, vector: np.ndarray, *, round: int = 1, client: int = 0) -> np.ndarray:
    context = Context(7, round, client, size=len(vector))
    return stage.decode(stage.encode(Update(vector, 1.0), context), context).vector


# --- choosing -----------------------------------------------------------------------------------------------


@given(st.integers(0, 400), st.floats(0, 1), st.integers(0, 2**32))
def test_a_subset_has_its_size_is_in_order_and_has_no_element_twice(size: int, share: float, seed: int) -> None:
    count = round(size * share)
    found = subset(size, count, np.random.Generator(np.random.Philox(key=seed)))
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert not count or (found[0] >= 0 and found[-1] < size)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(5, 2), (4, 3), (6, 1)])
def test_every_subset_is_as_likely_as_any_other(size: int, count: int) -> None:
    draws = 6_000
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(draws):
        found = tuple(subset(size, count, np.random.Generator(np.random.Philox(key=seed))).tolist())
        seen[found] = seen.get(found, 0) + 1
    assert len(seen) == math.comb(size, count)
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_large_subsets_are_even_over_the_whole_range() -> None:
    found = subset(1_000_000, 50_000, np.random.Generator(np.random.Philox(key=1)))
    assert stats.kstest(found / 1_000_000, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, True, "0.5", float("nan")])
def test_what_is_no_share_is_refused(share: object) -> None:
    for make in (random_mask, subsample, rand_k, top_k):
        with pytest.raises(ConfigurationError, match="share must be a number above 0 and at most 1"):
            make(share)  # type: ignore[arg-type]


# --- the stages ---------------------------------------------------------------------------------------------

UNBIASED = [random_mask(0.3), subsample(0.3)]
PLAIN = [random_mask(0.3, unbiased=False), rand_k(0.3)]


@pytest.mark.parametrize("stage", UNBIASED, ids=lambda s: s.label)
@pytest.mark.slow
def test_over_rounds_the_mean_is_the_update_and_the_error_is_what_is_told(stage: Stage) -> None:
    vector = np.random.default_rng(0).standard_normal(40)
    rounds = 3_000
    found = np.array([gone_through(stage, vector, round=r) for r in range(rounds)])
    # exactly 12 of 40 entries: each is there with probability 0.3, then 40/12 times as large
    np.testing.assert_allclose(found.mean(0), vector, atol=5 * np.abs(vector).max() * math.sqrt(40 / 12 / rounds))
    error = np.square(found - vector).sum(1).mean() / np.square(vector).sum()
    assert error == pytest.approx(1 / 0.3 - 1, rel=0.1)


@pytest.mark.parametrize("stage", PLAIN, ids=lambda s: s.label)
def test_without_scaling_what_is_sent_is_exact_and_the_rest_is_zero(stage: Stage) -> None:
    vector = np.random.default_rng(0).standard_normal(1000)
    found = gone_through(stage, vector)
    assert (found != 0).sum() == 300
    assert (found[found != 0] == vector[found != 0]).all()


def test_a_mask_is_shared_and_a_sample_is_each_clients_own() -> None:
    vector = np.ones(200)
    for stage, same in [(random_mask(0.5), True), (subsample(0.5), False), (rand_k(0.5), False)]:
        one, other = (gone_through(stage, vector, client=c) for c in (0, 1))
        assert (one.tolist() == other.tolist()) is same
        assert gone_through(stage, vector, round=2).tolist() != one.tolist()


@pytest.mark.slow
def test_two_masks_in_a_chain_choose_independently() -> None:
    """Otherwise the entries that the first let through would decide what the second does."""
    rule, vector, total = chain(random_mask(0.5), random_mask(0.5), mean()), np.arange(1.0, 9.0), np.zeros(8)
    for round in range(4_000):
        context = Context(0, round, 0, size=8)
        total += rule.decode({}, rule.admit(rule.encode(Update(vector, 1.0), context), context), context)[0]
    np.testing.assert_allclose(total / 4_000, vector, rtol=0.15)


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 2**32))
def test_the_largest_entries_are_the_best_choice_of_so_many(size: int, share: float, seed: int) -> None:
    vector = np.random.default_rng(seed).standard_normal(size)
    found = gone_through(top_k(share), vector)
    count = kept(size, share)
    least = np.sort(np.square(vector))[: size - count].sum()  # what no choice of count entries can avoid
    assert np.square(found - vector).sum() == pytest.approx(least)
    assert (found != 0).sum() == count


# --- positions ----------------------------------------------------------------------------------------------


@given(st.integers(1, 5_000), st.floats(0, 1), st.integers(0, 2**32))
def test_positions_come_back(size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(size, max(1, round(share * size)), replace=False))
    low, high = positions_packed(at, size)
    assert (len(low), len(high)) == positions_bytes(len(at), size)
    assert positions_unpacked(low, high, len(at), context=Context(0, 1, 0, size=size)).tolist() == at.tolist()


def test_positions_in_a_very_long_vector_come_back() -> None:
    at, size = np.array([5, 2**33 + 1, 2**40 - 1]), 2**40
    low, high = positions_packed(at, size)
    assert (len(low), len(high)) == positions_bytes(3, size)
    assert positions_unpacked(low, high, 3, context=Context(0, 1, 0, size=size)).tolist() == at.tolist()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_positions_take_hardly_more_than_they_must(share: float) -> None:
    size = 200_000
    at = np.sort(np.random.default_rng(0).choice(size, int(size * share), replace=False))
    entropy = size * (-share * math.log2(share) - (1 - share) * math.log2(1 - share))
    assert 8 * sum(positions_bytes(len(at), size)) <= entropy + 0.62 * len(at) + 64


@given(st.binary(min_size=0, max_size=40), st.binary(min_size=0, max_size=40), st.integers(1, 200))
def test_no_bytes_make_positions_that_are_not_there(low: bytes, high: bytes, size: int) -> None:
    stage, context = top_k(0.1), Context(0, 1, 3, size=size)
    beside = {"low": np.frombuffer(low, np.uint8), "high": np.frombuffer(high, np.uint8)}
    sent = Update(np.ones(kept(size, 0.1), "f4"), 1.0, beside)
    try:
        found = stage.decode(sent, context).vector
    except UpdateRefused:
        return
    assert found.shape == (size,)
    assert found.sum() == kept(size, 0.1)


@given(st.integers(1, 200), st.data())
def test_flipped_bits_never_reach_beyond_the_vector(size: int, data: st.DataObject) -> None:
    stage, context = top_k(0.2), Context(0, 1, 3, size=size)
    sent = stage.encode(Update(np.random.default_rng(size).standard_normal(size), 1.0), context)
    beside = {name: array.copy() for name, array in sent.beside.items()}
    name = data.draw(st.sampled_from([n for n in beside if len(beside[n])]))
    place = data.draw(st.integers(0, len(beside[name]) - 1))
    beside[name][place] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    try:
        found = stage.decode(sent._replace(beside=beside), context).vector
    except UpdateRefused:
        return
    assert found.shape == (size,)
    assert (found != 0).sum() == kept(size, 0.2)


@pytest.mark.parametrize(
    ("stage", "bits"), [(random_mask(0.1), 3.2), (subsample(0.1), 3.2), (top_k(0.01), 0.32 + 0.08563)]
)
def test_bytes_are_those_of_the_entries_and_their_positions(stage: Stage, bits: float) -> None:
    size = 100_000
    vector = np.random.default_rng(0).standard_normal(size).astype("f4")
    message = chain(stage, mean()).encode(Update(vector, 1.0), Context(0, 1, 0, size=size))
    assert message_bytes(message) == pytest.approx(size * bits / 8 + 8, abs=2)
