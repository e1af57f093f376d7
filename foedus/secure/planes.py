"""Whole numbers of any width on the wire, to the bit, and added up without being taken apart first.

A vector of b-bit numbers is laid as *planes*: one for each power of two that b is the sum of, the widest first. 26 = 16
+ 8 + 2: all numbers' lowest 16 bits, then their next 8, then their highest 2. A plane of 8 bits or more is an ordinary
array; of a narrower one, a byte holds what belongs to entries that lie far apart (the first bits of all bytes are the
first part of the vector, the next bits the second), so that packing is shifts of whole arrays, at memory's speed.

Sums are taken plane by plane and put together once, at the end: a server adds a client's packed vector in the time
that copying it takes (:class:`Tally`), in integers no wider than the plane's own.

Not here: codes of quantisers (``core/stage.py``), what the numbers stand for (``secure/fixed_point.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import blocks
from foedus.errors import ConfigurationError

Bytes = NDArray[np.uint8]
_AT_ONCE = 1 << 17  # numbers that are added at a time: what it takes still fits the cache, and calls are few


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


@lru_cache(maxsize=64)
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
    check_packed(values, count, bits)
    found = np.zeros(count, word(bits))
    for plane in _planes(count, bits):
        part, shift = values[plane.start : plane.stop], found.dtype.type(plane.shift)
        if plane.width >= 8:
            part = part.view(f"<u{plane.width // 8}")
        length = len(part)
        for lane in range(plane.lanes):
            goal = found[lane * length : (lane + 1) * length]
            for place in blocks(len(goal)):
                numbers = part[place]
                if plane.lanes > 1:
                    numbers = (numbers >> np.uint8(lane * plane.width)) & np.uint8(2**plane.width - 1)
                goal[place] |= numbers.astype(found.dtype) << shift
    return found


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
        self._count, self._bits = count, bits
        self._total: NDArray[Any] = np.zeros(count, word(bits))  # what the planes have been emptied into
        self._sums = [_summing(plane, bits, self._total) for plane in _planes(count, bits)]

    def add(self, values: Bytes) -> None:
        """Add a packed vector.

        Raises:
            ConfigurationError: it is none; nothing has been added.
        """
        check_packed(values, self._count, self._bits)
        for each in self._sums:
            each.add(values)

    def total(self) -> NDArray[Any]:
        """The sum so far [n], of the :func:`word` that holds ``bits``."""
        for each in self._sums:
            each.empty()
        kind = self._total.dtype
        return self._total & kind.type(2**self._bits - 1) if self._bits < 8 * kind.itemsize else self._total.copy()


class _Sum(Protocol):
    """The sum of one plane. ``empty`` adds it to the total, where it begins anew from 0."""

    def add(self, values: Bytes) -> None: ...

    def empty(self) -> None: ...


def _summing(plane: _Plane, bits: int, total: NDArray[Any]) -> _Sum:
    """What goes beyond the highest plane is left away, and costs nothing; from the others it is carried."""
    top = plane.shift + plane.width == bits
    if plane.width >= 8:
        return _Top(plane, total) if top else _Words(plane, total)
    return _Ring(plane, total) if top else _Lanes(plane, total)


def _move(numbers: NDArray[Any], total: NDArray[Any], shift: int) -> None:
    """Add numbers, so many bits higher, to a total that has as many or fewer, and set them to 0."""
    by = total.dtype.type(shift)
    for at in range(0, len(total), _AT_ONCE):
        part = total[at : at + _AT_ONCE]
        wide = numbers[at : at + len(part)].astype(total.dtype)
        np.left_shift(wide, by, out=wide)
        np.add(part, wide, out=part)
    numbers[...] = 0


def _lane(plane: _Plane, total: NDArray[Any], lane: int) -> NDArray[Any]:
    """The numbers of the total that lie in one lane of a plane's bytes."""
    length = plane.stop - plane.start
    found: NDArray[Any] = total[lane * length : (lane + 1) * length]
    return found


def _own(plane: _Plane, values: Bytes) -> NDArray[Any]:
    """A plane of a packed vector, as its integers, which lie on whole words."""
    part = values[plane.start : plane.stop].view(f"<u{max(1, plane.width // 8)}")
    return part if part.flags.aligned else part.copy()


