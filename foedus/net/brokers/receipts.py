"""A receipt, or claim check: what passes the broker instead of an update. At most 4 KB, and nothing of the data in it.

It says whose update, of which run, round and attempt, how large it is, which digest it has, and where whoever merges it
gets the bytes. It is read as strictly as anything that comes from outside, although only gateways write it.

Not here: the bytes (a gateway's memory, or the blobs in modes sealed and durable).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import msgpack

from foedus.errors import MalformedMessage
from foedus.net.brokers.broker import LARGEST

__all__ = ["Receipt", "attempt_step"]

_SCHEMA = "foedus receipt", 1


def attempt_step(run: str, round: int, attempt: int) -> tuple[str, int, int]:
    """What a partial sum is of: one attempt of a round, so that a new attempt begins with nothing."""
    return run, round, attempt


@dataclass(frozen=True)
class Receipt:
    """One update that a gateway has whole.

    Example:
        >>> receipt = Receipt("heart", 3, 0, 1, 7, b"k" * 16, 3, 1.0, "memory:gw-1/ab", 100, b"d" * 32)
        >>> Receipt.read(receipt.packed()) == receipt, len(receipt.packed())
        (True, 105)

    Attributes:
        run, round, part, attempt: what it is for.
        position: the client's.
        key: of its seat.
        version: the round whose orders it trained from.
        scale: what it was scaled by.
        uri: where its bytes are: ``memory:GATEWAY/UPLOAD``, or ``blob:DIGEST``.
        size, digest: of its bytes.
    """

    run: str
    round: int
    part: int
    attempt: int
    position: int
    key: bytes
    version: int
    scale: float
    uri: str
    size: int
    digest: bytes

    def packed(self) -> bytes:
        """As it is published."""
        content: bytes = msgpack.packb([*_SCHEMA, *astuple(self)])
        if len(content) > LARGEST:
            raise MalformedMessage(f"a receipt has at most {LARGEST} bytes, and this one {len(content)}")
        return content

    @property
    def step(self) -> tuple[str, int, int]:
        """What its sum is of."""
        return attempt_step(self.run, self.round, self.attempt)

    @classmethod
    def read(cls, content: bytes) -> Receipt:
        """What was published; raises `MalformedMessage` for anything else."""
        if len(content) > LARGEST:
            raise MalformedMessage(f"a receipt has at most {LARGEST} bytes, and {len(content)} came")
        try:
            told = msgpack.unpackb(content, max_array_len=32, max_map_len=0, max_ext_len=0)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise MalformedMessage("a record of the broker is no receipt") from error
        if not isinstance(told, list) or tuple(told[:2]) != _SCHEMA or len(told) != 2 + len(fields(cls)):
            raise MalformedMessage("a record of the broker is no receipt of version 1")
        receipt = cls(*told[2:])
        _check(receipt)
        return receipt


_KINDS: dict[str, type] = {
    "run": str, "round": int, "part": int, "attempt": int, "position": int, "key": bytes, "version": int,
    "scale": float, "uri": str, "size": int, "digest": bytes,
}  # fmt: skip


def _check(receipt: Receipt) -> None:
    values: dict[str, Any] = {name: getattr(receipt, name) for name in _KINDS}
    if any(type(values[name]) is not kind for name, kind in _KINDS.items()):
        raise MalformedMessage("a receipt has a value of another kind")
    whole = [values[n] for n, kind in _KINDS.items() if kind is int]
    if min(whole) < 0 or max(whole) > 2**53 or len(receipt.key) != 16 or len(receipt.digest) != 32:
        raise MalformedMessage("a receipt has a value out of its bounds")
    if not 0.0 <= receipt.scale <= 1.0 or len(receipt.run) > 128 or len(receipt.uri) > 1000:
        raise MalformedMessage("a receipt has a value out of its bounds")
