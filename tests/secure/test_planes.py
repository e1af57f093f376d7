"""Numbers on the wire: every width, every length, and sums of thousands."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.errors import ConfigurationError
from foedus.secure.planes import Tally, packed, packed_bytes, unpacked, word

widths = st.integers(1, 64)


def numbers(seed: int, count: int, bits: int) -> np.ndarray:
    whole = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    return (whole >> np.uint64(64 - bits)).astype(word(bits))


@given(widths, st.integers(0, 300), st.integers(0, 2**32))
def test_unpacking_undoes_packing_to_the_bit(bits: int, count: int, seed: int) -> None:
    own = numbers(seed, count, bits)
    sent = packed(own, bits)
    assert sent.dtype == np.uint8
    assert (unpacked(sent, bits, count) == own).all()


@given(widths, st.integers(0, 100_000))
def test_no_byte_more_than_three_above_what_the_bits_take(bits: int, count: int) -> None:
    assert 0 <= packed_bytes(count, bits) - -(-count * bits // 8) <= 3


@given(st.integers(1, 63), st.integers(1, 50), st.integers(0, 2**32))
def test_bits_above_the_width_do_not_travel(bits: int, count: int, seed: int) -> None:
    kind = word(bits)
    wide = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64).astype(kind)
    assert (unpacked(packed(wide, bits), bits, count) == wide & kind.type(2**bits - 1)).all()


@given(widths, st.integers(0, 40), st.integers(0, 60), st.integers(0, 2**32))
def test_a_tally_is_the_sum_modulo_the_width(bits: int, count: int, summands: int, seed: int) -> None:
    tally, wanted = Tally(count, bits), np.zeros(count, object)
    for i in range(summands):
        own = numbers(seed + i, count, bits)
        tally.add(packed(own, bits))
        wanted = (wanted + own.astype(object)) % 2**bits
    assert tally.total().astype(object).tolist() == wanted.tolist()


@pytest.mark.parametrize("bits", [7, 15, 23, 31, 63, 64])
def test_the_largest_numbers_thousands_of_times(bits: int) -> None:
    """Narrow sums are emptied before they overflow."""
    tally, own = Tally(3, bits), np.full(3, 2**bits - 1, word(bits))
    for _ in range(2000):
        tally.add(packed(own, bits))
    assert tally.total().tolist() == [2000 * (2**bits - 1) % 2**bits] * 3


def test_vectors_longer_than_a_block() -> None:
    own = numbers(0, 200_003, 26)
    assert (unpacked(packed(own, 26), 26, len(own)) == own).all()


WRONG = [np.zeros(3, np.uint8), np.zeros(4, np.int8), np.zeros((4, 1), np.uint8), b"abcd", None]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_packed_vector_is_refused_and_nothing_added(wrong: object) -> None:
    tally = Tally(3, 10)
    tally.add(packed(np.array([1, 2, 3], np.uint16), 10))
    with pytest.raises(ConfigurationError, match="3 numbers of 10 bits take 4 bytes"):
        tally.add(wrong)  # type: ignore[arg-type]
    assert tally.total().tolist() == [1, 2, 3]
