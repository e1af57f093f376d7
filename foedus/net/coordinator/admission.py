"""Who is let in: who has enrolled, who is offered a seat, and what a seat comes with.

Not here: who somebody is (``identity``), how many seats there are and who has one (``protocol/round.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from foedus.errors import Code, ProtocolError
from foedus.net.coordinator.driver import Driver, later
from foedus.net.coordinator.giving import Giving
from foedus.net.coordinator.ground import Who
from foedus.net.course import Course
from foedus.net.identity.signed import Signed, sign
from foedus.net.learning import Learning
from foedus.net.store import NEVER, UNTOLD
from foedus.protocol import round as machine
from foedus.protocol.messages import Accepted, CheckIn, Finished, Kind, Message
from foedus.protocol.round import Phase, Seat

REFRESH_S = 1.0  # seconds between two looks at who has enrolled


class Admission:
    """The door of every run.

    Args:
        driver: of the runs.
        giving: lets clients fetch their orders.
        learnings: told who has enrolled.
    """

    def __init__(self, driver: Driver, giving: Giving, learnings: Sequence[Learning]) -> None:
        self._driver, self._ground, self._giving, self._learnings = driver, driver.ground, giving, learnings
        self._looked_at = -math.inf
        self._examples: dict[int, int] = {}
        self._populations: dict[int, str] = {}

    def look(self, now: float, *, at_once: bool = False) -> None:
        """Who has enrolled."""
        if not at_once and now - self._looked_at < REFRESH_S:
            return
        self._looked_at = now
        with self._ground.store.begin() as rows:
            clients = rows.clients()
        self._populations = {client.position: client.population for client in clients}
        self._examples = {c.position: c.examples if c.revoked_at is None else 0 for c in clients}
        for learning in self._learnings:
            learning.enrolled(clients)

    def check_in(self, caller: Who, message: CheckIn, now: float) -> Message:
        """A seat in a run; or when to come back, or the model if all is over."""
        self._known(caller, message, now)
        courses = self._asked_for(message)
        own = self._populations.get(caller.position, "")
        answer: Message | None = None
        for course in [course for course in courses if course.learning.is_for(own)]:
            found = self._offer(course, caller, message, now)
            if isinstance(found, Accepted):
                return found
            answer = found if answer is None or isinstance(answer, Finished) else answer
        return answer or later(self._driver.window(courses[0], now), "what runs here is for other populations")

    def _asked_for(self, message: CheckIn) -> list[Course]:
        """The runs that a client may take part in, evaluations first: training waits for them."""
        found = [
            course for course in self._driver.courses.values()
            if message.run in ("", course.learning.served.name)
        ]  # fmt: skip
        if not found:
            raise ProtocolError(f"there is no run {message.run[:80]!r} here", code=Code.UNKNOWN_RUN)
        ready = [c for c in found if c.kind in message.kinds and (c.kind is Kind.TRAIN or c.under_way)]
        ready.sort(key=lambda course: course.kind is Kind.TRAIN)
        return ready or found[:1]

    def _known(self, caller: Who, message: CheckIn, now: float) -> None:
        """Note how many examples a client has, if it says so and that is new."""
        if caller.position not in self._examples:
            self.look(now, at_once=True)
        before = self._examples.get(caller.position, NEVER)
        told = message.examples
        if told is None:
            told = UNTOLD if before in (NEVER, 0) else before
        if told == before:
            return
        with self._ground.store.begin(self._ground.epoch()) as rows:
            found = rows.client(caller.name)
            if found is None or found.position != caller.position:
                raise ProtocolError(f"nobody called {caller.name!r} is enrolled here", code=Code.FORBIDDEN, fatal=True)
            rows.put_client(found._replace(examples=told))
        self.look(now, at_once=True)

    def _offer(self, course: Course, caller: Who, message: CheckIn, now: float) -> Message:
        """What a run says to somebody who is there."""
        window = self._driver.window(course, now)
        if lacking := set(message.protections) - set(course.protections):
            return later(window, f"this run does not promise {', '.join(sorted(lacking))}")
        if course.state.phase is Phase.OVER and course.kind is Kind.TRAIN:
            return self._finished(course, caller)
        if self._examples.get(caller.position) == 0:
            self._not_waited_for(course, caller, now)
            return later(window, "there is nothing to train on")
        if course.kind not in message.kinds:
            return later(window, f"this run asks for {course.kind}")
        if (sealing := course.learning.sealing) is not None and caller.position >= sealing.silos:
            return later(window, f"this run is for {sealing.silos} silos, and so many have enrolled before this one")
        if course.kind is Kind.DECRYPT and course.handed is None:
            return later(window, "there is nothing to decrypt")
        masked = course.masked
        if masked is not None and masked.slot(caller.position) is None:  # a place that became free is no slot
            return later(window, "this round lets nobody else in")
        pending = () if course.masks else message.pending  # nothing of a masked sum can be sent again
        came = machine.Came(now, caller.position, self._ground.secret(16), pending)
        for action in self._driver.step(course, came, now):
            match action:
                case machine.Seated(seat, held):
                    return self._accepted(course, seat, held, now)
                case machine.Away(reason):
                    return later(window, self._too_few(course) or reason)
                case machine.Over():
                    return self._finished(course, caller) if course.kind is Kind.TRAIN else later(window, "")
        return later(window, "come back in a moment")

    def _too_few(self, course: Course) -> str | None:
        """Why no round begins as yet; ``None`` where one does, or is under way."""
        learning = course.learning
        wanted = learning.served.first if learning.state is None else course.rules.minimum
        if course.state.phase is not Phase.IDLE or course.kind is not Kind.TRAIN or learning.population >= wanted:
            return None
        return f"a round begins once {wanted} clients can take part, and {learning.population} can"

    def _not_waited_for(self, course: Course, caller: Who, now: float) -> None:
        """Who has nothing to train on any more, and was wanted in the round under way, is not waited for."""
        if course.state.phase is not Phase.SELECTING or course.rules.flowing or course.masked is not None:
            return  # a masked sum that is under way has its slots: nobody comes into it, nor leaves it by this
        for action in self._driver.step(course, machine.Came(now, caller.position, self._ground.secret(16)), now):
            if isinstance(action, machine.Seated):
                self._driver.step(course, machine.Declined(now, action.seat.key, "data"), now)

    def _accepted(self, course: Course, seat: Seat, held: bytes | None, now: float) -> Accepted:
        served, state = course.learning.served, course.state
        orders = self._giving.give(self._orders(course, seat), course)
        closes = seat.since + course.rules.deadline_s if course.rules.flowing else state.deadline
        self._driver.news.session(seat.key, "-", course)
        return self._signed(Accepted(
            run=served.name, round=seat.round, attempt=seat.attempt, kind=course.kind, key=seat.key, orders=orders,
            bundle=course.learning.bundle, target=served.target, position=seat.position, seed=served.seed,
            closes_s=max(0.0, closes - now), minimum=course.rules.minimum, protections=course.protections, held=held,
        ))  # fmt: skip

    def _signed(self, message: Signed) -> Signed:
        signing = self._ground.signing
        return message if signing is None else sign(signing, message)

    def _orders(self, course: Course, seat: Seat) -> bytes:
        learning = course.learning
        if course.kind is Kind.EVALUATE:
            return learning.model()
        if course.handed is not None:
            return course.handed.content
        if course.rules.flowing and seat.round != learning.step.round:
            return learning.late_orders(seat.round)
        return learning.orders_for(seat.position)

    def _finished(self, course: Course, caller: Who) -> Finished:
        learning = course.learning
        served, state = learning.served, learning.state
        if state is None:
            return self._signed(Finished(run=served.name, model=None))
        model = self._giving.give(learning.model(), course)
        method = served.algorithm.method
        return self._signed(Finished(
            run=served.name, model=model, personal=method is not None and method.personal is not None,
            rounds=state.round, bundle=learning.bundle, target=served.target, seed=served.seed,
            position=caller.position,
        ))  # fmt: skip


__all__ = ["Admission"]
