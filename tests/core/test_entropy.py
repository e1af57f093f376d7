"""Lossless coding: everything comes back, nothing grows in memory."""

import struct
import sys
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import mean, message_bytes
from foedus.core.entropy import entropy
from foedus.core.quantise import qsgd
from foedus.core.stage import chain
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, MissingExtra, UpdateRefused


@given(st.integers(1, 16), st.integers(0, 300), st.integers(0, 2**32))
def test_codes_of_any_width_come_back(bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint8 if bits <= 8 else np.uint16)
    context = Context(0, 1, 0, size=size)
    found = entropy().decode(entropy().encode(Update(codes, 2.0), context), context)
    assert found.vector.tolist() == codes.tolist()
    assert found.weight == 2.0


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3])
def test_skewed_codes_come_close_to_their_entropy(share: float) -> None:
    codes = (np.random.default_rng(0).random(200_000) < share).astype(np.uint8)
    least = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    sent = entropy().encode(Update(codes, 1.0), Context(0, 1, 0, size=len(codes)))
    assert 8 * len(sent.vector) / len(codes) < 1.12 * least + 0.001


def test_qsgd_with_few_levels_takes_far_less_than_its_codes() -> None:
    vector = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    context = Context(0, 1, 0, size=len(vector))
    plain, coded = (
        message_bytes(c.encode(Update(vector, 1.0), context))
        for c in (chain(qsgd(4), mean()), chain(qsgd(4), entropy(), mean()))
    )
    assert coded < plain / 10


def headed(frame: bytes, *, bits: int = 2, often: int = 0, count: int = 100) -> np.ndarray:
    """As entropy() writes it: a head, and a frame."""
    return np.frombuffer(struct.pack("<HHQ", bits, often, count) + frame, np.uint8)


def frame(content: bytes) -> np.ndarray:
    return headed(zstandard.compress(content))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (frame(bytes(10**9)), "frame of 1000000000 bytes where 25 are expected"),
        (frame(bytes(24)), "frame of 24 bytes"),
        (headed(zstandard.compress(bytes(25)) + zstandard.compress(bytes(25))), "cannot be decompressed"),
        (frame(np.random.default_rng(0).bytes(25))[:-1], "cannot be decompressed"),
        (headed(b""), "cannot be decompressed"),
        (headed(bytes(40)), "cannot be decompressed"),
        (headed(bytes(40), bits=3), "100 codes of 3 bits"),
        (headed(bytes(40), count=101), "101 codes of 2 bits, of 100"),
        (headed(bytes(40), count=2**64 - 1), "codes of 2 bits, of 100"),
        (headed(bytes(3), count=40), "where 18 of positions are expected|of positions are expected"),
        (np.zeros(11, np.uint8), "compressed bytes are expected"),
        (np.zeros(40, np.float32), "compressed bytes are expected"),
        (np.zeros((4, 4), np.uint8), "compressed bytes are expected"),
    ],
)  # fmt: skip
def test_frames_that_hold_anything_else_are_refused_without_being_unfolded(data: np.ndarray, told: str) -> None:
    tracemalloc.start()
    with pytest.raises(UpdateRefused, match=f"client 8 sent.*{told}"):
        entropy().decode(Update(data, 1.0), Context(0, 1, 8, size=100))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_frame_that_hides_its_length_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**7))
    with pytest.raises(UpdateRefused, match=r"where 25 are expected|cannot be decompressed"):
        entropy().decode(Update(headed(hidden), 1.0), Context(0, 1, 8, size=100))


def test_a_frame_that_lies_about_its_length_is_refused() -> None:
    """Its header says 25 bytes, its block unfolds to more."""
    honest = bytearray(zstandard.compress(bytes(200)))
    at = honest.index(200, 4)  # the length's own byte, behind the magic number
    honest[at] = 25
    with pytest.raises(UpdateRefused):
        entropy().decode(Update(headed(bytes(honest)), 1.0), Context(0, 1, 8, size=100))


@given(st.binary(max_size=80), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 40), st.integers(0, 40))
def test_arbitrary_bytes_are_codes_or_refused(data: bytes, bits: int, size: int, count: int) -> None:
    for sent in (headed(data, bits=bits, count=count), np.frombuffer(data, np.uint8)):
        try:
            found = entropy().decode(Update(sent, 1.0), Context(0, 1, 8, size=size))
        except UpdateRefused:
            continue
        assert found.vector.shape == (size,)


@given(st.integers(1, 400), st.floats(0, 0.3), st.data())
def test_flipped_bits_give_as_many_codes_or_are_refused(size: int, share: float, data: st.DataObject) -> None:
    codes = (np.random.default_rng(size).random(size) < share).astype(np.uint8) * 3 + 1
    context = Context(0, 1, 8, size=size)
    sent = entropy().encode(Update(codes, 1.0), context).vector.copy()
    assert entropy().decode(Update(sent, 1.0), context).vector.tolist() == codes.tolist()
    sent[data.draw(st.integers(0, len(sent) - 1))] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    try:
        found = entropy().decode(Update(sent, 1.0), context).vector
    except UpdateRefused:
        return
    assert found.shape == (size,)


def test_it_is_for_codes() -> None:
    with pytest.raises(ConfigurationError, match="codes whole numbers"):
        entropy().encode(Update(np.ones(3), 1.0), Context(0, 1, 0, size=3))
    with pytest.raises(ConfigurationError, match="level must be"):
        entropy(20)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'foedus\[compress\]'"):
        entropy()
