"""Tensors ↔ bytes: the safetensors layout, written to the bit the same way, and read as what a stranger sent.

    8 bytes, little endian: the header's length
    header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}, ends on 8 bytes
    data: the arrays, the widest dtypes first, then by name; no gap, no overlap, nothing after them

Whatever reads safetensors reads these. The reader here checks sizes before it parses, allows few dtypes, and copies
nothing: arrays are read-only views of the bytes given.

Not here: which arrays orders and updates consist of (``foedus/rounds/parcel.py``), messages (``wire.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import Code, MalformedMessage, TooLarge, UploadRefused

HEADER = 1 << 20  # bytes of a header, at most
ARRAYS = 4096
AXES = 8
TEXTS = 256  # entries of the metadata

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_CODES = {code: name for name, code in _DTYPES.items()}


class Tensors(NamedTuple):
    """Arrays by name, and what goes with them, text by text."""

    arrays: dict[str, NDArray[Any]]
    told: dict[str, str]


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """SHA-256, by which blobs are named."""
    return hashlib.sha256(data).digest()


def pack(arrays: Mapping[str, NDArray[Any]], told: Mapping[str, str] | None = None) -> bytes:
    """Arrays as bytes; the same bytes for the same arrays.

    Raises:
        MalformedMessage: an array has a dtype that does not travel, or a name that cannot be used.

    Example:
        >>> data = pack({"vector": np.arange(3, dtype=np.float32)}, {"round": "1"})
        >>> unpack(data).arrays["vector"], unpack(data).told
        (array([0., 1., 2.], dtype=float32), {'round': '1'})
    """
    ready = {name: _ready(name, array) for name, array in arrays.items()}
    order = sorted(ready, key=lambda name: (-ready[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(told.items()))} if told else {}
    begin = 0
    for name in order:
        array = ready[name]
        entry = {
            "dtype": _CODES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
        header[name] = entry
        begin += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER:
        raise TooLarge(f"a blob's header takes {len(text)} bytes, and {HEADER} are let through")
    return b"".join(
        [
            len(text).to_bytes(8, "little"),
            text,
            *(ready[name].data.cast("B") if ready[name].size else b"" for name in order),
        ]
    )


def _ready(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array as it is written: in C's order, little endian."""
    array = np.asarray(array)
    ready = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    if ready.dtype.str not in _CODES:
        raise MalformedMessage(f"the array {name!r} has the dtype {array.dtype}; {', '.join(_DTYPES)} travel")
    if not name or name == "__metadata__":
        raise MalformedMessage(f"an array cannot have the name {name!r}")
    return ready


def unpack(data: bytes | bytearray | memoryview, *, size: int | None = None, digest: bytes | None = None) -> Tensors:
    """The arrays that some bytes hold, as views of these bytes.

    Args:
        data: what came.
        size: how many bytes were announced.
        digest: the SHA-256 that was announced.

    Raises:
        UploadRefused: size or digest are not what was announced.
        TooLarge: the header is longer, or has more entries, than is let in.
        MalformedMessage: the bytes are not laid out as they should be; says how.

    Example:
        >>> unpack(b"\\x02\\0\\0\\0\\0\\0\\0\\0[]")
        Traceback (most recent call last):
        foedus.errors.MalformedMessage: no blob: its header is no JSON object
    """
    view = memoryview(data).cast("B").toreadonly()
    if size is not None and len(view) != size:
        raise UploadRefused(f"{len(view)} bytes came, and {size} were announced", code=Code.WRONG_DIGEST)
    if digest is not None and digest_of(view) != digest:
        raise UploadRefused("the bytes that came do not have the digest that was announced", code=Code.WRONG_DIGEST)
    length = _header_length(view)
    header = _header(bytes(view[8 : 8 + length]))
    told = _told(header.pop("__metadata__", {}))
    body = view[8 + length :]
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda e: (e.begin, e.end, e.name))
    _check_gapless(entries, len(body))
    return Tensors({e.name: _array(body, e) for e in entries}, told)


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header_length(view: memoryview) -> int:
    if len(view) < 8:
        raise MalformedMessage(f"no blob: it has {len(view)} bytes, and its header's length alone takes 8")
    length = int.from_bytes(view[:8], "little")
    if length > HEADER:
        raise TooLarge(f"a blob's header of {length} bytes was announced, and {HEADER} are let in")
    if length > len(view) - 8:
        raise MalformedMessage(f"no blob: a header of {length} bytes was announced, and {len(view) - 8} bytes follow")
    return length


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise MalformedMessage("no blob: its header is no JSON object") from None
    if not isinstance(header, dict):
        raise MalformedMessage("no blob: its header is no JSON object")
    if len(header) > ARRAYS:
        raise TooLarge(f"a blob of {len(header)} arrays came, and {ARRAYS} are let in")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _told(given: Any) -> dict[str, str]:
    texts = isinstance(given, dict) and all(isinstance(v, str) for v in given.values())
    if not texts or len(given) > TEXTS:
        raise MalformedMessage(f"no blob: its metadata are at most {TEXTS} texts by name")
    return dict(given)


def _entry(name: str, given: Any) -> _Entry:
    """One array's line in the header, checked by itself."""
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedMessage(f"no blob: array {name[:80]!r} has dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedMessage(
            f"no blob: array {name[:80]!r} has a dtype that does not travel; {', '.join(_DTYPES)} do"
        )
    if not _wholes(shape) or len(shape) > AXES:
        raise MalformedMessage(f"no blob: the shape of array {name[:80]!r} is no list of at most {AXES} lengths")
    if not _wholes(offsets) or len(offsets) != 2:
        raise MalformedMessage(f"no blob: the offsets of array {name[:80]!r} are not begin and end")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise MalformedMessage(f"no blob: array {name[:80]!r} takes another number of bytes than its shape says")
    return _Entry(name, _DTYPES[dtype], tuple(shape), begin, end)


def _wholes(given: Any) -> bool:
    return isinstance(given, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in given)


def _check_gapless(entries: list[_Entry], length: int) -> None:
    """Refuse arrays that overlap, leave bytes between them, or end before or after the data do."""
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise MalformedMessage(f"no blob: array {entry.name[:80]!r} begins at {entry.begin}, and should at {at}")
        at = entry.end
    if at != length:
        raise MalformedMessage(f"no blob: its arrays end at byte {at} of the data, and there are {length}")


def _array(body: memoryview, entry: _Entry) -> NDArray[Any]:
    part = body[entry.begin : entry.end]
    if entry.dtype == "|b1" and len(part) and np.frombuffer(part, np.uint8).max() > 1:
        raise MalformedMessage(f"no blob: array {entry.name[:80]!r} is of truth values, and has others than 0 and 1")
    return np.frombuffer(part, entry.dtype).reshape(entry.shape)