class _Top:
    """The sum of the highest plane, where its numbers are integers of the machine."""

    def __init__(self, plane: _Plane, total: NDArray[Any]) -> None:
        self._of, self._total = plane, total
        self._sums = np.zeros((plane.stop - plane.start) * 8 // plane.width, f"<u{plane.width // 8}")

    def add(self, values: Bytes) -> None:
        np.add(self._sums, _own(self._of, values), out=self._sums)

    def empty(self) -> None:
        _move(self._sums, self._total, self._of.shift)


class _Words:
    """The sum of another plane of such integers: added as they are, without wider ones.

    A sum that is less than what was added last has wrapped around: that is counted, in bytes, and the bytes are emptied
    before they could wrap around themselves.
    """

    def __init__(self, plane: _Plane, total: NDArray[Any]) -> None:
        self._of, self._total = plane, total
        length = (plane.stop - plane.start) * 8 // plane.width
        self._low = np.zeros(length, f"<u{plane.width // 8}")
        self._carried = np.zeros(length, np.uint8)
        self._wrapped = np.zeros(min(length, _AT_ONCE), bool)  # of one block, each time
        self._added = 0

    def add(self, values: Bytes) -> None:
        part = _own(self._of, values)
        if self._added == 255:
            self.empty()
        self._added += 1
        for at in range(0, len(part), _AT_ONCE):
            own, sums, carried = (each[at : at + _AT_ONCE] for each in (part, self._low, self._carried))
            wrapped = self._wrapped[: len(own)]
            np.add(sums, own, out=sums)
            np.less(sums, own, out=wrapped)
            np.add(carried, wrapped.view(np.uint8), out=carried)

    def empty(self) -> None:
        _move(self._low, self._total, self._of.shift)
        _move(self._carried, self._total, self._of.shift + self._of.width)
        self._added = 0


class _Ring:
    """The sum of the highest plane, of less than a byte, modulo 2^width: added where the numbers lie. The highest bit
    of each is added by itself, so that nothing runs over into the next number."""

    def __init__(self, plane: _Plane, total: NDArray[Any]) -> None:
        self._of, self._total = plane, total
        self._sums = np.zeros(plane.stop - plane.start, np.uint8)
        self._heads = np.uint8(sum(1 << at for at in range(plane.width - 1, 8, plane.width)))

    def add(self, values: Bytes) -> None:
        part, sums = _own(self._of, values), self._sums
        if self._of.width == 1:
            sums ^= part
            return
        for place in blocks(len(sums)):
            a, b = sums[place], part[place]
            heads = (a ^ b) & self._heads
            a &= ~self._heads
            a += b & ~self._heads
            a ^= heads

    def empty(self) -> None:
        own = np.uint8(2**self._of.width - 1)
        for lane in range(self._of.lanes):
            part = (self._sums >> np.uint8(lane * self._of.width)) & own
            _move(part, _lane(self._of, self._total, lane), self._of.shift)
        self._sums[...] = 0


class _Lanes:
    """The sum of another plane of less than a byte.

    Numbers are summed where they lie, in slots twice as wide, the even ones and the odd ones apart; before the slots
    are full they are emptied into slots twice as wide again, up to 8 bits, and these into the total. So a vector of
    single bits takes some ten passes over its bytes, and not one for every lane of them.
    """

    def __init__(self, plane: _Plane, total: NDArray[Any]) -> None:
        self._of, self._total = plane, total
        widths = [w for w in (1, 2, 4) if w >= plane.width]
        # A few bytes more, so that rows are whole words of 64 bits: sixty-four slots of a bit are added at a time.
        words = -(-(plane.stop - plane.start) // 8)
        self._slots = [np.zeros((2 * w // plane.width, words), np.uint64) for w in widths]
        self._filled = [0] * len(widths)
        self._words = np.zeros((1, words), np.uint64)  # of the vector that is added
        self._moved = [np.empty((len(slots) // 2, words), np.uint64) for slots in self._slots]

    def add(self, values: Bytes) -> None:
        part = values[self._of.start : self._of.stop]
        self._words.view(np.uint8)[0, : len(part)] = part
        self._into(0, self._words)

    def _into(self, level: int, rows: NDArray[np.uint64]) -> None:
        """Add rows [row, word] of slots to those twice as wide."""
        width = self._of.width << level
        if self._filled[level] == 2**width + 1:  # (2^w + 1) (2^w − 1) = 2^2w − 1: the wider slots are full
            self._empty(level)
        self._filled[level] += 1
        mask, moved = _slots(width), self._moved[level]
        even, odd = self._slots[level][: len(rows)], self._slots[level][len(rows) :]
        np.bitwise_and(rows, mask, out=moved)
        np.add(even, moved, out=even)
        np.right_shift(rows, np.uint64(width), out=moved)
        np.bitwise_and(moved, mask, out=moved)
        np.add(odd, moved, out=odd)

    def _empty(self, level: int) -> None:
        """Move sums of slots on, to slots twice as wide."""
        if level + 1 < len(self._slots):
            self._into(level + 1, self._slots[level])
        else:
            for lane, row in enumerate(self._slots[level].view(np.uint8)):
                _move(row, _lane(self._of, self._total, lane), self._of.shift)
        self._slots[level][...] = 0
        self._filled[level] = 0

    def empty(self) -> None:
        for level in range(len(self._slots)):
            self._empty(level)


@lru_cache(maxsize=8)
def _slots(width: int) -> np.uint64:
    """Ones in every other slot of so many bits."""
    slot = (1 << width) - 1
    return np.uint64(sum(slot << at for at in range(0, 64, 2 * width)))
