"""Counted randomness: the same wherever it is computed, without ties, and evenly spread."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.random import bits, fold, generator, key, order, uniform
from foedus.errors import ConfigurationError

words = st.integers(0, 2**64 - 1)
parts = st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=8))


def test_the_numbers_never_change():
    """Runs recorded yesterday repeat tomorrow: these values are part of the format."""
    assert key(0) == 0
    assert key(0, "batches", 3) == 16059778162335453911
    assert bits(key(1, "a"), [0, 1]).tolist() == [3651665981618768843, 8419102391048653431]
    assert order([key(2, "x"), key(3, "x")], [4, 3]).tolist() == [0, 3, 1, 2, 0, 1, 2]


def test_splitmix64_against_its_published_sequence():
    """The first outputs of SplitMix64 from seed 1234567, as listed with its reference code."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert bits(1234567, np.arange(4)).tolist() == wanted


@given(words, st.lists(parts, max_size=4))
def test_a_longer_path_is_a_folded_key(seed, path):
    whole = key(seed, *path, 7)
    assert whole == fold(key(seed, *path), 7)
    assert whole == fold(np.array([key(seed, *path)], np.uint64), 7)[0]
    assert whole == fold(key(seed, *path), np.array([7], np.uint64))[0]


def test_place_and_type_of_the_parts_count():
    keys = {
        key(0),
        key(0, 0),
        key(0, 0, 0),
        key(0, "0"),
        key(0, ""),
        key(0, "a", "b"),
        key(0, "b", "a"),
        key(0, "ab"),
    }
    assert len(keys) == 8


@given(words, words, words)
def test_fold_is_one_to_one_in_both_arguments(a, b, value):
    if a != b:
        assert fold(a, value) != fold(b, value)
        assert fold(value, a) != fold(value, b)


@given(words, words, words)
def test_bits_have_no_ties_within_a_key(k, a, b):
    found = bits(k, np.array([a, b], np.uint64))
    assert (found[0] == found[1]) == (a == b)


def test_bits_broadcast():
    keys = np.array([key(0, c) for c in range(3)], np.uint64)
    table = bits(keys[:, None], np.arange(5))
    assert table.shape == (3, 5)
    assert all((table[c] == bits(key(0, c), np.arange(5))).all() for c in range(3))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 100))
def test_order_permutes_each_segment_by_itself(counts, seed):
    keys = [key(seed, s) for s in range(len(counts))]
    together = np.split(order(np.array(keys, np.uint64), counts), np.cumsum(counts)[:-1]) if counts else []
    for own, k, count in zip(together, keys, counts, strict=True):
        assert sorted(own) == list(range(count))
        assert own.tolist() == order([k], [count]).tolist()
        assert own.tolist() == np.argsort(bits(k, np.arange(count))).tolist()


@pytest.mark.parametrize("segments", [1, 255, 256, 70_000])
def test_order_is_the_order_of_the_words_within_each_segment(segments):
    draw = np.random.default_rng(segments)
    keys, counts = draw.integers(0, 2**63, segments).astype(np.uint64), draw.integers(0, 4, segments)
    owner = np.repeat(np.arange(segments), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    words = bits(keys[owner], np.arange(len(owner)) - starts)
    assert np.array_equal(order(keys, counts), np.lexsort((words, owner)) - starts)


def test_order_is_uniform():
    """Each of the 24 permutations of four comes up about as often: chi-square with 23 degrees of freedom."""
    trials = 24_000
    keys = fold(key(5, "uniform"), np.arange(trials, dtype=np.uint64))
    dealt = order(keys, np.full(trials, 4)).reshape(trials, 4)
    _, counts = np.unique(dealt @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # 99.9 % point


def test_uniform_covers_the_unit_interval():
    x = uniform(key(9, "u"), np.arange(100_000))
    assert x.min() >= 0
    assert x.max() < 1
    counts, _ = np.histogram(x, bins=100, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # 99.9 % point of chi-square, 99 degrees of freedom


def test_neighbouring_keys_are_not_correlated():
    """Every bit of a word flips with probability one half when a single bit of the client number does."""
    clients = np.arange(4096, dtype=np.uint64)
    base = key(0, "avalanche")
    flipped = bits(fold(base, clients), 0) ^ bits(fold(base, clients ^ np.uint64(1)), 0)
    share = np.unpackbits(flipped.view(np.uint8)).mean()
    assert abs(share - 0.5) < 0.005


def test_generators_of_one_path_agree_and_of_two_do_not():
    assert generator(0, "a").integers(0, 2**32, 4).tolist() == generator(0, "a").integers(0, 2**32, 4).tolist()
    assert generator(0, "a").integers(0, 2**32, 4).tolist() != generator(0, "b").integers(0, 2**32, 4).tolist()


@pytest.mark.parametrize("wrong", [2**64, -(2**63) - 1, 0.5, None, ("a",)])
def test_a_path_of_something_else_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="64 bits"):
        key(0, wrong)
