"""A server's core as others see it: hands every message, and the time, to the part whose business it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foedus.errors import Code, MalformedMessage, ProtocolError, StaleEpoch
from foedus.net.coordinator.admission import Admission
from foedus.net.coordinator.driver import Driver, later
from foedus.net.coordinator.giving import Giving
from foedus.net.coordinator.ground import Ground, Who
from foedus.net.coordinator.masks import Masks
from foedus.net.coordinator.recovery import Parts, Recovery
from foedus.net.coordinator.safe import Safe
from foedus.net.coordinator.steps import METRICS, TIMINGS, Steps
from foedus.net.coordinator.taking import Taking
from foedus.net.coordinator.unsealing import Unsealing
from foedus.net.course import EVALUATION, Course
from foedus.net.learning import Learning
from foedus.net.rings import Ring
from foedus.protocol import round as machine
from foedus.protocol.messages import (
    Ask,
    Blob,
    CheckIn,
    Confer,
    Decline,
    Kind,
    Message,
    StartUpload,
    Submit,
    Window,
)  # fmt: skip
from foedus.protocol.round import At, Phase


class Coordinator:
    """All the runs of a server.

    Args:
        ground: what it stands on.
        learnings: one per run.
    """

    def __init__(self, ground: Ground, learnings: Sequence[Learning]) -> None:
        self._ground, self.learnings, self.uploads = ground, learnings, ground.uploads
        self._driver = Driver(ground, self._made)
        self._steps, self._safe, self._giving = Steps(self._driver), Safe(self._driver), Giving(self._driver)
        self._admission = Admission(self._driver, self._giving, learnings)
        self._taking = Taking(self._driver, self._safe)
        self._masks = Masks(self._driver, self._taking)
        self._unsealing = Unsealing(self._driver, self._safe, self._steps.made)
        parts = Parts(self._driver, self._giving, self._admission, self._safe, self._taking)
        self._recovery = Recovery(parts, learnings)

    def offer(self, content: bytes) -> Blob:
        """Let clients fetch some bytes that never change, such as a bundle."""
        return self._giving.offer(content)

    def check(self) -> None:
        """Whether what is written can be gone on with; before anybody is told that there is a server.

        Raises:
            CheckpointError: a run of the same name was begun as another.
        """
        self._recovery.check()

    def load(self, now: float) -> None:
        """Go on from what is written; called when this process begins to lead.

        Raises:
            CheckpointError: what is written is of another run, or damaged.
        """
        self._recovery.load(now)
        for course in self.courses():
            if course.state.opening and course.state.phase is Phase.AGGREGATING:
                self._unsealing.ask(course, now)

    def _made(self, course: Course, now: float) -> None:
        """What was waited for is all there."""
        if course.kind is Kind.DECRYPT:
            self._unsealing.answered(course, now)
        elif course.gathering is not None and course.learning.closed(course.gathering):
            self._unsealing.ask(course, now)
        else:
            self._steps.made(course, now)

    # --- messages

    def handle(self, caller: Who, message: Message, now: float) -> Message:
        """Answer a message.

        Args:
            caller: whom the transport has let in.
            message: what it says.
            now: seconds.

        Raises:
            ProtocolError: it cannot be served.
            StorageError: nothing can be written at the moment; nothing was done.
            StaleEpoch: another process leads.
        """
        match message:
            case CheckIn():
                if not message.pending:
                    self._settled(caller)
                return self._admission.check_in(caller, message, now)
            case StartUpload():
                return self._taking.start(caller, message, now)
            case Submit():
                return self._taking.submit(caller, message, now)
            case Ask():
                self._settled(caller)
                return self._taking.ask(caller, message, now)
            case Confer():
                return self._masks.confer(caller, message, now)
            case Decline():
                return self._decline(caller, message, now)
        raise MalformedMessage(f"a server does not answer {type(message).__name__}")

    def _settled(self, caller: Who) -> None:
        """Somebody who has nothing to ask for, or asks now, needs nobody to answer once all runs are over."""
        if all(course.state.phase is Phase.OVER for course in self.courses()):
            self._giving.settled.add(caller.position)

    def _decline(self, caller: Who, message: Decline, now: float) -> Message:
        """Somebody takes no further part."""
        driver = self._driver
        course, seat = driver.seat(caller, message.key)
        if course is None or seat is None:
            return later(Window(after_s=self._ground.pause, until_s=2 * self._ground.pause), "")
        open_still = seat.at in machine.OPEN  # not of an attempt that is over: there may be another by now
        driver.step(course, machine.Declined(now, seat.key, message.reason), now)
        driver.drop(course, seat.key)
        if open_still:
            self._masks.left(course, caller.position, now)
        driver.news.session(seat.key, "!", course, ends=True)
        if open_still:
            told = {"run": course.name, "position": caller.position, "reason": message.reason}
            self._ground.watch("declined", told)
        return later(driver.window(course, now), "")

    def blob(self, caller: Who, digest: bytes) -> bytes:
        """Bytes that clients may fetch: orders, models, bundles; sums and updates are never among them.

        Raises:
            ProtocolError: there are no such bytes for them.
        """
        return self._giving.blob(caller, digest)

    # --- time

    def tick(self, now: float) -> Sequence[Ring]:
        """Let time pass: deadlines, commits that failed, the next round. What the doorbell is to ring."""
        self._driver.sweep()
        for upload in self.uploads.tidy(now=now):
            self._ground.watch("upload given up", {"upload": upload.hex()[:8]})
        failed: list[Exception] = []
        for act in (self._pass, self._idle):
            for course in list(self._driver.courses.values()):
                try:
                    act(course, now)
                except StaleEpoch:
                    raise
                except Exception as error:  # one run's trouble holds up no other
                    failed.append(error)
        if failed:
            raise failed[0]
        return self._driver.news.rung(self._driver.courses.values(), now)

    def _pass(self, course: Course, now: float) -> None:
        """Let time pass for one run."""
        if course.unwritten:
            self._driver.write(course, tuple(course.state.seats.values()), now)
        self._steps.hurry(course, now)
        self._taking.collect(course, now)
        if course.under_way:
            self._driver.step(course, machine.Tick(now), now)
        if course.state.phase is Phase.FAILED and course.state.opening:
            self._steps.lost(course, now)
        elif course.masks:
            self._masks.go_on(course, now)
        elif course.kind is Kind.DECRYPT:
            self._unsealing.go_on(course, now)
        self._safe.keep_sum(course, now)

    def _idle(self, course: Course, now: float) -> None:
        """Between two rounds of a run: begin the next."""
        if course.state.phase is Phase.IDLE and course.kind is Kind.TRAIN:
            self._admission.look(now)
            self._steps.next(course, now)

    # --- how runs stand

    def runs(self) -> list[dict[str, Any]]:
        """How all runs stand."""
        found = []
        for course in self._driver.courses.values():
            if course.kind is not Kind.TRAIN:
                continue
            learning, state = course.learning, course.state
            done = 0 if learning.state is None else learning.state.round
            found.append({
                "run": course.name, "phase": state.told, "round": done, "rounds": learning.served.rounds,
                "attempt": state.attempt, "seated": state.seats.count(*machine.ENGAGED),
                "received": state.seats.count(At.RECEIVED), "goal": min(state.goal, 2**31),
                "clients": learning.population, "wanted": learning.served.first, "reason": state.reason,
                "declined": state.declined(),
                "algorithm": learning.served.algorithm.label,
            })  # fmt: skip
        return found

    def lines(self, run: str, file: str, after: int) -> bytes:
        """Lines of a run's record.

        Raises:
            ProtocolError: there is no such run or file.
        """
        if run not in self._driver.courses or file not in (METRICS, TIMINGS):
            raise ProtocolError(f"there is no {file[:80]!r} of a run {run[:80]!r} here", code=Code.UNKNOWN_RUN)
        with self._ground.store.begin() as rows:
            return "".join(text for _, text in rows.lines(run, file, after)).encode()

    @property
    def all_told(self) -> bool:
        """Whether everybody who took part has the model, and knows how the last update stands."""
        told, settled = self._giving.told, self._giving.settled
        for course in self.courses():
            state = course.learning.state
            took_part = [] if state is None else state.paid().tolist()
            if course.state.phase is not Phase.OVER or any(
                (course.name, p) not in told or p not in settled for p in took_part
            ):
                return False
        return True

    def record(self, run: str, file: str, after: int) -> list[tuple[int, str]]:
        """Lines of a run's record, by round."""
        with self._ground.store.begin() as rows:
            return rows.lines(run, file, after)

    def evaluating(self, run: str) -> bool:
        """Whether the figures of clients are still coming in."""
        evaluation = self._driver.courses.get(run + EVALUATION)
        return evaluation is not None and evaluation.under_way

    def courses(self) -> list[Course]:
        """The runs, for whoever writes their folders."""
        return [course for course in self._driver.courses.values() if course.kind is Kind.TRAIN]


__all__ = ["Coordinator"]
