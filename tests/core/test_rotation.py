"""The fast transform against the matrix written out, and what a rotation is for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import fold, mean
from foedus.core.rotation import padded, rotate, transform
from foedus.core.stage import chain
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, UpdateRefused


def hadamard(order: int) -> np.ndarray:
    """Sylvester's matrix, entry by entry: the parity of the bits that row and column share."""
    rows = np.arange(order)
    shared = rows[:, None] & rows
    return np.array([[1 - 2 * (int(v).bit_count() & 1) for v in row] for row in shared]) / np.sqrt(order)


def hartley(order: int) -> np.ndarray:
    angle = 2 * np.pi * np.outer(np.arange(order), np.arange(order)) / order
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(order)


@pytest.mark.parametrize("bits", range(13))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_power_of_two_is_the_walsh_hadamard_transform(bits: int, dtype: str) -> None:
    vector = np.random.default_rng(bits).standard_normal(2**bits).astype(dtype)
    found = transform(vector)
    assert found.dtype == dtype
    wanted = butterfly(vector.astype(np.float64))
    if bits <= 8:
        np.testing.assert_allclose(wanted, hadamard(2**bits) @ vector.astype(np.float64), atol=1e-13)
    np.testing.assert_allclose(found, wanted, atol=2e-6 if dtype == "float32" else 1e-13)


def butterfly(vector: np.ndarray) -> np.ndarray:
    """The butterfly, one bit at a time."""
    vector, step = vector.copy(), 1
    while step < len(vector):
        pairs = vector.reshape(-1, 2, step)
        vector = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        step *= 2
    return vector / np.sqrt(len(vector))


@pytest.mark.parametrize(("rows", "row"), [(3, 1), (33, 2), (49, 8), (63, 16)])
def test_other_lengths_are_hartley_across_the_rows_and_hadamard_along_them(rows: int, row: int) -> None:
    vector = np.random.default_rng(rows).standard_normal(rows * row)
    np.testing.assert_allclose(transform(vector), np.kron(hartley(rows), hadamard(row)) @ vector, atol=1e-13)


@given(st.integers(1, 3_000))
def test_it_is_orthonormal_and_its_own_inverse_at_every_length(size: int) -> None:
    vector = np.random.default_rng(size).standard_normal(padded(size))
    found = transform(vector)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(vector))
    np.testing.assert_allclose(transform(found), vector, atol=1e-12)


@given(st.integers(0, 2**30))
def test_padding_is_at_most_three_per_cent_and_never_needed_twice(size: int) -> None:
    assert size <= padded(size) <= size + size / 32
    assert padded(padded(size)) == padded(size)
    if size and not size & (size - 1):
        assert padded(size) == size


def test_lengths_without_a_transform_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="pad the vector to 66"):
        transform(np.zeros(65))


@pytest.mark.parametrize("own", [False, True])
def test_clients_share_a_rotation_unless_they_are_given_their_own(own: bool) -> None:
    stage, vector = rotate(own=own), np.random.default_rng(0).standard_normal(100)
    contexts = [
        Context(0, r, c, size=100, channel=n) for r, c, n in [(1, 0, "a"), (1, 1, "a"), (2, 0, "a"), (1, 0, "b")]
    ]
    first, other, later, elsewhere = (stage.encode(Update(vector, 1.0), c).vector.tobytes() for c in contexts)
    assert (first == other) is not own
    assert first != later
    assert first != elsewhere


def test_a_spike_is_spread_over_all_entries() -> None:
    spike = np.zeros(2**12, np.float32)
    spike[17] = 64.0
    assert np.allclose(np.abs(rotate().encode(Update(spike, 1.0), Context(0, 1, 0)).vector), 1.0)


@given(st.integers(1, 300), st.integers(1, 5))
def test_rotating_back_the_mean_is_the_mean_of_what_was_rotated(size: int, clients: int) -> None:
    rng = np.random.default_rng(size)
    vectors = rng.standard_normal((clients, size)).astype("f4")
    weights = rng.integers(1, 100, clients)
    rule = chain(rotate(), mean())
    messages = [
        rule.admit(rule.encode(Update(v, float(w)), c), c)
        for i, (v, w) in enumerate(zip(vectors, weights, strict=True))
        for c in [Context(0, 1, i, size=size)]
    ]
    total = fold(rule, messages)
    assert total is not None
    found, _ = rule.decode({}, total, Context(0, 1, -1, size=size))
    np.testing.assert_allclose(found, np.average(vectors.astype("f8"), axis=0, weights=weights), atol=1e-5)


@pytest.mark.parametrize("sent", [np.zeros(65, "f4"), np.zeros((66, 1), "f4"), np.zeros(66, "i4"), np.full(66, np.nan)])
def test_what_is_no_rotated_vector_is_refused(sent: np.ndarray) -> None:
    with pytest.raises(UpdateRefused, match="client 4 sent"):
        rotate(own=True).decode(Update(sent, 1.0), Context(0, 1, 4, size=65))
