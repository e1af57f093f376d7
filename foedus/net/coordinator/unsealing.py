"""Encrypted sums: a server cannot read them, so those who are in one are asked to, before a round is committed.

A round whose updates came encrypted ends with a sum under a key that the server never has. It is given to clients that
are in it, two at first, and to another whenever those asked keep silent, decline, or do not say the same. What two say
alike is believed: one that lies is outvoted, and named in the log. Before the first is asked it is written down, with
the sum, that this round has no other: two sums of a round, one client apart, would show that client.

Not here: what is checked of an answer (``net/learning.py``), what a client checks of a sum (``secure/homomorphic.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from foedus.core.values import Message
from foedus.errors import StorageError
from foedus.net.coordinator.driver import Driver
from foedus.net.coordinator.safe import Safe
from foedus.net.course import DECRYPTION, TWO, Course, Handed
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.round import Phase

OVER = "its round is over"


class Unsealing:
    """Has the encrypted sums of runs opened.

    Args:
        driver: of the runs.
        safe: keeps the sum while it is being opened.
        commit: makes of a step what is to be made.
    """

    def __init__(self, driver: Driver, safe: Safe, commit: Callable[[Course, float], None]) -> None:
        self._driver, self._ground, self._safe, self._commit = driver, driver.ground, safe, commit

    def ask(self, course: Course, now: float) -> None:
        """A round's sum is complete: those who are in it are asked to decrypt it, once this is written down."""
        decryption = self._driver.courses[course.name + DECRYPTION]
        begun = decryption.state.round == course.state.round
        if begun and (decryption.handed is not None or decryption.state.phase is Phase.OVER):
            return
        before = course.written[0]
        try:
            if not course.state.opening:
                self._safe.keep_closed(course)
                self._driver.step(course, machine.Opening(now), now)
                if before and before != course.written[0]:
                    self._driver.discard(before)
            if not (begun and decryption.under_way):
                self._begin(course, decryption, now)
        except StorageError as error:  # the next tick tries again; nobody has been asked
            self._ground.watch("storage failed", {"run": course.name, "error": str(error)})
            return
        gathering = course.gathered()
        content = course.learning.handed(gathering)
        decryption.handed = Handed(content, blob.digest_of(content), len(gathering.counted))

    def _begin(self, course: Course, decryption: Course, now: float) -> None:
        members = course.state.received
        decryption.begun_at, decryption.answers, decryption.handed = now, {}, None
        decryption.state = machine.State()
        self._driver.step(decryption, machine.Begin(now, course.state.round, TWO, TWO, members), now)
        self._ground.watch("decrypting", {"run": course.name, "round": course.state.round, "sum of": len(members)})

    def answered(self, decryption: Course, now: float) -> None:
        """Enough have answered for now: is it settled what the sum opens to?"""
        course = self._driver.courses[decryption.learning.served.name]
        if not _waits(course, decryption):  # a disk was full after the commit: this was not written, and that was
            self._driver.step(decryption, machine.Stop(now, OVER), now)
            return
        found = decryption.answers
        for message in found.values():
            alike = [position for position, other in found.items() if _same(message, other)]
            if len(alike) >= TWO:
                self._settled(course, decryption, message, sorted(found.keys() - set(alike)), now)
                return
        self._ground.watch("answers differ", {"run": course.name, "round": course.state.round, "who": sorted(found)})
        state = decryption.state
        heard = {seat.position for seat in state.seats.values() if seat.at not in machine.OPEN}
        if now < state.deadline and (state.cohort or frozenset()) - heard:  # somebody lies: one more decides
            decryption.state = replace(
                state, phase=Phase.SELECTING, goal=len(found) + 1, places=max(state.places, len(found) + 1)
            )
            return
        told = "those in the sum say different things of what it opens to"
        self._driver.step(decryption, machine.Failed(now, told), now)

    def _settled(self, course: Course, decryption: Course, message: Message, others: list[int], now: float) -> None:
        """Two say the same: the round is committed with it, and then nothing more is asked."""
        if others:
            self._ground.watch("lied", {"run": course.name, "round": course.state.round, "who": others})
        if course.learning.closed(course.gathered()):
            course.learning.open(course.gathered(), message)
        self._commit(course, now)
        if course.state.phase is not Phase.AGGREGATING:  # else a disk was full: both are tried again
            self._driver.step(decryption, machine.Committed(now), now)

    def go_on(self, decryption: Course, now: float) -> None:
        """Time passes: another is asked; or nobody is left to be asked, and the round ends without a model."""
        state = decryption.state
        course = self._driver.courses[decryption.learning.served.name]
        waits = _waits(course, decryption)
        if state.phase in (Phase.FAILED, Phase.OVER):
            if waits:
                told = f"the encrypted sum could not be opened: {state.reason}"
                self._driver.step(course, machine.Failed(now, told[:1000]), now)
            return
        if state.cohort is None or state.phase not in (Phase.SELECTING, Phase.TRAINING):
            return
        if not waits:  # begun by a process before this one, whose sum is lost
            self._driver.step(decryption, machine.Stop(now, OVER), now)
            return
        silent = int((now - decryption.begun_at) / decryption.learning.served.each.patience)
        places = min(len(state.cohort), TWO + silent)
        if places > state.places:
            decryption.state = replace(state, places=places, phase=Phase.SELECTING)


def _waits(course: Course, decryption: Course) -> bool:
    """Whether it is this round's sum that a run waits for."""
    state = course.state
    return state.phase is Phase.AGGREGATING and state.opening and state.round == decryption.state.round


def _same(a: Message, b: Message) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


__all__ = ["Unsealing"]
