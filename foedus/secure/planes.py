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
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foedus.core.coding import BLOCK, blocks
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
        self._sums = [_summing(plane, bits) for plane in _planes(count, bits)]

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
        kind = word(self._bits)
        found = np.zeros(self._count, kind)
        for each in self._sums:
            sums, shift = each.total().reshape(-1), kind.type(each.of.shift)
            for place in blocks(self._count):
                found[place] += sums[place].astype(kind, copy=False) << shift
        if self._bits < 8 * kind.itemsize:
            found &= kind.type(2**self._bits - 1)
        return found


class _Sum(Protocol):
    """The sum of one plane: ``total`` [lane, entry]."""

    of: _Plane

    def add(self, values: Bytes) -> None: ...

    def total(self) -> NDArray[Any]: ...


def _summing(plane: _Plane, bits: int) -> _Sum:
    """What goes beyond the highest plane is left away, and costs nothing; from the others it is carried."""
    top = plane.shift + plane.width == bits
    if plane.width >= 8:
        return _Words(plane, None if top else word(bits))
    return _Ring(plane) if top else _Lanes(plane, word(bits))


def _own(plane: _Plane, values: Bytes) -> NDArray[Any]:
    """A plane of a packed vector, as its integers, which lie on whole words."""
    part = values[plane.start : plane.stop].view(f"<u{max(1, plane.width // 8)}")
    return part if part.flags.aligned else part.copy()


class _Words:
    """The sum of a plane whose numbers are integers of the machine: added as they are, without wider ones.

    A sum that is less than what was added last has wrapped around: that is counted, in bytes, and the bytes are emptied
    before they could wrap around themselves. ``kind``: of the sums; ``None``: nobody wants to know how often.
    """

    def __init__(self, plane: _Plane, kind: np.dtype[Any] | None) -> None:
        self.of, self._kind = plane, kind
        length = (plane.stop - plane.start) * 8 // plane.width
        self._low = np.zeros(length, f"<u{plane.width // 8}")
        self._carried = np.zeros(0 if kind is None else length, np.uint8)
        self._wrapped = np.zeros(min(length, BLOCK), bool)  # of one block, each time
        self._high = None if kind is None else np.zeros(length, kind)
        self._added = 0

    def add(self, values: Bytes) -> None:
        part, low = _own(self.of, values), self._low
        if self._high is None:
            low += part
            return
        if self._added == 255:
            self._empty()
        self._added += 1
        for place in blocks(len(part)):
            own, sums = part[place], low[place]
            wrapped = self._wrapped[: len(own)]
            np.add(sums, own, out=sums)
            np.less(sums, own, out=wrapped)
            self._carried[place] += wrapped.view(np.uint8)

    def _empty(self) -> None:
        assert self._high is not None
        self._high += self._carried
        self._carried[...] = 0
        self._added = 0

    def total(self) -> NDArray[Any]:
        """The sum [1, entry]."""
        if self._high is None or self._kind is None:
            return self._low[None]
        self._empty()
        found: NDArray[Any] = self._high << self._kind.type(self.of.width)
        found += self._low
        return found[None]


class _Ring:
    """The sum of the highest plane, of less than a byte, modulo 2^width: added where the numbers lie. The highest bit
    of each is added by itself, so that nothing runs over into the next number."""

    def __init__(self, plane: _Plane) -> None:
        self.of = plane
        self._sums = np.zeros(plane.stop - plane.start, np.uint8)
        self._heads = np.uint8(sum(1 << at for at in range(plane.width - 1, 8, plane.width)))

    def add(self, values: Bytes) -> None:
        part, sums = _own(self.of, values), self._sums
        if self.of.width == 1:
            sums ^= part
            return
        for place in blocks(len(sums)):
            a, b = sums[place], part[place]
            heads = (a ^ b) & self._heads
            a &= ~self._heads
            a += b & ~self._heads
            a ^= heads

    def total(self) -> NDArray[Any]:
        """The sum [lane, entry]."""
        width = self.of.width
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        found: NDArray[Any] = (self._sums >> shifts) & np.uint8(2**width - 1)
        return found


class _Lanes:
    """The sum of another plane of less than a byte: ``wide`` [lane, entry].

    Numbers are summed where they lie, in slots twice as wide, the even ones and the odd ones apart; before the slots
    are full they are emptied into slots twice as wide again, up to 8 bits, and these into ``wide``. So a vector of
    single bits takes some ten passes over its bytes, and not one for every lane of them.
    """

    def __init__(self, plane: _Plane, kind: np.dtype[Any]) -> None:
        self.of = plane
        length = plane.stop - plane.start
        self._wide = np.zeros((plane.lanes, length), max(kind, np.dtype("<u4")))
        widths = [w for w in (1, 2, 4) if w >= plane.width]
        # A few bytes more, so that rows are whole words of 64 bits: sixty-four slots of a bit are added at a time.
        words = -(-length // 8)
        self._slots = [np.zeros((2 * w // plane.width, words), np.uint64) for w in widths]
        self._filled = [0] * len(widths)

    def add(self, values: Bytes) -> None:
        part = values[self.of.start : self.of.stop]
        words = np.zeros((1, self._slots[0].shape[1]), np.uint64)
        words.view(np.uint8)[0, : len(part)] = part
        self._into(0, words)

    def _into(self, level: int, rows: NDArray[np.uint64]) -> None:
        """Add rows [row, word] of slots to those twice as wide."""
        width = self.of.width << level
        if self._filled[level] == 2**width + 1:  # (2^w + 1) (2^w − 1) = 2^2w − 1: the wider slots are full
            self._empty(level)
        self._filled[level] += 1
        mask, sums, count = _slots(width), self._slots[level], len(rows)
        moved = np.bitwise_and(rows, mask)
        sums[:count] += moved
        np.right_shift(rows, np.uint64(width), out=moved)
        moved &= mask
        sums[count:] += moved

    def _empty(self, level: int) -> None:
        """Move sums of slots on, to slots twice as wide."""
        if level + 1 < len(self._slots):
            self._into(level + 1, self._slots[level])
        else:
            for wide, row in zip(self._wide, self._slots[level].view(np.uint8), strict=True):
                wide += row[: len(wide)]
        self._slots[level][...] = 0
        self._filled[level] = 0

    def total(self) -> NDArray[Any]:
        """The sum [lane, entry]."""
        for level in range(len(self._slots)):
            self._empty(level)
        return self._wide


def _slots(width: int) -> np.uint64:
    """Ones in every other slot of so many bits."""
    slot = (1 << width) - 1
    return np.uint64(sum(slot << at for at in range(0, 64, 2 * width)))
