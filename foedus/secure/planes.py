"""Whole numbers of any width on the wire, to the bit, and added up without being taken apart first.

A vector of b-bit numbers is laid as *planes*: one for each power of two that b is the sum of, the widest first. 26 = 16
+ 8 + 2: all numbers' lowest 16 bits, then their next 8, then their highest 2. A plane of 8 bits or more is an ordinary
array; of a narrower one, a byte holds what belongs to entries that lie far apart (the first bits of all bytes are the
first part of the vector, the next bits the second), so that packing is shifts of whole arrays, at memory's speed.

Sums are taken plane by plane and put together once, at the end: a server adds a client's packed vector in the time
that copying it takes (:class:`Tally`).

Not here: codes of quantisers (``core/stage.py``), what the numbers stand for (``secure/fixed_point.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import blocks
from foedus.errors import ConfigurationError

Bytes = NDArray[np.uint8]


class _Plane(NamedTuple):
    """Bits ``shift`` … ``shift + width − 1`` of all numbers, in the bytes ``start`` … ``stop − 1``."""

    width: int
    shift: int
    start: int
    stop: int

    @property
    def lanes(self) -> int:
        """Numbers in a byte; 1 where a number takes one byte or more."""
        return max(1, 8 // self.width)


def word(bits: int) -> np.dtype[Any]:
    """The narrowest unsigned integers that hold so many bits.

    Example:
        >>> word(16), word(26), word(33)
        (dtype('uint16'), dtype('uint32'), dtype('uint64'))
    """
    return np.dtype(f"<u{next(size for size in (2, 4, 8) if bits <= 8 * size)}")


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes so many numbers take: ⌈count · bits / 8⌉, and up to three more where planes end within a byte.

    Example:
        >>> packed_bytes(1000, 26), packed_bytes(1001, 26)
        (3250, 3254)
    """
    *_, last = _planes(count, bits)
    return last.stop


def _planes(count: int, bits: int) -> Iterator[_Plane]:
    shift = start = 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & width or bits == 64:
            for _ in range(1 if bits < 64 else 2 * (width == 32)):
                stop = start + (count * width // 8 if width >= 8 else -(-count * width // 8))
                yield _Plane(width, shift, start, stop)
                shift, start = shift + width, stop


def packed(numbers: NDArray[Any], bits: int) -> Bytes:
    """Unsigned integers [n] of which the lowest ``bits`` travel, as bytes.

    Args:
        numbers: uint16, uint32 or uint64.
        bits: 1 to 64.

    Example:
        >>> packed(np.array([1, 2, 3], np.uint32), 10).tolist()
        [1, 2, 3, 0]
    """
    found = np.empty(packed_bytes(len(numbers), bits), np.uint8)
    for plane in _planes(len(numbers), bits):
        goal = found[plane.start : plane.stop]
        if plane.width >= 8:
            whole = goal.view(f"<u{plane.width // 8}")
            for place in blocks(len(numbers)):
                whole[place] = _shifted(numbers[place], plane.shift)
        else:
            _narrow(numbers, plane, goal)
    return found


def _shifted(numbers: NDArray[Any], shift: int) -> NDArray[Any]:
    return np.right_shift(numbers, numbers.dtype.type(shift)) if shift else numbers


def _narrow(numbers: NDArray[Any], plane: _Plane, goal: Bytes) -> None:
    """A plane of less than a byte."""
    goal[:] = 0
    for lane in range(plane.lanes):
        part = numbers[lane * len(goal) : (lane + 1) * len(goal)]
        for place in blocks(len(part)):
            bits = _shifted(part[place], plane.shift).astype(np.uint8) & np.uint8(2**plane.width - 1)
            goal[place] |= bits << np.uint8(lane * plane.width)


def check_packed(values: Any, count: int, bits: int) -> None:
    """Refuse what is not so many numbers.

    Raises:
        ConfigurationError: it is of another type or length.
    """
    size = packed_bytes(count, bits)
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.shape != (size,):
        told = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ConfigurationError(f"{count} numbers of {bits} bits take {size} bytes; there is {told}")


def unpacked(values: Bytes, bits: int, count: int) -> NDArray[Any]:
    """The inverse of :func:`packed`: integers of the :func:`word` that holds them, [n].

    Raises:
        ConfigurationError: there are not as many bytes as so many numbers take.

    Example:
        >>> unpacked(packed(np.array([1, 1000], np.uint32), 10), 10, 2).tolist()
        [1, 1000]
    """
    tally = Tally(count, bits)
    tally.add(values)
    return tally.total()


class Tally:
    """The sum of packed vectors, modulo 2^bits.

    Example:
        >>> tally = Tally(2, 10)
        >>> for numbers in ([1, 1000], [5, 100]):
        ...     tally.add(packed(np.array(numbers, np.uint32), 10))
        >>> tally.total().tolist()
        [6, 76]
    """

    def __init__(self, count: int, bits: int) -> None:
        self._count, self._bits, self._added = count, bits, 0
        self._planes = list(_planes(count, bits))
        self._sums = [self._zeros(plane) for plane in self._planes]
        self._carried: NDArray[Any] | None = None

    def _zeros(self, plane: _Plane) -> NDArray[Any]:
        """Sums of a plane: as wide as all the numbers, but 16 bits for planes of up to 8, which are emptied in time."""
        if plane.width >= 8:
            return np.zeros(self._count, word(self._bits) if plane.width > 8 else word(16))
        return np.zeros((plane.lanes, plane.stop - plane.start), np.uint8)

    def add(self, values: Bytes) -> None:
        """Add a packed vector.

        Raises:
            ConfigurationError: it is none; nothing has been added.
        """
        check_packed(values, self._count, self._bits)
        if self._added == 17:  # 17 · 15 = 255: as many as the narrow sums hold
            self._empty()
        for plane, total in zip(self._planes, self._sums, strict=True):
            part = values[plane.start : plane.stop]
            if plane.width >= 8:
                whole = part.view(f"<u{plane.width // 8}")
                for place in blocks(len(whole)):
                    np.add(total[place], whole[place], out=total[place], casting="unsafe")
            else:
                _add_lanes(total, part, plane.width)
        self._added += 1

    def _empty(self) -> None:
        """Put the sums of planes together, and begin them anew."""
        self._carried, self._added = self._together(), 0
        for total in self._sums:
            total[...] = 0

    def _together(self) -> NDArray[Any]:
        kind = word(self._bits)
        found = np.zeros(self._count, kind) if self._carried is None else self._carried
        for plane, total in zip(self._planes, self._sums, strict=True):
            flat = total.reshape(-1)[: self._count]
            for place in blocks(self._count):
                found[place] += flat[place].astype(kind, copy=False) << kind.type(plane.shift)
        return found

    def total(self) -> NDArray[Any]:
        """The sum so far [n], of the :func:`word` that holds ``bits``; the tally is used up."""
        found = self._together()
        if self._bits < 8 * found.dtype.itemsize:
            found &= found.dtype.type(2**self._bits - 1)
        return found


def _add_lanes(total: NDArray[np.uint8], values: Bytes, width: int) -> None:
    """Sums [lane, byte] plus what lies in the bytes [byte]."""
    mask, lanes = np.uint8(2**width - 1), len(total)
    for place in blocks(len(values)):
        part = values[place]
        for lane in range(lanes):
            moved = part if lane == 0 else part >> np.uint8(lane * width)
            total[lane, place] += moved if lane == lanes - 1 else moved & mask
