"""What others are told: the doorbell's rings, and how a device's session went, for logs and counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from foedus.net.coordinator.ground import Watch
from foedus.net.course import Course
from foedus.net.rings import Calls, Ring


class News:
    """What is to be told.

    Args:
        watch: is told what happens.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.rings: list[Ring] = []
        self._calls: dict[str, Calls] = {}
        self._shapes: dict[bytes, str] = {}

    def rung(self, courses: Iterable[Course], now: float) -> Sequence[Ring]:
        """What the doorbell is to ring, since this was asked last, and whom it is to call now."""
        calls = [self._calls.setdefault(course.name, Calls()).due(course, now) for course in courses]
        rings, self.rings = [*self.rings, *(call for call in calls if call is not None)], []
        return rings

    def forget(self) -> None:
        """Sessions of before are of no more interest."""
        self._shapes = {}

    def session(self, key: bytes, sign: str, course: Course, *, ends: bool = False) -> None:
        """A device session goes on; see ``logs.py``."""
        shape = self._shapes.pop(key, "")
        if not shape.endswith(sign):
            shape += sign
        if not ends:
            self._shapes[key] = shape
            return
        seat = course.state.seats.get(key)
        told = {"run": course.name, "shape": shape, "position": -1 if seat is None else seat.position}
        self.watch("session", told)


__all__ = ["News"]
