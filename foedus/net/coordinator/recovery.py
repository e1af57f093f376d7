"""Going on from what is written, when this process begins to lead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from foedus.errors import CheckpointError, ProtocolError, UpdateRefused
from foedus.net.coordinator.admission import Admission
from foedus.net.coordinator.driver import Driver
from foedus.net.coordinator.giving import Giving
from foedus.net.coordinator.safe import Safe, scale_of
from foedus.net.coordinator.taking import Taking
from foedus.net.course import Course
from foedus.net.learning import Learning
from foedus.net.restored import Gap, gap_of
from foedus.net.store import RunRow
from foedus.protocol import round as machine
from foedus.protocol.messages import Kind
from foedus.protocol.round import At, Phase


class Parts(NamedTuple):
    """What takes part in going on."""

    driver: Driver
    giving: Giving
    admission: Admission
    safe: Safe
    taking: Taking


class Recovery:
    """Reads what is written, and goes on.

    Args:
        parts: of the coordinator, all of which begin anew.
        learnings: the runs.
    """

    def __init__(self, parts: Parts, learnings: Sequence[Learning]) -> None:
        self._driver, self._giving, self._admission, self._safe, self._taking = parts
        self._ground, self._learnings = self._driver.ground, learnings

    def check(self) -> None:
        """Whether what is written can be gone on with; before anybody is told that there is a server.

        Raises:
            CheckpointError: a run of the same name was begun as another.
        """
        with self._ground.store.begin() as rows:
            names = [learning.served.name for learning in self._learnings]
            found = [(rows.run(name), gap_of(rows, name)) for name in names]
        for learning, (row, gap) in zip(self._learnings, found, strict=True):
            if row is not None:
                _check_same(learning, row)
                if machine.read(row.state, ()).phase is not Phase.OVER:
                    _check_told(learning, gap)

    def load(self, now: float) -> None:
        """Go on from what is written; called when this process begins to lead.

        Raises:
            CheckpointError: what is written is of another run, or damaged.
        """
        self._driver.courses.clear()
        self._driver.news.forget()
        self._giving.forget()
        self._admission.look(now, at_once=True)
        found = [course for learning in self._learnings for course in _courses(learning)]
        self._driver.courses.update({course.name: course for course in found})
        for course in found:  # what is loaded may be complete at once, and then another course of its run is begun
            self._load(course, now)
        self._tidy()

    def _tidy(self) -> None:
        """Remove blobs that no row names: of a process that died between writing one and naming it."""
        with self._ground.store.begin() as rows:
            found = rows.runs()
            named = {digest for row in found for digest in (row.checkpoint, row.sum)}
            for row in found:
                named |= {json.loads(seat.about).get("update") for seat in rows.seats(row.name)}
        for digest in [digest for digest in self._ground.blobs.digests() if digest not in named]:
            self._driver.discard(digest)

    def _load(self, course: Course, now: float) -> None:
        with self._ground.store.begin() as rows:
            row = rows.run(course.name)
            seats = [] if row is None else rows.seats(course.name)
            gap = gap_of(rows, course.run)
        if row is None:
            return
        learning = course.learning
        _check_same(learning, row)
        if course.kind is Kind.TRAIN and row.checkpoint:
            learning.restore(self._ground.blobs.get(row.checkpoint))
            self._skip(learning, gap)
        course.checkpoint, course.key = row.checkpoint, row.key
        if course.kind is Kind.DECRYPT and not self._driver.courses[learning.served.name].state.opening:
            return  # the sum that was being opened is committed, or lost
        course.state = course.read(row.state, seats)
        if gap is not None and gap.reached is not None and gap.round < gap.reached >= course.state.round:
            course.state = machine.State(Phase.IDLE, gap.reached)  # what was under way took place elsewhere
            return
        if course.kind is Kind.TRAIN and learning.state is not None:  # what the process before knew of late updates
            learning.remember(course.versions())
        self._resume(course, row, now)

    def _skip(self, learning: Learning, gap: Gap | None) -> None:
        """Rounds that took place after the backup which this is from are counted, and left out."""
        state = learning.state
        if gap is None or state is None:
            return
        if learning.over is None:
            _check_told(learning, gap)
        if gap.reached is not None and state.round < gap.reached:
            missed = {"run": learning.served.name, "round": state.round, "reached": gap.reached}
            learning.skip(gap.reached)
            self._ground.watch("rounds left out", missed)

    def _resume(self, course: Course, row: RunRow, now: float) -> None:
        """The step that was under way goes on with what of its sum can still be read."""
        state = course.state
        course.begun_at = now
        between = (Phase.IDLE, Phase.OVER)
        masked = course.masks and state.phase not in between  # what was in memory is gone, and cannot be gone on with
        if course.seals and state.opening and state.phase is Phase.AGGREGATING:
            if self._safe.sum_of(course, row) == state.received:  # those in it go on being asked to open it
                self._ground.watch("resumed", {"run": course.name, "round": state.round, "summed": len(state.received)})
                return
            course.gathering, masked = None, True
        if masked or self._between(course, row) != (state.round, state.part):  # the round begins anew
            course.learning.again()
            again = machine.State(
                Phase.FAILED, state.round, 0, state.attempt, deadline=now, goal=state.goal, opening=state.opening
            )
            again = replace(again, places=state.places, cohort=state.cohort)
            course.state = replace(again, minimum=state.minimum, reason=state.reason)
            lapsed = [seat._replace(at=At.LAPSED) for seat in state.at(*machine.ENGAGED)]
            self._driver.write(course, tuple(lapsed), now)
            return
        summed = self._safe.sum_of(course, row)
        self._driver.step(course, machine.Restarted(now, frozenset(summed)), now)
        self._updates_again(course, now)
        self._ground.watch("resumed", {"run": course.name, "round": state.round, "summed": len(summed)})

    def _between(self, course: Course, row: RunRow) -> tuple[int, int]:
        """The step that can be gone on with: within a round, where edges' models can still be read."""
        state, vault = course.state, self._ground.memory
        sealed = row.sum if course.learning.parts > 1 else ""
        if vault is not None and sealed:
            with suppress(CheckpointError):
                step = course.learning.go_on(vault.open(self._ground.blobs.get(sealed), course.name.encode()))
                course.written = sealed, 0
                return step
        return state.round, 0

    def _updates_again(self, course: Course, now: float) -> None:
        """After a restart: merge the updates that are on a disk, so that nobody is asked again."""
        for key, digest in list(course.stored.items()):
            seat = course.state.seats.get(key)
            if seat is None or seat.at is not At.AGAIN or not self._ground.blobs.has(digest):
                continue
            try:
                self._taking.merged(course, seat, self._safe.update_of(course, seat, digest))
            except (UpdateRefused, ProtocolError):
                continue
            except CheckpointError:  # damaged, or of a key that is lost: asked for again
                self._driver.discard(course.stored.pop(key))
                continue
            self._driver.ahead(course, machine.Started(now, key, scale_of(seat)), now)
            self._driver.ahead(course, machine.Received(now, key), now)


def _courses(learning: Learning) -> Iterator[Course]:
    """A run, and what clients are asked beside its rounds."""
    yield Course.training(learning)
    if learning.served.evaluation.clients:
        yield Course.evaluating(learning)
    if learning.sealing is not None:
        yield Course.decrypting(learning)


def _check_same(learning: Learning, row: RunRow) -> None:
    if row.identity != learning.identity():
        raise CheckpointError(
            f"the run {row.name!r} was begun with another task, algorithm, cohort or seed. Give those again, or choose "
            "another name or folder"
        )


def _check_told(learning: Learning, gap: Gap | None) -> None:
    """Refuse a run that was put back, and nobody says what it released since."""
    if gap is None or gap.reached is not None or not learning.once:
        return
    name = learning.served.name
    raise CheckpointError(
        f"the run {name!r} was put back from a backup that was made after its round {gap.round}. What it released "
        "since then would be released again, and counted once. Restore it again, into an empty folder, with the last "
        f"round that had begun: foedus restore BACKUP FOLDER --reached {name}=ROUND (or any later one; clients know "
        "it: foedus ledger). Or serve it under another name, as a run of its own"
    )


__all__ = ["Parts", "Recovery"]
