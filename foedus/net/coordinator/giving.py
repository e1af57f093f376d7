"""What clients may fetch: orders, models, bundles, and each its own turns of a masked sum.

Not here: sums and updates; they are given to nobody, but encrypted sums to those who decrypt them.
"""

from __future__ import annotations

from typing import NamedTuple

from foedus.errors import Code, ProtocolError
from foedus.net.coordinator.driver import Driver
from foedus.net.coordinator.ground import Who
from foedus.net.course import Course
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.messages import Blob
from foedus.protocol.round import Phase

GIVEN = 8  # blobs of a run that are kept in memory to be given out


class _Given(NamedTuple):
    """A blob that clients may fetch."""

    content: bytes
    course: str


class Giving:
    """Bytes by their digest, as long as they are of interest.

    Args:
        driver: of the runs that they are of.

    Attributes:
        told: who has the model of which run that is over.
        settled: who knows, all runs being over, how everything stands that was sent.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._given: dict[bytes, _Given] = {}
        self._digests: dict[int, bytes] = {}  # by the id of bytes that are given
        self._fixed: dict[bytes, bytes] = {}  # bundles and the like
        self.told: set[tuple[str, int]] = set()
        self.settled: set[int] = set()

    def forget(self) -> None:
        """Another process led meanwhile: what was given is not of interest any more."""
        self._given, self._digests = {}, {}

    def offer(self, content: bytes) -> Blob:
        """Let clients fetch some bytes that never change, such as a bundle."""
        digest = blob.digest_of(content)
        self._fixed[digest] = content
        return Blob(digest=digest, size=len(content))

    def give(self, content: bytes, course: Course) -> Blob:
        """Let clients fetch some bytes, as long as they are of interest."""
        digest = self._digests.get(id(content))
        known = None if digest is None else self._given.get(digest)
        if digest is None or known is None or known.content is not content:  # another object may have had this id
            digest = blob.digest_of(content)
            while len(self._given) >= GIVEN * max(1, len(self._driver.courses)):
                gone = self._given.pop(next(iter(self._given)))
                self._digests.pop(id(gone.content), None)
            self._given[digest] = _Given(content, course.name)
            self._digests[id(content)] = digest
        return Blob(digest=digest, size=len(content))

    def blob(self, caller: Who, digest: bytes) -> bytes:
        """Bytes that clients may fetch: orders, models, bundles; sums and updates are never among them.

        Raises:
            ProtocolError: there are no such bytes for them.
        """
        found = self._given.get(digest)
        courses = self._driver.courses
        turns = (course.masked.body(digest, caller.position) for course in courses.values() if course.masked)
        if found is None and (turn := next(filter(None, turns), None)) is not None:
            return turn
        if found is None:
            if digest in self._fixed:
                return self._fixed[digest]
            raise ProtocolError(
                "these bytes are not given out, or not any more; check in again", code=Code.UNKNOWN_BLOB
            )
        course = courses.get(found.course)
        if course is not None:
            if course.state.phase is Phase.OVER:
                self.told.add((course.name, caller.position))
            for seat in course.state.seats.values():
                if seat.position == caller.position and seat.at in machine.OPEN:
                    self._driver.news.session(seat.key, "v[", course)
        return found.content


__all__ = ["Giving"]
