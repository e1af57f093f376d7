"""Tensors as bytes: others' safetensors are read, ours are read by others, and attacks on the format are refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foedus.errors import MalformedMessage, ProtocolError, TooLarge, UploadRefused
from foedus.protocol.blob import HEADER, digest_of, pack, unpack

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def raw(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


arrays = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__" and n.isprintable()),
    st.sampled_from(DTYPES).flatmap(
        lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    min_size=1,  # of no arrays at all, safetensors 0.8 writes a header that is no JSON
    max_size=5,
)
texts = st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3)


@given(arrays, texts)
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked_to_the_bit(given_: dict[str, Any], told: dict[str, str]) -> None:
    data = pack(given_, told)
    found = unpack(data, size=len(data), digest=digest_of(data))
    assert found.told == told
    assert found.arrays.keys() == given_.keys()
    for name, array in given_.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()
        assert not found.arrays[name].flags.writeable
    assert pack(dict(reversed(given_.items())), dict(reversed(told.items()))) == data


@given(arrays, texts)
@settings(max_examples=30, deadline=None)
def test_safetensors_reads_ours_and_we_read_theirs(given_: dict[str, Any], told: dict[str, str]) -> None:
    theirs = safetensors.numpy.load(pack(given_, told))
    ours = unpack(safetensors.numpy.save(given_, told)).arrays
    for name, array in given_.items():
        assert theirs[name].tobytes() == ours[name].tobytes() == array.tobytes()


def test_arrays_in_fortran_order_and_big_endian_travel_by_value() -> None:
    given_ = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    np.testing.assert_array_equal(unpack(pack({"a": given_})).arrays["a"], given_)


@pytest.mark.parametrize("array", [np.array(["x"]), np.array([1j]), np.array([None]), np.zeros(1, "f4,i4")])
def test_other_dtypes_do_not_travel(array: Any) -> None:
    with pytest.raises(MalformedMessage, match="travel"):
        pack({"a": array})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes"),
        (b"\x01\0\0\0\0\0\0\0", "0 bytes follow"),
        (raw(b"[]"), "no JSON object"),
        (raw(b"{"), "no JSON object"),
        (raw(b"\xff\xfe"), "no JSON object"),
        (raw(b"[" * 100_000), "no JSON object"),
        (raw(b'{"a":1,"a":2}'), "no JSON object"),
        (raw({"a": entry()}, b"xyz"), "end at byte 2 of the data, and there are 3"),
        (raw({"a": entry()}, b"x"), "end at byte 2 of the data, and there are 1"),
        (raw({"a": entry(), "b": entry(offsets=(1, 3))}, b"xyz"), "begins at 1, and should at 2"),
        (raw({"a": entry(), "b": entry(offsets=(3, 5))}, b"vwxyz"), "begins at 3, and should at 2"),
        (raw({"a": entry(), "b": entry()}, b"xy"), "begins at 0, and should at 2"),
        (raw({"a": entry(offsets=(1, 3))}, b"xyz"), "begins at 1, and should at 0"),
        (raw({"a": entry(shape=(3,))}, b"xy"), "another number of bytes"),
        (raw({"a": entry(shape=(2**40, 2**40, 2**40))}, b"xy"), "another number of bytes"),
        (raw({"a": entry(shape=(-1, -2))}, b"xy"), "no list of at most"),
        (raw({"a": entry(shape=(1,) * 9, offsets=(0, 1))}, b"x"), "no list of at most"),
        (raw({"a": entry(shape=2)}, b"xy"), "no list of at most"),
        (raw({"a": entry(shape=(2.0,))}, b"xy"), "no list of at most"),
        (raw({"a": entry(shape=(True, 2))}, b"xy"), "no list of at most"),
        (raw({"a": entry(offsets=(2, 0))}, b"xy"), "another number of bytes"),
        (raw({"a": entry(offsets=(0, 2, 2))}, b"xy"), "begin and end"),
        (raw({"a": entry(dtype="BF16")}, b"xy"), "does not travel"),
        (raw({"a": entry(dtype="O")}, b"xy"), "does not travel"),
        (raw({"a": entry(dtype=["U8"])}, b"xy"), "does not travel"),
        (raw({"a": entry() | {"more": 1}}, b"xy"), "nothing else"),
        (raw({"a": [1]}, b"xy"), "nothing else"),
        (raw({"a": entry("BOOL")}, b"\x00\x02"), "others than 0 and 1"),
        (raw({"__metadata__": {"a": 1}}), "texts by name"),
        (raw({"__metadata__": {str(i): "" for i in range(300)}}), "texts by name"),
        (raw({"__metadata__": ["a"]}), "texts by name"),
        (raw(b'{"a": NaN}'), "no JSON object"),
    ],
)
def test_attacks_on_the_format_are_refused(data: bytes, told: str) -> None:
    with pytest.raises(MalformedMessage, match=told):
        unpack(data)


def test_what_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge, match="header of"):
        unpack(raw(b"{}", length=HEADER + 1) + bytes(64))
    with pytest.raises(TooLarge, match="arrays came"):
        unpack(raw({str(i): [] for i in range(5000)}))


def test_size_and_digest_are_compared_first() -> None:
    data = pack({"a": np.zeros(3)})
    with pytest.raises(UploadRefused, match="were announced"):
        unpack(data, size=len(data) - 1)
    with pytest.raises(UploadRefused, match="digest"):
        unpack(data[:-1] + b"\x01", size=len(data), digest=digest_of(data))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack(data)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_blob_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(pack({"a": np.arange(4, dtype=np.int16), "b": np.zeros((2, 2), bool)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        unpack(bytes(whole))
