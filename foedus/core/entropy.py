"""Lossless coding: codes that are not equally frequent take fewer bits than they are wide.

The work is done by Zstandard (RFC 8878): a frozen format, which two sides with different versions both read. It is
the package ``zstandard`` (``pip install 'foedus[compress]'``); from Python 3.14 on it is in the standard library.
Behind a rotation it comes within 2 % of the codes' entropy. It cannot give a symbol less than a bit, so two things
are done first: codes of 1, 2 and 4 bits are laid several to a byte, and where nearly all codes are the same, only
the others are sent, with their positions (as ``core/sparse.py`` codes them), which stays within about 10 % of the
entropy.

What arrives is decompressed into exactly the number of bytes that the codes take: a frame that says or holds
anything else is refused, so that no message grows in memory (a "decompression bomb").

Not here: quantisers (``core/quantise.py``).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.coding import refused
from foedus.core.sparse import positions_bytes, positions_packed, positions_unpacked
from foedus.core.stage import Kind, Stage, packed, unpacked
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, MissingExtra


def entropy(level: int = 1) -> Stage:
    """Code what a quantiser gives without loss, in fewer bytes when some codes are more frequent than others.

    It stands behind a quantiser and is undone message by message. It pays behind ``qsgd`` with few levels and
    ``quantise`` without rotation (most codes are alike: a tenth is left, or less), gains 10 to 45 % behind
    ``rotate`` and ``quantise``, and hardly 5 % behind ``eden``.

    Args:
        level: Zstandard's, 1 (fast) to 19 (small); more than 1 rarely gains a per cent here.

    Raises:
        MissingExtra: the package ``zstandard`` is not installed.

    Example:
        >>> stage, context = entropy(), Context(seed=0, round=1, client=0, size=10_000)
        >>> sent = stage.encode(Update(np.zeros(10_000, np.uint8), 1.0), context)
        >>> len(sent.vector) < 40, int(stage.decode(sent, context).vector.sum())
        (True, 0)
    """
    check_whole("level", level, least=1, most=19)
    _library()

    def encode(update: Update, context: Context) -> Update:
        codes = update.vector
        if codes.dtype.kind != "u":
            raise ConfigurationError(f"entropy() codes whole numbers without sign, not {codes.dtype}")
        dense = _squeezed(codes, level)
        often = int(np.argmax(np.bincount(codes))) if len(codes) else 0
        others = np.flatnonzero(codes != often)
        if len(others) >= len(codes) / 4:
            return update._replace(vector=_framed(dense, 0, len(codes)))
        few = _squeezed(codes[others] - (codes[others] > often), level)
        whole = _framed(few, often, len(others), *positions_packed(others, len(codes)))
        return update._replace(vector=min(_framed(dense, 0, len(codes)), whole, key=len))

    def decode(update: Update, context: Context) -> Update:
        head, rest = _opened(update.vector, context)
        if head.number == context.size:
            return update._replace(vector=_unfolded(rest, head, context))
        first, second = positions_bytes(head.number, context.size)
        if len(rest) < first + second:
            raise refused(f"sent {len(rest)} bytes where {first + second} of positions are expected", context)
        low, high = rest[:first], rest[first : first + second]
        at = positions_unpacked(low, high, head.number, context=context)
        others = _unfolded(rest[first + second :], head, context)
        whole = np.full(context.size, head.often, np.uint8 if head.often < 256 and others.itemsize == 1 else np.uint16)
        whole[at] = others + (others >= head.often)
        return update._replace(vector=whole)

    label = "entropy()" if level == 1 else f"entropy({level})"
    return Stage(encode, decode, label, linear=False, takes=Kind.CODES, gives=Kind.BYTES)


class _Head(NamedTuple):
    """The first 12 bytes."""

    bits: int  # how wide codes are laid
    often: int  # the code that is not sent
    number: int  # how many are sent; all, if it is as many as there are


_HEAD = struct.Struct("<HHQ")


def _framed(squeezed: tuple[int, bytes], often: int, count: int, *positions: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Head, positions and frame, as bytes."""
    bits, frame = squeezed
    head = np.frombuffer(_HEAD.pack(bits, often, count), np.uint8)
    return np.concatenate([head, *positions, np.frombuffer(frame, np.uint8)])


def _opened(data: NDArray[Any], context: Context) -> tuple[_Head, NDArray[np.uint8]]:
    """The head, once it can be true, and what follows."""
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) < _HEAD.size:
        raise refused(f"sent {data.dtype}{list(data.shape)} where compressed bytes are expected", context)
    head = _Head(*_HEAD.unpack(data[: _HEAD.size].tobytes()))
    if head.bits not in (1, 2, 4, 8, 16) or head.number > context.size:
        raise refused(f"sent {head.number} codes of {head.bits} bits, of {context.size}", context)
    return head, data[_HEAD.size :]


def _squeezed(codes: NDArray[Any], level: int) -> tuple[int, bytes]:
    """How wide codes were laid, and Zstandard's frame of them."""
    bits = _bits(int(codes.max(initial=0)))
    return bits, _library().ZstdCompressor(level=level, write_checksum=False).compress(_laid(codes, bits).data)


def _unfolded(frame: NDArray[np.uint8], head: _Head, context: Context) -> NDArray[Any]:
    """The codes of a frame."""
    raw = _expanded(frame, -(-head.number * head.bits // 8), context)
    return _taken(raw, head.bits, head.number)


def _bits(largest: int) -> int:
    """How wide codes are laid: the least of 1, 2, 4, 8, 16 bits that holds the largest."""
    return next(b for b in (1, 2, 4, 8, 16) if largest < 2**b)


def _laid(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes as bytes; those of 16 bits as all low bytes and then all high ones, which differ in how even they are."""
    if bits < 16:
        return packed(codes, bits)
    return np.ascontiguousarray(codes.astype("<u2").view(np.uint8).reshape(-1, 2).T).reshape(-1)


def _taken(raw: NDArray[np.uint8], bits: int, count: int) -> NDArray[Any]:
    """The inverse of :func:`_laid`."""
    if bits < 16:
        return unpacked(raw, bits, count)
    return np.ascontiguousarray(raw.reshape(2, -1).T).view("<u2").reshape(-1)


def _expanded(data: NDArray[Any], size: int, context: Context) -> NDArray[np.uint8]:
    """The ``size`` bytes that compressed ones stand for.

    Raises:
        UpdateRefused: they stand for fewer or more, or for nothing.
    """
    library = _library()
    frame = np.ascontiguousarray(data).data
    try:
        told = library.frame_content_size(frame)
        if told != size:
            raise refused(f"sent a frame of {told} bytes where {size} are expected", context)
        found = library.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except library.ZstdError as error:
        raise refused(f"sent bytes that cannot be decompressed ({error})", context) from None
    if len(found) != size:
        raise refused(f"sent a frame of {len(found)} bytes where {size} are expected", context)
    return np.frombuffer(found, np.uint8)


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("zstandard", "compress", "entropy()") from None
    return zstandard
