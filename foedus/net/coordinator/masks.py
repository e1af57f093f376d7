"""Masked sums: when one begins, whose turn it is, and what becomes of the round.

Not here: the conversation itself (``net/masking.py``), which is a pure machine with a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from foedus.errors import FoedusError, SecureAggregationFailed
from foedus.net.coordinator.driver import Driver, later
from foedus.net.coordinator.ground import Who
from foedus.net.coordinator.taking import Taking
from foedus.net.course import Course
from foedus.net.learning import WHOLE
from foedus.net.masking import Limits, MaskedSum
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.messages import Closed, Confer, Message, Received, Turn, Why, Window
from foedus.protocol.round import At, Phase
from foedus.protocol.secagg.messages import session_of, terms_for


class Masks:
    """Masked sums of the runs that have them.

    Args:
        driver: of the runs.
        taking: for what was uploaded.
    """

    def __init__(self, driver: Driver, taking: Taking) -> None:
        self._driver, self._ground, self._taking = driver, driver.ground, taking

    def confer(self, caller: Who, message: Confer, now: float) -> Message:
        """A client's part in a masked sum, and its next turn."""
        course, seat = self._driver.seat(caller, message.key)
        if course is None or seat is None or not course.masks:
            return Closed(why=Why.LATE, later=self._driver.anytime(now))
        masked, slot = course.masked, None if course.masked is None else course.masked.slot(caller.position)
        answers = message.upload is not None and seat.at in machine.OPEN
        if masked is not None and slot is not None and answers and not masked.answered(slot, message.turn):
            self._driver.news.session(seat.key, "+", course)
            try:
                masked.take(slot, self._taking.content(course, message), now)
            finally:
                self._driver.drop(course, seat.key)
        self.opened(course, now)  # before anybody, whoever it is, is told a turn
        seat = course.state.seats.get(message.key, seat)
        window = self._driver.window(course, now)
        if seat.at in (At.RECEIVED, At.COUNTED):
            self._driver.news.session(seat.key, "^", course, ends=True)
            return Received(later=window)
        if seat.at not in machine.OPEN or (masked is not None and slot is None):
            return Closed(why=Why.ATTEMPT_OVER, later=window)
        if masked is None or slot is None or (letter := masked.letter(slot, message.turn)) is None:
            pause = course.pause(self._ground.pause)  # whoever waits asks again
            return later(Window(after_s=pause, until_s=2 * pause), "others are awaited")
        return Turn(turn=letter.turn, body=letter.body, closes_s=max(0.0, masked.closes - now))

    def go_on(self, course: Course, now: float) -> None:
        """A masked sum begins when nobody else is let in; it goes on, or is over."""
        if course.masked is not None:
            course.masked.tick(now)
            self.opened(course, now)
        elif course.state.phase is Phase.TRAINING:
            self._begin(course, now)

    def _begin(self, course: Course, now: float) -> None:
        """The attempt among those who have a seat now."""
        state, patience = course.state, course.learning.served.each.patience
        seats = sorted(state.at(*machine.OPEN), key=lambda seat: seat.position)
        orders = blob.digest_of(course.learning.orders_for(WHOLE))
        signing = self._ground.signing
        session = session_of(b"" if signing is None else signing.public.raw, course.name)
        try:
            terms = terms_for(
                course.learning.promise, session=session, round=state.round, attempt=state.attempt, model=orders,
                graph=self._ground.secret(32), clients=len(seats),
            )  # fmt: skip
        except FoedusError as error:
            self._driver.step(course, machine.Failed(now, str(error)[:1000]), now)
            return
        limits = Limits(patience, state.deadline - 2 * patience)
        course.masked = MaskedSum(terms, [seat.position for seat in seats], limits, now + patience)

    def opened(self, course: Course, now: float) -> None:
        """Write down that masks are asked for, before anybody is; take the sum, or that there will be none."""
        masked = course.masked
        if masked is None or course.state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        if (masked.opening or masked.totals is not None) and not course.state.opening:
            self._driver.step(course, machine.Opening(now), now)
        if masked.totals is not None:
            self._summed(course, masked, masked.totals, now)
        elif masked.over:
            self._driver.step(course, machine.Failed(now, f"the masked sum failed: {masked.reason}"[:1000]), now)

    def _summed(self, course: Course, masked: MaskedSum, totals: Sequence[NDArray[Any]], now: float) -> None:
        """The opened sums are the round's, unless somebody lied so much that they cannot be; then it has no model."""
        positions = [masked.positions[slot] for slot in masked.survivors]
        sent = [masked.up[slot] for slot in masked.survivors]
        names = (channel.name for channel in masked.terms.channels)
        try:
            named = dict(zip(names, totals, strict=True))
            course.learning.reveal(course.gathered(), positions, named, sent)
        except SecureAggregationFailed as error:
            self._driver.step(course, machine.Failed(now, f"the masked sum is none: {error}"[:1000]), now)
            return
        here = [s for s in course.state.at(*machine.OPEN, At.DECLINED) if s.attempt == course.state.attempt]
        keys = [s.key for s in here if s.position in positions]
        self._driver.ahead(course, machine.Summed(now, tuple(keys)), now)

    def left(self, course: Course, position: int, now: float) -> None:
        """Somebody takes no further part."""
        slot = None if course.masked is None else course.masked.slot(position)
        if course.masked is not None and slot is not None:
            course.masked.gone(slot, now)
            self.opened(course, now)


__all__ = ["Masks"]
