"""Uploads under way, in a bounded part of the memory; never on a disk.

A place is made when its size is known and there is room for all of it; who finds no room is told to come back, so that
clients wait and not the server's memory. Bytes come in order, in pieces, and may be resumed at the offset that has been
reached. A place that nobody writes to is given up after a while.

Not here: what the bytes are (``coordinator``).
"""

from __future__ import annotations

from dataclasses import dataclass

from foedus.errors import Code, NotNow, ProtocolError, TooLarge, UploadRefused

MOST = 1 << 30  # bytes of all uploads under way
IDLE = 60.0  # seconds without a byte after which a place is given up


@dataclass
class _Place:
    content: bytearray
    owner: int
    offset: int
    touched: float


class Uploads:
    """Places for bytes, by name.

    Args:
        most: bytes of all places together.
        each: most bytes of one.

    Example:
        >>> uploads = Uploads(most=10, each=8)
        >>> uploads.open(b"a", 3, owner=7, now=0.0)
        0
        >>> uploads.write(b"a", 0, b"xy", owner=7, now=1.0), uploads.write(b"a", 2, b"z", owner=7, now=1.0)
        (2, 3)
        >>> bytes(uploads.whole(b"a"))
        b'xyz'
        >>> uploads.open(b"b", 8, owner=8, now=2.0)
        Traceback (most recent call last):
        foedus.errors.NotNow: 3 of 10 bytes for uploads are taken, and 8 more are wanted; come back in a moment
    """

    def __init__(self, *, most: int = MOST, each: int = MOST) -> None:
        self._most, self.each = most, min(each, most)
        self._places: dict[bytes, _Place] = {}
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes of memory that are spoken for."""
        return self._taken

    def __len__(self) -> int:
        return len(self._places)

    def open(self, upload: bytes, size: int, *, owner: int, now: float) -> int:
        """Make a place, or find the one that is there; how many bytes have come.

        Raises:
            TooLarge: no upload may be so large.
            NotNow: there is no room at the moment.
        """
        place = self._places.get(upload)
        if place is not None and len(place.content) == size:
            place.touched = now
            return place.offset
        if size > self.each:
            raise TooLarge(f"an upload of {size} bytes is announced, and at most {self.each} are taken", fatal=True)
        self.drop(upload)
        if self._taken + size > self._most:
            raise NotNow(
                f"{self._taken} of {self._most} bytes for uploads are taken, and {size} more are wanted; come back in "
                "a moment",
                code=Code.OVERLOADED,
            )
        self._places[upload] = _Place(bytearray(size), owner, 0, now)
        self._taken += size
        return 0

    def offset(self, upload: bytes, *, owner: int) -> int:
        """How many bytes have come.

        Raises:
            ProtocolError: there is no such place.
        """
        return self._owned(upload, owner).offset

    def write(self, upload: bytes, offset: int, piece: bytes | memoryview, *, owner: int, now: float) -> int:
        """Take a piece; the offset after it. Bytes that are there already are passed over.

        Raises:
            ProtocolError: there is no such place.
            UploadRefused: bytes before the piece are missing, or it goes beyond the end.
        """
        place = self._owned(upload, owner)
        known = place.offset - offset
        if offset > place.offset:
            raise UploadRefused(f"bytes from {place.offset} on are missing, and {offset} came", code=Code.WRONG_OFFSET)
        if offset + len(piece) > len(place.content):
            raise TooLarge(f"{offset + len(piece)} bytes came, and {len(place.content)} were announced", fatal=True)
        fresh = memoryview(piece)[known:] if known < len(piece) else b""
        place.content[place.offset : place.offset + len(fresh)] = fresh
        place.offset += len(fresh)
        place.touched = now
        return place.offset

    def whole(self, upload: bytes) -> memoryview:
        """An upload all of whose bytes have come, read-only.

        Raises:
            ProtocolError: there is no such place.
            UploadRefused: bytes are missing.
        """
        place = self._found(upload)
        if place.offset < len(place.content):
            raise UploadRefused(
                f"{place.offset} of {len(place.content)} bytes have come; send the rest", code=Code.WRONG_OFFSET
            )
        return memoryview(place.content).toreadonly()

    def drop(self, upload: bytes) -> None:
        """Give a place up, if it is there."""
        place = self._places.pop(upload, None)
        if place is not None:
            self._taken -= len(place.content)

    def tidy(self, *, now: float) -> list[bytes]:
        """Give up places that nobody has written to for a while; which."""
        idle = [name for name, place in self._places.items() if now - place.touched > IDLE]
        for name in idle:
            self.drop(name)
        return idle

    def _owned(self, upload: bytes, owner: int) -> _Place:
        """A place of somebody's own; others' are as though they were not there."""
        place = self._places.get(upload)
        return self._found(upload if place is not None and place.owner == owner else b"")

    def _found(self, upload: bytes) -> _Place:
        place = self._places.get(upload)
        if place is None:
            raise ProtocolError(
                "there is no such upload of yours under way; ask for a place first", code=Code.UNKNOWN_UPLOAD
            )
        return place
