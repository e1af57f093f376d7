"""Runs under way, and how anything happens to one: *persist, then act*.

An event goes to the pure machine (``protocol/round.py``); what it wants saved is written in one transaction, which
fails if another process leads by now; only then the new state is taken over, and anybody is told.

Not here: what an event means for an upload, a sum or a model (the other parts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from foedus.errors import Code, ProtocolError, StorageError
from foedus.net.coordinator.ground import Ground, Who
from foedus.net.coordinator.news import News
from foedus.net.course import Course
from foedus.net.store import RunRow
from foedus.protocol import round as machine
from foedus.protocol.messages import Later, Window
from foedus.protocol.round import At, Seat

_NOBODY = Seat(b"", -1, 0, 0, At.LAPSED)


class Driver:
    """All the runs of a server, and their machines.

    Args:
        ground: what it stands on.
        made: a step's updates are all there: makes of them what is to be made.

    Attributes:
        courses: the runs, and the evaluations that belong to them, by name.
        news: what others are told.
    """

    def __init__(self, ground: Ground, made: Callable[[Course, float], None]) -> None:
        self.ground, self._made = ground, made
        self.courses: dict[str, Course] = {}
        self.news = News(ground.watch)
        self._leftover: set[str] = set()  # blobs that could not be removed yet

    # --- which run, and when

    def seat(self, caller: Who, key: bytes) -> tuple[Course | None, Seat | None]:
        """Whose key it is: that of a seat which still counts.

        Raises:
            ProtocolError: it is somebody else's.
        """
        for course in self.courses.values():
            if (seat := course.state.seats.get(key)) is not None:
                if seat.position != caller.position:
                    raise ProtocolError("this key is not yours", code=Code.UNKNOWN_KEY, fatal=True)
                return course, seat
        return None, None

    def window(self, course: Course, now: float) -> Window:
        """When a client is to come back for a run."""
        return course.window(now, pause=self.ground.pause)

    def anytime(self, now: float) -> Window:
        """When to come back, for nothing in particular."""
        courses = [c for c in self.courses.values() if c.under_way] or list(self.courses.values())
        return min((self.window(c, now) for c in courses), key=lambda window: window.after_s)

    # --- the machine

    def step(self, course: Course, event: machine.Event, now: float) -> Sequence[machine.Action]:
        """Let something happen: write what is to be written, then take it over, then act.

        Raises:
            StorageError, StaleEpoch: it could not be written; nothing has happened.
        """
        state, actions = machine.step(course.state, event, course.rules)
        if saves := [action for action in actions if isinstance(action, machine.Save)]:
            before = course.state
            course.state = state
            try:
                self.write(course, tuple(seat for save in saves for seat in save.seats), now)
            except BaseException:
                course.state = before
                raise
        self.take_over(course, state, actions, now)
        return actions

    def ahead(self, course: Course, event: machine.Event, now: float) -> None:
        """As :meth:`step`, of what has happened in memory already: if it cannot be written now, it is written later.
        Until then a restart asks the client to send again."""
        state, actions = machine.step(course.state, event, course.rules)
        course.state = state
        saves = [seat for action in actions if isinstance(action, machine.Save) for seat in action.seats]
        if any(isinstance(action, machine.Save) for action in actions):
            try:
                self.write(course, tuple(saves), now)
            except StorageError as error:
                course.unwritten = True
                self.ground.watch("storage failed", {"run": course.name, "error": str(error)})
        self.take_over(course, state, actions, now)

    def take_over(
        self, course: Course, state: machine.State, actions: Sequence[machine.Action], now: float
    ) -> None:  # fmt: skip
        """A new state, and what follows from it here."""
        course.state = state
        for action in actions:
            match action:
                case machine.Commit():
                    self._made(course, now)
                case machine.Drop():
                    self.forget(course)

    def write(self, course: Course, seats: Iterable[Seat], now: float) -> None:
        """Write the machine's state and some seats."""
        with self.ground.store.begin(self.ground.epoch()) as rows:
            rows.put_run(self.row(course, now))
            rows.put_seats([course.row(seat) for seat in seats])
        course.unwritten = False

    def row(self, course: Course, now: float) -> RunRow:
        """A run as it is written."""
        return RunRow(
            course.name, course.learning.identity(), machine.written(course.state), course.checkpoint,
            course.written[0], course.key, now,
        )  # fmt: skip

    def forget(self, course: Course) -> None:
        """The sum is gone, and with it what was written of it."""
        course.gathering, course.figures, course.pending, course.masked = None, {}, None, None
        course.handed, course.answers = None, {}
        for key in [key for key in course.uploads if course.state.seats.get(key, _NOBODY).at not in machine.OPEN]:
            self.drop(course, key)
        for key in [key for key in course.stored if course.state.seats.get(key, _NOBODY).at not in machine.ENGAGED]:
            self.discard(course.stored.pop(key))
        if course.written[0] and not course.learning.part:
            before, course.written = course.written[0], ("", 0)
            self.discard(before)
        course.wrote_at = 0.0

    def drop(self, course: Course, key: bytes) -> None:
        """Give an upload's place up."""
        if (upload := course.uploads.pop(key, None)) is not None:
            self.ground.uploads.drop(upload)

    def keep(self, content: bytes) -> str:
        """Put a blob; the same bytes may have been put before, and be about to be removed: they no longer are."""
        digest = self.ground.blobs.put(content)
        self._leftover.discard(digest)
        return digest

    def discard(self, digest: str) -> None:
        """Remove a blob that no run names any more; what cannot be removed now is tried again, and stops nothing."""
        if any(course.names(digest) for course in self.courses.values()):  # two clients may have sent the same bytes
            return
        try:
            self.ground.blobs.remove(digest)
        except StorageError as error:
            self._leftover.add(digest)
            self.ground.watch("storage failed", {"run": "", "error": str(error)})

    def sweep(self) -> None:
        """Try again to remove what could not be removed."""
        leftover, self._leftover = self._leftover, set()
        for digest in leftover:
            self.discard(digest)


def later(window: Window, reason: str) -> Later:
    """When to come back, and why."""
    return Later(after_s=window.after_s, until_s=window.until_s, reason=reason[:1000])


__all__ = ["Driver", "later"]
