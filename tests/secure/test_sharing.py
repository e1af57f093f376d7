"""Shared secrets: held to plain integers modulo p, and to what makes sharing secret."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.core.keystream import keystream
from foedus.errors import ConfigurationError, NotEnoughShares
from foedus.secure.sharing import (
    PRIME,
    WORDS,
    coefficients,
    inverse,
    product,
    recovered,
    recovered_apart,
    reduced,
    shareable,
    shares,
    spare,
    weights,
)

elements = st.integers(0, PRIME - 1)
EDGES = [0, 1, 2, 4, 5, 6, 2**16 - 1, 2**16, PRIME - 2, PRIME - 1]


def drawn(seed: int, count: int) -> np.ndarray:
    return coefficients(keystream(seed.to_bytes(32, "little"), spare(count)), count)


def secret(seed: int) -> np.ndarray:
    return np.frombuffer(keystream(seed.to_bytes(32, "big"), 32), np.uint8)


# --- the field ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_reducing_is_the_remainder(values: list[int]) -> None:
    values += [k * PRIME + d for k in (1, 2**31, 2**32) for d in (-1, 0, 1) if k * PRIME + d < 2**64]
    values.append(2**64 - 1)
    assert reduced(np.array(values, np.uint64)).tolist() == [v % PRIME for v in values]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_products_of_matrices_are_those_of_integers(rows: int, inner: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (
        np.where(rng.random(s) < 0.3, rng.choice(EDGES, s), rng.integers(0, PRIME, s)).astype(np.uint64)
        for s in ((rows, inner), (inner, columns))
    )
    wanted = (a.astype(object) @ b.astype(object)) % PRIME
    assert (product(a, b) == wanted.astype(np.uint64)).all()


def test_the_longest_products_are_exact() -> None:
    """The largest elements, as many as ever meet."""
    count = 1 << 14
    a = np.full((1, count), PRIME - 1, np.uint64)
    assert product(a, a.T).tolist() == [[count % PRIME]]


def test_inverses() -> None:
    values = np.array(EDGES[1:], np.uint64)
    assert reduced(values * inverse(values)).tolist() == [1] * len(values)


# --- sharing ------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 2**32), st.data())
def test_any_threshold_of_holders_puts_secrets_together(threshold: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(threshold, 60))
    rng = np.random.default_rng(seed)
    points = rng.choice(np.arange(1, 1 << 20), count, replace=False)
    both = np.stack([secret(seed), secret(seed + 1)])
    held = shares(both, points, threshold, drawn(seed, (threshold - 1) * 2 * WORDS))
    chosen = rng.permutation(count)[:threshold]
    assert (recovered(held[chosen], points[chosen]) == both).all()
    apart = recovered_apart(held[chosen].transpose(1, 0, 2), np.stack([points[chosen]] * 2))
    assert (apart == both).all()


@given(st.integers(2, 9), st.integers(0, 2**32))
def test_shares_are_values_of_a_polynomial_in_plain_integers(threshold: int, seed: int) -> None:
    own, random = secret(seed), drawn(seed, (threshold - 1) * WORDS)
    held = shares(own[None], np.arange(1, 12), threshold, random)
    for word, value in enumerate(np.frombuffer(own.tobytes(), "<u4").tolist()):
        row = [value, *random.reshape(threshold - 1, WORDS)[:, word].tolist()]
        for x in range(1, 12):
            found = int(np.frombuffer(held[x - 1, 0].tobytes(), "<u4")[word])
            assert found == sum(c * x**i for i, c in enumerate(row)) % PRIME


@given(st.integers(2, 12), st.integers(0, 2**32), st.integers(0, 2**32))
def test_fewer_than_the_threshold_fit_every_secret(threshold: int, seed: int, other: int) -> None:
    """What t − 1 holders see of one secret they would see, with other polynomials, of any other: they learn nothing."""
    points = np.arange(1, threshold)
    held = shares(secret(seed)[None], points, threshold, drawn(seed, (threshold - 1) * WORDS))
    fitting = np.concatenate([secret(other)[None, None], held])  # a polynomial through these exists, whatever is at 0
    again = _through(fitting, np.append(0, points), np.arange(1, threshold))
    assert (again == held[:, 0]).all()


def _through(values: np.ndarray, at: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The polynomial through values at ``at``, at other points, by Lagrange over plain integers."""
    words = np.ascontiguousarray(values).view("<u4").reshape(len(at), WORDS).astype(object)
    rows = []
    for x in points.tolist():
        total = [0] * WORDS
        for i, a in enumerate(at.tolist()):
            factor = 1
            for b in at.tolist():
                if a != b:
                    factor = factor * (x - b) * pow(a - b, -1, PRIME) % PRIME
            total = [(t + factor * v) % PRIME for t, v in zip(total, words[i], strict=True)]
        rows.append(np.array(total, "<u4").view(np.uint8))
    return np.stack(rows)


def test_one_share_too_few_or_one_wrong_gives_another_secret() -> None:
    own, points = secret(7), np.arange(1, 8)
    held = shares(own[None], points, 4, drawn(1, 3 * WORDS))
    assert (recovered(held[:3], points[:3]) != own).any()
    held[0, 0, 0] ^= 1
    assert (recovered(held[:4], points[:4]) != own).any()


def test_two_shares_of_one_holder_are_refused() -> None:
    held = shares(secret(1)[None], np.arange(1, 5), 3, drawn(1, 2 * WORDS))
    with pytest.raises(NotEnoughShares, match="same point"):
        recovered(held[:3], np.array([1, 2, 2]))
    with pytest.raises(NotEnoughShares):
        weights(np.array([[0, 1]], np.uint64))


def test_words_beyond_the_field_are_told_of_and_never_shared() -> None:
    wide = np.full((1, 32), 255, np.uint8)
    assert not shareable(wide.tobytes())
    with pytest.raises(ConfigurationError, match="draw another"):
        shares(wide, np.arange(1, 4), 2, drawn(0, WORDS))


def test_random_words_beyond_the_field_are_passed_over() -> None:
    stream = np.array([PRIME - 1, PRIME, 2**32 - 1, 7, 8], "<u4").tobytes()
    assert coefficients(stream, 3).tolist() == [PRIME - 1, 7, 8]
    with pytest.raises(ConfigurationError, match="4 random elements"):
        coefficients(stream, 4)


def test_hostile_shares_are_brought_into_the_field() -> None:
    held = np.full((2, 1, 32), 255, np.uint8)
    assert recovered(held, np.array([1, 2])).shape == (1, 32)


@pytest.mark.slow
def test_a_thousand_holders() -> None:
    both, points = np.stack([secret(1), secret(2)]), np.arange(1, 1001)
    held = shares(both, points, 667, drawn(3, 666 * 2 * WORDS))
    chosen = np.random.default_rng(0).permutation(1000)[:667]
    assert (recovered(held[chosen], points[chosen]) == both).all()
