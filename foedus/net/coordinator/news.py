"""What others are told: the doorbell's rings, and how a device's session went, for logs and counters."""

from __future__ import annotations

from collections.abc import Sequence

from foedus.net.coordinator.ground import Watch
from foedus.net.course import Course
from foedus.protocol.messages import Bell, Event
from foedus.protocol.round import At


class News:
    """What is to be told.

    Args:
        watch: is told what happens.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._bells: list[Bell] = []
        self._shapes: dict[bytes, str] = {}

    def rung(self) -> Sequence[Bell]:
        """What the doorbell is to ring, since this was asked last."""
        bells, self._bells = self._bells, []
        return bells

    def forget(self) -> None:
        """Sessions of before are of no more interest."""
        self._shapes = {}

    def bell(self, course: Course, event: Event, *, round: int | None = None) -> None:
        """Ring for those who take part in a run, at the next tick."""
        goal = max(1, course.state.goal)
        came = min(1.0, len(course.state.at(At.RECEIVED)) / goal)
        number = course.state.round if round is None else round
        self._bells.append(Bell(run=course.learning.served.name, event=event, round=number, progress=came))

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
