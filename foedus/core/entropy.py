"""Lossless coding: codes that are not equally frequent take fewer bits than they are wide.

The work is done by Zstandard (RFC 8878), whose entropy stage (Huffman and FSE) comes within a few per cent of the
codes' entropy and which also finds runs. It is the package ``zstandard`` (``pip install 'foedus[compress]'``); from
Python 3.14 on it is in the standard library.

Codes of 1, 2 and 4 bits are laid several to a byte first, so that none takes a whole bit less than it needs to and
neighbours are coded together. What arrives is decompressed into exactly the number of bytes that the codes take: a
frame that says or holds anything else is refused before its content is written anywhere, so that no message grows
in memory (a "decompression bomb").

Not here: quantisers (``core/quantise.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.core.coding import part, refused
from foedus.core.stage import Kind, Stage, packed, unpacked
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, MissingExtra


def entropy(level: int = 1) -> Stage:
    """Code what a quantiser gives without loss, in fewer bytes when some codes are more frequent than others.

    It stands behind a quantiser and is undone message by message. It pays behind ``qsgd`` with few levels and
    ``quantise`` without rotation (most codes are alike), and gains 3 to 15 % behind ``rotate`` or ``eden``.

    Args:
        level: Zstandard's, 1 (fast) to 19 (small); more than 1 rarely gains a per cent here.

    Raises:
        MissingExtra: the package ``zstandard`` is not installed.

    Example:
        >>> stage, context = entropy(), Context(seed=0, round=1, client=0, size=10_000)
        >>> sent = stage.encode(Update(np.zeros(10_000, np.uint8), 1.0), context)
        >>> len(sent.vector) < 30, int(stage.decode(sent, context).vector.sum())
        (True, 0)
    """
    check_whole("level", level, least=1, most=19)
    _library()

    def encode(update: Update, context: Context) -> Update:
        if update.vector.dtype.kind != "u":
            raise ConfigurationError(f"entropy() codes whole numbers without sign, not {update.vector.dtype}")
        bits = _bits(int(update.vector.max(initial=0)))
        raw = _laid(update.vector, bits)
        found = _library().ZstdCompressor(level=level, write_checksum=False).compress(raw.data)
        return update._replace(
            vector=np.frombuffer(found, np.uint8), beside={"bits": np.array([bits], np.uint8)}
        )

    def decode(update: Update, context: Context) -> Update:
        bits = int(part(update.beside, "bits", context, dtype="uint8", shape=(1,))[0])
        if bits not in (1, 2, 4, 8, 16):
            raise refused(f"sent codes of {bits} bits", context)
        raw = _expanded(update.vector, -(-context.size * bits // 8), context)
        return update._replace(vector=_taken(raw, bits, context.size))

    label = "entropy()" if level == 1 else f"entropy({level})"
    return Stage(encode, decode, label, linear=False, takes=Kind.CODES, gives=Kind.BYTES)


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
    if data.dtype != np.uint8 or data.ndim != 1:
        raise refused(f"sent {data.dtype}{list(data.shape)} where compressed bytes are expected", context)
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
