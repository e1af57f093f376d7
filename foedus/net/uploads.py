"""Uploads under way, in a bounded part of the memory; never on a disk.

A place is made when its size is known and there is room for all of it; who finds no room is told to come back, so that
clients wait and not the server's memory. Bytes come in order, in pieces, and may be resumed at the offset that has been
reached. A place that nobody writes to is given up after a while. Their digest may be made in another thread while they
come (:meth:`Uploads.digested`), so that little is left to be read when the last of them is here.

Not here: what the bytes are (``coordinator``).
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

from foedus.errors import Code, NotNow, ProtocolError, TooLarge, UploadRefused

MOST = 1 << 30  # bytes of all uploads under way
SPARE = 4  # places whose memory is kept for the next ones, as long as uploads are under way
IDLE = 60.0  # seconds without a byte after which a place is given up


@dataclass
class _Place:
    content: bytearray
    owner: int
    touched: float
    offset: int = 0
    digest: Any = field(default_factory=hashlib.sha256)  # of so many bytes:
    digested: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


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
        >>> bytes(uploads.whole(b"a")), uploads.digest(b"a") == hashlib.sha256(b"xyz").digest()
        (b'xyz', True)
        >>> uploads.open(b"b", 8, owner=8, now=2.0)
        Traceback (most recent call last):
        foedus.errors.NotNow: 3 of 10 bytes for uploads are taken, and 8 more are wanted; come back in a moment
    """

    def __init__(self, *, most: int = MOST, each: int = MOST) -> None:
        self._most, self.each = most, min(each, most)
        self._places: dict[bytes, _Place] = {}
        self._taken = 0
        self._changing = threading.Lock()  # places are made in one thread, and given up in others, too
        self._spare: list[bytearray] = []  # of places given up a moment ago: memory that need not be asked for again

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
        with self._changing:
            place = self._places.get(upload)
            if place is not None and len(place.content) == size:
                place.touched = now
                return place.offset
            if size > self.each:
                raise TooLarge(f"an upload of {size} bytes is announced, and at most {self.each} are taken", fatal=True)
            self._drop(upload)
            if self._taken + size > self._most:
                raise NotNow(
                    f"{self._taken} of {self._most} bytes for uploads are taken, and {size} more are wanted; come back "
                    "in a moment",
                    code=Code.OVERLOADED,
                )
            self._places[upload] = _Place(self._room(size), owner, now)
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

    def digest(self, upload: bytes) -> bytes:
        """SHA-256 of the bytes of an upload that have come.

        Raises:
            ProtocolError: there is no such place.
        """
        self.digested(upload)
        found: bytes = self._found(upload).digest.digest()
        return found

    def digested(self, upload: bytes) -> None:
        """Go on with the digest of an upload, as far as its bytes have come; in any thread. If the place was given up,
        nothing happens."""
        place = self._places.get(upload)
        if place is not None:
            with place.lock:
                end = place.offset
                place.digest.update(memoryview(place.content)[place.digested : end])
                place.digested = end

    def drop(self, upload: bytes) -> None:
        """Give a place up, if it is there."""
        with self._changing:
            self._drop(upload)

    def _drop(self, upload: bytes) -> None:
        place = self._places.pop(upload, None)
        if place is not None:
            self._taken -= len(place.content)
            self._spare = [place.content, *self._spare[: SPARE - 1]]

    def _room(self, size: int) -> bytearray:
        """Memory for a place: that of an earlier one if nobody looks at it any more."""
        for found in self._spare:
            if len(found) == size and _unseen(found):
                self._spare = [other for other in self._spare if other is not found]
                return found
        return bytearray(size)

    def tidy(self, *, now: float) -> list[bytes]:
        """Give up places that nobody has written to for a while; which."""
        with self._changing:
            idle = [name for name, place in self._places.items() if now - place.touched > IDLE]
            for name in idle:
                self._drop(name)
        if not self._places:
            self._spare.clear()
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


def _unseen(content: bytearray) -> bool:
    """Whether nobody has a view of some bytes: whoever has keeps them from changing their length."""
    try:
        content.append(content.pop())
    except BufferError:
        return False
    return True
