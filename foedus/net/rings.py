"""Whom the doorbell is to ring, and when.

A round of a thousand out of ten thousand needs a thousand, so not all of them are called: somewhat more than there are
places left, drawn at random among those who have had no seat, and more after a while if not enough have come. Where
clients were drawn, they are the ones that are called. A commit is told to those who were asked, and that a run is over
to everybody.

Not here: how it rings (``doorbell.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from foedus.protocol.messages import Bell, Event
from foedus.protocol.pacing import MARGIN
from foedus.protocol.round import ENGAGED, At, Phase, State

_GONE = (At.LAPSED, At.COUNTED)
FIRST_S, LAST_S = 2.0, 64.0  # seconds until others are called, too: growing


class Run(Protocol):
    """A run, or its evaluations: what clients call it, and how its round stands."""

    @property
    def run(self) -> str: ...

    @property
    def state(self) -> State: ...


class Ring(NamedTuple):
    """A bell, and for whom.

    Attributes:
        message: what is said.
        to: the clients that are meant, by position; ``None`` for whoever listens.
        but: clients that are not.
        most: so many of them, drawn at random; ``None`` for all.
    """

    message: Bell
    to: frozenset[int] | None = None
    but: frozenset[int] = frozenset()
    most: int | None = None


class Calls:
    """When a run's clients are called to take the places that are left."""

    def __init__(self) -> None:
        self._step: tuple[int, int, int] | None = None  # what they were last called for
        self._due, self._wait = 0.0, FIRST_S

    def quiet(self, state: State, now: float) -> bool:
        """Whether nobody is to be called now, whoever has a seat."""
        same = self._step == (state.round, state.part, state.attempt)
        return state.phase is not Phase.SELECTING or (same and now < self._due)

    def due(self, course: Run, now: float) -> Ring | None:
        """The next call, if it is time for one.

        Args:
            course: the run.
            now: on the server's clock.
        """
        state = course.state
        if state.phase is not Phase.SELECTING:
            self._step = None
        if self.quiet(state, now):
            return None
        if self._step != (step := (state.round, state.part, state.attempt)):
            self._step, self._due, self._wait = step, now, FIRST_S
        free = state.places - state.seats.count(*ENGAGED)
        if free <= 0:
            return None
        self._due, self._wait = now + self._wait, min(LAST_S, 2 * self._wait)
        had = frozenset(s.position for s in state.seats.values() if s.attempt == state.attempt and s.at not in _GONE)
        return Ring(bell(course, Event.OFFER), state.cohort, had, math.ceil(MARGIN * free))


def bell(course: Run, event: Event, *, round: int | None = None) -> Bell:
    """What is said of a run, and how much of its round has come in."""
    state = course.state
    came = min(1.0, state.seats.count(At.RECEIVED) / max(1, state.goal))
    number = state.round if round is None else round
    return Bell(run=course.run, event=event, round=number, progress=came)


def committed(course: Run, number: int, asked: Iterable[int]) -> Ring:
    """A round is in the model: for those who were asked in it."""
    return Ring(bell(course, Event.COMMITTED, round=number), frozenset(asked))
