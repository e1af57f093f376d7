"""Frames between the agent and its training process: a small map of plain values, and blobs behind it.

    4 bytes, little endian: the head's length
    head: MessagePack, {"blobs": [lengths], ...}
    the blobs, one after another

Neither side believes the other: the head is bounded and read strictly, and the blobs by a limit of the reader's.
Nothing is pickled, so a training process that was taken over can send the agent bytes and plain values, and nothing
else.

Not here: what is said (``training.py``, ``trainee.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import msgpack

from foedus.errors import MalformedMessage

__all__ = ["MOST", "Frame", "head_of", "packed", "receive", "send"]

HEAD = 1 << 20  # bytes of a head, at most
BLOBS = 64
MOST = 1 << 36  # bytes of a frame's blobs together


class Frame(NamedTuple):
    """What is said, and the blobs that go with it."""

    said: dict[str, Any]
    blobs: tuple[bytes, ...] = ()


def packed(said: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """The length and the head of a frame, behind which its blobs follow.

    Example:
        >>> data = packed({"do": "train"}, [b"abc"])
        >>> head_of(data[4:])
        ({'do': 'train'}, [3])
    """
    head = msgpack.packb({**said, "blobs": [len(blob) for blob in blobs]})
    if len(head) > HEAD:
        raise MalformedMessage(f"a frame's head of {len(head)} bytes; at most {HEAD} are written")
    return len(head).to_bytes(4, "little") + bytes(head)


def head_of(data: bytes) -> tuple[dict[str, Any], list[int]]:
    """What a head says, and how long the blobs behind it are.

    Raises:
        MalformedMessage: it is no head.
    """
    try:
        said = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MalformedMessage(f"a frame of the training process cannot be read: {error}") from None
    lengths = said.pop("blobs", None) if isinstance(said, dict) else None
    if not isinstance(lengths, list) or len(lengths) > BLOBS or not all(type(n) is int and n >= 0 for n in lengths):
        raise MalformedMessage("a frame of the training process has no list of blobs")
    if sum(lengths) > MOST:
        raise MalformedMessage(f"a frame of {sum(lengths)} bytes; at most {MOST} are read")
    return said, lengths


def length_of(data: bytes) -> int:
    """How long the head is whose length these four bytes tell."""
    length = int.from_bytes(data, "little")
    if length > HEAD:
        raise MalformedMessage(f"a frame's head of {length} bytes; at most {HEAD} are read")
    return length


def send(file: BinaryIO, said: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write a frame."""
    file.write(packed(said, blobs))
    for blob in blobs:
        file.write(blob)
    file.flush()


def receive(file: BinaryIO) -> Frame | None:
    """Read a frame; ``None`` where there is no more."""
    length = file.read(4)
    if len(length) < 4:
        return None
    said, lengths = head_of(_exactly(file, length_of(length)))
    return Frame(said, tuple(_exactly(file, n) for n in lengths))


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise MalformedMessage("a frame of the training process ends too early")
    return data
